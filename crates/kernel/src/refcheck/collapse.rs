//! MADV_COLLAPSE as an oracle: the self-test.
//!
//! The kernel collapses small pages into a huge one only if each has exactly the references that its mappings give it.
//! On a 2 MiB area that a userfaultfd watches and that has a hole behind its pages it cannot collapse anything, but it
//! looks at the pages in order before it notices the hole: EBUSY says that all pages before the hole were free, EAGAIN
//! that one was held or locked (mm/khugepaged.c, `hpage_collapse_scan_pmd`). That is a side effect that nobody
//! promised, so it is tried here on a free and on a held page before anybody relies on it.

use std::io::{self, Read};
use std::os::fd::AsRawFd;

use thiserror::Error;

use crate::sys;
use crate::uapi::{
    UFFD_API, UFFDIO_API, UFFDIO_REGISTER, UFFDIO_REGISTER_MODE_MISSING, USERFAULTFD_IOC_NEW, UffdioApi, UffdioRange,
    UffdioRegister,
};
use crate::units::page_size;

const HUGE: usize = 2 << 20;
/// Pages at the start of the area; the last one is held.
const PAGES: usize = 16;

/// Why the self-test could not be run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CollapseError {
    /// The child that runs it could not be started or waited for.
    #[error("cannot run the self-test in a child")]
    Child {
        /// What the kernel said.
        source: io::Error,
    },
    /// One of its steps failed.
    #[error("the self-test cannot do {step}")]
    Step {
        /// Which.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

const STEPS: [&str; 6] = ["mmap", "userfaultfd", "UFFDIO_API", "UFFDIO_REGISTER", "pipe", "vmsplice"];

/// What the child tells: done and whether it works, or the failed step and its error number.
const DONE: u8 = u8::MAX;

/// Tries the oracle in a child process: a free page must give EBUSY, a page held by a pipe EAGAIN.
///
/// False where huge pages are switched off for this process (PR_SET_THP_DISABLE), and where the kernel looks at the
/// pages in another way.
///
/// # Errors
/// [`CollapseError`].
pub fn collapse_oracle_works() -> Result<bool, CollapseError> {
    let child = |source| CollapseError::Child { source };
    let (mut reader, writer) = io::pipe().map_err(child)?;
    // SAFETY: the child makes system calls only, on memory of its own, and ends with _exit.
    let pid = sys::check(unsafe { libc::fork() }.into()).map_err(child)? as i32;
    if pid == 0 {
        let [errno_low, errno_high, step] = match in_child() {
            Ok(works) => [works.into(), 0, DONE],
            Err((step, error)) => [error.to_le_bytes()[0], error.to_le_bytes()[1], step],
        };
        let report = [step, errno_low, errno_high];
        // SAFETY: the buffer is readable and lives until the call returns.
        unsafe { libc::write(writer.as_raw_fd(), report.as_ptr().cast(), report.len()) };
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(0) };
    }
    drop(writer);
    let mut report = [0_u8; 3];
    let read = reader.read_exact(&mut report);
    loop {
        // SAFETY: no status is asked for, so nothing is written.
        match sys::check(unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) }.into()) {
            Err(error) if sys::errno(&error) == libc::EINTR => {}
            _ => break,
        }
    }
    read.map_err(child)?;
    let [step, low, high] = report;
    if step == DONE {
        return Ok(low == 1);
    }
    let source = io::Error::from_raw_os_error(i32::from(low) | i32::from(high) << 8);
    Err(CollapseError::Step { step: STEPS.get(usize::from(step)).copied().unwrap_or("anything"), source })
}

/// The calling thread's error number.
fn errno() -> i32 {
    sys::errno(&io::Error::last_os_error())
}

