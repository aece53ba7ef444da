//! The victim's side: a process with the agent inside that does something hazardous to its merged memory.
//!
//! It talks to the test by lines: `merge` asks for a merge now, `dense` for merges without end. A victim that panics
//! ends with status 101, and its output is in the test's failure.

use std::io::Write as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// A victim's name and what it does.
pub(crate) type Victim = (&'static str, fn());

/// Bytes of a page.
pub(crate) fn page() -> usize {
    usize::try_from(kernel::page_size()).expect("a page is small")
}

/// A line to the test.
pub(crate) fn tell(line: &str) {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
}

/// The test's next line. One thread talks at a time.
pub(crate) fn hear() -> String {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap();
    let mut line = String::new();
    let mut byte = [0_u8; 1];
    // SAFETY: reads one byte into `byte`.
    while unsafe { libc::read(0, byte.as_mut_ptr().cast(), 1) } == 1 && byte[0] != b'\n' {
        line.push(byte[0] as char);
    }
    line
}

pub(crate) fn pid() -> i32 {
    // SAFETY: reads an id.
    unsafe { libc::getpid() }
}

/// The error number of the last call that failed.
pub(crate) fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Merges everything that this process has handed over; returns how many pages that were.
pub(crate) fn merge_now() -> u64 {
    tell(&format!("merge {}", pid()));
    hear().parse().expect("the test answers with a number")
}

/// As [`merge_now`], for one range.
pub(crate) fn merge_range(start: usize, end: usize) -> u64 {
    tell(&format!("merge {} {start} {end}", pid()));
    hear().parse().expect("the test answers with a number")
}

/// From here on the test merges without end.
pub(crate) fn merge_densely() {
    tell(&format!("dense {}", pid()));
}

/// The content that stands for a number; 0 is the zero page.
pub(crate) fn pattern(seed: u64) -> Vec<u64> {
    let words = page() / 8;
    if seed == 0 {
        return vec![0; words];
    }
    (0..words as u64).map(|word| seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(word)).collect()
}

/// Private anonymous memory of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) start: usize,
    pub(crate) pages: usize,
}

impl Region {
    pub(crate) fn map(pages: usize) -> Self {
        Self::map_with(pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
    }

    pub(crate) fn map_with(pages: usize, flags: i32) -> Self {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a free place of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), pages * page(), prot, flags, -1, 0) };
        assert!(start != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Self { start: start as usize, pages }
    }

    pub(crate) fn len(&self) -> usize {
        self.pages * page()
    }

    pub(crate) fn end(&self) -> usize {
        self.start + self.len()
    }

    pub(crate) fn address(&self, index: usize) -> usize {
        self.start + index * page()
    }

    pub(crate) fn pointer(&self, index: usize) -> *mut libc::c_void {
        self.address(index) as *mut libc::c_void
    }

    pub(crate) fn part(&self, from: usize, to: usize) -> Self {
        Self { start: self.address(from), pages: to - from }
    }

    /// Fills a page with the content of `seed`.
    pub(crate) fn fill(&self, index: usize, seed: u64) {
        let content = pattern(seed);
        // SAFETY: a page of this region, mapped writable by the victim.
        unsafe { std::ptr::copy_nonoverlapping(content.as_ptr(), self.address(index) as *mut u64, content.len()) };
    }

    /// Fills every page `i` with the content of `first + i`.
    pub(crate) fn fill_from(&self, first: u64) {
        (0..self.pages).for_each(|index| self.fill(index, first + index as u64));
    }

    /// The bytes of a page, as they are now.
    pub(crate) fn read(&self, index: usize) -> Vec<u64> {
        let words = page() / 8;
        // SAFETY: a page of this region, mapped readable by the victim.
        (0..words).map(|word| unsafe { (self.address(index) as *const u64).add(word).read_volatile() }).collect()
    }

    pub(crate) fn holds(&self, index: usize, seed: u64) -> bool {
        self.read(index) == pattern(seed)
    }

    /// Every byte of every page must be that of `first + i`.
    pub(crate) fn check_from(&self, first: u64) {
        for index in 0..self.pages {
            let seed = first + index as u64;
            assert!(self.holds(index, seed), "page {index} should hold {seed}: {}", self.describe(index));
        }
    }

    /// Every byte must be zero.
    pub(crate) fn check_zero(&self) {
        for index in 0..self.pages {
            assert!(self.holds(index, 0), "page {index} is not zero: {}", self.describe(index));
        }
    }

    fn describe(&self, index: usize) -> String {
        let words = self.read(index);
        let seed = (1..4096).find(|seed| words == pattern(*seed));
        format!("{:#x}, first words {:x?}, content of {seed:?}", self.address(index), &words[..2])
    }

    pub(crate) fn advise(&self, advice: i32) -> i32 {
        // SAFETY: the victim's own memory; what the advice does to it is what is tested.
        let result = unsafe { libc::madvise(self.pointer(0), self.len(), advice) };
        if result == 0 { 0 } else { errno() }
    }

    pub(crate) fn protect(&self, prot: i32) -> i32 {
        // SAFETY: the victim's own memory.
        let result = unsafe { libc::mprotect(self.pointer(0), self.len(), prot) };
        if result == 0 { 0 } else { errno() }
    }

    pub(crate) fn unmap(self) {
        // SAFETY: the victim's own memory, not used afterwards.
        let result = unsafe { libc::munmap(self.pointer(0), self.len()) };
        assert_eq!(result, 0, "munmap: {}", std::io::Error::last_os_error());
    }

    pub(crate) fn mergeable(&self) {
        assert_eq!(self.advise(libc::MADV_MERGEABLE), 0);
    }

    /// Pages of this region that are the store's: in its mapping and not written since.
    pub(crate) fn merged(&self) -> usize {
        let stored = self.stored();
        let clean = |index: &usize| {
            let entry = pagemap(self.address(*index));
            entry >> 63 == 0 || entry >> 61 & 1 == 1
        };
        stored.into_iter().filter(clean).count()
    }

    /// Pages of this region in a mapping of the store, clean or diverged.
    pub(crate) fn stored(&self) -> Vec<usize> {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("proc is mounted");
        let mut stored = Vec::new();
        for line in maps.lines().filter(|line| line.contains("/memfd:pagefold") && line.contains("p ")) {
            let (from, rest) = line.split_once('-').expect("a line of maps");
            let to = rest.split(' ').next().expect("a line of maps");
            let from = usize::from_str_radix(from, 16).expect("an address").max(self.start);
            let to = usize::from_str_radix(to, 16).expect("an address").min(self.end());
            if from < to && line.split(' ').nth(1).is_some_and(|flags| flags.starts_with("rw") || flags.ends_with('p'))
            {
                stored.extend((from..to).step_by(page()).map(|address| (address - self.start) / page()));
            }
        }
        stored
    }

    /// Waits until at least `pages` of the region are merged.
    pub(crate) fn wait_merged(&self, pages: usize) {
        wait_until(&format!("{pages} of {} pages are merged", self.pages), || self.merged() >= pages);
    }
}

