//! Addresses, page counts, byte counts and process ids as types, so that none is taken for another.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::sync::OnceLock;

use thiserror::Error;

/// The size of a base page in bytes, as the C library reports it.
#[must_use]
pub fn page_size() -> u64 {
    static SIZE: OnceLock<u64> = OnceLock::new();
    *SIZE.get_or_init(|| rustix::param::page_size() as u64)
}

/// Base pages of a huge page: of 2 MiB, whatever the base page's size.
#[must_use]
pub fn pages_of_huge() -> u64 {
    (2 << 20) / page_size()
}

/// A virtual address, in this process or another; it says nothing about what lies there.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Vaddr(pub u64);

impl Vaddr {
    /// The address as a number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The first byte of the page that holds this address.
    #[must_use]
    pub fn page_start(self) -> Self {
        Self(self.0 & !(page_size() - 1))
    }

    /// True if this is the first byte of a page.
    #[must_use]
    pub fn is_page_aligned(self) -> bool {
        self.0 & (page_size() - 1) == 0
    }

    /// The number of this address's page, counted from address 0.
    #[must_use]
    pub fn page_index(self) -> u64 {
        self.0 / page_size()
    }

    /// The address `bytes` further on, `None` behind the end of the address space.
    #[must_use]
    pub fn checked_add(self, bytes: Bytes) -> Option<Self> {
        self.0.checked_add(bytes.0).map(Self)
    }
}

impl fmt::Display for Vaddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl fmt::Debug for Vaddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::LowerHex for Vaddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::LowerHex::fmt(&self.0, f)
    }
}

impl Add<Bytes> for Vaddr {
    type Output = Self;
    fn add(self, bytes: Bytes) -> Self {
        Self(self.0 + bytes.0)
    }
}

impl Add<PageCount> for Vaddr {
    type Output = Self;
    fn add(self, pages: PageCount) -> Self {
        self + pages.bytes()
    }
}

impl Sub for Vaddr {
    type Output = Bytes;
    fn sub(self, earlier: Self) -> Bytes {
        Bytes(self.0 - earlier.0)
    }
}

/// A number of base pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct PageCount(pub u64);

impl PageCount {
    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// How many bytes these pages have.
    #[must_use]
    pub fn bytes(self) -> Bytes {
        Bytes(self.0 * page_size())
    }
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Bytes(pub u64);

impl Bytes {
    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// From the KiB in which /proc counts.
    #[must_use]
    pub const fn from_kib(kib: u64) -> Self {
        Self(kib * 1024)
    }

    /// From MiB.
    #[must_use]
    pub const fn from_mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// The whole pages in this many bytes; a rest is dropped.
    #[must_use]
    pub fn pages(self) -> PageCount {
        PageCount(self.0 / page_size())
    }

    /// The pages that hold this many bytes; a rest counts as one.
    #[must_use]
    pub fn pages_ceil(self) -> PageCount {
        PageCount(self.0.div_ceil(page_size()))
    }
}

macro_rules! count {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(&self.0, f)
            }
        }
        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0 + other.0)
            }
        }
        impl Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                Self(self.0 - other.0)
            }
        }
        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                self.0 += other.0;
            }
        }
        impl SubAssign for $name {
            fn sub_assign(&mut self, other: Self) {
                self.0 -= other.0;
            }
        }
        impl Sum for $name {
            fn sum<I: Iterator<Item = Self>>(items: I) -> Self {
                Self(items.map(|item| item.0).sum())
            }
        }
        impl $name {
            /// The difference, or 0 where `other` is larger.
            #[must_use]
            pub const fn saturating_sub(self, other: Self) -> Self {
                Self(self.0.saturating_sub(other.0))
            }
        }
    };
}
count!(PageCount);
count!(Bytes);

/// A process or thread id, as this process's pid namespace numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct Pid(pub i32);

impl Pid {
    /// The calling process.
    #[must_use]
    pub fn this() -> Self {
        Self(rustix::process::getpid().as_raw_nonzero().get())
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> i32 {
        self.0
    }

    /// For rustix; `None` where the number is not positive, i.e. names no process.
    pub(crate) fn to_rustix(self) -> Option<rustix::process::Pid> {
        if self.0 > 0 { rustix::process::Pid::from_raw(self.0) } else { None }
    }
}

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Why two addresses are no range of whole pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RangeError {
    /// One of the ends is not the first byte of a page.
    #[error("{start:x}-{end:x} does not start and end at page boundaries")]
    Unaligned {
        /// First byte.
        start: u64,
        /// Byte behind the last.
        end: u64,
    },
    /// The end lies before the start, or behind the end of the address space.
    #[error("{start:x}-{end:x} ends before it starts")]
    Reversed {
        /// First byte.
        start: u64,
        /// Byte behind the last.
        end: u64,
    },
}

/// Whole pages from `start` up to, not including, `end`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(C)]
pub struct Range {
    start: Vaddr,
    end: Vaddr,
}

impl Range {
    /// A range between two page boundaries; it may be empty.
    ///
    /// # Errors
    /// If an end is not page-aligned or the range is reversed.
    pub fn new(start: Vaddr, end: Vaddr) -> Result<Self, RangeError> {
        let (first, last) = (start.0, end.0);
        if !start.is_page_aligned() || !end.is_page_aligned() {
            return Err(RangeError::Unaligned { start: first, end: last });
        }
        if first > last {
            return Err(RangeError::Reversed { start: first, end: last });
        }
        Ok(Self { start, end })
    }

