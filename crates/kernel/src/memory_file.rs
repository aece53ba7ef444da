//! The memory of another process through /proc/PID/mem: reads that never wait for anybody.
//!
//! process_vm_readv waits where a page is missing and a userfaultfd is to bring it: for ever, if whoever should is dead
//! or does not want to. A read of this file fails there at once (the kernel asks for the page without permission to
//! wait). And an open file stays with the address space that it was opened for: after an exec, or when the number has
//! been given to another process, it reads nothing instead of somebody else's memory.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;

use crate::procfs::ProcError;
use crate::remote::{ReadOutcome, RemoteError};
use crate::units::{Bytes, Pid, Range, Vaddr, page_size};

/// An address space, open for reading.
#[derive(Debug)]
pub struct MemoryFile {
    file: OwnedFd,
    pid: Pid,
}

impl MemoryFile {
    /// Opens the address space in which a process runs now.
    ///
    /// # Errors
    /// [`ProcError::Gone`], [`ProcError::Denied`] without ptrace rights.
    pub fn open(pid: Pid) -> Result<Self, ProcError> {
        let file =
            File::open(format!("/proc/{}/mem", pid.get())).map_err(|source| ProcError::of(pid, "mem", source))?;
        Ok(Self { file: file.into(), pid })
    }

    /// Takes a descriptor that [`MemoryFile::open`] made in another process of ours.
    #[must_use]
    pub fn from_owned_fd(file: OwnedFd, pid: Pid) -> Self {
        Self { file, pid }
    }

    /// Reads `buffer.len()` bytes from an address on. Stops at the first page that is not there or that a userfaultfd
    /// holds back; an address space that is no more is [`ReadOutcome::Gone`].
    ///
    /// # Errors
    /// [`RemoteError::Access`].
    pub fn read(&self, start: Vaddr, buffer: &mut [u8]) -> Result<ReadOutcome, RemoteError> {
        let mut done = 0;
        while done < buffer.len() {
            let Some(at) = start.get().checked_add(done as u64) else { break };
            match rustix::io::pread(&self.file, &mut buffer[done..], at) {
                Ok(0) if done == 0 => return Ok(ReadOutcome::Gone),
                Ok(0) | Err(Errno::IO | Errno::FAULT) => break,
                Ok(read) => done += read,
                Err(Errno::INTR) => {}
                Err(Errno::SRCH) => return Ok(ReadOutcome::Gone),
                Err(source) => {
                    let range = Range::covering(start, start).unwrap_or_default();
                    return Err(RemoteError::Access { pid: self.pid, range, source: source.into() });
                }
            }
        }
        let read = Bytes(done as u64);
        Ok(if done == buffer.len() { ReadOutcome::Complete { read } } else { ReadOutcome::Partial { read } })
    }

    /// Reads the pages of `ranges` through `buffer`, which holds one page at least, and shows `visit` each piece with its
    /// place, in order. Pages that cannot be read are left out. False if the address space is gone.
    pub fn read_each(&self, ranges: &[Range], buffer: &mut [u8], mut visit: impl FnMut(Range, &[u8])) -> bool {
        let room = Bytes(buffer.len() as u64);
        for piece in ranges.iter().flat_map(|range| range.pieces(room)) {
            let mut rest = piece;
            while !rest.is_empty() {
                let room = &mut buffer[..rest.len().get() as usize];
                let Ok(outcome) = self.read(rest.start(), room) else { break };
                if outcome == ReadOutcome::Gone {
                    return false;
                }
                let read = outcome.bytes().pages().bytes();
                let end = rest.start() + read;
                if let Ok(got) = Range::new(rest.start(), end) {
                    visit(got, &buffer[..read.get() as usize]);
                }
                // Behind the page that could not be read.
                let behind = if read == rest.len() { rest.end() } else { end + Bytes(page_size()) };
                match Range::new(behind, piece.end()) {
                    Ok(next) => rest = next,
                    Err(_) => break,
                }
            }
        }
        true
    }
}

impl AsFd for MemoryFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
