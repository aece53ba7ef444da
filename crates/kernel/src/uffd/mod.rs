//! userfaultfd: hold accesses to missing pages, track writes, move pages, and fill pages in from outside.
//!
//! A descriptor belongs to the address space of the process that made it and keeps working there wherever it is sent:
//! a broker that holds a duplicate can give back a dead helper's frozen pages.
//!
//! A descriptor with one of the EVENT features must be read by somebody at all times: the program's fork, mremap,
//! madvise or munmap waits until the event is read. Whoever holds one reads it or closes it.
//!
//! The addresses of [`Uffd::copy`] and [`Uffd::zeropage`] are those of the descriptor's address space. If that is the
//! caller's own, they fill pages of a registered range that have no content yet, as /proc/self/mem would.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use thiserror::Error;

use crate::sys;
use crate::uapi::{
    UFFD_API, UFFD_EVENT_FORK, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP, UFFDIO_API,
    UFFDIO_COPY, UFFDIO_MOVE, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_WRITEPROTECT,
    UFFDIO_WRITEPROTECT_MODE_WP, UFFDIO_ZEROPAGE, USERFAULTFD_IOC_NEW, UffdMsg, UffdioApi, UffdioCopy, UffdioMove,
    UffdioRange, UffdioRegister, UffdioWriteprotect, UffdioZeropage,
};
use crate::units::{Bytes, Range, Vaddr};

mod flags;

pub use flags::{CopyMode, CreateFlags, FaultFlags, Mode, UffdFeatures};

/// The device that hands out userfaultfds to whoever may open it.
pub const USERFAULTFD_DEVICE: &str = "/dev/userfaultfd";

/// What became of a copy into a missing page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopyOutcome {
    /// All of it is there.
    Done,
    /// The first page has content already, nothing was copied.
    Exists,
    /// No registered mapping there, or no address space any more.
    Gone,
    /// The mapping is being changed; go on behind what was copied.
    Again {
        /// Bytes copied.
        copied: Bytes,
    },
}

/// What UFFDIO_MOVE did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoveOutcome {
    /// Bytes moved, from the start of the source.
    pub moved: Bytes,
    /// Why it stopped there: EBUSY for a pinned or shared page, ENOENT for a hole, EEXIST for content at the target,
    /// EAGAIN for a passing change. `None` if all was moved.
    pub errno: Option<Errno>,
}

/// What happened in the address space.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for a page.
    Pagefault {
        /// Where; the page's first byte unless EXACT_ADDRESS was asked for.
        address: Vaddr,
        /// Why.
        flags: FaultFlags,
        /// Which thread, 0 unless THREAD_ID was asked for.
        thread: u32,
    },
    /// The process forked and waits; the child's descriptor inherits the registered ranges.
    Fork {
        /// For the child's address space.
        uffd: Uffd,
    },
    /// Memory was moved by mremap.
    Remap {
        /// Old address.
        from: Vaddr,
        /// New address.
        to: Vaddr,
        /// How much.
        length: Bytes,
    },
    /// Pages are about to be dropped (MADV_DONTNEED, MADV_FREE, MADV_REMOVE).
    Remove {
        /// First byte.
        start: Vaddr,
        /// Byte behind the last.
        end: Vaddr,
    },
    /// Memory was unmapped.
    Unmap {
        /// First byte.
        start: Vaddr,
        /// Byte behind the last.
        end: Vaddr,
    },
}

