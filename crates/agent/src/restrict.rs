//! A program filters its own system calls (seccomp).
//!
//! From then on the calls that the gate makes itself, in the program's threads, go through the program's filter: it may
//! kill the program for one, or answer it with an error that the gate would take for the kernel's (an answer to gettid is
//! who holds a lock). So before a filter is there it is tried on each of these calls. One that lets them all through, as
//! those do that forbid a list of dangerous calls, changes nothing but that no helper is started any more. Before any other
//! one everything gets its own pages back, nothing is merged from then on, and the gate makes no call but the program's own,
//! as the program makes them. So it does under one that answers anything with a signal or asks somebody, whatever it is about.
//!
//! What if another thread is inside of the gate at that moment? A filter binds the thread that installs it, and those that
//! it starts; only with SECCOMP_FILTER_FLAG_TSYNC also those that are there, for which this is a race that is left.
//!
//! What was merged before consists of several mappings, which the kernel makes no one mapping of: an mremap that spans them
//! is refused from then on (EFAULT).

use core::sync::atomic::Ordering::SeqCst;

use abi::cbpf::{self, Instruction};
use abi::control::stop;
use abi::told::helper;

use crate::calls::{Registers, unmerge_all};
use crate::filter::{ALLOW, AUDIT_ARCH_X86_64};
use crate::state::STATE;
use crate::sys::{self, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MREMAP_FIXED, MREMAP_MAYMOVE, PAGE};
use crate::sys::{advice, errno, failed, nr, page_up};
use crate::told;

const FILTER: u64 = 1;
/// BPF_MAXINSNS.
const INSTRUCTIONS_MAX: usize = 4096;
/// SECCOMP_RET_LOG: let through, and written down.
const LOG: u32 = 0x7ffc_0000;
/// SECCOMP_RET_ACTION_FULL.
const ACTION: u32 = 0xffff_0000;
/// Stands for an address.
const AT: u64 = 16 * PAGE;
const FIXED: u64 = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;

/// What the gate asks the kernel for in threads of the program.
const OWN: [(u64, [u64; 4]); 21] = [
    (nr::RT_SIGPROCMASK, [2, AT, AT, 8]),
    (nr::GETTID, [0; 4]),
    (nr::GETPID, [0; 4]),
    (nr::FUTEX, [AT, 0, 1, AT]),
    (nr::FUTEX, [AT, 1, i32::MAX as u64, 0]),
    (nr::SCHED_YIELD, [0; 4]),
    (nr::NANOSLEEP, [AT, 0, 0, 0]),
    (nr::CLOCK_GETTIME, [1, AT, 0, 0]),
    (nr::KILL, [1, 0, 0, 0]),
    (nr::MMAP, [AT, PAGE, 0, FIXED]),
    (nr::MMAP, [AT, PAGE, 3, FIXED]),
    (nr::MUNMAP, [AT, PAGE, 0, 0]),
    (nr::MREMAP, [AT, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED]),
    (nr::MADVISE, [AT, PAGE, advice::DONTFORK, 0]),
    (nr::MADVISE, [AT, PAGE, advice::DONTDUMP, 0]),
    (nr::MPROTECT, [AT, PAGE, 0, 0]),
    (nr::OPENAT, [sys::AT_FDCWD, AT, sys::O_CLOEXEC, 0]),
    (nr::FSTAT, [3, AT, 0, 0]),
    (nr::PREAD64, [3, AT, 8, 0]),
    (nr::CLOSE, [3, 0, 0, 0]),
    (nr::PROCESS_VM_READV, [1, AT, 1, AT]),
];

/// The gated call, by prctl or seccomp. `mode`: strict or a filter, which lies at `program`.
pub(crate) fn restrict(call: &Registers, mode: u64, program: u64) -> i64 {
    // One that cannot be read is refused: in this way libraries ask what the kernel has.
    if mode == FILTER && lets_gate_through(program).unwrap_or(true) {
        return STATE.restricts(call.raw());
    }
    STATE.stop(stop::FILTERED);
    // No call would be looked at any more that uncovers the store's pages.
    if !unmerge_all() {
        return -errno::ENOMEM;
    }
    let result = STATE.restricts(call.raw());
    if !failed(result) {
        STATE.gone.store(1, SeqCst);
        told::no_helper(helper::RESTRICTED);
    }
    result
}

