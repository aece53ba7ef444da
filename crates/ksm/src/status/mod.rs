//! What KSM does: on the host, for processes, in their mappings and in cgroups.
//!
//! The counters have traps, and each is avoided or named where it is:
//! - `pages_sharing` leaves the first user of a page out, a process's `ksm_merging_pages` does not: a process's saving is
//!   its proportional part of the host's, so that all parts add up to the whole;
//! - `general_profit` and `ksm_process_profit` leave the kernel's records of merged pages and of address spaces out;
//! - `pages_volatile` has pages that smart scan passed over, new ones and changed ones in one number;
//! - `full_scans` begins again when the host is unmerged;
//! - a child begins with `ksm_merging_pages` 0 although it has its parent's merged pages: `ksm_bytes` shows them;
//! - zero pages are in no `pages_*` counter;
//! - a ksmd that stands still goes on counting pages of processes that have ended: their part is taken off;
//! - processes that share memory show the same numbers each: an address space is counted once.

mod group;
mod host;
mod lease;
mod meter;
mod process;
mod request;

use kernel::ksm_sysfs::KsmSysfs;
use serde::Serialize;

use host::Spaces;

use crate::error::KsmError;
use crate::state::StatePath;

pub use group::GroupStatus;
pub use host::{HostStatus, KsmdStatus, MM_SLOT_BYTES, RMAP_ITEM_BYTES, STABLE_NODE_BYTES, Setting};
pub use lease::{HolderStatus, LeaseStatus};
pub use meter::{Meter, Now, PassTime};
pub use process::{ProcessStatus, Skipped, VmaStatus};
pub use request::Request;

/// What was seen in one look. Not one instant: ksmd goes on meanwhile.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// The host's settings and counters.
    pub host: HostStatus,
    /// What ksmd does now; `None` in a first look without waiting.
    pub now: Option<Now>,
    /// Who holds the settings.
    pub lease: LeaseStatus,
    /// Each address space once, by its process.
    pub processes: Vec<ProcessStatus>,
    /// Sums over the cgroups that were asked for, or over those of all processes.
    pub cgroups: Vec<GroupStatus>,
    /// Named processes that could not be looked at.
    pub skipped: Vec<Skipped>,
    /// Processes that may not be read by this user; the registered among them are missing.
    pub unreadable: u64,
}

impl Status {
    /// Looks once. `meter` tells what happened since its last look.
    ///
    /// # Errors
    /// [`KsmError::Missing`], [`KsmError::NoSuchCgroup`], and those of reading KSM's files.
    pub fn look(
        sysfs: &KsmSysfs,
        path: &StatePath,
        request: &Request,
        meter: Option<&mut Meter>,
    ) -> Result<Self, KsmError> {
        if !sysfs.exists() {
            return Err(KsmError::Missing { path: sysfs.root().to_owned() });
        }
        let found = request.find()?;
        let mut host = HostStatus::look(sysfs)?;
        let now = meter.map(|meter| meter.look(sysfs, host.rmap_items)).transpose()?;
        let registered = process::registered();
        let unreadable = registered.unreadable;
        if unreadable == 0 {
            let (spaces, merging_pages) = (registered.spaces.len() as u64, registered.merging_pages);
            host.take_sums(Some(&Spaces { registered: spaces, merging_pages }));
        }
        let mut skipped = Vec::new();
        let mut processes = Vec::new();
        for space in &found.spaces(&registered.spaces) {
            match ProcessStatus::look(space, &host, request) {
                Ok(process) => processes.push(process),
                Err(left_out) if found.is_named(space[0]) => skipped.push(left_out),
                Err(_) => {}
            }
        }
        let cgroups = GroupStatus::sums(&found, &processes);
        Ok(Self { host, now, lease: LeaseStatus::look(path), processes, cgroups, skipped, unreadable })
    }
}
