//! Which pages a request is about: present, private and anonymous, in mappings that KSM takes.
//!
//! Pages have numbers, counted through all processes of the request, so that what is kept of each stays small.
use std::collections::{BTreeMap, HashMap, HashSet};

use kernel::procfs::ProcError;
use kernel::{
    Category, FrameFlags, FrameFlagsFile, MemoryFile, Pagemap, PagemapEntry, PagemapError, Pid, Range, Region,
    ScanRequest, Vaddr, VmaUse, page_size, smaps,
};

use super::report::Left;
use crate::proc_stat::ProcessId;

/// A process of a request. Both files stay with the address space they were opened on: after an exec, or when the number
/// has become another process's, they show nothing instead of something else.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) process: ProcessId,
    pub(crate) pagemap: Pagemap,
    pub(crate) memory: MemoryFile,
}

impl Target {
    pub(crate) fn open(process: ProcessId) -> Result<Self, Left> {
        let pid = Pid(process.pid);
        let pagemap = Pagemap::open(pid).map_err(|error| match error {
            PagemapError::Gone { .. } => Left::Gone,
            _ => Left::NotPermitted,
        })?;
        let memory = MemoryFile::open(pid)?;
        // Opened by number: if that is still the process that was meant, so are the files.
        if process.is_alive() { Ok(Self { process, pagemap, memory }) } else { Err(Left::Gone) }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid(self.process.pid)
    }

    /// Whether the address space is still that of the process: it has neither ended nor executed something else.
    pub(crate) fn is_there(&self) -> bool {
        let mut word = [PagemapEntry(0)];
        self.process.is_alive() && matches!(self.pagemap.entries(Vaddr(0), &mut word), Ok(1))
    }
}

impl From<ProcError> for Left {
    fn from(error: ProcError) -> Self {
        match error {
            ProcError::Gone { .. } => Self::Gone,
            ProcError::Denied { .. } => Self::NotPermitted,
            other => Self::Failed(other.to_string()),
        }
    }
}

/// Neighbouring pages with neighbouring numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    /// Number of the first.
    pub(crate) first: u32,
    pub(crate) pages: u32,
    pub(crate) start: Vaddr,
    /// Place of the process among the request's.
    pub(crate) target: u32,
    /// Mapped as a huge page.
    pub(crate) huge: bool,
    /// Merged by KSM already: a partner for others, nothing to do itself.
    pub(crate) merged: bool,
}

impl Span {
    pub(crate) fn range(&self) -> Range {
        Range::from_pages(self.start, kernel::PageCount(self.pages.into())).expect("spans lie in mappings")
    }
}

/// A part of a mapping that may be marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Area {
    pub(crate) target: u32,
    pub(crate) range: Range,
    /// The mapping it lies in: a run that ends where that does splits nothing.
    pub(crate) mapping: Range,
    /// Mergeable already.
    pub(crate) marked: bool,
}

/// The pages of all processes of a request.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    pub(crate) spans: Vec<Span>,
    pub(crate) areas: Vec<Area>,
    pub(crate) pages: u32,
    /// Mappings of pages that KSM had merged before.
    pub(crate) merged_before: u64,
    /// Anonymous pages in mappings that were left out, and what else there is in ranges that were named, by reason.
    pub(crate) refused: BTreeMap<&'static str, u64>,
    /// Frames of pages that a fork left with several users, by number of the page. Only where frames can be seen.
    pub(crate) frames: HashMap<u32, u64>,
    /// Frames of KSM pages that were met.
    pub(crate) merged_frames: HashSet<u64>,
}

/// Which pages of a range are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// All, which are parts of huge pages or not.
    All { huge: bool },
    /// Those that KSM shares.
    Merged,
}

/// There are more pages than numbers.
const TOO_MUCH: &str = "more than 16 TiB in one request";

