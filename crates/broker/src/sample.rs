//! What the kernel shows of the store in the members' mappings.

use std::collections::HashMap;

use kernel::{Bytes, Category, PageCount, Pagemap, Pid, Range, Region, ScanRequest, Vaddr, Vma, maps, page_size};
use page::SegmentId;

use crate::left_alone::ByReason;
use crate::member::Member;
use crate::quiet::Quiet;
use crate::view::Bits;

/// A segment's file, as mappings name it.
pub(crate) struct SegmentFile {
    pub(crate) segment: SegmentId,
    /// Major and minor number: another file system has files with the same inode.
    pub(crate) device: (u32, u32),
    pub(crate) pages: u64,
}

impl SegmentFile {
    /// The part of a mapping that shows pages of this segment privately and writable. A program may map more than there
    /// is.
    pub(crate) fn shown_by(&self, vma: &Vma) -> Option<Shown> {
        if vma.shared || !vma.write || (vma.dev_major, vma.dev_minor) != self.device {
            return None;
        }
        let first = vma.offset / page_size();
        let pages = self.pages.checked_sub(first)?.min(vma.range.pages().get());
        let range = Range::from_pages(vma.range.start(), PageCount(pages)).ok()?;
        let shown = Shown { range, segment: self.segment, pages: self.pages, first };
        (!range.is_empty()).then_some(shown)
    }
}

/// A part of a mapping that shows pages of the store.
pub(crate) struct Shown {
    pub(crate) range: Range,
    segment: SegmentId,
    /// Of the whole segment.
    pages: u64,
    /// The segment's page that comes first.
    first: u64,
}

/// So far apart parts may lie that are looked at in one scan: there are thousands of them, and 32 pages between cost as much
/// as another call.
const NEAR: Bytes = Bytes(128 << 10);

/// Where a process has pages of its own in parts that ascend, and between them. `None` if that cannot be seen.
fn own_pages(pagemap: &Pagemap, parts: &[Shown]) -> Option<Vec<Region>> {
    let whole = Range::new(parts.first()?.range.start(), parts.last()?.range.end()).ok()?;
    let request = ScanRequest {
        inverted: Category::FILE,
        mask: Category::PRESENT | Category::FILE,
        ret: Category::PRESENT,
        ..ScanRequest::default()
    };
    let mut own = Vec::new();
    pagemap.scan_all(whole, &request, &mut own).ok()?;
    Some(own)
}

/// What the members map of the store at one moment.
#[derive(Default)]
pub(crate) struct Sample {
    pub(crate) processes: u64,
    pub(crate) managed: u64,
    pub(crate) unfit: u64,
    pub(crate) left_alone: ByReason,
    /// Mappings of store pages that still show the store's page.
    pub(crate) mapped: u64,
    /// Distinct store pages among them.
    pub(crate) shared: u64,
    pub(crate) diverged: u64,
    pub(crate) zero: u64,
    pub(crate) vmas: u64,
    /// Pages mapped of each segment.
    pub(crate) used: HashMap<SegmentId, u32>,
}

/// Which of a segment's pages are mapped, and how often altogether.
type Seen = HashMap<SegmentId, (Bits, u32)>;

impl Sample {
    /// Adds parts of one process that ascend, and where it has pages of its own.
    fn add(&mut self, parts: &[Shown], own: &[Region], seen: &mut Seen) {
        let mut own = own.iter().map(|region| region.range).peekable();
        for part in parts {
            let (bits, used) = seen.entry(part.segment).or_insert_with(|| (Bits::new(part.pages), 0));
            self.vmas += 1;
            let mut at = part.range.start();
            let mut clean = |from: Vaddr, to: Vaddr| {
                let first = part.first + (from.page_index() - part.range.start().page_index());
                let pages = to.page_index() - from.page_index();
                (first..first + pages).for_each(|page| bits.set(page, true));
                self.mapped += pages;
                *used += pages as u32;
            };
            while own.next_if(|own| own.end() <= part.range.start()).is_some() {}
            while let Some(inside) = own.peek().and_then(|own| own.intersect(&part.range)) {
                clean(at, inside.start());
                at = inside.end();
                self.diverged += inside.pages().get();
                if at == part.range.end() {
                    // The rest of it may be the next part's.
                    break;
                }
                own.next();
            }
            clean(at, part.range.end());
        }
    }
}

