//! ptrace(2), reduced to the requests that are needed here, and waiting for the stops of a traced thread.
//!
//! Tracing belongs to a thread of the tracer: all of this is called by the one that seized. When that thread ends, for
//! whatever reason, the kernel detaches what it traced.

use std::io;
use std::time::{Duration, Instant};

use crate::sys;
use crate::units::{Pid, Vaddr};

/// A stop of a traced thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// PTRACE_EVENT_STOP: where PTRACE_INTERRUPT makes it stop, or where a stop signal holds the whole process.
    Trap,
    /// At the entry or the exit of a system call.
    Call,
    /// Before a signal takes effect.
    Signal(i32),
    /// Another event, of a kind that was not asked for.
    Other,
}

/// What waiting for a stop came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waited {
    /// It stopped.
    Stopped(Stop),
    /// It has ended, or another thread has taken its place by exec.
    Ended,
    /// Neither, up to the deadline.
    TimeOut,
}

/// Shortest sleep between two looks. A stop takes 50 to 170 us.
const SHORTEST: Duration = Duration::from_micros(10);
/// Longest.
const LONGEST: Duration = Duration::from_millis(2);

/// A thread that this thread traces.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tracee {
    tid: Pid,
}

impl Tracee {
    /// Starts to trace a thread; it runs on. System-call stops can be told from SIGTRAP.
    pub(crate) fn seize(tid: Pid) -> io::Result<Self> {
        request(libc::PTRACE_SEIZE, tid, 0, libc::PTRACE_O_TRACESYSGOOD as usize)?;
        Ok(Self { tid })
    }

    pub(crate) fn tid(self) -> Pid {
        self.tid
    }

    /// Makes it stop at the next return to user mode; from a stop, right after that.
    pub(crate) fn interrupt(self) -> io::Result<()> {
        request(libc::PTRACE_INTERRUPT, self.tid, 0, 0)
    }

    /// Lets it go on, with a signal or 0.
    pub(crate) fn go_on(self, signal: i32) -> io::Result<()> {
        request(libc::PTRACE_CONT, self.tid, 0, signal as usize)
    }

    /// Lets it go on to the next entry or exit of a system call.
    pub(crate) fn go_to_call(self) -> io::Result<()> {
        request(libc::PTRACE_SYSCALL, self.tid, 0, 0)
    }

    /// Ends tracing; it goes on. Only from a stop.
    pub(crate) fn detach(self) -> io::Result<()> {
        self.detach_with(0)
    }

    /// The same, with a signal or 0.
    pub(crate) fn detach_with(self, signal: i32) -> io::Result<()> {
        request(libc::PTRACE_DETACH, self.tid, 0, signal as usize)
    }

    /// Writes words, of whatever protection, into pages that then are the process's own. The kernel copies a word at a
    /// time, and only into the address space of the thread that is stopped: after an exec there is no such thread.
    pub(crate) fn poke(self, at: Vaddr, bytes: &[u8]) -> io::Result<()> {
        for (index, word) in bytes.chunks_exact(8).enumerate() {
            let word = u64::from_ne_bytes(word.try_into().expect("a chunk of eight bytes"));
            request(libc::PTRACE_POKEDATA, self.tid, at.0 as usize + 8 * index, word as usize)?;
        }
        Ok(())
    }

    /// Reads a register set into plain words; how many bytes there are. A 32-bit thread has fewer of them.
    pub(crate) fn register_set(self, kind: i32, words: &mut [u64]) -> io::Result<usize> {
        let mut vector = libc::iovec { iov_base: words.as_mut_ptr().cast(), iov_len: size_of_val(words) };
        // SAFETY: the kernel writes at most `iov_len` bytes to `iov_base`, which is that much of a slice of integers.
        unsafe { with_memory(libc::PTRACE_GETREGSET, self.tid, kind as usize, &raw mut vector) }?;
        Ok(vector.iov_len)
    }

    /// Writes a register set, by one call: whoever dies has written all of it or nothing.
    pub(crate) fn set_register_set(self, kind: i32, words: &[u64]) -> io::Result<()> {
        let base = words.as_ptr().cast_mut().cast();
        let mut vector = libc::iovec { iov_base: base, iov_len: size_of_val(words) };
        // SAFETY: the kernel only reads the words, and writes the length back into the vector.
        unsafe { with_memory(libc::PTRACE_SETREGSET, self.tid, kind as usize, &raw mut vector) }.map(|_| ())
    }

