//! The way from a patched site into the gate and back.
//!
//! A site's first five bytes jump to a trampoline near the object (see [`crate::patch`]), which names the address
//! behind the site in r11 and jumps here. To the code around the site all of this must look like the one instruction
//! that it replaced: every register but rcx and r11 is kept, the red zone below the stack pointer too. Vector
//! registers are saved because compiled code may use them; the image is built for the baseline, so their upper halves
//! are never touched.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

use crate::ask::unmerge;
use crate::calls::{Registers, dispatch};
use crate::plain::UNMERGE_TRIES;
use crate::state::STATE;
use crate::sys::{self, CLONE_SETTLS, CLONE_THREAD, CLONE_VFORK, CLONE_VM, nr};
use crate::{alone, child, gate, threads};

global_asm!(
    // Runs \inner with the registers as they are, in a frame that can be unwound.
    ".macro pagefold_enter inner",
    ".cfi_startproc",
    "lea rsp, [rsp-128]",
    ".cfi_adjust_cfa_offset 128",
    "push r11",
    ".cfi_adjust_cfa_offset 8",
    "push rbp",
    ".cfi_adjust_cfa_offset 8",
    ".cfi_rel_offset rbp, 0",
    "mov rbp, rsp",
    ".cfi_def_cfa_register rbp",
    "push r9",
    "push r8",
    "push r10",
    "push rdx",
    "push rsi",
    "push rdi",
    "push rax",
    "mov rdi, rsp",
    "sub rsp, 256",
    "and rsp, -16",
    "movaps [rsp], xmm0",
    "movaps [rsp+16], xmm1",
    "movaps [rsp+32], xmm2",
    "movaps [rsp+48], xmm3",
    "movaps [rsp+64], xmm4",
    "movaps [rsp+80], xmm5",
    "movaps [rsp+96], xmm6",
    "movaps [rsp+112], xmm7",
    "movaps [rsp+128], xmm8",
    "movaps [rsp+144], xmm9",
    "movaps [rsp+160], xmm10",
    "movaps [rsp+176], xmm11",
    "movaps [rsp+192], xmm12",
    "movaps [rsp+208], xmm13",
    "movaps [rsp+224], xmm14",
    "movaps [rsp+240], xmm15",
    "call \\inner",
    "movaps xmm0, [rsp]",
    "movaps xmm1, [rsp+16]",
    "movaps xmm2, [rsp+32]",
    "movaps xmm3, [rsp+48]",
    "movaps xmm4, [rsp+64]",
    "movaps xmm5, [rsp+80]",
    "movaps xmm6, [rsp+96]",
    "movaps xmm7, [rsp+112]",
    "movaps xmm8, [rsp+128]",
    "movaps xmm9, [rsp+144]",
    "movaps xmm10, [rsp+160]",
    "movaps xmm11, [rsp+176]",
    "movaps xmm12, [rsp+192]",
    "movaps xmm13, [rsp+208]",
    "movaps xmm14, [rsp+224]",
    "movaps xmm15, [rsp+240]",
    "lea rsp, [rbp-56]",
    "pop rax",
    "pop rdi",
    "pop rsi",
    "pop rdx",
    "pop r10",
    "pop r8",
    "pop r9",
    "pop rbp",
    ".cfi_def_cfa rsp, 144",
    "pop r11",
    ".cfi_adjust_cfa_offset -8",
    "lea rsp, [rsp+128]",
    ".cfi_adjust_cfa_offset -128",
    "jmp r11",
    ".cfi_endproc",
    ".endm",
    ".globl pagefold_stub_call",
    ".hidden pagefold_stub_call",
    "pagefold_stub_call: pagefold_enter {dispatch}",
    ".globl pagefold_stub_before_clone",
    ".hidden pagefold_stub_before_clone",
    "pagefold_stub_before_clone: pagefold_enter {before}",
    ".globl pagefold_stub_after_clone",
    ".hidden pagefold_stub_after_clone",
    "pagefold_stub_after_clone: pagefold_enter {after}",
    dispatch = sym dispatch,
    before = sym before_clone,
    after = sym after_clone,
);

unsafe extern "C" {
    fn pagefold_stub_call();
    fn pagefold_stub_before_clone();
    fn pagefold_stub_after_clone();
}

/// What the stubs save, above the vector registers.
#[repr(C)]
pub struct Frame {
    /// The call.
    pub registers: Registers,
    /// The caller's rbp.
    base: u64,
    /// Where the caller goes on.
    go_on: u64,
}

