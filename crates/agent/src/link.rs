//! The helper's socket to the broker: connect, send, receive, with descriptors.

use abi::wire::{Message, PACKET};

use crate::state::{ADDRESS_MAX, STATE};
use crate::sys::{self, errno, failed, nr, sys};
use core::sync::atomic::Ordering::SeqCst;

const AF_UNIX: u64 = 1;
const SOCK_SEQPACKET: u64 = 5;
const SOCK_CLOEXEC: u64 = 0o2_000_000;
const MSG_DONTWAIT: u64 = 0x40;
const MSG_NOSIGNAL: u64 = 0x4000;
const MSG_CMSG_CLOEXEC: u64 = 0x4000_0000;
const SOL_SOCKET: u32 = 1;
const SCM_RIGHTS: u32 = 1;

/// `struct msghdr`.
#[repr(C)]
struct Header {
    name: u64,
    name_len: u32,
    pad: u32,
    iov: u64,
    iov_len: u64,
    control: u64,
    control_len: u64,
    flags: u32,
    pad2: u32,
}

impl Header {
    /// One buffer, and room or content of `control_len` bytes for descriptors, none for 0.
    fn new(iov: &[u64; 2], control: u64, control_len: u64) -> Self {
        Self {
            name: 0,
            name_len: 0,
            pad: 0,
            iov: iov.as_ptr() as u64,
            iov_len: 1,
            control,
            control_len,
            flags: 0,
            pad2: 0,
        }
    }
}

/// One descriptor in a control message, padded as CMSG_SPACE pads it.
#[repr(C)]
struct OneDescriptor {
    len: u64,
    level: u32,
    kind: u32,
    fd: i32,
    pad: i32,
}

/// What came in.
pub(crate) enum Received {
    /// A message, perhaps with a descriptor.
    Message(Message, Option<i32>),
    /// Nothing yet.
    Nothing,
    /// The broker is gone, or what it sent made no sense.
    Gone,
}

/// A connected socket.
pub(crate) struct Link {
    fd: i32,
}

impl Link {
    /// Connects to the broker.
    pub(crate) fn connect() -> Option<Self> {
        let mut address = [0_u8; ADDRESS_MAX + 2];
        address[0] = AF_UNIX as u8;
        let len = STATE.address_len.load(SeqCst) as usize;
        for index in 0..len.min(ADDRESS_MAX) {
            address[2 + index] = STATE.address[index / 8].load(SeqCst).to_le_bytes()[index % 8];
        }
        // SAFETY: makes a descriptor in the helper's own table.
        let fd = unsafe { sys!(nr::SOCKET, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0) };
        if failed(fd) {
            return None;
        }
        // SAFETY: the kernel reads `address`.
        let result = unsafe { sys!(nr::CONNECT, fd as u64, address.as_ptr() as u64, len as u64 + 2) };
        (result == 0).then_some(Self { fd: fd as i32 })
    }

    /// A socket that was connected before.
    pub(crate) const fn of(fd: i32) -> Self {
        Self { fd }
    }

    /// The process id of whoever listens, as it is seen from here; 0 if it is not.
    pub(crate) fn peer(&self) -> u32 {
        const SO_PEERCRED: u64 = 17;
        // struct ucred: the process id comes first.
        let mut credentials = [0_u32; 3];
        let mut len = size_of_val(&credentials) as u32;
        let into = (credentials.as_mut_ptr() as u64, (&raw mut len) as u64);
        // SAFETY: the kernel writes into `credentials`, within `len`.
        unsafe { sys!(nr::GETSOCKOPT, self.fd as u64, SOL_SOCKET.into(), SO_PEERCRED, into.0, into.1) };
        credentials[0]
    }

    /// The socket's number, for [`hung_up`].
    pub(crate) const fn descriptor(&self) -> i32 {
        self.fd
    }

    /// Sends a message; `false` if the broker is gone.
    pub(crate) fn send(&self, message: Message, descriptor: Option<i32>) -> bool {
        let mut packet = message.encode();
        let iov = [packet.as_mut_ptr() as u64, PACKET as u64];
        let rights =
            OneDescriptor { len: 20, level: SOL_SOCKET, kind: SCM_RIGHTS, fd: descriptor.unwrap_or(-1), pad: 0 };
        let with = descriptor.is_some();
        let header = Header::new(
            &iov,
            if with { (&raw const rights) as u64 } else { 0 },
            if with { size_of::<OneDescriptor>() as u64 } else { 0 },
        );
        // SAFETY: the kernel reads the header and what it points to, all of it alive here.
        let sent = unsafe { sys!(nr::SENDMSG, self.fd as u64, (&raw const header) as u64, MSG_NOSIGNAL) };
        sent == PACKET as i64
    }

    /// Receives a message, waiting for it or not.
    pub(crate) fn receive(&self, wait: bool) -> Received {
        let mut packet = [0_u8; PACKET];
        let iov = [packet.as_mut_ptr() as u64, PACKET as u64];
        let mut rights = OneDescriptor { len: 0, level: 0, kind: 0, fd: -1, pad: 0 };
        let mut header = Header::new(&iov, (&raw mut rights) as u64, size_of::<OneDescriptor>() as u64);
        let flags = MSG_CMSG_CLOEXEC | if wait { 0 } else { MSG_DONTWAIT };
        // SAFETY: the kernel writes into `packet` and `rights`, within the lengths given.
        let got = unsafe { sys!(nr::RECVMSG, self.fd as u64, (&raw mut header) as u64, flags) };
        if got == -errno::EAGAIN || got == -errno::EINTR {
            return Received::Nothing;
        }
        let descriptor = (header.control_len >= 20 && rights.kind == SCM_RIGHTS && rights.fd >= 0).then_some(rights.fd);
        match Message::decode(&packet) {
            Some(message) if got == PACKET as i64 => Received::Message(message, descriptor),
            _ => {
                if let Some(fd) = descriptor {
                    close(fd);
                }
                Received::Gone
            }
        }
    }
}

/// True if nobody has the other end of a socket any more. What has come in stays there.
pub(crate) fn hung_up(fd: i32) -> bool {
    const MSG_PEEK: u64 = 2;
    let mut byte = 0_u8;
    let iov = [(&raw mut byte) as u64, 1];
    let mut header = Header::new(&iov, 0, 0);
    // SAFETY: the kernel writes one byte, and descriptors nowhere.
    let got = unsafe { sys!(nr::RECVMSG, fd as u64, (&raw mut header) as u64, MSG_PEEK | MSG_DONTWAIT) };
    got == 0 || (got < 0 && got != -errno::EAGAIN && got != -errno::EINTR)
}

/// Closes one of the helper's descriptors.
pub(crate) fn close(fd: i32) {
    // SAFETY: the helper's table is its own.
    unsafe { sys!(nr::CLOSE, fd as u64) };
}

/// Opens a file of the helper's own, read-only.
pub(crate) fn open(path: &core::ffi::CStr) -> Option<i32> {
    // SAFETY: the kernel reads the path.
    let fd = unsafe { sys!(nr::OPENAT, sys::AT_FDCWD, path.as_ptr() as u64, sys::O_CLOEXEC) };
    (!failed(fd)).then_some(fd as i32)
}
