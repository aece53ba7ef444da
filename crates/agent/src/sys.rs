//! System calls, issued directly: no libc, no errno, nothing that a hook of the program could get between.

use core::arch::asm;

/// Bytes of a page. x86-64 knows one base page size.
pub(crate) const PAGE: u64 = 1 << 12;

/// System-call numbers of x86-64 (arch/x86/entry/syscalls/syscall_64.tbl).
#[allow(missing_docs, reason = "the kernel's own names")]
pub(crate) mod nr {
    pub(crate) const READ: u64 = 0;
    pub(crate) const CLOSE: u64 = 3;
    pub(crate) const FSTAT: u64 = 5;
    pub(crate) const MMAP: u64 = 9;
    pub(crate) const MPROTECT: u64 = 10;
    pub(crate) const MUNMAP: u64 = 11;
    pub(crate) const BRK: u64 = 12;
    pub(crate) const RT_SIGPROCMASK: u64 = 14;
    pub(crate) const IOCTL: u64 = 16;
    pub(crate) const PREAD64: u64 = 17;
    pub(crate) const SCHED_YIELD: u64 = 24;
    pub(crate) const MREMAP: u64 = 25;
    pub(crate) const MSYNC: u64 = 26;
    pub(crate) const MADVISE: u64 = 28;
    pub(crate) const SHMAT: u64 = 30;
    pub(crate) const SHMCTL: u64 = 31;
    pub(crate) const NANOSLEEP: u64 = 35;
    pub(crate) const GETPID: u64 = 39;
    pub(crate) const SOCKET: u64 = 41;
    pub(crate) const CONNECT: u64 = 42;
    pub(crate) const SENDMSG: u64 = 46;
    pub(crate) const RECVMSG: u64 = 47;
    pub(crate) const GETSOCKOPT: u64 = 55;
    pub(crate) const CLONE: u64 = 56;
    pub(crate) const EXECVE: u64 = 59;
    pub(crate) const EXIT: u64 = 60;
    pub(crate) const WAIT4: u64 = 61;
    pub(crate) const KILL: u64 = 62;
    pub(crate) const FCNTL: u64 = 72;
    pub(crate) const FTRUNCATE: u64 = 77;
    pub(crate) const CHDIR: u64 = 80;
    pub(crate) const SETPGID: u64 = 109;
    pub(crate) const GETPPID: u64 = 110;
    pub(crate) const SETSID: u64 = 112;
    pub(crate) const CAPSET: u64 = 126;
    pub(crate) const FSTATFS: u64 = 138;
    pub(crate) const SCHED_SETSCHEDULER: u64 = 144;
    pub(crate) const MLOCK: u64 = 149;
    pub(crate) const MLOCKALL: u64 = 151;
    pub(crate) const PRCTL: u64 = 157;
    pub(crate) const GETTID: u64 = 186;
    pub(crate) const FUTEX: u64 = 202;
    pub(crate) const REMAP_FILE_PAGES: u64 = 216;
    pub(crate) const CLOCK_GETTIME: u64 = 228;
    pub(crate) const EXIT_GROUP: u64 = 231;
    pub(crate) const FUTEX_WAITV: u64 = 449;
    pub(crate) const MBIND: u64 = 237;
    pub(crate) const WAITID: u64 = 247;
    pub(crate) const OPENAT: u64 = 257;
    pub(crate) const NEWFSTATAT: u64 = 262;
    pub(crate) const PRLIMIT64: u64 = 302;
    pub(crate) const PROCESS_VM_READV: u64 = 310;
    pub(crate) const SECCOMP: u64 = 317;
    pub(crate) const MEMFD_CREATE: u64 = 319;
    pub(crate) const BPF: u64 = 321;
    pub(crate) const EXECVEAT: u64 = 322;
    pub(crate) const USERFAULTFD: u64 = 323;
    pub(crate) const MLOCK2: u64 = 325;
    pub(crate) const PKEY_MPROTECT: u64 = 329;
    pub(crate) const IO_URING_SETUP: u64 = 425;
    pub(crate) const CLONE3: u64 = 435;
    pub(crate) const CLOSE_RANGE: u64 = 436;
    pub(crate) const PROCESS_MADVISE: u64 = 440;
    pub(crate) const MSEAL: u64 = 462;
}

