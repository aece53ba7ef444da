//! Comparing pages with a segment before they are mapped from it.

use std::os::fd::AsFd;

use broker::{Placed, StoreRun};
use kernel::{PageCount, Range, Vaddr, memfd, page_size};

/// Pages compared at a time: what stays in the cache between being read and being compared.
const AT_ONCE: u64 = 64;

/// Reads segments.
#[derive(Debug, Default)]
pub(crate) struct SegmentReader {
    buffer: Vec<u8>,
}

impl SegmentReader {
    /// Compares a run page by page, `own` being its content, and has `place` map every stretch that is equal:
    /// the pages, and the first page in the segment. `place` says whether it did.
    pub(crate) fn compare_and_place(
        &mut self,
        run: &StoreRun<'_>,
        own: &[u8],
        mut place: impl FnMut(Range, u64) -> bool,
    ) -> Placed {
        let size = page_size() as usize;
        let pages = run.pages.pages().get();
        let mut placed = Placed::default();
        // Whoever could change the segment later could change this process's memory.
        let sealed = run.segment.is_none_or(|(segment, _)| memfd::is_sealed(segment).unwrap_or(false));
        if !sealed {
            placed.failed = pages;
            return placed;
        }
        let first = run.segment.map_or(0, |(_, page)| u64::from(page));
        self.buffer.clear();
        self.buffer.resize(AT_ONCE as usize * size, 0);
        let mut at = 0;
        while at < pages {
            let count = AT_ONCE.min(pages - at);
            let own = &own[at as usize * size..(at + count) as usize * size];
            let store = &mut self.buffer[..count as usize * size];
            if let Some((segment, _)) = run.segment
                && !memfd::pread(segment.as_fd(), (first + at) * page_size(), store)
                    .is_ok_and(|read| read == store.len())
            {
                placed.failed += pages - at;
                return placed;
            }
            let mut stretch = 0;
            while stretch < count {
                let equal_from = |from: u64| {
                    let from = from as usize * size;
                    own[from..].chunks(size).zip(store[from..].chunks(size)).take_while(|(own, store)| own == store)
                };
                let equal = equal_from(stretch).count() as u64;
                if equal == 0 {
                    placed.changed += 1;
                    stretch += 1;
                    continue;
                }
                let start = Vaddr(run.pages.start().get() + (at + stretch) * page_size());
                let done =
                    Range::from_pages(start, PageCount(equal)).is_ok_and(|pages| place(pages, first + at + stretch));
                if done {
                    placed.done += equal;
                } else {
                    placed.failed += equal;
                }
                stretch += equal;
            }
            at += count;
        }
        placed
    }
}
