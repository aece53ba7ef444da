//! Driving the kernel's own KSM.
//!
//! `/sys/kernel/mm/ksm` is one set of files for the whole host, so this crate is the only one of pagefold that writes
//! there, and it writes only under a [`Lease`]: the administrator's values are recorded once, every user of the
//! settings is a counted holder, and the last holder that goes gives the administrator's values back. A holder that was
//! killed is found by its [guardian](guard) or by the next use.
//!
//! Which processes are merged is another matter: [`enable`] marks the memory of those that run already, and [`keeper`]
//! does so by a file of rules.
//!
//! On top of the lease:
//! - [`Drive`] lets ksmd work for one command and its children, as fast as there is something to merge and no longer;
//! - [`advise`] holds goals: the time of a pass, a ceiling of CPU, answers to pressure;
//! - [`sweep`] runs a command under a list of settings and says which is best;
//! - [`request`] merges chosen memory of chosen processes now, and takes it back;
//! - [`Layout`] gives the members of a partition one address-space layout, without which equal programs hold few equal
//!   pages.
//!
//! [`trace`] shows it at work; [`set`] changes settings for the administrator himself, with a way back; [`status`] tells what KSM does, for whom, and what that comes to.
//!
//! KSM knows one tree of pages for the host. A partition that is driven through it is not separated from others.
#![forbid(unsafe_code)]

mod about;
pub mod advise;
mod drive;
pub mod enable;
mod error;
mod guard;
mod host_lock;
pub mod keeper;
mod knob;
mod ksmd;
mod layout;
mod lease;
mod pace;
mod patience;
mod proc_stat;
mod repaired;
pub mod request;
mod room;
pub mod set;
mod state;
pub mod status;
pub mod sweep;
mod sysfs;
pub mod trace;
mod tree;
mod wanted;

pub use about::{About, Takes};
pub use drive::{Drive, Progress};
pub use error::KsmError;
pub use guard::{Ended, guard};
pub use host_lock::host_lock;
pub use kernel::ksm_sysfs::KsmSysfs;
pub use knob::{AdvisorMode, Knob, Values};
pub use ksmd::{Counters, Ksmd};
pub use layout::{Applied, LAYOUT_VARIABLE, Layout, LayoutError, STACK_SOFT_VARIABLE, StackLimit};
pub use lease::Lease;
pub use pace::{DriveSettings, Pace, Phase};
pub use patience::{Waits, tell_waits};
pub use proc_stat::ProcessId;
pub use repaired::{Change, Foreign, Refused, Repaired};
pub use state::{Holder, StatePath};
pub use sysfs::check_writable;
pub use tree::{Member, Tree, TreeSum};
pub use wanted::{Advisor, Rate, Wanted};
