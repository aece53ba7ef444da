//! What the broker knows of a member's managed memory: its areas, their properties, the age of each page.

use abi::mark::Keep;
use kernel::{Category, Mode, Pagemap, PagemapError, Pid, Range, Region, ScanRequest, Uffd, VmaUse, smaps};
use page::{AgePolicy, Ages, PageId, PageNumber, PageRange, Spans};

/// A stretch of managed memory that the program knows as one mapping, whatever we have mapped into it.
pub(crate) struct Area {
    pub(crate) range: Range,
    /// Protection and properties that every replacement must have.
    pub(crate) keep: Keep,
    pub(crate) ages: Ages,
    /// Index id of its first page.
    pub(crate) first: PageId,
    /// Registered for write tracking.
    tracked: bool,
    /// Zero pages that were dropped, one bit a page.
    pub(crate) dropped: Bits,
}

/// The areas of one member.
#[derive(Default)]
pub(crate) struct View {
    pub(crate) areas: Vec<Area>,
    /// The layout epoch that they were read at.
    pub(crate) epoch: Option<u32>,
    /// Mappings of the process when it was last looked at.
    pub(crate) vmas: u64,
    /// Pages of handed-over ranges that cannot be managed: shared, locked, of files...
    pub(crate) unfit_pages: u64,
}

impl View {
    /// Reads the layout anew. `false` if the process is gone.
    pub(crate) fn refresh(
        &mut self,
        pid: Pid,
        epoch: u32,
        ranges: &[Range],
        policy: AgePolicy,
        owner: u32,
        spans: &mut Spans,
    ) -> bool {
        let Ok(vmas) = smaps::read(pid) else { return false };
        self.vmas = vmas.len() as u64;
        let (wanted, stored, unfit) = areas_of(&vmas, ranges);
        self.unfit_pages = unfit;
        let mut old: Vec<Area> = std::mem::take(&mut self.areas);
        for (range, keep) in wanted {
            let kept = old.iter().position(|area| area.range == range);
            let area = match kept {
                Some(index) => Area { keep, tracked: false, ..old.swap_remove(index) },
                None => {
                    let pages = numbers(range);
                    let Some(first) = spans.add(owner, pages) else { continue };
                    let mut area = Area {
                        range,
                        keep,
                        ages: Ages::new(pages, policy),
                        first,
                        tracked: false,
                        dropped: Bits::new(pages.pages()),
                    };
                    // What lies in the store already, after a change of the layout.
                    for part in stored.iter().filter_map(|stored| stored.intersect(&range)) {
                        numbers(part).iter().for_each(|page| area.ages.merged(page));
                    }
                    area
                }
            };
            self.areas.push(area);
        }
        for area in old {
            spans.remove(area.first);
        }
        self.areas.sort_by_key(|area| area.range.start());
        self.epoch = Some(epoch);
        true
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self, spans: &mut Spans) {
        for area in self.areas.drain(..) {
            spans.remove(area.first);
        }
    }

    /// The area of a page.
    pub(crate) fn area_of(&mut self, page: PageNumber) -> Option<&mut Area> {
        let address = kernel::Vaddr(page.address(kernel::page_size()));
        let index = self.areas.partition_point(|area| area.range.end() <= address);
        self.areas.get_mut(index).filter(|area| area.range.contains(address))
    }

    /// Pages under management.
    pub(crate) fn pages(&self) -> u64 {
        self.areas.iter().map(|area| area.range.pages().get()).sum()
    }
}

/// Pages of a range as plain numbers.
pub(crate) fn numbers(range: Range) -> PageRange {
    PageRange::new(PageNumber(range.start().page_index()), PageNumber(range.end().page_index()))
}

