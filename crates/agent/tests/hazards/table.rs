//! f11: every call on mappings, on plain memory and on merged memory: result, error and content must be the same.
//!
//! Each row runs in a process of its own: without the agent, with the region merged but for its last page, with only
//! its middle merged, and in a forked child (which has merged pages but no helper).

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use crate::stand::{Running, Stand, plain_command};
use crate::victim::{Region, Victim, end_with, errno, merge_range, merged_pair, page, pattern, pid, tell};

pub(crate) const VICTIMS: &[Victim] =
    &[("table_plain", plain), ("table_plain_forked", plain_forked), ("table_merged", merged), ("table_forked", forked)];

/// Pages of the region that the calls are tried on.
const PAGES: usize = 8;
/// Pages of the regions with equal content; what goes on behind the first eight must never be seen.
const TWIN: usize = 24;
const FIRST: u64 = 10;

/// What a call did.
struct Call {
    result: i64,
    extra: String,
}

impl From<i64> for Call {
    fn from(result: i64) -> Self {
        Self { result, extra: String::new() }
    }
}

impl From<i32> for Call {
    fn from(result: i32) -> Self {
        i64::from(result).into()
    }
}

type Row = (&'static str, fn(Region) -> Call);

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// SAFETY of every call below: the memory is this process's own, made for being treated so, and looked at only through
/// the kernel afterwards.
macro_rules! advices {
    ($($name:literal $advice:expr,)*) => {
        // SAFETY: see above.
        &[$(($name, |p| unsafe { libc::madvise(p.pointer(0), p.len(), $advice) }.into())),*]
    };
}

const ADVICES: &[Row] = advices![
    "MADV_NORMAL" 0, "MADV_RANDOM" 1, "MADV_SEQUENTIAL" 2, "MADV_WILLNEED" 3, "MADV_DONTNEED" 4, "MADV_FREE" 8,
    "MADV_REMOVE" 9, "MADV_DONTFORK" 10, "MADV_DOFORK" 11, "MADV_MERGEABLE" 12, "MADV_UNMERGEABLE" 13,
    "MADV_HUGEPAGE" 14, "MADV_NOHUGEPAGE" 15, "MADV_DONTDUMP" 16, "MADV_DODUMP" 17, "MADV_WIPEONFORK" 18,
    "MADV_KEEPONFORK" 19, "MADV_COLD" 20, "MADV_PAGEOUT" 21, "MADV_POPULATE_READ" 22, "MADV_POPULATE_WRITE" 23,
    "MADV_DONTNEED_LOCKED" 24, "MADV_COLLAPSE of 32 KiB" 25, "MADV_GUARD_INSTALL" 102, "MADV_GUARD_REMOVE" 103,
    "an unknown advice" 999,
];

fn remap(p: Region, old: usize, new: usize, flags: i32, target: usize) -> Call {
    // SAFETY: see above.
    let at = unsafe { libc::mremap(p.pointer(0), old * page(), new * page(), flags, target as *mut libc::c_void) };
    if at == libc::MAP_FAILED {
        return (-1).into();
    }
    // What lies behind is known only if the region has not moved: nothing.
    let behind = usize::from(at == p.pointer(0));
    Call { result: 0, extra: digest(at as usize, new + behind) }
}

fn reserve() -> usize {
    // SAFETY: a free place of the kernel's choice.
    let at = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            PAGES * page(),
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    at as usize
}

fn child(run: impl FnOnce() -> i32) -> i64 {
    // SAFETY: the child makes system calls only.
    let id = unsafe { libc::fork() };
    if id == 0 {
        let code = run();
        // SAFETY: ends the child.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: the kernel writes the status.
    unsafe { libc::waitpid(id, &raw mut status, 0) };
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status).into() } else { -100 - i64::from(status) }
}

/// A userfaultfd of the program's own.
pub(crate) fn userfaultfd(features: u64) -> i32 {
    // SAFETY: makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) } as i32;
    let mut api = [0xaa_u64, features, 0];
    // SAFETY: the kernel reads and writes a struct uffdio_api.
    unsafe { libc::ioctl(fd, 0xc018_aa3f, api.as_mut_ptr()) };
    fd
}