/// Whether a filter allows all that the gate does; `None` if the kernel will not take it. `program`: a sock_fprog.
fn lets_gate_through(program: u64) -> Option<bool> {
    let own = sys::gettid();
    let mut head = [[0_u8; 8]; 2];
    sys::read_own(own, program, head.as_flattened_mut()).then_some(())?;
    let [len, at] = head.map(u64::from_le_bytes);
    let len = usize::from(len as u16);
    (1..=INSTRUCTIONS_MAX).contains(&len).then_some(())?;
    let bytes = len * size_of::<Instruction>();
    let room = page_up(bytes as u64);
    let Some(copy) = sys::allocate(room) else { return Some(false) };
    // SAFETY: fresh memory of that length, nobody else's until it is freed.
    let buffer = unsafe { core::slice::from_raw_parts_mut(copy as *mut u8, bytes) };
    let answer = sys::read_own(own, at, buffer).then(|| {
        // SAFETY: of any bytes; the memory is a page's beginning, and longer.
        let filter = unsafe { core::slice::from_raw_parts(copy as *const Instruction, len) };
        !may_wait_or_trap(filter)
            && OWN.iter().all(|(number, arguments)| {
                let verdict = verdict(filter, &facts(*number, arguments)).map(|verdict| verdict & ACTION);
                matches!(verdict, Some(ALLOW | LOG))
            })
    });
    // SAFETY: mapped above; nothing refers to it any more.
    unsafe { sys::free(copy, room) };
    answer
}

/// Whether a filter has an answer to some call, also to one of the program's, that does not come back as an error: a signal
/// that is to be handled, or somebody who is asked. The gate makes the program's calls with signals blocked, where such a
/// signal kills, and forks with a lock that whoever is asked may wait for.
fn may_wait_or_trap(filter: &[Instruction]) -> bool {
    const RETURN: u16 = 0x06;
    const RETURN_A: u16 = 0x16;
    const TRAP: u32 = 0x0003_0000;
    const NOTIFY: u32 = 0x7fc0_0000;
    const TRACE: u32 = 0x7ff0_0000;
    filter.iter().any(|instruction| {
        let answer = instruction.k & ACTION;
        instruction.code == RETURN_A || instruction.code == RETURN && matches!(answer, TRAP | NOTIFY | TRACE)
    })
}

/// `struct seccomp_data` as words.
fn facts(number: u64, arguments: &[u64; 4]) -> [u32; 16] {
    let mut facts = [0; 16];
    facts[0] = number as u32;
    facts[1] = AUDIT_ARCH_X86_64;
    for (index, argument) in arguments.iter().enumerate() {
        facts[4 + 2 * index] = *argument as u32;
        facts[5 + 2 * index] = (*argument >> 32) as u32;
    }
    facts
}

