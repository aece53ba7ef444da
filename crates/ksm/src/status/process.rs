//! One process, or several that share an address space.

use std::collections::BTreeMap;

use kernel::ksm_sysfs::{KsmStat, ksm_stat};
use kernel::{Pid, ProcError, membership, smaps, status, task};
use serde::{Serialize, Serializer};

use super::host::{HostStatus, MM_SLOT_BYTES, RMAP_ITEM_BYTES};
use super::request::Request;

/// What KSM does for one address space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProcessStatus {
    /// A process that has it.
    pub pid: i32,
    /// Command name.
    pub comm: String,
    /// Its cgroup.
    pub cgroup: String,
    /// Other processes with the same memory: counted here once.
    pub shares_memory_with: Vec<i32>,
    /// ksmd scans it. Before 6.16 the kernel does not say; then: ksmd has records of it.
    pub registered: bool,
    /// What the kernel says (`ksm_stat`), by its names.
    #[serde(flatten)]
    pub ksm: KsmStat,
    /// What is mapped of merged pages, those that came with a fork too (`KSM` of smaps). `None` if it was not asked for
    /// by name, as all page tables are walked for it, or if the kernel does not say (before 6.7).
    pub ksm_bytes: Option<u64>,
    /// What the kernel's records of its pages and of the address space take.
    pub bytes_bookkeeping: u64,
    /// Its part of what the host saves, less these records. Unlike `ksm_process_profit`, which counts the one copy that
    /// stays for each of its users, the parts of all processes add up to what there is.
    pub bytes_saved: i64,
    /// Its mappings that are mergeable or have merged pages, if they were asked for.
    pub vmas: Option<Vec<VmaStatus>>,
}

/// One mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VmaStatus {
    /// First address.
    #[serde(serialize_with = "hexadecimal")]
    pub start: u64,
    /// The address behind the last.
    #[serde(serialize_with = "hexadecimal")]
    pub end: u64,
    /// Its file, or a name in brackets, or nothing.
    pub name: String,
    /// ksmd may merge it (`mg`).
    pub mergeable: bool,
    /// Bytes that are there.
    pub rss: u64,
    /// Bytes of these that are not of a file: what can be merged.
    pub anonymous: u64,
    /// Bytes of these that are merged, without zero pages.
    pub ksm: u64,
}

/// A process that could not be looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Skipped {
    /// Its number.
    pub pid: i32,
    /// Why, in a few words.
    pub reason: String,
    /// It is this user's rights that are missing.
    pub denied: bool,
}

