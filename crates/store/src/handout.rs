//! Who may have which segment.

use std::os::fd::{AsFd, BorrowedFd};

use page::{Fingerprint, SegmentId};

use crate::partition::Partition;

/// The answer to a member that could use a segment.
#[derive(Debug)]
pub enum HandOut<'a> {
    /// The segment's descriptor, which can only be read, and how many pages it has.
    File {
        /// The descriptor.
        file: BorrowedFd<'a>,
        /// Pages of the segment.
        pages: u32,
    },
    /// The member was not found to hold what it must hold: every page of the segment in a strict partition, any of
    /// them in another.
    NotHeld,
    /// The member is another user's.
    OtherUser,
    /// The segment is retired.
    Gone,
}

impl Partition {
    /// Decides whether a member of user `uid` may have a segment. `holds` says whether this member was itself found to
    /// have a page of that content.
    pub fn hand_out(&self, segment: SegmentId, uid: u32, holds: impl FnMut(Fingerprint) -> bool) -> HandOut<'_> {
        if uid != self.options.uid {
            return HandOut::OtherUser;
        }
        let Some(segment) = self.segments.get(segment) else { return HandOut::Gone };
        let mut contents = segment.fingerprints().iter().copied();
        let held = if self.options.strict { contents.all(holds) } else { contents.any(holds) };
        if !held {
            return HandOut::NotHeld;
        }
        HandOut::File { file: segment.file().as_fd(), pages: segment.pages() }
    }
}
