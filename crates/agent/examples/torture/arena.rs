//! Memory whose every word follows from a number for its page.

use std::sync::atomic::Ordering::SeqCst;

use crate::{COUNTS, Dice, fail};

pub(crate) const PAGE: usize = 4096;
pub(crate) const WORDS: usize = PAGE / 8;
/// The page holds zeros.
pub(crate) const ZERO: u64 = 0;
/// Contents that many pages share have the numbers below.
pub(crate) const COMMON: u64 = 24;

/// The word at an index of a page with a number.
pub(crate) fn word(id: u64, index: usize) -> u64 {
    if id == ZERO { 0 } else { id.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index as u64 }
}

/// A whole page.
pub(crate) fn content(id: u64) -> Vec<u8> {
    (0..WORDS).flat_map(|index| word(id, index).to_ne_bytes()).collect()
}

impl Dice {
    /// Mostly contents that others have too.
    pub(crate) fn id(&mut self) -> u64 {
        if self.below(16) == 0 { 1000 + self.below(1 << 40) } else { self.below(COMMON) }
    }
}

/// A managed mapping with one owner.
pub(crate) struct Arena {
    start: *mut u8,
    pub(crate) expected: Vec<u64>,
}

// SAFETY: the memory belongs to the value.
unsafe impl Send for Arena {}

impl Arena {
    /// Maps pages and hands them over.
    pub(crate) fn new(pages: usize) -> Self {
        // SAFETY: a fresh mapping.
        let start = unsafe {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), pages * PAGE, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        if start == libc::MAP_FAILED {
            fail("mmap");
        }
        let arena = Self { start: start.cast(), expected: vec![ZERO; pages] };
        arena.hand_over();
        arena
    }

    pub(crate) fn hand_over(&self) {
        self.advise(0, self.pages(), libc::MADV_NOHUGEPAGE);
        self.advise(0, self.pages(), libc::MADV_MERGEABLE);
    }

    pub(crate) fn pages(&self) -> usize {
        self.expected.len()
    }

    pub(crate) fn page(&self, page: usize) -> *mut u8 {
        assert!(page <= self.pages());
        // SAFETY: inside the mapping, or its end.
        unsafe { self.start.add(page * PAGE) }
    }

    pub(crate) fn moved_to(&mut self, start: *mut u8, pages: usize) {
        self.start = start;
        self.expected.resize(pages, ZERO);
    }

    pub(crate) fn write(&mut self, page: usize, id: u64) {
        let words = self.page(page).cast::<u64>();
        for index in 0..WORDS {
            // SAFETY: inside the page.
            unsafe { words.add(index).write_volatile(word(id, index)) };
        }
        self.expected[page] = id;
    }

    pub(crate) fn check(&self, page: usize, when: &str) {
        let (words, id) = (self.page(page).cast::<u64>(), self.expected[page]);
        for index in 0..WORDS {
            // SAFETY: inside the page.
            let got = unsafe { words.add(index).read_volatile() };
            if got != word(id, index) {
                fail(&format!("wrong at {words:p} word {index}: {got:#x}, not {:#x} of {id}, {when}", word(id, index)));
            }
        }
        COUNTS.pages_checked.fetch_add(1, SeqCst);
    }

    pub(crate) fn check_all(&self, when: &str) {
        (0..self.pages()).for_each(|page| self.check(page, when));
    }

    pub(crate) fn advise(&self, from: usize, to: usize, advice: i32) -> bool {
        // SAFETY: the owner's own memory.
        unsafe { libc::madvise(self.page(from).cast(), (to - from) * PAGE, advice) == 0 }
    }

    pub(crate) fn protect(&self, from: usize, to: usize, prot: i32) {
        // SAFETY: the owner's own memory, which it does not write meanwhile.
        if unsafe { libc::mprotect(self.page(from).cast(), (to - from) * PAGE, prot) } != 0 {
            fail("mprotect");
        }
    }

    /// Fresh memory in the place of pages.
    pub(crate) fn map_anew(&mut self, from: usize, to: usize) {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: replaces the owner's own memory.
        let start = unsafe {
            libc::mmap(self.page(from).cast(), (to - from) * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        if start == libc::MAP_FAILED {
            fail("mmap over a part");
        }
        self.expected[from..to].fill(ZERO);
        self.hand_over();
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: mapped by this value, or moved.
        unsafe { libc::munmap(self.start.cast(), self.pages() * PAGE) };
    }
}
