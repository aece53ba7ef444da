//! D-1, D-2, D-11, D-16, D-17: what is the agent's own survives what the program does: its memory, its helper, its gate,
//! its registrations.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::process::helper_of;
use crate::stand::Stand;
use crate::table::userfaultfd;
use crate::victim::{
    Random, Region, Victim, errno, flags_at, hear, merge_densely, merge_now, merge_pair, merged_pair, page, pid, reap,
    tell, wait_until,
};

pub(crate) const VICTIMS: &[Victim] = &[
    ("vanishing_stacks", vanishing_stacks),
    ("everything", everything),
    ("killed_inside", killed_inside),
    ("moves_at_a_limit", moves_at_a_limit),
    ("given_back_while_tracked", given_back_while_tracked),
    ("taken_while_tracked", taken_while_tracked),
    ("hot", hot),
];

const PAGES: usize = 48;
const FIRST: u64 = 800;

/// Threads end and their stacks are unmapped, with robust lists on them that the helper has been told of.
fn vanishing_stacks() {
    extern "C" fn nothing(word: *mut libc::c_void) -> *mut libc::c_void {
        word
    }
    let (one, two) = merged_pair(PAGES, FIRST);
    tell("begins");
    hear();
    merge_densely();
    let mut threads = 0_u64;
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        // glibc keeps 40 MiB of stacks for new threads: none of these.
        // SAFETY: a thread that does nothing, joined at once.
        unsafe {
            let mut attributes = std::mem::zeroed();
            libc::pthread_attr_init(&raw mut attributes);
            assert_eq!(libc::pthread_attr_setstacksize(&raw mut attributes, 64 << 20), 0);
            let mut thread = 0;
            let made = libc::pthread_create(&raw mut thread, &raw const attributes, nothing, std::ptr::null_mut());
            assert_eq!(made, 0);
            assert_eq!(libc::pthread_join(thread, std::ptr::null_mut()), 0);
        }
        if threads.is_multiple_of(8) {
            one.fill_from(FIRST + 1);
            one.fill_from(FIRST);
        }
        threads += 1;
    }
    one.check_from(FIRST);
    two.check_from(FIRST);
    tell(&format!("{threads} threads"));
    hear();
}

/// D-1: the helper never touches memory of the program that may vanish.
#[test]
fn d_1_the_helper_survives_what_vanishes() {
    let stand = Stand::on_request();
    let mut running = stand.start("vanishing_stacks");
    running.expect("begins");
    let helper = helper_of(running.pid());
    running.say("go on");
    // Answers to other requests come on the same line, so the victim asks for nothing from here on.
    running.expect_dense();
    let threads = loop {
        let line = running.expect("");
        if let Some(threads) = line.strip_suffix(" threads") {
            break threads.to_owned();
        }
    };
    assert_eq!(helper_of(running.pid()), helper, "another helper stands there");
    println!("{threads} threads came and went");
    running.say("enough");
    running.succeed();
    stand.assert_merged(PAGES as u64);
}

/// Every private writable mapping of this process.
fn own_mappings() -> Vec<Region> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let regions = maps.lines().filter_map(|line| {
        let (range, rest) = line.split_once(' ')?;
        let (from, to) = range.split_once('-')?;
        let (from, to) = (usize::from_str_radix(from, 16).ok()?, usize::from_str_radix(to, 16).ok()?);
        rest.starts_with("rw-p").then_some(Region { start: from, pages: (to - from) / page() })
    });
    regions.collect()
}

