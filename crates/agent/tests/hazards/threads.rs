//! C1, C2, H3, D-5, D-6, D-12: threads, their control blocks, mutexes, and a second libc.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use crate::stand::Stand;
use crate::victim::{
    Region, Victim, end_with, merge_densely, merge_now, merge_pair, merged_pair, page, tell, wait_until,
};

pub(crate) const VICTIMS: &[Victim] = &[
    ("threads_end", threads_end),
    ("execs", execs),
    ("managed_stacks", managed_stacks),
    ("merged_home", merged_home),
    ("owner_gone", owner_gone),
    ("robust_entry", robust_entry),
    ("inheriting_mutex", inheriting_mutex),
    ("wake_op", wake_op),
    ("join_main", join_main),
    ("main_leaves", main_leaves),
    ("second_libc", second_libc),
    ("futexes", futexes),
    ("signal_frames", signal_frames),
];

const PAGES: usize = 24;

fn keep_merging() -> (Region, Region) {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(600);
    two.fill_from(600);
    merge_pair(one, two);
    merge_densely();
    (one, two)
}

/// Makes the pages of a region differ from the store and be equal to it again.
fn stir(region: Region) {
    (0..region.pages).for_each(|index| region.fill(index, 1));
    region.fill_from(600);
}

/// Threads come and end, as libc ends them: in madvise, with every signal blocked.
fn threads_end() {
    let (one, two) = keep_merging();
    let mut ended = 0_u32;
    let until = Instant::now() + Duration::from_secs(2);
    while Instant::now() < until {
        let threads: Vec<_> = (0..4_u32).map(|number| std::thread::spawn(move || number + 1)).collect();
        stir(one);
        ended += threads.into_iter().map(|thread| thread.join().unwrap().min(1)).sum::<u32>();
    }
    one.check_from(600);
    two.check_from(600);
    tell(&format!("{ended} threads"));
}

/// C1, D-3, D-15: threads are created and end, with signals blocked, while pages are merged.
#[test]
fn c1_threads_come_and_end() {
    let stand = Stand::on_request();
    stand.run("threads_end");
    stand.assert_merged(PAGES as u64);
}

/// Programs without the agent are started: nothing of it is inherited.
fn execs() {
    let (one, two) = keep_merging();
    for _ in 0..10 {
        stir(one);
        let threads = "import threading\nfor i in range(20):\n t=threading.Thread(target=lambda:0);t.start();t.join()";
        let mut command = std::process::Command::new("python3");
        command.args(["-c", threads]).env_remove("LD_PRELOAD").env_remove("PAGEFOLD_AGENT");
        match command.status() {
            Ok(status) => assert!(status.success(), "{status}"),
            Err(_) => {
                println!("skipped: python3");
                break;
            }
        }
        assert!(std::process::Command::new("/bin/true").status().unwrap().success());
    }
    one.check_from(600);
    two.check_from(600);
}

/// C1: executing programs with and without the agent from a managed process.
#[test]
fn c1_programs_are_executed() {
    let stand = Stand::on_request();
    stand.run("execs");
    stand.assert_merged(PAGES as u64);
}

/// Starts a thread on memory made for it, to be joined by the caller.
fn thread_on(
    stack: Region,
    run: extern "C" fn(*mut libc::c_void) -> *mut libc::c_void,
    argument: *mut libc::c_void,
) -> libc::pthread_t {
    let mut thread = 0;
    // SAFETY: nobody else uses the stack as long as the thread lives; the argument is what `run` expects.
    unsafe {
        let mut attributes = std::mem::zeroed();
        libc::pthread_attr_init(&raw mut attributes);
        assert_eq!(libc::pthread_attr_setstack(&raw mut attributes, stack.pointer(0), stack.len()), 0);
        assert_eq!(libc::pthread_create(&raw mut thread, &raw const attributes, run, argument), 0);
    }
    thread
}

