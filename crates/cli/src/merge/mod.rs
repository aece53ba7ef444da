//! `pagefold merge` and `unmerge`: chosen memory of running processes, merged by the kernel's KSM and taken back.

use std::ops::ControlFlow;
use std::process::ExitCode;

use anyhow::Context as _;
use eval::Selection;
use kernel::signals::{self, SignalFd};
use kernel::{Pid, Signal};
use ksm::KsmError;
use ksm::request::{RequestError, Stage};

use self::bar::Bar;
use crate::{NOT_HERE, say};

mod back;
mod bar;
mod now;
mod table;

pub(crate) use back::unmerge;
pub(crate) use now::merge;

/// The processes that are meant, each address space once. `Err` is an exit status, and was said.
fn processes(pids: &[i32], children: bool) -> Result<Vec<Pid>, ExitCode> {
    let pids = pids.iter().copied().map(Pid).collect();
    match (Selection { pids, children, ..Selection::default() }).resolve() {
        Ok(targets) => {
            for skipped in &targets.skipped {
                say::note(format_args!("process {} ({}) is left out: {}", skipped.pid, skipped.comm, skipped.reason));
            }
            Ok(targets.processes.iter().map(|process| Pid(process.pid)).collect())
        }
        Err(error) => {
            let status = if error.is_permission() { NOT_HERE } else { 1 };
            say::note(format_args!("{:#}", anyhow::Error::new(error)));
            Err(ExitCode::from(status))
        }
    }
}

/// The signals that ask for an end, and the progress that is shown until then.
struct Watched {
    signals: SignalFd,
    bar: Bar,
    arrived: Option<i32>,
}

impl Watched {
    /// To be made before there are other threads.
    fn new(hidden: bool) -> anyhow::Result<Self> {
        let signals = SignalFd::block(&[Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT]);
        Ok(Self { signals: signals.context("cannot block signals")?, bar: Bar::new(hidden), arrived: None })
    }

    /// Shows how far it is; a signal ends it.
    fn tell(&mut self, stage: Stage) -> ControlFlow<()> {
        self.bar.tell(stage);
        if let Ok(Some(arrived)) = self.signals.take() {
            self.arrived = Some(arrived.number);
        }
        if self.arrived.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    /// Ends by the signal that has arrived, if one has, as if it had never been blocked: everything is put back.
    fn end(&self, status: ExitCode) -> ExitCode {
        match self.arrived {
            Some(signal) => {
                signals::die_by(signal);
                ExitCode::from(u8::try_from(128 + signal).unwrap_or(u8::MAX))
            }
            None => status,
        }
    }
}

/// Says why nothing could be done, and with which status to end.
fn refused(error: RequestError) -> anyhow::Result<ExitCode> {
    let missing = matches!(
        error,
        RequestError::Frames(_) | RequestError::Ksm(KsmError::Missing { .. } | KsmError::ReadOnly { .. })
    );
    let error = anyhow::Error::new(error);
    if !missing {
        return Err(error);
    }
    say::note(format_args!("{error:#}"));
    Ok(ExitCode::from(NOT_HERE))
}
