//! One launch, and who is killed in it.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use kernel::{Pid, Pidfd, Signal};

use super::Report;
use super::processes::Tree;
use crate::programs::Programs;

/// A round is over by then, or something hangs: the programs have watchdogs of their own.
const HANGS_AFTER: Duration = Duration::from_secs(300);
/// How long the processes of a round may take to go after its programs have ended.
const GONE_WITHIN: Duration = Duration::from_secs(30);

const GUARDIAN: &str = match broker::guardian::NAME.to_str() {
    Ok(name) => name,
    Err(_) => panic!("a name in ASCII"),
};

/// Who dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Helper,
    Broker,
    Guardian,
}

/// Up to two, one a moment after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kills {
    roles: [Option<Role>; 2],
    /// Share of the round after which it happens, in percent.
    when: u64,
    /// Microseconds between the two.
    apart: u64,
}

impl Kills {
    /// True if broker and helper both die.
    fn leave_nobody(self) -> bool {
        [Role::Broker, Role::Helper].iter().all(|role| self.roles.contains(&Some(*role)))
    }

    pub(super) fn drawn(seed: u64) -> Self {
        use Role::{Broker, Guardian, Helper};
        const PAIRS: [[Option<Role>; 2]; 10] = [
            [Some(Helper), None],
            [Some(Helper), Some(Broker)],
            [None, None],
            [Some(Broker), Some(Helper)],
            [Some(Broker), None],
            [Some(Helper), Some(Guardian)],
            [Some(Broker), Some(Guardian)],
            [Some(Guardian), None],
            [Some(Guardian), Some(Broker)],
            [Some(Guardian), Some(Helper)],
        ];
        let mixed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        Self { roles: PAIRS[(seed % 10) as usize], when: 30 + mixed % 50, apart: mixed / 64 % 3000 }
    }
}