/// What a filter says.
fn verdict(filter: &[Instruction], facts: &[u32; 16]) -> Option<u32> {
    cbpf::run(|at| filter.get(at).copied(), |offset| facts.get(offset as usize / 4).copied())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    extern crate std;

    use std::vec::Vec;

    use super::*;
    use crate::filter::program;

    fn instruction(code: u16, if_true: u8, if_false: u8, k: u32) -> Instruction {
        Instruction { code, if_true, if_false, k }
    }

    fn lets_through(filter: &[Instruction]) -> Option<bool> {
        let program = [filter.len() as u64, filter.as_ptr() as u64];
        lets_gate_through(program.as_ptr() as u64)
    }

    /// Answers to some numbers with `answer`, and to all others with `otherwise`.
    fn list(numbers: &[u64], answer: u32, otherwise: u32) -> Vec<Instruction> {
        let mut filter = std::vec![instruction(0x20, 0, 0, 0)];
        for number in numbers {
            filter.push(instruction(0x15, 0, 1, *number as u32));
            filter.push(instruction(0x06, 0, 0, answer));
        }
        filter.push(instruction(0x06, 0, 0, otherwise));
        filter
    }

    /// It is judged as the kernel judges it: the children of `filter.rs`'s tests end by the same calls.
    #[test]
    fn the_helpers_own_filter() {
        let filter = program(77);
        let of = |number, arguments| verdict(&filter, &facts(number, &arguments)).unwrap();
        assert_eq!(of(nr::MADVISE, [AT, PAGE, 4, 0]), ALLOW);
        assert_eq!(of(nr::PROCESS_VM_READV, [77, AT, 1, AT]), ALLOW);
        assert_ne!(of(nr::PROCESS_VM_READV, [78, AT, 1, AT]), ALLOW);
        assert_ne!(of(nr::OPENAT, [0; 4]), ALLOW);
        assert_eq!(lets_through(&filter), Some(false));
    }

    #[test]
    fn lists_of_what_is_forbidden_and_of_what_is_not() {
        const KILL: u32 = 0x8000_0000;
        const DENIED: u32 = 0x0005_0001;
        let all: Vec<u64> = OWN.iter().map(|(number, _)| *number).collect();
        // ptrace, bpf, mount.
        assert_eq!(lets_through(&list(&[101, 321, 165], KILL, ALLOW)), Some(true));
        assert_eq!(lets_through(&list(&all, ALLOW, KILL)), Some(true));
        assert_eq!(lets_through(&list(&all, LOG, DENIED)), Some(true));
        for (index, number) in all.iter().enumerate() {
            let others: Vec<u64> = all.iter().copied().filter(|other| other != number).collect();
            assert_eq!(lets_through(&list(&others, ALLOW, KILL)), Some(false), "{index}");
            assert_eq!(lets_through(&list(&[*number], DENIED, ALLOW)), Some(false), "{index}");
        }
    }

    #[test]
    fn by_arguments_and_in_all_ways_of_computing() {
        // futex for waking alone; kill for looks alone.
        let wake = [
            instruction(0x20, 0, 0, 0),
            instruction(0x15, 0, 3, nr::FUTEX as u32),
            instruction(0x20, 0, 0, 24),
            instruction(0x15, 1, 0, 1),
            instruction(0x06, 0, 0, 0),
            instruction(0x06, 0, 0, ALLOW),
        ];
        assert_eq!(lets_through(&wake), Some(false));
        // 3 * 5 - 1 = 14, and 14 ^ 6 = 8, and 8 << 1 | 1 = 17, stored, loaded, compared.
        let sum = [
            instruction(0x00, 0, 0, 3),
            instruction(0x24, 0, 0, 5),
            instruction(0x01, 0, 0, 1),
            instruction(0x1c, 0, 0, 0),
            instruction(0xa4, 0, 0, 6),
            instruction(0x6c, 0, 0, 0),
            instruction(0x4c, 0, 0, 0),
            instruction(0x02, 0, 0, 9),
            instruction(0x61, 0, 0, 9),
            instruction(0x87, 0, 0, 0),
            instruction(0x15, 0, 1, 17),
            instruction(0x06, 0, 0, ALLOW),
            instruction(0x06, 0, 0, 0),
        ];
        assert_eq!(lets_through(&sum), Some(true));
    }

    #[test]
    fn answers_that_do_not_come_back_as_errors() {
        for answer in [0x0003_0000, 0x7fc0_0000, 0x7ff0_0007] {
            assert_eq!(lets_through(&list(&[101], answer, ALLOW)), Some(false), "{answer:#x}");
        }
        assert_eq!(lets_through(&list(&[101], 0x0005_0001, ALLOW)), Some(true));
    }

    #[test]
    fn what_is_no_filter_is_the_kernels_to_refuse() {
        assert_eq!(lets_gate_through(8), None);
        assert_eq!(lets_through(&[]), None);
        let nowhere = [1_u64, 8];
        assert_eq!(lets_gate_through(nowhere.as_ptr() as u64), None);
        assert_eq!(lets_through(&[instruction(0x20, 0, 0, 0)]), Some(false), "it ends nowhere");
    }
}
