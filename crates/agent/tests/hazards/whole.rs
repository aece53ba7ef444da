//! Programs that hand nothing over and are managed whole (`--scope all`).

use std::fs::File;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::process::helpers_of;
use crate::stand::Stand;
use crate::victim::{Random, Region, Victim, flags_at, fork, hear, page, pid, reap, tell, wait_until};

pub(crate) const VICTIMS: &[Victim] = &[
    ("whole", whole),
    ("whole_young", young),
    ("whole_old", old),
    ("whole_churn", churn),
    ("whole_fork", forked),
    ("whole_code", code),
    ("whole_child_code", child_code),
    ("whole_unreadable", unreadable),
    ("whole_orphan", orphan),
    ("whole_killed", killed),
    ("whole_forsaken", forsaken),
    ("whole_ring", ring),
    ("whole_keys", keys),
    ("whole_limited", limited),
    ("whole_undumped", undumped),
    ("whole_unmounts", unmounts),
];

const FIRST: u64 = 9000;
/// 16 MiB: worth a helper at once.
pub(crate) const LARGE: usize = 4096;

/// Equal halves; the second is not touched any more. Neighbours of the kernel's choice, and so one mapping.
pub(crate) fn large_pair() -> (Region, Region) {
    let (one, two) = (Region::map(LARGE), Region::map(LARGE));
    one.fill_from(FIRST);
    two.fill_from(FIRST);
    (one, two)
}

pub(crate) fn wait_whole(one: Region, two: Region) {
    // The last page of a mapping is never merged, nor are control blocks and their neighbours.
    one.wait_merged(LARGE - 8);
    two.wait_merged(LARGE - 8);
}

fn whole() {
    // As libraries ask what the kernel has (libseccomp in QEMU). Seen to fail: nothing was merged after that.
    // SAFETY: both are refused.
    let asked = unsafe { (libc::prctl(22, 2, 0), libc::syscall(libc::SYS_seccomp, 1, 0, 0)) };
    assert_eq!(asked, (-1, -1));
    let (one, two) = large_pair();
    wait_whole(one, two);
    one.check_from(FIRST);
    // What a plain page does.
    one.part(10, 20).advise(libc::MADV_DONTNEED);
    one.part(10, 20).check_zero();
    one.part(30, 40).unmap();
    assert_eq!(one.part(50, 60).protect(libc::PROT_READ), 0);
    one.part(40, LARGE).check_from(FIRST + 40);
    one.part(0, 10).fill_from(1);
    one.part(0, 10).check_from(1);
    two.check_from(FIRST);
    // The heap is managed too, and gives back what it does not need.
    let blocks: Vec<Vec<u8>> = (0..64).map(|_| vec![7; 100_000]).collect();
    wait_until("the heap is merged", || {
        let stored = std::fs::read_to_string("/proc/self/maps").unwrap();
        stored.lines().filter(|line| line.contains("/memfd:pagefold")).count() > 2
    });
    assert!(blocks.iter().all(|block| block.iter().all(|byte| *byte == 7)));
    drop(blocks);
    let fresh = vec![0_u8; 100_000];
    assert!(fresh.iter().all(|byte| *byte == 0));
}

#[test]
fn a_program_that_hands_nothing_over_is_merged_whole() {
    let stand = Stand::of_all(|_| true);
    stand.run("whole");
    stand.assert_merged(2 * LARGE as u64 - 100);
}

fn young() {
    let (one, two) = (Region::map(100), Region::map(100));
    one.fill_from(FIRST);
    two.fill_from(FIRST);
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(one.merged() + two.merged(), 0);
}

#[test]
fn what_lives_short_has_no_helper() {
    let stand = Stand::of_all(|_| true);
    stand.run("whole_young");
    assert_eq!(stand.summary().processes_ever, 0);
}

