//! What the broker knows of a member's managed memory: its areas, their properties, the age of each page.

use std::collections::HashMap;

use abi::mark::Keep;
use kernel::{Category, Pagemap, PagemapError, Range, Region, ScanRequest, Vaddr, Vma, VmaUse};
use page::{AgePolicy, Ages, Kind, PageId, PageNumber, PageRange, Spans};
use store::mappings;

use crate::heat::Heat;
use crate::layout::{Layout, refuses};
use crate::left_alone::ByReason;
use crate::scope::PassedOver;

/// A stretch of managed memory that the program knows as one mapping, whatever we have mapped into it.
pub(crate) struct Area {
    pub(crate) range: Range,
    /// Protection and properties that every replacement must have.
    pub(crate) keep: Keep,
    pub(crate) ages: Ages,
    /// Index id of its first page.
    pub(crate) first: PageId,
    /// Cycles in which it was not registered for write tracking, the last ones in a row.
    untracked: u32,
    /// Where writes are noticed at a price.
    heat: Heat,
    /// Zero pages that were dropped, one bit a page.
    pub(crate) dropped: Bits,
    /// Pages that had a second try since they were last merged, one bit a page.
    retried: Bits,
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
    /// Anonymous memory that is never managed, where all is that can be.
    pub(crate) left_alone: ByReason,
    /// The mappings when it was last looked at what is merged, until it is chosen from them what is to be managed.
    pub(crate) mapped: Vec<Vma>,
    /// What was looked at for that in vain.
    pub(crate) passed_over: PassedOver,
    /// Handed-over memory was left out because there is far more of it than the program uses, or in too many pieces.
    /// Worth another look when the program has grown.
    pub(crate) left_out: bool,
}

/// Managed pages for each resident page, at most: a byte and a bit are kept for each, and a program can hand over the
/// whole address space without using any of it.
const PAGES_FOR_EACH: u64 = 16;
/// Managed pages that any program may have: 4 GiB of small pages.
const PAGES_FOR_ALL: u64 = 1 << 20;
/// Areas of one member. Each costs a few system calls in each cycle.
const AREAS_MAX: usize = 4096;

impl View {
    /// Reads the layout anew. `false` if the process is gone.
    pub(crate) fn refresh(
        &mut self,
        layout: Layout,
        epoch: u32,
        ranges: &[Range],
        policy: AgePolicy,
        owner: u32,
        spans: &mut Spans,
    ) -> bool {
        let Ok(mut vmas) = layout.read() else { return false };
        let all = vmas.len() as u64;
        vmas.retain(|vma| !(layout.whole && vma.flags.dontdump()));
        self.arrange(&vmas, epoch, ranges, policy, owner, spans);
        self.vmas = all;
        true
    }

    fn arrange(
        &mut self,
        vmas: &[VmaUse],
        epoch: u32,
        ranges: &[Range],
        policy: AgePolicy,
        owner: u32,
        spans: &mut Spans,
    ) {
        self.vmas = vmas.len() as u64;
        let (wanted, stored, unfit) = areas_of(vmas, ranges);
        self.unfit_pages = unfit;
        self.left_out = false;
        let resident: u64 = vmas.iter().map(|vma| vma.memory.rss.pages().get()).sum();
        let mut room = resident.saturating_mul(PAGES_FOR_EACH).max(PAGES_FOR_ALL);
        let mut old: HashMap<Vaddr, Area> = self.areas.drain(..).map(|area| (area.range.start(), area)).collect();
        for (range, keep) in wanted {
            if range.pages().get() > room || self.areas.len() == AREAS_MAX {
                self.unfit_pages += range.pages().get();
                self.left_out = true;
                continue;
            }
            room -= range.pages().get();
            let kept = old.get(&range.start()).is_some_and(|area| area.range == range);
            let area = match if kept { old.remove(&range.start()) } else { None } {
                Some(area) => {
                    let mut area = Area { keep, untracked: 0, ..area };
                    area.reconcile(&stored);
                    area
                }
                None => {
                    let pages = numbers(range);
                    let Some(first) = spans.add(owner, pages) else { continue };
                    let mut area = Area {
                        range,
                        keep,
                        ages: Ages::new(pages, policy),
                        first,
                        untracked: 0,
                        heat: Heat::new(pages),
                        dropped: Bits::new(pages.pages()),
                        retried: Bits::new(pages.pages()),
                    };
                    // What lies in the store already, after a change of the layout.
                    let from = stored.partition_point(|stored| stored.end() <= range.start());
                    let inside = stored[from..].iter().take_while(|stored| stored.start() < range.end());
                    for part in inside.filter_map(|stored| stored.intersect(&range)) {
                        numbers(part).iter().for_each(|page| area.ages.merged(page));
                    }
                    area
                }
            };
            self.areas.push(area);
        }
        for area in old.into_values() {
            spans.remove(area.first);
        }
        self.areas.sort_by_key(|area| area.range.start());
        self.epoch = Some(epoch);
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self, spans: &mut Spans) {
        for area in self.areas.drain(..) {
            spans.remove(area.first);
        }
    }