/// Length of what lies in a trampoline between the call that is made there and the way back: the call, what stands for the
/// parent's way through [`after_clone`], and how the child goes around that. See `Code::around_clone`.
pub(crate) const AROUND_CLONE: u64 = 2 + 3 + 2 + 10 + 14;

/// Entry addresses for the trampolines.
pub(crate) struct Entries {
    pub(crate) call: u64,
    pub(crate) before_clone: u64,
    pub(crate) after_clone: u64,
}

/// Where the stubs lie.
pub(crate) fn entries() -> Entries {
    Entries {
        call: pagefold_stub_call as *const () as u64,
        before_clone: pagefold_stub_before_clone as *const () as u64,
        after_clone: pagefold_stub_after_clone as *const () as u64,
    }
}

/// Forks so far, those of this process's parents included: their pages are marked as shared.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// For a helper that starts now.
pub(crate) fn forks() -> u32 {
    FORKS.load(SeqCst)
}

/// A thread of the program, with a control block of its own.
const THREAD: u64 = CLONE_VM | CLONE_THREAD | CLONE_SETTLS;

/// Before a fork or the creation of a thread, in the parent.
///
/// A fork goes through as a reader: no page is frozen while it copies the address space. The creation of a thread holds
/// the gate across the clone, so that no control block appears between the look at the threads and the freeze. Both hold
/// the table's lock too: the copy of it is not torn, and no helper starts that neither of them knows. vfork and
/// posix_spawn stay outside: their child runs in this memory before the parent goes on.
///
/// A fork is made here, with signals blocked: a handler that ran inside could wait for a thread that waits for the lock,
/// or never come back. Its child, with a copy of this very stack, unblocks them and goes on behind the site. What shares
/// the memory, or has a stack of its own, is made by the trampoline: all decisions about it are made here, and the child
/// of a CLONE_VM call must run no code of the agent. glibc creates its threads with signals blocked.
pub extern "C" fn before_clone(frame: &mut Frame) {
    if STATE.is_gone() {
        return;
    }
    child::notice();
    let registers = &mut frame.registers;
    // As the kernel takes it.
    registers.rax &= 0xffff_ffff;
    let Wanted { flags, stack, block } = match registers.rax {
        nr::CLONE => Wanted { flags: registers.rdi, stack: registers.rsi, block: registers.r8 },
        nr::CLONE3 => match clone_args(registers) {
            Some(known) => known,
            // The kernel refuses it.
            None => return,
        },
        _ => Wanted::default(),
    };
    if flags & CLONE_VM != 0 {
        if flags & CLONE_VFORK != 0 {
            return;
        }
        if flags & CLONE_THREAD == 0 {
            alone::is_shared();
        }
    } else {
        // Before the gate: a helper that starts meanwhile is told.
        FORKS.fetch_add(1, SeqCst);
    }
    if flags & THREAD == THREAD {
        enter_with_plain_home(flags, block);
        return;
    }
    if flags & CLONE_VM != 0 || stack != 0 {
        enter(flags);
        return;
    }
    registers.rax = with_signals_blocked(flags, || registers.raw()) as u64;
    frame.go_on += AROUND_CLONE;
}

/// Inside of the gate, until [`leave`].
fn enter(flags: u64) {
    let (reader, locked) = STATE.enter();
    if let Some(control) = STATE.control() {
        if flags & CLONE_VM == 0 {
            control.forks.fetch_add(1, SeqCst);
        }
        control.thread_epoch.fetch_add(1, SeqCst);
    }
    if let Some(reader) = reader {
        reader.keep();
    }
    locked.keep();
}

/// The same of a thread whose control block lies at `block`. What was merged there before gets its own copies back first:
/// no page that a living thread has its control block on is ever frozen, so later nobody could, and every call that only
/// plain memory bears would be refused there (mlock, and whatever asks for all of it). If it cannot be had that is so.
#[inline(never)]
fn enter_with_plain_home(flags: u64, block: u64) {
    let (start, end) = threads::home(block);
    for tries in 0.. {
        if STATE.table.next_merged(start, end).is_some() {
            let _ = unmerge(start, end);
        }
        enter(flags);
        if tries == UNMERGE_TRIES || STATE.table.next_merged(start, end).is_none() {
            return;
        }
        leave();
    }
}

fn leave() {
    // With the lock still held it is the same gate as before.
    if let Some(control) = STATE.control() {
        gate::leave_by_thread(control);
    }
    STATE.table.unlock_by_thread();
}

/// A fork; 0 in its child, whose lock and gate are its parent's: see [`child`].
fn with_signals_blocked(flags: u64, fork: impl FnOnce() -> i64) -> i64 {
    let mask = sys::block_signals();
    enter(flags);
    let result = fork();
    if result != 0 {
        leave();
    }
    sys::restore_signals(mask);
    result
}

