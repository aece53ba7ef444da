//! What merging would save, where and why, before anything is changed.
//!
//! This room reads and never changes: no process is stopped, attached to or written to, no setting is touched, and
//! pages that are swapped out stay there. How pages are read so that reading changes nothing is in `read.rs`.
//!
//! Data flows one way: [`Selection`] finds address spaces, a walk of their pagemaps finds pages, readers on all cores
//! turn pages into contents ([`page::census`]), equal contents become groups, groups become figures, figures the
//! [`Report`].
//!
//! ```
//! use eval::{GroupBy, Options, Pace, Selection, evaluate};
//! use kernel::Pid;
//! use pagefold_eval as eval;
//!
//! let options = Options {
//!     selection: Selection { pids: vec![Pid::this()], ..Selection::default() },
//!     ..Options::default()
//! };
//! let report = evaluate(&options, &|_stage| {})?;
//! let counters = report.totals.counters;
//! assert_eq!(counters.pages_scanned, counters.zero_pages + counters.distinct_pages + counters.duplicate_pages);
//! # Ok::<(), eval::EvalError>(())
//! ```
#![forbid(unsafe_code)]

mod answer;
mod capture;
mod count;
mod error;
mod estimate;
mod files;
mod html;
mod matrix;
mod model;
mod near;
mod numbers;
mod printable;
mod read;
mod record;
pub mod report;
mod runs;
mod scale;
mod snapshot;
mod tally;
mod targets;
mod vma;
mod walk;

pub use capture::CaptureError;
pub use error::EvalError;
pub use html::{Additions, NearCause, Series, sweep_page};
pub use model::{ModelError, ModelReport, TrialReport};
pub use printable::{printable, size};
pub use read::Pace;
pub use report::Report;
pub use snapshot::{Options, SampleBy, Snapshot, Stage, Tell, evaluate};
pub use targets::{GroupBy, Process, Selection, Skipped, Targets};
pub use vma::{VmaKind, ksm_refuses};
pub mod doctor;
