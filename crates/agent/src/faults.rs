//! For tests only (feature `faults`): stops the helper at a chosen step of a batch.
//!
//! A step is a system call of the helper, or one of its writes to the journal or to the marks. The tests let the helper
//! stop itself there (SIGSTOP), and then decide who dies.

use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use crate::sys::nr;

/// Kind of the plan to count in (the word that [`abi::place::Action`] begins with), 0 for none.
static KIND: AtomicU32 = AtomicU32::new(0);
/// The step to stop at, counted from 1; 0 for none.
static AT: AtomicU64 = AtomicU64::new(0);
/// Steps so far in plans of that kind.
static DONE: AtomicU64 = AtomicU64::new(0);
/// True while a plan of that kind is being executed.
static ARMED: AtomicU32 = AtomicU32::new(0);
/// The helper's stack: other threads of the program make system calls as well.
static STACK: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

/// Chooses the step: the helper stops itself right before step `at` of the plans of this kind.
pub fn choose(kind: u32, at: u64) {
    KIND.store(kind, SeqCst);
    AT.store(at, SeqCst);
}

/// Steps that plans of the chosen kind have taken.
#[must_use]
pub fn steps() -> u64 {
    DONE.load(SeqCst)
}

/// Tells where the helper's stack is.
pub(crate) fn helper_stack(start: u64, end: u64) {
    STACK[0].store(start, SeqCst);
    STACK[1].store(end, SeqCst);
}

/// A plan whose first action is of this kind begins; 0: it is over.
pub(crate) fn plan(kind: u32) {
    ARMED.store(u32::from(kind != 0 && kind == KIND.load(SeqCst)), SeqCst);
}

/// A step of somebody's.
#[inline(always)]
pub(crate) fn step() {
    if ARMED.load(SeqCst) == 0 {
        return;
    }
    let here: u64;
    // SAFETY: reads a register.
    unsafe { core::arch::asm!("mov {}, rsp", out(reg) here, options(nomem, nostack, preserves_flags)) };
    if here < STACK[0].load(SeqCst) || here >= STACK[1].load(SeqCst) {
        return;
    }
    if DONE.fetch_add(1, SeqCst) + 1 == AT.load(SeqCst) {
        stop();
    }
}

fn stop() {
    const SIGSTOP: u64 = 19;
    // SAFETY: asks for this process's id and stops it.
    unsafe {
        let pid = crate::sys::raw6(nr::GETPID, 0, 0, 0, 0, 0, 0) as u64;
        crate::sys::raw6(nr::KILL, pid, SIGSTOP, 0, 0, 0, 0);
    }
}