    /// The area of a page.
    pub(crate) fn area_of(&mut self, page: PageNumber) -> Option<&mut Area> {
        let address = Vaddr(page.address(kernel::page_size()));
        let index = self.areas.partition_point(|area| area.range.end() <= address);
        self.areas.get_mut(index).filter(|area| area.range.contains(address))
    }

    /// Pages under management.
    pub(crate) fn pages(&self) -> u64 {
        self.areas.iter().map(|area| area.range.pages().get()).sum()
    }
}

/// Plain numbers as the range that they are, `None` if it is empty.
pub(crate) fn bytes_of(pages: PageRange) -> Option<Range> {
    let size = kernel::page_size();
    Range::new(Vaddr(pages.start.address(size)), Vaddr(pages.end.address(size))).ok().filter(|range| !range.is_empty())
}

/// Pages of a range as plain numbers.
pub(crate) fn numbers(range: Range) -> PageRange {
    PageRange::new(PageNumber(range.start().page_index()), PageNumber(range.end().page_index()))
}

impl Area {
    /// Memory that was unmapped and mapped anew in the same place, or discarded, is not the store's any more.
    fn reconcile(&mut self, stored: &[Range]) {
        let from = stored.partition_point(|stored| stored.end() <= self.range.start());
        let inside = stored[from..].iter().take_while(|stored| stored.start() < self.range.end());
        let parts: Vec<PageRange> = inside.filter_map(|part| part.intersect(&self.range)).map(numbers).collect();
        let counts = self.ages.counts();
        if parts.iter().map(|part| part.pages()).sum::<u64>() == counts.merged + counts.diverged {
            return;
        }
        let mut parts = parts.into_iter().peekable();
        for page in self.ages.range().iter() {
            while parts.next_if(|part| part.end <= page).is_some() {}
            let is_stored = parts.peek().is_some_and(|part| part.start <= page);
            let was_stored = self.ages.age(page).is_some_and(|age| matches!(age.kind, Kind::Merged | Kind::Diverged));
            match (was_stored, is_stored) {
                (true, false) => self.ages.discarded(page),
                (false, true) => self.ages.merged(page),
                _ => {}
            }
        }
    }

    /// One cycle has passed: applies what was written in it. False if the area is not watched, and its helper is to be
    /// told to register it: seldom, if that does not help.
    pub(crate) fn watch(&mut self, pagemap: &Pagemap, regions: &mut Vec<Region>) -> bool {
        self.ages.tick();
        let mut tracked = true;
        for (piece, protects) in self.heat.turns() {
            let Some(range) = bytes_of(piece) else { continue };
            let request = ScanRequest {
                wp_matching: protects,
                check_wpasync: true,
                mask: Category::WRITTEN | Category::PRESENT,
                ret: Category::FILE | Category::PFNZERO,
                ..ScanRequest::default()
            };
            let scanned = pagemap.scan_all(range, &request, regions);
            // Of what lies before memory that is not registered as well: it is protected again.
            for region in regions.iter().filter(|region| region.categories.is_empty()) {
                let pages = numbers(region.range);
                self.ages.written(pages);
                self.heat.written(pages);
                pages.iter().for_each(|page| self.dropped.set(page.0 - self.ages.range().start.0, false));
            }
            // New, or the gate has put fresh memory somewhere.
            tracked &= !matches!(scanned, Err(PagemapError::NotTracked { .. }));
        }
        self.heat.cool();
        if tracked {
            self.untracked = 0;
            return true;
        }
        self.untracked = self.untracked.saturating_add(1);
        !self.untracked.is_power_of_two()
    }

    /// `page` is merged now; the next time it may have a second try again.
    pub(crate) fn merged(&mut self, page: PageNumber) {
        self.ages.merged(page);
        self.retried.set(page.0 - self.ages.range().start.0, false);
    }

