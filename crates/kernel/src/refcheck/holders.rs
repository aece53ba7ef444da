//! Does anybody hold a page that is still in its place? Asked before pages of a process that has forked are made
//! exclusive there.
//!
//! After a fork whose child has ended a page is mapped here alone, but is not marked so: UFFDIO_MOVE refuses it until a
//! write fault has found it out. That fault copies the page if anybody holds a reference to it (mm/memory.c,
//! `wp_can_reuse_anon_folio`). What such a holder writes then, I/O that began before the fork, goes to a page that is
//! nobody's any more; and the check after the freeze sees the copy, which nobody holds.
//!
//! So what somebody holds is found out before. Whoever takes a reference for writing after that does so through a write
//! fault, which makes the page exclusive; another fork would undo that, and makes the plan void.

use std::collections::HashMap;

use super::bpf::{BATCH, BpfCheck};
use crate::pagemap::{Pagemap, PagemapEntry};
use crate::units::{Vaddr, page_size};

const HUGE: u64 = 2 << 20;

/// Who holds a page beside its mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holders {
    /// Nobody.
    None,
    /// Somebody; or the page is on its way to an LRU list.
    Some,
    /// It cannot be told: a part of a large folio, or no page at all.
    Unknown,
}

/// Looks at pages, best in the order of their addresses. What cannot be looked at is [`Holders::Unknown`].
#[must_use]
pub fn holders(check: &mut BpfCheck, pagemap: &Pagemap, pages: &[Vaddr]) -> Vec<Holders> {
    let mut found = Vec::with_capacity(pages.len());
    let mut huge: HashMap<u64, bool> = HashMap::new();
    let mut rest = pages;
    while let Some(first) = rest.first() {
        let offset = |page: &Vaddr| page.get().checked_sub(first.get()).map(|bytes| (bytes / page_size()) as usize);
        // One look at whatever lies close together.
        let near = rest.iter().take_while(|page| offset(page).is_some_and(|offset| offset < BATCH)).count();
        let (now, later) = rest.split_at(near);
        let looked = look(check, pagemap, *first, now.iter().filter_map(offset).max().unwrap_or(0) + 1);
        for page in now {
            let count = offset(page).and_then(|offset| looked.get(offset)).map_or(0, |(_, count)| *count);
            found.push(match count {
                1 => Holders::None,
                0 => {
                    let start = page.get() / HUGE * HUGE;
                    let free = huge.entry(start).or_insert_with(|| huge_is_free(check, pagemap, Vaddr(start)));
                    if *free { Holders::None } else { Holders::Unknown }
                }
                _ => Holders::Some,
            });
        }
        rest = later;
    }
    found
}

/// Frame and count of each of `pages` pages; nothing if they cannot be had.
fn look(check: &mut BpfCheck, pagemap: &Pagemap, start: Vaddr, pages: usize) -> Vec<(Option<u64>, u32)> {
    let mut entries = vec![PagemapEntry(0); pages];
    let mut counts = vec![0; pages];
    if pagemap.entries(start, &mut entries).is_err() {
        return Vec::new();
    }
    let frames: Vec<Option<u64>> = entries.iter().map(|entry| entry.pfn()).collect();
    let numbers: Vec<u64> = frames.iter().map(|frame| frame.unwrap_or(0)).collect();
    if check.refs(&numbers, &mut counts).is_err() {
        return Vec::new();
    }
    frames.into_iter().zip(counts).map(|(frame, count)| (frame, if frame.is_some() { count } else { 0 })).collect()
}

/// True if a huge page is mapped here as a whole and held by nobody: its references are counted in its first page, and
/// there is one.
fn huge_is_free(check: &mut BpfCheck, pagemap: &Pagemap, start: Vaddr) -> bool {
    let pages = (HUGE / page_size()) as usize;
    let looked = look(check, pagemap, start, pages);
    let Some((Some(first), 1)) = looked.first().copied() else { return false };
    // Any other page in its place would count something: what is mapped is in use.
    let follows = |(index, (frame, count)): (usize, &(Option<u64>, u32))| {
        *frame == Some(first + index as u64) && (index == 0 || *count == 0)
    };
    looked.len() == pages && looked.iter().enumerate().all(follows)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::lru::drain_batches;
    use crate::own_memory::OwnMapping;
    use crate::refcheck::bpf::tests::check;
    use crate::units::{PageCount, Pid};

    fn mapping(pages: u64, advice: i32) -> OwnMapping {
        let memory = OwnMapping::anonymous(PageCount(pages)).unwrap();
        memory.advise(advice).unwrap();
        memory.advise(libc::MADV_DONTFORK).unwrap();
        memory
    }

    #[test]
    fn whoever_holds_a_page_is_found_where_it_lies() {
        let Some(mut check) = check() else { return };
        let pagemap = Pagemap::open(Pid::this()).unwrap();
        let memory = mapping(2048, libc::MADV_NOHUGEPAGE);
        [1, 2, 3, 700, 2000].iter().for_each(|index| memory.touch_page(*index, 7));
        let pipe = memory.hold(2).unwrap();
        drain_batches().unwrap();
        let at = |index: u64| memory.start() + PageCount(index);
        let wanted = [(2000, Holders::None), (1, Holders::None), (2, Holders::Some), (3, Holders::None)];
        let wanted = wanted.iter().chain(&[(5, Holders::Unknown), (700, Holders::None)]);
        let pages: Vec<Vaddr> = wanted.clone().map(|(index, _)| at(*index)).collect();
        let expected: Vec<Holders> = wanted.map(|(_, holders)| *holders).collect();
        assert_eq!(holders(&mut check, &pagemap, &pages), expected);
        drop(pipe);
        assert_eq!(holders(&mut check, &pagemap, &[at(2)]), [Holders::None]);
        assert_eq!(holders(&mut check, &pagemap, &[]), []);
    }

    #[test]
    fn a_huge_page_is_held_as_a_whole() {
        let Some(mut check) = check() else { return };
        let pagemap = Pagemap::open(Pid::this()).unwrap();
        let memory = mapping(1024, libc::MADV_HUGEPAGE);
        let first = memory.start().get().next_multiple_of(HUGE);
        let index = (first - memory.start().get()) / page_size();
        memory.touch_page(index as usize, 7);
        drain_batches().unwrap();
        let at = |page: u64| Vaddr(first + page * page_size());
        if !pagemap.entry(at(511)).unwrap().present() {
            println!("skipped: a huge page");
            return;
        }
        assert_eq!(holders(&mut check, &pagemap, &[at(0), at(1), at(511)]), [Holders::None; 3]);
        let pipe = memory.hold(index as usize + 9).unwrap();
        let found = holders(&mut check, &pagemap, &[at(0), at(9), at(10)]);
        assert_eq!(found, [Holders::Some, Holders::Unknown, Holders::Unknown]);
        drop(pipe);
        assert_eq!(holders(&mut check, &pagemap, &[at(9)]), [Holders::None]);
    }
}
