//! Which pages there are to look at: present, private and anonymous, each physical page once where the kernel tells.
//!
//! Nothing is read here. Pages that are absent, swapped out, of files or the zero page never become work; pages that
//! several mappings share already (after a fork, by KSM) are counted and looked at once, as far as page frame numbers
//! can be seen (CAP_SYS_ADMIN).

use std::collections::HashSet;

use kernel::procfs::ProcError;
use kernel::{Category, Pagemap, PagemapEntry, PagemapError, Pid, Range, ScanRequest, Vaddr, VmaUse, smaps};
use page::{PageNumber, PageRange};
use store::mappings;

use crate::targets::Process;
use crate::vma::{VmaKind, ksm_refuses};

/// A mapping with anonymous pages.
#[derive(Clone, Debug)]
pub(crate) struct Mapping {
    /// Place of its process among the snapshot's.
    pub(crate) process: u32,
    pub(crate) range: Range,
    pub(crate) kind: VmaKind,
    pub(crate) name: String,
    pub(crate) permissions: [u8; 4],
    pub(crate) ksm_refuses: Option<&'static str>,
    pub(crate) store_refuses: Option<&'static str>,
    /// MADV_MERGEABLE or the prctl is in force.
    pub(crate) mergeable: bool,
}

/// Neighbouring pages with neighbouring numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// Number of its first page in the snapshot.
    pub(crate) first: u32,
    pub(crate) pages: u32,
    /// Its first page in the address space.
    pub(crate) start: PageNumber,
    /// Place of its mapping among the snapshot's.
    pub(crate) mapping: u32,
    /// Part of huge pages.
    pub(crate) huge: bool,
    /// Mapped by others too, and which page it is cannot be seen.
    pub(crate) shared: bool,
    /// Not to be read with process_vm_readv: it would wait for a userfaultfd, or give the process a KSM page of its
    /// own.
    pub(crate) gently: bool,
}

impl Span {
    pub(crate) fn range(&self) -> PageRange {
        PageRange::from_count(self.start, u64::from(self.pages))
    }
}

/// Pages that need no look, in pages.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Known {
    /// Further mappings of pages that a fork left shared.
    pub(crate) by_fork: u64,
    /// Further mappings of KSM pages.
    pub(crate) by_ksm: u64,
    /// Mappings of pages of a page store.
    pub(crate) by_partition: u64,
    /// Anonymous pages swapped out.
    pub(crate) swapped: u64,
    /// Shared memory and memory files that are mapped shared, hugetlb included: nobody merges those.
    pub(crate) shared_memory: u64,
}

impl Known {
    /// Further mappings of pages that are shared, for whatever reason.
    pub(crate) fn already_shared(&self) -> u64 {
        self.by_fork + self.by_ksm + self.by_partition
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.by_fork += other.by_fork;
        self.by_ksm += other.by_ksm;
        self.by_partition += other.by_partition;
        self.swapped += other.swapped;
        self.shared_memory += other.shared_memory;
    }
}

/// All that a snapshot will look at.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    pub(crate) mappings: Vec<Mapping>,
    pub(crate) spans: Vec<Span>,
    /// By process.
    pub(crate) known: Vec<Known>,
    /// Pages that have numbers.
    pub(crate) pages: u64,
    /// Only these are looked at, unless there are none.
    only: Vec<Range>,
    /// Page frames with several users that were met already.
    met: HashSet<u64>,
    regions: Vec<kernel::Region>,
    entries: Vec<PagemapEntry>,
}

/// Why a process could not be walked.
pub(crate) enum Lost {
    Gone,
    Denied,
    Failed(String),
}

impl From<ProcError> for Lost {
    fn from(error: ProcError) -> Self {
        match error {
            ProcError::Gone { .. } => Self::Gone,
            ProcError::Denied { .. } => Self::Denied,
            other => Self::Failed(other.to_string()),
        }
    }
}

impl From<PagemapError> for Lost {
    fn from(error: PagemapError) -> Self {
        if error.is_gone() { Self::Gone } else { Self::Failed(error.to_string()) }
    }
}

impl Walk {
    /// A walk of whole processes, or of some ranges of each.
    pub(crate) fn new(only: &[Range]) -> Self {
        Self { only: only.to_vec(), ..Self::default() }
    }

    /// Adds the pages of a process, which has `place` among the snapshot's. What was added before a failure stays out.
    pub(crate) fn add(&mut self, process: &Process, place: u32) -> Result<(), Lost> {
        let pid = Pid(process.pid);
        let (mappings, spans, pages) = (self.mappings.len(), self.spans.len(), self.pages);
        let result = Pagemap::open(pid).map_err(Lost::from).and_then(|pagemap| {
            let vmas = smaps::read(pid)?;
            self.known.resize_with(place as usize + 1, Known::default);
            for (at, vma) in vmas.iter().enumerate() {
                self.add_mapping(&pagemap, vma, at.checked_sub(1).map(|before| &vmas[before]), place)?;
            }
            Ok(())
        });
        if result.is_err() {
            self.mappings.truncate(mappings);
            self.spans.truncate(spans);
            self.pages = pages;
            self.known.truncate(place as usize);
        }
        result
    }

