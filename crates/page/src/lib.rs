//! Pure page logic: no input or output, no clocks, no unsafe code.
//!
//! - [`Secret`] and [`Fingerprint`]: 128 bits that select a page's content, keyed for each partition.
//! - [`PageClass`]: zero pages and pages that repeat one word need no fingerprint.
//! - [`CandidateIndex`]: eight to ten bytes for a page seen once, until a second page with its content turns up.
//! - [`census`]: which pages of a snapshot are equal, in nine bytes a page.
//! - [`Ages`]: one byte a page that says how long it has been unwritten and whether it is worth a look.
//! - [`plan`]: batches and runs out of matches, under a budget of mappings.
//! - [`profit`]: what merging saves after its own bookkeeping, the kernel's formula and ours.
//! - [`unseen`]: how many pages of a whole are duplicates, estimated from a part of it.
//! - [`near`]: pages that are nearly equal, why, and what it would be worth to make them equal.
//! - [`ksmd`]: what the kernel's scanner would do with given contents and settings, and what that would cost it.
//! - [`Histogram`]: durations in logarithmic buckets.
//!
//! ```
//! use pagefold_page::{CandidateIndex, PageClass, PageNumber, PageRange, Secret, Sighting, Spans};
//!
//! let secret = Secret::new([7; Secret::BYTES]); // random in earnest
//! let mut spans = Spans::new();
//! let mut index = CandidateIndex::new(1 << 20);
//!
//! let first = spans.add(1, PageRange::new(PageNumber(0x400), PageNumber(0x500))).unwrap();
//! let content: Vec<u8> = (0..4096_u32).map(|i| (i * i >> 4) as u8).collect();
//! assert_eq!(PageClass::of(&content), PageClass::Data);
//! let fingerprint = secret.fingerprint(&content);
//!
//! assert_eq!(index.observe(fingerprint, first), Sighting::First);
//! assert_eq!(index.observe(fingerprint, first.offset(3)), Sighting::Candidate(first));
//! assert_eq!(spans.locate(first).unwrap().page, PageNumber(0x400));
//! ```
#![forbid(unsafe_code)]

mod address;
mod ages;
pub mod census;
mod class;
mod fingerprint;
mod histogram;
mod index;
pub mod ksmd;
pub mod near;
mod place;
pub mod plan;
pub mod profit;
pub mod unseen;

pub use address::{PageNumber, PageRange};
pub use ages::{AgeCounts, AgePolicy, Ages, Kind, PageAge};
pub use class::{PageClass, is_zero};
pub use fingerprint::{Fingerprint, Secret};
pub use histogram::{Bucket, Histogram};
pub use index::{CandidateIndex, IndexCounts, Location, PageId, Sighting, Spans};
pub use place::{Place, SegmentId};
