//! Memory files: create, fill, seal, hand out read-only.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, Mode, SealFlags};
use rustix::io::Errno;
use thiserror::Error;

use crate::remote::{ReadOutcome, RemoteError, read_ranges};
use crate::units::{Bytes, Pid, Range};

/// What can go wrong with a memory file.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MemfdError {
    /// It could not be created.
    #[error("cannot create a memory file of {size} bytes")]
    Create {
        /// Its size.
        size: Bytes,
        /// What the kernel said.
        source: io::Error,
    },
    /// The size lies above this process's RLIMIT_FSIZE; trying would bring SIGXFSZ.
    #[error("a memory file of {size} bytes is larger than this process's file size limit of {limit} bytes")]
    FileSizeLimit {
        /// Its size.
        size: Bytes,
        /// The limit.
        limit: Bytes,
    },
    /// It could not be sealed: EBUSY while it is mapped writable somewhere, EPERM if it may not be sealed (any more).
    #[error("cannot seal a memory file")]
    Seal {
        /// What the kernel said.
        source: io::Error,
    },
    /// It could not be opened again, or its mode changed.
    #[error("cannot open a memory file for reading only")]
    Reopen {
        /// What the kernel said.
        source: io::Error,
    },
    /// It could not be written.
    #[error("cannot write {length} bytes at offset {offset} of a memory file")]
    Write {
        /// Where.
        offset: u64,
        /// How much.
        length: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// Its size could not be found out.
    #[error("cannot look up a memory file")]
    Stat {
        /// What the kernel said.
        source: io::Error,
    },
    /// Filling it from another process failed on the other side.
    #[error("cannot fill a memory file from process {pid}")]
    Remote {
        /// The process.
        pid: Pid,
        /// Why.
        source: RemoteError,
    },
}

/// Creates a memory file that can be sealed, is closed on exec and, where the kernel can (6.3), never executable.
///
/// # Errors
/// [`MemfdError::Create`], [`MemfdError::FileSizeLimit`].
pub fn create(name: &str, size: Bytes) -> Result<OwnedFd, MemfdError> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Fsize).current;
    if let Some(limit) = limit.filter(|limit| size.0 > *limit) {
        return Err(MemfdError::FileSizeLimit { size, limit: Bytes(limit) });
    }
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        result => result,
    };
    let fd = fd.map_err(|source| MemfdError::Create { size, source: source.into() })?;
    rustix::fs::ftruncate(&fd, size.0).map_err(|source| MemfdError::Create { size, source: source.into() })?;
    Ok(fd)
}