    fn add_mapping(
        &mut self,
        pagemap: &Pagemap,
        vma: &VmaUse,
        before: Option<&VmaUse>,
        place: u32,
    ) -> Result<(), Lost> {
        let parts = self.parts(vma.vma.range);
        if parts.is_empty() {
            return Ok(());
        }
        let memory = vma.memory;
        let known = self.known.last_mut().expect("the process has its place");
        if vma.vma.shared || vma.flags.hugetlb() {
            known.shared_memory += memory.rss.pages().get();
            return Ok(());
        }
        known.swapped += memory.swap.pages().get();
        if mappings::is_segment(&vma.vma) {
            // Mapped, whether touched since or not: not what is resident.
            let size = vma.vma.range.len();
            known.by_partition += size.saturating_sub(memory.anonymous).pages().get();
        }
        let (ksm, store) = (ksm_refuses(vma), mappings::refuses(vma));
        if memory.anonymous.get() == 0 || ksm.is_some() && store.is_some() {
            return Ok(());
        }
        let map = &vma.vma;
        let permission = |set, letter| if set { letter } else { b'-' };
        let mapping = Mapping {
            process: place,
            range: map.range,
            kind: VmaKind::of(vma, before),
            name: map.name.to_string_lossy().into_owned(),
            permissions: [permission(map.read, b'r'), permission(map.write, b'w'), permission(map.exec, b'x'), b'p'],
            ksm_refuses: ksm,
            store_refuses: store,
            mergeable: vma.flags.mergeable(),
        };
        let watched = vma.flags.uffd_missing() || vma.flags.uffd_wp() || vma.flags.uffd_minor();
        let by_ksm = memory.ksm.get() > 0;
        let gently = watched || by_ksm || !map.read;
        let large = vma.thp_eligible != Some(false) || memory.anon_huge_pages.get() > 0;
        let mut regions = std::mem::take(&mut self.regions);
        let number = u32::try_from(self.mappings.len()).expect("2^32 mappings would take more memory than there is");
        let some_shared = (memory.shared_clean + memory.shared_dirty).get() > 0 || by_ksm;
        self.mappings.push(mapping);
        let result = parts.into_iter().try_for_each(|part| {
            pagemap.scan_all(part, &ScanRequest::own_pages(), &mut regions)?;
            for region in &regions {
                let huge = region.categories.contains(Category::HUGE);
                let gently = gently || large && !huge;
                if some_shared {
                    self.add_by_entries(pagemap, region.range, number, huge, gently, by_ksm)?;
                } else {
                    self.add_span(region.range.start(), region.range.pages().get(), number, huge, false, gently);
                }
            }
            Ok(())
        });
        self.regions = regions;
        result
    }

    /// What of a mapping is looked at.
    fn parts(&self, range: Range) -> Vec<Range> {
        if self.only.is_empty() {
            return vec![range];
        }
        let parts = self.only.iter().filter_map(|only| range.intersect(only));
        parts.filter(|part| !part.is_empty()).collect()
    }

    /// Adds pages of which some have several users: each such page once, if it can be told.
    fn add_by_entries(
        &mut self,
        pagemap: &Pagemap,
        range: Range,
        mapping: u32,
        huge: bool,
        gently: bool,
        by_ksm: bool,
    ) -> Result<(), Lost> {
        let mut entries = std::mem::take(&mut self.entries);
        for piece in range.pieces(kernel::pagemap::SCAN_WINDOW) {
            let pages = piece.pages().get();
            entries.resize(usize::try_from(pages).expect("a window of pages"), PagemapEntry(0));
            let read = pagemap.entries(piece.start(), &mut entries)?;
            for (page, entry) in entries[..read].iter().enumerate() {
                if !entry.present() || entry.file_or_shared() {
                    continue;
                }
                let at = Vaddr(piece.start().get() + page as u64 * kernel::page_size());
                let shared = !entry.exclusive();
                if shared
                    && let Some(frame) = entry.pfn()
                    && !self.met.insert(frame)
                {
                    let known = self.known.last_mut().expect("the process has its place");
                    *(if by_ksm { &mut known.by_ksm } else { &mut known.by_fork }) += 1;
                    continue;
                }
                // A page whose frame is known is told apart from all others.
                self.add_span(at, 1, mapping, huge, shared && entry.pfn().is_none(), gently);
            }
        }
        self.entries = entries;
        Ok(())
    }

    fn add_span(&mut self, at: Vaddr, pages: u64, mapping: u32, huge: bool, shared: bool, gently: bool) {
        let start = PageNumber(at.page_index());
        // Beyond what numbers can name, see `Snapshot::take`.
        let first = u32::try_from(self.pages).unwrap_or(u32::MAX);
        self.pages += pages;
        if let Some(last) = self.spans.last_mut()
            && last.mapping == mapping
            && (last.huge, last.shared, last.gently) == (huge, shared, gently)
            && last.range().end == start
            && let Some(sum) = u32::try_from(pages).ok().and_then(|pages| last.pages.checked_add(pages))
        {
            last.pages = sum;
            return;
        }
        let pages = u32::try_from(pages).unwrap_or(u32::MAX);
        self.spans.push(Span { first, pages, start, mapping, huge, shared, gently });
    }

    /// What is needed for walking only.
    pub(crate) fn finish(&mut self) {
        self.met = HashSet::new();
        self.regions = Vec::new();
        self.entries = Vec::new();
    }
}
