//! Which code can change mappings: system-call sites found by decoding.
//!
//! Merging inside a running process is only safe when every call that changes its mappings passes one gate. The gate
//! is patched into libc and the loader at the *sites* where they enter the kernel, and this crate finds those sites:
//! not by symbol names (libc calls itself under names that nobody exports) but by decoding every instruction that
//! could be a `syscall`.
//!
//! * [`sites`] lists the sites of one object whose number can change mappings, and what cannot be patched.
//! * [`verdict`] says whether that list is one that the gate can be trusted with.
//! * [`encode`] packs the lists of several objects into the table that the gate reads ([`table`] has the format).
//! * [`resolve_program`] and [`needs_no_agent`] tell before a program starts whether a gate can get into it at all.
//!
//! ```
//! let libc = std::fs::read("/lib/x86_64-linux-gnu/libc.so.6")?;
//! let object = pagefold_proof::sites(&libc)?;
//! if let Err(reasons) = pagefold_proof::verdict(&object) {
//!     println!("not merging: {}", reasons.join("; "));
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod error;
mod image;
mod number;
mod numbers;
mod program;
mod reason;
mod run;
mod sites;
pub mod table;
mod verdict;

pub use error::{ProgramError, ProofError};
pub use numbers::{changes_mappings, name};
pub use program::{Class, Program, resolve_program};
pub use reason::{Reason, needs_no_agent};
pub use sites::{Location, ObjectSites, RefusedSite, Site, SiteKind, Why, sites};
pub use table::encode;
pub use verdict::verdict;
