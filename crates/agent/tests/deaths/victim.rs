//! The program under management: threads that read, write and check all the time, and a main thread that obeys.

use std::ffi::c_void;
use std::io::{BufRead as _, Write as _};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::raw_fork::raw_fork;

/// Pages of one half; the other half has the same content.
const HALF: usize = 64;
const PAGES: usize = 2 * HALF + 3;
const WORDS: usize = 512;
/// A page that holds zeros.
const ZERO: u64 = 0;

/// The managed memory.
#[derive(Clone, Copy)]
struct Memory(*mut u64);

// SAFETY: every location has one writer; readers expect what it wrote.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

static EXPECTED: Mutex<[u64; PAGES]> = Mutex::new([ZERO; PAGES]);
/// The same for whoever must not wait for a reader that waits for a page.
static FILLED: [AtomicU64; PAGES] = [const { AtomicU64::new(ZERO) }; PAGES];
static OVER: AtomicBool = AtomicBool::new(false);
static CHECKED: AtomicU64 = AtomicU64::new(0);
static FORKING: AtomicBool = AtomicBool::new(false);
static FORKS: AtomicU64 = AtomicU64::new(0);

/// Pages that a thread writes with stores, and with read(2).
const fn hot(page: usize) -> bool {
    page % 8 == 3
}
const fn read_into(page: usize) -> bool {
    page % 8 == 6
}
const fn cold(page: usize) -> bool {
    !hot(page) && !read_into(page)
}

fn word(id: u64, index: usize) -> u64 {
    if id == ZERO { 0 } else { id.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index as u64) }
}

impl Memory {
    fn new() -> Self {
        // SAFETY: a fresh mapping.
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), PAGES * 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        // SAFETY: a property of the mapping just made. Huge pages are left whole, which is not what is tested.
        unsafe { libc::madvise(start, PAGES * 4096, libc::MADV_NOHUGEPAGE) };
        Self(start.cast())
    }

    fn page(self, page: usize) -> *mut u64 {
        // SAFETY: inside the mapping.
        unsafe { self.0.add(page * WORDS) }
    }

    fn fill(self, page: usize, id: u64) {
        for index in 0..WORDS {
            // SAFETY: inside the page.
            unsafe { self.page(page).add(index).write_volatile(word(id, index)) };
        }
    }

    fn check(self, page: usize, id: u64, when: &str) {
        for index in 0..WORDS {
            // SAFETY: inside the page.
            let got = unsafe { self.page(page).add(index).read_volatile() };
            if got != word(id, index) {
                println!("wrong: page {page} word {index}: {got:#x} for {:#x}, {when}", word(id, index));
                let _ = std::io::stdout().flush();
                std::process::abort();
            }
        }
        CHECKED.fetch_add(1, SeqCst);
    }

    fn advise(self, from: usize, to: usize, advice: i32) -> i32 {
        // SAFETY: the victim's own memory.
        unsafe { libc::madvise(self.page(from).cast(), (to - from) * 4096, advice) }
    }
}

fn symbol(name: &std::ffi::CStr) -> *mut c_void {
    // SAFETY: looks a name up.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    assert!(!address.is_null(), "the agent with faults is not loaded");
    address
}

pub(crate) fn choose(kind: u32, at: u64) {
    // SAFETY: the image exports it with this type.
    let choose: extern "C" fn(u32, u64) = unsafe { std::mem::transmute(symbol(c"pagefold_fault_choose")) };
    choose(kind, at);
}

fn steps() -> u64 {
    // SAFETY: as above.
    let steps: extern "C" fn() -> u64 = unsafe { std::mem::transmute(symbol(c"pagefold_fault_steps")) };
    steps()
}

pub(crate) fn helper() -> u32 {
    // SAFETY: as above.
    let status: extern "C" fn() -> u64 = unsafe { std::mem::transmute(symbol(c"pagefold_agent_status")) };
    status() as u32
}

pub(crate) fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{text}").unwrap();
    out.flush().unwrap();
}

