//! Ctrl-C, taken as a wish to end in order: whoever works here asks often whether to go on, and cleans up if not.

use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use kernel::Signal;
use kernel::pidfd::poll_in;
use kernel::signals::SignalFd;

/// The status of a process that a signal has asked to end.
pub(super) const INTERRUPTED: u8 = 130;
/// How often a thread that waits is asked whether it has ended.
const TICK: Duration = Duration::from_millis(200);

static SIGNALS: OnceLock<SignalFd> = OnceLock::new();
static ASKED: AtomicBool = AtomicBool::new(false);

/// Takes signals that would end this process. The first one lets [`go_on`] fail; a second one ends the process at once,
/// for what cannot be kept from waiting.
///
/// # Errors
/// What signalfd(2) says, or that no thread can be started.
pub(super) fn take_signals() -> Result<()> {
    let signals = SignalFd::block(&[Signal::INT, Signal::TERM, Signal::HUP]).context("cannot block signals")?;
    let signals = SIGNALS.get_or_init(|| signals);
    let wait = || {
        while poll_in(signals.as_fd(), None).is_ok() {
            if signals.take().is_ok_and(|arrived| arrived.is_some()) && ASKED.swap(true, SeqCst) {
                std::process::exit(INTERRUPTED.into());
            }
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(wait).context("cannot start a thread")?;
    Ok(())
}

/// Fails once a signal has asked this process to end.
///
/// # Errors
/// That it has.
pub(super) fn go_on() -> Result<()> {
    ensure!(!ASKED.load(SeqCst), "interrupted");
    Ok(())
}

/// Waits for something that no signal ends, such as a lock that somebody else has, in a thread that is left behind if
/// this is interrupted.
///
/// # Errors
/// That it is, or that no thread can be started.
pub(super) fn wait_for<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (here, there) = channel();
    let work = move || {
        // Nobody hears it who has been interrupted.
        let _ = here.send(what());
    };
    std::thread::Builder::new().name("waits".to_owned()).spawn(work).context("cannot start a thread")?;
    loop {
        match there.recv_timeout(TICK) {
            Ok(came) => return Ok(came),
            Err(RecvTimeoutError::Timeout) => go_on()?,
            Err(RecvTimeoutError::Disconnected) => bail!("a thread that waited has panicked"),
        }
    }
}

/// A command gets its signals as if they were not taken here.
pub(super) fn let_through(command: &mut Command) {
    if let Some(signals) = SIGNALS.get() {
        signals.restore_in(command);
    }
}