fn old() {
    let (one, two) = (Region::map(100), Region::map(100));
    one.fill_from(FIRST);
    two.fill_from(FIRST);
    std::thread::sleep(Duration::from_millis(1100));
    // Any call through the gate.
    Region::map(1).unmap();
    one.wait_merged(99);
    one.check_from(FIRST);
    two.check_from(FIRST);
}

#[test]
fn a_small_program_that_lives_is_merged() {
    Stand::of_all(|_| true).run("whole_old");
}

/// Threads that map, discard, move, protect and unmap, none of whose memory was handed over: every call is made while
/// memory comes under management and is merged.
fn churn() {
    const THREADS: u64 = 4;
    const ROUND: usize = 96;
    let seconds = std::env::var("CHURN_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(12);
    let (one, two) = large_pair();
    let until = Instant::now() + Duration::from_secs(seconds);
    let rounds = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let rounds = &rounds;
            scope.spawn(move || {
                let mut random = Random(77 + thread);
                let mut held: Vec<(Region, u64)> = Vec::new();
                while Instant::now() < until {
                    rounds.fetch_add(1, SeqCst);
                    match random.below(7) {
                        0 | 1 if held.len() < 24 => {
                            let region = Region::map(ROUND);
                            region.check_zero();
                            // Few contents, so that most pages have twins.
                            let first = FIRST + 64 * random.below(3);
                            region.fill_from(first);
                            held.push((region, first));
                        }
                        2 if !held.is_empty() => {
                            let (region, first) = held.swap_remove(random.below(held.len() as u64) as usize);
                            region.check_from(first);
                            region.unmap();
                        }
                        3 if !held.is_empty() => {
                            let (region, first) = held[random.below(held.len() as u64) as usize];
                            let from = random.below(ROUND as u64 - 8) as usize;
                            let part = region.part(from, from + 8);
                            part.check_from(first + from as u64);
                            assert_eq!(part.advise(libc::MADV_DONTNEED), 0);
                            part.check_zero();
                            part.fill_from(first + from as u64);
                        }
                        4 if !held.is_empty() => {
                            let at = random.below(held.len() as u64) as usize;
                            let (region, first) = held[at];
                            let flags = libc::MREMAP_MAYMOVE;
                            let len = (ROUND + 16) * page();
                            // SAFETY: the thread's own region, which nobody else knows.
                            let moved = unsafe { libc::mremap(region.pointer(0), region.len(), len, flags) };
                            assert_ne!(moved, libc::MAP_FAILED);
                            let grown = Region { start: moved as usize, pages: ROUND + 16 };
                            grown.part(0, ROUND).check_from(first);
                            grown.part(ROUND, ROUND + 16).check_zero();
                            grown.part(ROUND, ROUND + 16).unmap();
                            held[at].0 = grown.part(0, ROUND);
                        }
                        5 if !held.is_empty() => {
                            let (region, first) = held[random.below(held.len() as u64) as usize];
                            assert_eq!(region.protect(libc::PROT_READ), 0);
                            region.check_from(first);
                            assert_eq!(region.protect(libc::PROT_READ | libc::PROT_WRITE), 0);
                        }
                        _ => std::thread::sleep(Duration::from_millis(random.below(120))),
                    }
                }
                for (region, first) in held {
                    region.check_from(first);
                }
            });
        }
    });
    one.check_from(FIRST);
    two.check_from(FIRST);
    tell(&format!("{} rounds", rounds.load(SeqCst)));
}

/// Seen to fail: memory that was managed when the broker looked was registered when it was something else, half of a
/// mapping, and the program could not grow it (EFAULT).
#[test]
fn calls_that_touch_nothing_managed_wait_for_what_comes_under_management() {
    let stand = Stand::of_all(|_| true);
    stand.run("whole_churn");
    stand.assert_merged(2 * LARGE as u64);
}

