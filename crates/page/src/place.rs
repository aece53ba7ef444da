//! Where a page lies in a partition's store.

use std::fmt;

/// A segment of a partition's store. Numbers of retired segments come back only long after, with another generation
/// in them, so that a forgotten place finds nothing instead of somebody else's page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentId(pub u32);

impl fmt::Display for SegmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "segment {:#x}", self.0)
    }
}

/// One page of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// The segment that holds it.
    pub segment: SegmentId,
    /// Which page of the segment: its offset in the segment's memfd, in pages.
    pub page: u32,
}

impl Place {
    /// Whether `self` comes right after `other` in the same segment, so that one mapping can cover both.
    pub fn follows(self, other: Self) -> bool {
        self.segment == other.segment && other.page.checked_add(1) == Some(self.page)
    }
}