/// Threads whose stacks and control blocks lie in managed memory.
fn managed_stacks() {
    extern "C" fn run(word: *mut libc::c_void) -> *mut libc::c_void {
        std::thread::sleep(Duration::from_millis(3));
        word
    }
    const STACK: usize = 64;
    let stacks: Vec<Region> = (0..4).map(|_| Region::map(STACK)).collect();
    stacks.iter().for_each(Region::mergeable);
    merge_densely();
    let until = Instant::now() + Duration::from_secs(4);
    let mut joined = 0;
    while Instant::now() < until {
        let mut threads = Vec::new();
        for stack in &stacks {
            // The unused part of the stacks is alike.
            stack.part(0, STACK - 8).fill_from(5);
            threads.push((thread_on(*stack, run, stack.pointer(0)), stack.pointer(0)));
        }
        std::thread::sleep(Duration::from_millis(1));
        for (thread, word) in threads {
            let mut result = std::ptr::null_mut();
            // SAFETY: joins the thread.
            assert_eq!(unsafe { libc::pthread_join(thread, &raw mut result) }, 0);
            assert_eq!(result, word);
            joined += 1;
        }
        stacks.iter().for_each(|stack| stack.part(0, STACK - 16).check_from(5));
    }
    tell(&format!("{joined} joined"));
    std::thread::sleep(Duration::from_millis(50));
    merge_now();
}

/// H3, D-15: threads end while their stacks, control blocks and robust heads are in managed memory; every join returns.
#[test]
fn h3_thread_stacks_in_managed_memory() {
    let stand = Stand::on_request();
    stand.run("managed_stacks");
    stand.assert_merged(PAGES as u64);
}

/// A thread ends with a robust mutex that lies in merged memory. Its list stays in what was its stack, which libc keeps.
fn owner_gone() {
    let (one, two) = merged_pair(PAGES, 600);
    let mutex = one.pointer(5).cast::<libc::pthread_mutex_t>() as usize;
    let (locked, ends) = (AtomicBool::new(false), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: a mutex in memory of the right size and alignment, never moved.
            unsafe {
                let mut attributes = std::mem::zeroed();
                libc::pthread_mutexattr_init(&raw mut attributes);
                libc::pthread_mutexattr_setrobust(&raw mut attributes, libc::PTHREAD_MUTEX_ROBUST);
                assert_eq!(libc::pthread_mutex_init(mutex as *mut _, &raw const attributes), 0);
                assert_eq!(libc::pthread_mutex_lock(mutex as *mut _), 0);
            }
            locked.store(true, SeqCst);
            wait_until("it is to end", || ends.load(SeqCst));
        });
        wait_until("it has the mutex", || locked.load(SeqCst));
        // With a plan the helper comes to know of the thread.
        merged_pair(PAGES, 900).0.check_from(900);
        ends.store(true, SeqCst);
    });
    // SAFETY: the victim's own memory.
    assert_eq!(unsafe { libc::mlock(one.pointer(0), one.len()) }, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: initialised above.
    assert_eq!(unsafe { libc::pthread_mutex_trylock(mutex as *mut _) }, libc::EOWNERDEAD);
    one.part(6, PAGES).check_from(606);
    two.check_from(600);
}

/// H3: nobody's list is asked about once its thread is gone. Seen to fail: mlock said EAGAIN, as it would until the next plan.
#[test]
fn h3_the_list_of_a_thread_that_is_gone_holds_nothing_up() {
    let stand = Stand::on_request();
    stand.run("owner_gone");
    stand.assert_merged(PAGES as u64);
}

