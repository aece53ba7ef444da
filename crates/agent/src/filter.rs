//! The helper gives up what it does not need.
//!
//! Its memory is the program's: a hostile program can make it execute anything. So before it serves, it drops every
//! capability (it would keep those that the program gives up later) and lets the kernel refuse every call but the few
//! that a batch consists of. The filter binds this process only; the program's threads are not touched.

use abi::cbpf::Instruction;

use crate::sys::{self, nr, sys};

const PR_SET_NO_NEW_PRIVS: u64 = 38;
const SECCOMP_SET_MODE_FILTER: u64 = 1;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
pub(crate) const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
/// bpf(2): run a loaded program.
pub(crate) const BPF_PROG_TEST_RUN: u32 = 10;
const KILL_PROCESS: u32 = 0x8000_0000;
pub(crate) const ALLOW: u32 = 0x7fff_0000;

/// The calls of a batch, of the doorbell and of the socket.
const ALLOWED: [u64; 21] = [
    nr::IOCTL,
    nr::MMAP,
    nr::MUNMAP,
    nr::MPROTECT,
    nr::MREMAP,
    nr::MADVISE,
    nr::FUTEX,
    nr::FUTEX_WAITV,
    nr::RECVMSG,
    nr::SENDMSG,
    nr::READ,
    nr::PREAD64,
    nr::FSTAT,
    nr::CLOSE,
    nr::CLOCK_GETTIME,
    nr::SCHED_YIELD,
    nr::NANOSLEEP,
    nr::GETPID,
    nr::GETTID,
    nr::EXIT,
    nr::EXIT_GROUP,
];

const LOAD: u16 = 0x20;
const JUMP_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const JUMPS: usize = 7;
const LEN: usize = JUMPS + ALLOWED.len() + 10;
/// Offsets in `struct seccomp_data`; of arguments the lower halves, as the kernel takes them.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const FIRST_ARGUMENT: u32 = 16;
const SECOND_ARGUMENT: u32 = 24;

const fn load(offset: u32) -> Instruction {
    Instruction { code: LOAD, if_true: 0, if_false: 0, k: offset }
}

/// Compares in the instruction at `at`, and goes on at one of two later ones.
const fn jump_if(at: usize, value: u32, if_equal: usize, otherwise: usize) -> Instruction {
    Instruction { code: JUMP_EQUAL, if_true: (if_equal - at - 1) as u8, if_false: (otherwise - at - 1) as u8, k: value }
}

/// The filter for the process `own`. Some calls are let through by their arguments, since the helper may have the user
/// id that the program had before it gave it up: memory is read of itself only, signals are sent to itself, or are no
/// signals (0, whether a thread lives), only its own scheduling is changed, and of bpf(2) only programs can be run that
/// somebody else has loaded.
pub(crate) const fn program(own: u32) -> [Instruction; LEN] {
    let signal = JUMPS + ALLOWED.len();
    let target = signal + 2;
    let myself = target + 2;
    let run = myself + 2;
    let (allow, refuse) = (LEN - 2, LEN - 1);
    let mut program = [Instruction { code: RETURN, if_true: 0, if_false: 0, k: KILL_PROCESS }; LEN];
    program[0] = load(ARCHITECTURE);
    program[1] = jump_if(1, AUDIT_ARCH_X86_64, 2, refuse);
    program[2] = load(NUMBER);
    program[3] = jump_if(3, nr::KILL as u32, signal, 4);
    program[4] = jump_if(4, nr::PROCESS_VM_READV as u32, target, 5);
    program[5] = jump_if(5, nr::SCHED_SETSCHEDULER as u32, myself, 6);
    program[6] = jump_if(6, nr::BPF as u32, run, 7);
    let mut index = 0;
    while index < ALLOWED.len() {
        let at = JUMPS + index;
        let next = if index + 1 == ALLOWED.len() { refuse } else { at + 1 };
        program[at] = jump_if(at, ALLOWED[index] as u32, allow, next);
        index += 1;
    }
    program[signal] = load(SECOND_ARGUMENT);
    program[signal + 1] = jump_if(signal + 1, 0, allow, target);
    program[target] = load(FIRST_ARGUMENT);
    program[target + 1] = jump_if(target + 1, own, allow, refuse);
    program[myself] = load(FIRST_ARGUMENT);
    program[myself + 1] = jump_if(myself + 1, 0, allow, refuse);
    program[run] = load(FIRST_ARGUMENT);
    program[run + 1] = jump_if(run + 1, BPF_PROG_TEST_RUN, allow, refuse);
    program[allow] = Instruction { code: RETURN, if_true: 0, if_false: 0, k: ALLOW };
    program
}

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
    let program = program(sys::getpid());
    let filter = [LEN as u64, program.as_ptr() as u64];
    // SAFETY: the kernel reads a sock_fprog (its length in the first two bytes) and the program.
    unsafe { sys!(nr::SECCOMP, SECCOMP_SET_MODE_FILTER, 0, filter.as_ptr() as u64) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stands for the child's own process id.
    const OWN: u64 = u64::MAX;

    /// How a child ends that drops its privileges and then makes one call.
    fn end_of(number: u64, first: u64, second: u64) -> i32 {
        // SAFETY: the child makes system calls only.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            let first = if first == OWN { sys::getpid().into() } else { first };
            let word = 7_u64;
            let (local, remote) = ([(&raw const word) as u64, 0], [(&raw const word) as u64, 0]);
            if drop_privileges() {
                // SAFETY: looks or signals as the test says; the vectors of a read are empty.
                unsafe {
                    match number {
                        nr::PROCESS_VM_READV => {
                            sys!(number, first, local.as_ptr() as u64, 1, remote.as_ptr() as u64, 1, 0)
                        }
                        _ => sys!(number, first, second),
                    };
                    sys!(nr::EXIT_GROUP, 0);
                }
            }
            // SAFETY: ends the child.
            unsafe { libc::_exit(1) };
        }
        let mut status = 0;
        // SAFETY: waits for the child made above.
        unsafe { libc::waitpid(pid, &raw mut status, 0) };
        status
    }

    #[test]
    fn the_helper_reads_and_signals_nobody_but_itself() {
        let parent = u64::from(sys::getpid());
        let killed = |status: i32| libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSYS;
        let cont = libc::SIGCONT as u64;
        assert_eq!(end_of(nr::KILL, parent, 0), 0, "looking whether somebody lives");
        assert_eq!(end_of(nr::KILL, OWN, cont), 0, "a signal to itself");
        assert!(killed(end_of(nr::KILL, parent, cont)), "a signal to somebody else");
        assert_eq!(end_of(nr::PROCESS_VM_READV, OWN, 0), 0, "its own memory");
        assert!(killed(end_of(nr::PROCESS_VM_READV, parent, 0)), "somebody else's memory");
        assert_eq!(end_of(nr::SCHED_SETSCHEDULER, 0, 0), 0, "its own scheduling");
        assert!(killed(end_of(nr::SCHED_SETSCHEDULER, parent, 0)), "somebody else's scheduling");
        assert_eq!(end_of(nr::BPF, BPF_PROG_TEST_RUN.into(), 0), 0, "running a program of somebody's");
        assert!(killed(end_of(nr::BPF, 5, 0)), "loading a program");
        assert_eq!(end_of(nr::GETTID, 1, 1), 0, "an ordinary call");
        assert!(killed(end_of(nr::BRK, 0, 0)), "a call that no batch makes");
    }
}
