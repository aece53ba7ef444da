//! D2, D5: writers that reach a page without a page fault of the program: from other processes, by plain references,
//! by DMA. What they were told is written must be there.

use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use broker::CheckChoice;

use crate::stand::{Running, Stand};
use crate::victim::{
    Random, Region, Victim, fork, hear, merge_densely, merge_now, merge_pair, page, pagemap, pattern, pid, reap, tell,
    wait_until,
};

pub(crate) const VICTIMS: &[Victim] = &[
    ("target", target),
    ("spliced", || spliced(PAGES)),
    ("spliced_wide", || spliced(4 * 64)),
    ("spliced_forked", spliced_forked),
    ("direct_reads", direct_reads),
    ("registered", registered),
    ("own_mem", own_mem),
    ("file_system", file_system),
];

/// Pages of a block that is written in one call.
const BLOCK: usize = 16;
const BLOCKS: usize = 24;
/// Contents that blocks have, so that each has many twins.
const CONTENTS: u64 = 4;

/// Memory that others write to.
fn target() {
    let region = Region::map(BLOCK * BLOCKS + 1);
    (0..region.pages).for_each(|index| region.fill(index, 1));
    region.mergeable();
    merge_now();
    tell(&format!("target {} {}", pid(), region.start));
    merge_densely();
    hear();
    tell(&format!("stored {}", region.stored().len()));
}

/// One way to write to and read from another process.
trait Access: Sync {
    /// Bytes written; fewer than all, or `None`, if it was refused.
    fn write(&self, at: usize, from: &[u64]) -> Option<usize>;
}

struct ByCall(i32);

impl Access for ByCall {
    fn write(&self, at: usize, from: &[u64]) -> Option<usize> {
        let len = from.len() * 8;
        let local = libc::iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: len };
        let remote = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: len };
        // SAFETY: the kernel reads `from`, possibly waiting for a page of it.
        let written = unsafe { libc::process_vm_writev(self.0, &raw const local, 1, &raw const remote, 1, 0) };
        usize::try_from(written).ok()
    }
}

struct ByFile(std::fs::File);

impl Access for ByFile {
    fn write(&self, at: usize, from: &[u64]) -> Option<usize> {
        let bytes: Vec<u8> = from.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.0.write_at(&bytes, at as u64).ok()
    }
}

fn read(pid: i32, at: usize, words: usize) -> Vec<u64> {
    let mut into = vec![0_u64; words];
    let local = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: words * 8 };
    let remote = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: words * 8 };
    // SAFETY: the kernel writes into `into`.
    let got = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    assert_eq!(got, (words * 8) as isize, "the victim's memory can be read");
    into
}

/// What two writers did.
#[derive(Debug, Default)]
struct Score {
    writes: AtomicU64,
    refused: AtomicU64,
    lost: AtomicU64,
}

/// Two threads write blocks of the victim's memory and look at the next visit whether all is still there. `stall`
/// gives the source of a write, given its content.
fn attack<'a>(
    victim: i32,
    start: usize,
    access: &dyn Access,
    source: &(dyn Fn(usize, u64) -> &'a [u64] + Sync),
) -> Score {
    let score = Score::default();
    let words = BLOCK * page() / 8;
    let until = Instant::now() + Duration::from_secs(6);
    std::thread::scope(|scope| {
        for thread in 0..2 {
            let score = &score;
            scope.spawn(move || {
                let mut random = Random(thread as u64 * 77 + 5);
                let mut wanted = [1_u64; BLOCKS];
                while Instant::now() < until {
                    let block = random.below(BLOCKS as u64 / 2) as usize * 2 + thread;
                    let at = start + block * BLOCK * page();
                    let is = |seed: u64| {
                        let page = pattern(seed);
                        read(victim, at, words).chunks(page.len()).all(|chunk| chunk == page)
                    };
                    if !is(wanted[block]) {
                        score.lost.fetch_add(1, SeqCst);
                    }
                    let seed = 1 + random.below(CONTENTS);
                    let from = source(thread, seed);
                    let mut done = 0;
                    let begun = Instant::now();
                    // A page that is frozen at this moment may be refused; what was written up to it counts.
                    while done < words * 8 && begun.elapsed() < Duration::from_secs(5) {
                        match access.write(at + done, &from[done / 8..]) {
                            Some(0) | None => {
                                score.refused.fetch_add(1, SeqCst);
                            }
                            Some(written) => done += written,
                        }
                    }
                    assert_eq!(done, words * 8, "a write never came through");
                    wanted[block] = seed;
                    score.writes.fetch_add(1, SeqCst);
                    std::thread::sleep(Duration::from_micros(random.below(3000)));
                }
            });
        }
    });
    score
}

