//! /proc/PID/smaps and smaps_rollup: what each mapping, or the whole process, has in memory.
//!
//! Both walk all page tables, so they cost time in proportion to the process.

use std::fmt;

use crate::maps::{self, Vma};
use crate::procfs::{self, ProcError};
use crate::units::{Bytes, Pid, Vaddr};

/// The two-letter flags of a mapping (fs/proc/task_mmu.c, `show_smap_vma_flags`).
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub struct VmFlags {
    /// One bit for each pair of small letters.
    bits: [u64; 11],
}

impl VmFlags {
    fn place(code: [u8; 2]) -> Option<(usize, u64)> {
        let [first, second] = code;
        if !first.is_ascii_lowercase() || !second.is_ascii_lowercase() {
            return None;
        }
        let index = usize::from(first - b'a') * 26 + usize::from(second - b'a');
        Some((index / 64, 1 << (index % 64)))
    }

    /// Adds a flag by its two letters; others than small letters are dropped.
    pub fn insert(&mut self, code: [u8; 2]) {
        if let Some((word, bit)) = Self::place(code) {
            self.bits[word] |= bit;
        }
    }

    /// True if the mapping has the flag, e.g. `*b"dc"`.
    #[must_use]
    pub fn contains(&self, code: [u8; 2]) -> bool {
        Self::place(code).is_some_and(|(word, bit)| self.bits[word] & bit != 0)
    }

    /// The flags, by their letters.
    pub fn iter(&self) -> impl Iterator<Item = [u8; 2]> + '_ {
        (b'a'..=b'z')
            .flat_map(|first| (b'a'..=b'z').map(move |second| [first, second]))
            .filter(|code| self.contains(*code))
    }

    /// MADV_DONTFORK.
    #[must_use]
    pub fn dontfork(&self) -> bool {
        self.contains(*b"dc")
    }

    /// MADV_DONTDUMP.
    #[must_use]
    pub fn dontdump(&self) -> bool {
        self.contains(*b"dd")
    }

    /// MAP_NORESERVE.
    #[must_use]
    pub fn noreserve(&self) -> bool {
        self.contains(*b"nr")
    }

    /// Counted against the commit limit (VM_ACCOUNT).
    #[must_use]
    pub fn accountable(&self) -> bool {
        self.contains(*b"ac")
    }

    /// mlock.
    #[must_use]
    pub fn locked(&self) -> bool {
        self.contains(*b"lo")
    }

    /// MADV_HUGEPAGE.
    #[must_use]
    pub fn hugepage(&self) -> bool {
        self.contains(*b"hg")
    }

    /// MADV_NOHUGEPAGE.
    #[must_use]
    pub fn nohugepage(&self) -> bool {
        self.contains(*b"nh")
    }

    /// MADV_MERGEABLE, or the process-wide prctl.
    #[must_use]
    pub fn mergeable(&self) -> bool {
        self.contains(*b"mg")
    }

    /// Memory that KSM looks at once it is marked.
    #[must_use]
    pub fn ksm_compatible(&self) -> bool {
        self.ksm_refuses().is_none()
    }

    /// Why the kernel's KSM leaves memory alone whatever is advised (mm/ksm.c, `ksm_compatible`), `None` where it takes
    /// anonymous pages. The kernel takes a mark for other memory without complaint and leaves it unmarked.
    #[must_use]
    pub fn ksm_refuses(&self) -> Option<&'static str> {
        // Two more, SAO and ADI, are of other architectures and have no letters.
        match () {
            () if self.hugetlb() => Some("hugetlb"),
            () if self.contains(*b"sh") || self.contains(*b"ms") => Some("shared"),
            () if self.contains(*b"dp") => Some("droppable"),
            () if self.io() || self.pfnmap() || self.mixedmap() => Some("device"),
            () if self.contains(*b"de") => Some("special"),
            () => None,
        }
    }

    /// MADV_WIPEONFORK.
    #[must_use]
    pub fn wipeonfork(&self) -> bool {
        self.contains(*b"wf")
    }

    /// Memory of a device (VM_IO).
    #[must_use]
    pub fn io(&self) -> bool {
        self.contains(*b"io")
    }

    /// Page frames without pages (VM_PFNMAP).
    #[must_use]
    pub fn pfnmap(&self) -> bool {
        self.contains(*b"pf")
    }

    /// Page frames and pages mixed (VM_MIXEDMAP).
    #[must_use]
    pub fn mixedmap(&self) -> bool {
        self.contains(*b"mm")
    }

    /// hugetlb.
    #[must_use]
    pub fn hugetlb(&self) -> bool {
        self.contains(*b"ht")
    }

    /// A stack that grows.
    #[must_use]
    pub fn growsdown(&self) -> bool {
        self.contains(*b"gd")
    }

    /// mseal.
    #[must_use]
    pub fn sealed(&self) -> bool {
        self.contains(*b"sl")
    }

    /// A userfaultfd waits for missing pages.
    #[must_use]
    pub fn uffd_missing(&self) -> bool {
        self.contains(*b"um")
    }

    /// A userfaultfd tracks or traps writes.
    #[must_use]
    pub fn uffd_wp(&self) -> bool {
        self.contains(*b"uw")
    }

    /// A userfaultfd waits for pages of the page cache.
    #[must_use]
    pub fn uffd_minor(&self) -> bool {
        self.contains(*b"ui")
    }

    /// A shadow stack.
    #[must_use]
    pub fn shadow_stack(&self) -> bool {
        self.contains(*b"ss")
    }

    /// Memory tags are on (arm64).
    #[must_use]
    pub fn tagged(&self) -> bool {
        self.contains(*b"mt")
    }
}

