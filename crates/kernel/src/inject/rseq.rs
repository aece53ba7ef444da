//! Restartable sequences (rseq(2)): code that the kernel sends to an abort handler if its thread is preempted inside.

use super::place;
use crate::ptrace::Tracee;

/// Not in the libc crate for every architecture (include/uapi/linux/ptrace.h).
const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;

/// The words of `struct ptrace_rseq_configuration`.
#[repr(C)]
#[derive(Default)]
struct Rseq {
    pointer: u64,
    size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}

/// Where a restartable sequence (rseq(2)) goes on if the thread is stopped inside one: the stop is a preemption, and
/// the kernel, which would see the thread in our code, would not send it there.
pub(super) fn abort_of_critical_section(tracee: Tracee, instruction: u64) -> Option<u64> {
    let mut rseq = Rseq::default();
    // SAFETY: the request takes the size of this structure of integers and fills it.
    unsafe { tracee.fill(PTRACE_GET_RSEQ_CONFIGURATION, &mut rseq) }.ok()?;
    if rseq.pointer == 0 {
        return None;
    }
    // `struct rseq`: two numbers of CPUs, then the address of the descriptor of the current section.
    let [_, section] = place::two_words(tracee.tid(), rseq.pointer)?;
    if section == 0 {
        return None;
    }
    let section = section.cast_unsigned();
    // `struct rseq_cs`: version and flags, start, length, abort address.
    let [_, start] = place::two_words(tracee.tid(), section)?;
    let [length, abort] = place::two_words(tracee.tid(), section.checked_add(16)?)?;
    let inside = instruction.wrapping_sub(start.cast_unsigned()) < length.cast_unsigned();
    inside.then_some(abort.cast_unsigned())
}