    /// Fills a structure that the kernel describes by its size; how many bytes it would have written.
    ///
    /// # Safety
    /// `what` must be a request that takes its size as address and fills a `T`, for which all bit patterns are valid.
    pub(crate) unsafe fn fill<T>(self, what: libc::c_uint, structure: &mut T) -> io::Result<i64> {
        // SAFETY: the structure is writable for the size that is passed; the caller vouches for the request.
        unsafe { with_memory(what, self.tid, size_of::<T>(), std::ptr::from_mut(structure)) }
    }

    /// One classic BPF program of the seccomp filters, newest first; how many instructions. `None` behind the last.
    pub(crate) fn seccomp_filter(
        self,
        index: usize,
        program: Option<&mut [libc::sock_filter]>,
    ) -> io::Result<Option<usize>> {
        let room = program.map_or(std::ptr::null_mut(), <[libc::sock_filter]>::as_mut_ptr);
        // SAFETY: with a null pointer the kernel only counts; else the caller has room for the counted instructions,
        // and a filter that is installed never changes.
        match unsafe { with_memory(PTRACE_SECCOMP_GET_FILTER, self.tid, index, room) } {
            Ok(count) => Ok(Some(count as usize)),
            Err(error) if sys::errno(&error) == libc::ENOENT => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Waits for the next stop. An end is left for whoever started the process to collect.
    ///
    /// There is no way to wait for a stop with a time limit, so this looks, and sleeps between two looks for a fourth
    /// of the time that it has already waited.
    pub(crate) fn wait(self, deadline: Instant) -> io::Result<Waited> {
        let begun = Instant::now();
        loop {
            if let Some(waited) = self.look()? {
                return Ok(waited);
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(Waited::TimeOut);
            }
            let pause = ((now - begun) / 4).clamp(SHORTEST, LONGEST).min(deadline - now);
            std::thread::sleep(pause);
        }
    }

    fn look(self) -> io::Result<Option<Waited>> {
        let what = libc::WSTOPPED | libc::WNOHANG | libc::__WALL | libc::__WNOTHREAD;
        let looked = match wait_id(self.tid, what | libc::WEXITED | libc::WNOWAIT) {
            // It may have been killed between the two calls.
            Ok((libc::CLD_TRAPPED | libc::CLD_STOPPED, status)) => {
                wait_id(self.tid, what).map(|(code, _)| (code != 0).then_some(Waited::Stopped(sort(status))))
            }
            Ok((0, _)) => Ok(None),
            Ok(_) => Ok(Some(Waited::Ended)),
            Err(error) => Err(error),
        };
        match looked {
            Err(error) if sys::errno(&error) == libc::ECHILD => Ok(Some(Waited::Ended)),
            Err(error) if sys::errno(&error) == libc::EINTR => Ok(None),
            other => other,
        }
    }
}

/// Not in the libc crate (include/uapi/linux/ptrace.h).
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;

/// Sorts the status of a stop: the signal in the low byte, the event above it.
fn sort(status: i32) -> Stop {
    match (status & 0xff, status >> 8) {
        (_, libc::PTRACE_EVENT_STOP) => Stop::Trap,
        (signal, 0) if signal == libc::SIGTRAP | 0x80 => Stop::Call,
        (signal, 0) => Stop::Signal(signal),
        _ => Stop::Other,
    }
}

/// waitid; the code (0 if there is nothing) and the status.
pub(crate) fn wait_id(tid: Pid, options: i32) -> io::Result<(i32, i32)> {
    // SAFETY: the structure is plain integers, for which zeros are valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is writable and lives until the call returns.
    let result = unsafe { libc::waitid(libc::P_PID, tid.0.cast_unsigned(), &raw mut info, options) };
    sys::check(result.into())?;
    // SAFETY: waitid filled in the part of the structure that is about children, or left it zero.
    Ok((info.si_code, unsafe { info.si_status() }))
}

/// A request that takes numbers and addresses of the other process only.
pub(crate) fn request(what: libc::c_uint, tid: Pid, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: the requests that come here take no address of this process.
    sys::check(unsafe { libc::ptrace(what, tid.0, address, data) }).map(|_| ())
}

/// A request whose data is memory of this process.
///
/// # Safety
/// `data` must be what the request takes, and valid for what it does with it.
unsafe fn with_memory<T>(what: libc::c_uint, tid: Pid, address: usize, data: *mut T) -> io::Result<i64> {
    // SAFETY: the caller vouches for it.
    sys::check(unsafe { libc::ptrace(what, tid.0, address, data) })
}
