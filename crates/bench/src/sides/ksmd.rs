//! Theirs: ksmd as fast as it goes, under the lease on KSM's settings, with a guardian that puts them back after any
//! death of this process, also by Ctrl-C.

use std::fs::File;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Args;
use kernel::Signal;
use kernel::signals::SignalFd;
use ksm::{Counters, KsmSysfs, Ksmd, Lease, ProcessId, Rate, StatePath, Wanted};

/// How often the counters are looked at.
const LOOK: Duration = Duration::from_millis(1);
/// For how long the counters stay as they are once ksmd has forgotten the dead.
const QUIET: Duration = Duration::from_millis(300);
/// How long that may take.
const FORGOTTEN_WITHIN: Duration = Duration::from_secs(20);
/// Passes without anything new after which nothing more is to be expected.
const PASSES_IN_VAIN: u64 = 4;

/// ksmd, resting until it is told to run.
#[derive(Debug)]
pub struct Scanner {
    lease: Lease,
    guardian: Child,
    ksmd: Ksmd,
    _lock: File,
}

/// How far ksmd has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Reached {
    /// Seconds until it came there.
    pub seconds: f64,
    /// CPU seconds of ksmd.
    pub cpu_seconds: f64,
    /// Pages by which `pages_sharing` rose.
    pub pages_saved: u64,
    /// Pages that it compared.
    pub pages_scanned: u64,
}

fn flat_out() -> Wanted {
    Wanted { run: Some(true), rate: Some(Rate::FLAT_OUT), smart_scan: Some(false), ..Wanted::default() }
}

impl Scanner {
    /// Takes the lease; ksmd is left as it is.
    ///
    /// # Errors
    /// When KSM's settings cannot be changed or ksmd cannot be seen.
    pub fn acquire() -> Result<Self> {
        Self::acquire_under(ksm::host_lock().context("cannot take the lock of host-wide settings")?)
    }