    /// A merge of `page` was refused. If what stood in its way is `soon_over`, a first refusal says nothing about the page:
    /// it has another try as soon as it has settled anew.
    pub(crate) fn refused(&mut self, page: PageNumber, soon_over: bool) {
        let bit = page.0 - self.ages.range().start.0;
        if soon_over && !self.retried.has(bit) {
            self.retried.set(bit, true);
            self.ages.wake(page);
        } else {
            self.ages.refused(page);
        }
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
            let store = mappings::is_segment(&vma.vma);
            let Some(keep) = keep_of(vma) else {
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

/// What a replacement must keep, or `None` for memory that must be left alone.
fn keep_of(vma: &VmaUse) -> Option<Keep> {
    if refuses(vma).is_some() {
        return None;
    }
    let flags = &vma.flags;
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

    pub(crate) fn has(&self, index: u64) -> bool {
        self.0.get((index / 64) as usize).is_some_and(|word| word >> (index % 64) & 1 == 1)
    }

    pub(crate) fn count(&self) -> u64 {
        self.0.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use kernel::{Pid, smaps};

    fn range(start: u64, pages: u64) -> Range {
        Range::from_pages(Vaddr(start), kernel::PageCount(pages)).unwrap()
    }

    /// Memory of a process of its own: the views are made of real mappings.
    #[test]
    fn the_whole_address_space_is_not_managed() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid(i32::try_from(child.id()).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(200));
        let mut view = View::default();
        let mut spans = Spans::new();
        let everything = range(0, (1 << 47) / kernel::page_size());
        assert!(view.refresh(Layout::from_outside(pid), 1, &[everything], AgePolicy::default(), 1, &mut spans));
        assert!(!view.areas.is_empty() && !view.left_out);
        let vmas: Vec<VmaUse> = smaps::read(pid).unwrap();
        // The same process with one mapping of 100 TiB that it does not use, and one of an ordinary size.
        let mut huge = vmas.iter().find(|vma| keep_of(vma).is_some()).unwrap().clone();
        huge.vma.range = range(1 << 40, (100 << 40) / kernel::page_size());
        let mut small = huge.clone();
        small.vma.range = range(120 << 40, 64);
        view.arrange(&[huge, small], 2, &[everything], AgePolicy::default(), 1, &mut spans);
        assert!(view.left_out);
        assert_eq!(view.pages(), 64);
        assert!(view.unfit_pages >= (100 << 40) / kernel::page_size());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Without it what lay in a CPU's batch for the LRU lists at the first try was merged 16 cycles later.
    #[test]
    fn a_page_has_a_second_try_before_it_has_to_wait() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid(i32::try_from(child.id()).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(200));
        let mut vma = smaps::read(pid).unwrap().into_iter().find(|vma| keep_of(vma).is_some()).unwrap();
        let (mut view, mut spans) = (View::default(), Spans::new());
        vma.vma.range = range(1 << 40, 64);
        view.arrange(&[vma], 1, &[range(1 << 40, 64)], AgePolicy::default(), 1, &mut spans);
        let area = &mut view.areas[0];
        let (one, two) = (numbers(area.range).start, PageNumber(numbers(area.range).start.0 + 1));
        let refused = |area: &mut Area, page, soon_over| {
            area.ages.looked(page);
            area.refused(page, soon_over);
            let age = area.ages.age(page).unwrap();
            assert_eq!(age.cycles, Some(0));
            age.back_off
        };
        assert_eq!([true; 3].map(|soon_over| refused(area, one, soon_over)), [0, 1, 2]);
        assert_eq!([false; 2].map(|soon_over| refused(area, two, soon_over)), [1, 2]);
        area.merged(one);
        area.ages.unmerged(one);
        assert_eq!([true; 2].map(|soon_over| refused(area, one, soon_over)), [2, 3]);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn an_area_of_another_length_gives_its_ids_back() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid(i32::try_from(child.id()).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(200));
        let mut vma = smaps::read(pid).unwrap().into_iter().find(|vma| keep_of(vma).is_some()).unwrap();
        let (mut view, mut spans) = (View::default(), Spans::new());
        for pages in [64, 32, 64, 16] {
            vma.vma.range = range(1 << 40, pages);
            view.arrange(&[vma.clone()], 1, &[range(1 << 40, 64)], AgePolicy::default(), 1, &mut spans);
            assert_eq!((spans.len(), view.pages()), (1, pages));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
