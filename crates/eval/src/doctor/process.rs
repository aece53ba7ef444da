//! What there is to know about one process.

use std::path::PathBuf;
use std::time::Duration;

use kernel::cgroup_memory::MemoryLimit;
use kernel::descriptors::Holding;
use kernel::ksm_sysfs::ksm_stat;
use kernel::{Bytes, KsmStat, Pid, ProcError, Status, VmaUse, cgroup_memory, descriptors, program, smaps, status};

use super::marked::{ProgramLayout, is_marked};
use store::mappings::is_segment;

/// What a look at a process found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Observed {
    /// It could be looked at.
    Facts(Box<ProcessFacts>),
    /// It has ended, or never was.
    Gone {
        /// The number that was asked for.
        pid: Pid,
    },
    /// It has ended and waits for its parent.
    Zombie {
        /// The process.
        pid: Pid,
        /// Its parent.
        parent: Pid,
    },
    /// A thread of the kernel.
    KernelThread {
        /// The thread.
        pid: Pid,
        /// Its name.
        name: String,
    },
    /// This user may not look at it.
    NotPermitted {
        /// The process.
        pid: Pid,
        /// The user that it belongs to.
        uid: u32,
        /// The file in its directory under /proc that could not be read.
        file: &'static str,
    },
}

/// The memory of a process, by what KSM can do with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryKinds {
    /// Anonymous pages of mergeable mappings: what ksmd looks at.
    pub marked: Bytes,
    /// Mergeable mappings.
    pub marked_mappings: u64,
    /// Anonymous pages of mappings that could be mergeable and are not, the stack left out.
    pub unmarked: Bytes,
    /// Transparent huge pages of mergeable mappings.
    pub marked_huge: Bytes,
    /// Mergeable memory that is swapped out.
    pub marked_swapped: Bytes,
    /// Shared memory that is there: anonymous, of System V, and files in /dev/shm.
    pub shared: Bytes,
    /// Shared mappings of memory files.
    pub shared_memfd: Bytes,
    /// Mappings of huge pages of a pool, their whole size.
    pub hugetlb: Bytes,
    /// The stack of the first thread.
    pub stack: Bytes,
    /// It is mergeable.
    pub stack_marked: bool,
    /// Mappings of a page store, their whole size.
    pub stored: Bytes,
}

/// All that is known about a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessFacts {
    /// The process.
    pub pid: Pid,
    /// Its status.
    pub status: Status,
    /// What KSM has done for it; `None` where the kernel does not say.
    pub stat: Option<KsmStat>,
    /// Its memory.
    pub memory: MemoryKinds,
    /// Descriptors through which pages may be held.
    pub holding: Holding,
    /// How long it has been there.
    pub age: Duration,
    /// A 32-bit program.
    pub is_32_bit: bool,
    /// What it runs and where that lies.
    pub layout: ProgramLayout,
    /// The limit of memory that it is nearest to.
    pub limit: Option<MemoryLimit>,
    /// Its parent has mergeable memory; `None` if that cannot be told.
    pub parent_marked: Option<bool>,
}

impl ProcessFacts {
    /// True if any of its memory is mergeable, or all that may come.
    #[must_use]
    pub fn is_marked(&self) -> bool {
        self.memory.marked_mappings > 0 || self.merge_any()
    }

    /// The process-wide switch is on.
    #[must_use]
    pub fn merge_any(&self) -> bool {
        self.stat.is_some_and(|stat| stat.ksm_merge_any == Some(true))
    }

    /// Pages that KSM has merged or replaced by the zero page.
    #[must_use]
    pub fn merged(&self) -> u64 {
        self.stat.map_or(0, |stat| stat.ksm_merging_pages.unwrap_or(0) + stat.ksm_zero_pages.unwrap_or(0))
    }

    /// Pages that ksmd keeps a record of.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.stat.and_then(|stat| stat.ksm_rmap_items).unwrap_or(0)
    }
}

impl Observed {
    /// Looks at a process; of a thread, at its process. Changes nothing. Walks its page tables.
    ///
    /// # Errors
    /// [`ProcError::Read`], [`ProcError::Parse`]; that it is gone or may not be looked at is no error.
    pub fn observe(pid: Pid) -> Result<Self, ProcError> {
        let status = match status::read(pid) {
            Ok(status) => status,
            Err(error) if error.is_gone() => return Ok(Self::Gone { pid }),
            Err(error) => return Err(error),
        };
        let pid = Pid(status.tgid);
        let uid = status.uid.real;
        if matches!(status.state, b'Z' | b'X') {
            return Ok(Self::Zombie { pid, parent: Pid(status.ppid) });
        }
        if status.vm_size == Bytes(0) {
            return Ok(Self::KernelThread { pid, name: status.name.to_string_lossy().into_owned() });
        }
        match facts(pid, status) {
            Ok(facts) => Ok(Self::Facts(Box::new(facts))),
            Err(ProcError::Gone { .. }) => Ok(Self::Gone { pid }),
            Err(ProcError::Denied { file, .. }) => Ok(Self::NotPermitted { pid, uid, file }),
            Err(error) => Err(error),
        }
    }