fn register(fd: i32, p: Region) -> i32 {
    let mut register = [p.start as u64, p.len() as u64, 1, 0];
    // SAFETY: the kernel reads and writes a struct uffdio_register.
    unsafe { libc::ioctl(fd, 0xc020_aa00, register.as_mut_ptr()) }
}

fn write_at(p: Region, path: &str) -> i64 {
    use std::os::unix::fs::FileExt as _;
    let Ok(memory) = std::fs::OpenOptions::new().write(true).open(path) else { return -7 };
    memory.write_at(b"zzzz", (p.address(1) + 16) as u64).map_or(-1, |written| written as i64)
}

#[rustfmt::skip]
const CALLS: &[Row] = &[
    ("mremap to the same", |p| remap(p, PAGES, PAGES, 0, 0)),
    ("mremap, shrink", |p| remap(p, PAGES, PAGES / 2, 0, 0)),
    ("mremap, grow and move", |p| remap(p, PAGES, 2 * PAGES, libc::MREMAP_MAYMOVE, 0)),
    ("mremap, grow in place", |p| remap(p, PAGES, PAGES + 4, 0, 0)),
    ("mremap, fixed", |p| { let to = reserve(); remap(p, PAGES, PAGES, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to) }),
    ("mremap, fixed and shorter", |p| { let to = reserve(); remap(p, PAGES, 5, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to) }),
    ("mremap, dontunmap", |p| remap(p, PAGES, PAGES, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP, 0)),
    ("mremap, old length 0", |p| remap(p, 0, PAGES, libc::MREMAP_MAYMOVE, 0)),
    ("mremap of one page to two", |p| remap(p.part(3, 4), 1, 2, libc::MREMAP_MAYMOVE, 0)),
    ("mremap of the middle", |p| { let to = reserve(); remap(p.part(1, 4), 3, 3, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, to) }),
    // SAFETY: see above.
    ("mlock", |p| unsafe { libc::mlock(p.pointer(0), p.len()) }.into()),
    // SAFETY: see above.
    ("mlock2 on fault", |p| unsafe { libc::syscall(libc::SYS_mlock2, p.start, p.len(), 1) }.into()),
    // SAFETY: see above.
    ("mlockall", |_| unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) }.into()),
    // SAFETY: see above.
    ("mlock, dontneed", |p| unsafe {
        if libc::mlock(p.pointer(0), p.len()) != 0 { return (-2).into(); }
        libc::madvise(p.pointer(0), p.len(), libc::MADV_DONTNEED).into()
    }),
    // SAFETY: see above.
    ("mlock, munlock, dontneed", |p| unsafe {
        libc::mlock(p.pointer(0), p.len());
        libc::munlock(p.pointer(0), p.len());
        libc::madvise(p.pointer(0), p.len(), libc::MADV_DONTNEED).into()
    }),
    // SAFETY: see above.
    ("mlock of the middle, dontneed", |p| unsafe {
        libc::mlock(p.pointer(3), page());
        libc::madvise(p.pointer(0), p.len(), libc::MADV_DONTNEED).into()
    }),
    // SAFETY: see above.
    ("mlock, dontneed_locked", |p| unsafe {
        libc::mlock(p.pointer(0), p.len());
        libc::madvise(p.pointer(0), p.len(), 24).into()
    }),
    ("mprotect r", |p| p.protect(libc::PROT_READ).into()),
    ("mprotect rx", |p| p.protect(libc::PROT_READ | libc::PROT_EXEC).into()),
    ("mprotect rwx", |p| p.protect(7).into()),
    ("mprotect none", |p| p.protect(0).into()),
    ("mprotect none and back", |p| { p.protect(0); p.protect(RW).into() }),
    ("mprotect r, dontneed", |p| { p.protect(libc::PROT_READ); p.advise(libc::MADV_DONTNEED).into() }),
    ("mprotect none, dontneed, back", |p| { p.protect(0); p.advise(libc::MADV_DONTNEED); p.protect(RW).into() }),
    ("mprotect none, free, back", |p| { p.protect(0); let error = p.advise(libc::MADV_DONTNEED); p.protect(RW); error.into() }),
    ("mprotect growsdown", |p| p.part(1, 2).protect(RW | 0x0100_0000).into()),
    ("mincore", |p| {
        let mut there = [0_u8; PAGES];
        // SAFETY: see above.
        let result = unsafe { libc::mincore(p.pointer(0), p.len(), there.as_mut_ptr()) };
        Call { result: result.into(), extra: format!("{there:?}") }
    }),
    // SAFETY: see above.
    ("msync sync", |p| unsafe { libc::msync(p.pointer(0), p.len(), libc::MS_SYNC) }.into()),
    // SAFETY: see above.
    ("msync async", |p| unsafe { libc::msync(p.pointer(0), p.len(), libc::MS_ASYNC) }.into()),
    // SAFETY: see above.
    ("msync invalidate", |p| unsafe { libc::msync(p.pointer(0), p.len(), libc::MS_SYNC | libc::MS_INVALIDATE) }.into()),
    // SAFETY: see above.
    ("munmap of the middle", |p| unsafe { libc::munmap(p.pointer(2), 3 * page()) }.into()),
    // SAFETY: see above.
    ("mmap fixed over the middle", |p| unsafe {
        libc::mmap(p.pointer(2), 3 * page(), RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED, -1, 0);
        p.fill(3, 77);
        i64::from(p.holds(3, 77)).into()
    }),
    // SAFETY: see above.
    ("mmap fixed_noreplace", |p| unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let at = libc::mmap(p.pointer(1), page(), RW, flags, -1, 0);
        i64::from(if at == libc::MAP_FAILED { -1 } else { 0 }).into()
    }),
    // SAFETY: see above.
    ("set a name", |p| unsafe { libc::prctl(0x5356_4d41, 0, p.start, p.len(), c"hello".as_ptr()) }.into()),
    ("mbind", |p| {
        let nodes = 1_u64;
        // SAFETY: see above.
        unsafe { libc::syscall(libc::SYS_mbind, p.start, p.len(), 2, &raw const nodes, 64, 0) }.into()
    }),
    ("mbind, move", |p| {
        let nodes = 1_u64;
        // SAFETY: see above.
        unsafe { libc::syscall(libc::SYS_mbind, p.start, p.len(), 2, &raw const nodes, 64, 3) }.into()
    }),
    ("get_mempolicy", |p| {
        let mut mode = 0_i32;
        // SAFETY: see above.
        unsafe { libc::syscall(libc::SYS_get_mempolicy, &raw mut mode, 0, 0, p.start, 2) }.into()
    }),
    ("move_pages", |p| {
        let pages: Vec<usize> = (0..PAGES).map(|index| p.address(index)).collect();
        let (nodes, mut status) = ([0_i32; PAGES], [0_i32; PAGES]);
        // SAFETY: see above.
        let result = unsafe {
            libc::syscall(libc::SYS_move_pages, 0, PAGES, pages.as_ptr(), nodes.as_ptr(), status.as_mut_ptr(), 2)
        };
        Call { result, extra: format!("{status:?}") }
    }),
    // SAFETY: see above.
    ("mseal", |p| unsafe { libc::syscall(462, p.start, p.len(), 0) }.into()),
    // SAFETY: see above.
    ("mseal, dontneed", |p| unsafe {
        libc::syscall(462, p.start, p.len(), 0);
        libc::madvise(p.pointer(0), p.len(), libc::MADV_DONTNEED).into()
    }),
    // SAFETY: see above.
    ("mseal, read-only, dontneed", |p| unsafe {
        p.protect(libc::PROT_READ);
        libc::syscall(462, p.start, p.len(), 0);
        libc::madvise(p.pointer(0), p.len(), libc::MADV_DONTNEED).into()
    }),
    // SAFETY: see above.
    ("mseal, munmap", |p| unsafe {
        libc::syscall(462, p.start, p.len(), 0);
        libc::munmap(p.pointer(0), p.len()).into()
    }),
    ("wipeonfork, fork", |p| {
        let error = p.advise(libc::MADV_WIPEONFORK);
        let zeros = child(|| i32::from((0..PAGES).all(|index| p.holds(index, 0))));
        Call { result: error.into(), extra: format!("all zero in the child: {zeros}") }
    }),
    ("dontfork, fork", |p| {
        let error = p.advise(libc::MADV_DONTFORK);
        let faults = child(|| digest(p.start, PAGES).bytes().filter(|byte| *byte == b'G').count() as i32);
        Call { result: error.into(), extra: format!("{faults} pages are not in the child") }
    }),
    ("own userfaultfd, register", |p| register(userfaultfd(0), p).into()),
    ("own userfaultfd, missing", |p| {
        const SIGBUS: u64 = 1 << 7;
        let fd = userfaultfd(SIGBUS);
        if register(fd, p) != 0 { return (-2).into(); }
        let result = p.advise(libc::MADV_DONTNEED);
        Call { result: result.into(), extra: digest(p.start, PAGES) }
    }),
    ("own userfaultfd, zeropage", |p| {
        let fd = userfaultfd(0);
        if register(fd, p) != 0 { return (-2).into(); }
        p.advise(libc::MADV_DONTNEED);
        // Page by page: memory that was merged consists of several mappings, and the kernel wants one.
        let mut result = 0;
        for index in 0..PAGES {
            let mut zero = [p.address(index) as u64, page() as u64, 0, 0];
            // SAFETY: the kernel reads and writes a struct uffdio_zeropage.
            result |= unsafe { libc::ioctl(fd, 0xc020_aa04, zero.as_mut_ptr()) };
        }
        result.into()
    }),
    ("own userfaultfd, move", |p| {
        const MOVE: u64 = 1 << 16;
        let fd = userfaultfd(MOVE);
        let to = Region::map(PAGES);
        if register(fd, to) != 0 || register(fd, p) != 0 { return (-2).into(); }
        // Page by page, see above. A page that was just written cannot always be moved at once.
        let mut result = 0;
        for index in 0..PAGES {
            for _ in 0..50 {
                let mut request = [to.address(index) as u64, p.address(index) as u64, page() as u64, 1, 0];
                // SAFETY: the kernel reads and writes a struct uffdio_move.
                result = unsafe { libc::ioctl(fd, 0xc028_aa05, request.as_mut_ptr()) };
                if result == 0 || errno() != libc::EAGAIN { break; }
            }
        }
        for region in [p, to] {
            let mut range = [region.start as u64, region.len() as u64];
            // SAFETY: the kernel reads a struct uffdio_range.
            unsafe { libc::ioctl(fd, 0x8010_aa01, range.as_mut_ptr()) };
        }
        let moved = digest(to.start, PAGES);
        Call { result: result.into(), extra: moved }
    }),
    ("guard install", |p| p.part(1, 3).advise(102).into()),
    ("guard install, remove", |p| { p.part(1, 3).advise(102); p.part(1, 3).advise(103).into() }),
    ("fork, read", |p| child(|| i32::from((0..PAGES).all(|index| p.holds(index, FIRST + index as u64)))).into()),
    ("fork, child writes", |p| child(|| { (0..PAGES).for_each(|index| p.fill(index, 900)); 0 }).into()),
    ("fork, child discards", |p| child(|| {
        p.advise(libc::MADV_DONTNEED);
        i32::from((0..PAGES).all(|index| p.holds(index, 0)))
    }).into()),
    ("fork, child grows it", |p| child(|| {
        let call = remap(p, PAGES, 2 * PAGES, libc::MREMAP_MAYMOVE, 0);
        i32::from(call.result == 0 && call.extra.starts_with("ssssssss00000000"))
    }).into()),
    ("process_vm_writev", |p| {
        let words = *b"zzzzzzzz";
        let (from, to) = (libc::iovec { iov_base: words.as_ptr().cast_mut().cast(), iov_len: 8 },
            libc::iovec { iov_base: (p.address(1) + 16) as *mut libc::c_void, iov_len: 8 });
        // SAFETY: the kernel reads the vectors and `words`.
        let written = unsafe { libc::process_vm_writev(pid(), &raw const from, 1, &raw const to, 1, 0) };
        (written as i64).into()
    }),
    ("write /proc/self/mem", |p| write_at(p, "/proc/self/mem").into()),
    ("write /proc/self/mem, read-only", |p| { p.protect(libc::PROT_READ); write_at(p, "/proc/self/mem").into() }),
    ("remap_file_pages", |p| {
        // SAFETY: see above.
        unsafe { libc::syscall(libc::SYS_remap_file_pages, p.start, page(), 0, 1, 0) }.into()
    }),
    ("read(2) into it", |p| {
        use std::os::fd::AsRawFd as _;
        let file = std::fs::File::open("/dev/zero").expect("there is /dev/zero");
        // SAFETY: the kernel writes into the region.
        (unsafe { libc::read(file.as_raw_fd(), p.pointer(2), 2 * page()) } as i64).into()
    }),
    ("dontneed of more than is mapped", |p| Region { pages: PAGES + 2, ..p }.advise(libc::MADV_DONTNEED).into()),
    ("dontneed of nothing", |p| Region { pages: 0, ..p }.advise(libc::MADV_DONTNEED).into()),
    ("dontneed, not aligned", |p| Region { start: p.start + 8, pages: 2 }.advise(libc::MADV_DONTNEED).into()),
    ("free, write, read", |p| { let error = p.advise(libc::MADV_FREE); (0..PAGES).for_each(|index| p.fill(index, FIRST + index as u64)); error.into() }),
    ("munmap, mmap there", |p| {
        p.unmap();
        // SAFETY: see above.
        let at = unsafe { libc::mmap(p.pointer(0), p.len(), RW, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0) };
        i64::from(at as usize == p.start).into()
    }),
];

