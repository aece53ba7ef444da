//! Forks that meet a signal, memory that is not handed on, and calls that make nothing.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use crate::stand::Stand;
use crate::victim::{Region, Victim, errno, fork, merged_pair, page, reap};
use crate::whole::{large_pair, wait_whole};

pub(crate) const VICTIMS: &[Victim] = &[
    ("fork_meets_a_signal", meets_a_signal),
    ("fork_leaves_memory_behind", leaves_memory_behind),
    ("replaced_and_failed", replaced_and_failed),
    ("bad_clone3", bad_clone3),
    ("child_meets_a_signal", child_meets_a_signal),
    ("long_numbers", long_numbers),
];

const FIRST: u64 = 71_000;

static INSIDE: AtomicBool = AtomicBool::new(false);

extern "C" fn stops_the_world(_: i32) {
    INSIDE.store(true, SeqCst);
    while INSIDE.load(SeqCst) {
        std::thread::sleep(Duration::from_micros(10));
    }
}

/// As garbage collectors do it: a handler waits until another thread is done, which maps memory meanwhile.
fn meets_a_signal() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    let (over, thread) = (AtomicBool::new(false), AtomicU64::new(0));
    let handler = stops_the_world as extern "C" fn(i32);
    // SAFETY: a handler that waits for the main thread.
    unsafe { libc::signal(libc::SIGUSR1, handler as usize) };
    std::thread::scope(|scope| {
        let forks = scope.spawn(|| {
            let mut count = 0;
            // SAFETY: asks for this thread's id.
            thread.store(unsafe { libc::pthread_self() }, SeqCst);
            while !over.load(SeqCst) {
                // The child has the mask that the thread has.
                reap(fork(|| {
                    // SAFETY: asks for the mask in force.
                    let blocked = unsafe {
                        let mut set = std::mem::zeroed();
                        libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut set);
                        libc::sigismember(&raw const set, libc::SIGUSR2)
                    };
                    assert_eq!(blocked, 0);
                }));
                count += 1;
            }
            count
        });
        for _ in 0..300 {
            std::thread::sleep(Duration::from_micros(300));
            if thread.load(SeqCst) == 0 {
                continue;
            }
            // SAFETY: the thread is there until it is joined below.
            unsafe { libc::pthread_kill(thread.load(SeqCst), libc::SIGUSR1) };
            while !INSIDE.load(SeqCst) {
                std::hint::spin_loop();
            }
            Region::map(1).unmap();
            INSIDE.store(false, SeqCst);
        }
        over.store(true, SeqCst);
        assert!(forks.join().unwrap() > 0);
    });
    two.check_from(FIRST_OF_LARGE);
}

/// What `large_pair` fills.
const FIRST_OF_LARGE: u64 = 9000;

/// Seen to hang: the fork held the lock that the munmap waited for, and its handler waited for the munmap.
#[test]
fn h7_a_handler_in_a_fork_waits_for_nobody_who_waits_for_the_fork() {
    Stand::of_all(|_| true).run("fork_meets_a_signal");
}

/// Merged memory that the child does not have: its own memory comes to lie there.
fn leaves_memory_behind() {
    const PAGES: usize = 4096;
    let (one, two) = merged_pair(PAGES, FIRST);
    assert_eq!(one.advise(libc::MADV_DONTFORK), 0);
    reap(fork(|| {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: maps memory where nothing is in this process.
        let shared = unsafe { libc::mmap(one.pointer(0), one.len(), prot, flags, -1, 0) };
        assert!(shared == one.pointer(0), "{}", std::io::Error::last_os_error());
        one.fill_from(7);
        assert_eq!(one.advise(libc::MADV_DONTNEED), 0);
        one.check_from(7);
        // SAFETY: moves a mapping of this process's own.
        let moved = unsafe {
            libc::mremap(shared, one.len(), one.len(), libc::MREMAP_MAYMOVE, std::ptr::null_mut::<libc::c_void>())
        };
        assert!(moved == shared);
        one.check_from(7);
        two.check_from(FIRST);
    }));
    one.check_from(FIRST);
}

/// Seen to fail: what the child shared with others was replaced by memory of its own.
#[test]
fn v16_what_a_child_was_not_handed_is_no_merged_memory_there() {
    let stand = Stand::on_request();
    stand.run("fork_leaves_memory_behind");
    stand.assert_merged(4096);
}

