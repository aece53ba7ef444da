//! Reading and writing another process's memory with process_vm_readv and process_vm_writev.
//!
//! Both copy without the mmap lock and stop at the first page that is not there. Batches of up to [`BATCH`] run at the
//! speed of memcpy; page by page costs fifty times as much.

use std::io;

use thiserror::Error;

use crate::units::{Bytes, Pid, Range, Vaddr, page_size};

/// The most that is worth reading with one call: larger batches are not faster and leave the cache.
pub const BATCH: Bytes = Bytes::from_mib(1);

/// Ranges that one call takes (IOV_MAX).
const IOV_MAX: usize = 1024;

/// What can go wrong with another process's memory.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RemoteError {
    /// The caller has no ptrace rights on the process.
    #[error("not permitted to access the memory of process {pid}")]
    Denied {
        /// The process.
        pid: Pid,
    },
    /// The kernel refused for another reason.
    #[error("cannot access {range} of process {pid}")]
    Access {
        /// The process.
        pid: Pid,
        /// The first range of the call.
        range: Range,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process is the caller itself, whose memory belongs to its own references.
    #[error("process {pid} is the caller itself")]
    Own {
        /// The process.
        pid: Pid,
    },
    /// The buffer is shorter than the ranges.
    #[error("a buffer of {buffer} bytes is too short for {wanted} bytes")]
    Buffer {
        /// Length of the buffer.
        buffer: usize,
        /// Length of the ranges.
        wanted: Bytes,
    },
}

/// How far an access got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOutcome {
    /// All of it.
    Complete {
        /// Bytes read or written.
        read: Bytes,
    },
    /// Up to a page that is not there or not permitted.
    Partial {
        /// Bytes read or written, whole pages.
        read: Bytes,
    },
    /// The process has ended.
    Gone,
}

impl ReadOutcome {
    /// Bytes read or written.
    #[must_use]
    pub const fn bytes(self) -> Bytes {
        match self {
            Self::Complete { read } | Self::Partial { read } => read,
            Self::Gone => Bytes(0),
        }
    }
}

/// Reads ranges, one behind the other, into `buffer`.
///
/// # Errors
/// [`RemoteError`]; a page or a process that is gone is an outcome.
pub fn read_ranges(pid: Pid, ranges: &[Range], buffer: &mut [u8]) -> Result<ReadOutcome, RemoteError> {
    let wanted: Bytes = ranges.iter().map(Range::len).sum();
    if wanted.0 > buffer.len() as u64 {
        return Err(RemoteError::Buffer { buffer: buffer.len(), wanted });
    }
    let mut total = 0_usize;
    for part in ranges.chunks(IOV_MAX) {
        let mut remote = [const { libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 } }; IOV_MAX];
        let mut bytes = 0;
        for (slot, range) in remote.iter_mut().zip(part) {
            *slot = libc::iovec { iov_base: range.start().0 as *mut libc::c_void, iov_len: range.len().0 as usize };
            bytes += range.len().0 as usize;
        }
        let room = &mut buffer[total..total + bytes];
        let local = libc::iovec { iov_base: room.as_mut_ptr().cast(), iov_len: bytes };
        let many = part.len() as libc::c_ulong;
        // SAFETY: the local vector is `room`, writable for its whole length; `remote` has at least `many` vectors,
        // which are only read.
        let read = unsafe { libc::process_vm_readv(pid.0, &raw const local, 1, remote.as_ptr(), many, 0) };
        match sort(pid, part[0], read, bytes)? {
            ReadOutcome::Complete { read } => total += read.0 as usize,
            ReadOutcome::Partial { read } => {
                return Ok(ReadOutcome::Partial { read: Bytes(total as u64) + read });
            }
            ReadOutcome::Gone => return Ok(ReadOutcome::Gone),
        }
    }
    Ok(ReadOutcome::Complete { read: Bytes(total as u64) })
}

/// Writes `bytes` to another process from `start` on, as far as its pages are there and writable. Not for the caller's
/// own process.
///
/// # Errors
/// [`RemoteError`]; a page or a process that is gone is an outcome.
pub fn write(pid: Pid, start: Vaddr, bytes: &[u8]) -> Result<ReadOutcome, RemoteError> {
    if pid == Pid::this() {
        return Err(RemoteError::Own { pid });
    }
    let local = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let remote = libc::iovec { iov_base: start.0 as *mut libc::c_void, iov_len: bytes.len() };
    // SAFETY: the local vector is `bytes`, which is only read; what is written lies in another process.
    let written = unsafe { libc::process_vm_writev(pid.0, &raw const local, 1, &raw const remote, 1, 0) };
    let range = Range::covering(start, start).unwrap_or_default();
    sort(pid, range, written, bytes.len())
}

/// Reads `buffer.len()` bytes from any address on.
///
/// # Errors
/// [`RemoteError`]; a page or a process that is gone is an outcome.
pub fn read(pid: Pid, start: Vaddr, buffer: &mut [u8]) -> Result<ReadOutcome, RemoteError> {
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote = libc::iovec { iov_base: start.0 as *mut libc::c_void, iov_len: buffer.len() };
    // SAFETY: the local vector is `buffer`, writable for its whole length; the remote one is only read.
    let read = unsafe { libc::process_vm_readv(pid.0, &raw const local, 1, &raw const remote, 1, 0) };
    let range = Range::covering(start, start).unwrap_or_default();
    sort(pid, range, read, buffer.len())
}