/// One letter a page: `s` as expected, `0` zeros, `L` what should be elsewhere, `G` not readable, `x` anything else.
fn digest(start: usize, pages: usize) -> String {
    let mut buffer = vec![0_u64; page() / 8];
    (0..pages)
        .map(|index| {
            let to = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: page() };
            let from = libc::iovec { iov_base: (start + index * page()) as *mut libc::c_void, iov_len: page() };
            // SAFETY: the kernel writes into `buffer`.
            if unsafe { libc::process_vm_readv(pid(), &raw const to, 1, &raw const from, 1, 0) } != page() as isize {
                return 'G';
            }
            let is = |seed: u64| buffer == pattern(seed);
            if is(FIRST + index as u64) {
                's'
            } else if is(0) {
                '0'
            } else if (0..TWIN as u64).any(|other| is(FIRST + other)) {
                'L'
            } else {
                'x'
            }
        })
        .collect()
}

/// Makes the region, in the same surroundings every time: nothing mapped behind it.
fn make_region() -> Region {
    // Far from where the kernel puts mappings by itself.
    const START: usize = 0x2000_0000_0000;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: takes only what is free.
    let at = unsafe { libc::mmap(START as *mut libc::c_void, PAGES * page(), RW, flags, -1, 0) };
    assert_eq!(at as usize, START);
    let p = Region { start: START, pages: PAGES };
    p.fill_from(FIRST);
    p
}

