//! D3, D4, 7.2: forks and closed descriptors while pages are merged.

use std::time::{Duration, Instant};

use crate::process::helper_of;
use crate::raw_fork::raw_fork;
use crate::stand::Stand;
use crate::victim::{Random, Region, Victim, end_with, merge_densely, merge_pair, reap, tell, two_contents};

pub(crate) const VICTIMS: &[Victim] = &[
    ("forks", || forks(Kind::Libc, 50, 5)),
    ("raw_forks", || forks(Kind::Raw, 50, 5)),
    ("few_forks", || forks(Kind::Libc, 5, 5)),
    ("few_raw_forks", || forks(Kind::Raw, 5, 5)),
    ("raw_forks_for_long", || forks(Kind::Raw, 5, 10)),
    ("vforks", vforks),
    ("apart", apart),
    ("close_all", close_all),
];

const PAGES: usize = 64;
const FIRST: u64 = 2000;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Libc,
    Raw,
}

/// Forks at random moments of dense merging; children check every byte and write their own.
fn forks(kind: Kind, at_least: u64, seconds: u64) {
    let (one, two) = two_contents(PAGES, FIRST);
    let mut random = Random(99);
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut rounds = 0_u64;
    while Instant::now() < until {
        let first = FIRST + PAGES as u64 * (rounds % 2);
        let step = 1 + random.below(3) as usize;
        one.fill_from(first);
        std::thread::sleep(Duration::from_micros(random.below(4000)));
        let check = || {
            one.check_from(first);
            two.check_from(FIRST);
            for index in (0..PAGES).step_by(step) {
                one.fill(index, 9);
                assert!(one.holds(index, 9));
            }
        };
        let id = match kind {
            Kind::Libc => crate::victim::fork(check),
            Kind::Raw => {
                let id = raw_fork();
                if id == 0 {
                    end_with(check);
                }
                id
            }
        };
        assert!(id > 0);
        one.check_from(first);
        for index in (0..PAGES).step_by(5) {
            one.fill(index, 8);
        }
        reap(id);
        rounds += 1;
    }
    two.check_from(FIRST);
    tell(&format!("{rounds} forks"));
    assert!(rounds > at_least, "only {rounds} forks");
}

/// D4: libc's fork in the middle of dense merging; parent and children see what they should.
#[test]
fn d4_forks_while_pages_are_merged() {
    let stand = Stand::on_request();
    stand.run("forks");
    stand.assert_merged(1000);
}

/// D4, 7.2: raw forks, which the gate does not see: the child's pages are filled in by the broker.
#[test]
fn d4_raw_forks_while_pages_are_merged() {
    let stand = Stand::on_request();
    stand.run("raw_forks");
    stand.assert_merged(1000);
}

/// The thread of this process that reads the events of a member's forks.
pub(crate) fn event_reader(helper: i32) -> i32 {
    let name = format!("pf-fork {helper}");
    for _ in 0..100 {
        for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
            let comm = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
            if comm.trim_end() == name {
                return task.file_name().to_str().unwrap().parse().unwrap();
            }
        }
        // It names itself when it first runs.
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("nobody reads the events of {helper}");
}

/// Starts a process that lets threads of this one wait at each of their system calls.
pub(crate) fn delay(threads: &[i32], by: Duration) -> i32 {
    let pause = libc::timespec { tv_sec: 0, tv_nsec: by.subsec_nanos().into() };
    // SAFETY: the child makes system calls only, and ends with _exit once the threads that it traces are gone.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            for thread in threads {
                // Without the option a thread whose tracer is killed while it waits gets a SIGTRAP.
                libc::ptrace(libc::PTRACE_SEIZE, *thread, 0, libc::PTRACE_O_TRACESYSGOOD);
                libc::ptrace(libc::PTRACE_INTERRUPT, *thread, 0, 0);
            }
            loop {
                let mut status = 0;
                let thread = libc::waitpid(-1, &raw mut status, libc::__WALL);
                if thread <= 0 {
                    libc::_exit(0);
                }
                libc::nanosleep(&raw const pause, std::ptr::null_mut());
                libc::ptrace(libc::PTRACE_SYSCALL, thread, 0, 0);
            }
        }
        child
    }
}

/// Runs a victim that forks past the gate; `who` chooses whom to hold up, of the reader of its events and its helper.
fn with_delay(who: impl FnOnce(i32, i32) -> Vec<i32>) {
    let stand = Stand::on_request();
    let mut running = stand.start("few_raw_forks");
    running.expect_dense();
    let helper = helper_of(running.pid());
    let tracer = delay(&who(event_reader(helper), helper), Duration::from_micros(300));
    running.succeed();
    // SAFETY: ends the child of this test.
    unsafe { libc::kill(tracer, libc::SIGKILL) };
    stand.assert_merged(100);
}

