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
    /// [`SharedError::TooShort`], [`SharedError::NotSealed`], [`SharedError::Map`].
    pub fn map(fd: BorrowedFd<'_>) -> Result<Self, SharedError> {
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

/// Wakes up to `count` who sleep on `word`, in any process; returns how many there were.
///
/// # Errors
/// What futex(2) says.
pub fn futex_wake(word: &AtomicU32, count: u32) -> io::Result<usize> {
    futex::wake(word, futex::Flags::empty(), count).map_err(Into::into)
}