fn fill(memory: Memory, id: impl Fn(usize) -> u64) {
    let mut expected = EXPECTED.lock().unwrap();
    for page in (0..2 * HALF).filter(|page| cold(*page)) {
        let id = id(page % HALF);
        if id == ZERO {
            memory.fill(page, 1);
        }
        memory.fill(page, id);
        expected[page] = id;
        FILLED[page].store(id, SeqCst);
    }
}

/// Waits until every cold page is of the store (or gone, where it holds zeros).
fn merged(memory: Memory) -> bool {
    use std::os::unix::fs::FileExt as _;
    let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        let mut left = 0;
        let expected = *EXPECTED.lock().unwrap();
        // Readers put the kernel's zero page where zeros were dropped.
        for page in (0..2 * HALF).filter(|page| cold(*page) && expected[*page] != ZERO) {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, memory.page(page) as u64 / 4096 * 8).unwrap();
            let entry = u64::from_le_bytes(entry);
            left += usize::from(entry >> 63 & 1 == 1 && entry >> 61 & 1 == 0);
        }
        if left == 0 {
            return true;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    false
}

fn reader(memory: Memory) {
    while !OVER.load(SeqCst) {
        for page in 0..PAGES {
            if cold(page) {
                let expected = EXPECTED.lock().unwrap();
                memory.check(page, expected[page], "seen by the reader");
            }
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn writer(memory: Memory) {
    let mut id = 0x1_0000_0000_u64 + u64::from(std::process::id());
    while !OVER.load(SeqCst) {
        id += 1 << 33;
        for page in (0..PAGES).filter(|page| hot(*page)) {
            memory.fill(page, id);
        }
        std::thread::sleep(Duration::from_millis(2));
        for page in (0..PAGES).filter(|page| hot(*page)) {
            memory.check(page, id, "seen by the writer");
        }
    }
}

/// Forks past the gate, again and again; every child has what its parent has.
fn forker(memory: Memory) {
    while !OVER.load(SeqCst) {
        if !FORKING.load(SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        let child = raw_fork();
        if child == 0 {
            for page in (0..PAGES).filter(|page| cold(*page)) {
                memory.check(page, FILLED[page].load(SeqCst), "in a raw fork");
            }
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) };
        }
        let mut status = 0;
        // SAFETY: the kernel writes the status.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        if status != 0 {
            std::process::abort();
        }
        FORKS.fetch_add(1, SeqCst);
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The kernel writes these pages.
fn pipe_reader(memory: Memory) {
    let mut ends = [0; 2];
    // SAFETY: the kernel writes two numbers.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let mut id = 0x2_0000_0000_u64 + u64::from(std::process::id());
    while !OVER.load(SeqCst) {
        id += 1 << 33;
        for page in (0..PAGES).filter(|page| read_into(*page)) {
            let content: Vec<u64> = (0..WORDS).map(|index| word(id, index)).collect();
            // SAFETY: both buffers are one page.
            unsafe {
                assert_eq!(libc::write(ends[1], content.as_ptr().cast(), 4096), 4096);
                assert_eq!(libc::read(ends[0], memory.page(page).cast(), 4096), 4096);
            }
            memory.check(page, id, "read from a pipe");
        }
        std::thread::sleep(Duration::from_millis(3));
    }
}

/// Asks for another helper, and moves everything past its gate.
fn move_away_and_back(memory: Memory) {
    assert_eq!(memory.advise(0, PAGES, libc::MADV_MERGEABLE), 0, "MERGEABLE");
    let (start, len) = (memory.0.cast::<c_void>(), PAGES * 4096);
    // SAFETY: the victim's own memory, which nobody else touches meanwhile, and a place of the kernel's choice.
    unsafe {
        let place =
            libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
        for (from, to) in [(start, place), (place, start)] {
            assert_eq!(libc::mremap(from, len, len, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to), to);
        }
    }
}

/// All that has to work afterwards, helper or not.
fn finish(memory: Memory, threads: Vec<std::thread::JoinHandle<()>>) {
    OVER.store(true, SeqCst);
    for thread in threads {
        thread.join().unwrap();
    }
    let expected = *EXPECTED.lock().unwrap();
    let all = |from: usize, when: &str| {
        (from..PAGES).filter(|page| cold(*page)).for_each(|page| memory.check(page, expected[page], when));
    };
    all(0, "at the end");
    // SAFETY: the child checks its copy and ends.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            all(0, "in a child");
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        assert_eq!(status, 0, "the child");
    }
    // Content thrown away must be gone, whatever the helper was doing when it died.
    assert_eq!(memory.advise(0, 24, libc::MADV_DONTNEED), 0, "DONTNEED");
    (0..24).for_each(|page| memory.check(page, ZERO, "after DONTNEED"));
    all(24, "beside DONTNEED");
    // SAFETY: the victim's own memory.
    unsafe {
        let (start, len) = (memory.page(24).cast::<c_void>(), 16 * 4096);
        assert_eq!(libc::mprotect(start, len, libc::PROT_READ), 0);
        all(24, "read-only");
        assert_eq!(libc::mprotect(start, len, libc::PROT_READ | libc::PROT_WRITE), 0);
        all(24, "writable again");
    }
    for page in 24..40 {
        memory.fill(page, 99);
        memory.check(page, 99, "written at the end");
    }
    // SAFETY: as above.
    unsafe {
        let (start, len) = (memory.page(64).cast::<c_void>(), 32 * 4096);
        assert_eq!(libc::munmap(start, len), 0);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        assert_eq!(libc::mmap(start, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0), start);
    }
    (64..96).for_each(|page| memory.check(page, ZERO, "in new memory"));
    all(96, "beside new memory");
}

pub(crate) fn main() {
    let memory = Memory::new();
    assert_eq!(memory.advise(0, PAGES, libc::MADV_MERGEABLE), 0, "MERGEABLE");
    // No thread can be made while a helper stands still inside of the gate.
    let quiet = std::env::args().any(|argument| argument == "--quiet");
    let all: [fn(Memory); 4] = [reader, writer, pipe_reader, forker];
    let mut threads: Vec<_> =
        all.into_iter().filter(|_| !quiet).map(|run| std::thread::spawn(move || run(memory))).collect();
    say(&format!("ready {}", helper()));
    for line in std::io::stdin().lock().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split(' ').collect();
        match words[0] {
            "arm" => choose(words[1].parse().unwrap(), words[2].parse().unwrap()),
            "fill" => fill(memory, |page| 1000 + page as u64),
            "zero" => fill(memory, |_| ZERO),
            "diverge" => fill(memory, |page| match page % 16 {
                5 => ZERO,
                page if page % 3 == 0 => 1000 + page as u64,
                _ => 1000 + (page as u64 + 1) % HALF as u64,
            }),
            "forks" => {
                FORKING.store(true, SeqCst);
                continue;
            }
            "unmerge" => {
                threads.push(std::thread::spawn(move || {
                    // Without a helper there is nobody to do it: that is an answer, hanging is none.
                    memory.advise(0, PAGES, libc::MADV_UNMERGEABLE);
                }));
            }
            "unmerge-hidden" => {
                threads.push(std::thread::spawn(move || {
                    let protect = |prot: i32| {
                        // SAFETY: the victim's own memory, which nobody touches meanwhile.
                        assert_eq!(unsafe { libc::mprotect(memory.0.cast(), PAGES * 4096, prot) }, 0);
                    };
                    protect(libc::PROT_NONE);
                    memory.advise(0, PAGES, libc::MADV_UNMERGEABLE);
                    protect(libc::PROT_READ | libc::PROT_WRITE);
                }));
            }
            "move" => move_away_and_back(memory),
            "merged" => {
                let answer = if merged(memory) { "merged" } else { "unmerged" };
                say(answer);
                continue;
            }
            "finish" => {
                finish(memory, std::mem::take(&mut threads));
                say(&format!("fine {} {} {}", steps(), CHECKED.load(SeqCst), FORKS.load(SeqCst)));
                continue;
            }
            "exit" => std::process::exit(42),
            "exec" => {
                use std::os::unix::process::CommandExt as _;
                let mut command = std::process::Command::new("/bin/sh");
                panic!("{}", command.args(["-c", "exit 43"]).exec());
            }
            // SAFETY: this is to fail.
            "crash" => unsafe { std::ptr::null_mut::<u64>().write_volatile(1) },
            other => panic!("{other}"),
        }
        say("done");
    }
}
