//! Merge equal pages of memory: synchronously, inside a partition, for programs that know which of their memory is
//! alike.
//!
//! A [`Partition`] is a store of pages. Whoever has its descriptor can merge into it: processes that inherit the
//! descriptor or get it over a socket share one copy of each page that they have in common, copied again when it is
//! written. Nothing is shared, and nothing can be learned, across partitions.
//!
//! ```no_run
//! use pagefold::{Flags, Partition, whole_pages};
//!
//! let partition = Partition::open("guests", Flags::default())?;
//! let memory = vec![7_u8; 64 << 20];
//! let range = whole_pages(&memory).expect("it holds whole pages");
//! let report = partition.merge(range)?;
//! println!("{} bytes merged in {:?}", report.bytes_merged(), report.elapsed);
//! # Ok::<(), pagefold::Error>(())
//! ```
//!
//! [`Partition::merge`] works while other threads read and write the range. It needs userfaultfd with MOVE (Linux 6.8)
//! and the right to use it. For each merge the caller promises what an owner of memory can promise: mapping calls on
//! the range (mmap, munmap, mprotect, mremap, madvise...) go through the C library, and a child made by a raw fork
//! system call does not use it. A page to which somebody else holds a reference, a pending read into it for example, is
//! left alone and counted in the report.
//!
//! [`Partition::merge_quiescent`] needs none of that, and no right but to be oneself: the caller vouches that nothing
//! writes the range meanwhile, and its own thread compares and maps.
//!
//! The first merge puts two things into the process: the *gate*, which makes mapping calls of the C library wait while
//! pages are exchanged, and, for live merging, the *helper*, a process `pagefold-helper` that shares the memory and
//! exchanges the pages.

#![deny(unsafe_code)]

mod agent;
mod descriptor;
mod error;
mod memory;
mod partition;
mod quiescent;

pub use broker::MergeReport;
pub use error::Error;
pub use kernel::{Range, RangeError, Vaddr, page_size};
pub use memory::{ADDRESS_END, Plain, whole_pages, whole_pages_at};
pub use partition::{Flags, Options, Partition, Tracker};