/// A child of fork has what its parent had merged, and no helper until it is old enough.
fn forked() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    for age in [0, 1100] {
        let child = fork(|| {
            one.check_from(FIRST);
            std::thread::sleep(Duration::from_millis(age));
            assert_eq!(one.part(0, 50).advise(libc::MADV_DONTNEED), 0);
            one.part(0, 50).check_zero();
            one.part(100, 200).unmap();
            two.part(0, 50).fill_from(3);
            two.part(0, 50).check_from(3);
            two.part(50, LARGE).check_from(FIRST + 50);
            one.part(200, LARGE).check_from(FIRST + 200);
        });
        reap(child);
    }
    one.check_from(FIRST);
    two.check_from(FIRST);
}

#[test]
fn children_keep_what_the_gate_owes_them() {
    Stand::of_all(|_| true).run("whole_fork");
}

/// Maps a file's first page as code.
fn bring(name: &str) {
    try_to_bring(name).unwrap();
}

fn try_to_bring(name: &str) -> std::io::Result<()> {
    let file = File::open(name).unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    let prot = libc::PROT_READ | libc::PROT_EXEC;
    // SAFETY: a free place of the kernel's choice.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), page(), prot, libc::MAP_PRIVATE, fd, 0) };
    if at == libc::MAP_FAILED { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// Code comes when everything is merged: what the broker admits changes nothing, what it does not admit ends it.
fn code() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    bring("/proc/self/exe");
    assert!(one.merged() >= LARGE - 8 && two.merged() >= LARGE - 8);
    tell("admitted");
    hear();
    bring("/bin/sh");
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "it came, and pages are still merged");
    one.check_from(FIRST);
    two.check_from(FIRST);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "merged again");
    tell(&format!("{} is left", pid()));
}

/// Code comes while merged pages cannot be read, some of which had been written before.
fn unreadable() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    let part = one.part(100, 140);
    part.part(3, 5).fill_from(1);
    assert_eq!(part.protect(libc::PROT_NONE), 0);
    let begun = Instant::now();
    bring("/bin/sh");
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "it came, and pages are still merged");
    assert!(!flags_at(part.start).contains(" rd"), "it can be read: {}", flags_at(part.start));
    assert_eq!(part.protect(libc::PROT_READ | libc::PROT_WRITE), 0);
    part.part(3, 5).check_from(1);
    part.part(3, 5).fill_from(FIRST + 103);
    one.check_from(FIRST);
    two.check_from(FIRST);
}

/// Seen to fail: what nobody could read was never given back, and libraries were refused for ever.
#[test]
fn what_cannot_be_read_is_given_back_too() {
    Stand::of_all(|_| false).run("whole_unreadable");
}

#[test]
fn what_nobody_knows_ends_merging_before_it_comes() {
    use std::os::unix::fs::MetadataExt as _;
    let stand = Stand::of_all(|file| {
        let inode = |name: &str| std::fs::metadata(name).map(|about| about.ino()).ok();
        let asked = file.and_then(|file| file.metadata().ok()).map(|about| about.ino());
        asked.is_some() && asked == inode("/proc/self/exe")
    });
    let mut victim = stand.start("whole_code");
    victim.expect("admitted");
    victim.say("go on");
    victim.succeed();
    let stopped = stand.summary().stopped;
    assert!(matches!(&stopped[..], [one] if one.contains("/hazards-") && one.contains("vouches for")), "{stopped:?}");
}

/// Children of fork map code before they have a helper of their own, alone and with other threads.
fn child_code() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    for threads in [0, 2] {
        for _ in 0..5 {
            reap(fork(|| in_company(threads, || bring_all(one, two))));
        }
    }
    assert!(one.merged() >= LARGE - 8 && two.merged() >= LARGE - 8);
    one.check_from(FIRST);
    two.check_from(FIRST);
}

/// Maps code that is not admitted: nothing is merged any more once it is there.
fn bring_all(one: Region, two: Region) {
    bring("/bin/sh");
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "it came, and pages are still merged");
    one.check_from(FIRST);
    two.check_from(FIRST);
}

