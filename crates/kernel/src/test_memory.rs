//! Memory of a test's own, which it may treat as it likes.

#![allow(clippy::unwrap_used, reason = "tests")]

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::units::{PageCount, Range, Vaddr, page_size};

/// Private anonymous memory.
pub(crate) struct Anonymous {
    range: Range,
}

impl Anonymous {
    pub(crate) fn new(pages: PageCount) -> Self {
        Self::with_flags(pages, MapFlags::empty())
    }

    pub(crate) fn with_flags(pages: PageCount, flags: MapFlags) -> Self {
        let length = pages.bytes().0 as usize;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses the address, so no existing memory is touched.
        let pointer =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), length, prot, MapFlags::PRIVATE | flags) }
                .unwrap();
        let start = Vaddr(pointer.expose_provenance() as u64);
        Self { range: Range::from_pages(start, pages).unwrap() }
    }

    pub(crate) fn range(&self) -> Range {
        self.range
    }

    pub(crate) fn page(&self, index: u64) -> Range {
        Range::from_pages(self.range.start() + PageCount(index), PageCount(1)).unwrap()
    }

    pub(crate) fn pointer(&self) -> *mut u8 {
        std::ptr::with_exposed_provenance_mut(self.range.start().0 as usize)
    }

    /// Writes the first byte of every page.
    pub(crate) fn fill(&self, byte: u8) {
        for page in 0..self.range.pages().0 {
            self.write(page * page_size(), byte);
        }
    }

    pub(crate) fn write(&self, offset: u64, byte: u8) {
        assert!(offset < self.range.len().0);
        // SAFETY: the offset lies in our mapping, which nobody holds references into.
        unsafe { self.pointer().add(offset as usize).write_volatile(byte) };
    }

    pub(crate) fn read(&self, offset: u64) -> u8 {
        assert!(offset < self.range.len().0);
        // SAFETY: the offset lies in our mapping.
        unsafe { self.pointer().add(offset as usize).read_volatile() }
    }

    pub(crate) fn advise(&self, advice: Advice) {
        // SAFETY: the range is our mapping, which nobody holds references into.
        unsafe { rustix::mm::madvise(self.pointer().cast(), self.range.len().0 as usize, advice) }.unwrap();
    }
}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: the range is our mapping, which nobody holds references into.
        unsafe { rustix::mm::munmap(self.pointer().cast(), self.range.len().0 as usize) }.unwrap();
    }
}