impl Walk {
    /// Adds the pages of a process, in all of its mappings or in `ranges`. Nothing is added with an error.
    pub(crate) fn add(
        &mut self,
        target: &Target,
        place: u32,
        ranges: &[Range],
        mut flags: Option<&mut FrameFlagsFile>,
    ) -> Result<(), Left> {
        let vmas = smaps::read(target.pid())?;
        if vmas.iter().any(|vma| store::mappings::is_segment(&vma.vma)) {
            return Err(Left::Store);
        }
        self.count_the_rest(target, &vmas, ranges)?;
        let mut add = |vma: &VmaUse| {
            let whole = [vma.vma.range];
            let parts = if ranges.is_empty() { &whole[..] } else { ranges };
            let parts = parts.iter().filter_map(|part| part.intersect(&vma.vma.range));
            for part in parts {
                self.add_part(target, place, vma, part, flags.as_deref_mut())?;
            }
            Ok(())
        };
        let added = vmas.iter().try_for_each(&mut add);
        if added.is_err() {
            self.forget(place);
        }
        added
    }

    /// Counts what was asked for by its address and cannot be merged: addresses without a mapping, and pages of files and
    /// of shared memory.
    fn count_the_rest(&mut self, target: &Target, vmas: &[VmaUse], ranges: &[Range]) -> Result<(), Left> {
        let request =
            ScanRequest { mask: Category::PRESENT | Category::FILE, ret: Category::FILE, ..ScanRequest::default() };
        let mut regions = Vec::new();
        for range in ranges {
            let mut unmapped = range.pages().get();
            for (vma, part) in vmas.iter().filter_map(|vma| Some((vma, range.intersect(&vma.vma.range)?))) {
                // No two mappings of a list overlap.
                unmapped -= part.pages().get();
                match target.pagemap.scan_all(part, &request, &mut regions) {
                    Err(error) if error.is_gone() => return Err(Left::Gone),
                    // A place of the kernel's own, as vsyscall, has no pages to tell of.
                    _ => {}
                }
                let found = regions.iter().map(|region| region.range.pages().get()).sum();
                self.leave_out(vma.flags.ksm_refuses().unwrap_or("file"), found);
            }
            self.leave_out("unmapped", unmapped);
        }
        Ok(())
    }

    fn leave_out(&mut self, reason: &'static str, pages: u64) {
        if pages > 0 {
            *self.refused.entry(reason).or_default() += pages;
        }
    }

    /// Adds one mapping of each page of a process that KSM shares. Nothing is added with an error.
    pub(crate) fn add_merged(&mut self, target: &Target, place: u32, flags: &mut FrameFlagsFile) -> Result<(), Left> {
        let add = |vma: &VmaUse| {
            let mut regions: Vec<Region> = Vec::new();
            target.pagemap.scan_all(vma.vma.range, &ScanRequest::own_pages(), &mut regions).map_err(lost)?;
            let mut merged = regions.iter().filter(|region| !region.categories.contains(Category::HUGE));
            merged.try_for_each(|region| self.add_shared(target, place, region.range, Wanted::Merged, Some(flags)))
        };
        let vmas = smaps::read(target.pid())?;
        let added = vmas.iter().filter(|vma| vma.memory.ksm.get() > 0).try_for_each(add);
        if added.is_err() {
            self.forget(place);
        }
        added
    }

    /// Takes back what was added last, of the process at `place`.
    fn forget(&mut self, place: u32) {
        self.spans.retain(|span| span.target != place);
        self.areas.retain(|area| area.target != place);
        self.pages = self.spans.last().map_or(0, |span| span.first + span.pages);
        self.frames.retain(|page, _| *page < self.pages);
    }

    fn add_part(
        &mut self,
        target: &Target,
        place: u32,
        vma: &VmaUse,
        part: Range,
        flags: Option<&mut FrameFlagsFile>,
    ) -> Result<(), Left> {
        let anonymous = vma.memory.anonymous.pages().get();
        if anonymous == 0 {
            return Ok(());
        }
        if let Some(reason) = refuses(vma) {
            self.leave_out(reason, anonymous.min(part.pages().get()));
            return Ok(());
        }
        let map = &vma.vma;
        self.areas.push(Area { target: place, range: part, mapping: map.range, marked: vma.flags.mergeable() });
        let by_ksm = vma.memory.ksm.get() > 0;
        let shared = by_ksm || (vma.memory.shared_clean + vma.memory.shared_dirty).get() > 0;
        let mut regions: Vec<Region> = Vec::new();
        target.pagemap.scan_all(part, &ScanRequest::own_pages(), &mut regions).map_err(lost)?;
        let mut flags = flags.filter(|_| by_ksm);
        for region in regions {
            let huge = region.categories.contains(Category::HUGE);
            if shared {
                self.add_shared(target, place, region.range, Wanted::All { huge }, flags.as_deref_mut())?;
            } else {
                let pages = u32::try_from(region.range.pages().get());
                let pages = pages.map_err(|_much| Left::Failed(TOO_MUCH.to_owned()))?;
                self.push(Span {
                    first: self.pages,
                    pages,
                    start: region.range.start(),
                    target: place,
                    huge,
                    merged: false,
                })?;
            }
        }
        Ok(())
    }

