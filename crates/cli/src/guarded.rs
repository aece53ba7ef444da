//! A process beside the holder of a lease on KSM's settings, which ends the lease when the holder was killed.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::Context as _;
use kernel::Signal;
use kernel::signals::SignalFd;
use ksm::{KsmSysfs, ProcessId, StatePath};

use crate::say;

/// The hidden subcommand under which this binary is its own guardian.
pub(crate) const GUARDIAN: &str = "ksm-guardian";

/// The guardian of this process. To be started before the lease is taken, and ended after it was given back: at no
/// moment is there a lease that nobody would end. Dropped without that, it stays and looks once more when this process
/// is gone.
pub(crate) struct Guardian(Child);

impl Guardian {
    /// This binary under its hidden name, in a process group of its own, so that a key of the terminal does not end it
    /// together with whom it guards.
    pub(crate) fn start(path: &StatePath, sysfs: &KsmSysfs, quiet: bool) -> anyhow::Result<Self> {
        let me = ProcessId::current()?;
        let guardian = Command::new("/proc/self/exe")
            .arg0("pagefold-guardian")
            .arg(GUARDIAN)
            .args([me.pid.to_string(), me.start_time.to_string()])
            .args([path.as_path(), sysfs.root()])
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(if quiet { Stdio::null() } else { Stdio::inherit() })
            .process_group(0)
            .spawn()
            .context("cannot start the guardian")?;
        Ok(Self(guardian))
    }

    /// Its number, for whoever does not want to count it.
    pub(crate) fn pid(&self) -> i32 {
        self.0.id().cast_signed()
    }

    /// Ends it: the lease was given back.
    pub(crate) fn end(mut self) {
        // Both fail only if it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The guardian: waits for the end of the process that started it and ends that one's lease. `args` are what follows
/// the hidden subcommand: pid, start time, state file, KSM's directory.
pub(crate) fn guardian_main(args: &[OsString]) -> anyhow::Result<ExitCode> {
    let [pid, start_time, state, sysfs] = args else { anyhow::bail!("the guardian takes four arguments") };
    let number = |text: &OsString| text.to_str().and_then(|text| text.parse::<u64>().ok()).context("not a number");
    let holder = ProcessId { pid: i32::try_from(number(pid)?)?, start_time: number(start_time)? };
    // Who ends a whole session politely ends the guarded one too, which then takes some time to leave.
    let _ignored =
        SignalFd::block(&[Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT]).context("cannot block signals")?;
    ksm::guard(&StatePath::at(state), &KsmSysfs::at(sysfs), &[holder], |ended| {
        if !ended.repaired.is_clean() {
            say::note(&ended.repaired);
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
