//! Ctrl-C, taken as a wish to end in order: whoever works here asks often whether to go on, and cleans up if not.

use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

use anyhow::{Context as _, Result, ensure};
use kernel::Signal;
use kernel::pidfd::poll_in;
use kernel::signals::SignalFd;

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
                std::process::exit(130);
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

/// A command gets its signals as if they were not taken here.
pub(super) fn let_through(command: &mut Command) {
    if let Some(signals) = SIGNALS.get() {
        signals.restore_in(command);
    }
}