/// Reads off the kernel what each member maps of the store.
pub(crate) fn sample(
    members: &mut [Member],
    quiet: &mut HashMap<Pid, Quiet>,
    inodes: &HashMap<u64, SegmentFile>,
) -> Sample {
    let mut sample = Sample::default();
    let mut seen = HashMap::new();
    // A process that has a helper too is counted once.
    let with_helper: Vec<Pid> = members.iter().map(|member| member.pid).collect();
    let with_helpers = members.iter_mut().map(|member| (member.helper, &mut member.view, true));
    let without = quiet.iter_mut().filter(|(pid, _)| !with_helper.contains(pid));
    for (reader, view, has_helper) in with_helpers.chain(without.map(|(pid, quiet)| (*pid, &mut quiet.view, false))) {
        let (Ok(vmas), Ok(pagemap)) = (maps::read(reader), Pagemap::open(reader)) else { continue };
        sample.processes += 1;
        sample.managed += view.pages();
        sample.unfit += view.unfit_pages;
        for (why, bytes) in &view.left_alone {
            *sample.left_alone.entry(why).or_default() += bytes;
        }
        view.vmas = vmas.len() as u64;
        let shown: Vec<Shown> = vmas.iter().filter_map(|vma| inodes.get(&vma.inode)?.shown_by(vma)).collect();
        for near in shown.chunk_by(|before, after| before.range.end() + NEAR >= after.range.start()) {
            if let Some(own) = own_pages(&pagemap, near) {
                sample.add(near, &own, &mut seen);
            }
        }
        for area in &mut view.areas {
            if area.dropped.count() == 0 {
                continue;
            }
            let mut there = Vec::new();
            let request = ScanRequest {
                inverted: Category::PFNZERO,
                mask: Category::PRESENT | Category::PFNZERO,
                ret: Category::PRESENT,
                ..ScanRequest::default()
            };
            if pagemap.scan_all(area.range, &request, &mut there).is_ok() {
                let start = area.range.start().page_index();
                for region in there {
                    for page in region.range.start().page_index()..region.range.end().page_index() {
                        area.dropped.set(page - start, false);
                    }
                }
            }
            sample.zero += area.dropped.count();
        }
        if has_helper {
            view.mapped = vmas;
        }
    }
    sample.shared = seen.values().map(|(bits, _)| bits.count()).sum();
    sample.used = seen.into_iter().map(|(segment, (_, used))| (segment, used)).collect();
    sample
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_mapping_shows_no_more_than_the_segment_has() {
        let file = SegmentFile { segment: SegmentId(1), device: (0, 1), pages: 4 };
        let line = |text: &str| maps::parse_line(text.as_bytes()).unwrap();
        let pages = |text: &str| file.shown_by(&line(text)).map(|shown| (shown.range.pages().get(), shown.first));
        assert_eq!(pages("10000000-7fff00000000 rw-p 00001000 00:01 7 /memfd:pagefold (deleted)"), Some((3, 1)));
        assert_eq!(pages("10000000-10002000 rw-p 00000000 00:01 7 /memfd:pagefold (deleted)"), Some((2, 0)));
        assert_eq!(pages("10000000-10002000 rw-p 7ffffffff000 00:01 7 /memfd:pagefold (deleted)"), None);
        assert_eq!(pages("10000000-10002000 rw-p 00000000 08:01 7 /another file of this inode"), None);
    }

    #[test]
    fn what_lies_between_parts_is_nobodys() {
        let range = |start: u64, end: u64| Range::new(Vaddr(start << 12), Vaddr(end << 12)).unwrap();
        let shown = |range, first| Shown { range, segment: SegmentId(1), pages: 64, first };
        let own = |start, end| Region { range: range(start, end), categories: Category::PRESENT };
        let parts = [shown(range(10, 20), 0), shown(range(20, 30), 0), shown(range(40, 50), 32)];
        let (mut sample, mut seen) = (Sample::default(), Seen::new());
        // Before, within, over the border of two, between, from between into one, behind.
        let own = [own(1, 5), own(12, 13), own(18, 22), own(32, 35), own(38, 41), own(60, 61)];
        sample.add(&parts, &own, &mut seen);
        assert_eq!((sample.vmas, sample.diverged, sample.mapped), (3, 1 + 4 + 1, 24));
        let (bits, used) = &seen[&SegmentId(1)];
        // The first two show the same pages; the first has lost 2, 8 and 9, the second 0 and 1, and the last 32.
        assert_eq!((bits.count(), *used), (10 + 9, 24));
    }
}