    /// `pages` pages from `start` on.
    ///
    /// # Errors
    /// If `start` is not page-aligned or the range leaves the address space.
    pub fn from_pages(start: Vaddr, pages: PageCount) -> Result<Self, RangeError> {
        let end = pages
            .0
            .checked_mul(page_size())
            .and_then(|bytes| start.0.checked_add(bytes))
            .ok_or(RangeError::Reversed { start: start.0, end: 0 })?;
        Self::new(start, Vaddr(end))
    }

    /// The whole pages that hold any byte of `start` up to `end`.
    ///
    /// # Errors
    /// If the range is reversed or its last page is the last of the address space.
    pub fn covering(start: Vaddr, end: Vaddr) -> Result<Self, RangeError> {
        let up =
            end.0.checked_next_multiple_of(page_size()).ok_or(RangeError::Reversed { start: start.0, end: end.0 })?;
        Self::new(start.page_start(), Vaddr(up))
    }

    /// First byte.
    #[must_use]
    pub const fn start(&self) -> Vaddr {
        self.start
    }

    /// Byte behind the last.
    #[must_use]
    pub const fn end(&self) -> Vaddr {
        self.end
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> Bytes {
        self.end - self.start
    }

    /// Length in pages.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        self.len().pages()
    }

    /// True if the range has no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// True if `address` lies in the range.
    #[must_use]
    pub fn contains(&self, address: Vaddr) -> bool {
        self.start <= address && address < self.end
    }

    /// True if all of `other` lies in the range.
    #[must_use]
    pub fn contains_range(&self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The pages that both ranges have, `None` where there are none.
    #[must_use]
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end.min(other.end);
        (start < end).then_some(Self { start, end })
    }

    /// The first byte of each page.
    pub fn page_addresses(&self) -> impl DoubleEndedIterator<Item = Vaddr> + ExactSizeIterator + use<> {
        let (start, size) = (self.start.0, page_size());
        (0..self.pages().0 as usize).map(move |page| Vaddr(start + page as u64 * size))
    }

    /// The same pages in pieces of at most `length`; a rest of a page in `length` is dropped, 0 counts as one page.
    pub fn pieces(&self, length: Bytes) -> impl Iterator<Item = Self> + use<> {
        let (mut at, end) = (self.start, self.end);
        let step = length.pages().0.max(1) * page_size();
        std::iter::from_fn(move || {
            if at == end {
                return None;
            }
            let next = Vaddr(at.0.checked_add(step).map_or(end.0, |next| next.min(end.0)));
            let piece = Self { start: at, end: next };
            at = next;
            Some(piece)
        })
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{:x}", self.start.0, self.end.0)
    }
}

impl fmt::Debug for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn range(start: u64, end: u64) -> Range {
        Range::new(Vaddr(start * page_size()), Vaddr(end * page_size())).unwrap()
    }

    #[test]
    fn only_whole_pages_make_a_range() {
        assert!(matches!(Range::new(Vaddr(1), Vaddr(page_size())), Err(RangeError::Unaligned { .. })));
        assert!(matches!(Range::new(Vaddr(page_size()), Vaddr(0)), Err(RangeError::Reversed { .. })));
        assert!(Range::from_pages(Vaddr(0), PageCount(u64::MAX)).is_err());
        assert_eq!(Range::covering(Vaddr(1), Vaddr(page_size() + 1)).unwrap(), range(0, 2));
    }

    #[test]
    fn intersection_and_pieces() {
        assert_eq!(range(1, 5).intersect(&range(3, 9)), Some(range(3, 5)));
        assert_eq!(range(1, 3).intersect(&range(3, 9)), None);
        let pieces: Vec<_> = range(1, 8).pieces(PageCount(3).bytes()).collect();
        assert_eq!(pieces, [range(1, 4), range(4, 7), range(7, 8)]);
        assert_eq!(range(1, 8).page_addresses().count(), 7);
        assert_eq!(range(1, 2).to_string(), format!("{:x}-{:x}", page_size(), 2 * page_size()));
    }
}