fn rows() -> impl Iterator<Item = &'static Row> {
    ADVICES.iter().chain(CALLS)
}

/// Runs a row and says what came of it.
fn run_row(row: &Row, p: Region) {
    // SAFETY: a call that waits for ever ends the process.
    unsafe { libc::alarm(10) };
    // SAFETY: errno is this thread's.
    unsafe { *libc::__errno_location() = 0 };
    let call = row.1(p);
    let error = if call.result < 0 { errno() } else { 0 };
    tell(&format!("row {}: {} {error} {} / {}", row.0, call.result, digest(p.start, 2 * PAGES), call.extra));
}

fn reap_quietly(id: i32, name: &str) {
    let mut status = 0;
    // SAFETY: the kernel writes the status.
    unsafe { libc::waitpid(id, &raw mut status, 0) };
    if !libc::WIFEXITED(status) {
        tell(&format!("row {name}: killed by signal {}", libc::WTERMSIG(status)));
    }
}

fn plain() {
    for row in rows() {
        let id = crate::victim::fork(|| run_row(row, make_region()));
        reap_quietly(id, row.0);
    }
}

/// One row on merged memory; which one, and how merged, is in the environment.
fn merged() {
    let name = std::env::var("ROW").expect("the test names a row");
    let row = rows().find(|row| row.0 == name).expect("the test names a row that there is");
    let p = make_region();
    merge_region(p, &std::env::var("MODE").expect("the test says how"));
    run_row(row, p);
}

