//! A file is opened and looked at by a process of its own, so that closing it costs the program none of its record locks.

use core::arch::global_asm;

use crate::sys;

/// What looks at the file, by its descriptor: at least 0 if it could be read. It may make system calls and use the stack,
/// and nothing else.
pub(crate) type Look<T> = extern "C" fn(u64, *mut T) -> i64;

global_asm!(
    // rdi: folder, rsi: path, rdx: what the function gets, rcx: the function. Returns what it returns, or a negative error
    // number.
    //
    // A process that shares the memory and not the descriptors opens, looks and ends. The caller waits until it has ended
    // (CLONE_VFORK), so it goes on below the caller's frames: what it leaves there nobody reads.
    ".globl pagefold_look_apart",
    ".hidden pagefold_look_apart",
    "pagefold_look_apart:",
    "push rbx",
    "push r12",
    "push r13",
    "push r14",
    "mov r12, rdi",
    "mov r13, rsi",
    "mov r14, rdx",
    "mov rbx, rcx",
    // The result; the stack is a multiple of 16 from here on.
    "push 0",
    "mov eax, 56",     // clone
    "mov edi, 0x4100", // CLONE_VM|CLONE_VFORK, no signal at its end
    "xor esi, esi",
    "xor edx, edx",
    "xor r10d, r10d",
    "xor r8d, r8d",
    "syscall",
    "test rax, rax",
    "js 4f",
    "jnz 3f",
    "mov rdi, r12",
    "mov rsi, r13",
    "mov edx, 0x80900", // O_CLOEXEC|O_NONBLOCK|O_NOCTTY
    "xor r10d, r10d",
    "mov eax, 257", // openat
    "syscall",
    "test rax, rax",
    "js 2f",
    "mov rdi, rax",
    "mov rsi, r14",
    "call rbx",
    "2:",
    "mov [rsp], rax",
    "mov eax, 60", // exit
    "xor edi, edi",
    "syscall",
    "ud2",
    "3:",
    "mov rdi, rax",
    "xor esi, esi",
    "mov edx, 0x40000000", // __WALL
    "xor r10d, r10d",
    "mov eax, 61", // wait4
    "syscall",
    "pop rax",
    "jmp 5f",
    "4:",
    "add rsp, 8",
    "5:",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbx",
    "ret",
);

unsafe extern "C" {
    fn pagefold_look_apart(folder: u64, path: u64, into: u64, look: u64) -> i64;
}

/// Opens a file and looks at it. Negative if it cannot be opened.
pub(crate) fn look_apart<T>(folder: u64, path: u64, look: Look<T>, into: &mut T) -> i64 {
    // The process in there has the program's handlers.
    let mask = sys::block_signals();
    // SAFETY: the kernel reads the path; the function gets what it is for, which nobody else uses meanwhile.
    let result = unsafe { pagefold_look_apart(folder, path, core::ptr::from_mut(into) as u64, look as usize as u64) };
    sys::restore_signals(mask);
    result
}
