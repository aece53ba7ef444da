//! Where a page's content lies in the store, and what is to be done with a page: one 64-bit word of a plan entry.

/// What is to be done with one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Replace a plain anonymous page by a page of the store.
    Merge(Place),
    /// Drop a plain anonymous page that holds only zeros.
    DropZero,
    /// Replace a page that diverged after merging by a page of the store, its old one or another.
    Retake(Place),
    /// Drop a page that diverged after merging and now holds only zeros.
    RetakeZero,
    /// Give a merged page its own anonymous copy back.
    Unmerge,
}

/// A page of a store segment, by the number under which the helper was given the segment's descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index into the helper's segment table.
    pub segment: u32,
    /// Page number inside the segment.
    pub page: u32,
}

impl Place {
    /// True if `self` lies directly behind `before` in the same segment.
    #[must_use]
    pub const fn follows(self, before: Self) -> bool {
        self.segment == before.segment && self.page == before.page.wrapping_add(1)
    }
}

const KIND_SHIFT: u32 = 56;
const SEGMENT_SHIFT: u32 = 32;
const SEGMENT_MASK: u64 = (1 << (KIND_SHIFT - SEGMENT_SHIFT)) - 1;

/// The most segments that one helper can be told about.
pub const SEGMENTS_MAX: u32 = 1 << (KIND_SHIFT - SEGMENT_SHIFT);

impl Action {
    /// The word that stands for this action in a plan.
    #[must_use]
    pub const fn encode(self) -> u64 {
        const fn with(kind: u64, place: Place) -> u64 {
            kind << KIND_SHIFT | (place.segment as u64 & SEGMENT_MASK) << SEGMENT_SHIFT | place.page as u64
        }
        match self {
            Self::Merge(place) => with(1, place),
            Self::DropZero => 2 << KIND_SHIFT,
            Self::Retake(place) => with(3, place),
            Self::RetakeZero => 4 << KIND_SHIFT,
            Self::Unmerge => 5 << KIND_SHIFT,
        }
    }

    /// The action that a word stands for, if it is one.
    #[must_use]
    pub const fn decode(word: u64) -> Option<Self> {
        let place = Place { segment: (word >> SEGMENT_SHIFT & SEGMENT_MASK) as u32, page: (word & 0xffff_ffff) as u32 };
        match word >> KIND_SHIFT {
            1 => Some(Self::Merge(place)),
            2 => Some(Self::DropZero),
            3 => Some(Self::Retake(place)),
            4 => Some(Self::RetakeZero),
            5 => Some(Self::Unmerge),
            _ => None,
        }
    }

    /// Actions of one family may share a batch: plain pages, diverged pages, un-merging.
    #[must_use]
    pub const fn family(self) -> Family {
        match self {
            Self::Merge(_) | Self::DropZero => Family::Plain,
            Self::Retake(_) | Self::RetakeZero => Family::Diverged,
            Self::Unmerge => Family::Unmerge,
        }
    }

    /// The store page to compare with and to map, `None` where only zeros will do.
    #[must_use]
    pub const fn place(self) -> Option<Place> {
        match self {
            Self::Merge(place) | Self::Retake(place) => Some(place),
            Self::DropZero | Self::RetakeZero | Self::Unmerge => None,
        }
    }
}

/// Which of the three batch sequences an action belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Anonymous pages that were never merged.
    Plain,
    /// Anonymous pages inside a private mapping of the store.
    Diverged,
    /// Merged pages that get their own copy back.
    Unmerge,
}

/// What became of one entry of a plan. The numbers are part of the agreement between helper and broker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Outcome {
    /// Not reached yet.
    Pending = 0,
    /// The page is now the store's.
    Merged = 1,
    /// The page held zeros and was dropped.
    Zero = 2,
    /// The page diverged earlier and is the store's again.
    Retaken = 3,
    /// The page has its own copy again.
    Unmerged = 4,
    /// The gate was busy each time it was tried.
    GateBusy = 16,
    /// The layout of the range has changed since the plan was made.
    LayoutChanged = 17,
    /// Threads were created since their robust lists were looked up, or the process has forked since.
    ThreadsChanged = 18,
    /// The page is not there, swapped out, or the shared zero page.
    Absent = 19,
    /// A fork shares the page with another process.
    Shared = 20,
    /// The page is pinned for DMA, or locked (UFFDIO_MOVE: EBUSY, EAGAIN).
    Pinned = 21,
    /// Somebody holds a reference to the page.
    Referenced = 22,
    /// The content is not what it was.
    Changed = 23,
    /// The mapping has a property that forbids it (protection, lock, tag...).
    Properties = 24,
    /// The page holds a thread's control block or lies on a robust list.
    ThreadData = 25,
    /// A limit was met: mappings, descriptors, memory.
    Budget = 26,
    /// No exact reference check could be had in time.
    NoCheck = 27,
    /// The process uses what cannot be merged under: its own userfaultfd, PI futexes, io_uring...
    Stopped = 28,
    /// The page was excluded by its owner.
    Excluded = 29,
    /// The entry made no sense.
    Invalid = 30,
}

impl Outcome {
    /// Every outcome that means a page was left as it was, with the word that reports use for it.
    pub const REFUSALS: [(Self, &'static str); 15] = [
        (Self::GateBusy, "gate_busy"),
        (Self::LayoutChanged, "layout_changed"),
        (Self::ThreadsChanged, "threads_changed"),
        (Self::Absent, "absent"),
        (Self::Shared, "shared_by_fork"),
        (Self::Pinned, "pinned"),
        (Self::Referenced, "referenced"),
        (Self::Changed, "changed"),
        (Self::Properties, "properties"),
        (Self::ThreadData, "thread_data"),
        (Self::Budget, "budget"),
        (Self::NoCheck, "no_check_available"),
        (Self::Stopped, "stopped"),
        (Self::Excluded, "excluded"),
        (Self::Invalid, "invalid"),
    ];

    /// The outcome that a number stands for; a number that is none stands for [`Outcome::Invalid`].
    #[must_use]
    pub fn decode(word: u32) -> Self {
        match word {
            0 => Self::Pending,
            1 => Self::Merged,
            2 => Self::Zero,
            3 => Self::Retaken,
            4 => Self::Unmerged,
            other => Self::REFUSALS
                .iter()
                .map(|(outcome, _)| *outcome)
                .find(|outcome| *outcome as u32 == other)
                .unwrap_or(Self::Invalid),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_survive_encoding() {
        let place = Place { segment: SEGMENTS_MAX - 1, page: u32::MAX };
        for action in
            [Action::Merge(place), Action::DropZero, Action::Retake(place), Action::RetakeZero, Action::Unmerge]
        {
            assert_eq!(Action::decode(action.encode()), Some(action));
        }
        assert_eq!(Action::decode(0), None);
        assert_eq!(Action::decode(u64::MAX), None);
    }

    #[test]
    fn outcomes_survive_encoding() {
        for (outcome, _) in Outcome::REFUSALS {
            assert_eq!(Outcome::decode(outcome as u32), outcome);
        }
        assert_eq!(Outcome::decode(77), Outcome::Invalid);
    }
}