/// Hands over all that it has, the agent's memory among it, and goes on working.
fn everything() {
    let (one, two) = merged_pair(PAGES, FIRST);
    let mappings = own_mappings();
    let handed_over = mappings.iter().filter(|region| region.advise(libc::MADV_MERGEABLE) == 0).count();
    // Nothing is frozen that has no twin.
    let copies: Vec<(Region, Region)> =
        mappings.into_iter().filter(|region| region.len() <= 4 << 20).map(|of| (of, Region::map(of.pages))).collect();
    copies.iter().for_each(|(_, copy)| copy.mergeable());
    merge_densely();
    let until = Instant::now() + Duration::from_secs(4);
    let mut rounds = 0_u64;
    while Instant::now() < until {
        one.fill_from(FIRST + rounds % 7);
        if rounds.is_multiple_of(20) {
            for (of, copy) in &copies {
                // SAFETY: both are this victim's, readable and writable; whoever writes meanwhile spoils a twin.
                unsafe { std::ptr::copy_nonoverlapping(of.pointer(0).cast::<u8>(), copy.pointer(0).cast(), of.len()) };
            }
        }
        let threads: Vec<_> = (0..3).map(|number| std::thread::spawn(move || format!("{number}"))).collect();
        let said: String = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(said, "012");
        let fresh = Region::map(4);
        fresh.fill_from(FIRST);
        fresh.mergeable();
        fresh.check_from(FIRST);
        fresh.unmap();
        one.check_from(FIRST + rounds % 7);
        rounds += 1;
    }
    two.check_from(FIRST);
    one.fill_from(FIRST);
    one.wait_merged(PAGES / 2);
    tell(&format!("{handed_over} mappings handed over, {rounds} rounds"));
}

/// D-2: a program that hands over every mapping that it can find harms neither itself nor the agent.
#[test]
fn d_2_the_agents_own_memory_is_not_merged() {
    let stand = Stand::on_request();
    let output = stand.run("everything");
    println!("{}", output.lines().rfind(|line| line.ends_with("rounds")).unwrap_or_default());
    stand.assert_merged(PAGES as u64);
    assert!(!stand.summary().refused.0.contains_key("stopped"), "merging stopped");
}

/// The child of a vfork that is killed in the middle of calls that go through the gate.
static INSIDE: AtomicI32 = AtomicI32::new(0);
static CALLS: AtomicU64 = AtomicU64::new(0);
static TARGET: AtomicU64 = AtomicU64::new(0);

extern "C" fn calls_for_ever(_: *mut libc::c_void) -> i32 {
    // SAFETY: changes the protection of the victim's page, and nothing else.
    unsafe {
        let page_at = TARGET.load(SeqCst) as *mut libc::c_void;
        INSIDE.store(libc::syscall(libc::SYS_getpid) as i32, SeqCst);
        loop {
            libc::mprotect(page_at, 4096, libc::PROT_READ);
            libc::mprotect(page_at, 4096, libc::PROT_READ | libc::PROT_WRITE);
            CALLS.fetch_add(1, SeqCst);
        }
    }
}

fn killed_inside() {
    const ROUNDS: usize = 300;
    static OVER: AtomicBool = AtomicBool::new(false);
    let (target, stack) = (Region::map(4), Region::map(16));
    // Calls on memory that was handed over go through the gate.
    target.mergeable();
    TARGET.store(target.start as u64, SeqCst);
    let (one, two) = merged_pair(PAGES, FIRST);
    let killer = std::thread::spawn(|| {
        let mut random = Random(0x51_7e57);
        while !OVER.load(SeqCst) {
            let child = INSIDE.swap(0, SeqCst);
            if child != 0 {
                std::thread::sleep(Duration::from_micros(50 + random.below(900)));
                // SAFETY: the child whose parent waits for it.
                unsafe { libc::kill(child, libc::SIGKILL) };
            }
        }
    });
    for _ in 0..ROUNDS {
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        // SAFETY: a child on a stack of its own that only changes one page's protection; this thread waits.
        let child = unsafe { libc::clone(calls_for_ever, stack.pointer(16), flags, std::ptr::null_mut()) };
        assert!(child > 0, "{}", std::io::Error::last_os_error());
        let mut status = 0;
        // SAFETY: the kernel writes the status.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGKILL, "{status:#x}");
    }
    OVER.store(true, SeqCst);
    killer.join().unwrap();
    // Whoever died inside holds nobody up: merging goes on, and so do calls.
    let (three, four) = (Region::map(PAGES), Region::map(PAGES));
    three.fill_from(FIRST + 300);
    four.fill_from(FIRST + 300);
    merge_pair(three, four);
    reap(crate::victim::fork(|| one.check_from(FIRST)));
    two.check_from(FIRST);
    tell(&format!("{ROUNDS} children killed in {} calls", 2 * CALLS.load(SeqCst)));
}