    /// What is known about it, `None` if it could not be looked at.
    #[must_use]
    pub fn facts(&self) -> Option<&ProcessFacts> {
        match self {
            Self::Facts(facts) => Some(facts),
            _ => None,
        }
    }
}

fn facts(pid: Pid, status: Status) -> Result<ProcessFacts, ProcError> {
    let vmas = smaps::read(pid)?;
    let stat = match ksm_stat(pid) {
        Ok(stat) => Some(stat),
        // A kernel without that file, unless the process has ended: then what follows finds that.
        Err(error) if error.is_gone() => None,
        Err(error) => return Err(error),
    };
    let (path, is_64_bit) = match program::program(pid) {
        Ok(found) => (found.path, found.is_64_bit),
        Err(error) if error.is_gone() => (PathBuf::new(), None),
        Err(error) => return Err(error),
    };
    let parent = (status.ppid > 0).then_some(Pid(status.ppid));
    Ok(ProcessFacts {
        pid,
        stat,
        memory: kinds(&vmas),
        holding: descriptors::holding(pid)?,
        age: kernel::age::age(pid)?,
        is_32_bit: is_64_bit == Some(false),
        layout: ProgramLayout::of(path, vmas.into_iter().map(|entry| entry.vma)),
        limit: cgroup_memory::nearest_limit(pid)?,
        parent_marked: parent.and_then(|parent| ksm_stat(parent).ok()).map(|stat| is_marked(&stat)),
        status,
    })
}

fn kinds(vmas: &[VmaUse]) -> MemoryKinds {
    let mut kinds = MemoryKinds::default();
    for entry in vmas {
        let VmaUse { vma, memory, flags, .. } = entry;
        let name = vma.name.to_string_lossy();
        if is_segment(vma) {
            kinds.stored += vma.range.len();
        }
        if flags.hugetlb() {
            kinds.hugetlb += vma.range.len();
        } else if vma.shared {
            if name.starts_with("/memfd:") {
                kinds.shared_memfd += memory.rss;
            } else if ["/dev/zero (deleted)", "/SYSV", "/dev/shm/"].iter().any(|start| name.starts_with(start)) {
                kinds.shared += memory.rss;
            }
        } else if name == "[stack]" {
            kinds.stack = memory.anonymous;
            kinds.stack_marked = flags.mergeable();
        } else if !flags.mergeable() && could_be_mergeable(entry) {
            kinds.unmarked += memory.anonymous;
        }
        if flags.mergeable() {
            kinds.marked += memory.anonymous;
            kinds.marked_mappings += 1;
            kinds.marked_huge += memory.anon_huge_pages;
            kinds.marked_swapped += memory.swap;
        }
    }
    kinds
}

/// What KSM takes of private mappings (mm/ksm.c, `vma_ksm_compatible`): all but those of devices, those that must not
/// grow and those that the kernel may drop.
fn could_be_mergeable(entry: &VmaUse) -> bool {
    let flags = &entry.flags;
    !flags.io() && !flags.pfnmap() && !flags.mixedmap() && !flags.contains(*b"de") && !flags.contains(*b"dp")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use kernel::{MemoryUse, VmFlags, Vma};

    fn entry(name: &str, shared: bool, flags: &[[u8; 2]], anonymous: u64) -> VmaUse {
        let mut words = VmFlags::default();
        flags.iter().for_each(|flag| words.insert(*flag));
        let bytes = Bytes(anonymous);
        let memory = MemoryUse {
            anonymous: bytes,
            rss: bytes,
            swap: Bytes(1),
            anon_huge_pages: Bytes(2),
            ..MemoryUse::default()
        };
        VmaUse { vma: Vma { name: name.into(), shared, ..Vma::default() }, memory, flags: words, ..VmaUse::default() }
    }

    #[test]
    fn each_mapping_is_of_one_kind() {
        let kinds = kinds(&[
            entry("", false, &[*b"mg"], 100),
            entry("[stack]", false, &[], 20),
            entry("/lib", false, &[], 3),
            entry("", false, &[*b"dp"], 1000),
            entry("/memfd:ram (deleted)", true, &[], 7),
            entry("/memfd:ram (deleted)", false, &[*b"mg"], 200),
            entry("/dev/zero (deleted)", true, &[], 8),
            entry("/data", true, &[], 9),
        ]);
        let expected = MemoryKinds {
            marked: Bytes(300),
            marked_mappings: 2,
            unmarked: Bytes(3),
            marked_huge: Bytes(4),
            marked_swapped: Bytes(2),
            shared: Bytes(8),
            shared_memfd: Bytes(7),
            stack: Bytes(20),
            ..MemoryKinds::default()
        };
        assert_eq!(kinds, expected);
    }

    #[test]
    fn processes_that_cannot_be_looked_at_are_outcomes() {
        assert_eq!(Observed::observe(Pid(i32::MAX)).unwrap(), Observed::Gone { pid: Pid(i32::MAX) });
        let own = Observed::observe(Pid::this()).unwrap();
        let own = own.facts().unwrap();
        assert!(own.layout.program_start.get() > 0 && own.layout.library_start.get() > 0, "{:?}", own.layout);
        assert!(!own.is_32_bit && own.memory.stack > Bytes(0));
    }
}
