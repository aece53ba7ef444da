//! A14: the gate's calls on a stack that is nearly full: handlers run on signal stacks of 8 KiB, half of which the kernel's
//! frame takes, and some programs give their own threads hardly more.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use crate::process::helpers_of;
use crate::stand::Stand;
use crate::victim::{Region, Victim, fork, merged_pair, page, pid, reap, tell, wait_until};
use crate::whole::{large_pair, wait_whole};

pub(crate) const VICTIMS: &[Victim] =
    &[("small_stack", small_stack), ("small_stack_whole", small_stack_whole), ("stack_trimmed", trimmed)];

const FIRST: u64 = 31_000;
/// Bytes that a gated call may take beyond what a call of the kernel's takes.
const MOST: usize = 2304;
/// Size of the signal stack that is painted.
const ROOM: usize = 16;
const PAINT: u64 = 0x5a5a_a5a5_5a5a_a5a5;

/// What the handler does, as an index.
static NEXT: AtomicUsize = AtomicUsize::new(0);
static REGION: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

type Call = (&'static str, fn(Region));

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

fn of_two(p: Region, pages: usize, flags: i32) {
    // SAFETY: moves or grows pages of the victim.
    let moved =
        unsafe { libc::mremap(p.pointer(0), 2 * page(), pages * page(), flags, std::ptr::null_mut::<libc::c_void>()) };
    assert!(moved != libc::MAP_FAILED, "{pages} {flags}: {}", std::io::Error::last_os_error());
}

/// On merged pages, each of its own.
const CALLS: &[Call] = &[
    // What the handler itself takes: no call of this kind comes to the gate.
    ("nothing", |_| assert!(pid() > 0)),
    // SAFETY: a system call without arguments.
    ("syscall()", |_| assert!(unsafe { libc::syscall(libc::SYS_getppid) } > 0)),
    ("map elsewhere", |_| Region::map(1).unmap()),
    ("mprotect", |p| assert_eq!(p.part(0, 2).protect(libc::PROT_READ), 0)),
    ("dontneed", |p| assert_eq!(p.part(2, 4).advise(libc::MADV_DONTNEED), 0)),
    ("process_madvise", |p| {
        let part = libc::iovec { iov_base: p.pointer(23), iov_len: page() };
        // SAFETY: discards a page of the victim; its descriptor is closed.
        unsafe {
            let own = libc::syscall(libc::SYS_pidfd_open, pid(), 0);
            libc::syscall(libc::SYS_process_madvise, own, &raw const part, 1, libc::MADV_DONTNEED, 0);
            libc::close(own as i32);
        }
    }),
    ("free", |p| assert_eq!(p.part(4, 6).advise(libc::MADV_FREE), 0)),
    ("dontfork", |p| assert_eq!(p.part(6, 8).advise(libc::MADV_DONTFORK), 0)),
    ("munmap", |p| p.part(8, 10).unmap()),
    ("map fixed", |p| {
        // SAFETY: replaces pages of the victim.
        let mapped = unsafe { libc::mmap(p.pointer(10), 2 * page(), RW, PRIVATE | libc::MAP_FIXED, -1, 0) };
        assert!(mapped == p.pointer(10));
    }),
    ("mremap, move and grow", |p| of_two(p.part(12, 14), 4, libc::MREMAP_MAYMOVE)),
    ("mremap, shrink", |p| of_two(p.part(14, 16), 1, 0)),
    ("mremap, dontunmap", |p| of_two(p.part(16, 18), 2, libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP)),
    // SAFETY: locks pages of the victim.
    ("mlock", |p| assert_eq!(unsafe { libc::mlock(p.pointer(18), 2 * page()) }, 0)),
    ("unmergeable", |p| assert_eq!(p.part(20, 22).advise(libc::MADV_UNMERGEABLE), 0)),
    ("mergeable", |p| assert_eq!(p.part(20, 22).advise(libc::MADV_MERGEABLE), 0)),
    ("fork", |_| reap(fork(|| ()))),
    ("another helper", |p| {
        for helper in helpers_of(pid()) {
            // SAFETY: sends a signal.
            unsafe { libc::kill(helper, libc::SIGKILL) };
        }
        assert_eq!(p.part(22, 23).advise(libc::MADV_UNMERGEABLE), 0);
    }),
];

extern "C" fn on_signal(_: i32) {
    let [start, pages] = [&REGION[0], &REGION[1]].map(|word| word.load(SeqCst));
    CALLS[NEXT.load(SeqCst)].1(Region { start, pages });
}

/// Bytes of the signal stack that each call takes.
fn depths(p: Region) -> Vec<(&'static str, usize)> {
    let stack = Region::map(ROOM);
    REGION[0].store(p.start, SeqCst);
    REGION[1].store(p.pages, SeqCst);
    // SAFETY: a stack of the victim's own, and a handler for a signal that it sends to itself.
    unsafe {
        let given = libc::stack_t { ss_sp: stack.pointer(0), ss_flags: 0, ss_size: stack.len() };
        assert_eq!(libc::sigaltstack(&raw const given, std::ptr::null_mut()), 0);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as extern "C" fn(i32) as usize;
        action.sa_flags = libc::SA_ONSTACK;
        assert_eq!(libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()), 0);
    }
    let words = || (stack.start..stack.end()).step_by(8);
    let run = |index: usize| {
        // SAFETY: nobody else uses the signal stack, and no handler runs.
        words().for_each(|word| unsafe { (word as *mut u64).write_volatile(PAINT) });
        NEXT.store(index, SeqCst);
        // SAFETY: sends a signal to this thread.
        unsafe { libc::raise(libc::SIGUSR1) };
        // SAFETY: as above.
        let deepest = words().find(|word| unsafe { (*word as *const u64).read_volatile() } != PAINT);
        stack.end() - deepest.expect("the handler ran on it")
    };
    CALLS.iter().enumerate().map(|(index, (name, _))| (*name, run(index))).collect()
}

