//! What this process was started with, before Rust's run-time or this crate changed it.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

static IGNORED_PIPE: AtomicBool = AtomicBool::new(false);
static IGNORED_CHILD: AtomicBool = AtomicBool::new(false);

/// Runs before `main`, and so before the run-time ignores SIGPIPE for the whole process. It only looks: it runs in every
/// program that this crate is linked into.
#[used]
// SAFETY: the section holds pointers to functions that the loader calls once, with arguments that this one leaves alone.
#[unsafe(link_section = ".init_array")]
static AT_START: extern "C" fn() = look;

extern "C" fn look() {
    IGNORED_PIPE.store(is_ignored(libc::SIGPIPE), Relaxed);
    IGNORED_CHILD.store(is_ignored(libc::SIGCHLD), Relaxed);
}

fn is_ignored(signal: i32) -> bool {
    // SAFETY: the structure is plain integers, for which zeros are valid.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: nothing is set; the old action is writable and lives until the call returns.
    let result = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    result == 0 && action.sa_sigaction == libc::SIG_IGN
}

/// True if whoever executed this program had it ignore SIGPIPE.
pub(super) fn ignored_pipe() -> bool {
    IGNORED_PIPE.load(Relaxed)
}

/// The same of SIGCHLD.
pub(super) fn ignored_child() -> bool {
    IGNORED_CHILD.load(Relaxed)
}
