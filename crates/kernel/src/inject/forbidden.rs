//! What in a thread forbids to make calls in it.

use std::io;

use super::arch;
use super::call::{Call, CallNumber};
use super::refusal::Refusal;
use super::seccomp::{Filters, Seen};
use super::slot::Slot;
use crate::ptrace::Tracee;
use crate::status;
use crate::units::Pid;

const CAP_SYS_ADMIN: u32 = 21;

/// Looks before the thread is stopped; the filters themselves can only be read then.
pub(super) fn beforehand(tid: Pid) -> Option<Refusal> {
    match seccomp_mode(tid) {
        1 => Some(Refusal::SeccompStrict),
        2 if !status::read(Pid::this()).is_ok_and(|own| own.cap_eff >> CAP_SYS_ADMIN & 1 != 0) => {
            Some(Refusal::SeccompUnreadable { errno: libc::EACCES })
        }
        _ => None,
    }
}

fn seccomp_mode(tid: Pid) -> u32 {
    status::read(tid).map_or(0, |status| status.seccomp)
}

/// What a stopped thread has against calls.
#[derive(Debug)]
pub(super) enum Rules {
    /// All are forbidden.
    Refuse(Refusal),
    /// These filters decide; none is no filter.
    Ask(Filters),
}

impl Rules {
    pub(super) fn read(tracee: Tracee) -> io::Result<Self> {
        if user_dispatch(tracee) {
            return Ok(Self::Refuse(Refusal::SyscallUserDispatch));
        }
        Ok(match seccomp_mode(tracee.tid()) {
            0 => Self::Ask(Filters::default()),
            1 => Self::Refuse(Refusal::SeccompStrict),
            _ => match Filters::read(tracee)? {
                Ok(filters) => Self::Ask(filters),
                Err(refusal) => Self::Refuse(refusal),
            },
        })
    }

    /// Whether filters would not let restart_syscall(2) through at the place of the interrupted call.
    pub(super) fn forbid_restart(&self, instruction: u64) -> bool {
        let call = Call { number: CallNumber(libc::SYS_restart_syscall), arguments: [0; 6] };
        matches!(self, Self::Ask(filters) if filters.refusal(&Seen { call, instruction }).is_some())
    }

    /// Why one of these calls must not be made in a slot.
    pub(super) fn refusal(&self, calls: &[Call], slot: Slot) -> Option<Refusal> {
        let instruction = slot.code().0 + arch::CALL_INSTRUCTION;
        match self {
            Self::Refuse(refusal) => Some(refusal.clone()),
            Self::Ask(filters) => calls.iter().find_map(|call| filters.refusal(&Seen { call: *call, instruction })),
        }
    }
}

/// Not in the libc crate for every architecture (include/uapi/linux/ptrace.h).
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: libc::c_uint = 0x4211;

/// True if the thread catches its own calls. Kernels before 6.4 do not tell.
fn user_dispatch(tracee: Tracee) -> bool {
    // Mode, selector, offset, length.
    let mut configuration = [0_u64; 4];
    // SAFETY: the request takes the size of these words and fills them.
    unsafe { tracee.fill(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, &mut configuration) }.is_ok() && configuration[0] != 0
}
