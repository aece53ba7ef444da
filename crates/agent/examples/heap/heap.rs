//! The allocator's side: blocks that are allocated, grown, shrunk, handed to other threads and freed, whoever the
//! allocator is (the C library's, or one that is preloaded). Nothing is marked: for `--scope all`.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use crate::{COUNTS, Dice, OVER, deeds, fail};

const PAGE: usize = 4096;

/// Different contents: so few that most pages have twins, in this process and in others.
const CONTENTS: u64 = 6;
/// Bytes that a worker holds at most.
const HELD_MAX: usize = 20 << 20;

/// How a block was had, and so how it is given back.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    Malloc,
    Mmap,
}

/// Memory of one owner, who knows all of its bytes.
pub(crate) struct Block {
    start: *mut u64,
    words: usize,
    content: u64,
    origin: Origin,
}

// SAFETY: memory of the whole process, with one owner at a time.
unsafe impl Send for Block {}

/// Blocks on their way from the thread that allocated them to one that frees them.
pub(crate) static ORPHANS: Mutex<Vec<Block>> = Mutex::new(Vec::new());

fn word(content: u64, index: usize) -> u64 {
    (index as u64 ^ content << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ content
}

impl Block {
    /// From the allocator, in one of the ways that it has.
    pub(crate) fn allocate(dice: &mut Dice) -> Self {
        let words = size(dice) / 8;
        let bytes = words * 8;
        // SAFETY: sizes are not 0, alignments are powers of two that divide the size where that is wanted.
        let start = unsafe {
            match dice.below(4) {
                0 => libc::calloc(words, 8),
                1 => libc::aligned_alloc(64, bytes.next_multiple_of(64)),
                2 => {
                    let mut start = std::ptr::null_mut();
                    assert_eq!(libc::posix_memalign(&raw mut start, PAGE, bytes), 0);
                    start
                }
                _ => libc::malloc(bytes),
            }
        };
        assert!(!start.is_null(), "no memory");
        let mut block = Self { start: start.cast(), words, content: 0, origin: Origin::Malloc };
        block.write(dice);
        block
    }

    /// Zeroes from the allocator, which must be some however they were used before.
    fn zeroed(dice: &mut Dice) -> Self {
        let words = size(dice) / 8;
        // SAFETY: a size that is not 0.
        let start: *mut u64 = unsafe { libc::calloc(words, 8) }.cast();
        assert!(!start.is_null(), "no memory");
        // SAFETY: allocated just now, of this size.
        if unsafe { std::slice::from_raw_parts(start, words) }.iter().any(|word| *word != 0) {
            fail("fresh memory of calloc is not zero");
        }
        let mut block = Self { start, words, content: 0, origin: Origin::Malloc };
        block.write(dice);
        block
    }

    fn mapped(dice: &mut Dice) -> Self {
        let bytes = PAGE * (1 + dice.below(128) as usize);
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a place of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        let mut block = Self { start: start.cast(), words: bytes / 8, content: 0, origin: Origin::Mmap };
        if block.all().iter().any(|word| *word != 0) {
            fail("fresh memory of mmap is not zero");
        }
        block.write(dice);
        block
    }

    fn bytes(&self) -> usize {
        self.words * 8
    }

    fn all(&mut self) -> &mut [u64] {
        // SAFETY: the block's own memory, of which there is one owner.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.words) }
    }

    fn write(&mut self, dice: &mut Dice) {
        self.content = dice.below(CONTENTS);
        let content = self.content;
        self.all().iter_mut().enumerate().for_each(|(index, place)| *place = word(content, index));
    }

    fn fill(&mut self, from: usize, to: usize) {
        let content = self.content;
        self.all()[from..to].iter_mut().enumerate().for_each(|(index, place)| *place = word(content, from + index));
    }

    pub(crate) fn check(&mut self, when: &str) {
        self.check_first(self.words, when);
        COUNTS.pages_checked.fetch_add(self.bytes().div_ceil(PAGE) as u64, SeqCst);
    }

    fn check_first(&mut self, words: usize, when: &str) {
        let (content, start) = (self.content, self.start);
        let wrong = self.all()[..words].iter().enumerate().find(|(index, found)| **found != word(content, *index));
        if let Some((index, found)) = wrong {
            fail(&format!(
                "{when}: word {index} of {words} at {start:?} is {found:#x}, not {:#x}",
                word(content, index)
            ));
        }
    }

    fn check_zero(&mut self, from: usize, to: usize, when: &str) {
        if let Some(index) = self.all()[from..to].iter().position(|word| *word != 0) {
            fail(&format!("{when}: word {} at {:?} is not zero", from + index, self.start));
        }
    }

    fn resize(&mut self, dice: &mut Dice) {
        self.check("before realloc");
        let common = match self.origin {
            Origin::Malloc => {
                let words = size(dice) / 8;
                // SAFETY: a block of the allocator's; the old address is not used any more.
                let start = unsafe { libc::realloc(self.start.cast(), words * 8) };
                assert!(!start.is_null(), "no memory");
                let common = words.min(self.words);
                (self.start, self.words) = (start.cast(), words);
                common
            }
            Origin::Mmap => {
                let bytes = PAGE * (1 + dice.below(160) as usize);
                // SAFETY: a mapping of its own; the old address is not used any more.
                let start = unsafe { libc::mremap(self.start.cast(), self.words * 8, bytes, libc::MREMAP_MAYMOVE) };
                if start == libc::MAP_FAILED {
                    let error = std::io::Error::last_os_error();
                    // As it may while no helper lives that could give pages back.
                    if error.raw_os_error() == Some(libc::ENOMEM) {
                        refused("mremap");
                        return;
                    }
                    fail(&format!("mremap: {error}"));
                }
                COUNTS.remaps.fetch_add(1, SeqCst);
                let common = (bytes / 8).min(self.words);
                (self.start, self.words) = (start.cast(), bytes / 8);
                let words = self.words;
                self.check_zero(common, words, "behind what was grown");
                common
            }
        };
        self.check_first(common, "after realloc");
        let words = self.words;
        self.fill(common, words);
    }

    /// What allocators do to memory that they keep.
    fn advise(&mut self, dice: &mut Dice) {
        let (mut from, pages) = (0, self.words * 8 / PAGE);
        if self.origin != Origin::Mmap || pages == 0 {
            return;
        }
        from += dice.below(pages as u64) as usize;
        let count = 1 + dice.below((pages - from) as u64) as usize;
        let (first, last) = (from * PAGE / 8, (from + count) * PAGE / 8);
        let advice = [libc::MADV_DONTNEED, libc::MADV_FREE, libc::MADV_COLD][dice.below(3) as usize];
        // SAFETY: whole pages of the block.
        let done = unsafe { libc::madvise(self.start.add(first).cast(), count * PAGE, advice) };
        if done != 0 {
            refused(&format!("madvise {advice}"));
            return;
        }
        match advice {
            libc::MADV_DONTNEED => self.check_zero(first, last, "after DONTNEED"),
            // Old or zero, page by page, until it is written.
            libc::MADV_FREE => {
                let content = self.content;
                for page in from..from + count {
                    let words = page * PAGE / 8..(page + 1) * PAGE / 8;
                    let start = words.start;
                    let found = &self.all()[words];
                    let old = found.iter().enumerate().all(|(index, found)| *found == word(content, start + index));
                    if !old && found.iter().any(|word| *word != 0) {
                        fail("a page after FREE is neither what it was nor zero");
                    }
                }
            }
            _ => {}
        }
        self.fill(first, last);
        self.check("after advice");
    }

    fn protect(&mut self) {
        if self.origin != Origin::Mmap {
            return;
        }
        for prot in [libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE] {
            // SAFETY: a mapping of its own, read only meanwhile.
            if unsafe { libc::mprotect(self.start.cast(), self.words * 8, prot) } != 0 {
                fail(&format!("mprotect: {}", std::io::Error::last_os_error()));
            }
            self.check("while protected");
        }
    }

    pub(crate) fn free(mut self) {
        self.check("before it is freed");
        // SAFETY: nobody uses it any more.
        unsafe {
            match self.origin {
                Origin::Malloc => libc::free(self.start.cast()),
                Origin::Mmap => {
                    if libc::munmap(self.start.cast(), self.words * 8) != 0 {
                        fail(&format!("munmap: {}", std::io::Error::last_os_error()));
                    }
                }
            }
        }
    }
}

/// Small ones, some pages, and now and then what the C library maps for itself.
fn size(dice: &mut Dice) -> usize {
    let limit = [512, 8 << 10, 100 << 10, 1 << 20][(dice.below(12) as usize / 3).min(3)];
    (16 + dice.below(limit) as usize).next_multiple_of(8)
}

/// A worker.
pub(crate) struct Heap {
    pub(crate) blocks: Vec<Block>,
    pub(crate) dice: Dice,
    /// Its mutexes have priority inheritance. One program of four: nothing is merged in it any more.
    pub(crate) lends: bool,
}

impl Heap {
    pub(crate) fn new(seed: u64) -> Self {
        Self { blocks: Vec::new(), dice: Dice::new(seed), lends: false }
    }

    /// Mostly one of the youngest: what is old is to settle and be merged.
    fn any(&mut self) -> Option<usize> {
        let count = self.blocks.len() as u64;
        let among = if self.dice.below(6) == 0 { count } else { count.min(8) };
        (count > 0).then(|| (count - 1 - self.dice.below(among)) as usize)
    }

    pub(crate) fn step(&mut self) {
        let held: usize = self.blocks.iter().map(Block::bytes).sum();
        match self.dice.below(20) {
            0..=4 if held < HELD_MAX => self.blocks.push(Block::allocate(&mut self.dice)),
            5 if held < HELD_MAX => self.blocks.push(Block::zeroed(&mut self.dice)),
            6 | 7 if held < HELD_MAX => self.blocks.push(Block::mapped(&mut self.dice)),
            0..=10 => {
                if let Some(at) = self.any() {
                    self.blocks.remove(at).free();
                }
                // In a child it may be locked by a thread that is not there.
                if let Some(orphan) = ORPHANS.try_lock().ok().and_then(|mut orphans| orphans.pop()) {
                    orphan.free();
                }
            }
            11..=13 => self.with_any(Block::resize),
            14 => self.with_any(Block::write),
            15 => self.with_any(Block::advise),
            16 => self.with_any(|block, _| block.protect()),
            _ => self.with_any(|block, _| block.check("looked at")),
        }
    }

    fn with_any(&mut self, act: impl FnOnce(&mut Block, &mut Dice)) {
        if let Some(at) = self.any() {
            act(&mut self.blocks[at], &mut self.dice);
        }
    }

    pub(crate) fn check_all(&mut self, when: &str) {
        self.blocks.iter_mut().for_each(|block| block.check(when));
    }
}

/// Until it is over.
pub(crate) fn run(seed: u64, beat: &AtomicU64) {
    let mut heap = Heap::new(seed);
    heap.lends = (seed / 100).is_multiple_of(4);
    while !OVER.load(SeqCst) {
        for _ in 0..heap.dice.below(40) {
            heap.step();
            COUNTS.operations.fetch_add(1, SeqCst);
            beat.fetch_add(1, SeqCst);
        }
        if heap.dice.below(3) == 0 {
            deeds::one(&mut heap);
            beat.fetch_add(1, SeqCst);
        }
        let pause = if heap.dice.below(8) == 0 { 250 } else { 8 };
        std::thread::sleep(Duration::from_millis(heap.dice.below(pause)));
    }
    heap.check_all("at the end");
    heap.blocks.into_iter().for_each(Block::free);
}

/// A call failed that needs a helper. The soak knows when that may be.
pub(crate) fn refused(what: &str) {
    let error = std::io::Error::last_os_error();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let stored: Vec<_> = maps.lines().filter(|line| line.contains("/memfd:pagefold")).collect();
    eprintln!("heap {}: {what} is refused: {error}; {} mappings of the store", std::process::id(), stored.len());
    // Which would not come back is half of the answer to why.
    stored.iter().take(4).for_each(|line| eprintln!("heap {}: {line}", std::process::id()));
    COUNTS.refused.fetch_add(1, SeqCst);
}

/// For `--for MS`: a program that is executed by one of these and soon over.
pub(crate) fn brief(seed: u64, milliseconds: u64) {
    let mut heap = Heap::new(seed);
    let until = std::time::Instant::now() + Duration::from_millis(milliseconds);
    while std::time::Instant::now() < until {
        (0..50).for_each(|_| heap.step());
        std::thread::sleep(Duration::from_millis(5));
    }
    heap.check_all("at the end of a brief program");
}
