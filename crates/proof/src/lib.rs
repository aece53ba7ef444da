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
//! A gate in libc and the loader is complete only if no other code enters the kernel by itself:
//!
//! * [`Facts`] are what decoding one file has shown, [`judge()`] says what they mean, by [`Lists`] of harmless calls,
//!   reviewed libraries, and engines that compile at run time.
//! * [`Prover`] judges a whole program: a file with what its loader brings in, or all that a process can execute.
//! * [`Cache`] keeps facts between looks, and [`Trust`] is what the operator adds to the lists.
//!
//! ```
//! let libc = std::fs::read("/lib/x86_64-linux-gnu/libc.so.6")?;
//! let object = pagefold_proof::sites(&libc)?;
//! if let Err(reasons) = pagefold_proof::verdict(&object) {
//!     println!("not merging: {}", reasons.join("; "));
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! ```
//! use pagefold_proof::{Lists, Prover};
//!
//! let (lists, mut silent) = (Lists::default(), |_: pagefold_proof::Progress<'_>| {});
//! let report = Prover::new(&lists, None, &mut silent).judge_file("/bin/sh".as_ref())?;
//! println!("{}, for {} files", report.verdict.word(), report.objects.len());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod branches;
mod cache;
mod calls;
mod closure;
mod error;
mod harmless;
mod headers;
mod image;
mod judge;
mod ld_cache;
mod library;
mod lists;
mod number;
mod numbers;
mod object;
mod pages;
mod process;
mod program;
mod reason;
mod report;
mod run;
mod scan;
mod sites;
mod starts;
pub mod table;
mod text;
mod trust;
mod verdict;
mod vote;

pub use cache::{Cache, CacheError};
pub use calls::call_name;
pub use error::{ProgramError, ProofError};
pub use harmless::why_harmless;
pub use judge::{Judgement, Verdict, judge};
pub use lists::Lists;
pub use numbers::{changes_mappings, name, takes_the_gate};
pub use object::{CallSite, Facts};
pub use pages::{PAGE, page};
pub use program::{Class, Program, resolve_program};
pub use reason::{Reason, needs_no_agent};
pub use report::{Engine, Object, Progress, Prover, Report};
pub use scan::Entry;
pub use sites::{Location, ObjectSites, RefusedSite, Site, SiteKind, Why, sites};
pub use table::encode;
pub use trust::{Trust, TrustError, TrustedAs, trust_line};
pub use verdict::verdict;
