//! AF_UNIX SOCK_SEQPACKET sockets: whole packets, descriptors beside them, and who is at the other end.
//!
//! Every socket is non-blocking and closed on exec; the variants with a timeout poll. A packet or a set of descriptors
//! that does not fit is an error, never cut.

use std::ffi::OsStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use thiserror::Error;

use crate::pidfd::{self, Pidfd};
use crate::units::Pid;

/// The most descriptors that can go with one packet (SCM_MAX_FD).
pub const FDS_MAX: usize = 253;

/// What can go wrong with a socket.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SocketError {
    /// It could not be made.
    #[error("cannot make a socket")]
    Create {
        /// What the kernel said.
        source: io::Error,
    },
    /// It could not be bound to its name.
    #[error("cannot listen on {name}")]
    Listen {
        /// The name; abstract names begin with @.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Nobody answers there.
    #[error("cannot connect to {name}")]
    Connect {
        /// The name; abstract names begin with @.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A connection could not be taken.
    #[error("cannot accept a connection")]
    Accept {
        /// What the kernel said.
        source: io::Error,
    },
    /// A packet could not be sent.
    #[error("cannot send a packet of {length} bytes")]
    Send {
        /// Its length.
        length: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// A packet could not be received.
    #[error("cannot receive a packet")]
    Receive {
        /// What the kernel said.
        source: io::Error,
    },
    /// A packet was longer than the buffer, or had more descriptors than fit; they are closed.
    #[error("a packet is longer than {room} bytes or carries too many descriptors")]
    Truncated {
        /// Length of the buffer.
        room: usize,
    },
    /// Who is at the other end could not be found out.
    #[error("cannot find out who is at the other end of a socket")]
    Peer {
        /// What the kernel said.
        source: io::Error,
    },
}

/// What became of a packet to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendOutcome {
    /// It is on its way.
    Sent,
    /// The other side's queue is full.
    Full,
    /// There is nobody at the other end any more.
    Closed,
}

/// What was received.
#[derive(Debug)]
pub enum RecvOutcome {
    /// A packet.
    Packet {
        /// Its length in the buffer.
        length: usize,
        /// The descriptors that came with it, closed on exec.
        fds: Vec<OwnedFd>,
    },
    /// Nothing is there now, or came in time.
    Empty,
    /// There is nobody at the other end any more. An empty packet cannot be told from this, so none is ever sent.
    Closed,
}

/// Who was at the other end when the connection was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process id, 0 if it has none in our pid namespace.
    pub pid: Pid,
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
}

/// A connected socket.
#[derive(Debug)]
pub struct Seqpacket {
    fd: OwnedFd,
}

/// A listening socket.
#[derive(Debug)]
pub struct SeqpacketListener {
    fd: OwnedFd,
}

fn flags() -> SocketFlags {
    SocketFlags::CLOEXEC | SocketFlags::NONBLOCK
}

fn socket() -> Result<OwnedFd, SocketError> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags(), None)
        .map_err(|source| SocketError::Create { source: source.into() })
}

impl SeqpacketListener {
    /// Listens on an abstract name, i.e. one that is not in the file system and that any user can connect to: check
    /// the [`Credentials`].
    ///
    /// # Errors
    /// [`SocketError::Listen`]: EADDRINUSE if the name is taken.
    pub fn bind_abstract(name: &[u8]) -> Result<Self, SocketError> {
        let error = |source: Errno| SocketError::Listen { name: abstract_text(name), source: source.into() };
        let address = SocketAddrUnix::new_abstract_name(name).map_err(error)?;
        Self::bind(&address, error)
    }

    /// Listens on a path. The file must not exist, and stays when the socket is closed.
    ///
    /// # Errors
    /// [`SocketError::Listen`].
    pub fn bind_path(path: &Path) -> Result<Self, SocketError> {
        let error = |source: Errno| SocketError::Listen { name: path.display().to_string(), source: source.into() };
        let address = SocketAddrUnix::new(path).map_err(error)?;
        Self::bind(&address, error)
    }

    /// Takes a socket that listens already, e.g. one that systemd passed.
    #[must_use]
    pub fn from_owned_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    fn bind(address: &SocketAddrUnix, error: impl Fn(Errno) -> SocketError) -> Result<Self, SocketError> {
        let fd = socket()?;
        rustix::net::bind(&fd, address).map_err(&error)?;
        rustix::net::listen(&fd, 128).map_err(&error)?;
        Ok(Self { fd })
    }