/// Error numbers that decisions depend on.
#[allow(missing_docs, reason = "the kernel's own names")]
pub(crate) mod errno {
    pub(crate) const ENOENT: i64 = 2;
    pub(crate) const ESRCH: i64 = 3;
    pub(crate) const EINTR: i64 = 4;
    pub(crate) const ECHILD: i64 = 10;
    pub(crate) const EAGAIN: i64 = 11;
    pub(crate) const ENOMEM: i64 = 12;
    pub(crate) const EACCES: i64 = 13;
    pub(crate) const EFAULT: i64 = 14;
    pub(crate) const EBUSY: i64 = 16;
    pub(crate) const EEXIST: i64 = 17;
    pub(crate) const EINVAL: i64 = 22;
    pub(crate) const ETIMEDOUT: i64 = 110;
}

pub(crate) const PROT_NONE: u64 = 0;
pub(crate) const PROT_READ: u64 = 1;
pub(crate) const PROT_WRITE: u64 = 2;
pub(crate) const PROT_EXEC: u64 = 4;
pub(crate) const MAP_SHARED: u64 = 0x01;
pub(crate) const MAP_PRIVATE: u64 = 0x02;
pub(crate) const MAP_FIXED: u64 = 0x10;
pub(crate) const MAP_ANONYMOUS: u64 = 0x20;
pub(crate) const MAP_NORESERVE: u64 = 0x4000;
pub(crate) const MAP_FIXED_NOREPLACE: u64 = 0x0010_0000;
pub(crate) const MREMAP_MAYMOVE: u64 = 1;
pub(crate) const MREMAP_FIXED: u64 = 2;
pub(crate) const MREMAP_DONTUNMAP: u64 = 4;
pub(crate) const CLONE_VM: u64 = 0x100;
pub(crate) const CLONE_VFORK: u64 = 0x4000;
pub(crate) const CLONE_THREAD: u64 = 0x10000;
pub(crate) const CLONE_SETTLS: u64 = 0x80000;
pub(crate) const O_CLOEXEC: u64 = 0o2_000_000;
pub(crate) const AT_FDCWD: u64 = -100_i64 as u64;

/// Advices of madvise(2).
#[allow(missing_docs, reason = "the kernel's own names")]
pub(crate) mod advice {
    pub(crate) const DONTNEED: u64 = 4;
    pub(crate) const FREE: u64 = 8;
    pub(crate) const REMOVE: u64 = 9;
    pub(crate) const DONTFORK: u64 = 10;
    pub(crate) const DOFORK: u64 = 11;
    pub(crate) const MERGEABLE: u64 = 12;
    pub(crate) const UNMERGEABLE: u64 = 13;
    pub(crate) const DONTDUMP: u64 = 16;
    pub(crate) const DODUMP: u64 = 17;
    pub(crate) const WIPEONFORK: u64 = 18;
    pub(crate) const POPULATE_WRITE: u64 = 23;
    pub(crate) const DONTNEED_LOCKED: u64 = 24;
    pub(crate) const COLLAPSE: u64 = 25;
    pub(crate) const GUARD_INSTALL: u64 = 102;
}

/// One system call. Returns what the kernel returns: a value, or a negative error number.
///
/// # Safety
/// As the call itself: whoever asks the kernel to change memory answers for what was there.
#[inline(always)]
pub(crate) unsafe fn call6(nr: u64, a: u64, b: u64, c: u64, d: u64, e: u64, f: u64) -> i64 {
    #[cfg(feature = "faults")]
    crate::faults::step();
    // SAFETY: the caller's promise.
    unsafe { raw6(nr, a, b, c, d, e, f) }
}

/// As [`call6`], not counted as a step by the tests' faults.
///
/// # Safety
/// As for [`call6`].
#[inline(always)]
pub(crate) unsafe fn raw6(nr: u64, a: u64, b: u64, c: u64, d: u64, e: u64, f: u64) -> i64 {
    let result: i64;
    // SAFETY: the syscall instruction clobbers rax, rcx and r11 only; what the call does is the caller's promise.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") nr => result,
            in("rdi") a,
            in("rsi") b,
            in("rdx") c,
            in("r10") d,
            in("r8") e,
            in("r9") f,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack)
        );
    }
    result
}

macro_rules! sys {
    ($nr:expr $(,)?) => {
        $crate::sys::call6($nr, 0, 0, 0, 0, 0, 0)
    };
    ($nr:expr, $a:expr $(,)?) => {
        $crate::sys::call6($nr, $a, 0, 0, 0, 0, 0)
    };
    ($nr:expr, $a:expr, $b:expr $(,)?) => {
        $crate::sys::call6($nr, $a, $b, 0, 0, 0, 0)
    };
    ($nr:expr, $a:expr, $b:expr, $c:expr $(,)?) => {
        $crate::sys::call6($nr, $a, $b, $c, 0, 0, 0)
    };
    ($nr:expr, $a:expr, $b:expr, $c:expr, $d:expr $(,)?) => {
        $crate::sys::call6($nr, $a, $b, $c, $d, 0, 0)
    };
    ($nr:expr, $a:expr, $b:expr, $c:expr, $d:expr, $e:expr $(,)?) => {
        $crate::sys::call6($nr, $a, $b, $c, $d, $e, 0)
    };
    ($nr:expr, $a:expr, $b:expr, $c:expr, $d:expr, $e:expr, $f:expr $(,)?) => {
        $crate::sys::call6($nr, $a, $b, $c, $d, $e, $f)
    };
}
pub(crate) use sys;