/// Seals the content and the size for good, and the seals themselves.
///
/// # Errors
/// [`MemfdError::Seal`].
pub fn seal(fd: BorrowedFd<'_>) -> Result<(), MemfdError> {
    add_seals(fd, SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
}

/// Seals the size for good, not the content, as a memory file that two processes write needs it.
///
/// # Errors
/// [`MemfdError::Seal`].
pub fn seal_size(fd: BorrowedFd<'_>) -> Result<(), MemfdError> {
    add_seals(fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
}

fn add_seals(fd: BorrowedFd<'_>, seals: SealFlags) -> Result<(), MemfdError> {
    rustix::fs::fcntl_add_seals(fd, seals).map_err(|source| MemfdError::Seal { source: source.into() })
}

/// True if nobody can change content or size any more.
///
/// # Errors
/// [`MemfdError::Seal`] if it is not a memory file.
pub fn is_sealed(fd: BorrowedFd<'_>) -> Result<bool, MemfdError> {
    let seals = rustix::fs::fcntl_get_seals(fd).map_err(|source| MemfdError::Seal { source: source.into() })?;
    Ok(seals.contains(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW))
}

/// A new descriptor of the same memory file that can only be read: another open file description, so no write mapping
/// can be made through it.
///
/// # Errors
/// [`MemfdError::Reopen`], e.g. without /proc.
pub fn reopen_read_only(fd: BorrowedFd<'_>) -> Result<OwnedFd, MemfdError> {
    File::open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .map(Into::into)
        .map_err(|source| MemfdError::Reopen { source })
}

/// Takes all rights but the owner's right to read, so that another user who holds a descriptor cannot open it anew for
/// writing.
///
/// # Errors
/// [`MemfdError::Reopen`].
pub fn restrict_to_owner(fd: BorrowedFd<'_>) -> Result<(), MemfdError> {
    rustix::fs::fchmod(fd, Mode::RUSR).map_err(|source| MemfdError::Reopen { source: source.into() })
}

/// Its size.
///
/// # Errors
/// [`MemfdError::Stat`].
pub fn size(fd: BorrowedFd<'_>) -> Result<Bytes, MemfdError> {
    let stat = rustix::fs::fstat(fd).map_err(|source| MemfdError::Stat { source: source.into() })?;
    Ok(Bytes(u64::try_from(stat.st_size).unwrap_or(0)))
}

/// The memory that it takes.
///
/// # Errors
/// [`MemfdError::Stat`].
pub fn allocated(fd: BorrowedFd<'_>) -> Result<Bytes, MemfdError> {
    let stat = rustix::fs::fstat(fd).map_err(|source| MemfdError::Stat { source: source.into() })?;
    Ok(Bytes(u64::try_from(stat.st_blocks).unwrap_or(0) * 512))
}

/// Writes all of `bytes` at `offset`.
///
/// # Errors
/// [`MemfdError::Write`].
pub fn pwrite(fd: BorrowedFd<'_>, offset: u64, bytes: &[u8]) -> Result<(), MemfdError> {
    let mut done = 0;
    while done < bytes.len() {
        let error = |source: Errno| MemfdError::Write { offset, length: bytes.len(), source: source.into() };
        match rustix::io::pwrite(fd, &bytes[done..], offset + done as u64) {
            Ok(0) => return Err(error(Errno::NOSPC)),
            Ok(written) => done += written,
            Err(Errno::INTR) => {}
            Err(source) => return Err(error(source)),
        }
    }
    Ok(())
}

/// Reads up to `bytes.len()` bytes at `offset`; returns how many there were.
///
/// # Errors
/// [`MemfdError::Stat`].
pub fn pread(fd: BorrowedFd<'_>, offset: u64, bytes: &mut [u8]) -> Result<usize, MemfdError> {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pread(fd, &mut bytes[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(Errno::INTR) => {}
            Err(source) => return Err(MemfdError::Stat { source: source.into() }),
        }
    }
    Ok(done)
}

/// A good size of the buffer for [`fill_from_remote`]: small enough to stay in the cache between read and write.
/// Measured (`examples/speed.rs`) for 1 MiB: 1.3 to 1.4 us a page through 128 to 256 KiB, 1.4 to 1.6 through 1 MiB; straight
/// into a shared mapping of the file 1.7 to 2.2, because every page is faulted in once more.
pub const FILL_BUFFER: Bytes = Bytes(256 * 1024);

/// Copies ranges of another process, one behind the other, into a memory file from `offset` on. `buffer` is the piece
/// through which they go and may be reused; see [`FILL_BUFFER`].
///
/// # Errors
/// [`MemfdError::Write`], or [`MemfdError::Remote`] without rights on the process.
pub fn fill_from_remote(
    fd: BorrowedFd<'_>,
    offset: u64,
    pid: Pid,
    ranges: &[Range],
    buffer: &mut [u8],
) -> Result<ReadOutcome, MemfdError> {
    let mut total = Bytes(0);
    for range in ranges {
        for piece in range.pieces(Bytes(buffer.len() as u64)) {
            let length = piece.len().0 as usize;
            let outcome = read_ranges(pid, &[piece], &mut buffer[..length])
                .map_err(|source| MemfdError::Remote { pid, source })?;
            let read = outcome.bytes();
            pwrite(fd, offset + total.0, &buffer[..read.0 as usize])?;
            total += read;
            if !matches!(outcome, ReadOutcome::Complete { .. }) {
                return Ok(match outcome {
                    ReadOutcome::Gone => ReadOutcome::Gone,
                    _ => ReadOutcome::Partial { read: total },
                });
            }
        }
    }
    Ok(ReadOutcome::Complete { read: total })
}