    /// Pages of which some have several users, after a fork or by KSM.
    fn add_shared(
        &mut self,
        target: &Target,
        place: u32,
        range: Range,
        wanted: Wanted,
        mut flags: Option<&mut FrameFlagsFile>,
    ) -> Result<(), Left> {
        let huge = wanted == Wanted::All { huge: true };
        let mut entries = Vec::new();
        for piece in range.pieces(kernel::pagemap::SCAN_WINDOW) {
            entries.resize(kernel::pagemap::entries_len(piece), PagemapEntry(0));
            let read = target.pagemap.entries(piece.start(), &mut entries).map_err(lost)?;
            let mut merged = HashSet::new();
            if let Some(flags) = flags.as_deref_mut() {
                let mut frames: Vec<u64> = entries[..read].iter().filter_map(|entry| entry.pfn()).collect();
                frames.sort_unstable();
                frames.dedup();
                flags.visit(&frames, |frame, flags| {
                    if flags.contains(FrameFlags::KSM) {
                        merged.insert(frame);
                    }
                })?;
            }
            for (entry, start) in entries[..read].iter().zip(piece.page_addresses()) {
                if !entry.present() || entry.file_or_shared() {
                    continue;
                }
                let span = Span { first: self.pages, pages: 1, start, target: place, huge, merged: false };
                match entry.pfn() {
                    Some(frame) if merged.contains(&frame) => {
                        self.merged_before += 1;
                        // One of its mappings tells what it holds.
                        if self.merged_frames.insert(frame) {
                            self.push(Span { merged: true, ..span })?;
                        }
                    }
                    _ if wanted == Wanted::Merged => {}
                    Some(frame) => {
                        if !entry.exclusive() {
                            self.frames.insert(self.pages, frame);
                        }
                        self.push(span)?;
                    }
                    None => self.push(span)?,
                }
            }
        }
        Ok(())
    }

    fn push(&mut self, span: Span) -> Result<(), Left> {
        let pages = self.pages.checked_add(span.pages).ok_or_else(|| Left::Failed(TOO_MUCH.to_owned()))?;
        self.pages = pages;
        if let Some(last) = self.spans.last_mut()
            && (last.target, last.huge, last.merged) == (span.target, span.huge, span.merged)
            && last.range().end() == span.start
        {
            last.pages += span.pages;
        } else {
            self.spans.push(span);
        }
        Ok(())
    }

    /// The span of a page.
    pub(crate) fn span_of(&self, page: u32) -> &Span {
        &self.spans[self.spans.partition_point(|span| span.first <= page) - 1]
    }

    /// Where a page lies.
    pub(crate) fn address_of(&self, page: u32) -> Vaddr {
        let span = self.span_of(page);
        Vaddr(span.start.get() + u64::from(page - span.first) * page_size())
    }
}

/// Why a mapping is left out: KSM does not take it, or somebody is told of writes to it. Such a promise would be broken:
/// KSM does not carry a userfaultfd's write protection over to the page that it puts in place of another.
fn refuses(vma: &VmaUse) -> Option<&'static str> {
    let watched = vma.flags.uffd_missing() || vma.flags.uffd_wp() || vma.flags.uffd_minor();
    vma.flags.ksm_refuses().or(watched.then_some("userfaultfd"))
}

fn lost(error: PagemapError) -> Left {
    if error.is_gone() { Left::Gone } else { Left::Failed(error.to_string()) }
}