/// Blocks of each content, as they are.
fn blocks() -> Vec<Vec<u64>> {
    (1..=CONTENTS).map(|seed| pattern(seed).repeat(BLOCK)).collect()
}

fn attacked(stand: &Stand) -> (Running, i32, usize) {
    let mut running = stand.start("target");
    let line = running.expect("target ");
    let (pid, start) = line.split_once(' ').expect("two numbers");
    let (pid, start) = (pid.parse().expect("a number"), start.parse().expect("a number"));
    running.expect_dense();
    (running, pid, start)
}

fn end(stand: &Stand, mut running: Running, score: &Score) {
    running.say("enough");
    running.succeed();
    let summary = stand.summary();
    println!("{score:?}, merged {}, retaken {}, refused {:?}", summary.merges, summary.retaken, summary.refused);
    assert_eq!(score.lost.load(SeqCst), 0, "writes were lost: {score:?}");
    assert!(score.writes.load(SeqCst) > 100, "{score:?}");
    assert!(summary.merges > 100, "{} merges", summary.merges);
}

/// D2: /proc/PID/mem writes under the mmap lock only; the barrier drains them.
#[test]
fn d2_writes_through_proc_mem() {
    let stand = Stand::on_request();
    let (running, pid, start) = attacked(&stand);
    let file = std::fs::OpenOptions::new().write(true).open(format!("/proc/{pid}/mem")).expect("a victim of ours");
    let blocks = blocks();
    let score = attack(pid, start, &ByFile(file), &|_, seed| &blocks[seed as usize - 1]);
    end(&stand, running, &score);
}

/// D2, D5: process_vm_writev, which holds its pages while it copies, into plain and diverged pages.
#[test]
fn d5_writes_by_process_vm_writev() {
    let stand = Stand::watching();
    let (running, pid, start) = attacked(&stand);
    let blocks = blocks();
    let score = attack(pid, start, &ByCall(pid), &|_, seed| &blocks[seed as usize - 1]);
    end(&stand, running, &score);
    assert!(stand.summary().retaken > 0, "no diverged page was taken again");
}

/// Memory in which one page is filled late: whoever copies from it stalls there.
struct Stalling {
    regions: [Region; 2],
    uffd: i32,
    seeds: [AtomicUsize; 2],
    over: AtomicBool,
}

