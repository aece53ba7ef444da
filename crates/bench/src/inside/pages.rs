//! Memory whose every byte is known.

use anyhow::{Context as _, Result};
use kernel::{PageCount, Pagemap, PagemapEntry, Pid, maps};
use pagefold::{Range, page_size, whole_pages};

/// What belongs on a page: the same bytes for the same two numbers, and for no others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Content {
    /// Which of several contents of a whole area.
    pub(super) kind: u64,
    /// Which page of the area.
    pub(super) page: u64,
}

impl Content {
    /// The words of the page (xorshift64).
    fn words(self) -> impl Iterator<Item = [u8; 8]> {
        let mut state = (self.kind << 32 | self.page).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        std::iter::repeat_with(move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
    }

    pub(super) fn fill(self, page: &mut [u8]) {
        page.chunks_exact_mut(8).zip(self.words()).for_each(|(bytes, word)| bytes.copy_from_slice(&word));
    }

    pub(super) fn is_on(self, page: &[u8]) -> bool {
        page.chunks_exact(8).zip(self.words()).all(|(bytes, word)| bytes == word)
    }
}

/// Fills neighbouring pages with an area's pages from `first` on.
pub(super) fn fill(memory: &mut [u8], kind: u64, first: u64) {
    memory.chunks_exact_mut(size()).zip(first..).for_each(|(bytes, page)| Content { kind, page }.fill(bytes));
}

/// Pages that do not hold what they should.
pub(super) fn wrong(memory: &[u8], kind: u64, first: u64) -> u64 {
    let pages = memory.chunks_exact(size()).zip(first..);
    pages.map(|(bytes, page)| u64::from(!Content { kind, page }.is_on(bytes))).sum()
}

/// The size of a page, as slices want it.
pub(super) fn size() -> usize {
    usize::try_from(page_size()).unwrap_or(4096)
}

/// Whole pages of the heap, in a mapping of their own when they are many.
pub(super) struct Pages {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Pages {
    /// So many pages of zeros.
    pub(super) fn new(pages: usize) -> Result<Self> {
        // One page more for alignment, and one that is never merged, since it is the last of its range.
        let bytes = vec![0_u8; (pages + 2) * size()];
        let whole = whole_pages(&bytes).context("memory without a whole page")?;
        let start = usize::try_from(whole.start().get())? - bytes.as_ptr().addr();
        Ok(Self { bytes, start, length: pages * size() })
    }

    /// Pages that hold an area of a kind.
    pub(super) fn filled(pages: usize, kind: u64) -> Result<Self> {
        let mut filled = Self::new(pages)?;
        fill(filled.bytes_mut(), kind, 0);
        Ok(filled)
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }

    /// What to merge: these pages and the one behind them, so that all of these can be merged.
    pub(super) fn range(&self) -> Result<Range> {
        let whole = whole_pages(&self.bytes).context("memory without a whole page")?;
        Ok(Range::from_pages(whole.start(), PageCount((self.length / size() + 1) as u64))?)
    }

    /// How many of these pages are pages of a store at this moment.
    pub(super) fn stored(&self) -> Result<u64> {
        let pagemap = Pagemap::open(Pid::this())?;
        let mut sum = 0;
        let range = self.range()?;
        for vma in maps::read(Pid::this())? {
            let store = !vma.shared && vma.name.as_encoded_bytes().starts_with(b"/memfd:pagefold");
            let Some(part) = vma.range.intersect(&range).filter(|part| store && !part.is_empty()) else { continue };
            let mut entries = vec![PagemapEntry(0); usize::try_from(part.pages().get())?];
            pagemap.entries(part.start(), &mut entries)?;
            // A page of the store that was not touched yet is not there.
            sum += entries.iter().filter(|entry| entry.file_or_shared() || !entry.present()).count() as u64;
        }
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn one_wrong_byte_is_found() {
        let mut pages = Pages::filled(5, 3).unwrap();
        assert_eq!(wrong(pages.bytes(), 3, 0), 0);
        assert_eq!(wrong(pages.bytes(), 4, 0), 5);
        assert_eq!(wrong(pages.bytes(), 3, 1), 5);
        let last = pages.bytes().len() - 1;
        pages.bytes_mut()[last] ^= 1;
        assert_eq!(wrong(pages.bytes(), 3, 0), 1);
        assert_eq!(pages.range().unwrap().pages().get(), 6);
        assert_eq!(pages.stored().unwrap(), 0);
    }
}
