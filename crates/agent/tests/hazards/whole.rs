//! Programs that hand nothing over and are managed whole (`--scope all`).

use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::stand::Stand;
use crate::victim::{Random, Region, Victim, fork, page, reap, tell, wait_until};

pub(crate) const VICTIMS: &[Victim] = &[
    ("whole", whole),
    ("whole_shared_code", shared_code),
    ("whole_young", young),
    ("whole_old", old),
    ("whole_churn", churn),
    ("whole_fork", forked),
];

pub(crate) const FIRST: u64 = 9000;
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

/// What is executable here of the file with the changed pages, in KiB, and what of that is this process's own.
fn changed_code() -> (u64, u64) {
    let (mut of_file, mut all, mut own) = (false, 0, 0);
    for line in std::fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let mut words = line.split_ascii_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let kib = || second.parse::<u64>().unwrap();
        match first {
            "Size:" if of_file => all += kib(),
            "Anonymous:" if of_file => own += kib(),
            name if name.contains('-') => of_file = second == "r-xp" && line.ends_with("/sites"),
            _ => {}
        }
    }
    (all, own)
}

fn shared_code() {
    let (all, own) = changed_code();
    println!("{all} {own}");
    let (one, two) = large_pair();
    wait_whole(one, two);
    one.check_from(FIRST);
}

/// Seen to fail: every process had copies. The stack is sometimes so near that there is no room at the distance that all
/// programs have, hence several.
#[test]
fn changed_code_is_one_file_s_in_all_programs() {
    let stand = Stand::of_all(|_| true);
    let shared = |log: &str| log.lines().any(|line| line.ends_with(" 0") && !line.starts_with("0 "));
    assert!((0..8).any(|_| shared(&stand.run("whole_shared_code"))));
}

/// Programs with the same addresses every time have 128 MiB between their libraries and the stack. Seen to fail: their
/// trampolines were to lie beyond the end of addresses, and they were not managed.
#[test]
fn changed_code_is_one_file_s_without_randomness() {
    use std::os::unix::process::CommandExt as _;
    let stand = Stand::of_all(|_| true);
    let mut command = stand.command("whole_shared_code");
    let fixed = || {
        // SAFETY: one system call, between fork and exec.
        (unsafe { libc::personality(libc::ADDR_NO_RANDOMIZE as libc::c_ulong) } != -1)
            .then_some(())
            .ok_or_else(std::io::Error::last_os_error)
    };
    // SAFETY: that call alone.
    unsafe { command.pre_exec(fixed) };
    let log = stand.start_command(command).succeed();
    assert!(log.lines().any(|line| line.ends_with(" 0") && !line.starts_with("0 ")), "{log}");
}

/// Pages that are not what libc's would be are not put in their place. Seen to fail: without the comparison they were.
#[test]
fn changed_code_that_differs_is_not_taken() {
    let stand = Stand::of_all(|_| true);
    stand.damage_changed_code();
    for _ in 0..4 {
        let log = stand.run("whole_shared_code");
        assert!(log.lines().any(|line| line == "0 0"), "{log}");
    }
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