/// What can go wrong with a userfaultfd.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UffdError {
    /// Neither the device nor the system call gives one.
    #[error(
        "no userfaultfd: {USERFAULTFD_DEVICE} says {device}, the system call says {syscall}; grant access to the \
         device, CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd=1"
    )]
    NotPermitted {
        /// What opening the device gave.
        device: Errno,
        /// What the system call gave.
        syscall: Errno,
    },
    /// The kernel was built without it.
    #[error("the kernel has no userfaultfd")]
    NotSupported,
    /// A descriptor that came from elsewhere is something else.
    #[error("the descriptor is not a userfaultfd")]
    NotUserfaultfd,
    /// A feature is unknown to the kernel (EINVAL), not permitted (EPERM: EVENT_FORK needs CAP_SYS_PTRACE), or the
    /// handshake was made before.
    #[error("the userfaultfd features {features:?} are not granted")]
    Features {
        /// What was asked for.
        features: UffdFeatures,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused an operation on a range.
    #[error("{operation} of {start:x}-{end:x} failed")]
    Range {
        /// The ioctl.
        operation: &'static str,
        /// First byte.
        start: u64,
        /// Byte behind the last.
        end: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// An event could not be read.
    #[error("cannot read events of a userfaultfd")]
    Read {
        /// What the kernel said.
        source: io::Error,
    },
    /// The descriptor could not be made non-blocking.
    #[error("cannot set up the descriptor of a userfaultfd")]
    Descriptor {
        /// What the kernel said.
        source: io::Error,
    },
}

/// A userfaultfd. Non-blocking, because only those can be polled.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Makes a descriptor for this process's address space: from the device, else by the system call.
    ///
    /// # Errors
    /// [`UffdError::NotPermitted`] with what is missing, [`UffdError::NotSupported`].
    pub fn create(flags: CreateFlags) -> Result<Self, UffdError> {
        let device = match Self::open_device() {
            Ok(device) => match Self::from_device(device.as_fd(), flags) {
                Ok(uffd) => return Ok(uffd),
                Err(error) => error,
            },
            Err(error) => error,
        };
        let device = Errno::from_io_error(&device).unwrap_or(Errno::NODEV);
        let open_flags = libc::O_CLOEXEC | libc::O_NONBLOCK | flags.bits().cast_signed();
        // SAFETY: the call takes one integer and returns a new descriptor.
        match sys::check(unsafe { libc::syscall(libc::SYS_userfaultfd, open_flags) }) {
            Ok(fd) => {
                let fd = i32::try_from(fd).expect("a descriptor is a small number");
                // SAFETY: the kernel has just returned this descriptor to us alone.
                Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
            }
            Err(error) if sys::errno(&error) == libc::ENOSYS => Err(UffdError::NotSupported),
            Err(error) => {
                let syscall = Errno::from_io_error(&error).unwrap_or(Errno::PERM);
                Err(UffdError::NotPermitted { device, syscall })
            }
        }
    }

    /// Opens the device. The descriptor can be sent to a process that may not open it.
    ///
    /// # Errors
    /// ENOENT before Linux 6.1, EACCES without the grant.
    pub fn open_device() -> io::Result<OwnedFd> {
        File::options().read(true).write(true).open(USERFAULTFD_DEVICE).map(Into::into)
    }

    /// Makes a descriptor for this process's address space from an open device.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn from_device(device: BorrowedFd<'_>, flags: CreateFlags) -> io::Result<Self> {
        let open_flags = libc::O_CLOEXEC | libc::O_NONBLOCK | flags.bits().cast_signed();
        // SAFETY: the ioctl takes an integer; on another kind of file it is an unknown number.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW.into(), open_flags) };
        sys::check(fd.into())?;
        // SAFETY: the kernel has just returned this descriptor to us alone.
        Ok(Self { fd: unsafe { OwnedFd::from_raw_fd(fd) } })
    }

    /// Takes a descriptor that came from another process, and makes it non-blocking. What is not a userfaultfd is
    /// refused: its sender could make up events, and a made-up fork names a descriptor of ours to be closed.
    ///
    /// # Errors
    /// [`UffdError::NotUserfaultfd`], [`UffdError::Descriptor`].
    pub fn from_owned_fd(fd: OwnedFd) -> Result<Self, UffdError> {
        let error = |source: Errno| UffdError::Descriptor { source: source.into() };
        // The kernel's name for it; paths of files begin with a slash, so that no file can be called like this.
        let name = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
            .map_err(|source| UffdError::Descriptor { source })?;
        if name.as_os_str() != "anon_inode:[userfaultfd]" {
            return Err(UffdError::NotUserfaultfd);
        }
        let flags = rustix::fs::fcntl_getfl(&fd).map_err(error)?;
        rustix::fs::fcntl_setfl(&fd, flags | rustix::fs::OFlags::NONBLOCK).map_err(error)?;
        Ok(Self { fd })
    }

    /// The descriptor, to be sent or kept.
    #[must_use]
    pub fn into_owned_fd(self) -> OwnedFd {
        self.fd
    }

    /// The handshake, possible once on each descriptor. Returns all features that the kernel has.
    ///
    /// # Errors
    /// [`UffdError::Features`].
    pub fn api(&self, features: UffdFeatures) -> Result<UffdFeatures, UffdError> {
        let mut arg = UffdioApi { api: UFFD_API, features: features.bits(), ioctls: 0 };
        // SAFETY: UFFDIO_API takes this structure and writes nothing else.
        unsafe { sys::ioctl(self.fd.as_fd(), UFFDIO_API, &mut arg) }
            .map_err(|source| UffdError::Features { features, source })?;
        Ok(UffdFeatures::from_bits_retain(arg.features))
    }

    /// Registers a range. The mapping is split at its ends.
    ///
    /// # Errors
    /// [`UffdError::Range`]: EBUSY for a range of another userfaultfd, EINVAL for a kind of mapping that cannot be
    /// registered or a hole, EPERM for shared memory that may not be written.
    pub fn register(&self, range: Range, mode: Mode) -> Result<(), UffdError> {
        let mut arg = UffdioRegister { range: uffdio_range(range), mode: mode.bits(), ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER takes this structure and writes nothing else.
        self.done(range, "UFFDIO_REGISTER", unsafe { sys::ioctl(self.fd.as_fd(), UFFDIO_REGISTER, &mut arg) })
    }

    /// Ends a registration and wakes who waits.
    ///
    /// # Errors
    /// [`UffdError::Range`]: EINVAL if the range has a hole or a mapping that cannot be registered. Parts may stay
    /// registered: go on piece by piece.
    pub fn unregister(&self, range: Range) -> Result<(), UffdError> {
        let mut arg = uffdio_range(range);
        // SAFETY: UFFDIO_UNREGISTER takes this structure and writes nothing else.
        self.done(range, "UFFDIO_UNREGISTER", unsafe { sys::ioctl(self.fd.as_fd(), UFFDIO_UNREGISTER, &mut arg) })
    }

    /// Wakes who waits in the range; they look again.
    ///
    /// # Errors
    /// [`UffdError::Range`].
    pub fn wake(&self, range: Range) -> Result<(), UffdError> {
        let mut arg = uffdio_range(range);
        // SAFETY: UFFDIO_WAKE takes this structure and writes nothing else.
        self.done(range, "UFFDIO_WAKE", unsafe { sys::ioctl(self.fd.as_fd(), UFFDIO_WAKE, &mut arg) })
    }

    /// Puts write protection on a range registered for it, or takes it off and wakes who waits.
    ///
    /// # Errors
    /// [`UffdError::Range`]: ENOENT if the range is not registered, EAGAIN while the mapping is being changed.
    pub fn write_protect(&self, range: Range, on: bool) -> Result<(), UffdError> {
        let mode = if on { UFFDIO_WRITEPROTECT_MODE_WP } else { 0 };
        let mut arg = UffdioWriteprotect { range: uffdio_range(range), mode };
        // SAFETY: UFFDIO_WRITEPROTECT takes this structure and writes nothing else.
        self.done(range, "UFFDIO_WRITEPROTECT", unsafe { sys::ioctl(self.fd.as_fd(), UFFDIO_WRITEPROTECT, &mut arg) })
    }

    /// Fills missing pages of a registered range and wakes who waits. `bytes` must be whole pages.
    ///
    /// # Errors
    /// [`UffdError::Range`] for what is not one of [`CopyOutcome`], e.g. no memory.
    pub fn copy(&self, destination: Vaddr, bytes: &[u8]) -> Result<CopyOutcome, UffdError> {
        self.copy_with(destination, bytes, CopyMode::empty())
    }

    /// As [`Uffd::copy`], in a certain way.
    ///
    /// # Errors
    /// As [`Uffd::copy`].
    pub fn copy_with(&self, destination: Vaddr, bytes: &[u8], mode: CopyMode) -> Result<CopyOutcome, UffdError> {
        let length = bytes.len() as u64;
        let source = bytes.as_ptr().expose_provenance() as u64;
        let mut arg = UffdioCopy { dst: destination.0, src: source, len: length, mode: mode.bits(), copy: 0 };
        // SAFETY: UFFDIO_COPY takes this structure and reads `len` bytes at `src`, which are `bytes`; pages that it
        // fills had no content.
        let result = unsafe { sys::ioctl(self.fd.as_fd(), UFFDIO_COPY, &mut arg) };
        filled("UFFDIO_COPY", destination, length, arg.copy, result)
    }

    /// Maps the zero page at missing pages of a registered range and wakes who waits.
    ///
    /// # Errors
    /// As [`Uffd::copy`].
    pub fn zeropage(&self, range: Range) -> Result<CopyOutcome, UffdError> {
        let mut arg = UffdioZeropage { range: uffdio_range(range), mode: 0, zeropage: 0 };
        // SAFETY: UFFDIO_ZEROPAGE takes this structure and writes nothing else.
        let result = unsafe { sys::ioctl(self.fd.as_fd(), UFFDIO_ZEROPAGE, &mut arg) };
        filled("UFFDIO_ZEROPAGE", range.start(), range.len().0, arg.zeropage, result)
    }

    /// Moves pages inside the descriptor's address space, from `source` to missing pages of a registered range.
    /// Whoever waits at the target is woken.
    ///
    /// # Safety
    /// If the descriptor belongs to this process's own address space, no reference to the source may be alive: its
    /// content is gone until it is moved back.
    pub unsafe fn move_pages(&self, destination: Vaddr, source: Range) -> MoveOutcome {
        let length = source.len().0;
        let mut arg = UffdioMove { dst: destination.0, src: source.start().0, len: length, mode: 0, moved: 0 };
        // SAFETY: UFFDIO_MOVE takes this structure; the caller vouches for the pages.
        let result = unsafe { sys::ioctl(self.fd.as_fd(), UFFDIO_MOVE, &mut arg) };
        let moved = Bytes(u64::try_from(arg.moved).unwrap_or(0));
        let errno = match result {
            Ok(_) => None,
            Err(error) => Some(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
        };
        MoveOutcome { moved, errno }
    }

    /// True from the moment at which a fork (or another call that has an event) begins to copy the address space until
    /// its event is read. No copy, move or the like goes through meanwhile (`mmap_changing` in fs/userfaultfd.c).
    #[must_use]
    pub fn event_is_pending(&self) -> bool {
        // That is looked at before anything else. Copying nothing is refused, but with another error.
        let mut nothing = UffdioCopy { dst: 0, src: 0, len: 0, mode: 0, copy: 0 };
        // SAFETY: UFFDIO_COPY takes this structure; a copy of no bytes reads and writes nothing.
        let result = unsafe { sys::ioctl(self.fd.as_fd(), UFFDIO_COPY, &mut nothing) };
        result.is_err_and(|error| sys::errno(&error) == libc::EAGAIN)
    }

    /// The next event, `None` if there is none now.
    ///
    /// # Errors
    /// [`UffdError::Read`]: EINVAL before the handshake.
    pub fn read_event(&self) -> Result<Option<Event>, UffdError> {
        loop {
            let mut message = UffdMsg::default();
            let pointer = std::ptr::from_mut(&mut message).cast::<u8>();
            // SAFETY: the message is plain integers, for which any bytes are valid, and the slice covers exactly it.
            let bytes = unsafe { std::slice::from_raw_parts_mut(pointer, size_of::<UffdMsg>()) };
            match rustix::io::read(&self.fd, bytes) {
                Ok(read) if read == size_of::<UffdMsg>() => {
                    if let Some(event) = decode(&message)? {
                        return Ok(Some(event));
                    }
                }
                Ok(_) | Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(source) => return Err(UffdError::Read { source: source.into() }),
            }
        }
    }

    fn done(&self, range: Range, operation: &'static str, result: io::Result<i64>) -> Result<(), UffdError> {
        let (start, end) = (range.start().0, range.end().0);
        result.map(|_| ()).map_err(|source| UffdError::Range { operation, start, end, source })
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// All features that this kernel has.
///
/// # Errors
/// As [`Uffd::create`].
pub fn supported_features() -> Result<UffdFeatures, UffdError> {
    Uffd::create(CreateFlags::empty())
        .or_else(|_| Uffd::create(CreateFlags::USER_MODE_ONLY))?
        .api(UffdFeatures::empty())
}

fn uffdio_range(range: Range) -> UffdioRange {
    UffdioRange { start: range.start().0, len: range.len().0 }
}

/// Sorts the result of COPY or ZEROPAGE: `count` holds the bytes done, or a negative error number
/// (fs/userfaultfd.c, `userfaultfd_copy`).
fn filled(
    operation: &'static str,
    start: Vaddr,
    length: u64,
    count: i64,
    result: io::Result<i64>,
) -> Result<CopyOutcome, UffdError> {
    let Err(source) = result else { return Ok(CopyOutcome::Done) };
    match sys::errno(&source) {
        libc::EAGAIN => Ok(CopyOutcome::Again { copied: Bytes(u64::try_from(count).unwrap_or(0)) }),
        libc::EEXIST => Ok(CopyOutcome::Exists),
        libc::ENOENT | libc::ESRCH => Ok(CopyOutcome::Gone),
        _ => Err(UffdError::Range { operation, start: start.0, end: start.0.saturating_add(length), source }),
    }
}

/// `None` for an event that this build does not know.
fn decode(message: &UffdMsg) -> Result<Option<Event>, UffdError> {
    let [first, second, third] = message.arg;
    Ok(Some(match message.event {
        UFFD_EVENT_PAGEFAULT => Event::Pagefault {
            address: Vaddr(second),
            flags: FaultFlags::from_bits_retain(first),
            thread: (third & u64::from(u32::MAX)) as u32,
        },
        UFFD_EVENT_FORK => {
            let fd = (first & u64::from(u32::MAX)) as i32;
            // SAFETY: reading the event has put this new descriptor into our table, for us alone.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            Event::Fork { uffd: Uffd::from_owned_fd(fd)? }
        }
        UFFD_EVENT_REMAP => Event::Remap { from: Vaddr(first), to: Vaddr(second), length: Bytes(third) },
        UFFD_EVENT_REMOVE => Event::Remove { start: Vaddr(first), end: Vaddr(second) },
        UFFD_EVENT_UNMAP => Event::Unmap { start: Vaddr(first), end: Vaddr(second) },
        _ => return Ok(None),
    }))
}

#[cfg(test)]
mod tests;