/// As [`bring_all`], where pages have other protections and advices, which they keep.
fn bring_alone(one: Region, two: Region) {
    assert_eq!(one.part(10, 20).protect(libc::PROT_NONE), 0);
    assert_eq!(one.part(300, 700).protect(libc::PROT_READ), 0);
    assert_eq!(two.part(100, 200).advise(libc::MADV_DONTFORK), 0);
    two.part(200, 210).fill_from(7);
    bring("/bin/sh");
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "it came, and pages are still merged");
    let smaps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let has = |region: Region, prot: &str| {
        smaps
            .lines()
            .any(|line| line.starts_with(&format!("{:x}-{:x} {prot}", region.start, region.start + region.len())))
    };
    assert!(has(one.part(10, 20), "---p") && has(one.part(300, 700), "r--p"), "{smaps}");
    assert_eq!(one.part(10, 20).protect(libc::PROT_READ | libc::PROT_WRITE), 0);
    assert_eq!(one.part(300, 700).protect(libc::PROT_READ | libc::PROT_WRITE), 0);
    one.check_from(FIRST);
    two.part(0, 200).check_from(FIRST);
    two.part(200, 210).check_from(7);
    two.part(210, LARGE).check_from(FIRST + 210);
    // What a plain page does, and one mapping again.
    assert_eq!(one.advise(libc::MADV_DONTNEED), 0);
    one.check_zero();
    // SAFETY: the region, which nobody else uses.
    let grown = unsafe { libc::mremap(one.pointer(0), one.len(), one.len() + page(), libc::MREMAP_MAYMOVE) };
    assert_ne!(grown, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    let mut resident = [0_u8; 1];
    // SAFETY: asks about one page.
    reap(fork(|| assert_eq!(unsafe { libc::mincore(two.pointer(100), page(), resident.as_mut_ptr()) }, -1)));
}

/// Runs something while other threads work.
fn in_company(threads: usize, work: impl FnOnce()) {
    struct Done<'a>(&'a AtomicU32);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(1, SeqCst);
        }
    }
    let done = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while done.load(SeqCst) == 0 {
                    std::thread::sleep(Duration::from_micros(200));
                }
            });
        }
        let _done = Done(&done);
        work();
    });
}

/// Seen to fail: a child without a helper was let go on with all pages merged, and unknown code in it.
#[test]
fn what_nobody_knows_ends_merging_in_young_children_too() {
    use std::os::unix::fs::MetadataExt as _;
    let stand = Stand::of_all(|file| {
        let inode = file.and_then(|file| file.metadata().ok()).map(|about| about.ino());
        inode != Some(std::fs::metadata("/bin/sh").unwrap().ino())
    });
    stand.run("whole_child_code");
}

/// The broker is gone, and what was merged is still merged; children are forked, and code comes.
fn orphan() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    tell("merged");
    hear();
    assert!(one.merged() >= LARGE - 8 && two.merged() >= LARGE - 8);
    // Forks by themselves.
    reap(fork(|| one.check_from(FIRST)));
    // Children that get no helper any more: whoever is alone gives the pages back by himself.
    reap(fork(|| bring_alone(one, two)));
    reap(fork(|| {
        in_company(2, || {
            let error = try_to_bring("/bin/sh").expect_err("code came into merged memory");
            assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
        });
        assert!(one.merged() >= LARGE - 8 && two.merged() >= LARGE - 8);
        wait_until("the others are gone", || {
            std::fs::read_to_string("/proc/self/status").unwrap().contains("\nThreads:\t1\n")
        });
        bring_alone(one, two);
    }));
    bring("/bin/sh");
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "it came, and pages are still merged");
    one.check_from(FIRST);
    two.check_from(FIRST);
    tell(&format!("{} has its own", pid()));
}

/// Seen to fail: nobody was left who could give pages back, and the program could not load libraries any more (ENOMEM).
#[test]
fn code_comes_when_the_broker_has_gone() {
    let stand = Stand::of_all(|_| true);
    let mut victim = stand.start("whole_orphan");
    victim.expect("merged");
    let _ = stand.broker.ask(broker::Wish::Stop);
    victim.say("go on");
    victim.succeed();
}

