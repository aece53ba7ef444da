//! Starting the helper: a process that shares the address space and nothing else.
//!
//! Double clone: the program's thread makes a process in the middle (CLONE_VM|CLONE_VFORK, no exit signal, reaped with
//! __WALL), which makes the helper and ends. So the helper is nobody's child that the program could wait for: it is
//! adopted by the nearest subreaper, the broker under `pagefold run`. Where that would be the program itself, or another
//! program that is not to notice, the process in the middle does not end before the helper: see [`crate::adoption`].
//!
//! None of the program's descriptors is shared: clone without CLONE_FILES copies the table, and the helper closes its
//! copy first of all.
//!
//! What if the program is killed, or execs, between the two clones? The helper then finds its broker's socket, is told
//! that the member is gone, and leaves. What if the process in the middle is killed? The wait returns, and if no
//! helper came up the range is handed to the kernel instead; one that did come up sees whose child it is.

use core::arch::global_asm;
use core::sync::atomic::{AtomicI32, AtomicU64, Ordering::SeqCst};

use abi::control::Control;
use abi::told::helper::{ELSEWHERE, RESTRICTED};

use crate::introduction::SETUP;
use crate::state::{STATE, unwilling};
use crate::sys::{self, CLONE_VFORK, CLONE_VM, nr, sys};
use crate::{adoption, helper, link, told};

const PR_GET_TID_ADDRESS: u64 = 40;
/// The helper's stack: its deepest frames hold a window of page-table entries.
const HELPER_STACK: u64 = 16 * sys::PAGE;
const MIDDLE_STACK: u64 = 2 * sys::PAGE;
/// How long the program's thread waits for the helper to have its control area. Then it goes on without.
const READY_WITHIN_NS: u64 = 2_000_000_000;

/// The helper's socket to the broker, from its adoption on.
static LINK: AtomicI32 = AtomicI32::new(-1);

global_asm!(
    ".globl pagefold_clone",
    ".hidden pagefold_clone",
    "pagefold_clone:",
    // rdi: flags, rsi: top of the new stack, rdx: function to run there. It never returns into the caller's frames.
    "sub rsi, 16",
    "mov [rsi], rdx",
    "mov eax, 56",
    "xor edx, edx",
    "xor r10d, r10d",
    "xor r8d, r8d",
    "syscall",
    "test rax, rax",
    "jnz 2f",
    "xor ebp, ebp",
    "pop rax",
    // The stack is a multiple of 16 at a call.
    "add rsp, 8",
    "call rax",
    "mov eax, 60",
    "xor edi, edi",
    "syscall",
    "ud2",
    "2:",
    "ret",
);

unsafe extern "C" {
    fn pagefold_clone(flags: u64, stack_top: u64, run: extern "C" fn()) -> i64;
}

/// Remembers where the kernel clears a word when the main thread is gone: that is how the helper notices an exec. Another
/// thread cannot learn that, and its own word would only tell its own end; then the broker alone notices.
pub(crate) fn learn_tid_word() {
    let mut address = 0_u64;
    if sys::gettid() == sys::getpid() {
        // SAFETY: the kernel writes one word.
        unsafe { sys!(nr::PRCTL, PR_GET_TID_ADDRESS, (&raw mut address) as u64, 0, 0, 0) };
    }
    STATE.tid_word.store(address, SeqCst);
}

