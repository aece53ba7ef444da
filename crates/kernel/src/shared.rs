//! Memory shared with a process that may be hostile, and futexes in it.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicU8, AtomicU16, AtomicU32, AtomicU64};
use std::time::Duration;

use rustix::fs::SealFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};
use rustix::thread::futex;
use thiserror::Error;

use crate::memfd::{self, MemfdError};
use crate::units::{Bytes, page_size};

/// A type that can be shared with a process that writes what it likes.
///
/// # Safety
/// The type consists of atomics only (and arrays and `repr(C)` structures of them), any bit pattern is a valid value,
/// and it needs no drop. Its reader must not assume that a value stays what it was at the last look.
pub unsafe trait SharedLayout: Sync {}

// SAFETY: atomics of plain integers; every bit pattern is a value.
unsafe impl SharedLayout for AtomicU8 {}
// SAFETY: as above.
unsafe impl SharedLayout for AtomicU16 {}
// SAFETY: as above.
unsafe impl SharedLayout for AtomicU32 {}
// SAFETY: as above.
unsafe impl SharedLayout for AtomicU64 {}
// SAFETY: as above.
unsafe impl SharedLayout for AtomicI32 {}
// SAFETY: as above.
unsafe impl SharedLayout for AtomicI64 {}
// SAFETY: an array of such types has no other parts.
unsafe impl<T: SharedLayout, const N: usize> SharedLayout for [T; N] {}
// SAFETY: the control area is a repr(C) structure of atomics of integers, see its definition.
unsafe impl SharedLayout for abi::control::Control {}

/// What can go wrong with shared memory.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SharedError {
    /// The memory file is shorter than the type.
    #[error("a memory file of {size} bytes is too short for {needed} bytes")]
    TooShort {
        /// Its size.
        size: Bytes,
        /// The size of the type.
        needed: Bytes,
    },
    /// The memory file is not one that the other side cannot shorten; an access behind its end would kill us.
    #[error("the memory file is not sealed against shrinking")]
    NotSealed,
    /// It is no memory file of small pages, so an access could fail and kill us.
    #[error("the descriptor is not one of a plain memory file")]
    NotMemory,
    /// The memory file could not be made or looked up.
    #[error("cannot use the memory file")]
    Memfd(#[from] MemfdError),
    /// It could not be mapped.
    #[error("cannot map {size} bytes of shared memory")]
    Map {
        /// The size of the type.
        size: Bytes,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A memory file mapped shared and read-write, seen as a `T`.
pub struct SharedMap<T: SharedLayout> {
    pointer: NonNull<T>,
    length: usize,
    owned: PhantomData<T>,
}

// SAFETY: the mapping belongs to the value, and its content is reached by shared references to a Sync type only.
unsafe impl<T: SharedLayout> Send for SharedMap<T> {}
// SAFETY: as above; T is Sync.
unsafe impl<T: SharedLayout> Sync for SharedMap<T> {}

impl<T: SharedLayout> SharedMap<T> {
    /// Makes a new memory file of the right size, zeroed and sealed against shrinking and growing, and maps it.
    ///
    /// # Errors
    /// [`SharedError::Memfd`], [`SharedError::Map`].
    pub fn create(name: &str) -> Result<(Self, OwnedFd), SharedError> {
        let size = Bytes(size_of::<T>() as u64).pages_ceil().bytes();
        let fd = memfd::create(name, size)?;
        memfd::seal_size(fd.as_fd())?;
        Ok((Self::map(fd.as_fd())?, fd))
    }

    /// Maps a memory file, after making sure that it is long enough and stays so.
    ///
    /// # Errors
    /// [`SharedError::NotMemory`], [`SharedError::NotSealed`], [`SharedError::TooShort`], [`SharedError::Map`].
    pub fn map(fd: BorrowedFd<'_>) -> Result<Self, SharedError> {
        // A huge page that is not to be had would be another SIGBUS.
        const TMPFS_MAGIC: i64 = 0x0102_1994;
        match rustix::fs::fstatfs(fd) {
            Ok(stat) if stat.f_type == TMPFS_MAGIC => {}
            Ok(_) | Err(_) => return Err(SharedError::NotMemory),
        }
        // The seal first: what the size was before it could still be changed.
        match rustix::fs::fcntl_get_seals(fd) {
            Ok(seals) if seals.contains(SealFlags::SHRINK) => {}
            Ok(_) | Err(_) => return Err(SharedError::NotSealed),
        }
        let needed = Bytes(size_of::<T>() as u64);
        let size = memfd::size(fd)?;
        if size < needed {
            return Err(SharedError::TooShort { size, needed });
        }
        const { assert!(size_of::<T>() > 0 && align_of::<T>() <= 4096) };
        let length = needed.0.next_multiple_of(page_size()) as usize;
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: the kernel chooses the address, so no existing memory is touched.
        let pointer = unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, prot, flags, fd, 0) }
            .map_err(|source| SharedError::Map { size: needed, source: source.into() })?;
        let pointer = NonNull::new(pointer.cast()).expect("a mapping is never at address 0");
        Ok(Self { pointer, length, owned: PhantomData })
    }
}

impl<T: SharedLayout> Deref for SharedMap<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the mapping is at least as long as T, page-aligned, lives as long as `self` and cannot be cut short
        // (sealed); T is only atomics with any bits valid, so writes of the other side are no data races on it.
        unsafe { self.pointer.as_ref() }
    }
}

impl<T: SharedLayout> Drop for SharedMap<T> {
    fn drop(&mut self) {
        // SAFETY: this is our mapping, and no reference into it outlives `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.pointer.as_ptr().cast(), self.length) };
        debug_assert!(unmapped.is_ok(), "a mapping of our own can be unmapped");
    }
}

