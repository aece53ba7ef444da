//! What the kernel's scanner would do: a model of ksmd over recorded page contents.
//!
//! A [`Capture`] says what every page held at a few looks; a [`Model`] scans it as ksmd would under given [`Settings`]
//! and says after every pass, or at any time, what `/sys/kernel/mm/ksm` would show. [`compare`] runs one capture under
//! several settings and [`recommend`] picks those that reach a goal at the least processor time.
//!
//! Modelled, after mm/ksm.c: the pass over all address spaces in batches, the checksum that must be seen twice, the
//! stable tree with its limit of mappings for a page and the copies beyond it, the unstable tree that each pass builds
//! anew, zero pages, the ages and skips of smart scan, records of pages that went away, the scan-time advisor in its
//! integers. ksmd's processor time is a sum of [`Costs`].
//!
//! Not modelled, since page contents do not tell it: a write that leaves a page as it was, contents between two looks,
//! pages that something holds (pins, I/O), memory that a fork shares, huge pages and their splits, NUMA trees. Stale
//! nodes leave the tree when a search happens on them; here they go when their last page is visited, at the latest at
//! the end of the pass, where the counters agree again.
//!
//! ```
//! use std::time::Duration;
//! use pagefold_page::ksmd::{Capture, Content, Model, Settings};
//!
//! let mut capture = Capture::builder();
//! capture.look(Duration::ZERO, [7, 8, 7, 9].map(Content::hashed)).unwrap();
//! let capture = capture.build();
//! let mut model = Model::new(&capture, Settings::default());
//! assert_eq!(model.pass().pages_sharing, 0, "the first pass only takes checksums");
//! assert_eq!(model.pass().pages_sharing, 1);
//! ```

mod advisor;
mod capture;
mod compare;
mod item;
mod repeat;
mod scan;
mod settings;
mod state;
#[cfg(test)]
mod tests;
mod tree;

pub use capture::{Capture, CaptureBuilder, CaptureError, Content, Reachable};
pub use compare::{Goal, Reached, Trial, compare, ladder, recommend};
pub use scan::Model;
pub use settings::{Advisor, Costs, ScanTime, Settings};
pub use state::State;
