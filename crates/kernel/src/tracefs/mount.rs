//! Where tracefs is.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::sys;

/// Its magic number (include/uapi/linux/magic.h).
const TRACEFS_MAGIC: rustix::fs::FsWord = 0x7472_6163;

/// Its usual places.
const PLACES: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// Its directory.
pub(super) fn open() -> io::Result<OwnedFd> {
    for place in PLACES {
        if let Ok(root) = rustix::fs::open(Path::new(place), OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            && rustix::fs::fstatfs(&root).is_ok_and(|about| about.f_type == TRACEFS_MAGIC)
        {
            return Ok(root);
        }
    }
    mounted_nowhere(c"tracefs")
}

/// A mount of a file system that is attached to no directory and goes with its descriptor (Linux 5.2). Needs CAP_SYS_ADMIN.
fn mounted_nowhere(kind: &CStr) -> io::Result<OwnedFd> {
    const FSOPEN_CLOEXEC: u32 = 1;
    const FSCONFIG_CMD_CREATE: u32 = 6;
    const FSMOUNT_CLOEXEC: u32 = 1;
    // nosuid, nodev, noexec
    const ATTRIBUTES: u32 = 2 | 4 | 8;
    let owned = |number: i64| {
        let number = i32::try_from(number).map_err(io::Error::other)?;
        // SAFETY: the call that returned it has just opened this number.
        Ok::<_, io::Error>(unsafe { OwnedFd::from_raw_fd(number) })
    };
    // SAFETY: the name is a C string that lives until the call returns.
    let context = sys::check(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })?;
    let context = owned(context)?;
    let nothing = std::ptr::null::<u8>();
    // SAFETY: this command takes no key and no value.
    let created =
        unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), FSCONFIG_CMD_CREATE, nothing, nothing, 0) };
    sys::check(created)?;
    // SAFETY: the call takes integers only.
    let mount = unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, ATTRIBUTES) };
    owned(sys::check(mount)?)
}