/// Threads that begin on memory that is merged.
fn merged_home() {
    extern "C" fn run(ends: *mut libc::c_void) -> *mut libc::c_void {
        // SAFETY: the caller's, who joins this thread.
        let ends = unsafe { &*ends.cast::<AtomicBool>() };
        while !ends.load(SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::ptr::null_mut()
    }
    let (one, two) = merged_pair(PAGES, 600);
    let stack = one.part(0, PAGES - 2);
    for round in 0..5 {
        one.fill_from(600);
        wait_until("it is merged again", || {
            merge_now();
            stack.merged() == stack.pages
        });
        let ends = AtomicBool::new(false);
        let thread = thread_on(stack, run, (&raw const ends).cast_mut().cast());
        assert!(stack.merged() > 0, "only what the thread needs is plain");
        // With a plan the helper comes to know of the thread.
        let other = merged_pair(PAGES, 700 + 100 * round);
        // SAFETY: the victim's own memory, and its thread.
        unsafe {
            assert_eq!(
                libc::mlock(stack.pointer(0), stack.len()),
                0,
                "round {round}: {}",
                std::io::Error::last_os_error()
            );
            assert_eq!(stack.merged(), 0);
            assert_eq!(libc::munlock(stack.pointer(0), stack.len()), 0);
            ends.store(true, SeqCst);
            assert_eq!(libc::pthread_join(thread, std::ptr::null_mut()), 0);
            other.0.check_from(700 + 100 * round);
        }
        one.part(0, 4).check_from(600);
    }
    two.check_from(600);
}

/// H3: what lies around a living thread's control block is never frozen, so it has to be plain before the thread begins.
/// Seen to fail: mlock said EAGAIN as long as the thread lived.
#[test]
fn h3_a_thread_that_begins_on_merged_memory_has_it_plain() {
    let stand = Stand::on_request();
    stand.run("merged_home");
    stand.assert_merged(PAGES as u64);
}

/// A robust mutex in managed memory, with a process-shared one behind it in the owner's list.
fn robust_entry() {
    let words = Region::map_with(1, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
    let shared = words.pointer(0).cast::<libc::pthread_mutex_t>();
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    let own = one.pointer(5).cast::<libc::pthread_mutex_t>();
    // SAFETY: mutexes in memory of the right size and alignment, never moved.
    unsafe {
        let mut attributes = std::mem::zeroed();
        libc::pthread_mutexattr_init(&raw mut attributes);
        libc::pthread_mutexattr_setrobust(&raw mut attributes, libc::PTHREAD_MUTEX_ROBUST);
        assert_eq!(libc::pthread_mutex_init(own, &raw const attributes), 0);
        libc::pthread_mutexattr_setpshared(&raw mut attributes, libc::PTHREAD_PROCESS_SHARED);
        assert_eq!(libc::pthread_mutex_init(shared, &raw const attributes), 0);
    }
    one.mergeable();
    two.mergeable();
    merge_densely();
    let until = Instant::now() + Duration::from_secs(3);
    let mut rounds = 0;
    let (own, shared) = (own as usize, shared as usize);
    while Instant::now() < until {
        let owner = std::thread::spawn(move || {
            // SAFETY: initialised above. The thread ends as their owner.
            unsafe {
                assert_eq!(libc::pthread_mutex_lock(shared as *mut _), 0);
                assert_eq!(libc::pthread_mutex_lock(own as *mut _), 0);
            }
            // The page with the mutex, and its twin, settle.
            std::thread::sleep(Duration::from_millis(2));
        });
        wait_until("the owner holds the mutex", || {
            // SAFETY: the first word of a mutex.
            owner.is_finished() || unsafe { (own as *const u32).read_volatile() } != 0
        });
        // SAFETY: one page each; a copy of the locked mutex is only compared.
        unsafe { std::ptr::copy(one.address(5) as *const u8, two.address(5) as *mut u8, page()) };
        owner.join().unwrap();
        for mutex in [own, shared] {
            // SAFETY: initialised above; consistent again before it is unlocked.
            unsafe {
                let mutex = mutex as *mut libc::pthread_mutex_t;
                assert_eq!(libc::pthread_mutex_trylock(mutex), libc::EOWNERDEAD, "round {rounds}");
                libc::pthread_mutex_consistent(mutex);
                assert_eq!(libc::pthread_mutex_unlock(mutex), 0);
            }
        }
        rounds += 1;
    }
    assert!(rounds > 20, "{rounds} rounds");
    one.part(0, 5).fill_from(20);
    two.part(0, 5).fill_from(20);
    wait_until("something is merged", || one.part(0, 5).merged() == 5);
}

/// H3, D-5: mutexes are released by the kernel when their owner ends, wherever their list entries lie.
#[test]
fn h3_robust_mutexes_are_released() {
    let stand = Stand::on_request();
    stand.run("robust_entry");
    stand.assert_merged(5);
}

/// A mutex with priority inheritance in managed memory.
fn inheriting_mutex() {
    let (one, two) = keep_merging();
    // SAFETY: a mutex in memory of the right size, never moved.
    let mutex = unsafe {
        let mutex = one.pointer(3).cast::<libc::pthread_mutex_t>();
        std::ptr::write_bytes(one.address(3) as *mut u8, 0, page());
        std::ptr::write_bytes(two.address(3) as *mut u8, 0, page());
        let mut attributes = std::mem::zeroed();
        libc::pthread_mutexattr_init(&raw mut attributes);
        assert_eq!(libc::pthread_mutexattr_setprotocol(&raw mut attributes, libc::PTHREAD_PRIO_INHERIT), 0);
        let mut protocol = -1;
        libc::pthread_mutexattr_getprotocol(&raw const attributes, &raw mut protocol);
        assert_eq!(protocol, libc::PTHREAD_PRIO_INHERIT);
        assert_eq!(libc::pthread_mutex_init(mutex, &raw const attributes), 0);
        mutex as usize
    };
    let (counter, until) = (AtomicU64::new(0), Instant::now() + Duration::from_secs(3));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while Instant::now() < until {
                    // SAFETY: initialised above.
                    unsafe {
                        assert_eq!(libc::pthread_mutex_lock(mutex as *mut _), 0);
                        counter.fetch_add(1, SeqCst);
                        assert_eq!(libc::pthread_mutex_unlock(mutex as *mut _), 0);
                    }
                }
            });
        }
    });
    assert!(counter.load(SeqCst) > 1000);
}

