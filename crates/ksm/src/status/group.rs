//! Sums over cgroups.

use std::collections::BTreeMap;

use serde::Serialize;

use super::process::ProcessStatus;
use super::request::Found;

/// What KSM does for the processes of one cgroup, those below it included where it was asked for by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GroupStatus {
    /// Its path, as it was given or from the hierarchy's root.
    pub cgroup: String,
    /// Address spaces.
    pub processes: u64,
    /// Those that ksmd scans.
    pub registered: u64,
    /// Page addresses that ksmd keeps a record of.
    pub ksm_rmap_items: u64,
    /// Mappings of zero pages that KSM placed.
    pub ksm_zero_pages: u64,
    /// Mappings of merged pages, the first of each too.
    pub ksm_merging_pages: u64,
    /// What is mapped of merged pages, inherited ones too; `None` where it was not asked for.
    pub ksm_bytes: Option<u64>,
    /// What the kernel's records take.
    pub bytes_bookkeeping: u64,
    /// The part of the host's saving, less the records.
    pub bytes_saved: i64,
}

impl GroupStatus {
    pub(crate) fn sums(found: &Found, processes: &[ProcessStatus]) -> Vec<Self> {
        if found.cgroups.is_empty() {
            let mut groups: BTreeMap<&str, Vec<&ProcessStatus>> = BTreeMap::new();
            for process in processes {
                groups.entry(&process.cgroup).or_default().push(process);
            }
            return groups.into_iter().map(|(path, members)| Self::sum(path, &members)).collect();
        }
        let named = found.cgroups.iter().map(|(path, members)| {
            let is_member = |process: &&ProcessStatus| process.pids().any(|pid| members.contains(&kernel::Pid(pid)));
            Self::sum(&path.to_string_lossy(), &processes.iter().filter(is_member).collect::<Vec<_>>())
        });
        named.collect()
    }

    fn sum(cgroup: &str, members: &[&ProcessStatus]) -> Self {
        let mut sum = Self { cgroup: cgroup.to_owned(), ..Self::default() };
        for member in members {
            sum.processes += 1;
            sum.registered += u64::from(member.registered);
            sum.ksm_rmap_items += member.ksm.ksm_rmap_items.unwrap_or(0);
            sum.ksm_zero_pages += member.ksm.ksm_zero_pages.unwrap_or(0);
            sum.ksm_merging_pages += member.ksm.ksm_merging_pages.unwrap_or(0);
            sum.bytes_bookkeeping += member.bytes_bookkeeping;
            sum.bytes_saved += member.bytes_saved;
            if let Some(bytes) = member.ksm_bytes {
                *sum.ksm_bytes.get_or_insert(0) += bytes;
            }
        }
        sum
    }
}
