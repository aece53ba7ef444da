//! What a program pays for being managed whole: at its start, for its helper, and in private memory.
//!
//! Programs are started in turn without the agent and with it, so that whatever else the machine does hits both alike.
//! Nothing is merged, so that what differs is the agent's and the helper's own.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use broker::{AgentFiles, Broker, BrokerHandle, Judge, Scope, Settings};
use clap::Args;
use kernel::{Pid, Range, smaps};
use serde::Serialize;

use crate::programs::Programs;
use crate::report::{Better, Machine, Ratio, Report};

/// What to do.
#[derive(Clone, Debug, Args)]
pub struct StartCommand {
    /// Programs started of each kind.
    #[arg(long, default_value_t = 300)]
    count: u32,
    /// MiB that the program holds whose private memory is looked at.
    #[arg(long, default_value_t = 64)]
    size: u64,
    /// The program that is started (the example `heap`); built if it is not named.
    #[arg(long)]
    program: Option<PathBuf>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// What the agent may add to a start, in milliseconds.
const START_MS: f64 = 2.0;
/// The private memory that agent and helper may take, in KiB, besides a byte for each managed page.
const PRIVATE_KIB: f64 = 32.0;

/// Times in seconds, sizes in bytes.
#[derive(Clone, Debug, Serialize)]
struct Costs {
    /// A program that does nothing, from its start to its end: median and the 90th of 100.
    plain: [f64; 2],
    /// The same with the agent, which gates it; too young for a helper.
    gated: [f64; 2],
    /// Median of what the agent adds.
    agent_adds: f64,
    /// The call at which the program waits for its helper.
    helper_starts: [f64; 2],
    /// The same call where there is no agent.
    same_call: [f64; 2],
    /// Anonymous memory of a program that holds much, without and with agent and helper: copies of patched code too, but
    /// not the agent's file, which all programs share.
    private_bytes: [u64; 2],
    /// Address space of the same.
    address_space: [u64; 2],
    /// What is left of the difference without a byte for each managed page.
    private_bytes_besides_marks: i64,
    pages_managed: u64,
}

#[derive(Debug)]
struct Trusting;

impl Judge for Trusting {
    fn program(&self, _pid: Pid, _own: &[Range]) -> Result<(), String> {
        Ok(())
    }

    fn admits(&self, _pid: Pid, _file: Option<&File>) -> Result<(), String> {
        Ok(())
    }
}

/// Programs are looked at so often. Nothing of what they hold has an equal.
const STABLE: Duration = Duration::from_secs(1);

/// A broker in this process that manages everything, and finds nothing to merge.
struct Whole {
    broker: BrokerHandle,
    files: AgentFiles,
}

impl Whole {
    fn start() -> Result<Self> {
        let settings = Settings { scope: Scope::All(Arc::new(Trusting)), stable: Some(STABLE), ..Settings::default() };
        Ok(Self { broker: Broker::start(settings)?, files: AgentFiles::write()? })
    }