/// Runs in the child of a process that may have had threads: system calls only, no allocation.
fn in_child() -> Result<bool, (u8, i32)> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: the kernel chooses the address, so no existing memory is touched.
    let raw = unsafe { libc::mmap(std::ptr::null_mut(), 2 * HUGE, prot, flags, -1, 0) };
    if raw == libc::MAP_FAILED {
        return Err((0, errno()));
    }
    let area = raw.map_addr(|address| address.next_multiple_of(HUGE)).cast::<u8>();
    let page = page_size() as usize;
    // A write to the area could bring a huge page at once, so that is switched off while it is filled.
    // SAFETY: the area is our own mapping.
    unsafe { libc::madvise(area.cast(), HUGE, libc::MADV_NOHUGEPAGE) };
    for index in 0..PAGES {
        // SAFETY: the page lies in our own mapping.
        unsafe { area.add(index * page).write_volatile(0x5a) };
    }
    // SAFETY: the area is our own mapping.
    unsafe { libc::madvise(area.cast(), HUGE, libc::MADV_HUGEPAGE) };
    watch(area)?;
    if !found_free(area) {
        return Ok(false);
    }
    let mut pipe = [-1; 2];
    // SAFETY: the array has room for both descriptors.
    if unsafe { libc::pipe(pipe.as_mut_ptr()) } == -1 {
        return Err((4, errno()));
    }
    // SAFETY: the page lies in our own mapping.
    let held = libc::iovec { iov_base: unsafe { area.add((PAGES - 1) * page) }.cast(), iov_len: page };
    // SAFETY: the vector is readable, and its page is never unmapped.
    if unsafe { libc::vmsplice(pipe[1], &raw const held, 1, 0) } == -1 {
        return Err((5, errno()));
    }
    let noticed = (0..8).all(|_| collapse(area) == libc::EAGAIN);
    // SAFETY: both descriptors are our own.
    unsafe { (libc::close(pipe[0]), libc::close(pipe[1])) };
    Ok(noticed && found_free(area))
}

/// True if the pages are found free. Compaction and reclaim may hold one for a moment, which is not the oracle's fault.
fn found_free(area: *mut u8) -> bool {
    for _ in 0..20 {
        match collapse(area) {
            libc::EBUSY => return true,
            libc::EAGAIN => {}
            _ => return false,
        }
        let pause = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        // SAFETY: the structure is readable and lives until the call returns.
        unsafe { libc::nanosleep(&raw const pause, std::ptr::null_mut()) };
    }
    false
}

/// The error number of MADV_COLLAPSE, 0 for success.
fn collapse(area: *mut u8) -> i32 {
    const MADV_COLLAPSE: i32 = 25;
    // SAFETY: the area is our own mapping, and collapsing it would not change its content.
    if unsafe { libc::madvise(area.cast(), HUGE, MADV_COLLAPSE) } == 0 { 0 } else { errno() }
}

/// Registers the area with a userfaultfd, which stays open until the child ends.
fn watch(area: *mut u8) -> Result<(), (u8, i32)> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes an integer and returns a new descriptor.
    let mut fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as i32;
    if fd == -1 {
        // SAFETY: the path ends with a zero.
        let device = unsafe { libc::open(c"/dev/userfaultfd".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
        // SAFETY: the ioctl takes an integer and returns a new descriptor.
        fd = unsafe { libc::ioctl(device, USERFAULTFD_IOC_NEW.into(), flags) };
    }
    if fd == -1 {
        const USER_MODE_ONLY: i32 = 1;
        // Good enough to see how pages are looked at.
        // SAFETY: the call takes an integer and returns a new descriptor.
        fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags | USER_MODE_ONLY) } as i32;
    }
    if fd == -1 {
        return Err((1, errno()));
    }
    let mut api = UffdioApi { api: UFFD_API, ..UffdioApi::default() };
    // SAFETY: UFFDIO_API takes this structure.
    if unsafe { libc::ioctl(fd, UFFDIO_API.into(), &raw mut api) } == -1 {
        return Err((2, errno()));
    }
    let range = UffdioRange { start: area.expose_provenance() as u64, len: HUGE as u64 };
    let mut register = UffdioRegister { range, mode: UFFDIO_REGISTER_MODE_MISSING, ioctls: 0 };
    // SAFETY: UFFDIO_REGISTER takes this structure.
    if unsafe { libc::ioctl(fd, UFFDIO_REGISTER.into(), &raw mut register) } == -1 {
        return Err((3, errno()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_oracle_answers_the_same_every_time() {
        match collapse_oracle_works() {
            Ok(first) => {
                println!("the oracle works: {first}");
                for _ in 0..10 {
                    assert_eq!(collapse_oracle_works().unwrap(), first);
                }
            }
            Err(error) => println!("skipped: {error}"),
        }
    }
}
