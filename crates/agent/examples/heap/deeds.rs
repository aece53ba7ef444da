//! What programs with an allocator do besides: fork, execute others, load libraries, end threads in every way, and leave
//! mutexes to the kernel.

use std::ffi::{c_int, c_void};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::heap::{Block, Heap, ORPHANS, refused};
use crate::{COUNTS, fail};

/// One of them.
pub(crate) fn one(heap: &mut Heap) {
    match heap.dice.below(10) {
        0 | 1 => fork(heap),
        2 => execute(heap),
        3 => spawn_by_vfork(),
        4 => load(heap),
        5 | 6 => hand_over(heap),
        7 => cancel(),
        8 => leave_locked(heap),
        _ => contend(heap),
    }
}

fn wait_for(pid: libc::pid_t, what: &str) {
    let mut status = 0;
    loop {
        // SAFETY: waits for this thread's own child.
        let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        if waited == pid {
            break;
        }
        let error = std::io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINTR) {
            fail(&format!("waitpid for {what}: {error}"));
        }
    }
    if status != 0 {
        fail(&format!("{what} ended with status {status:#x}"));
    }
}

/// A child that checks everything that it was born with, uses the allocator, and ends.
fn fork(heap: &mut Heap) {
    // SAFETY: the child uses its own memory and the allocator, whose locks fork takes care of.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid == 0 {
        heap.check_all("in a child");
        (0..60).for_each(|_| heap.step());
        // Now and then long enough to have a helper of its own.
        if heap.dice.below(8) == 0 {
            std::thread::sleep(std::time::Duration::from_millis(1300));
            (0..60).for_each(|_| heap.step());
        }
        heap.check_all("at a child's end");
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) }
    }
    COUNTS.forks.fetch_add(1, SeqCst);
    wait_for(pid, "a child");
}

fn execute(heap: &mut Heap) {
    let milliseconds = if heap.dice.below(6) == 0 { 1500 } else { heap.dice.below(60) };
    let seed = heap.dice.below(1 << 20);
    let mut command = Command::new(std::env::current_exe().unwrap());
    let status = command.args(["--for", &milliseconds.to_string(), "--seed", &seed.to_string()]).status();
    if !status.as_ref().is_ok_and(std::process::ExitStatus::success) {
        fail(&format!("a program that was executed: {status:?}"));
    }
}

extern "C" fn execute_true(_: *mut c_void) -> c_int {
    let words = [c"true".as_ptr(), std::ptr::null()];
    // SAFETY: two words and the end of the list; nothing else is touched, since the memory is the parent's.
    unsafe {
        libc::execv(c"/bin/true".as_ptr(), words.as_ptr());
        libc::_exit(127)
    }
}

/// A child in this thread's memory until it executes another program.
fn spawn_by_vfork() {
    let mut stack = vec![0_u8; 64 << 10];
    let top = stack.as_mut_ptr_range().end;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: a stack of its own, 16-byte aligned by its size; this thread waits until it has executed.
    let pid = unsafe { libc::clone(execute_true, top.map_addr(|top| top & !15).cast(), flags, std::ptr::null_mut()) };
    assert!(pid > 0, "clone: {}", std::io::Error::last_os_error());
    wait_for(pid, "true");
}

/// Code comes and goes: libraries that the C library brings along.
fn load(heap: &mut Heap) {
    const LIBRARIES: [&std::ffi::CStr; 3] = [c"libm.so.6", c"libresolv.so.2", c"libutil.so.1"];
    let name = LIBRARIES[heap.dice.below(3) as usize];
    // SAFETY: libraries without constructors that do anything.
    unsafe {
        let library = libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL);
        if library.is_null() {
            refused("dlopen");
            return;
        }
        if name == c"libm.so.6" {
            let cos = libc::dlsym(library, c"cos".as_ptr());
            assert!(!cos.is_null());
            let cos: extern "C" fn(f64) -> f64 = std::mem::transmute(cos);
            assert!((cos(0.0) - 1.0).abs() < f64::EPSILON);
        }
        libc::dlclose(library);
    }
}

/// A thread that allocates and ends; somebody else frees.
fn hand_over(heap: &mut Heap) {
    let seed = heap.dice.below(1 << 30);
    let thread = std::thread::spawn(move || {
        let mut other = Heap::new(seed);
        (0..30).for_each(|_| other.step());
        other.check_all("at a thread's end");
        let mut orphans = ORPHANS.lock().unwrap();
        if orphans.len() < 64 {
            orphans.append(&mut other.blocks);
        }
        drop(orphans);
        other.blocks.into_iter().for_each(Block::free);
    });
    if thread.join().is_err() {
        fail("a thread panicked");
    }
}

unsafe extern "C-unwind" {
    fn usleep(microseconds: u32) -> c_int;
}

/// Nothing here has to be dropped: cancellation unwinds it.
extern "C-unwind" fn sleep_for_ever(_: *mut c_void) -> *mut c_void {
    loop {
        // SAFETY: a cancellation point.
        unsafe { usleep(1000) };
    }
}

