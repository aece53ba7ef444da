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
    one.check_from(FIRST);
    reap(fork(|| one.check_from(FIRST)));
}

/// Seen to fail: it was read as if it had to be there (SIGSEGV).
#[test]
fn v18_a_clone3_that_the_kernel_refuses_is_refused() {
    Stand::on_request().run("bad_clone3");
}
