//! What can go wrong with a store.

use std::io;

use kernel::MemfdError;
use page::SegmentId;
use thiserror::Error;

/// An error of a partition's store. Whatever it is, the partition stays usable and nothing half made is in it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The kernel gave no random bytes for the secret.
    #[error("cannot draw a secret for the partition")]
    Secret {
        /// What the kernel said.
        source: io::Error,
    },
    /// A segment could not be made: descriptors, memory or file size limits ran out, or /proc is not there.
    #[error("cannot make a segment of {pages} pages")]
    Make {
        /// Pages that it would have had.
        pages: u32,
        /// What failed.
        source: MemfdError,
    },
    /// A segment could not be read.
    #[error("cannot read page {page} of {segment}")]
    Read {
        /// The segment.
        segment: SegmentId,
        /// Which of its pages.
        page: u32,
        /// What failed.
        source: MemfdError,
    },
    /// There are as many segments as can be numbered.
    #[error("the partition has {segments} segments, the most there can be")]
    TooManySegments {
        /// How many.
        segments: u32,
    },
}