/// D4 again: what is given to a child is what was frozen when it was made. The reader of the events waits between any
/// two of its steps here: what it learned before the fork is out of date.
#[test]
fn d4_raw_forks_and_a_reader_that_lags() {
    with_delay(|reader, _| vec![reader]);
}

/// D4 again: the helper waits between looking for forks and putting pages back, and a fork comes in between.
#[test]
fn d4_raw_forks_and_a_helper_that_lags() {
    with_delay(|_, helper| vec![helper]);
}

/// Both of them.
#[test]
fn d4_raw_forks_and_everybody_lags() {
    with_delay(|reader, helper| vec![reader, helper]);
}

/// A child in this memory, on this stack: it writes one word and ends, all without using the stack.
fn vfork_that_writes(address: usize) -> i32 {
    let flags = i64::from(libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD);
    let result: i64;
    // SAFETY: the parent waits until the child has ended, and the child touches nothing but the word.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "mov qword ptr [r9], 7",
            "mov eax, 60",
            "xor edi, edi",
            "syscall",
            "2:",
            inlateout("rax") libc::SYS_clone => result,
            inlateout("rdi") flags => _, in("rsi") 0, in("rdx") 0, in("r10") 0, in("r8") 0, in("r9") address,
            lateout("rcx") _, lateout("r11") _
        );
    }
    result as i32
}

/// vfork children write into the parent's merged memory.
fn vforks() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(FIRST);
    two.fill_from(FIRST);
    merge_pair(one, two);
    merge_densely();
    for round in 0..200_usize {
        let index = round % (PAGES - 1);
        reap(vfork_that_writes(one.address(index)));
        assert_eq!(one.read(index)[0], 7);
        one.fill(index, FIRST + index as u64);
        one.check_from(FIRST);
    }
    two.check_from(FIRST);
}

/// Section 6, D-11: vfork children write into merged memory.
#[test]
fn vfork_children_write_into_merged_memory() {
    let stand = Stand::on_request();
    stand.run("vforks");
    stand.assert_merged(PAGES as u64);
}

/// After a fork both sides write, on clean and diverged pages, and neither sees the other.
fn apart() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(FIRST);
    two.fill_from(FIRST);
    merge_pair(one, two);
    for index in (0..PAGES).step_by(4) {
        one.fill(index, 70_000 + index as u64);
    }
    let seed = |index: usize| if index.is_multiple_of(4) { 70_000 + index as u64 } else { FIRST + index as u64 };
    let id = crate::victim::fork(|| {
        (0..PAGES).for_each(|index| assert!(one.holds(index, seed(index)), "page {index}"));
        one.fill_from(80_000);
        one.check_from(80_000);
        // The child's memory can be merged and un-merged as well.
        two.fill_from(80_000);
        assert_eq!(one.advise(libc::MADV_UNMERGEABLE), 0);
        one.check_from(80_000);
        assert_eq!(one.advise(libc::MADV_DONTNEED), 0);
        one.check_zero();
    });
    for index in (0..PAGES).step_by(3) {
        one.fill(index, 90_000 + index as u64);
    }
    reap(id);
    for index in 0..PAGES {
        let seed = if index.is_multiple_of(3) { 90_000 + index as u64 } else { seed(index) };
        assert!(one.holds(index, seed), "page {index}");
    }
    two.check_from(FIRST);
}

/// Section 6: fork after merging, both sides write.
#[test]
fn parent_and_child_write_apart() {
    let stand = Stand::on_request();
    stand.run("apart");
    stand.assert_merged(PAGES as u64);
}

/// A daemon closes every descriptor that it does not know, again and again.
fn close_all() {
    let (one, two) = two_contents(PAGES, FIRST);
    let until = Instant::now() + Duration::from_secs(3);
    let mut round = 0;
    while Instant::now() < until {
        let first = FIRST + PAGES as u64 * (round % 2);
        one.fill_from(first);
        // SAFETY: closes whatever this process has beyond the standard descriptors.
        unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
        // The numbers belong to something else from here on.
        let files: Vec<_> = (0..12).filter_map(|_| std::fs::File::open("/proc/self/exe").ok()).collect();
        std::thread::sleep(Duration::from_millis(3));
        one.check_from(first);
        two.check_from(FIRST);
        drop(files);
        round += 1;
    }
    let before = one.merged();
    one.wait_merged(PAGES / 2);
    tell(&format!("{round} times, {before} merged"));
}

/// D3: closefrom() and daemon() do not reach the agent's descriptors.
#[test]
fn d3_all_descriptors_are_closed_while_pages_are_merged() {
    let stand = Stand::on_request();
    stand.run("close_all");
    stand.assert_merged(500);
}