    /// The next connection, `None` if there is none now.
    ///
    /// # Errors
    /// [`SocketError::Accept`].
    pub fn accept(&self) -> Result<Option<Seqpacket>, SocketError> {
        loop {
            match rustix::net::accept_with(&self.fd, flags()) {
                Ok(fd) => return Ok(Some(Seqpacket { fd })),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(source) => return Err(SocketError::Accept { source: source.into() }),
            }
        }
    }

    /// The next connection, `None` if none comes in time.
    ///
    /// # Errors
    /// [`SocketError::Accept`].
    pub fn accept_timeout(&self, timeout: Duration) -> Result<Option<Seqpacket>, SocketError> {
        pidfd::poll_in(self.fd.as_fd(), Some(timeout)).map_err(|source| SocketError::Accept { source })?;
        self.accept()
    }
}

impl AsFd for SeqpacketListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Seqpacket {
    /// Two sockets connected to each other.
    ///
    /// # Errors
    /// [`SocketError::Create`].
    pub fn pair() -> Result<(Self, Self), SocketError> {
        let (one, other) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags(), None)
            .map_err(|source| SocketError::Create { source: source.into() })?;
        Ok((Self { fd: one }, Self { fd: other }))
    }

    /// Connects to an abstract name.
    ///
    /// # Errors
    /// [`SocketError::Connect`]: ECONNREFUSED if nobody listens, EAGAIN if too many wait.
    pub fn connect_abstract(name: &[u8]) -> Result<Self, SocketError> {
        let error = |source: Errno| SocketError::Connect { name: abstract_text(name), source: source.into() };
        let address = SocketAddrUnix::new_abstract_name(name).map_err(error)?;
        Self::connect(&address, error)
    }

    /// Connects to a path.
    ///
    /// # Errors
    /// [`SocketError::Connect`].
    pub fn connect_path(path: &Path) -> Result<Self, SocketError> {
        let error = |source: Errno| SocketError::Connect { name: path.display().to_string(), source: source.into() };
        let address = SocketAddrUnix::new(path).map_err(error)?;
        Self::connect(&address, error)
    }

    fn connect(address: &SocketAddrUnix, error: impl Fn(Errno) -> SocketError) -> Result<Self, SocketError> {
        let fd = socket()?;
        rustix::net::connect(&fd, address).map_err(error)?;
        Ok(Self { fd })
    }

    /// Takes a connected socket, e.g. an inherited one, and makes it non-blocking.
    ///
    /// # Errors
    /// [`SocketError::Create`].
    pub fn from_owned_fd(fd: OwnedFd) -> Result<Self, SocketError> {
        rustix::io::ioctl_fionbio(&fd, true).map_err(|source| SocketError::Create { source: source.into() })?;
        Ok(Self { fd })
    }

    /// The descriptor, e.g. to be inherited.
    #[must_use]
    pub fn into_owned_fd(self) -> OwnedFd {
        self.fd
    }

    /// Sends a packet with up to [`FDS_MAX`] descriptors, of which the receiver gets duplicates.
    ///
    /// # Errors
    /// [`SocketError::Send`]: EMSGSIZE for a packet larger than the queue, EINVAL for an empty one.
    pub fn send(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<SendOutcome, SocketError> {
        let error = |source: Errno| SocketError::Send { length: bytes.len(), source: source.into() };
        if bytes.is_empty() || fds.len() > FDS_MAX {
            return Err(error(Errno::INVAL));
        }
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(0)) + fds.len() * 4 + 8];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(error(Errno::MSGSIZE));
        }
        loop {
            let slices = [io::IoSlice::new(bytes)];
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(&self.fd, &slices, &mut ancillary, flags) {
                Ok(_) => return Ok(SendOutcome::Sent),
                Err(Errno::AGAIN) => return Ok(SendOutcome::Full),
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => return Ok(SendOutcome::Closed),
                Err(Errno::INTR) => {}
                Err(source) => return Err(error(source)),
            }
        }
    }

    /// As [`Seqpacket::send`], but waits for room in the queue; [`SendOutcome::Full`] if there is none in time.
    ///
    /// # Errors
    /// As [`Seqpacket::send`].
    pub fn send_timeout(
        &self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> Result<SendOutcome, SocketError> {
        let end = std::time::Instant::now() + timeout;
        loop {
            let outcome = self.send(bytes, fds)?;
            let left = end.saturating_duration_since(std::time::Instant::now());
            if outcome != SendOutcome::Full || left.is_zero() {
                return Ok(outcome);
            }
            pidfd::poll(self.fd.as_fd(), PollFlags::OUT, Some(left))
                .map_err(|source| SocketError::Send { length: bytes.len(), source })?;
        }
    }

    /// Receives a packet, if one is there.
    ///
    /// # Errors
    /// [`SocketError::Truncated`], [`SocketError::Receive`].
    pub fn recv(&self, buffer: &mut [u8]) -> Result<RecvOutcome, SocketError> {
        let room = buffer.len();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        loop {
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut slices = [io::IoSliceMut::new(buffer)];
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let message = match rustix::net::recvmsg(&self.fd, &mut slices, &mut ancillary, flags) {
                Ok(message) => message,
                Err(Errno::AGAIN) => return Ok(RecvOutcome::Empty),
                Err(Errno::CONNRESET) => return Ok(RecvOutcome::Closed),
                Err(Errno::INTR) => continue,
                Err(source) => return Err(SocketError::Receive { source: source.into() }),
            };
            let mut fds = Vec::new();
            for part in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = part {
                    fds.extend(rights);
                }
            }
            if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
                return Err(SocketError::Truncated { room });
            }
            if message.bytes == 0 && fds.is_empty() {
                return Ok(RecvOutcome::Closed);
            }
            return Ok(RecvOutcome::Packet { length: message.bytes, fds });
        }
    }

    /// Receives a packet, waiting for one; [`RecvOutcome::Empty`] if none comes in time.
    ///
    /// # Errors
    /// As [`Seqpacket::recv`].
    pub fn recv_timeout(&self, buffer: &mut [u8], timeout: Duration) -> Result<RecvOutcome, SocketError> {
        pidfd::poll_in(self.fd.as_fd(), Some(timeout)).map_err(|source| SocketError::Receive { source })?;
        self.recv(buffer)
    }

    /// Who was at the other end when the connection was made (SO_PEERCRED).
    ///
    /// # Errors
    /// [`SocketError::Peer`].
    pub fn peer_credentials(&self) -> Result<Credentials, SocketError> {
        let mut credentials = libc::ucred { pid: 0, uid: 0, gid: 0 };
        // SAFETY: the structure is three integers.
        unsafe { self.getsockopt(libc::SO_PEERCRED, &mut credentials) }
            .map_err(|source| SocketError::Peer { source })?;
        Ok(Credentials { pid: Pid(credentials.pid), uid: credentials.uid, gid: credentials.gid })
    }

    /// A descriptor of the process at the other end (SO_PEERPIDFD, Linux 6.5): it cannot be mistaken for another one
    /// that got the same number. `None` where the kernel has none or the process is gone.
    ///
    /// # Errors
    /// [`SocketError::Peer`].
    pub fn peer_pidfd(&self) -> Result<Option<Pidfd>, SocketError> {
        const SO_PEERPIDFD: i32 = 77;
        let mut fd = -1_i32;
        // SAFETY: the value is an integer.
        match unsafe { self.getsockopt(SO_PEERPIDFD, &mut fd) } {
            // SAFETY: the kernel has just put this new descriptor into our table, for us alone.
            Ok(()) if fd >= 0 => Ok(Some(Pidfd::from_owned_fd(unsafe { OwnedFd::from_raw_fd(fd) }))),
            Ok(()) => Ok(None),
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOPROTOOPT | libc::EINVAL | libc::ESRCH | libc::ENODATA) => Ok(None),
                _ => Err(SocketError::Peer { source: error }),
            },
        }
    }

    /// # Safety
    /// `T` must be a plain structure of integers.
    unsafe fn getsockopt<T>(&self, option: i32, value: &mut T) -> io::Result<()> {
        let mut length = size_of::<T>() as libc::socklen_t;
        let pointer = std::ptr::from_mut(value).cast();
        // SAFETY: the kernel writes at most `length` bytes to `value`, for which the caller vouches that any are valid.
        let result =
            unsafe { libc::getsockopt(self.fd.as_raw_fd(), libc::SOL_SOCKET, option, pointer, &raw mut length) };
        crate::sys::check(result.into()).map(|_| ())
    }
}

impl AsFd for Seqpacket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn abstract_text(name: &[u8]) -> String {
    format!("@{}", OsStr::from_bytes(name).display())
}

#[cfg(test)]
mod tests;
