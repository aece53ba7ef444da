//! Driving the kernel's own KSM.
//!
//! `/sys/kernel/mm/ksm` is one set of files for the whole host, so this crate is the only one of pagefold that writes
//! there, and it writes only under a [`Lease`]: the administrator's values are recorded once, every user of the
//! settings is a counted holder, and the last holder that goes gives the administrator's values back. A holder that was
//! killed is found by its [guardian](guard) or by the next use.
//!
//! On top of the lease:
//! - [`Drive`] lets ksmd work for one command and its children, as fast as there is something to merge and no longer;
//! - [`Layout`] gives the members of a partition one address-space layout, without which equal programs hold few equal
//!   pages.
//!
//! KSM knows one tree of pages for the host. A partition that is driven through it is not separated from others.
#![forbid(unsafe_code)]

mod drive;
mod error;
mod guard;
mod host_lock;
mod knob;
mod ksmd;
mod layout;
mod lease;
mod pace;
mod proc_stat;
mod state;
mod sysfs;
mod tree;
mod wanted;

pub use drive::{Drive, Progress};
pub use error::KsmError;
pub use guard::{Ended, guard};
pub use host_lock::host_lock;
pub use kernel::ksm_sysfs::KsmSysfs;
pub use knob::{AdvisorMode, Knob, Values};
pub use ksmd::{Counters, Ksmd};
pub use layout::{Applied, LAYOUT_VARIABLE, Layout, LayoutError, STACK_SOFT_VARIABLE, StackLimit};
pub use lease::{Change, Foreign, Lease, Refused, Repaired};
pub use pace::{DriveSettings, Pace, Phase};
pub use proc_stat::ProcessId;
pub use state::{Holder, StatePath};
pub use sysfs::check_writable;
pub use tree::{Member, Tree, TreeSum};
pub use wanted::{Advisor, Rate, Wanted};
