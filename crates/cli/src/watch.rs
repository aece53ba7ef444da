//! A started command: what arrives for it is passed on, its end is noticed, its status becomes this process's own.

use std::os::fd::AsFd as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitCode, ExitStatus};
use std::time::Instant;

use anyhow::Context as _;
use kernel::Signal;
use kernel::launch::Launched;
use kernel::signals::{self, SignalFd};

/// The command, and the signals that arrive for it.
pub(crate) struct Watch<'a> {
    launched: Launched,
    signals: &'a SignalFd,
}

/// What a look at them found.
pub(crate) enum Seen {
    /// It runs. `asked`: SIGUSR1 has come, so the state is to be told.
    Runs { asked: bool },
    /// It has ended.
    Ended(ExitStatus),
}

impl<'a> Watch<'a> {
    pub(crate) fn new(launched: Launched, signals: &'a SignalFd) -> Self {
        Self { launched, signals }
    }

    /// Passes on what has arrived and looks whether the command has ended.
    pub(crate) fn look(&mut self) -> anyhow::Result<Seen> {
        let mut asked = false;
        while let Some(arrived) = self.signals.take().context("cannot read signals")? {
            match arrived.signal() {
                Some(Signal::CHILD) => {}
                Some(Signal::USR1) => asked = true,
                // It may be gone already, as the next lines will see.
                _ if arrived.is_for(self.launched.pid()) => {
                    let _ = arrived.pass_on(&self.launched.pidfd);
                }
                _ => {}
            }
        }
        if let Some(status) = self.launched.child.try_wait().context("cannot wait for the command")? {
            return Ok(Seen::Ended(status));
        }
        signals::reap_others(self.launched.pid());
        Ok(Seen::Runs { asked })
    }

    /// Waits for the next signal, the command's end among them.
    pub(crate) fn wait(&self, until: Instant) -> anyhow::Result<()> {
        kernel::pidfd::poll_in(self.signals.as_fd(), Some(until.saturating_duration_since(Instant::now())))
            .context("cannot wait for signals")?;
        Ok(())
    }
}

/// Ends as the command ended.
pub(crate) fn pass_on(status: ExitStatus) -> ExitCode {
    if let Some(code) = status.code() {
        return ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX));
    }
    let number = status.signal().unwrap_or(0);
    signals::die_by(number);
    // As a shell says it, where the signal did not end this process.
    ExitCode::from(u8::try_from(128 + number).unwrap_or(u8::MAX))
}