/// What a call wants of a child or thread.
#[derive(Default)]
struct Wanted {
    flags: u64,
    stack: u64,
    /// With CLONE_SETTLS, where its control block lies.
    block: u64,
}

/// What a clone3 wants, read as the kernel will: `None` if it cannot.
fn clone_args(registers: &Registers) -> Option<Wanted> {
    const STACK: usize = 5;
    const BLOCK: usize = 7;
    // The first version of struct clone_args, which nobody falls below.
    const WORDS: usize = BLOCK + 1;
    let mut words = [[0_u8; 8]; WORDS];
    (registers.rsi >= size_of_val(&words) as u64).then_some(())?;
    let last = registers.rdi.saturating_add(8 * BLOCK as u64 + 4);
    if registers.rdi.is_multiple_of(8) {
        // By a call that no filter forbids.
        (sys::is_readable(registers.rdi) && sys::is_readable(last)).then_some(())?;
        // SAFETY: its first and last bytes were read just now, and it lies in two pages at most. The caller passes a structure
        // of this length; the kernel would read it next.
        words = unsafe { (registers.rdi as *const [[u8; 8]; WORDS]).read() };
    } else {
        sys::read_own(sys::getpid(), registers.rdi, words.as_flattened_mut()).then_some(())?;
    }
    let word = |index: usize| u64::from_le_bytes(words[index]);
    Some(Wanted { flags: word(0), stack: word(STACK), block: word(BLOCK) })
}

/// After it, in the parent.
pub extern "C" fn after_clone(_frame: &mut Frame) {
    if !STATE.is_gone() {
        leave();
    }
}

const _: () = assert!(sys::PAGE == 4096, "the stubs are for x86-64");

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    extern crate std;

    use std::boxed::Box;
    use std::thread;
    use std::time::Duration;

    use abi::control::Control;

    use super::*;
    use crate::calls::gated;

    /// A control area as a helper makes it.
    fn area() -> &'static Control {
        // SAFETY: it holds only atomics of integers, for which zeros are valid, as in a fresh memory file.
        Box::leak(unsafe { Box::<Control>::new_zeroed().assume_init() })
    }

    fn is_inside(control: &Control, tid: u32) -> bool {
        control.gate.slots.iter().any(|slot| slot.load(SeqCst) == tid)
    }

    /// Runs `with` in a thread that comes for the gate of `old`, and has to wait for the table's lock while there comes
    /// to be another helper. Returns what `with` was told: whether it is inside of the old and of the new gate.
    fn while_a_helper_starts(
        old: Option<&'static Control>,
        with: impl FnOnce(&dyn Fn() -> (bool, bool)) -> (bool, bool) + Send + 'static,
    ) -> (bool, bool) {
        static TID: AtomicU32 = AtomicU32::new(0);
        TID.store(0, SeqCst);
        let new = area();
        let address = |control: Option<&Control>| control.map_or(0, |control| core::ptr::from_ref(control) as u64);
        STATE.set_control(address(old));
        let locked = STATE.table.lock();
        let waiting = thread::spawn(move || {
            let tid = sys::gettid();
            TID.store(tid, SeqCst);
            with(&|| (old.is_some_and(|old| is_inside(old, tid)), is_inside(new, tid)))
        });
        while TID.load(SeqCst) == 0 || old.is_some_and(|old| !is_inside(old, TID.load(SeqCst))) {
            sys::yield_now();
        }
        thread::sleep(Duration::from_millis(50));
        assert!(!waiting.is_finished(), "it does not wait for the lock");
        STATE.set_control(address(Some(new)));
        drop(locked);
        let inside = waiting.join().unwrap();
        assert!(!old.is_some_and(|old| is_inside(old, TID.load(SeqCst))) && !is_inside(new, TID.load(SeqCst)));
        inside
    }

    #[test]
    fn whoever_waited_while_a_helper_started_is_inside_of_its_gate() {
        for old in [None, Some(area())] {
            assert_eq!(while_a_helper_starts(old, |inside| gated(|_| inside())), (false, true), "a call");
            for (kind, flags) in [("a fork", 17), ("a thread", CLONE_VM | 0x50f00)] {
                let cloned = while_a_helper_starts(old, move |inside| {
                    enter(flags);
                    let inside = inside();
                    leave();
                    inside
                });
                assert_eq!(cloned, (false, true), "{kind}");
            }
        }
        STATE.set_control(0);
    }
}