/// A number from /proc/thread-self/status. `name` is a line's beginning, with the line break before it. Read a piece at a
/// time: the program's stack may be small.
#[inline(never)]
pub(crate) fn status_number(name: &[u8]) -> Option<u64> {
    const PIECE: usize = 256;
    /// A number, and what stands before it.
    const NUMBER: usize = 24;
    /// What is read twice. A name may lie across two pieces, and other numbers may have lost digits meanwhile.
    const AGAIN: usize = 64;
    let fd = link::open(c"/proc/thread-self/status")?;
    let mut text = [0_u8; PIECE];
    let mut position = 0_u64;
    let number = loop {
        // SAFETY: the kernel writes into `text`.
        let got = unsafe { sys!(nr::PREAD64, fd as u64, text.as_mut_ptr() as u64, PIECE as u64, position) };
        let Some(text) = usize::try_from(got).ok().and_then(|got| text.get(..got)) else { break None };
        let found = text.windows(name.len()).position(|window| window == name);
        let last = text.len() < PIECE;
        match found.map(|at| at + name.len()) {
            Some(at) if last || at + NUMBER <= PIECE => {
                let digits = text.get(at..).unwrap_or_default().iter().skip_while(|byte| byte.is_ascii_whitespace());
                let digits = digits.take_while(|byte| byte.is_ascii_digit());
                break Some(digits.fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0')));
            }
            // Its number lies across the end of the piece.
            Some(at) => position += (at - AGAIN) as u64,
            None if last => break None,
            None => position += (PIECE - AGAIN) as u64,
        }
    };
    link::close(fd);
    number
}

/// Filters that this thread's system calls go through.
///
/// A program that filtered itself may have forbidden what the helper needs, with a deadly answer: clone, above all.
/// Filters that were there before the program began (a container's) are part of where it runs and are no reason.
fn filters() -> Option<u64> {
    status_number(b"\nSeccomp_filters:")
}

/// Remembers how many filters there are before the program begins.
pub(crate) fn learn_filters() {
    STATE.filters.store(filters().unwrap_or(0), SeqCst);
}

/// False once the program has asked for its next children to be in a process name space of their own: the first of them is
/// the name space's first process, and when that one ends nobody can be made in there any more. Also if that cannot be
/// told.
pub(crate) fn children_stay_here() -> bool {
    let identity = |path: &core::ffi::CStr| {
        let mut stat = [0_u64; 18];
        // SAFETY: the kernel reads the path and writes a struct stat of 144 bytes: first of all device and inode.
        let known = unsafe { sys!(nr::NEWFSTATAT, sys::AT_FDCWD, path.as_ptr() as u64, stat.as_mut_ptr() as u64, 0) };
        (known == 0).then_some([stat[0], stat[1]])
    };
    let here = identity(c"/proc/self/ns/pid");
    here.is_some() && here == identity(c"/proc/self/ns/pid_for_children")
}

/// True if there is a helper, and it was not killed. Its number may exist for long after that; the broker says in the
/// control area that it is gone.
pub(crate) fn helper_lives() -> bool {
    let helper = STATE.helper.load(SeqCst);
    let buried = STATE.control().is_some_and(|control| control.helper.load(SeqCst) == 0);
    helper != 0 && !buried && sys::exists(helper)
}

/// True if the helper was killed and what it held is not back yet, as far as can be seen: its number may exist for long
/// after that. In its introduction it holds nothing.
fn is_unburied(control: &Control) -> bool {
    let helper = control.helper.load(SeqCst);
    helper != 0 && control.joined.load(SeqCst) != 0 && !sys::exists(helper)
}

/// True if the helper was killed, and the broker has said that everything is back: who leaves by himself takes his number
/// along. Without a system call, since this is asked in each call.
pub(crate) fn helper_was_killed() -> bool {
    STATE.helper.load(SeqCst) != 0 && STATE.control().is_some_and(|control| control.helper.load(SeqCst) == 0)
}

/// Waits until the broker or the guardian has given back what a killed helper held. The next one has a gate of its own: a
/// call that passed it would find pages frozen, and take what is empty along. To be called with neither the gate nor the
/// table's lock. Where nobody gives anything back in time that is not waited for again.
pub(crate) fn wait_for_burial() {
    const BURIED_WITHIN_NS: u64 = 5_000_000_000;
    const LOOK_NS: u64 = 1_000_000;
    /// The area whose burial has taken too long.
    static GIVEN_UP: AtomicU64 = AtomicU64::new(0);
    let until = sys::monotonic().saturating_add(BURIED_WITHIN_NS);
    while let Some(control) = STATE.control().filter(|control| is_unburied(control)) {
        let address = core::ptr::from_ref(control) as u64;
        if sys::monotonic() > until {
            GIVEN_UP.store(address, SeqCst);
        }
        if GIVEN_UP.load(SeqCst) == address {
            return;
        }
        sys::sleep_ns(LOOK_NS);
    }
}

/// Starts the helper, if there is none, and waits until the control area stands. To be called with the table's lock
/// held and signals blocked, after [`wait_for_burial`].
pub(crate) fn start_helper() -> bool {
    if STATE.control().is_some() && helper_lives() {
        return true;
    }
    if STATE.control().is_some_and(is_unburied) || STATE.unwilling.load(SeqCst) != 0 {
        return false;
    }
    // Not asked where asking may be deadly.
    let restricted = STATE.restricted.load(SeqCst) != 0 || filters().unwrap_or(0) != STATE.filters.load(SeqCst);
    if restricted || !children_stay_here() {
        STATE.unwilling.store(unwilling::HERE, SeqCst);
        told::no_helper(if restricted { RESTRICTED } else { ELSEWHERE });
        return false;
    }
    let (Some(middle), Some(stack)) = (sys::allocate(MIDDLE_STACK), sys::allocate(HELPER_STACK)) else {
        return false;
    };
    SETUP.stack_top.store(stack + HELPER_STACK, SeqCst);
    #[cfg(feature = "faults")]
    crate::faults::helper_stack(stack, stack + HELPER_STACK);
    SETUP.member.store(sys::getpid(), SeqCst);
    SETUP.ready.store(0, SeqCst);
    let prepared = adoption::prepare();
    // SAFETY: a fresh stack, a function that ends its process; CLONE_VFORK keeps this thread waiting until it has.
    let pid = unsafe { pagefold_clone(CLONE_VM | CLONE_VFORK, middle + MIDDLE_STACK, middle_main) };
    if pid > 0 {
        let mut status = 0_u32;
        // SAFETY: the kernel writes the status; nobody but this thread can have been told of this child.
        unsafe { sys!(nr::WAIT4, pid as u64, (&raw mut status) as u64, adoption::WALL, 0) };
    }
    let adopted = prepared.restore();
    // SAFETY: mapped above; the process in the middle is gone.
    unsafe { sys::free(middle, MIDDLE_STACK) };
    let deadline = sys::monotonic().saturating_add(READY_WITHIN_NS);
    while SETUP.ready.load(SeqCst) == 0 && pid > 0 && adopted {
        let now = sys::monotonic();
        if now >= deadline {
            break;
        }
        sys::futex_wait(&SETUP.ready, 0, deadline - now);
    }
    let up = SETUP.ready.load(SeqCst) == 1;
    if !up {
        STATE.unwilling.store(unwilling::HERE, SeqCst);
    }
    up
}

extern "C" fn middle_main() {
    let top = SETUP.stack_top.load(SeqCst);
    // Without an exit signal: until it is adopted nobody has to hear of its end but this process, which asks.
    // SAFETY: the helper's stack is fresh memory; its function never returns.
    let helper = unsafe { pagefold_clone(CLONE_VM, top, helper_main) };
    if helper > 0 {
        adoption::let_go(helper);
    }
}

extern "C" fn helper_main() {
    // Its table of descriptors is a copy of the program's: nothing of it is the helper's business, and a pipe or
    // socket held here would never be seen closed.
    // SAFETY: the helper's own table, not shared with anybody.
    unsafe { sys!(nr::CLOSE_RANGE, 0, u64::from(u32::MAX), 0) };
    // Nor is its folder, whose file system could not be unmounted once the program has left it.
    // SAFETY: the helper's own, as CLONE_FS was not asked for.
    unsafe { sys!(nr::CHDIR, c"/".as_ptr() as u64) };
    // Out of the program's process group, so that signals from its terminal do not reach the helper. But not out of its
    // session: each session is scheduled as a group of its own (sched_autogroup_create_attach, kernel/sched/autogroup.c),
    // and under a busy one Linux 6.18 lets the tasks of others wait for seconds. The program's threads would wait for
    // pages that such a helper has frozen. In their group its turn comes as often as theirs.
    // A security module may forbid it.
    // SAFETY: concerns this process only.
    if unsafe { sys!(nr::SETPGID, 0, 0) } != 0 {
        // SAFETY: as above.
        unsafe { sys!(nr::SETSID) };
    }
    let Some(link) = adoption::be_adopted() else {
        SETUP.ready.store(2, SeqCst);
        sys::futex_wake(&SETUP.ready);
        return;
    };
    LINK.store(link.descriptor(), SeqCst);
    helper::main(|| Some(link::Link::of(LINK.load(SeqCst))));
}