/// True if a result is an error number.
pub(crate) const fn failed(result: i64) -> bool {
    result < 0 && result > -4096
}

/// Rounds up to whole pages; saturates at the top of the address space.
pub(crate) const fn page_up(bytes: u64) -> u64 {
    bytes.saturating_add(PAGE - 1) & !(PAGE - 1)
}

/// Rounds down to whole pages.
pub(crate) const fn page_down(address: u64) -> u64 {
    address & !(PAGE - 1)
}

/// The calling thread's id.
pub(crate) fn gettid() -> u32 {
    // SAFETY: reads an id.
    unsafe { sys!(nr::GETTID) as u32 }
}

/// The calling process's id.
pub(crate) fn getpid() -> u32 {
    // SAFETY: reads an id.
    unsafe { sys!(nr::GETPID) as u32 }
}

/// Nanoseconds of the monotonic clock.
pub(crate) fn monotonic() -> u64 {
    clock(1)
}

/// Nanoseconds of CPU time of this process (the helper is a process of its own).
pub(crate) fn cpu_time() -> u64 {
    clock(2)
}

fn clock(id: u64) -> u64 {
    let mut time = [0_u64; 2];
    // SAFETY: the kernel writes a timespec into `time`.
    unsafe { sys!(nr::CLOCK_GETTIME, id, (&raw mut time) as u64) };
    time[0].wrapping_mul(1_000_000_000).wrapping_add(time[1])
}

/// Sleeps.
pub(crate) fn sleep_ns(nanoseconds: u64) {
    let time = [nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000];
    // SAFETY: the kernel reads a timespec.
    unsafe { sys!(nr::NANOSLEEP, (&raw const time) as u64, 0) };
}

/// Lets another thread run.
pub(crate) fn yield_now() {
    // SAFETY: changes nothing in memory.
    unsafe { sys!(nr::SCHED_YIELD) };
}

/// One more turn of a wait for what another thread does in a moment. After a few of them also threads of lower priority
/// must run: for one of a real-time class to yield means to go on, and the other one may wait for this very CPU.
pub(crate) fn let_others_run(turns: u32) {
    if turns < 64 {
        yield_now();
    } else {
        sleep_ns(50_000);
    }
}

/// Waits on a futex word while it holds `value`, at most `timeout_ns` (0: without limit). The word may lie in shared
/// memory.
pub(crate) fn futex_wait(word: &core::sync::atomic::AtomicU32, value: u32, timeout_ns: u64) -> i64 {
    let time = [timeout_ns / 1_000_000_000, timeout_ns % 1_000_000_000];
    let limit = if timeout_ns == 0 { 0 } else { (&raw const time) as u64 };
    // SAFETY: the kernel reads the word and the timespec.
    unsafe { sys!(nr::FUTEX, word.as_ptr() as u64, 0, value.into(), limit) }
}

/// Waits on a futex word of this process's own while it holds `value`, and on another one, an address of the program's, while
/// that holds `other_value`. At most that long; it may come back at any time.
pub(crate) fn futex_wait_both(
    word: &core::sync::atomic::AtomicU32,
    value: u32,
    other: u64,
    other_value: u32,
    timeout_ns: u64,
) {
    const CLOCK_MONOTONIC: u64 = 1;
    /// FUTEX2_SIZE_U32, and shared: both words may be waited for by other processes.
    const SIZE_32: u64 = 2;
    let until = monotonic().saturating_add(timeout_ns);
    let time = [until / 1_000_000_000, until % 1_000_000_000];
    // struct futex_waitv: value, address, flags.
    let words = [[u64::from(value), word.as_ptr() as u64, SIZE_32], [u64::from(other_value), other, SIZE_32]];
    let (words, limit) = (words.as_ptr() as u64, (&raw const time) as u64);
    // SAFETY: the kernel reads the two structures, the words and the timespec.
    let waited = unsafe { sys!(nr::FUTEX_WAITV, words, 2, 0, limit, CLOCK_MONOTONIC) };
    // Whatever is wrong with the second word must not make this a loop.
    if failed(waited) && ![errno::EAGAIN, errno::EINTR, errno::ETIMEDOUT].contains(&-waited) {
        futex_wait(word, value, timeout_ns);
    }
}