impl Stalling {
    fn new() -> Option<Self> {
        // SAFETY: makes a descriptor.
        let uffd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) } as i32;
        let mut api = [0xaa_u64, 0, 0];
        // SAFETY: the kernel reads and writes a struct uffdio_api.
        if uffd < 0 || unsafe { libc::ioctl(uffd, 0xc018_aa3f, api.as_mut_ptr()) } != 0 {
            return None;
        }
        let regions = [Region::map(BLOCK), Region::map(BLOCK)];
        for region in &regions {
            let mut register = [region.start as u64, region.len() as u64, 1, 0];
            // SAFETY: the kernel reads and writes a struct uffdio_register.
            assert_eq!(unsafe { libc::ioctl(uffd, 0xc020_aa00, register.as_mut_ptr()) }, 0);
        }
        Some(Self { regions, uffd, seeds: [const { AtomicUsize::new(1) }; 2], over: AtomicBool::new(false) })
    }

    fn put(&self, address: usize, seed: u64) {
        let content = pattern(seed);
        let mut copy = [address as u64, content.as_ptr() as u64, page() as u64, 0, 0];
        // SAFETY: the kernel reads a struct uffdio_copy and a page.
        unsafe { libc::ioctl(self.uffd, 0xc028_aa03, copy.as_mut_ptr()) };
    }

    /// A block of one content, one page of which is not there yet.
    fn block(&self, thread: usize, seed: u64) -> &[u64] {
        let region = &self.regions[thread];
        region.advise(libc::MADV_DONTNEED);
        self.seeds[thread].store(seed as usize, SeqCst);
        for index in (0..BLOCK).filter(|index| *index != BLOCK / 2) {
            self.put(region.address(index), seed);
        }
        // SAFETY: the region lives as long as this value; only the kernel reads it, and waits for what is missing.
        unsafe { std::slice::from_raw_parts(region.start as *const u64, region.len() / 8) }
    }

    /// Fills in the missing pages, late.
    fn fill_in(&self) {
        let mut random = Random(4711);
        while !self.over.load(SeqCst) {
            let mut message = [0_u64; 4];
            // SAFETY: the kernel writes a struct uffd_msg.
            let got = unsafe { libc::read(self.uffd, message.as_mut_ptr().cast(), 32) };
            if got != 32 {
                std::thread::sleep(Duration::from_micros(50));
                continue;
            }
            let address = message[2] as usize & !(page() - 1);
            let thread = usize::from(address >= self.regions[1].start && address < self.regions[1].end());
            std::thread::sleep(Duration::from_micros(200 + random.below(6000)));
            self.put(address, self.seeds[thread].load(SeqCst) as u64);
        }
    }
}

/// D2, D5: the same with writers that are held up in mid-copy, for milliseconds, with references to their pages: the
/// case that the exact reference check is there for.
///
/// Seen to fail: with `CheckChoice::Vouch` a run on 6.18 lost 1,106 of 1,549 writes.
#[test]
fn d5_stalled_writers_lose_nothing() {
    let stand = Stand::on_request();
    let (running, pid, start) = attacked(&stand);
    let Some(stalling) = Stalling::new() else {
        println!("skipped: userfaultfd for kernel faults");
        return;
    };
    let score = std::thread::scope(|scope| {
        scope.spawn(|| stalling.fill_in());
        let score = attack(pid, start, &ByCall(pid), &|thread, seed| stalling.block(thread, seed));
        stalling.over.store(true, SeqCst);
        score
    });
    end(&stand, running, &score);
    if stand.summary().check == "bpf" {
        assert!(stand.summary().retaken > 0, "no diverged page was taken again");
        assert!(stand.summary().refused.0.contains_key("referenced"), "no page was ever held");
    }
}

/// D2: a debugger pokes words while pages are merged.
#[test]
fn d2_a_debugger_pokes() {
    let stand = Stand::on_request();
    let (running, pid, start) = attacked(&stand);
    // The calls of one tracer come from one thread.
    let (mut pokes, mut refused) = (0, 0);
    // SAFETY: attaches to a child's child of ours; nothing else traces it.
    unsafe {
        assert_eq!(libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0), 0, "{}", std::io::Error::last_os_error());
        let mut random = Random(31);
        let mut wanted = vec![pattern(1)[0]; BLOCK * BLOCKS];
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until {
            libc::ptrace(libc::PTRACE_INTERRUPT, pid, 0, 0);
            let mut status = 0;
            assert_eq!(libc::waitpid(pid, &raw mut status, libc::__WALL), pid);
            for _ in 0..40 {
                let index = random.below((BLOCK * BLOCKS) as u64) as usize;
                let at = start + index * page();
                assert_eq!(read(pid, at, 1)[0], wanted[index], "a poke was lost");
                let value = pattern(1 + random.below(2))[0];
                if libc::ptrace(libc::PTRACE_POKEDATA, pid, at, value) == 0 {
                    wanted[index] = value;
                    pokes += 1;
                } else {
                    refused += 1;
                }
            }
            libc::ptrace(libc::PTRACE_CONT, pid, 0, 0);
            std::thread::sleep(Duration::from_micros(random.below(3000)));
        }
        libc::ptrace(libc::PTRACE_INTERRUPT, pid, 0, 0);
        let mut status = 0;
        libc::waitpid(pid, &raw mut status, libc::__WALL);
        libc::ptrace(libc::PTRACE_DETACH, pid, 0, 0);
    }
    let score = Score { writes: AtomicU64::new(pokes), refused: AtomicU64::new(refused), lost: AtomicU64::new(0) };
    end(&stand, running, &score);
}