/// D-11: a vfork child that is killed inside the gate keeps nobody out.
#[test]
fn d_11_children_are_killed_inside_the_gate() {
    let stand = Stand::on_request();
    let output = stand.run("killed_inside");
    println!("{}", output.lines().rfind(|line| line.ends_with("calls")).unwrap_or_default());
    stand.assert_merged(2 * PAGES as u64);
}

/// Pages are given back at a limit of memory, which fails; what the program maps next must not lie where pages are
/// moved to later.
fn moves_at_a_limit() {
    let (one, two) = merged_pair(PAGES, FIRST);
    one.fill_from(FIRST + 100);
    let helper = helper_of(pid());
    let limit = |bytes: u64| {
        let limit = libc::rlimit { rlim_cur: bytes, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: the kernel reads the limit.
        let set = unsafe { libc::prlimit(helper, libc::RLIMIT_DATA, &raw const limit, std::ptr::null_mut()) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    };
    limit(page() as u64);
    assert_ne!(one.advise(libc::MADV_UNMERGEABLE), 0, "there was room");
    let fresh: Vec<Region> = (1..8).map(Region::map).collect();
    fresh.iter().for_each(|region| region.fill_from(FIRST + 200));
    limit(libc::RLIM_INFINITY);
    let _ = one.advise(libc::MADV_UNMERGEABLE);
    one.check_from(FIRST + 100);
    two.check_from(FIRST);
    fresh.iter().for_each(|region| region.check_from(FIRST + 200));
}

/// D-17: a move that fails has unmapped its target. Where the program has mapped something meanwhile nothing is moved to.
///
/// Seen to fail: without the reservation anew, the fresh memory was gone.
#[test]
fn d_17_a_move_fails_at_a_limit() {
    let stand = Stand::on_request();
    stand.run("moves_at_a_limit");
    stand.assert_merged(PAGES as u64);
}

/// Has memory given back and hands it over again, while threads write all of it and the broker watches writes.
fn given_back_while_tracked() {
    const MANY: usize = 2049;
    static OVER: AtomicBool = AtomicBool::new(false);
    let (one, two) = (Region::map(MANY), Region::map(MANY));
    one.fill_from(FIRST);
    two.fill_from(FIRST);
    one.mergeable();
    two.mergeable();
    let until = Instant::now() + Duration::from_secs(8);
    let writers: Vec<_> = (0..3_usize)
        .map(|number| {
            std::thread::spawn(move || {
                // Word 5 of every page counts, and nobody else writes there.
                let mut counts = vec![None::<u64>; MANY];
                let mut random = Random(0x77 + number as u64);
                let mut wrong = 0;
                while !OVER.load(SeqCst) {
                    let index = random.below(MANY as u64 / 3) as usize * 3 + number;
                    let word = (one.address(index) + 40) as *mut u64;
                    // SAFETY: a word of the victim's own region that only this thread writes.
                    let now = unsafe { word.read_volatile() };
                    wrong += u32::from(counts[index].is_some_and(|count| count != now));
                    // SAFETY: as above.
                    unsafe { word.write_volatile(now.wrapping_add(1)) };
                    counts[index] = Some(now.wrapping_add(1));
                    std::thread::sleep(Duration::from_millis(1));
                }
                wrong
            })
        })
        .collect();
    let (mut times, mut round) = (0, 0_usize);
    while Instant::now() < until {
        std::thread::sleep(Duration::from_millis(400));
        // Locked memory is not merged, and stays under management.
        // SAFETY: locks the victim's own memory, and unlocks it.
        times += usize::from(unsafe { libc::mlock(one.pointer(0), one.len()) } == 0);
        // SAFETY: as above.
        unsafe { libc::munlock(one.pointer(0), one.len()) };
        round += 1;
    }
    OVER.store(true, SeqCst);
    let wrong: u32 = writers.into_iter().map(|writer| writer.join().unwrap()).sum();
    tell(&format!("{times} of {round} times given back"));
    assert_eq!(wrong, 0, "words lost what was written to them");
    two.check_from(FIRST);
}

/// D-16: while a thread has its pages given back memory is registered for tracking; whoever touches a frozen page waits
/// all the same. (The helper does both, one after the other. This has not been seen to fail.)
#[test]
fn d_16_pages_are_given_back_while_writes_are_tracked() {
    let stand = Stand::watching();
    let output = stand.run("given_back_while_tracked");
    println!("{}", output.lines().rfind(|line| line.ends_with("given back")).unwrap_or_default());
    stand.assert_merged(1000);
}

/// Nothing in here is equal to anything, and all of it is tracked.
fn taken_while_tracked() {
    let tracked = |region: &Region| flags_at(region.start).contains(" uw");
    let regions = [Region::map(PAGES), Region::map(PAGES)];
    for (index, region) in regions.iter().enumerate() {
        region.fill_from(FIRST + (index * PAGES) as u64);
        region.mergeable();
        wait_until("it is tracked", || {
            merge_now();
            tracked(region)
        });
    }
    let [one, two] = &regions;
    assert_eq!(one.advise(libc::MADV_UNMERGEABLE), 0);
    for _ in 0..20 {
        assert!(!tracked(one), "what is not managed is registered: {}", flags_at(one.start));
        merge_now();
        std::thread::sleep(Duration::from_millis(5));
    }
    let uffd = userfaultfd(0);
    let mut register = [two.start as u64, two.len() as u64, 1, 0];
    // SAFETY: the kernel reads and writes a struct uffdio_register.
    let registered = unsafe { libc::ioctl(uffd, 0xc020_aa00, register.as_mut_ptr()) };
    assert_eq!(registered, 0, "error {}", errno());
    one.check_from(FIRST);
    two.check_from(FIRST + PAGES as u64);
}

/// D-16: memory of which nothing is merged may be registered all the same. Neither the program's own userfaultfd nor its
/// mremap may meet with that.
///
/// Seen to fail: where nothing was merged the helper was not asked, and QEMU's background snapshot had EBUSY.
#[test]
fn d_16_what_is_tracked_is_let_go_of() {
    let stand = Stand::watching();
    stand.run("taken_while_tracked");
}

/// All of it is written again and again.
fn hot() {
    const HOT: usize = 2048;
    const ROUNDS: u64 = 100;
    let region = Region::map(HOT);
    region.mergeable();
    let faults = || {
        // SAFETY: a structure of numbers, which the kernel writes.
        unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            libc::getrusage(libc::RUSAGE_SELF, &raw mut usage);
            usage.ru_minflt
        }
    };
    let mut before = 0;
    for round in 0..ROUNDS {
        if round == ROUNDS / 2 {
            before = faults();
        }
        for index in 0..HOT {
            // SAFETY: memory of the victim.
            unsafe { (region.address(index) as *mut u64).write_volatile(round * HOT as u64 + index as u64) };
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let (taken, most) = (faults() - before, HOT as i64 * ROUNDS as i64 / 2);
    tell(&format!("{taken} faults, {most} at most"));
    assert!(taken < most / 4, "{taken} faults in {most} writes to pages that are written all the time");
}

/// Seen to fail: pages that were written all the time were protected in each cycle, and their program paid a fault for each:
/// Python workers that read all their data twice a second took 50 % more CPU for it.
#[test]
fn what_is_written_all_the_time_costs_few_faults() {
    let stand = Stand::watching();
    println!("{}", stand.run("hot"));
}