    /// The same under the lock of host-wide settings, which whoever may not wait for it takes in a way of its own.
    ///
    /// # Errors
    /// As [`Self::acquire`].
    pub fn acquire_under(lock: File) -> Result<Self> {
        let ksmd = Ksmd::find().context("ksmd is not to be seen here")?;
        let sysfs = KsmSysfs::host();
        ksm::check_writable(&sysfs)?;
        // First the guardian, then the lease: at no moment is there a lease that nobody would end.
        let me = ProcessId::current()?;
        let path = StatePath::for_this_user();
        let guardian = Command::new("/proc/self/exe")
            .arg("ksm-guardian")
            .args([me.pid.to_string(), me.start_time.to_string()])
            .args([path.as_path(), sysfs.root()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot start the guardian of KSM's settings")?;
        let lease = Lease::acquire_at(&path, &sysfs, Wanted::default());
        match lease {
            Ok((lease, _)) => Ok(Self { lease, guardian, ksmd, _lock: lock }),
            Err(error) => {
                end(guardian);
                Err(error.into())
            }
        }
    }

    /// Lets ksmd forget the processes that have ended: until it has been there, they count as if they were alive.
    ///
    /// # Errors
    /// Those of KSM's files and of the lease.
    pub fn forget_the_dead(&self) -> Result<()> {
        let deadline = Instant::now() + FORGOTTEN_WITHIN;
        let mut last = self.counters()?;
        let mut since = Instant::now();
        self.run()?;
        while since.elapsed() < QUIET && Instant::now() < deadline {
            std::thread::sleep(LOOK);
            let now = self.counters()?;
            if now.pages_sharing != last.pages_sharing || now.pages_shared != last.pages_shared {
                (last, since) = (now, Instant::now());
            }
        }
        self.rest()
    }

    /// Lets ksmd run until `pages_sharing` has risen by `pages`, or until some passes have brought nothing, or for
    /// `at_most`. It runs on.
    ///
    /// # Errors
    /// Those of KSM's files and of the lease.
    pub fn run_until(&self, pages: u64, at_most: Duration) -> Result<Reached> {
        self.run_as_until(flat_out(), pages, at_most)
    }

    /// The same until nothing new comes, with one copy of each content however many map it, zero pages merged like
    /// others: `pages_sharing` then is all that there is to share.
    ///
    /// # Errors
    /// Those of KSM's files and of the lease.
    pub fn run_until_settled(&self, at_most: Duration) -> Result<Reached> {
        let wanted = Wanted { use_zero_pages: Some(false), max_page_sharing: Some(10_000_000), ..flat_out() };
        self.run_as_until(wanted, u64::MAX, at_most)
    }

    fn run_as_until(&self, wanted: Wanted, pages: u64, at_most: Duration) -> Result<Reached> {
        let before = self.counters()?;
        let cpu = self.cpu();
        let begun = Instant::now();
        self.lease.update(wanted)?;
        let mut best = Reached::default();
        let mut best_pass = before.full_scans;
        loop {
            let now = self.counters()?;
            let saved = now.pages_sharing.saturating_sub(before.pages_sharing);
            if saved > best.pages_saved {
                best_pass = now.full_scans;
                best = Reached {
                    seconds: begun.elapsed().as_secs_f64(),
                    cpu_seconds: self.cpu().saturating_sub(cpu).as_secs_f64(),
                    pages_saved: saved,
                    pages_scanned: now.pages_scanned.saturating_sub(before.pages_scanned),
                };
            }
            let vain = now.full_scans.saturating_sub(best_pass) >= PASSES_IN_VAIN;
            if saved >= pages || vain || begun.elapsed() > at_most {
                return Ok(best);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Lets ksmd run flat out.
    ///
    /// # Errors
    /// Those of the lease.
    pub fn run(&self) -> Result<()> {
        self.lease.update(flat_out())?;
        Ok(())
    }

    /// Asks for something of one's own.
    ///
    /// # Errors
    /// Those of the lease.
    pub fn ask(&self, wanted: Wanted) -> Result<()> {
        self.lease.update(wanted)?;
        Ok(())
    }

    /// Puts the administrator's settings back for a while.
    ///
    /// # Errors
    /// Those of the lease.
    pub fn rest(&self) -> Result<()> {
        self.lease.update(Wanted::default())?;
        Ok(())
    }

    /// KSM's directory.
    #[must_use]
    pub fn sysfs(&self) -> &KsmSysfs {
        self.lease.sysfs()
    }

    /// KSM's counters.
    ///
    /// # Errors
    /// Those of KSM's files.
    pub fn counters(&self) -> Result<Counters> {
        Ok(Counters::read(self.lease.sysfs())?)
    }

    /// CPU time of ksmd.
    #[must_use]
    pub fn cpu(&self) -> Duration {
        self.ksmd.cpu_time().unwrap_or_default()
    }

    /// Gives the settings back.
    ///
    /// # Errors
    /// Those of the lease; its guardian then tries again when this process has ended.
    pub fn release(self) -> Result<()> {
        let Self { lease, guardian, .. } = self;
        lease.release()?;
        end(guardian);
        Ok(())
    }
}

fn end(mut guardian: Child) {
    // Both fail only if it is gone already.
    let _ = guardian.kill();
    let _ = guardian.wait();
}

/// `bench ksm-guardian`: ends the lease of a benchmark that has died. Not for people.
#[derive(Args, Clone, Debug)]
pub struct KsmGuardianCommand {
    /// Who holds the lease.
    pid: i32,
    /// When it was started, in clock ticks.
    start_time: u64,
    /// The state file.
    state: PathBuf,
    /// KSM's directory.
    sysfs: PathBuf,
}

impl KsmGuardianCommand {
    /// Runs until the holder has ended.
    ///
    /// # Errors
    /// When the holder cannot be watched.
    pub fn run(&self) -> Result<ExitCode> {
        let holder = ProcessId { pid: self.pid, start_time: self.start_time };
        let _ignored =
            SignalFd::block(&[Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT]).context("cannot block signals")?;
        ksm::guard(&StatePath::at(&self.state), &KsmSysfs::at(&self.sysfs), &[holder], |_| ())?;
        Ok(ExitCode::SUCCESS)
    }
}