const PAGES: usize = 24;

/// A page in a pipe is held by a plain reference; the pipe delivers what the page holds when it is read.
fn spliced(pages: usize) {
    let (one, two) = (Region::map(pages), Region::map(pages));
    one.fill_from(3000);
    two.fill_from(3000);
    let mut pipe = [0; 2];
    // SAFETY: makes two descriptors.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    let vector = libc::iovec { iov_base: one.pointer(4), iov_len: 3 * page() };
    // SAFETY: the kernel takes references to three pages of the victim's.
    assert_eq!(unsafe { libc::vmsplice(pipe[1], &raw const vector, 1, 0) }, 3 * page() as isize);
    one.mergeable();
    two.mergeable();
    let held = one.part(4, 7);
    let vouched = std::env::var_os("VOUCHED").is_some();
    for _ in 0..20 {
        merge_now();
        if two.merged() + 1 >= two.pages && (!vouched || held.merged() == 3) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(one.merged() >= pages / 2, "{} merged", one.merged());
    held.fill(1, 44);
    let mut got = vec![0_u64; 3 * page() / 8];
    // SAFETY: the kernel writes into `got`.
    assert_eq!(unsafe { libc::read(pipe[0], got.as_mut_ptr().cast(), 3 * page()) }, 3 * page() as isize);
    let words = page() / 8;
    tell(&format!("held {} pipe {}", held.merged(), if got[words..2 * words] == pattern(44) { "new" } else { "old" }));
    two.check_from(3000);
    // Nobody holds them any more.
    held.fill(1, 3005);
    if !vouched {
        for _ in 0..50 {
            merge_now();
            if held.merged() == 3 {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(held.merged(), 3, "pages stay refused after their reference has gone");
    }
    one.check_from(3000);
}

/// D2, V10: a vmspliced page is refused while the pipe holds it, and taken afterwards.
#[test]
fn d2_spliced_pages_are_refused_by_exact_counts() {
    let stand = Stand::checked_by(CheckChoice::Bpf);
    if stand.summary().check != "bpf" {
        println!("skipped: BPF");
        return;
    }
    let output = stand.run("spliced");
    assert!(output.contains("held 0 pipe new"), "{output}");
    assert!(stand.summary().refused.0.contains_key("referenced"));
}

/// D2: the collapse oracle refuses the whole batch, so that only other batches are merged.
#[test]
fn d2_spliced_pages_are_refused_by_the_collapse_oracle() {
    let stand = Stand::checked_by(CheckChoice::Collapse);
    let mut running = stand.start("spliced_wide");
    let (status, output) = running.finish();
    assert!(status.success(), "{output}");
    assert!(output.contains("held 0 pipe new"), "{output}");
    assert!(stand.summary().refused.0.contains_key("referenced"));
}

/// The control: on the owner's word such pages are merged, and the pipe delivers the old bytes.
#[test]
fn d2_spliced_pages_are_merged_on_the_owners_word() {
    let stand = Stand::checked_by(CheckChoice::Vouch);
    let mut command = stand.command("spliced");
    command.env("VOUCHED", "1");
    let output = stand.start_command(command).succeed();
    assert!(output.contains("pipe old"), "{output}");
}

/// Pages in a pipe, in a process that has forked since: they are mapped here alone and not marked so, and whatever makes
/// them exclusive copies them while the pipe holds them.
fn spliced_forked() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(3000);
    two.fill_from(3000);
    let mut pipe = [0; 2];
    // SAFETY: makes two descriptors.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    let held = one.part(4, 7);
    let vector = libc::iovec { iov_base: held.pointer(0), iov_len: held.len() };
    // SAFETY: the kernel takes references to three pages of the victim's.
    assert_eq!(unsafe { libc::vmsplice(pipe[1], &raw const vector, 1, 0) }, held.len() as isize);
    reap(fork(|| {}));
    let counted = std::env::var_os("COUNTED").is_some();
    if !counted {
        // Nothing tells who holds what the fork has left: only what was written since is merged.
        one.part(0, 4).fill_from(3000);
        one.part(7, PAGES).fill_from(3007);
        two.fill_from(3000);
    }
    let frames = || [0, 1, 2].map(|index| pagemap(held.address(index)) & ((1 << 55) - 1));
    let before = frames();
    assert!(before.iter().all(|frame| *frame != 0), "frames are not shown");
    one.mergeable();
    two.mergeable();
    for _ in 0..20 {
        merge_now();
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(frames(), before, "the pipe holds other pages than the program");
    assert_eq!(held.stored().len(), 0, "held pages were merged");
    assert!(one.merged() >= PAGES / 2, "{} merged", one.merged());
    let mut got = vec![0_u64; held.len() / 8];
    // SAFETY: the kernel writes into `got`.
    assert_eq!(unsafe { libc::read(pipe[0], got.as_mut_ptr().cast(), held.len()) }, held.len() as isize);
    // Nobody holds them any more.
    if counted {
        wait_until("they are merged", || {
            merge_now();
            held.merged() == held.pages
        });
    }
    one.check_from(3000);
    two.check_from(3000);
}

/// D2: what somebody holds is not made exclusive after a fork, which would copy it.
#[test]
fn d2_what_is_held_is_not_copied_after_a_fork() {
    let stand = Stand::checked_by(CheckChoice::Bpf);
    if stand.summary().check != "bpf" {
        println!("skipped: BPF");
        return;
    }
    let mut command = stand.command("spliced_forked");
    command.env("COUNTED", "1");
    stand.start_command(command).succeed();
    assert!(stand.summary().refused.0.contains_key("referenced"));
    stand.assert_merged(PAGES as u64);
}

/// D2: nor where references cannot be counted before.
#[test]
fn d2_nothing_is_copied_after_a_fork_where_nothing_is_counted() {
    let stand = Stand::checked_by(CheckChoice::Collapse);
    stand.run("spliced_forked");
    assert!(stand.summary().refused.0.contains_key("pinned"));
}

/// Reads with O_DIRECT into pages that are being merged.
fn direct_reads() {
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let name = format!("/var/tmp/pagefold-hazards-{}", pid());
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_DIRECT)
        .open(&name);
    let Ok(file) = file else {
        println!("skipped: no O_DIRECT on /var/tmp");
        return;
    };
    let _ = std::fs::remove_file(&name);
    let region = Region::map(2 * PAGES);
    region.fill_from(4000);
    // SAFETY: the kernel reads aligned memory of the victim's.
    let written = unsafe { libc::pwrite(file.as_raw_fd(), region.pointer(0), PAGES * page(), 0) };
    if written != (PAGES * page()) as isize {
        println!("skipped: no O_DIRECT on /var/tmp");
        return;
    }
    // The second half holds what the first is overwritten with and what it was.
    (0..PAGES).for_each(|index| region.fill(index, 0));
    let other = Region::map(2 * PAGES);
    other.fill_from(4000);
    region.mergeable();
    other.mergeable();
    merge_densely();
    let until = Instant::now() + Duration::from_secs(3);
    let mut reads = 0;
    while Instant::now() < until {
        for index in (0..PAGES).step_by(4) {
            let part = region.part(index, index + 4);
            // SAFETY: the kernel writes into the victim's memory.
            let got = unsafe { libc::pread(file.as_raw_fd(), part.pointer(0), part.len(), (index * page()) as i64) };
            assert_eq!(got, part.len() as isize, "{}", std::io::Error::last_os_error());
            part.check_from(4000 + index as u64);
            reads += 1;
        }
        (0..PAGES).for_each(|index| region.fill(index, if reads % 2 == 0 { 0 } else { 4000 + PAGES as u64 }));
    }
    tell(&format!("{reads} reads"));
    other.check_from(4000);
}

/// D2, section 6: O_DIRECT reads in flight and into merged pages.
#[test]
fn d2_direct_reads() {
    let stand = Stand::on_request();
    stand.run("direct_reads");
    stand.assert_merged(PAGES as u64);
}

/// io_uring's registered buffers are pinned: over plain pages they keep them from being merged, over merged pages they
/// get copies.
fn registered() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(5000);
    two.fill_from(5000);
    let mut parameters = [0_u32; 30];
    // SAFETY: the kernel reads and writes a struct io_uring_params of 120 bytes.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) };
    if ring < 0 {
        println!("skipped: io_uring");
        return;
    }
    let register = |region: Region| {
        let vector = libc::iovec { iov_base: region.pointer(0), iov_len: region.len() };
        // SAFETY: the kernel pins pages of the victim's.
        unsafe { libc::syscall(libc::SYS_io_uring_register, ring, 0, &raw const vector, 1) }
    };
    assert_eq!(register(one.part(2, 5)), 0, "{}", std::io::Error::last_os_error());
    one.mergeable();
    two.mergeable();
    for _ in 0..10 {
        merge_now();
    }
    if one.merged() == 0 {
        println!("skipped: processes with an io_uring are not managed");
        return;
    }
    assert_eq!(one.part(2, 5).merged(), 0, "pinned pages were merged");
    assert!(one.merged() >= PAGES - 4);
    // SAFETY: lets the buffers go (IORING_UNREGISTER_BUFFERS).
    assert_eq!(unsafe { libc::syscall(libc::SYS_io_uring_register, ring, 1, 0, 0) }, 0);
    assert_eq!(register(two.part(6, 9)), 0, "{}", std::io::Error::last_os_error());
    for _ in 0..10 {
        merge_now();
    }
    assert_eq!(two.part(6, 9).merged(), 0, "pinned pages were taken again");
    one.check_from(5000);
    two.check_from(5000);
}

/// D2, section 6: registered buffers of io_uring.
#[test]
fn d2_registered_buffers() {
    let stand = Stand::on_request();
    stand.run("registered");
}

/// The program writes its own merged memory through /proc/self/mem: it gets copies, the store stays.
fn own_mem() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(6000);
    two.fill_from(6000);
    merge_pair(one, two);
    let memory = std::fs::OpenOptions::new().write(true).open("/proc/self/mem").expect("it can be opened");
    for index in 0..PAGES - 1 {
        assert_eq!(memory.write_at(b"written", one.address(index) as u64).ok(), Some(7));
        assert_eq!(one.read(index)[0].to_le_bytes()[..7], *b"written");
    }
    two.check_from(6000);
}