fn merge_region(p: Region, mode: &str) {
    let (_one, _two) = merged_pair(TWIN, FIRST);
    p.mergeable();
    let (part, wanted) = if mode == "whole" { (p, PAGES - 1) } else { (p.part(2, 5), 3) };
    for _ in 0..50 {
        merge_range(part.start, part.end());
        if part.merged() >= wanted {
            break;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(part.merged() >= wanted, "only {} of {} pages are merged", part.merged(), part.pages);
    // As the plain pages are: present.
    p.check_from(FIRST);
}

/// All rows in children of a process that has merged the region.
fn forked() {
    let p = make_region();
    merge_region(p, "whole");
    run_in_children(p);
}

/// The same without the agent.
fn plain_forked() {
    run_in_children(make_region());
}

fn run_in_children(p: Region) {
    for row in rows() {
        // SAFETY: the child runs one row and ends.
        let id = unsafe { libc::fork() };
        if id == 0 {
            end_with(|| {
                // As the plain pages are: present.
                p.check_from(FIRST);
                run_row(row, p);
            });
        }
        reap_quietly(id, row.0);
    }
}

fn parse(output: &str) -> BTreeMap<String, String> {
    let rows = output.lines().filter_map(|line| line.strip_prefix("row ")?.split_once(": "));
    rows.map(|(name, result)| (name.to_owned(), result.to_owned())).collect()
}

fn plain_results(victim: &str) -> BTreeMap<String, String> {
    parse(&Running::start(plain_command(victim), None).succeed())
}

/// Differences that are no defects. MADV_FREE lets the kernel take the pages when it likes; merged ones it takes at
/// once. And UFFDIO_MOVE refuses pages that a child shares with its parent, which pages that were un-merged are not.
fn is_documented(row: &str, got: &str) -> bool {
    if row == "own userfaultfd, move" && got.starts_with("-1 16 ") && got.ends_with("sssssss0") {
        return true;
    }
    row == "MADV_FREE"
        && got.starts_with("0 0 ")
        && got[4..].bytes().take(PAGES).all(|page| page == b's' || page == b'0')
}

fn compare(mode: &str, plain: &BTreeMap<String, String>, merged: &BTreeMap<String, String>) {
    let mut differences = String::new();
    for (name, expected) in plain {
        let got = merged.get(name).map_or("nothing", String::as_str);
        if got != expected && !is_documented(name, got) {
            differences.push_str(&format!("{name}:\n    plain  {expected}\n    {mode} {got}\n"));
        }
    }
    assert!(differences.is_empty(), "calls that behave differently on merged memory ({mode}):\n{differences}");
}

fn table(mode: &str) {
    let stand = Stand::on_request();
    let plain = plain_results("table_plain");
    let mut results = BTreeMap::new();
    for row in rows() {
        let mut command = stand.command("table_merged");
        command.env("ROW", row.0).env("MODE", mode);
        let mut running = stand.start_command(command).within(Duration::from_secs(12));
        let ended = catch_unwind(AssertUnwindSafe(|| running.finish()));
        let Ok((status, output)) = ended else {
            results.insert(row.0.to_owned(), "hangs".to_owned());
            continue;
        };
        results.extend(parse(&output));
        if !status.success() {
            let last: String = output.lines().rev().take(4).collect::<Vec<_>>().join(" | ");
            results.entry(row.0.to_owned()).or_insert(format!("{status} {last}"));
        }
    }
    compare(mode, &plain, &results);
    stand.assert_merged(results.len() as u64 * 3);
}

/// f11, D6, D7, V4: all calls on a region that is merged but for its last page.
#[test]
fn f11_calls_on_merged_memory() {
    table("whole");
}

/// f11: all calls on a region whose middle is merged, so that it consists of three mappings.
#[test]
fn f11_calls_on_partly_merged_memory() {
    table("middle");
}

/// f11: all calls in children forked from a process with merged memory.
#[test]
fn f11_calls_in_forked_children() {
    let stand = Stand::on_request();
    let output = stand.run("table_forked");
    compare("forked", &plain_results("table_plain_forked"), &parse(&output));
    stand.assert_merged(PAGES as u64);
}
