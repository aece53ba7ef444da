//! The way from a patched site into the gate and back.
//!
//! A site's first five bytes jump to a trampoline near the object (see [`crate::patch`]), which names the address
//! behind the site in r11 and jumps here. To the code around the site all of this must look like the one instruction
//! that it replaced: every register but rcx and r11 is kept, the red zone below the stack pointer too. Vector
//! registers are saved because compiled code may use them; the image is built for the baseline, so their upper halves
//! are never touched.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU32, Ordering::SeqCst};

use crate::calls::{Registers, dispatch};
use crate::state::STATE;
use crate::sys::{self, CLONE_VFORK, CLONE_VM, nr};
use crate::{child, gate};

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

/// Before a fork or the creation of a thread, in the parent.
///
/// A fork goes through as a reader: no page is frozen while it copies the address space. It also holds the table's
/// lock, so that the copy is not torn. The creation of a thread holds the gate across the clone, so that no control
/// block appears between the look at the threads and the freeze. vfork and posix_spawn stay outside: their child runs
/// in this memory before the parent goes on.
///
/// All decisions are made here, before the call: the child of a CLONE_VM call must run no code of the agent.
pub extern "C" fn before_clone(registers: &mut Registers) {
    child::notice();
    let flags = match registers.rax {
        nr::CLONE => registers.rdi,
        // SAFETY: the caller passes a clone_args structure, whose first field is the flags; the kernel would read it
        // next. An unreadable one is not looked at.
        nr::CLONE3 if registers.rsi >= 8 => unsafe { (registers.rdi as *const u64).read_unaligned() },
        _ => 0,
    };
    if flags & CLONE_VM != 0 {
        if flags & CLONE_VFORK != 0 {
            return;
        }
        if let Some(control) = STATE.control() {
            gate::Reader::enter(control).keep();
            control.thread_epoch.fetch_add(1, SeqCst);
        }
        return;
    }
    FORKS.fetch_add(1, SeqCst);
    if let Some(control) = STATE.control() {
        gate::Reader::enter(control).keep();
        control.forks.fetch_add(1, SeqCst);
        control.thread_epoch.fetch_add(1, SeqCst);
    }
    if !STATE.table.is_empty() {
        STATE.table.lock().keep();
    }
}

/// After it, in the parent.
pub extern "C" fn after_clone(_registers: &mut Registers) {
    STATE.table.unlock_by_thread();
    if let Some(control) = STATE.control() {
        gate::leave_by_thread(control);
    }
}

const _: () = assert!(sys::PAGE == 4096, "the stubs are for x86-64");