/// Kills the helper, once there is one: any call through the gate may bring it.
fn kill_helper() {
    wait_until("a helper is there", || {
        Region::map(1).unmap();
        // SAFETY: sends a signal.
        helpers_of(pid()).first().is_some_and(|helper| unsafe { libc::kill(*helper, libc::SIGKILL) } == 0)
    });
}

/// Helpers are killed while everything is merged, and the program goes on at once.
fn killed() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    for _ in 0..2 {
        kill_helper();
        bring("/proc/self/exe");
        assert!(one.merged() >= LARGE - 40 && two.merged() >= LARGE - 8);
        kill_helper();
        let part = one.part(100, 120);
        // SAFETY: locks pages, and unlocks them.
        assert_eq!(unsafe { libc::mlock(part.pointer(0), part.len()) }, 0, "{}", std::io::Error::last_os_error());
        assert!(part.stored().is_empty());
        // SAFETY: as above.
        assert_eq!(unsafe { libc::munlock(part.pointer(0), part.len()) }, 0);
    }
    // What comes later is merged as well.
    kill_helper();
    let three = Region::map(LARGE);
    three.fill_from(FIRST);
    wait_until("another helper merges", || {
        Region::map(1).unmap();
        three.merged() >= LARGE - 8
    });
    kill_helper();
    bring_all(one, two);
    three.check_from(FIRST);
    bring("/bin/sh");
}

/// Seen to fail: while a helper that was killed had no successor, which was for ever, code that came was refused, and locks.
#[test]
fn a_killed_helper_is_replaced_at_once() {
    use std::os::unix::fs::MetadataExt as _;
    let stand = Stand::of_all(|file| {
        let inode = file.and_then(|file| file.metadata().ok()).map(|about| about.ino());
        inode != Some(std::fs::metadata("/bin/sh").unwrap().ino())
    });
    stand.run("whole_killed");
}

/// Broker and helper are both gone, everything is merged, and there are other threads: nobody can give pages back.
fn forsaken() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    tell("merged");
    hear();
    kill_helper();
    in_company(2, || {
        for _ in 0..4 {
            let error = try_to_bring("/bin/sh").expect_err("code came into merged memory");
            assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
            assert!(one.merged() >= LARGE - 8 && two.merged() >= LARGE - 8);
        }
    });
    one.check_from(FIRST);
    two.check_from(FIRST);
}

/// Seen to fail: what had been refused once was let in when it came again.
#[test]
fn who_asks_twice_hears_the_same() {
    let stand = Stand::of_all(|_| true);
    let mut victim = stand.start("whole_forsaken");
    victim.expect("merged");
    let _ = stand.broker.ask(broker::Wish::Stop);
    wait_until("the broker is gone", || stand.broker.summary().is_err());
    victim.say("go on");
    victim.succeed();
}

/// A ring could discard memory past the gate.
fn ring() {
    const SYS_IO_URING_SETUP: i64 = 425;
    let (one, two) = large_pair();
    wait_whole(one, two);
    let parameters = [0_u32; 30];
    // SAFETY: the kernel reads and writes 120 bytes of parameters.
    let ring = unsafe { libc::syscall(SYS_IO_URING_SETUP, 4, parameters.as_ptr()) };
    if ring < 0 {
        tell("skipped: io_uring");
        return;
    }
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "it is there, and pages are still merged");
    one.check_from(FIRST);
    two.check_from(FIRST);
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "merged again");
}

#[test]
fn a_ring_ends_merging_before_it_is_there() {
    let stand = Stand::of_all(|_| true);
    stand.run("whole_ring");
    let stopped = stand.summary().stopped;
    assert!(matches!(&stopped[..], [one] if one.contains("io_uring")), "{stopped:?}");
}

