//! The helper gives up what it does not need.
//!
//! Its memory is the program's: a hostile program can make it execute anything. So before it serves, it drops every
//! capability (it would keep those that the program gives up later) and lets the kernel refuse every call but the few
//! that a batch consists of. The filter binds this process only; the program's threads are not touched.

use crate::sys::{nr, sys};

const PR_SET_NO_NEW_PRIVS: u64 = 38;
const SECCOMP_SET_MODE_FILTER: u64 = 1;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const KILL_PROCESS: u32 = 0x8000_0000;
const ALLOW: u32 = 0x7fff_0000;

/// The calls of a batch, of the doorbell and of the socket.
const ALLOWED: [u64; 21] = [
    nr::IOCTL,
    nr::MMAP,
    nr::MUNMAP,
    nr::MPROTECT,
    nr::MREMAP,
    nr::MADVISE,
    nr::FUTEX,
    nr::RECVMSG,
    nr::SENDMSG,
    nr::PREAD64,
    nr::FSTAT,
    nr::CLOSE,
    nr::PROCESS_VM_READV,
    nr::CLOCK_GETTIME,
    nr::SCHED_YIELD,
    nr::NANOSLEEP,
    nr::KILL,
    nr::GETPID,
    nr::GETTID,
    nr::EXIT,
    nr::EXIT_GROUP,
];

/// `struct sock_filter`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Instruction {
    code: u16,
    if_true: u8,
    if_false: u8,
    k: u32,
}

const LOAD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const LEN: usize = 3 + ALLOWED.len() + 2;

const fn program() -> [Instruction; LEN] {
    let mut program = [Instruction { code: RETURN, if_true: 0, if_false: 0, k: KILL_PROCESS }; LEN];
    // seccomp_data: the number at 0, the architecture at 4.
    program[0] = Instruction { code: LOAD, if_true: 0, if_false: 0, k: 4 };
    program[1] = Instruction { code: JUMP_EQUAL, if_true: 0, if_false: (LEN - 3) as u8, k: AUDIT_ARCH_X86_64 };
    program[2] = Instruction { code: LOAD, if_true: 0, if_false: 0, k: 0 };
    let mut index = 0;
    while index < ALLOWED.len() {
        let to_allow = (ALLOWED.len() - 1 - index) as u8;
        // The last one falls through to the refusal behind the permission.
        let if_false = if index + 1 == ALLOWED.len() { 1 } else { 0 };
        program[3 + index] = Instruction { code: JUMP_EQUAL, if_true: to_allow, if_false, k: ALLOWED[index] as u32 };
        index += 1;
    }
    program[LEN - 2] = Instruction { code: RETURN, if_true: 0, if_false: 0, k: ALLOW };
    program
}

static PROGRAM: [Instruction; LEN] = program();

/// Drops capabilities and installs the filter. `false` if the filter could not be had: then the helper must not serve.
pub(crate) fn drop_privileges() -> bool {
    let header = [CAPABILITY_VERSION_3, 0];
    let none = [0_u32; 6];
    // SAFETY: the kernel reads both structures.
    unsafe { sys!(nr::CAPSET, header.as_ptr() as u64, none.as_ptr() as u64) };
    // SAFETY: binds this process only.
    if unsafe { sys!(nr::PRCTL, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return false;
    }
    let filter = [LEN as u64, PROGRAM.as_ptr() as u64];
    // SAFETY: the kernel reads a sock_fprog (its length in the first two bytes) and the program.
    unsafe { sys!(nr::SECCOMP, SECCOMP_SET_MODE_FILTER, 0, filter.as_ptr() as u64) == 0 }
}