fn hexadecimal<S: Serializer>(address: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{address:#x}"))
}

/// True if ksmd scans a process.
fn is_registered(stat: &KsmStat) -> bool {
    let word = stat.ksm_merge_any == Some(true) || stat.ksm_mergeable == Some(true);
    // Records outlive the marks by a pass at most; before 6.16 they are all there is.
    word || stat.ksm_rmap_items.is_some_and(|items| items > 0)
}

/// What ksmd scans.
pub(crate) struct Registered {
    /// The processes, those of one address space together.
    pub(crate) spaces: Vec<Vec<Pid>>,
    /// Their mappings of merged pages, each address space once.
    pub(crate) merging_pages: u64,
    /// Processes that could not be asked.
    pub(crate) unreadable: u64,
}

/// Asks all processes.
pub(crate) fn registered() -> Registered {
    let mut unreadable = 0;
    let mut merging = BTreeMap::new();
    for pid in status::processes().unwrap_or_default() {
        match ksm_stat(pid) {
            Ok(stat) if is_registered(&stat) => {
                merging.insert(pid, stat.ksm_merging_pages.unwrap_or(0));
            }
            Err(ProcError::Denied { .. }) => unreadable += 1,
            _ => {}
        }
    }
    let spaces = task::by_address_space(&merging.keys().copied().collect::<Vec<_>>());
    let merging_pages = spaces.iter().map(|space| merging[&space[0]]).sum();
    Registered { spaces, merging_pages, unreadable }
}

impl ProcessStatus {
    /// Looks at the process that comes first of those that share the memory.
    pub(crate) fn look(space: &[Pid], host: &HostStatus, request: &Request) -> Result<Self, Skipped> {
        let pid = space[0];
        let left_out = |reason: &str| Skipped { pid: pid.get(), reason: reason.to_owned(), denied: false };
        let sorted = |error: ProcError| match error {
            ProcError::Gone { .. } => left_out("no such process"),
            ProcError::Denied { .. } => Skipped {
                denied: true,
                ..left_out("not permitted (another user's: CAP_SYS_PTRACE, CAP_DAC_READ_SEARCH)")
            },
            other => left_out(&other.to_string()),
        };
        let about = status::read(pid).map_err(sorted)?;
        if about.tgid != pid.get() {
            return Err(left_out(&format!("a thread of process {}", about.tgid)));
        }
        if about.state == b'Z' || about.state == b'X' {
            return Err(left_out("has ended and waits for its parent"));
        }
        if about.vm_size.get() == 0 {
            return Err(left_out("a thread of the kernel"));
        }
        let ksm = ksm_stat(pid).map_err(|error| match error {
            ProcError::Gone { .. } => left_out("has ended, or the kernel has no ksm_stat (before 6.1)"),
            other => sorted(other),
        })?;
        let vmas = request.vmas.then(|| vmas(pid)).transpose().map_err(sorted)?;
        let ksm_bytes = match &vmas {
            Some((_, sum)) => Some(*sum),
            // One that has just ended, or is not ours to walk, has its other numbers.
            None if request.is_narrow() => smaps::rollup(pid).ok().map(|memory| memory.ksm.get()),
            None => None,
        };
        let registered = is_registered(&ksm);
        let bytes_bookkeeping =
            ksm.ksm_rmap_items.unwrap_or(0) * RMAP_ITEM_BYTES + if registered { MM_SLOT_BYTES } else { 0 };
        let merging = ksm.ksm_merging_pages.unwrap_or(0) as f64 * host.part_saved();
        let gross = (merging + ksm.ksm_zero_pages.unwrap_or(0) as f64) * host.page_size as f64;
        Ok(Self {
            pid: pid.get(),
            comm: about.name.to_string_lossy().into_owned(),
            cgroup: membership::cgroup(pid).unwrap_or_else(|_| "/".to_owned()),
            shares_memory_with: space[1..].iter().map(|pid| pid.get()).collect(),
            registered,
            ksm,
            ksm_bytes,
            bytes_bookkeeping,
            bytes_saved: gross as i64 - i64::try_from(bytes_bookkeeping).unwrap_or(i64::MAX),
            vmas: vmas.map(|(vmas, _)| vmas),
        })
    }

    /// All processes that have this address space.
    pub fn pids(&self) -> impl Iterator<Item = i32> + '_ {
        std::iter::once(self.pid).chain(self.shares_memory_with.iter().copied())
    }

    /// Merged pages that came with a fork, in bytes: ksmd counts them in the parent only, until it has visited them here.
    #[must_use]
    pub fn inherited_bytes(&self, page_size: u64) -> u64 {
        let counted = self.ksm.ksm_merging_pages.unwrap_or(0) * page_size;
        self.ksm_bytes.map_or(0, |mapped| mapped.saturating_sub(counted))
    }
}

/// The mappings that matter, and the bytes of all merged pages.
fn vmas(pid: Pid) -> Result<(Vec<VmaStatus>, u64), ProcError> {
    let mut kept = Vec::new();
    let mut sum = 0;
    for found in smaps::read(pid)? {
        sum += found.memory.ksm.get();
        if !found.flags.mergeable() && found.memory.ksm.get() == 0 {
            continue;
        }
        kept.push(VmaStatus {
            start: found.vma.range.start().0,
            end: found.vma.range.end().0,
            name: found.vma.name.to_string_lossy().into_owned(),
            mergeable: found.flags.mergeable(),
            rss: found.memory.rss.get(),
            anonymous: found.memory.anonymous.get(),
            ksm: found.memory.ksm.get(),
        });
    }
    Ok((kept, sum))
}