fn sort(pid: Pid, range: Range, done: isize, wanted: usize) -> Result<ReadOutcome, RemoteError> {
    if let Ok(done) = usize::try_from(done) {
        let read = Bytes(done as u64);
        return Ok(if done == wanted { ReadOutcome::Complete { read } } else { ReadOutcome::Partial { read } });
    }
    let source = io::Error::last_os_error();
    match source.raw_os_error() {
        Some(libc::EFAULT) => Ok(ReadOutcome::Partial { read: Bytes(0) }),
        Some(libc::ESRCH) => Ok(ReadOutcome::Gone),
        Some(libc::EPERM) => Err(RemoteError::Denied { pid }),
        _ => Err(RemoteError::Access { pid, range, source }),
    }
}

/// What [`BatchReader::read`] saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadTotals {
    /// Bytes that were read.
    pub read: Bytes,
    /// Bytes of pages that were not there or not permitted.
    pub missing: Bytes,
    /// True if the process ended meanwhile.
    pub gone: bool,
}

/// Reads any number of ranges through one buffer that is reused.
#[derive(Debug)]
pub struct BatchReader {
    buffer: Vec<u8>,
    ranges: Vec<Range>,
}

impl BatchReader {
    /// A reader with a buffer of [`BATCH`].
    #[must_use]
    pub fn new() -> Self {
        Self::with_capacity(BATCH)
    }

    /// A reader with a buffer of a certain size, at least one page.
    #[must_use]
    pub fn with_capacity(size: Bytes) -> Self {
        let bytes = size.pages().0.max(1) * page_size();
        Self { buffer: vec![0; bytes as usize], ranges: Vec::new() }
    }

    /// Reads `ranges` and shows `visit` each piece with its address, in order. Pages that cannot be read are left out.
    ///
    /// # Errors
    /// [`RemoteError::Denied`], [`RemoteError::Access`].
    pub fn read(
        &mut self,
        pid: Pid,
        ranges: &[Range],
        mut visit: impl FnMut(Range, &[u8]),
    ) -> Result<ReadTotals, RemoteError> {
        let mut totals = ReadTotals::default();
        let capacity = self.buffer.len() as u64;
        let mut todo = ranges.iter().flat_map(|range| range.pieces(Bytes(capacity)));
        let mut next = todo.next();
        while next.is_some() {
            // Collect pieces until the buffer is full.
            self.ranges.clear();
            let mut room = capacity;
            while let Some(piece) = next {
                if self.ranges.len() == IOV_MAX || room == 0 {
                    break;
                }
                let fits = piece.pieces(Bytes(room)).next().unwrap_or(piece);
                room -= fits.len().0;
                self.ranges.push(fits);
                next = Range::new(fits.end(), piece.end()).ok().filter(|rest| !rest.is_empty()).or_else(|| todo.next());
            }
            if !self.read_batch(pid, &mut totals, &mut visit)? {
                totals.gone = true;
                return Ok(totals);
            }
        }
        Ok(totals)
    }

    /// Reads `self.ranges`, jumping over pages that fault; false if the process is gone.
    fn read_batch(
        &mut self,
        pid: Pid,
        totals: &mut ReadTotals,
        visit: &mut impl FnMut(Range, &[u8]),
    ) -> Result<bool, RemoteError> {
        let mut at = 0;
        while at < self.ranges.len() {
            let wanted: Bytes = self.ranges[at..].iter().map(Range::len).sum();
            let buffer = &mut self.buffer[..wanted.0 as usize];
            let outcome = read_ranges(pid, &self.ranges[at..], buffer)?;
            if outcome == ReadOutcome::Gone {
                return Ok(false);
            }
            let mut left = outcome.bytes().pages().bytes();
            totals.read += left;
            let mut offset = 0;
            while left.0 > 0 {
                let range = self.ranges[at];
                let got = range.pieces(left).next().unwrap_or(range);
                let length = got.len().0 as usize;
                visit(got, &self.buffer[offset..offset + length]);
                offset += length;
                left -= got.len();
                self.advance(&mut at, got.end());
            }
            if matches!(outcome, ReadOutcome::Partial { .. }) && at < self.ranges.len() {
                totals.missing += Bytes(page_size());
                let behind = self.ranges[at].start() + Bytes(page_size());
                self.advance(&mut at, behind);
            }
        }
        Ok(true)
    }

    /// Moves the front of the list to `behind`, which lies in or at the end of the range at `at`.
    fn advance(&mut self, at: &mut usize, behind: Vaddr) {
        match Range::new(behind, self.ranges[*at].end()) {
            Ok(rest) if !rest.is_empty() => self.ranges[*at] = rest,
            _ => *at += 1,
        }
    }
}

impl Default for BatchReader {
    fn default() -> Self {
        Self::new()
    }
}
