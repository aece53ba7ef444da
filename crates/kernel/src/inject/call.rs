//! The calls that can be run in another process.

use crate::units::Range;

/// The number of a system call on this architecture, `libc::SYS_...`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CallNumber(pub i64);

/// One call: its number and arguments.
///
/// It must be harmless to do it twice: where a signal or the end of a thread breaks it off, it is done again. And it must
/// be none that itself sleeps with a time-out (nanosleep, poll, futex): the kernel keeps the rest of one such sleep for
/// each thread, and the thread's own may be waiting there to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Which.
    pub number: CallNumber,
    /// Its arguments; addresses are those of the other process.
    pub arguments: [u64; 6],
}

/// What madvise is asked to do with a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Advice {
    /// Let ksmd merge it.
    Mergeable,
    /// Give every page its own copy, and leave it so.
    Unmergeable,
}

impl Call {
    /// prctl(PR_SET_MEMORY_MERGE): all memory of the process, now and later, may be merged by ksmd, or no more.
    #[must_use]
    pub fn memory_merge(on: bool) -> Self {
        let option = u64::from(libc::PR_SET_MEMORY_MERGE.cast_unsigned());
        Self { number: CallNumber(libc::SYS_prctl), arguments: [option, on.into(), 0, 0, 0, 0] }
    }

    /// prctl(PR_GET_MEMORY_MERGE): 1 if that is on, 0 if not.
    #[must_use]
    pub fn is_memory_merged() -> Self {
        let option = u64::from(libc::PR_GET_MEMORY_MERGE.cast_unsigned());
        Self { number: CallNumber(libc::SYS_prctl), arguments: [option, 0, 0, 0, 0, 0] }
    }

    /// madvise on whole pages of the other process.
    #[must_use]
    pub fn madvise(range: Range, advice: Advice) -> Self {
        let advice = match advice {
            Advice::Mergeable => libc::MADV_MERGEABLE,
            Advice::Unmergeable => libc::MADV_UNMERGEABLE,
        };
        let arguments = [range.start().0, range.len().0, u64::from(advice.cast_unsigned()), 0, 0, 0];
        Self { number: CallNumber(libc::SYS_madvise), arguments }
    }

    /// getpid: changes nothing, shows that calls can be run.
    #[must_use]
    pub fn getpid() -> Self {
        Self { number: CallNumber(libc::SYS_getpid), arguments: [0; 6] }
    }
}
