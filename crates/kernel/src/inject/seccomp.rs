//! What the seccomp filters of a thread would say to a call.
//!
//! Suspending them (PTRACE_O_SUSPEND_SECCOMP) is no way: they come back when the tracer dies, in the middle of a call
//! that they forbid. So their programs are run here on the calls to come, and a thread whose filters do not let them
//! all through is left alone.

use std::io;

use abi::cbpf;

use super::call::Call;
use super::refusal::Refusal;
use crate::ptrace::Tracee;
use crate::sys;

/// One instruction of classic BPF.
pub(super) type Instruction = libc::sock_filter;

/// `struct seccomp_data`: what a filter sees.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) call: Call,
    /// Behind the instruction that makes the call.
    pub(super) instruction: u64,
}

#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: u32 = 0xc000_00b7;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCHITECTURE: u32 = 0;

impl Seen {
    fn word(&self, at: u32) -> Option<u32> {
        let half = |value: u64| if at.is_multiple_of(8) { value as u32 } else { (value >> 32) as u32 };
        if !at.is_multiple_of(4) {
            return None;
        }
        Some(match at {
            0 => self.call.number.0 as u32,
            4 => ARCHITECTURE,
            8 | 12 => half(self.instruction),
            16..64 => half(self.call.arguments[(at as usize - 16) / 8]),
            _ => return None,
        })
    }
}

/// All filters of a stopped thread, the newest first.
#[derive(Debug, Default)]
pub(super) struct Filters(Vec<Vec<Instruction>>);

impl Filters {
    /// Reads them.
    pub(super) fn read(tracee: Tracee) -> io::Result<Result<Self, Refusal>> {
        let unreadable = |error: &io::Error| Refusal::SeccompUnreadable { errno: sys::errno(error) };
        let mut filters = Vec::new();
        loop {
            let length = match tracee.seccomp_filter(filters.len(), None) {
                Ok(Some(length)) => length,
                Ok(None) => return Ok(Ok(Self(filters))),
                Err(error) if sys::errno(&error) == libc::ESRCH => return Err(error),
                Err(error) => return Ok(Err(unreadable(&error))),
            };
            let mut program = vec![Instruction { code: 0, jt: 0, jf: 0, k: 0 }; length];
            match tracee.seccomp_filter(filters.len(), Some(&mut program)) {
                Ok(_) => filters.push(program),
                Err(error) if sys::errno(&error) == libc::ESRCH => return Err(error),
                Err(error) => return Ok(Err(unreadable(&error))),
            }
        }
    }

    /// The first filter that does not let a call through.
    pub(super) fn refusal(&self, seen: &Seen) -> Option<Refusal> {
        self.0.iter().enumerate().find_map(|(filter, program)| {
            let answer = run(program, seen)
                .map_or(libc::SECCOMP_RET_KILL_PROCESS, |answer| answer & libc::SECCOMP_RET_ACTION_FULL);
            let action = match answer {
                libc::SECCOMP_RET_ALLOW | libc::SECCOMP_RET_LOG => return None,
                libc::SECCOMP_RET_ERRNO => "an error",
                libc::SECCOMP_RET_TRAP => "SIGSYS",
                libc::SECCOMP_RET_TRACE => "a stop for its tracer",
                libc::SECCOMP_RET_USER_NOTIF => "a question to its supervisor",
                libc::SECCOMP_RET_KILL_THREAD => "killing the thread",
                _ => "killing the process",
            };
            Some(Refusal::Seccomp { filter, action, call: seen.call.number })
        })
    }
}

/// Runs a filter. `None` for a program that the kernel would not have taken.
fn run(program: &[Instruction], seen: &Seen) -> Option<u32> {
    let fetch = |at: usize| {
        let Instruction { code, jt, jf, k } = *program.get(at)?;
        Some(cbpf::Instruction { code, if_true: jt, if_false: jf, k })
    };
    cbpf::run(fetch, |at| seen.word(at))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::inject::call::CallNumber;

    fn op(code: u16, jt: u8, jf: u8, k: u32) -> Instruction {
        Instruction { code, jt, jf, k }
    }

    fn seen(number: i64, arguments: [u64; 6]) -> Seen {
        Seen { call: Call { number: CallNumber(number), arguments }, instruction: 0x7fff_1234_5678 }
    }

    /// Allows only call 157 with first argument 67, whose upper half is looked at too.
    fn only_one() -> Vec<Instruction> {
        vec![
            op(0x20, 0, 0, 4),
            op(0x15, 0, 7, ARCHITECTURE),
            op(0x20, 0, 0, 0),
            op(0x15, 0, 5, 157),
            op(0x20, 0, 0, 16),
            op(0x15, 0, 3, 67),
            op(0x20, 0, 0, 20),
            op(0x15, 0, 1, 0),
            op(0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
            op(0x06, 0, 0, libc::SECCOMP_RET_ERRNO | 1),
        ]
    }

    #[test]
    fn the_first_filter_that_objects_is_named() {
        let all = vec![op(0x06, 0, 0, libc::SECCOMP_RET_ALLOW)];
        let filters = Filters(vec![all.clone(), only_one()]);
        assert_eq!(filters.refusal(&seen(157, [67, 1, 0, 0, 0, 0])), None);
        let refusal = filters.refusal(&seen(28, [67, 1, 0, 0, 0, 0]));
        let expected = Refusal::Seccomp { filter: 1, action: "an error", call: CallNumber(28) };
        assert_eq!(refusal, Some(expected));
        assert!(filters.refusal(&seen(157, [67 | 1 << 32, 0, 0, 0, 0, 0])).is_some());
        assert_eq!(Filters(vec![all]).refusal(&seen(1, [0; 6])), None);
        assert_eq!(Filters::default().refusal(&seen(1, [0; 6])), None);
    }

    #[test]
    fn arithmetic_scratch_memory_and_the_instruction_pointer() {
        let program = [
            op(0x20, 0, 0, 8),
            op(0x02, 0, 0, 3),
            op(0x61, 0, 0, 3),
            op(0x87, 0, 0, 0),
            op(0x54, 0, 0, 0xffff),
            op(0x04, 0, 0, 1),
            op(0x64, 0, 0, 4),
            op(0x74, 0, 0, 4),
            op(0xa4, 0, 0, 0x0f),
            op(0x16, 0, 0, 0),
        ];
        assert_eq!(run(&program, &seen(0, [0; 6])), Some((0x5678 + 1) ^ 0x0f));
        assert_eq!(run(&[op(0x34, 0, 0, 0), op(0x06, 0, 0, 1)], &seen(0, [0; 6])), Some(0));
    }

    #[test]
    fn what_is_no_program_kills() {
        for program in [vec![], vec![op(0x20, 0, 0, 64)], vec![op(0x20, 0, 0, 2)], vec![op(0xff, 0, 0, 0)]] {
            assert_eq!(run(&program, &seen(0, [0; 6])), None);
            assert!(Filters(vec![program]).refusal(&seen(0, [0; 6])).is_some());
        }
    }
}
