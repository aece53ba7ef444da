//! Partitions and their sealed segments: the pages that members share, and who may have which.
//!
//! A [`Partition`] is one trust domain: one user, one secret that keys its fingerprints, and segments that belong to
//! it alone. A segment is a memory file of exactly as many pages as it has, filled and then sealed against writing,
//! shrinking, growing and further sealing before anybody hears of it. Its mode is 0400 and what is handed out is a
//! descriptor that can only be read, so a member of another user than the broker's cannot even open it anew. Nobody,
//! the broker included, can change a store page once it has a [`Place`].
//!
//! Interning is content-addressed. A fingerprint selects; bytes decide: pages are hashed again when they are copied
//! in, a page that changed since it was seen is left out, and a page whose fingerprint is there already is compared
//! with it. Zero pages never enter.
//!
//! **Space** comes back by whole segments. [`Partition::retire`] drops the broker's descriptor and every record of a
//! segment; the kernel frees the file when its last mapping goes, so retiring is always safe, only wasteful while
//! others could still have shared it. Segments are small, therefore, and filled with pages that were found together.
//!
//! **Strict** partitions are for members that do not trust each other. There every run of neighbours has a segment of
//! its own, and [`Partition::hand_out`] gives it only to a member that was found to hold every page of it: no
//! descriptor ever shows a member a page that it did not have.
//!
//! **Contents that repeat** in runs of neighbours lie there several times side by side ([`Partition::repeat`]), so that
//! few mappings show a long run of them. Strict partitions have no such copies.
//!
//! What this does not close: members of an ordinary partition read whole segments, other processes of the same user
//! reach a member's descriptors through /proc/PID/fd, and a broker that runs as its members' user owns the files
//! together with them (the seals hold, the mode does not).
//!
//! ```
//! use pagefold_store::{FillBuffer, FillRequest, Options, Outcome, Partition};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let mut partition = Partition::open(Options::for_user(1000))?;
//! let size = kernel::page_size() as usize;
//! let pages: Vec<Vec<u8>> = (1..=3).map(|seed| (0..size).map(|at| (at * seed % 251) as u8).collect()).collect();
//!
//! let seen: Vec<_> = pages.iter().map(|page| partition.secret().fingerprint(page)).collect();
//! let requests: Vec<_> = (0..3)
//!     .map(|at| FillRequest { fingerprint: seen[at], source: at, continues: at > 0 })
//!     .collect();
//! let report = partition.fill(&mut FillBuffer::new(), &requests, |requests, reads| {
//!     for (slot, request) in requests.iter().enumerate() {
//!         reads.put(slot, &pages[request.source]);
//!     }
//! });
//! let places: Vec<_> = report.outcomes.iter().filter_map(Outcome::place).collect();
//! assert!(places[1].follows(places[0]) && places[2].follows(places[1]));
//! assert_eq!(partition.lookup(seen[2]), Some(places[2]));
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

mod copies;
mod counters;
mod error;
mod fill;
mod handout;
mod lifetime;
pub mod mappings;
mod partition;
mod processes;
mod segments;

pub use page::{Place, SegmentId};

pub use counters::StoreCounters;
pub use error::StoreError;
pub use fill::{FillBuffer, FillReport, FillRequest, Outcome, PageReads};
pub use handout::HandOut;
pub use lifetime::{NearlyDead, Reclaimed};
pub use partition::{Options, Partition, Run};
pub use processes::{ProcessPage, read_processes};