/// C2: a mutex with priority inheritance never meets a frozen page.
#[test]
fn c2_priority_inheritance() {
    let stand = Stand::on_request();
    stand.run("inheriting_mutex");
    stand.assert_merged(PAGES as u64);
}

/// FUTEX_WAKE_OP on a word in managed memory, through syscall().
fn wake_op() {
    let (one, two) = keep_merging();
    let word = one.address(7);
    let until = Instant::now() + Duration::from_secs(2);
    let mut calls = 0;
    while Instant::now() < until {
        const SET_IF_NEVER: u32 = 0;
        // SAFETY: the kernel exchanges the second word (FUTEX_OP_SET 0).
        let woken =
            unsafe { libc::syscall(libc::SYS_futex, two.address(9), libc::FUTEX_WAKE_OP, 0, 0, word, SET_IF_NEVER) };
        assert_eq!(woken, 0, "{}", std::io::Error::last_os_error());
        assert_eq!(one.read(7)[0] as u32, 0);
        one.fill(7, 607);
        stir(one.part(0, 5));
        (0..5).for_each(|index| one.fill(index, 600 + index as u64));
        calls += 1;
    }
    one.check_from(600);
    two.check_from(600);
    tell(&format!("{calls} calls"));
}

/// C2: FUTEX_WAKE_OP through syscall() never meets a frozen page.
#[test]
fn c2_wake_op() {
    let stand = Stand::on_request();
    stand.run("wake_op");
    stand.assert_merged(PAGES as u64);
}

static MAIN: AtomicU64 = AtomicU64::new(0);

/// The main thread ends alone, and another thread joins it: the helper must not take the wake-up.
fn join_main() {
    let (one, _two) = keep_merging();
    // SAFETY: the calling thread's own id.
    MAIN.store(unsafe { libc::pthread_self() } as u64, SeqCst);
    std::thread::spawn(move || {
        end_with(|| {
            std::thread::sleep(Duration::from_millis(20));
            let begun = Instant::now();
            // SAFETY: joins the main thread, which ends now.
            let joined = unsafe { libc::pthread_join(MAIN.load(SeqCst) as libc::pthread_t, std::ptr::null_mut()) };
            assert_eq!(joined, 0);
            assert!(begun.elapsed() < Duration::from_secs(5));
            one.check_from(600);
        })
    });
    std::thread::sleep(Duration::from_millis(100));
    end_this_thread();
}

fn end_this_thread() -> ! {
    // SAFETY: the victim's main thread ends; nothing on its stack is used by others.
    unsafe { libc::syscall(libc::SYS_exit, 0) };
    unreachable!("the thread has ended")
}

/// D-6: pthread_join of the main thread returns.
#[test]
fn d_6_the_main_thread_is_joined() {
    let stand = Stand::on_request();
    stand.run("join_main");
    stand.assert_merged(PAGES as u64);
}

/// The main thread ends, the others live on, and then the process ends.
fn main_leaves() {
    let (one, two) = keep_merging();
    std::thread::spawn(move || {
        end_with(|| {
            std::thread::sleep(Duration::from_millis(300));
            one.check_from(600);
            stir(one);
            one.check_from(600);
            two.check_from(600);
            let fresh = Region::map(4);
            fresh.mergeable();
            fresh.fill_from(3);
            fresh.check_from(3);
        })
    });
    end_this_thread();
}

/// V1: the main thread leaves its process, which goes on and ends like any other.
#[test]
fn v1_the_main_thread_leaves() {
    let stand = Stand::on_request();
    stand.run("main_leaves");
    stand.assert_merged(PAGES as u64);
}