/// The pagemap entry of an address of this process.
pub(crate) fn pagemap(address: usize) -> u64 {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::File::open("/proc/self/pagemap").expect("proc is mounted");
    let mut entry = [0; 8];
    let _ = file.read_at(&mut entry, (address / page() * 8) as u64);
    u64::from_ne_bytes(entry)
}

/// Two regions of equal content, handed over and merged: the first is the one to play with. Their last pages stay
/// plain, as a mapping's last page always does.
pub(crate) fn merged_pair(pages: usize, first: u64) -> (Region, Region) {
    let (one, two) = (Region::map(pages), Region::map(pages));
    one.fill_from(first);
    two.fill_from(first);
    merge_pair(one, two);
    (one, two)
}

/// A merged region whose pages have twins with either of two contents, `first + i` and `first + pages + i`, and the region
/// of the twins. From here on the test merges without end.
pub(crate) fn two_contents(pages: usize, first: u64) -> (Region, Region) {
    let (one, two) = (Region::map(pages), Region::map(2 * pages));
    one.fill_from(first);
    two.fill_from(first);
    merge_pair(one, two.part(0, pages));
    two.part(pages, 2 * pages).mergeable();
    merge_densely();
    (one, two)
}

/// Hands two equal regions over and has them merged.
pub(crate) fn merge_pair(one: Region, two: Region) {
    one.mergeable();
    two.mergeable();
    // A page that was written a moment ago lies in a CPU's LRU batch and counts as held until that is drained.
    for _ in 0..400 {
        merge_now();
        // Side by side the two are one mapping, with one last page.
        if one.merged() + 1 >= one.pages && two.merged() + 1 >= two.pages {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("{} and {} of {} pages are merged", one.merged(), two.merged(), one.pages);
}

/// Waits for something that must come.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(20), "not within 20 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A small generator: victims need no better one.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }
}

/// Forks; the child runs `child` and ends with 0 if it returns, 101 if it panics. Returns the child's id.
pub(crate) fn fork(child: impl FnOnce()) -> i32 {
    // SAFETY: victims that fork run the child's part with async-signal-safe and std calls that hold no lock here.
    let id = unsafe { libc::fork() };
    assert!(id >= 0, "fork: {}", std::io::Error::last_os_error());
    if id == 0 {
        end_with(child);
    }
    id
}

/// Runs something and ends the process.
pub(crate) fn end_with(run: impl FnOnce()) -> ! {
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run));
    let _ = std::io::stdout().flush();
    // SAFETY: ends the process.
    unsafe { libc::_exit(if result.is_ok() { 0 } else { 101 }) }
}

/// Waits for a child; it must have ended with 0.
pub(crate) fn reap(id: i32) {
    let mut status = 0;
    // SAFETY: the kernel writes the status.
    let got = unsafe { libc::waitpid(id, &raw mut status, 0) };
    assert_eq!(got, id, "waitpid: {}", std::io::Error::last_os_error());
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "the child ended with {status:#x}");
}

/// The flags in smaps of the mapping at an address.
pub(crate) fn flags_at(address: usize) -> String {
    field_at(address, "VmFlags:")
}

/// A line in smaps of the mapping at an address.
pub(crate) fn field_at(address: usize, field: &str) -> String {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        if let Some((from, to)) = line.split_once(' ').and_then(|(range, _)| range.split_once('-'))
            && let (Ok(from), Ok(to)) = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
        {
            inside = (from..to).contains(&address);
        } else if inside && line.starts_with(field) {
            return line.to_owned();
        }
    }
    String::new()
}
