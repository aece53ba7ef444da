//! Part (a) of `pagefold demo`: worker processes merged through the library.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kernel::{Launch, Launched, Pid, smaps, status};
use pagefold::{Flags, MergeReport, Partition};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::args::DemoArgs;
use crate::demo_hearing::Hearing;
use crate::demo_worker::Digest;

pub(crate) use crate::demo_worker::worker_main;

/// The hidden subcommand of a worker.
pub(crate) const WORKER: &str = "demo-worker";

/// Where files are that most machines have.
const FOLDERS: [&str; 5] = ["/usr/lib", "/usr/bin", "/usr/share", "/lib", "/bin"];
/// Smaller files are mostly padding.
const FILE_MIN: u64 = 64 << 10;
/// Longest that a worker may take for one thing.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the workers go on after the merge before they are checked.
const GO_ON: Duration = Duration::from_millis(1500);

/// What the kernel counts at one moment, in bytes.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Counted {
    /// Pss of the workers and of this process, which holds the page store.
    pub(crate) pss: u64,
    /// AnonPages of the whole machine.
    pub(crate) anon_pages: u64,
    /// Shmem of the whole machine.
    pub(crate) shmem: u64,
}

/// What was seen. Sizes in bytes, times in seconds.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct PartA {
    /// Pss before less Pss after, less what of the page store nobody maps.
    pub(crate) bytes_saved: u64,
    /// Every digest of every worker stayed what it was, and nothing that was written was read back otherwise.
    pub(crate) digests_equal: bool,
    /// `live`: other threads read and wrote meanwhile; `quiescent`: they waited.
    pub(crate) mode: &'static str,
    /// Why not live, if not.
    pub(crate) not_live: Option<String>,
    /// Workers.
    pub(crate) workers: usize,
    /// Bytes of files in each worker.
    pub(crate) bytes_each: u64,
    pub(crate) before: Counted,
    pub(crate) after: Counted,
    pub(crate) pages_merged: u64,
    pub(crate) zero_pages: u64,
    pub(crate) refused: std::collections::BTreeMap<String, u64>,
    /// Times that all of a worker's memory was read and found unchanged.
    pub(crate) reads: u64,
    /// Pages written and read back.
    pub(crate) writes: u64,
    /// From the first merge to the last.
    pub(crate) merge_seconds: f64,
    /// CPU time of all merges.
    pub(crate) merge_cpu_seconds: f64,
    /// Longest that pages were frozen, live.
    pub(crate) frozen_seconds_max: Option<f64>,
    pub(crate) elapsed_seconds: f64,
}

impl PartA {
    pub(crate) fn table(&self) -> String {
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<28}{value}");
        };
        line("workers", format!("{}, each with {} of this machine's files", self.workers, mib(self.bytes_each)));
        line("merged", self.mode.to_owned() + &self.not_live.as_ref().map_or(String::new(), |why| format!(" ({why})")));
        let both = |before: u64, after: u64| format!("{:>12} -> {:>12}", mib(before), mib(after));
        line("Pss, workers and store", both(self.before.pss, self.after.pss));
        line("AnonPages of the machine", both(self.before.anon_pages, self.after.anon_pages));
        line("Shmem of the machine", both(self.before.shmem, self.after.shmem));
        line("saved", mib(self.bytes_saved));
        line("pages merged, zero pages", format!("{}, {}", self.pages_merged, self.zero_pages));
        if !self.refused.is_empty() {
            let refused: Vec<_> = self.refused.iter().map(|(why, pages)| format!("{pages} {why}")).collect();
            line("pages left alone", refused.join(", "));
        }
        line("time, CPU time", format!("{:.2} s, {:.2} s", self.merge_seconds, self.merge_cpu_seconds));
        if let Some(longest) = self.frozen_seconds_max {
            line("longest wait", format!("{:.2} ms", longest * 1e3));
        }
        let verdict = if self.digests_equal { "unchanged" } else { "CHANGED" };
        line("memory", format!("{verdict}: read {} times, {} pages written and checked", self.reads, self.writes));
        format!("Workers merged through the library\n{text}")
    }
}

/// A running worker.
struct Worker {
    launched: Launched,
    tell: ChildStdin,
    hear: Hearing,
}

impl Worker {
    fn start(program: &Path, partition: &Partition, bytes: u64, files: &[PathBuf]) -> anyhow::Result<Self> {
        let mut command = Command::new(program);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        // A member of another run hands its memory over there and nowhere else.
        crate::store_run::without_agent(&mut command);
        let mut launch = Launch::new(command);
        let number = launch.inherit(partition.try_clone_fd().context("cannot pass the partition on")?);
        launch.command().arg(WORKER).arg(number.to_string());
        let mut launched = launch.spawn().context("cannot start a worker")?;
        let tell = launched.child.stdin.take().expect("it is a pipe");
        let hear = Hearing::new(launched.child.stdout.take().expect("it is a pipe"));
        let mut worker = Self { launched, tell, hear };
        let mut list = format!("{bytes}\n");
        for file in files {
            let _ = writeln!(list, "{}", file.display());
        }
        worker.say(&list)?;
        Ok(worker)
    }

