//! Whom a look is about.

use std::collections::BTreeSet;
use std::path::PathBuf;

use kernel::{Pid, membership, status, task};

use crate::error::KsmError;

/// What to look at. The host is always looked at; without a name, the processes are those that ksmd scans.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// Processes by number.
    pub pids: Vec<Pid>,
    /// Cgroups with those below: a directory, or its path below /sys/fs/cgroup.
    pub cgroups: Vec<PathBuf>,
    /// All processes, also those that ksmd does not scan.
    pub all: bool,
    /// Their mappings one by one, as far as they are mergeable or have merged pages. Walks all page tables.
    pub vmas: bool,
}

/// The processes that a request names.
pub(crate) struct Found {
    /// Named by number.
    pids: BTreeSet<Pid>,
    /// Of cgroups, each with its members.
    pub(crate) cgroups: Vec<(PathBuf, BTreeSet<Pid>)>,
    all: Option<Vec<Pid>>,
}

impl Request {
    /// True if only processes that were named are looked at: their page tables may be walked too.
    pub(crate) fn is_narrow(&self) -> bool {
        !self.all && (!self.pids.is_empty() || !self.cgroups.is_empty())
    }

    pub(crate) fn find(&self) -> Result<Found, KsmError> {
        let mut cgroups = Vec::new();
        for path in &self.cgroups {
            let members =
                membership::members_of(path).map_err(|source| KsmError::NoSuchCgroup { path: path.clone(), source })?;
            cgroups.push((path.clone(), members.into_iter().collect()));
        }
        let all = self.all.then(|| status::processes().unwrap_or_default());
        Ok(Found { pids: self.pids.iter().copied().collect(), cgroups, all })
    }
}

impl Found {
    pub(crate) fn is_named(&self, pid: Pid) -> bool {
        self.pids.contains(&pid)
    }

    /// The processes to look at, those of one address space together. `registered`: whom ksmd scans, in that form.
    pub(crate) fn spaces(&self, registered: &[Vec<Pid>]) -> Vec<Vec<Pid>> {
        let mut pids: Vec<Pid> =
            self.pids.iter().chain(self.cgroups.iter().flat_map(|(_, pids)| pids)).copied().collect();
        if let Some(all) = &self.all {
            pids.extend(all);
        } else if pids.is_empty() && self.cgroups.is_empty() {
            return registered.to_vec();
        }
        pids.sort_unstable();
        pids.dedup();
        // Who was named gives the space its number.
        pids.sort_by_key(|pid| !self.is_named(*pid));
        task::by_address_space(&pids)
    }
}