impl fmt::Debug for VmFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words: Vec<_> =
            self.iter().map(|[first, second]| format!("{}{}", char::from(first), char::from(second))).collect();
        f.write_str(&words.join(" "))
    }
}

/// The numbers of a mapping or of a process, in bytes; 0 where the kernel does not show one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Pages that are there.
    pub rss: Bytes,
    /// The same, each divided by the number of its users.
    pub pss: Bytes,
    /// Pss of dirty pages.
    pub pss_dirty: Bytes,
    /// Pss of anonymous pages; only for a process.
    pub pss_anon: Bytes,
    /// Pss of file pages; only for a process.
    pub pss_file: Bytes,
    /// Pss of shared memory; only for a process.
    pub pss_shmem: Bytes,
    /// Pages with several users, clean.
    pub shared_clean: Bytes,
    /// Pages with several users, dirty.
    pub shared_dirty: Bytes,
    /// Pages with one user, clean.
    pub private_clean: Bytes,
    /// Pages with one user, dirty.
    pub private_dirty: Bytes,
    /// Anonymous pages.
    pub anonymous: Bytes,
    /// KSM pages, without its zero pages.
    pub ksm: Bytes,
    /// Pages given up by MADV_FREE and still there.
    pub lazy_free: Bytes,
    /// Transparent huge pages.
    pub anon_huge_pages: Bytes,
    /// Swapped out.
    pub swap: Bytes,
    /// The same, each divided by the number of its users.
    pub swap_pss: Bytes,
    /// Locked.
    pub locked: Bytes,
}

impl MemoryUse {
    /// Takes one `Key: value kB` line; false if it is another kind of line.
    fn take(&mut self, key: &[u8], value: &[u8]) -> bool {
        let place = match key {
            b"Rss" => &mut self.rss,
            b"Pss" => &mut self.pss,
            b"Pss_Dirty" => &mut self.pss_dirty,
            b"Pss_Anon" => &mut self.pss_anon,
            b"Pss_File" => &mut self.pss_file,
            b"Pss_Shmem" => &mut self.pss_shmem,
            b"Shared_Clean" => &mut self.shared_clean,
            b"Shared_Dirty" => &mut self.shared_dirty,
            b"Private_Clean" => &mut self.private_clean,
            b"Private_Dirty" => &mut self.private_dirty,
            b"Anonymous" => &mut self.anonymous,
            b"KSM" => &mut self.ksm,
            b"LazyFree" => &mut self.lazy_free,
            b"AnonHugePages" => &mut self.anon_huge_pages,
            b"Swap" => &mut self.swap,
            b"SwapPss" => &mut self.swap_pss,
            b"Locked" => &mut self.locked,
            _ => return false,
        };
        match procfs::kib(value) {
            Some(bytes) => *place = bytes,
            None => return false,
        }
        true
    }

    /// Pages with one user.
    #[must_use]
    pub fn private(&self) -> Bytes {
        self.private_clean + self.private_dirty
    }
}

/// One mapping with its numbers and flags.
#[derive(Clone, Debug, Default)]
pub struct VmaUse {
    /// The mapping.
    pub vma: Vma,
    /// What it has in memory.
    pub memory: MemoryUse,
    /// Its flags.
    pub flags: VmFlags,
    /// Its protection key (pkeys(7)), 0 for none; 0 too where the machine has no keys.
    pub protection_key: u32,
    /// False if no page of it can be part of a large folio, whatever the kernel's settings; `None` if the kernel does not
    /// say (before 5.0).
    pub thp_eligible: Option<bool>,
    /// It has a NUMA policy of its own. Not in smaps: only where [`crate::numa_maps::mark`] has looked.
    pub policy: bool,
}

/// All mappings of a process with their numbers and flags: in the order of their addresses, and none overlaps another.
/// Of one that has changed meanwhile, the numbers may be those of more than is left of its range.
///
/// # Errors
/// [`ProcError`].
pub fn read(pid: Pid) -> Result<Vec<VmaUse>, ProcError> {
    let mut buffer = Vec::new();
    procfs::read_into(pid, "smaps", &mut buffer)?;
    parse(&buffer).map_err(|line| ProcError::Parse { path: format!("/proc/{pid}/smaps"), line })
}

