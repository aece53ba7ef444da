//! What became of the processes.

use kernel::inject::Refusal;
use kernel::{KsmStat, Pid};
use serde::Serialize;

use crate::proc_stat::ProcessId;

/// What became of one process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum Outcome {
    /// It is as was asked for, which it was not before.
    Done,
    /// It was as was asked for before.
    Already,
    /// It has none of the mappings that were named, or none of them can be merged.
    Nothing,
    /// It is not, or not whole, as was asked for.
    Refused {
        /// Why, one word.
        reason: &'static str,
        /// Why, for people.
        detail: String,
    },
    /// It ended before anything was done.
    Ended,
}

impl Outcome {
    pub(crate) fn refused(reason: &'static str, detail: impl ToString) -> Self {
        Self::Refused { reason, detail: detail.to_string() }
    }

    /// That of a process that cannot be injected. A zombie has ended, its memory too.
    pub(crate) fn of(refusal: &Refusal) -> Self {
        match refusal {
            Refusal::Gone | Refusal::Zombie => Self::Ended,
            // Caught, and not come to a stop before it was let go of.
            Refusal::Traced { by } if *by == Pid::this() => Self::refused(BUSY, refusal),
            other => Self::refused(other.word(), other),
        }
    }

    /// True for what may be so only because an exec was under way: the injection looked at the old memory and met the new
    /// one, or the child of a vfork had not come to it; or because something was lacking here for a moment.
    pub(crate) fn may_pass(&self) -> bool {
        const MAY: [&str; 6] = ["no_place_for_code", "other_interface", "vfork", BUSY, LACKING, FAILED];
        matches!(self, Self::Refused { reason, .. } if MAY.contains(reason))
    }

    /// The process is as was asked for.
    #[must_use]
    pub const fn is_done(&self) -> bool {
        matches!(self, Self::Done | Self::Already)
    }

    /// It was refused for want of a right.
    #[must_use]
    pub fn is_not_permitted(&self) -> bool {
        matches!(self, Self::Refused { reason: NOT_PERMITTED, .. })
    }
}

/// The reason of those that were at something else each time.
pub(crate) const BUSY: &str = "busy";

/// The reason of those with whom something went wrong that nobody foresaw.
pub(crate) const FAILED: &str = "failed";

/// The reason of those for whom something was lacking here, which is not their fault.
pub(crate) const LACKING: &str = "lacking";

/// The reason of those that the user may not touch, [`Refusal::NotPermitted`]'s word.
pub(crate) const NOT_PERMITTED: &str = "not_permitted";

/// What is marked in a process, from `VmFlags` of its smaps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Marks {
    /// Mappings that are marked.
    pub marked_vmas: u64,
    /// Their size in bytes.
    pub marked_bytes: u64,
    /// Bytes of anonymous memory in them: what can be merged now.
    pub marked_anonymous_bytes: u64,
    /// Bytes of merged pages in the process, those of KSM's zero pages not counted.
    pub ksm_bytes: u64,
    /// Mappings that were meant and that KSM does not merge: shared memory, huge pages, devices.
    pub unmergeable_vmas: u64,
}

/// One process, what became of it and what the kernel shows of it afterwards.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Processed {
    /// Which.
    #[serde(flatten)]
    pub process: ProcessId,
    /// Command name.
    pub comm: String,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// What is marked now; `None` if it could not be looked at.
    pub marks: Option<Marks>,
    /// Its ksm_stat now.
    pub ksm_stat: Option<KsmStat>,
    /// Words for mappings that stand for none of its mappings.
    pub without_a_mapping: Vec<String>,
    /// For how long one of its threads was kept from its work, all times together, in seconds.
    pub stopped_seconds: f64,
    /// How many times.
    pub injections: u32,
    /// How many of its own calls returned early for that: EINTR, or less than they were to move.
    pub interrupted: u32,
}
