//! `bench predict`: what `eval` says kernel KSM will reach, beside what ksmd flat out then reaches, on real programs.
//!
//! The programs start marked mergeable (PR_SET_MEMORY_MERGE, inherited), run for a while, are evaluated with a second
//! look, and are stopped at its end, so that ksmd finds what was evaluated.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, ValueEnum};
use eval::{Options, Pace, SampleBy, Selection, Stage, evaluate};
use kernel::{Pid, ksm_sysfs};
use rustix::process::Signal;
use serde::Serialize;
use serde_json::json;

use crate::report::{Better, Machine, Ratio, Report};
use crate::sides::Scanner;

/// Until a program is ready.
const PATIENCE: Duration = Duration::from_secs(120);
/// Until ksmd has merged everything.
const MERGED_WITHIN: Duration = Duration::from_secs(180);

/// Real programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Python workers of one program: modules, a large dictionary.
    Python,
    /// redis servers with keys of their own and keys that all have.
    Redis,
    /// QEMU guests of one kernel, under TCG, that reach their init.
    Qemu,
}

/// `bench predict`.
#[derive(Args, Clone, Debug)]
pub struct PredictCommand {
    /// Print one JSON document to stdout.
    #[arg(long)]
    pub json: bool,
    /// Programs; all if none is named.
    #[arg(long = "kind", value_enum)]
    pub kinds: Vec<Kind>,
    /// Processes of each.
    #[arg(long, default_value_t = 4)]
    pub count: usize,
    /// Seconds between the two looks.
    #[arg(long, default_value_t = 5.0)]
    pub watch: f64,
}

/// What a sample said of the processes while they were stopped.
#[derive(Clone, Debug, Serialize)]
struct Sampled {
    method: &'static str,
    fraction: f64,
    /// Percentage points of all pages by which duplicates were over-estimated.
    off_points: f64,
    /// Half the range that was said, in percentage points.
    half_range_points: f64,
    /// The true number was in the range.
    in_range: bool,
    /// Time as a share of that of reading everything.
    time_share: f64,
}

/// What was said and what came.
struct Outcome {
    kind: Kind,
    predicted: u64,
    predicted_at_most: u64,
    reached: u64,
    volatile: u64,
    scanned: u64,
    seconds: f64,
    samples: Vec<Sampled>,
}

impl PredictCommand {
    /// Measures and reports. A prediction that is more than 3 % off is exit status 1.
    ///
    /// # Errors
    /// When a program cannot be started, or ksmd not be driven.
    pub fn run(&self) -> Result<ExitCode> {
        let machine = Machine::here();
        let kinds: &[Kind] = if self.kinds.is_empty() { Kind::value_variants() } else { &self.kinds };
        let mut outcomes = Vec::new();
        for kind in kinds {
            let outcome = self.measure(*kind).with_context(|| format!("{kind:?}"))?;
            eprintln!(
                "{kind:?}: predicted {} pages (at most {}), ksmd reached {}: {:+.2} %; {} of {} pages did not last; ksmd took {:.1} s",
                outcome.predicted,
                outcome.predicted_at_most,
                outcome.reached,
                off(&outcome) * 100.0,
                outcome.volatile,
                outcome.scanned,
                outcome.seconds
            );
            for sampled in &outcome.samples {
                eprintln!(
                    "  {:10} {:>4.0} %: off by {:+.2} points, half range {:.2}, {}, {:.0} % of the time",
                    sampled.method,
                    sampled.fraction * 100.0,
                    sampled.off_points,
                    sampled.half_range_points,
                    if sampled.in_range { "in range" } else { "NOT in range" },
                    sampled.time_share * 100.0
                );
            }
            outcomes.push(outcome);
        }
        let right = outcomes.iter().all(|outcome| off(outcome).abs() <= 0.03);
        if self.json {
            let ratio = |outcome: &Outcome| {
                let metric = ("difference between prediction and pages_sharing", "share", Better::Less);
                Ratio::new(metric, off(outcome).abs(), ("3 %", 0.03), 1.0)
            };
            let sample = |outcome: &Outcome| {
                json!({
                    "kind": format!("{:?}", outcome.kind),
                    "pages_sharing_predicted": outcome.predicted,
                    "pages_sharing_predicted_at_most": outcome.predicted_at_most,
                    "pages_sharing": outcome.reached,
                    "volatile_pages": outcome.volatile,
                    "pages_scanned": outcome.scanned,
                    "ksmd_seconds": outcome.seconds,
                    "samples": outcome.samples,
                })
            };
            let samples = outcomes.iter().map(sample).collect();
            let ratios = outcomes.iter().map(ratio).collect();
            println!("{}", serde_json::to_string(&Report { scenario: "predict", machine, samples, ratios })?);
        }
        Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }

    fn measure(&self, kind: Kind) -> Result<Outcome> {
        let scanner = Scanner::acquire()?;
        scanner.forget_the_dead()?;
        let folder = tempfile::Builder::new().prefix("predict").tempdir()?;
        let programs = Programs::start(kind, self.count, folder.path())?;
        let pids: Vec<Pid> = programs.pids().collect();
        std::thread::sleep(Duration::from_secs(2));
        let options = Options {
            selection: Selection { pids: pids.clone(), children: true, ..Selection::default() },
            pace: Pace { threads: 2, limit: None },
            watch: Some(Duration::from_secs_f64(self.watch)),
            ..Options::default()
        };
        let stop = |stage: Stage| {
            if stage == Stage::Counting {
                programs.signal(Signal::STOP);
            }
        };
        let report = evaluate(&options, &stop)?;
        let samples = samples(&options)?;
        let counters = report.totals.counters;
        let zeros = counters.zero_pages - counters.zero_pages_in_huge;
        let upper = counters.duplicate_pages + zeros.saturating_sub(1);
        let before = scanner.counters()?.pages_sharing;
        ensure!(before == 0, "something else on this machine is merged already ({before} pages)");
        let reached = scanner.run_until_settled(MERGED_WITHIN)?;
        drop(programs);
        // max_page_sharing cannot be put back while anything is merged: ksmd has to see first that they have ended.
        scanner.forget_the_dead()?;
        scanner.release()?;
        Ok(Outcome {
            kind,
            predicted: report.savings.pages_sharing_predicted,
            predicted_at_most: upper,
            reached: reached.pages_saved,
            volatile: report.totals.volatile_pages,
            scanned: report.totals.counters.pages_scanned,
            seconds: reached.seconds,
            samples,
        })
    }
}

/// Estimates from samples beside the truth, of processes that hold still.
fn samples(options: &Options) -> Result<Vec<Sampled>> {
    let still = Options { watch: None, ..options.clone() };
    let truth = evaluate(&still, &|_| {})?;
    let (pages, duplicates) =
        (truth.totals.counters.pages_scanned as f64, truth.totals.counters.duplicate_pages as f64);
    let ways = [
        SampleBy::HashSpace(0.01),
        SampleBy::HashSpace(0.1),
        SampleBy::Pages(0.05),
        SampleBy::Pages(0.1),
        SampleBy::Pages(0.25),
    ];
    ways.into_iter()
        .map(|way| {
            let report = evaluate(&Options { sample: Some(way), ..still.clone() }, &|_| {})?;
            let sample = report.sample.context("a sample was asked for")?;
            let points = |pages_of: f64| pages_of / pages * 100.0;
            let (low, high) = (sample.duplicate_pages_low as f64, sample.duplicate_pages_high as f64);
            Ok(Sampled {
                method: sample.method,
                fraction: sample.fraction,
                off_points: points(sample.duplicate_pages as f64 - duplicates),
                half_range_points: points((high - low) / 2.0),
                in_range: (low..=high).contains(&duplicates),
                time_share: report.reading.elapsed_seconds / truth.reading.elapsed_seconds,
            })
        })
        .collect()
}

/// How far the prediction is off: above 0 where too much was promised.
fn off(outcome: &Outcome) -> f64 {
    (outcome.predicted as f64 - outcome.reached as f64) / (outcome.reached.max(1) as f64)
}

/// Programs that are ended when this value goes.
struct Programs(Vec<Child>);

