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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::test_memory::{Anonymous, ForkedChild, as_nobody, started_by_a_test};
    use crate::units::PageCount;

    #[test]
    fn ranges_are_read_one_behind_the_other_and_holes_are_jumped_over() {
        let memory = Anonymous::new(PageCount(8));
        for page in 0..8 {
            memory.write(page * page_size(), page as u8 + 1);
        }
        memory.protect_none(3);
        let child = ForkedChild::start();
        let both = [memory.page(6), memory.page(1)];
        let mut buffer = vec![0; 2 * page_size() as usize];
        let all = ReadOutcome::Complete { read: PageCount(2).bytes() };
        assert_eq!(read_ranges(child.pid(), &both, &mut buffer).unwrap(), all);
        assert_eq!((buffer[0], buffer[page_size() as usize]), (7, 2));
        let partly = read_ranges(child.pid(), &[memory.page(2), memory.page(3)], &mut buffer).unwrap();
        assert_eq!(partly, ReadOutcome::Partial { read: PageCount(1).bytes() });
        for capacity in [1, 3, 8, 100] {
            let mut seen = Vec::new();
            let mut reader = BatchReader::with_capacity(PageCount(capacity).bytes());
            let totals = reader
                .read(child.pid(), &[memory.range(), memory.page(0)], |range, bytes| {
                    assert_eq!(range.len().0, bytes.len() as u64);
                    for (index, address) in range.page_addresses().enumerate() {
                        seen.push((address, bytes[index * page_size() as usize]));
                    }
                })
                .unwrap();
            assert_eq!((totals.read, totals.missing), (PageCount(8).bytes(), PageCount(1).bytes()));
            assert!(!totals.gone);
            let expected: Vec<_> =
                [0, 1, 2, 4, 5, 6, 7, 0].map(|page| (memory.page(page).start(), page as u8 + 1)).into();
            assert_eq!(seen, expected, "with room for {capacity} pages");
        }
        let short = read_ranges(child.pid(), &[memory.range()], &mut buffer);
        assert!(matches!(short, Err(RemoteError::Buffer { .. })));
    }

    #[test]
    fn what_is_written_lands_in_the_other_process_only() {
        let memory = Anonymous::new(PageCount(2));
        memory.fill(1);
        let child = ForkedChild::start();
        let outcome = write(child.pid(), memory.range().start() + Bytes(7), &[5, 6]).unwrap();
        assert_eq!(outcome, ReadOutcome::Complete { read: Bytes(2) });
        let mut back = [0; 2];
        read(child.pid(), memory.range().start() + Bytes(7), &mut back).unwrap();
        assert_eq!((back, memory.read(7)), ([5, 6], 0));
        assert!(matches!(write(Pid::this(), memory.range().start(), &[1]), Err(RemoteError::Own { .. })));
    }

    #[test]
    fn more_ranges_than_one_call_takes() {
        let memory = Anonymous::new(PageCount(3000));
        memory.fill(4);
        let child = ForkedChild::start();
        let scattered: Vec<_> = (0..3000).step_by(2).map(|page| memory.page(page)).collect();
        let mut buffer = vec![0; 1500 * page_size() as usize];
        let outcome = read_ranges(child.pid(), &scattered, &mut buffer).unwrap();
        assert_eq!(outcome, ReadOutcome::Complete { read: PageCount(1500).bytes() });
        assert!(buffer.iter().step_by(page_size() as usize).all(|byte| *byte == 4));
    }

    #[test]
    fn a_process_that_has_ended_is_gone() {
        let memory = Anonymous::new(PageCount(1));
        let child = ForkedChild::start();
        let pid = child.pid();
        drop(child);
        let mut buffer = vec![0; page_size() as usize];
        assert_eq!(read_ranges(pid, &[memory.range()], &mut buffer).unwrap(), ReadOutcome::Gone);
        assert!(BatchReader::new().read(pid, &[memory.range()], |_, _| panic!("nothing")).unwrap().gone);
    }

    #[test]
    fn another_users_memory_is_refused() {
        if !as_nobody("remote::tests::body_as_another_user") {
            println!("skipped: root, or a test binary that everybody may execute");
        }
    }

    #[test]
    #[ignore = "runs as another user, started by the test above"]
    fn body_as_another_user() {
        if !started_by_a_test() {
            return;
        }
        let memory = Anonymous::new(PageCount(1));
        let mut buffer = vec![0; page_size() as usize];
        let refused = read_ranges(Pid(1), &[memory.range()], &mut buffer);
        assert!(matches!(refused, Err(RemoteError::Denied { pid: Pid(1) })));
    }
}