/// The whole file; the error is the line that is not understood.
fn parse(bytes: &[u8]) -> Result<Vec<VmaUse>, String> {
    let mut out: Vec<VmaUse> = Vec::new();
    for line in procfs::lines(bytes) {
        // A mapping's line begins with a small letter or digit, a field's with a capital.
        if !line[0].is_ascii_uppercase() {
            let vma = maps::parse_line(line).ok_or_else(|| procfs::text(line))?;
            out.push(VmaUse { vma, ..VmaUse::default() });
            continue;
        }
        let current = out.last_mut().ok_or_else(|| procfs::text(line))?;
        let Some((key, value)) = procfs::field(line) else { continue };
        if key == b"VmFlags" {
            for word in procfs::words(value) {
                if let Ok(code) = word.try_into() {
                    current.flags.insert(code);
                }
            }
        } else if key == b"ProtectionKey" {
            let key = procfs::decimal(value).and_then(|key| key.try_into().ok());
            current.protection_key = key.ok_or_else(|| procfs::text(line))?;
        } else if key == b"THPeligible" {
            current.thp_eligible = procfs::decimal(value).map(|eligible| eligible != 0);
        } else {
            current.memory.take(key, value);
        }
    }
    let mut behind = Vaddr(0);
    out.retain_mut(|entry| {
        let stays = entry.vma.keep_behind(behind);
        behind = behind.max(entry.vma.range.end());
        stays
    });
    Ok(out)
}

/// The numbers of a whole process, cheaper than [`read`].
///
/// # Errors
/// [`ProcError`].
pub fn rollup(pid: Pid) -> Result<MemoryUse, ProcError> {
    let mut buffer = Vec::new();
    procfs::read_into(pid, "smaps_rollup", &mut buffer)?;
    let mut memory = MemoryUse::default();
    for line in procfs::lines(&buffer).skip(1) {
        if let Some((key, value)) = procfs::field(line) {
            memory.take(key, value);
        }
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::test_memory::Anonymous;
    use crate::units::PageCount;
    use rustix::mm::{Advice, MapFlags};

    #[test]
    fn flags_and_numbers_of_a_mapping_of_our_own() {
        let memory = Anonymous::with_flags(PageCount(64), MapFlags::NORESERVE);
        memory.fill(7);
        for advice in [Advice::LinuxDontFork, Advice::LinuxDontDump, Advice::LinuxNoHugepage] {
            memory.advise(advice);
        }
        let all = read(Pid::this()).unwrap();
        let ours = all.iter().find(|entry| entry.vma.range.contains(memory.range().start())).unwrap();
        assert_eq!(ours.vma.range, memory.range(), "advised apart from its neighbours");
        assert!(ours.flags.dontfork() && ours.flags.dontdump() && ours.flags.noreserve() && ours.flags.nohugepage());
        assert!(!ours.flags.locked() && !ours.flags.mergeable() && !ours.flags.wipeonfork());
        assert_eq!(ours.memory.anonymous, PageCount(64).bytes());
        assert_eq!(ours.memory.pss, PageCount(64).bytes());
        let sum: Bytes = all.iter().map(|entry| entry.memory.anonymous).sum();
        let total = rollup(Pid::this()).unwrap();
        // Other tests allocate meanwhile, so the two looks cannot be equal to the byte.
        assert!(total.anonymous.0.abs_diff(sum.0) < 64 << 20 && total.pss_anon > Bytes(0));
    }

    #[test]
    fn a_mapping_that_grew_between_two_pieces_of_the_file_is_there_once() {
        let file = b"1000-3000 rw-p 00000000 00:00 0 \nPss: 8 kB\n1000-4000 rw-p 00000000 00:00 0 \nPss: 12 kB\n\
            2000-4000 r--p 00000000 00:00 0 \nPss: 8 kB\n5000-6000 rw-p 00000000 00:00 0 \nPss: 4 kB\n";
        let all = parse(file).unwrap();
        let seen: Vec<_> =
            all.iter().map(|entry| (entry.vma.range.to_string(), entry.memory.pss.get() >> 10)).collect();
        let known = [("1000-3000", 8), ("3000-4000", 12), ("5000-6000", 4)];
        assert_eq!(seen, known.map(|(range, kib)| (range.to_owned(), kib)));
    }

    #[test]
    fn unknown_lines_are_passed_over_and_broken_ones_reported() {
        let file = b"1000-2000 rw-p 00000000 00:00 0 \nNewThing: 5 kB\nPss: 4 kB\nVmFlags: rd wr xx 7q\n";
        let all = parse(file).unwrap();
        assert_eq!(all[0].memory.pss, Bytes(4096));
        assert!(all[0].flags.contains(*b"xx") && !all[0].flags.contains(*b"7q"));
        assert_eq!(parse(b"Pss: 4 kB\n").unwrap_err(), "Pss: 4 kB");
        assert_eq!(all[0].protection_key, 0);
        let file = b"1000-2000 rw-p 00000000 00:00 0 \nProtectionKey:        15\n";
        assert_eq!(parse(file).unwrap()[0].protection_key, 15);
        // Not taken for none: what is under a key must be left alone.
        assert!(parse(b"1000-2000 rw-p 00000000 00:00 0 \nProtectionKey: many\n").is_err());
        assert!(parse(b"1000-2000 zz\n").is_err());
    }
}