    fn enter(&self, command: &mut Command) {
        command.env("LD_PRELOAD", self.files.image()).env("PAGEFOLD_AGENT", self.files.variable(&self.broker, true));
    }
}

impl StartCommand {
    /// Measures, and prints the report.
    ///
    /// # Errors
    /// If a program cannot be started, or is not managed.
    pub fn run(&self) -> Result<ExitCode> {
        kernel::task::set_child_subreaper(true).context("cannot become a child subreaper")?;
        let program = match &self.program {
            Some(program) => program.clone(),
            None => Programs::named_or_built(None, None)?.heap,
        };
        let whole = Whole::start()?;
        let command = |words: &[&str], managed: bool| {
            let mut command = Command::new(&program);
            command.args(words).env_remove("LD_PRELOAD").env_remove("PAGEFOLD_AGENT");
            if managed {
                whole.enter(&mut command);
            }
            command
        };
        let (mut plain, mut gated) = (Vec::new(), Vec::new());
        for _ in 0..self.count {
            for (managed, times) in [(false, &mut plain), (true, &mut gated)] {
                let begun = Instant::now();
                let status = command(&["--nothing", "1"], managed).status().context("cannot start the program")?;
                times.push(begun.elapsed().as_secs_f64());
                ensure!(status.success(), "the program ended with {status}");
            }
        }
        let (mut alone, mut waited) = (Vec::new(), Vec::new());
        for _ in 0..self.count.div_ceil(5) {
            for (managed, times) in [(false, &mut alone), (true, &mut waited)] {
                let output = command(&["--map", "16"], managed).output().context("cannot start the program")?;
                let text = String::from_utf8_lossy(&output.stdout);
                let nanoseconds: f64 = text.trim().parse().with_context(|| format!("not a number: {text}"))?;
                times.push(nanoseconds / 1e9);
            }
        }
        let size = self.size.to_string();
        let (plain_memory, plain_space, _) = held(command(&["--hold", &size], false), None)?;
        let (memory, space, managed) = held(command(&["--hold", &size], true), Some(&whole.broker))?;
        ensure!(managed > 0, "it was not managed: {:?}", whole.broker.summary()?.helper_refused);
        let costs = Costs {
            plain: quantiles(&mut plain),
            gated: quantiles(&mut gated),
            agent_adds: quantiles(&mut gated)[0] - quantiles(&mut plain)[0],
            helper_starts: quantiles(&mut waited),
            same_call: quantiles(&mut alone),
            private_bytes: [plain_memory, memory],
            address_space: [plain_space, space],
            private_bytes_besides_marks: memory.cast_signed() - plain_memory.cast_signed() - managed.cast_signed(),
            pages_managed: managed,
        };
        self.print(&costs)?;
        Ok(ExitCode::SUCCESS)
    }

    fn print(&self, costs: &Costs) -> Result<()> {
        let less = |metric, unit| (metric, unit, Better::Less);
        let ratios = vec![
            Ratio::new(less("added to a start", "ms"), costs.agent_adds * 1e3, ("the goal", START_MS), 1.0),
            Ratio::new(
                less("private memory besides marks", "KiB"),
                costs.private_bytes_besides_marks as f64 / 1024.0,
                ("the goal", PRIVATE_KIB),
                1.0,
            ),
        ];
        for [what, median, ninety] in [
            ["", "median ms", "90 % ms"].map(str::to_owned),
            row("start to end, without", costs.plain),
            row("start to end, with the agent", costs.gated),
            row("a call of 16 MiB, without", costs.same_call),
            row("the same, which waits for a helper", costs.helper_starts),
        ] {
            eprintln!("{what:<36} {median:>10} {ninety:>10}");
        }
        for ratio in &ratios {
            let met = if ratio.met { "" } else { ", missed" };
            eprintln!("{:<36} {:>10.2} {}, goal {:.0}{met}", ratio.metric, ratio.ours, ratio.unit, ratio.theirs);
        }
        if self.json {
            let samples = vec![serde_json::to_value(costs)?];
            let report = Report { scenario: "start", machine: Machine::here(), samples, ratios };
            println!("{}", serde_json::to_string_pretty(&report)?);
        }
        Ok(())
    }
}

fn row(what: &str, seconds: [f64; 2]) -> [String; 3] {
    let ms = |seconds: f64| format!("{:.3}", seconds * 1e3);
    [what.to_owned(), ms(seconds[0]), ms(seconds[1])]
}

/// Anonymous memory and address space of a program that holds something, and pages that are managed of it.
fn held(mut command: Command, broker: Option<&BrokerHandle>) -> Result<(u64, u64, u64)> {
    struct Killed(Child);
    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
    let child = Killed(command.stdout(Stdio::null()).spawn().context("cannot start the program")?);
    let pid = Pid(i32::try_from(child.0.id())?);
    // A helper comes, and what is there is put under management.
    std::thread::sleep(Duration::from_secs(4));
    let rollup = smaps::rollup(pid)?;
    let space = smaps::read(pid)?.iter().map(|vma| vma.vma.range.len().get()).sum();
    let managed = broker.map_or(Ok(0), |broker| broker.summary().map(|summary| summary.pages_managed))?;
    Ok((rollup.anonymous.get(), space, managed))
}

/// The median, and the 90th of 100.
fn quantiles(times: &mut [f64]) -> [f64; 2] {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).copied().unwrap_or(0.0);
    [at(0.5), at(0.9)]
}
