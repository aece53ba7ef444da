//! The few raw calls that rustix has no wrapper for, reduced to `io::Result`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Turns -1 into the thread's errno.
pub(crate) fn check(result: i64) -> io::Result<i64> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// ioctl(2) with a structure that the kernel reads and writes.
///
/// # Safety
/// `number` must be an ioctl of `fd`'s kind whose argument is a `T`, and every address inside `*argument` that the
/// kernel will write to must be valid for that.
pub(crate) unsafe fn ioctl<T>(fd: BorrowedFd<'_>, number: u32, argument: &mut T) -> io::Result<i64> {
    let pointer = std::ptr::from_mut(argument);
    #[cfg(target_arch = "x86_64")]
    {
        let result: i64;
        // Not through the C library: where a broker lives inside a member, the gate in there would take the broker's
        // UFFDIO_REGISTER for that of a program with a userfaultfd of its own.
        // SAFETY: the caller vouches that `number` takes a `T`; the reference is valid for reads and writes. The
        // instruction changes the registers named and nothing else.
        unsafe {
            std::arch::asm!(
                "syscall",
                inlateout("rax") libc::SYS_ioctl => result,
                in("rdi") i64::from(fd.as_raw_fd()),
                in("rsi") u64::from(number),
                in("rdx") pointer,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
        if result < 0 { Err(io::Error::from_raw_os_error(-result as i32)) } else { Ok(result) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        // SAFETY: as above.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), number.into(), pointer) }.into())
    }
}

/// The errno of an error that came from the kernel, 0 if it has none.
pub(crate) fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(0)
}