/// A second libc, loaded into a name space of its own, discards merged memory.
fn second_libc() {
    let (one, two) = merged_pair(PAGES, 700);
    // SAFETY: loads libc anew; its madvise is called like any.
    let discarded = unsafe {
        let handle = libc::dlmopen(-1, c"libc.so.6".as_ptr(), libc::RTLD_NOW);
        if handle.is_null() {
            println!("skipped: dlmopen of libc");
            return;
        }
        let function = libc::dlsym(handle, c"madvise".as_ptr());
        assert!(!function.is_null());
        let madvise: extern "C" fn(*mut libc::c_void, usize, i32) -> i32 = std::mem::transmute(function);
        madvise(one.pointer(2), 10 * page(), libc::MADV_DONTNEED)
    };
    assert_eq!(discarded, 0);
    one.part(2, 12).check_zero();
    one.part(12, PAGES).check_from(712);
    two.check_from(700);
}

/// D-12: a second libc by dlmopen shows no store bytes.
#[test]
fn d_12_a_second_libc() {
    let stand = Stand::on_request();
    stand.run("second_libc");
    stand.assert_merged(PAGES as u64);
}

/// Waiters sleep on futex words while their pages are merged, diverge and are merged again.
fn futexes() {
    for private in [0, libc::FUTEX_PRIVATE_FLAG] {
        let (one, two) = merged_pair(PAGES, 800);
        // SAFETY: a word of the victim's memory.
        let word = unsafe { &*((one.address(4) + 64) as *const AtomicU32) };
        let (value, woken) = (word.load(SeqCst), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // SAFETY: waits on the word.
                let result = unsafe {
                    libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT | private, value, 0, 0, 0)
                };
                assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
                woken.store(true, SeqCst);
            });
            std::thread::sleep(Duration::from_millis(30));
            merge_now();
            (0..PAGES).for_each(|index| one.fill(index, 1));
            one.fill_from(800);
            for _ in 0..5 {
                merge_now();
                std::thread::sleep(Duration::from_millis(5));
            }
            assert!(!woken.load(SeqCst));
            // SAFETY: wakes whoever waits on the word.
            let count =
                unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE | private, 1, 0, 0, 0) };
            assert_eq!(count, 1);
            wait_until("the waiter is woken", || woken.load(SeqCst));
        });
        one.check_from(800);
        two.check_from(800);
        one.unmap();
        two.unmap();
    }
}

/// Section 6: futex waiters on pages that are merged, diverge and are merged again.
#[test]
fn futex_waiters_are_woken() {
    let stand = Stand::on_request();
    stand.run("futexes");
    stand.assert_merged(PAGES as u64);
}

/// Signal frames are written to a stack in memory that is being merged.
fn signal_frames() {
    static CAUGHT: AtomicU32 = AtomicU32::new(0);
    extern "C" fn handle(_signal: i32) {
        CAUGHT.fetch_add(1, SeqCst);
    }
    const STACK: usize = 16;
    let (stack, twin) = (Region::map(STACK), Region::map(STACK));
    stack.mergeable();
    twin.mergeable();
    // SAFETY: an alternate stack for this thread, and a handler that runs on it.
    unsafe {
        let alternate = libc::stack_t { ss_sp: stack.pointer(0), ss_flags: 0, ss_size: stack.len() };
        assert_eq!(libc::sigaltstack(&raw const alternate, std::ptr::null_mut()), 0);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_ONSTACK;
        assert_eq!(libc::sigaction(libc::SIGUSR2, &raw const action, std::ptr::null_mut()), 0);
    }
    merge_densely();
    let until = Instant::now() + Duration::from_secs(2);
    let mut raised = 0;
    while Instant::now() < until {
        stack.fill_from(40);
        twin.fill_from(40);
        std::thread::sleep(Duration::from_micros(700));
        // SAFETY: the handler only counts.
        unsafe { libc::raise(libc::SIGUSR2) };
        raised += 1;
        assert_eq!(CAUGHT.load(SeqCst), raised);
    }
    twin.check_from(40);
}

/// Section 6: signal frames onto merged and frozen stack pages.
#[test]
fn signal_frames_on_merged_stacks() {
    let stand = Stand::on_request();
    stand.run("signal_frames");
    stand.assert_merged(PAGES as u64);
}