fn cancel() {
    type Start = extern "C" fn(*mut c_void) -> *mut c_void;
    type Unwinding = extern "C-unwind" fn(*mut c_void) -> *mut c_void;
    let mut thread: libc::pthread_t = 0;
    // SAFETY: the types differ in how they may be left, which the C library knows of both.
    let start = unsafe { std::mem::transmute::<Unwinding, Start>(sleep_for_ever) };
    let mut result = std::ptr::null_mut();
    // SAFETY: a thread without an argument, which is cancelled and joined.
    unsafe {
        assert_eq!(libc::pthread_create(&raw mut thread, std::ptr::null(), start, std::ptr::null_mut()), 0);
        usleep(500);
        assert_eq!(libc::pthread_cancel(thread), 0);
        assert_eq!(libc::pthread_join(thread, &raw mut result), 0);
    }
    if result.addr() != usize::MAX {
        fail("a cancelled thread was not");
    }
}

/// A mutex in memory of the allocator's, with a guarded number behind it and enough around it for a page.
struct Guarded {
    memory: *mut c_void,
}

// SAFETY: what is behind the pointer is used under its mutex.
unsafe impl Send for Guarded {}
// SAFETY: as above.
unsafe impl Sync for Guarded {}

impl Guarded {
    const OFFSET: usize = 4096;

    fn new(set: unsafe extern "C" fn(*mut libc::pthread_mutexattr_t, c_int) -> c_int, value: c_int) -> Self {
        // SAFETY: memory for a mutex and a number, with attributes that are made and gone here.
        unsafe {
            let memory = libc::calloc(3 * Self::OFFSET, 1);
            assert!(!memory.is_null());
            let mut attributes: libc::pthread_mutexattr_t = std::mem::zeroed();
            assert_eq!(libc::pthread_mutexattr_init(&raw mut attributes), 0);
            assert_eq!(set(&raw mut attributes, value), 0);
            let guarded = Self { memory };
            assert_eq!(libc::pthread_mutex_init(guarded.mutex(), &raw const attributes), 0);
            libc::pthread_mutexattr_destroy(&raw mut attributes);
            guarded
        }
    }

    fn mutex(&self) -> *mut libc::pthread_mutex_t {
        self.memory.wrapping_byte_add(Self::OFFSET).cast()
    }

    fn number(&self) -> *mut u64 {
        self.memory.wrapping_byte_add(Self::OFFSET + 256).cast()
    }

    /// 0, or EOWNERDEAD.
    fn lock(&self) -> c_int {
        // SAFETY: initialised by `new`.
        unsafe { libc::pthread_mutex_lock(self.mutex()) }
    }

    fn unlock(&self) {
        // SAFETY: locked by this thread.
        assert_eq!(unsafe { libc::pthread_mutex_unlock(self.mutex()) }, 0);
    }

    fn free(self) {
        // SAFETY: nobody uses it any more.
        unsafe {
            libc::pthread_mutex_destroy(self.mutex());
            libc::free(self.memory);
        }
    }
}

/// A thread ends with a robust mutex locked: the kernel says so to the next owner, or he would wait for ever.
fn leave_locked(heap: &mut Heap) {
    let guarded = Guarded::new(libc::pthread_mutexattr_setrobust, libc::PTHREAD_MUTEX_ROBUST);
    let pause = heap.dice.below(400);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            assert_eq!(guarded.lock(), 0);
            // Long enough to look settled, now and then.
            std::thread::sleep(std::time::Duration::from_millis(pause));
        });
    });
    if guarded.lock() != libc::EOWNERDEAD {
        fail("the owner of a robust mutex is dead, and nobody says so");
    }
    // SAFETY: locked by this thread, whose duty this is.
    assert_eq!(unsafe { libc::pthread_mutex_consistent(guarded.mutex()) }, 0);
    guarded.unlock();
    guarded.free();
}

/// Threads count under a mutex, perhaps one whose owner the kernel lends its waiters' priority.
fn contend(heap: &mut Heap) {
    const TURNS: u64 = 200;
    let protocol = if heap.lends { libc::PTHREAD_PRIO_INHERIT } else { libc::PTHREAD_PRIO_NONE };
    let guarded = Guarded::new(libc::pthread_mutexattr_setprotocol, protocol);
    let threads = 2 + heap.dice.below(2);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                for _ in 0..TURNS {
                    assert_eq!(guarded.lock(), 0);
                    // SAFETY: under the mutex.
                    unsafe { *guarded.number() += 1 };
                    guarded.unlock();
                }
            });
        }
    });
    // SAFETY: the threads are gone.
    let counted = unsafe { *guarded.number() };
    if counted != threads * TURNS {
        fail(&format!("{counted} turns under a mutex, not {}", threads * TURNS));
    }
    guarded.free();
}

static ALARMS: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_alarm(_: c_int) {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: system calls on a mapping of this handler's own; errno is put back.
    unsafe {
        let errno = *libc::__errno_location();
        let page = libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0);
        if page != libc::MAP_FAILED {
            *page.cast::<u64>() = 1;
            libc::munmap(page, 4096);
        }
        *libc::__errno_location() = errno;
    }
    ALARMS.fetch_add(1, SeqCst);
}

/// A signal every few milliseconds, to whichever thread, whose handler changes mappings.
pub(crate) fn alarm() {
    // SAFETY: a handler that makes system calls only, restarting what it interrupts, and a timer.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_alarm as extern "C" fn(c_int) as usize;
        action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
        assert_eq!(libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut()), 0);
        let every = libc::timeval { tv_sec: 0, tv_usec: 4000 };
        let timer = libc::itimerval { it_interval: every, it_value: every };
        assert_eq!(libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()), 0);
    }
}
