//! Compact page ids: a table of spans turns 36 bits back into an owner and a page number.

use std::collections::BTreeMap;

use crate::{PageNumber, PageRange};

/// A page in 36 bits, handed out by [`Spans`] (2^36 pages are 256 TiB of 4 KiB pages at a time). Never zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageId(u64);

impl PageId {
    /// Bits of an id.
    pub const BITS: u32 = 36;

    /// Ids are below this.
    const END: u64 = 1 << Self::BITS;

    /// The id with this number; `None` for zero and for numbers of more than 36 bits.
    pub const fn new(number: u64) -> Option<Self> {
        if number == 0 || number >= Self::END { None } else { Some(Self(number)) }
    }

    /// Its number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The id of the page `pages` further up in the same span.
    ///
    /// # Panics
    /// If there is no such id, which means that the caller left its span.
    pub fn offset(self, pages: u64) -> Self {
        Self::new(self.0.saturating_add(pages)).expect("ids of one span are all valid")
    }
}

/// Whose page, and which: what a [`PageId`] stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Location {
    /// The address space, by a number that the caller gave it.
    pub owner: u32,
    /// The page in that address space.
    pub page: PageNumber,
}

#[derive(Clone, Copy, Debug)]
struct Span {
    owner: u32,
    first: PageNumber,
    pages: u64,
}

/// Ranges of address spaces and the ids of their pages. An id is given again only when all others have been, so a
/// stale one in the index usually names nothing rather than somebody else.
#[derive(Clone, Debug)]
pub struct Spans {
    /// By first id.
    spans: BTreeMap<u64, Span>,
    /// Where the search for room goes on.
    next: u64,
}

impl Default for Spans {
    fn default() -> Self {
        Self::new()
    }
}

impl Spans {
    /// An empty table.
    pub fn new() -> Self {
        Self { spans: BTreeMap::new(), next: 1 }
    }

    /// Gives ids to the pages of `range` of `owner` and returns the first; the others follow it, one for each page.
    /// `None` where the range is empty or no gap of ids is long enough.
    pub fn add(&mut self, owner: u32, range: PageRange) -> Option<PageId> {
        let pages = range.pages();
        if pages == 0 {
            return None;
        }
        let first = self.room(self.next, PageId::END, pages).or_else(|| self.room(1, PageId::END, pages))?;
        self.spans.insert(first, Span { owner, first: range.start, pages });
        self.next = first + pages;
        PageId::new(first)
    }

    /// Takes back the span that begins with `first`. Whether there was one.
    pub fn remove(&mut self, first: PageId) -> bool {
        self.spans.remove(&first.0).is_some()
    }

    /// Takes back all spans of `owner`.
    pub fn remove_owner(&mut self, owner: u32) {
        self.spans.retain(|_, span| span.owner != owner);
    }

    /// What `id` stands for; `None` once its span is gone.
    pub fn locate(&self, id: PageId) -> Option<Location> {
        let (first, span) = self.spans.range(..=id.0).next_back()?;
        let offset = id.0 - first;
        (offset < span.pages).then(|| Location { owner: span.owner, page: span.first.offset(offset) })
    }

    /// How many spans there are.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The first id at or above `from` with `pages` free ones in a row below `end`.
    fn room(&self, from: u64, end: u64, pages: u64) -> Option<u64> {
        let mut free = match self.spans.range(..from).next_back() {
            Some((first, span)) => from.max(first + span.pages),
            None => from,
        };
        for (first, span) in self.spans.range(from..) {
            if first - free >= pages {
                break;
            }
            free = first + span.pages;
        }
        (end.checked_sub(free)? >= pages).then_some(free)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    fn range(start: u64, pages: u64) -> PageRange {
        PageRange::from_count(PageNumber(start), pages)
    }

    #[test]
    fn ids_come_back_as_locations_until_their_span_goes() {
        let mut spans = Spans::new();
        let a = spans.add(1, range(100, 10)).unwrap();
        let b = spans.add(2, range(100, 10)).unwrap();
        assert_eq!(spans.locate(a.offset(9)), Some(Location { owner: 1, page: PageNumber(109) }));
        assert_eq!(spans.locate(b), Some(Location { owner: 2, page: PageNumber(100) }));
        assert_eq!(spans.locate(b.offset(10)), None);
        spans.remove_owner(1);
        assert_eq!(spans.locate(a), None);
        assert!(spans.remove(b) && spans.is_empty());
        let c = spans.add(3, range(0, 1)).unwrap();
        assert_ne!(c, a, "not reused at once");
    }

    #[test]
    fn room_is_found_again_after_the_end() {
        let mut spans = Spans::new();
        let half = 1 << (PageId::BITS - 1);
        let low = spans.add(1, range(0, half)).unwrap();
        spans.add(2, range(0, half - 1)).unwrap();
        assert_eq!(spans.add(3, range(0, 1)), None, "all ids are out");
        assert!(spans.remove(low));
        assert_eq!(spans.add(3, range(7, half)), Some(low));
        assert_eq!(spans.add(4, range(0, 1)), None);
        assert_eq!(spans.add(4, range(0, 0)), None, "nothing to give ids to");
    }

    proptest! {
        /// Spans never overlap, and every id of every live span leads to its page.
        #[test]
        fn spans_never_overlap(steps in proptest::collection::vec((0_u32..4, 1_u64..1 << 34, any::<bool>()), 1..40)) {
            let mut spans = Spans::new();
            let mut live: Vec<(PageId, u32, u64)> = Vec::new();
            for (owner, pages, remove) in steps {
                if remove && !live.is_empty() {
                    let (first, ..) = live.swap_remove(owner as usize % live.len());
                    prop_assert!(spans.remove(first));
                } else if let Some(first) = spans.add(owner, range(u64::from(owner) << 40, pages)) {
                    prop_assert!(first.get() + pages <= PageId::END);
                    live.push((first, owner, pages));
                }
                let mut sorted = live.clone();
                sorted.sort_unstable();
                prop_assert!(sorted.windows(2).all(|pair| pair[0].0.get() + pair[0].2 <= pair[1].0.get()));
                for (first, owner, pages) in &live {
                    for at in [0, pages / 2, pages - 1] {
                        let expected = Location { owner: *owner, page: PageNumber((u64::from(*owner) << 40) + at) };
                        prop_assert_eq!(spans.locate(first.offset(at)), Some(expected));
                    }
                }
            }
        }
    }
}
