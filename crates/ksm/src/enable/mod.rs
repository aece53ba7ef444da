//! Kernel KSM switched on and off in processes that run already.
//!
//! The calls that do it (prctl PR_SET_MEMORY_MERGE, madvise MADV_MERGEABLE) are only for the caller's own memory, so they are
//! injected ([`kernel::inject`]). Their answers say little: madvise takes a mark for memory that is never merged, and a
//! second prctl changes nothing. So what is said of a process is what its smaps and ksm_stat show afterwards.
//!
//! [`apply`] deals with one process, [`apply_to_all`] with many that go on starting others.

mod crowd;
mod goal;
mod kin;
mod look;
mod outcome;
mod reach;
mod settle;

pub use crowd::{EnableError, Event, Report, Selection, Watch, apply_to_all};
pub use goal::Goal;
pub use outcome::{Marks, Outcome, Processed};
pub use reach::{Rules, apply};
