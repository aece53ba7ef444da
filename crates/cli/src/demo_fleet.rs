//! The interpreter's workers, as `pagefold demo` shows them under kernel KSM and managed whole.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use kernel::Pid;
use kernel::launch::Launch;
use ksm::{Layout, StackLimit};

use crate::demo_hearing::Hearing;
use crate::demo_interpreter::Interpreter;

/// What eight workers need beside what everybody else needs.
const ROOM: u64 = 1 << 30;
/// Longest that a worker may take for one thing, beside what all of them take of the processors.
const PATIENCE: Duration = Duration::from_secs(60);
const PATIENCE_FOR_EACH: Duration = Duration::from_secs(5);

pub(crate) const NO_INTERPRETER: &str = "neither python3 with sqlite3 nor node is installed";

/// Why there are no workers on this machine, if there are none.
pub(crate) fn no_room() -> anyhow::Result<Option<String>> {
    let available = kernel::status::meminfo()?.mem_available.get();
    let why = || format!("only {:.0} MiB of memory are available, 1 GiB is needed", mib(available));
    Ok((available < ROOM).then(why))
}

pub(crate) fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

/// Which share is gone.
pub(crate) fn saved(before: u64, after: u64) -> f64 {
    1.0 - after as f64 / before.max(1) as f64
}

/// AnonPages and Shmem of the host.
pub(crate) fn anonymous_and_shared() -> anyhow::Result<u64> {
    let info = kernel::status::meminfo()?;
    Ok((info.anon_pages + info.shmem).get())
}

/// All of them.
pub(crate) struct Fleet(Vec<Worker>);

impl Fleet {
    /// Starts workers, prepared by the caller, and waits until they have loaded their data.
    pub(crate) fn start(
        interpreter: &Interpreter,
        files: &[PathBuf],
        layout: Layout,
        count: usize,
        mut prepare: impl FnMut(&mut Launch),
    ) -> anyhow::Result<Self> {
        let mut fleet = Self(Vec::new());
        let patience = PATIENCE + PATIENCE_FOR_EACH * u32::try_from(count).unwrap_or(u32::MAX);
        for _ in 0..count {
            fleet.0.push(Worker::start(interpreter, files, layout, patience, &mut prepare)?);
        }
        for worker in &mut fleet.0 {
            worker.digest = worker.line()?;
        }
        Ok(fleet)
    }

    /// Has all of them read and write for some rounds, which it returns.
    pub(crate) fn work(&mut self) -> anyhow::Result<u64> {
        for worker in &mut self.0 {
            worker.tell("work 5")?;
        }
        for worker in &mut self.0 {
            worker.line()?;
        }
        Ok(5)
    }

    /// How many of them hold what they held after loading, and what all hold, and have written what they should have.
    pub(crate) fn check(&mut self) -> anyhow::Result<usize> {
        for worker in &mut self.0 {
            worker.tell("check")?;
        }
        let first = self.0.first().map(|worker| worker.digest.clone()).unwrap_or_default();
        let mut right = 0;
        for worker in &mut self.0 {
            let answer = worker.line()?;
            right += usize::from(worker.digest == first && answer == format!("{first} right"));
        }
        Ok(right)
    }

    /// Anonymous and shared memory by their proportional shares.
    pub(crate) fn pss(&self) -> anyhow::Result<u64> {
        let mut sum = 0;
        for worker in &self.0 {
            let memory = kernel::smaps::rollup(Pid(worker.child.id().cast_signed()))?;
            sum += (memory.pss_anon + memory.pss_shmem).get();
        }
        Ok(sum)
    }
}

/// One worker with its conversation. Dropping it ends it.
struct Worker {
    child: Child,
    to: Option<ChildStdin>,
    from: Hearing,
    patience: Duration,
    digest: String,
}

impl Worker {
    fn start(
        interpreter: &Interpreter,
        files: &[PathBuf],
        layout: Layout,
        patience: Duration,
        prepare: impl FnOnce(&mut Launch),
    ) -> anyhow::Result<Self> {
        let mut command = interpreter.command();
        command.args(files).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut launch = Launch::new(command);
        prepare(&mut launch);
        let (launched, _) = layout.spawn(launch, StackLimit::PutBack)?;
        let mut child = launched.child;
        let to = child.stdin.take();
        let from = Hearing::new(child.stdout.take().context("a worker without output")?);
        Ok(Self { child, to, from, patience, digest: String::new() })
    }

    fn tell(&mut self, line: &str) -> anyhow::Result<()> {
        let to = self.to.as_mut().context("a worker without input")?;
        writeln!(to, "{line}").context("a worker has ended")
    }

    fn line(&mut self) -> anyhow::Result<String> {
        self.from.line(self.patience)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The end of its input ends it; the kill is for one that hangs.
        self.to = None;
        for _ in 0..100 {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