/// What the programs do.
pub(super) enum Torture<'a> {
    /// Memory that they mark, also through a file system of FUSE mounted here.
    Marked(Option<&'a Path>),
    /// Memory of an allocator, preloaded from here or the C library's; they are managed whole.
    Allocator(Option<&'a Path>),
}

pub(super) fn run(
    programs: &Programs,
    seed: u64,
    left: Duration,
    folder: &Path,
    torture: &Torture<'_>,
    kills: Kills,
    report: &mut Report,
) -> Result<()> {
    let seconds = (8 + seed % 9).min(left.as_secs().max(3));
    let (result, summary) = (folder.join("report"), folder.join("summary"));
    let refused_before = report.refused;
    let mut command = Command::new(&programs.pagefold);
    command.args(["run", "--quiet", "--stable", "0.2", "--summary"]).arg(&summary);
    if let Torture::Allocator(preload) = torture {
        command.args(["--scope", "all"]);
        if let Some(preload) = preload {
            command.env("LD_PRELOAD", preload);
        }
    }
    command.arg("--").arg(if let Torture::Allocator(_) = torture { &programs.heap } else { &programs.torture });
    command.arg("--seconds").arg(seconds.to_string()).arg("--seed").arg(seed.to_string());
    command.args(["--processes", "2", "--folder"]).arg(folder).arg("--report").arg(&result);
    if let Torture::Marked(Some(mount)) = torture {
        command.arg("--mount").arg(mount);
    }
    let mut broker = command.stdin(Stdio::null()).spawn().context("cannot start pagefold")?;
    let pid = Pid(i32::try_from(broker.id()).context("a process id")?);
    let begun = Instant::now();
    std::thread::sleep(Duration::from_millis(seconds * 10 * kills.when));
    let tree = Tree::read();
    let mut broker_killed = false;
    for (index, role) in kills.roles.into_iter().flatten().enumerate() {
        if index > 0 {
            std::thread::sleep(Duration::from_micros(kills.apart));
        }
        match role {
            Role::Broker => {
                kill(pid);
                broker_killed = true;
                report.brokers_killed += 1;
            }
            Role::Helper => {
                for (helper, _) in tree.below(pid).iter().filter(|(_, process)| process.name == "pagefold-helper") {
                    kill(*helper);
                    report.helpers_killed += 1;
                }
            }
            Role::Guardian => {
                let guardians: Vec<_> =
                    tree.below(pid).into_iter().filter(|(_, process)| process.name == GUARDIAN).collect();
                // It goes by a name: under another one nobody would be killed, and nothing tested.
                ensure!(!guardians.is_empty(), "there is no guardian to be killed");
                guardians.iter().for_each(|(guardian, _)| kill(*guardian));
                report.guardians_killed += guardians.len() as u64;
            }
        }
    }
    // The programs outlive a dead broker; they are this process's children then.
    let status = loop {
        if let Some(status) = broker.try_wait().context("cannot wait for pagefold")? {
            break status;
        }
        if begun.elapsed() > HANGS_AFTER {
            bail!("it hangs: {:?}", Tree::read().below(Pid::this()));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    ensure!(broker_killed || status.success(), "the programs ended with {status}");
    let mut over = None;
    loop {
        kernel::signals::reap_others(Pid(0));
        let names = ["torture", "heap", "pagefold-helper", "pagefold", GUARDIAN];
        let there: Vec<_> = Tree::read()
            .below(Pid::this())
            .into_iter()
            .filter(|(pid, process)| names.contains(&process.name.as_str()) && !serves_fuse(*pid))
            .collect();
        if there.is_empty() {
            break;
        }
        let running = there.iter().any(|(_, process)| ["torture", "heap"].contains(&process.name.as_str()));
        let since = *over.get_or_insert_with(Instant::now);
        if running && begun.elapsed() > HANGS_AFTER || !running && since.elapsed() > GONE_WITHIN {
            bail!("these do not end: {there:?}");
        }
        if running {
            over = None;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let other = folder.join("report.1");
    for file in [&result, &other] {
        count(file, report).with_context(|| format!("a program said nothing, or that it went wrong ({status})"))?;
    }
    // Memory that is managed whole is never refused anything, unless nobody is left who could give pages back.
    let may_refuse = matches!(torture, Torture::Marked(_)) || kills.leave_nobody();
    ensure!(may_refuse || report.refused == refused_before, "calls failed in a program that was managed whole");
    let merged = std::fs::read(&summary).ok().and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok());
    if let Some(summary) = merged {
        let number = |name: &str| summary.get(name).and_then(serde_json::Value::as_u64).unwrap_or(0);
        report.merges += number("merges");
        report.retaken += number("retaken");
    }
    Ok(())
}

fn serves_fuse(pid: Pid) -> bool {
    std::fs::read(format!("/proc/{}/cmdline", pid.get()))
        .is_ok_and(|line| line.windows(6).any(|word| word == b"--fuse"))
}

fn kill(pid: Pid) {
    if let Ok(pidfd) = Pidfd::open(pid) {
        let _ = pidfd.send_signal(Signal::KILL);
    }
}

/// Adds what a program wrote down, and removes it.
fn count(file: &Path, report: &mut Report) -> Result<()> {
    let text = std::fs::read_to_string(file).with_context(|| format!("no report {}", file.display()))?;
    std::fs::remove_file(file)?;
    for (name, value) in text.lines().filter_map(|line| line.split_once(' ')) {
        let value: u64 = value.parse().context("a number")?;
        let sum = match name {
            "operations" => &mut report.operations,
            "pages_checked" => &mut report.pages_checked,
            "forks" => &mut report.forks,
            "remaps" => &mut report.remaps,
            "direct_reads" => &mut report.direct_reads,
            "ring_reads" => &mut report.ring_reads,
            "pipe_pages" => &mut report.pipe_pages,
            "fuse_reads" => &mut report.fuse_reads,
            "refused" => &mut report.refused,
            "maps" => {
                report.maps = report.maps.max(value);
                continue;
            }
            "right" => {
                ensure!(value == 1, "a program found something wrong");
                continue;
            }
            _ => continue,
        };
        *sum += value;
    }
    Ok(())
}