impl Area {
    /// One cycle has passed: applies what was written in it. Registers the area first if it is not. Returns whether
    /// the pages could be watched.
    pub(crate) fn watch(&mut self, uffd: &Uffd, pagemap: &Pagemap, regions: &mut Vec<Region>) -> bool {
        self.ages.tick();
        for _ in 0..2 {
            if !self.tracked {
                if uffd.register(self.range, Mode::WP).is_err() {
                    return false;
                }
                self.tracked = true;
            }
            regions.clear();
            let request = ScanRequest {
                wp_matching: true,
                check_wpasync: true,
                mask: Category::WRITTEN | Category::PRESENT,
                ret: Category::FILE | Category::PFNZERO,
                ..ScanRequest::default()
            };
            match pagemap.scan_all(self.range, &request, regions) {
                Ok(()) => {
                    for region in regions.iter().filter(|region| region.categories.is_empty()) {
                        let pages = numbers(region.range);
                        self.ages.written(pages);
                        pages.iter().for_each(|page| self.dropped.set(page.0 - self.ages.range().start.0, false));
                    }
                    return true;
                }
                // The gate has put fresh memory somewhere, which is not registered yet.
                Err(PagemapError::NotTracked { .. }) => self.tracked = false,
                Err(_) => return false,
            }
        }
        false
    }
}

/// Cuts ranges into areas. Also returns what of them is mapped to the store, and how many pages are unfit.
fn areas_of(vmas: &[VmaUse], ranges: &[Range]) -> (Vec<(Range, Keep)>, Vec<Range>, u64) {
    let mut areas: Vec<(Range, Keep)> = Vec::new();
    let mut stored = Vec::new();
    let mut unfit = 0;
    for range in ranges {
        let mut open = false;
        for vma in vmas {
            let Some(part) = vma.vma.range.intersect(range).filter(|part| !part.is_empty()) else { continue };
            let store = is_store(vma);
            let Some(keep) = keep_of(vma, store) else {
                unfit += part.pages().get();
                open = false;
                continue;
            };
            if store {
                stored.push(part);
            }
            match areas.last_mut() {
                Some((before, same)) if open && before.end() == part.start() && *same == keep => {
                    *before = Range::new(before.start(), part.end()).expect("two neighbouring ranges are one");
                }
                _ => areas.push((part, keep)),
            }
            open = true;
        }
    }
    (areas, stored, unfit)
}

/// A private mapping of one of our segments: memfds of this name that only brokers make. A program that names its own
/// memfd so is refused by the gate's marks.
pub(crate) fn is_store(vma: &VmaUse) -> bool {
    use std::os::unix::ffi::OsStrExt;
    !vma.vma.shared && vma.vma.inode != 0 && vma.vma.name.as_bytes().starts_with(b"/memfd:pagefold")
}

/// What a replacement must keep, or `None` for memory that must be left alone.
fn keep_of(vma: &VmaUse, store: bool) -> Option<Keep> {
    let flags = &vma.flags;
    let kind = vma.vma.is_private_anonymous() || store;
    let plain = vma.vma.read && vma.vma.write && !vma.vma.shared;
    let special = flags.locked()
        || flags.wipeonfork()
        || flags.io()
        || flags.pfnmap()
        || flags.mixedmap()
        || flags.hugetlb()
        || flags.growsdown()
        || flags.sealed()
        || flags.shadow_stack()
        || flags.tagged()
        || flags.contains(*b"dp");
    if !kind || !plain || special {
        return None;
    }
    let mut bits = 3 | if vma.vma.exec { 4 } else { 0 };
    for (set, bit) in
        [(flags.dontfork(), Keep::DONTFORK), (flags.dontdump(), Keep::DONTDUMP), (flags.noreserve(), Keep::NORESERVE)]
    {
        if set {
            bits |= bit;
        }
    }
    Some(Keep::from_bits(bits))
}

/// A set of small numbers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bits(Vec<u64>);

impl Bits {
    pub(crate) fn new(len: u64) -> Self {
        Self(vec![0; usize::try_from(len.div_ceil(64)).expect("a bit for each page fits into memory")])
    }

    pub(crate) fn set(&mut self, index: u64, on: bool) {
        if let Some(word) = self.0.get_mut((index / 64) as usize) {
            let bit = 1 << (index % 64);
            *word = if on { *word | bit } else { *word & !bit };
        }
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

impl Bits {
    /// Makes room for `len` numbers.
    pub(crate) fn grow(&mut self, len: u64) {
        let words = usize::try_from(len.div_ceil(64)).expect("a bit for each page fits into memory");
        if words > self.0.len() {
            self.0.resize(words, 0);
        }
    }
}