impl Programs {
    fn start(kind: Kind, count: usize, folder: &Path) -> Result<Self> {
        // Inherited over fork and exec; our own memory is out of it again at once.
        ksm_sysfs::set_memory_merge(true)?;
        let programs = Self::start_marked(kind, count, folder);
        ksm_sysfs::set_memory_merge(false)?;
        programs
    }

    fn start_marked(kind: Kind, count: usize, folder: &Path) -> Result<Self> {
        let mut programs = Self(Vec::new());
        for number in 0..count {
            let mut command = match kind {
                Kind::Python => python(),
                Kind::Redis => redis(folder, number),
                Kind::Qemu => qemu(folder, number)?,
            };
            let mut child = command
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .with_context(|| format!("cannot start {:?}", command.get_program()))?;
            let output = child.stdout.take().context("it has an output")?;
            programs.0.push(child);
            let word = match kind {
                Kind::Python => "ready",
                Kind::Redis => "ready to accept connections at",
                // The kernel has no root: this is as far as it comes, and it stays there with all that it has set up.
                Kind::Qemu => "Kernel panic",
            };
            wait_for(output, word)?;
            if kind == Kind::Redis {
                fill_redis(folder, number)?;
            }
        }
        Ok(programs)
    }

    fn pids(&self) -> impl Iterator<Item = Pid> {
        self.0.iter().map(|child| Pid(child.id().cast_signed()))
    }

    fn signal(&self, signal: Signal) {
        for pid in self.pids().filter_map(|pid| rustix::process::Pid::from_raw(pid.get())) {
            // It may have ended: then there is nothing to stop.
            let _ = rustix::process::kill_process(pid, signal);
        }
    }
}

impl Drop for Programs {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Reads a program's output until it says `word`, and goes on reading so that it never waits for us.
fn wait_for(output: impl std::io::Read + Send + 'static, word: &'static str) -> Result<()> {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
            if String::from_utf8_lossy(&line).contains(word) {
                let _ = tell.send(());
            }
            line.clear();
        }
    });
    told.recv_timeout(PATIENCE).with_context(|| format!("it never said {word:?}"))
}

fn python() -> Command {
    const PROGRAM: &str = "import sys, json, sqlite3, decimal, asyncio, time\n\
        table = {('key %d' % i): (i, str(i) * 3, [i, i + 1]) for i in range(100000)}\n\
        print('ready', flush=True)\n\
        while True:\n\x20   time.sleep(0.05); table['key 7'] = (time.time(), 0, 0)\n";
    let mut command = Command::new("python3");
    command.args(["-c", PROGRAM]).env("PYTHONHASHSEED", "0");
    command
}

fn redis(folder: &Path, number: usize) -> Command {
    let socket = folder.join(format!("{number}.sock"));
    let mut command = Command::new("redis-server");
    command.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]).arg(socket);
    command
}

/// Keys that all have, and keys of its own.
fn fill_redis(folder: &Path, number: usize) -> Result<()> {
    let script = format!(
        "for i = 1, 40000 do redis.call('set', 'page:' .. i, string.rep('the same for all ' .. i, 12)) end \
         for i = 1, 10000 do redis.call('set', 'own:{number}:' .. i, string.rep('{number}/' .. i, 20)) end return 1"
    );
    let socket = folder.join(format!("{number}.sock"));
    let deadline = Instant::now() + PATIENCE;
    loop {
        let filled = Command::new("redis-cli").arg("-s").arg(&socket).args(["eval", &script, "0"]).output()?;
        if filled.status.success() && filled.stdout.starts_with(b"1") {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("redis-cli: {}", String::from_utf8_lossy(&filled.stdout));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn qemu(folder: &Path, number: usize) -> Result<Command> {
    let kernel = crate::guest::Kernel::of_series("6.1")?;
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", "tcg", "-m", "192", "-display", "none", "-monitor", "none", "-serial", "stdio"])
        .args(["-nodefaults", "-no-reboot", "-name", &format!("guest{number}")])
        .arg("-kernel")
        .arg(&kernel.image)
        .args(["-append", "console=ttyS0 panic=0"])
        .current_dir(folder);
    Ok(command)
}