    fn say(&mut self, text: &str) -> anyhow::Result<()> {
        writeln!(self.tell, "{text}").and_then(|()| self.tell.flush()).context("a worker has ended")
    }

    fn answer<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        serde_json::from_str(&self.hear.line(PATIENCE)?).context("a worker talks nonsense")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.launched.child.kill();
        let _ = self.launched.child.wait();
    }
}

pub(crate) fn part_a(args: &DemoArgs) -> anyhow::Result<PartA> {
    let begun = Instant::now();
    let not_live = kernel::Features::probe().live_merge().err().map(|missing| missing.to_string());
    let mode = if not_live.is_none() { "live" } else { "quiescent" };
    let bytes = u64::from(args.size) << 20;
    let files = files(bytes);
    let program = std::env::current_exe().context("cannot find this program")?;
    let partition = Partition::open("demo", Flags::default())?;
    let say = |text: &str| {
        if !args.json {
            crate::say::lines(&format!("store part: {text}\n"));
        }
    };
    say(&format!("{} workers load {} MiB each", args.workers, args.size));
    let mut workers = Vec::new();
    for _ in 0..args.workers {
        workers.push(Worker::start(&program, &partition, bytes, &files)?);
    }
    let mut held = Vec::new();
    for worker in &mut workers {
        held.push(worker.answer::<Digest>()?);
    }
    let before = count(&workers)?;
    say(&format!("merging, {mode}"));
    let merging = Instant::now();
    let mut total = MergeReport::default();
    // The second round is for what the first workers had alone when they were asked.
    for _ in 0..2 {
        let mut round = MergeReport::default();
        for worker in &mut workers {
            worker.say(mode)?;
            round.add(&worker.answer()?);
        }
        // What the first round left was looked at again.
        total.refused.clear();
        total.add(&round);
    }
    let merge_seconds = merging.elapsed().as_secs_f64();
    say("checking that nothing has changed");
    std::thread::sleep(GO_ON);
    let after = count(&workers)?;
    let summary = partition.summary()?;
    let mut digests_equal = held.iter().all(|one| one.digest == held[0].digest && one.bytes == held[0].bytes);
    let (mut reads, mut writes) = (0, 0);
    for (worker, held) in workers.iter_mut().zip(&held) {
        worker.say("check")?;
        let now: Digest = worker.answer()?;
        digests_equal &= now.digest == held.digest && now.wrong == 0;
        reads += now.reads;
        writes += now.writes;
    }
    let word = |name: &str| summary[name].as_u64().unwrap_or(0);
    let idle = word("store_pages").saturating_sub(word("pages_shared")) * kernel::page_size();
    Ok(PartA {
        bytes_saved: before.pss.saturating_sub(after.pss).saturating_sub(idle),
        digests_equal,
        mode,
        not_live,
        workers: workers.len(),
        bytes_each: held[0].bytes,
        before,
        after,
        pages_merged: total.pages_merged + total.pages_merged_elsewhere,
        zero_pages: total.zero_pages,
        refused: total.refused,
        reads,
        writes,
        merge_seconds,
        merge_cpu_seconds: total.cpu.as_secs_f64(),
        frozen_seconds_max: (mode == "live").then(|| summary["frozen_seconds"]["max"].as_f64()).flatten(),
        elapsed_seconds: begun.elapsed().as_secs_f64(),
    })
}

fn count(workers: &[Worker]) -> anyhow::Result<Counted> {
    let mut pss = smaps::rollup(Pid::this())?.pss.get();
    for worker in workers {
        pss += smaps::rollup(worker.launched.pid())?.pss.get();
    }
    let machine = status::meminfo()?;
    Ok(Counted { pss, anon_pages: machine.anon_pages.get(), shmem: machine.shmem.get() })
}

/// Files that everybody may read, the same for every worker, with enough bytes.
fn files(bytes: u64) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut seen = std::collections::HashSet::new();
    let mut left = bytes;
    let mut folders: Vec<PathBuf> = FOLDERS.iter().rev().map(PathBuf::from).collect();
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        let mut entries: Vec<_> = entries.filter_map(Result::ok).map(|entry| entry.path()).collect();
        entries.sort();
        for path in entries {
            let Ok(about) = path.symlink_metadata() else { continue };
            if about.is_dir() {
                folders.push(path);
                continue;
            }
            let suitable =
                about.is_file() && about.len() >= FILE_MIN && path.to_str().is_some_and(|name| !name.contains('\n'));
            if suitable && seen.insert((about.dev(), about.ino())) && fs::File::open(&path).is_ok() {
                left = left.saturating_sub(about.len());
                found.push(path);
                if left == 0 {
                    return found;
                }
            }
        }
    }
    found
}