fn check(depths: &[(&'static str, usize)]) {
    let alone = depths[0].1;
    let beyond = |depth: usize| depth.saturating_sub(alone);
    for (name, depth) in depths {
        tell(&format!("{name}: {} bytes", beyond(*depth)));
    }
    let deep: Vec<_> = depths.iter().filter(|(_, depth)| beyond(*depth) > MOST).collect();
    assert!(deep.is_empty(), "the handler alone takes {alone}: {deep:?}");
}

fn small_stack() {
    let (one, _two) = merged_pair(32, FIRST);
    check(&depths(one));
}

fn small_stack_whole() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    check(&depths(one));
    // The helper that was killed has a successor, whom one of the calls above has brought or the next one brings.
    wait_until("another helper is there", || {
        Region::map(1).unmap();
        !helpers_of(pid()).is_empty()
    });
}

/// Seen to fail: a handler on Rust's signal stack that mapped memory overflowed it when the helper had been killed: 6.5 KB beyond
/// what the handler takes, and every other call took 3.3 KB or more.
#[test]
fn a14_calls_take_little_of_the_stack() {
    let stand = Stand::on_request();
    println!("{}", stand.run("small_stack"));
}

/// The same for a program that is managed whole: any call may bring the next helper.
#[test]
fn a14_calls_of_whole_programs_take_little_of_the_stack() {
    let stand = Stand::of_all(|_| true);
    println!("{}", stand.run("small_stack_whole"));
}

/// Discards all of the calling thread's stack that it does not use, as folly's MemoryIdler does, from every depth.
#[inline(never)]
fn trim(bottom: usize, depth: usize) {
    let mut here = [0_u8; 48];
    here[depth % 48] = 1;
    let top = std::hint::black_box(&here).as_ptr() as usize;
    // Not into the frame of the call itself, nor what the dynamic linker may need.
    let end = (top - 384) & !(page() - 1);
    // SAFETY: below everything that this thread uses.
    let done = unsafe { libc::madvise(bottom as *mut libc::c_void, end - bottom, libc::MADV_DONTNEED) };
    assert_eq!(done, 0);
    if depth > 0 {
        trim(bottom, depth - 1);
    }
    assert_eq!(std::hint::black_box(&here)[depth % 48], 1);
}

fn trimmed() {
    const PAGES: usize = 64;
    merged_pair(64, FIRST);
    let stack = Region::map(PAGES);
    extern "C" fn on_stack(bottom: *mut libc::c_void) -> *mut libc::c_void {
        trim(bottom as usize, 400);
        std::ptr::null_mut()
    }
    // SAFETY: a thread with a stack of the victim's own, which is joined.
    unsafe {
        let mut how: libc::pthread_attr_t = std::mem::zeroed();
        libc::pthread_attr_init(&raw mut how);
        libc::pthread_attr_setstack(&raw mut how, stack.pointer(0), stack.len());
        let mut thread = 0;
        assert_eq!(libc::pthread_create(&raw mut thread, &raw const how, on_stack, stack.pointer(0)), 0);
        libc::pthread_join(thread, std::ptr::null_mut());
    }
}

/// Seen to fail: the gate's own frames were in what was discarded (SIGSEGV).
#[test]
fn a20_the_unused_part_of_ones_own_stack_can_be_discarded() {
    Stand::on_request().run("stack_trimmed");
    Stand::of_all(|_| true).run("stack_trimmed");
}