/// The device and inode of a memory file, as /proc/PID/maps shows them.
///
/// # Errors
/// [`MemfdError::Stat`].
pub fn identity(fd: impl AsFd) -> Result<(u64, u64), MemfdError> {
    let stat = rustix::fs::fstat(fd).map_err(|source| MemfdError::Stat { source: source.into() })?;
    Ok((stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::test_memory::{Anonymous, ForkedChild, in_own_process, started_by_a_test};
    use crate::units::{PageCount, page_size};
    use rustix::mm::{MapFlags, ProtFlags};

    #[test]
    fn a_sealed_file_stays_as_it_is() {
        let fd = create("test", PageCount(4).bytes()).unwrap();
        pwrite(fd.as_fd(), 10, b"content").unwrap();
        assert!(!is_sealed(fd.as_fd()).unwrap());
        seal(fd.as_fd()).unwrap();
        assert!(is_sealed(fd.as_fd()).unwrap());
        assert!(matches!(pwrite(fd.as_fd(), 0, b"x"), Err(MemfdError::Write { .. })));
        assert!(rustix::fs::ftruncate(&fd, 0).is_err() && rustix::fs::ftruncate(&fd, 1 << 30).is_err());
        assert!(matches!(seal_size(fd.as_fd()), Err(MemfdError::Seal { .. })));
        let mut back = [0; 7];
        assert_eq!(pread(fd.as_fd(), 10, &mut back).unwrap(), 7);
        assert_eq!(&back, b"content");
        assert_eq!(size(fd.as_fd()).unwrap(), PageCount(4).bytes());
        assert_eq!(allocated(fd.as_fd()).unwrap(), PageCount(1).bytes(), "three pages are holes");
    }

    #[test]
    fn a_descriptor_for_reading_cannot_map_for_writing() {
        let fd = create("test", PageCount(1).bytes()).unwrap();
        let read_only = reopen_read_only(fd.as_fd()).unwrap();
        let map = |fd: &OwnedFd, prot, flags| {
            // SAFETY: the kernel chooses the address; the mapping is never accessed.
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), page_size() as usize, prot, flags, fd, 0) }.is_ok()
        };
        let both = ProtFlags::READ | ProtFlags::WRITE;
        assert!(map(&fd, both, MapFlags::SHARED));
        assert!(!map(&read_only, both, MapFlags::SHARED));
        assert!(map(&read_only, both, MapFlags::PRIVATE) && map(&read_only, ProtFlags::READ, MapFlags::SHARED));
        assert!(pwrite(read_only.as_fd(), 0, b"x").is_err());
        assert_eq!(identity(&fd).unwrap(), identity(&read_only).unwrap());
        assert!(matches!(seal(fd.as_fd()), Err(MemfdError::Seal { .. })), "mapped for writing");
        restrict_to_owner(fd.as_fd()).unwrap();
        assert_eq!(rustix::fs::fstat(&fd).unwrap().st_mode & 0o777, 0o400);
    }

    #[test]
    fn another_processs_pages_arrive_in_order() {
        let memory = Anonymous::new(PageCount(300));
        for page in 0..300 {
            memory.write(page * page_size(), (page % 251) as u8);
        }
        let child = ForkedChild::start();
        let fd = create("test", PageCount(301).bytes()).unwrap();
        let ranges = [memory.page(299), Range::new(memory.range().start(), memory.page(299).start()).unwrap()];
        let mut buffer = vec![0; 64 * page_size() as usize];
        let outcome = fill_from_remote(fd.as_fd(), page_size(), child.pid(), &ranges, &mut buffer).unwrap();
        assert_eq!(outcome, ReadOutcome::Complete { read: PageCount(300).bytes() });
        let byte = |page: u64| {
            let mut byte = [0];
            pread(fd.as_fd(), page * page_size(), &mut byte).unwrap();
            byte[0]
        };
        assert_eq!((byte(0), byte(1), byte(2), byte(3), byte(300)), (0, (299 % 251) as u8, 0, 1, (298 % 251) as u8));
        drop(child);
    }

    #[test]
    fn a_file_larger_than_the_limit_is_refused_without_a_signal() {
        // In a process of its own, because the limit holds for all of it.
        in_own_process("memfd::tests::body_with_a_limit");
    }

    #[test]
    #[ignore = "runs in a process of its own, started by the test above"]
    fn body_with_a_limit() {
        if !started_by_a_test() {
            return;
        }
        let limit = crate::sched::Limit { soft: Some(4096), hard: Some(8192) };
        crate::sched::set_limit(Pid::this(), crate::sched::Resource::FileSize, limit).unwrap();
        let refused = create("test", Bytes(1 << 20));
        assert!(matches!(refused, Err(MemfdError::FileSizeLimit { limit: Bytes(4096), .. })));
        create("test", Bytes(4096)).unwrap();
    }
}
