//! Why nothing is merging, or so little.
//!
//! [`HostFacts`] are all that is to be seen of KSM on this host, [`Observed`] what is to be seen of a process; both are
//! gathered without changing anything. [`diagnose`] is pure: it turns facts into [`Finding`]s, each a cause and a remedy
//! of one line. The causes with their names are in `docs/doctor.md`.
//!
//! ```
//! use std::time::Duration;
//! use kernel::{KsmSysfs, Pid};
//! use pagefold_eval::doctor::{HostFacts, Observed, diagnose};
//!
//! let host = HostFacts::observe(&KsmSysfs::host(), Duration::ZERO)?;
//! let this = Observed::observe(Pid::this())?;
//! for finding in diagnose(&host, &[this]) {
//!     println!("{}: {} -> {}", finding.code.word(), finding.cause, finding.remedy);
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod code;
mod diagnose;
mod diagnose_host;
mod diagnose_process;
mod finding;
mod host;
mod marked;
mod process;
#[cfg(test)]
mod tests;
mod words;

pub use code::Code;
pub use diagnose::diagnose;
pub use finding::{Finding, Severity, Subject};
pub use host::{HostFacts, Look, Settings, Writable};
pub use marked::{Fleet, Marked, ProgramLayout};
pub use process::{MemoryKinds, Observed, ProcessFacts};