/// A mapping in the place of merged memory that unmaps it and fails then: there are no huge pages.
fn replaced_and_failed() {
    const PAGES: usize = 2048;
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages").unwrap_or_default();
    if free.trim() != "0" {
        return;
    }
    let (one, two) = merged_pair(PAGES, FIRST);
    let start = one.start.next_multiple_of(2 << 20);
    let part = Region { start, pages: (2 << 20) / page() };
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: replaces memory of the victim.
    let failed = unsafe { libc::mmap(part.pointer(0), part.len(), prot, flags | libc::MAP_HUGETLB, -1, 0) };
    assert!(failed == libc::MAP_FAILED && errno() == libc::ENOMEM);
    let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: takes the place only if nothing is there.
    let again = unsafe { libc::mmap(part.pointer(0), part.len(), prot, shared, -1, 0) };
    if again != libc::MAP_FAILED {
        part.fill_from(7);
        assert_eq!(part.advise(libc::MADV_DONTNEED), 0);
        part.check_from(7);
    }
    two.check_from(FIRST);
}

/// Seen to fail on kernels that leave a hole: shared memory that came to lie there was discarded.
#[test]
fn v16_what_was_unmapped_by_a_call_that_failed_is_no_merged_memory() {
    Stand::on_request().run("replaced_and_failed");
}

fn bad_clone3() {
    let (one, _two) = merged_pair(64, FIRST);
    let call = |arguments: usize, size: usize| {
        // SAFETY: no such call makes anything.
        let made = unsafe { libc::syscall(libc::SYS_clone3, arguments, size) };
        (made, errno())
    };
    assert_eq!(call(0, 88), (-1, libc::EFAULT));
    assert_eq!(call(8, 64), (-1, libc::EFAULT));
    assert_eq!(call(0, 8), (-1, libc::EINVAL));
    assert_eq!(call(one.end() - 8, 1 << 20), (-1, libc::E2BIG));
    // Its end is not there; and nowhere, from an odd address.
    let edge = Region::map(2);
    edge.part(1, 2).unmap();
    assert_eq!(call(edge.address(1) - 32, 64), (-1, libc::EFAULT));
    assert_eq!(call(edge.address(1) - 31, 64), (-1, libc::EFAULT));
    one.check_from(FIRST);
    reap(fork(|| one.check_from(FIRST)));
}

/// Seen to fail: it was read as if it had to be there (SIGSEGV).
#[test]
fn v18_a_clone3_that_the_kernel_refuses_is_refused() {
    Stand::on_request().run("bad_clone3");
}

extern "C" fn maps_memory(_: i32) {
    Region::map(1).unmap();
}

/// A signal arrives while a child makes its first call through the gate, which tidies up what the parent had.
fn child_meets_a_signal() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    assert_eq!(one.advise(libc::MADV_DONTFORK), 0);
    let handler = maps_memory as extern "C" fn(i32);
    // SAFETY: a handler that maps and unmaps.
    unsafe { libc::signal(libc::SIGUSR1, handler as usize) };
    for round in 0..600 {
        let child = fork(|| {
            Region::map(1).unmap();
            two.part(0, 3).check_from(FIRST_OF_LARGE);
        });
        std::thread::sleep(Duration::from_micros(round % 30 * 10));
        // SAFETY: the child is there until it is reaped.
        unsafe { libc::kill(child, libc::SIGUSR1) };
        reap(child);
    }
}

/// Seen to hang: the handler waited until the call that it had interrupted was over.
#[test]
fn h7_a_handler_in_a_childs_first_call_waits_for_nobody() {
    Stand::of_all(|_| true).run("child_meets_a_signal");
}

/// The kernel takes the lower half of a call's number.
fn long_numbers() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    let number = |number: i64| 1 << 32 | number;
    // SAFETY: the child ends at once.
    let child = unsafe { libc::syscall(number(libc::SYS_fork)) };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: ends this process, whose memory it is.
        unsafe { libc::_exit(i32::from(!two.holds(7, FIRST_OF_LARGE + 7))) };
    }
    reap(child as i32);
    // SAFETY: discards memory of the victim.
    let done = unsafe { libc::syscall(number(libc::SYS_madvise), one.pointer(4), 8 * page(), libc::MADV_DONTNEED) };
    assert_eq!(done, 0);
    one.part(4, 12).check_zero();
    two.check_from(FIRST_OF_LARGE);
}

/// Seen to fail: the child of a fork that nobody had taken for one crashed.
#[test]
fn v18_numbers_of_calls_are_taken_as_the_kernel_takes_them() {
    Stand::of_all(|_| true).run("long_numbers");
}