impl<T: SharedLayout> fmt::Debug for SharedMap<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedMap({} bytes at {:?})", self.length, self.pointer)
    }
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitOutcome {
    /// Somebody woke us.
    Woken,
    /// The word was not what it was expected to be.
    Changed,
    /// The time is over.
    TimedOut,
    /// A signal came.
    Interrupted,
}

/// Sleeps while `word` is `expected`, also across processes, until somebody wakes us or the time is over.
///
/// # Errors
/// What futex(2) says otherwise; EFAULT if the page is frozen or gone.
pub fn futex_wait(word: &AtomicU32, expected: u32, timeout: Option<Duration>) -> io::Result<WaitOutcome> {
    let timeout = timeout.map(|time| rustix::time::Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    });
    match futex::wait(word, futex::Flags::empty(), expected, timeout.as_ref()) {
        Ok(()) => Ok(WaitOutcome::Woken),
        Err(Errno::AGAIN) => Ok(WaitOutcome::Changed),
        Err(Errno::TIMEDOUT) => Ok(WaitOutcome::TimedOut),
        Err(Errno::INTR) => Ok(WaitOutcome::Interrupted),
        Err(error) => Err(error.into()),
    }
}

/// Wakes up to `count` who sleep on `word`, in any process; returns how many there were. The kernel takes the number with a
/// sign, and wakes one for each that is below zero.
///
/// # Errors
/// What futex(2) says.
pub fn futex_wake(word: &AtomicU32, count: u32) -> io::Result<usize> {
    futex::wake(word, futex::Flags::empty(), count.min(i32::MAX.cast_unsigned())).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::units::PageCount;
    use std::sync::atomic::Ordering;

    #[test]
    fn two_mappings_see_each_other() {
        let (one, fd) = SharedMap::<[AtomicU64; 1000]>::create("test").unwrap();
        let other = SharedMap::<[AtomicU64; 1000]>::map(fd.as_fd()).unwrap();
        one[999].store(7, Ordering::SeqCst);
        assert_eq!((other[999].load(Ordering::SeqCst), other[0].load(Ordering::SeqCst)), (7, 0));
        let (area, _fd) = SharedMap::<abi::control::Control>::create("test").unwrap();
        area.magic.store(abi::control::MAGIC, Ordering::SeqCst);
    }

    /// Seen to fail: of several threads that waited for a gate which the broker opened one went on.
    #[test]
    fn everybody_is_woken() {
        const SLEEPERS: usize = 3;
        let (word, _fd) = SharedMap::<AtomicU32>::create("test").unwrap();
        std::thread::scope(|scope| {
            for _ in 0..SLEEPERS {
                scope.spawn(|| while matches!(futex_wait(&word, 0, None), Ok(WaitOutcome::Interrupted)) {});
            }
            let (mut woken, mut all_at_once) = (0, 0);
            std::thread::sleep(Duration::from_millis(200));
            while woken < SLEEPERS {
                let count = futex_wake(&word, u32::MAX).unwrap();
                woken += count;
                all_at_once = all_at_once.max(count);
                std::thread::sleep(Duration::from_millis(20));
            }
            assert!(all_at_once > 1, "one at a time");
        });
    }

    #[test]
    fn files_that_could_kill_us_are_refused() {
        let short = memfd::create("test", PageCount(1).bytes()).unwrap();
        assert!(matches!(SharedMap::<AtomicU32>::map(short.as_fd()), Err(SharedError::NotSealed)));
        memfd::seal_size(short.as_fd()).unwrap();
        assert!(SharedMap::<AtomicU32>::map(short.as_fd()).is_ok());
        let result = SharedMap::<[AtomicU64; 1000]>::map(short.as_fd());
        assert!(matches!(result, Err(SharedError::TooShort { size, .. }) if size == PageCount(1).bytes()));
        let ordinary = tempfile::tempfile().unwrap();
        let refused = SharedMap::<AtomicU32>::map(ordinary.as_fd());
        assert!(matches!(refused, Err(SharedError::NotMemory | SharedError::NotSealed)), "{refused:?}");
        let (pipe, _end) = io::pipe().unwrap();
        assert!(matches!(SharedMap::<AtomicU32>::map(pipe.as_fd()), Err(SharedError::NotMemory)));
        let flags = rustix::fs::MemfdFlags::ALLOW_SEALING | rustix::fs::MemfdFlags::HUGETLB;
        if let Ok(huge) = rustix::fs::memfd_create("test", flags) {
            rustix::fs::fcntl_add_seals(&huge, SealFlags::SHRINK).unwrap();
            assert!(matches!(SharedMap::<AtomicU32>::map(huge.as_fd()), Err(SharedError::NotMemory)));
        }
    }

    #[test]
    fn a_sleeper_is_woken_through_another_mapping() {
        let (word, fd) = SharedMap::<AtomicU32>::create("test").unwrap();
        let other = SharedMap::<AtomicU32>::map(fd.as_fd()).unwrap();
        assert_eq!(futex_wait(&word, 1, None).unwrap(), WaitOutcome::Changed);
        let soon = Some(Duration::from_millis(5));
        assert_eq!(futex_wait(&word, 0, soon).unwrap(), WaitOutcome::TimedOut);
        std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| futex_wait(&word, 0, Some(Duration::from_secs(10))).unwrap());
            let mut woken = 0;
            while woken == 0 && !sleeper.is_finished() {
                woken = futex_wake(&other, 1).unwrap();
            }
            assert_eq!((woken, sleeper.join().unwrap()), (1, WaitOutcome::Woken));
        });
    }
}
