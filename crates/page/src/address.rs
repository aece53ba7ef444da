//! Pages by number: an address divided by the page size, so that nothing here needs to know that size.

use std::fmt;

/// Number of a page in its address space: the address divided by the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageNumber(pub u64);

impl PageNumber {
    /// The page that holds `address`, with pages of `page_size` bytes.
    pub fn containing(address: u64, page_size: u64) -> Self {
        Self(address / page_size)
    }

    /// First address of the page, with pages of `page_size` bytes.
    pub fn address(self, page_size: u64) -> u64 {
        self.0 * page_size
    }

    /// The page `pages` further up.
    pub fn offset(self, pages: u64) -> Self {
        Self(self.0 + pages)
    }

    /// The page just above this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for PageNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x}", self.0)
    }
}

/// Neighbouring pages of one address space, the end not included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageRange {
    /// First page.
    pub start: PageNumber,
    /// The page after the last.
    pub end: PageNumber,
}

impl PageRange {
    /// The pages from `start` up to, not including, `end`; empty where `end` is not above `start`.
    pub fn new(start: PageNumber, end: PageNumber) -> Self {
        Self { start, end: end.max(start) }
    }

    /// `pages` pages from `start` on.
    pub fn from_count(start: PageNumber, pages: u64) -> Self {
        Self { start, end: start.offset(pages) }
    }

    /// How many pages.
    pub fn pages(self) -> u64 {
        self.end.0 - self.start.0
    }

    /// Whether there is no page in it.
    pub fn is_empty(self) -> bool {
        self.end <= self.start
    }

    /// Whether `page` lies in it.
    pub fn contains(self, page: PageNumber) -> bool {
        self.start <= page && page < self.end
    }

    /// The part that both ranges have; empty where they have none.
    pub fn intersection(self, other: Self) -> Self {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }

    /// Every page of it in ascending order.
    pub fn iter(self) -> impl Iterator<Item = PageNumber> {
        (self.start.0..self.end.0).map(PageNumber)
    }
}

impl fmt::Display for PageRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pages {:#x}-{:#x}", self.start.0, self.end.0)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn ranges_clip_and_never_turn_inside_out() {
        let a = PageRange::new(PageNumber(10), PageNumber(20));
        assert_eq!(
            a.intersection(PageRange::from_count(PageNumber(15), 100)),
            PageRange::from_count(PageNumber(15), 5)
        );
        let apart = a.intersection(PageRange::from_count(PageNumber(40), 1));
        assert!(apart.is_empty());
        assert_eq!(apart.pages(), 0);
        assert!(PageRange::new(PageNumber(9), PageNumber(3)).is_empty());
        assert!(a.contains(PageNumber(19)) && !a.contains(PageNumber(20)));
        assert_eq!(PageNumber::containing(0x5123, 4096).address(4096), 0x5000);
    }
}