/// Section 6: forced writes into merged pages.
#[test]
fn writes_through_ones_own_proc_mem() {
    let stand = Stand::on_request();
    stand.run("own_mem");
    stand.assert_merged(PAGES as u64);
}

/// A file system in user space, whose requests the kernel writes to this memory by plain references, without the mmap
/// lock. An equal zero page lies there before each of them.
fn file_system() {
    use std::os::fd::AsRawFd as _;
    let folder = std::path::PathBuf::from(std::env::var_os("FOLDER").expect("the test names a folder"));
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let Ok(device) = device else {
        println!("skipped: /dev/fuse");
        return;
    };
    let path = std::ffi::CString::new(folder.to_str().expect("a path of ours")).expect("a path of ours");
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let options = std::ffi::CString::new(options).expect("digits");
    // SAFETY: the kernel reads the strings.
    let mounted =
        unsafe { libc::mount(c"hazards".as_ptr(), path.as_ptr(), c"fuse".as_ptr(), 0, options.as_ptr().cast()) };
    if mounted != 0 {
        println!("skipped: mounting a file system in user space");
        return;
    }
    let region = Region::map(PAGES);
    let buffer = region.part(4, 8);
    let twin = Region::map(PAGES);
    (0..PAGES).for_each(|index| twin.fill(index, 77));
    region.mergeable();
    twin.mergeable();
    let read = || {
        // SAFETY: the kernel writes into the buffer.
        unsafe { libc::read(device.as_raw_fd(), buffer.pointer(0), buffer.len()) }
    };
    let reply = |words: &[u32]| {
        // SAFETY: the kernel reads the words.
        unsafe { libc::write(device.as_raw_fd(), words.as_ptr().cast(), words.len() * 4) }
    };
    // struct fuse_in_header: length, operation, then the number of the request.
    let header = || {
        let words = buffer.read(0);
        (words[0] as u32, (words[0] >> 32) as u32, words[1])
    };
    assert!(read() > 0);
    let (_, operation, unique) = header();
    assert_eq!(operation, 26, "FUSE_INIT");
    let mut init = [0_u32; 4 + 16];
    init[0] = 4 * init.len() as u32;
    (init[2], init[3], init[4], init[5], init[9]) = (unique as u32, (unique >> 32) as u32, 7, 31, 4096);
    assert!(reply(&init) > 0, "{}", std::io::Error::last_os_error());
    static OVER: AtomicBool = AtomicBool::new(false);
    let asker = std::thread::spawn(move || {
        for number in 0_u64.. {
            let there = std::fs::exists(folder.join(format!("{number:0200}"))).unwrap_or_default();
            if OVER.load(SeqCst) {
                return;
            }
            assert!(!there, "there are no files");
        }
    });
    merge_densely();
    let until = Instant::now() + Duration::from_secs(3);
    let (mut requests, mut random) = (0, Random(5));
    while Instant::now() < until {
        // Zeros again: dropped by a merge before, while or after the request is written.
        (0..buffer.pages).for_each(|index| buffer.fill(index, 0));
        for _ in 0..random.below(40_000) {
            std::hint::spin_loop();
        }
        let got = read();
        assert!(got > 40, "{}", std::io::Error::last_os_error());
        let (length, _, unique) = header();
        assert!(length as isize == got && unique != 0, "{got} bytes were read, the buffer says {length}");
        const FORGET: u32 = 2;
        if header().1 != FORGET {
            reply(&[16, (-libc::ENOENT) as u32, unique as u32, (unique >> 32) as u32]);
        }
        requests += 1;
    }
    OVER.store(true, SeqCst);
    // SAFETY: takes the file system away, which ends what waits for it.
    unsafe { libc::umount2(path.as_ptr(), libc::MNT_FORCE | libc::MNT_DETACH) };
    drop(device);
    let _ = asker.join();
    tell(&format!("{requests} requests"));
    assert!(requests > 100, "{requests} requests");
}

/// D2, H4: a FUSE daemon's requests are whole. The broker leaves such daemons alone altogether, since a thread that
/// waits for one of their pages could be the one that they wait for.
#[test]
fn d2_requests_of_a_file_system_in_user_space() {
    struct Mounted(std::path::PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            use std::os::unix::ffi::OsStrExt as _;
            if let Ok(path) = std::ffi::CString::new(self.0.as_os_str().as_bytes()) {
                // SAFETY: takes away what a victim that panicked has left mounted here.
                unsafe { libc::umount2(path.as_ptr(), libc::MNT_FORCE | libc::MNT_DETACH) };
            }
            let _ = std::fs::remove_dir(&self.0);
        }
    }
    let folder = std::env::temp_dir().join(format!("pagefold-hazards-fuse-{}", pid()));
    std::fs::create_dir(&folder).expect("a folder can be made");
    let folder = Mounted(folder);
    let stand = Stand::on_request();
    let mut command = stand.command("file_system");
    command.env("FOLDER", &folder.0);
    let output = stand.start_command(command).succeed();
    if !output.contains("skipped:") {
        assert_eq!(stand.summary().merges, 0, "pages of a storage daemon were merged");
    }
}