/// Keys are marked as not to be dumped: they are nobody's twin any more.
fn keys() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    assert_eq!(one.part(100, 200).advise(libc::MADV_DONTDUMP), 0);
    assert!(one.part(100, 200).stored().is_empty());
    std::thread::sleep(Duration::from_millis(2500));
    assert!(one.part(100, 200).stored().is_empty(), "merged again");
    one.check_from(FIRST);
    two.check_from(FIRST);
}

#[test]
fn what_is_not_to_be_dumped_is_not_merged() {
    Stand::of_all(|_| true).run("whole_keys");
}

/// A program under a limit of address space has it for itself.
fn limited() {
    let limit = libc::rlimit { rlim_cur: 8 << 30, rlim_max: 8 << 30 };
    // SAFETY: the kernel reads the limit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }, 0);
    let (one, two) = large_pair();
    std::thread::sleep(Duration::from_millis(1500));
    Region::map(1).unmap();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(one.stored().len() + two.stored().len(), 0);
}

#[test]
fn a_program_with_a_limit_is_left_alone() {
    let stand = Stand::of_all(|_| true);
    stand.run("whole_limited");
    assert_eq!(stand.summary().processes_ever, 0);
}

/// Memory that was merged and then is not to be dumped consists of several mappings, which the program takes for one.
fn undumped() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    // Every other page of its own again.
    (0..LARGE).step_by(2).for_each(|index| one.fill(index, FIRST + index as u64));
    assert_eq!(one.advise(libc::MADV_DONTDUMP), 0);
    assert_eq!(one.merged(), 0);
    std::thread::sleep(Duration::from_millis(800));
    assert_eq!(one.merged(), 0);
    one.check_from(FIRST);
    // SAFETY: grows memory of the victim.
    let moved = unsafe {
        libc::mremap(
            one.pointer(0),
            one.len(),
            2 * one.len(),
            libc::MREMAP_MAYMOVE,
            std::ptr::null_mut::<libc::c_void>(),
        )
    };
    assert!(moved != libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
    let grown = Region { start: moved as usize, pages: 2 * LARGE };
    grown.part(0, LARGE).check_from(FIRST);
    grown.part(LARGE, 2 * LARGE).check_zero();
    grown.fill_from(1);
    std::thread::sleep(Duration::from_millis(800));
    assert!(!(0..LARGE).step_by(64).any(|index| grown.part(index, index + 1).merged() > 0));
    grown.check_from(1);
    two.check_from(FIRST);
}

/// Seen to fail: mremap said EFAULT.
#[test]
fn v3_what_is_not_to_be_dumped_any_more_can_grow() {
    Stand::of_all(|_| true).run("whole_undumped");
}

/// A program that leaves the file system in which it was started, and unmounts it.
fn unmounts() {
    let folder = std::env::temp_dir().join(format!("pagefold-unmounts-{}", pid()));
    std::fs::create_dir(&folder).unwrap();
    let path = std::ffi::CString::new(folder.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: mounts in a mount namespace of the victim's own.
    unsafe {
        if libc::unshare(libc::CLONE_NEWNS) != 0 {
            return println!("skipped: not root");
        }
        assert_eq!(
            libc::mount(
                c"none".as_ptr(),
                c"/".as_ptr(),
                std::ptr::null(),
                libc::MS_REC | libc::MS_PRIVATE,
                std::ptr::null()
            ),
            0
        );
        assert_eq!(libc::mount(c"none".as_ptr(), path.as_ptr(), c"tmpfs".as_ptr(), 0, std::ptr::null()), 0);
    }
    std::env::set_current_dir(&folder).unwrap();
    let (one, two) = large_pair();
    wait_whole(one, two);
    std::env::set_current_dir("/").unwrap();
    // SAFETY: what was mounted above.
    assert_eq!(unsafe { libc::umount(path.as_ptr()) }, 0, "{}", std::io::Error::last_os_error());
    std::fs::remove_dir(&folder).unwrap();
}

/// Seen to fail: the helper was still there (EBUSY).
#[test]
fn v17_a_helper_holds_no_folder() {
    Stand::of_all(|_| true).run("whole_unmounts");
}