/// Wakes everybody who waits on a futex word.
pub(crate) fn futex_wake(word: &core::sync::atomic::AtomicU32) {
    // SAFETY: the kernel looks the word's address up, nothing is written.
    unsafe { sys!(nr::FUTEX, word.as_ptr() as u64, 1, i32::MAX as u64) };
}

/// Blocks every signal and returns the mask that was in force.
pub(crate) fn block_signals() -> u64 {
    let all = u64::MAX;
    let mut old = 0_u64;
    // SAFETY: the kernel reads one mask and writes the other.
    unsafe { sys!(nr::RT_SIGPROCMASK, 2, (&raw const all) as u64, (&raw mut old) as u64, 8) };
    old
}

/// Puts a signal mask back.
pub(crate) fn restore_signals(mask: u64) {
    // SAFETY: the kernel reads the mask.
    unsafe { sys!(nr::RT_SIGPROCMASK, 2, (&raw const mask) as u64, 0, 8) };
}

/// True if the word at an address can be read, which costs a signal if one tries and it cannot. The kernel reads it before
/// it waits, and does not wait at all: the word is another one, or the time is over. A call that no filter forbids, and for
/// which nobody needs a descriptor.
pub(crate) fn is_readable(address: u64) -> bool {
    const WAIT_PRIVATE: u64 = 128;
    const UNLIKELY: u64 = 0x9d3b_61f5;
    let no_time = [0_u64; 2];
    // SAFETY: the kernel reads the word and a timespec.
    let result = unsafe { sys!(nr::FUTEX, address, WAIT_PRIVATE, UNLIKELY, (&raw const no_time) as u64) };
    address.is_multiple_of(4) && result != -errno::EFAULT
}

/// True if a thread or process with this id exists (also one of another user).
pub(crate) fn exists(id: u32) -> bool {
    // SAFETY: signal 0 is only a look.
    unsafe { sys!(nr::KILL, id.into(), 0) != -errno::ESRCH }
}

/// Maps fresh memory; `None` if it cannot be had.
///
/// # Safety
/// With MAP_FIXED, whoever owns what lies there must have agreed.
pub(crate) unsafe fn mmap(address: u64, len: u64, prot: u64, flags: u64, fd: i32, offset: u64) -> Result<u64, i64> {
    // SAFETY: the caller's promise.
    let result = unsafe { sys!(nr::MMAP, address, len, prot, flags, fd as i64 as u64, offset) };
    if failed(result) { Err(-result) } else { Ok(result as u64) }
}

/// Maps anonymous private memory for the agent's own use, never to be merged.
pub(crate) fn allocate(len: u64) -> Option<u64> {
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    // SAFETY: the kernel chooses a place where nothing is.
    let address = unsafe { mmap(0, len, PROT_READ | PROT_WRITE, flags, -1, 0) }.ok()?;
    if !crate::own::record(address, address + len) {
        // SAFETY: mapped just now.
        unsafe { sys!(nr::MUNMAP, address, len) };
        return None;
    }
    Some(address)
}

/// Gives back what [`allocate`] mapped.
///
/// # Safety
/// Nobody may use it any more.
pub(crate) unsafe fn free(address: u64, len: u64) {
    // Before the memory is anybody's: another thread could get the same place and write it down.
    crate::own::forget(address);
    // SAFETY: the caller's promise.
    unsafe { sys!(nr::MUNMAP, address, len) };
}

/// Reads the program's memory without dereferencing it: what is gone gives `false`, not a signal.
pub(crate) fn read_own(pid: u32, address: u64, into: &mut [u8]) -> bool {
    let len = into.len();
    read_pieces(pid, into, &[[address, len as u64]]) == len
}

/// The same of several pieces, each an address and a length, one behind the other; how many bytes came before the first
/// that cannot be read.
pub(crate) fn read_pieces(pid: u32, into: &mut [u8], pieces: &[[u64; 2]]) -> usize {
    let local = [into.as_mut_ptr() as u64, into.len() as u64];
    let (at, count) = (pieces.as_ptr() as u64, pieces.len() as u64);
    // SAFETY: the kernel writes at most `into.len()` bytes into `into`.
    let read = unsafe { sys!(nr::PROCESS_VM_READV, pid.into(), (&raw const local) as u64, 1, at, count, 0) };
    usize::try_from(read).unwrap_or(0)
}
