//! Files under /proc: read whole into a buffer that is reused, and the words and numbers in them.

use std::fs::File;
use std::io::{self, Read};

use thiserror::Error;

use crate::sys;
use crate::units::{Bytes, Pid};

/// What can go wrong with a file under /proc.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProcError {
    /// There is no such process or thread, or it has ended.
    #[error("process {pid} is gone")]
    Gone {
        /// The process.
        pid: Pid,
    },
    /// The file may not be read; most need ptrace rights on the process.
    #[error("not permitted to read /proc/{pid}/{file}")]
    Denied {
        /// The process.
        pid: Pid,
        /// The file in its directory.
        file: &'static str,
    },
    /// The file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file does not look as expected.
    #[error("cannot understand {path}: {line:?}")]
    Parse {
        /// The file.
        path: String,
        /// The line.
        line: String,
    },
    /// The kernel has no such interface.
    #[error("the kernel has no {interface}")]
    NotSupported {
        /// Which.
        interface: &'static str,
    },
}

impl ProcError {
    /// True if the process has ended: an outcome rather than an error to whoever walks over all processes.
    #[must_use]
    pub const fn is_gone(&self) -> bool {
        matches!(self, Self::Gone { .. })
    }

    /// Sorts an error from a file of a process.
    pub(crate) fn of(pid: Pid, file: &'static str, source: io::Error) -> Self {
        match sys::errno(&source) {
            libc::ENOENT | libc::ESRCH => Self::Gone { pid },
            libc::EACCES | libc::EPERM => Self::Denied { pid, file },
            _ => Self::Read { path: format!("/proc/{pid}/{file}"), source },
        }
    }
}

/// True if /proc shows this process under the number that it has itself. After `unshare --pid` without a new /proc it has
/// the numbers of another PID namespace, under which every file of it would be some other process's.
///
/// # Errors
/// What readlink(2) says, [`io::ErrorKind::NotFound`] if nothing is mounted.
pub fn shows_this_process() -> io::Result<bool> {
    Ok(std::fs::read_link("/proc/self")?.to_str() == Some(&Pid::this().to_string()))
}

/// Reads a file of a process into `buffer`, which is cleared.
pub(crate) fn read_into(pid: Pid, file: &'static str, buffer: &mut Vec<u8>) -> Result<(), ProcError> {
    buffer.clear();
    let result = File::open(format!("/proc/{pid}/{file}")).and_then(|mut open| open.read_to_end(buffer));
    result.map(|_| ()).map_err(|source| ProcError::of(pid, file, source))
}

/// Reads a file of the whole system.
pub(crate) fn read_system(path: &str) -> Result<Vec<u8>, ProcError> {
    std::fs::read(path).map_err(|source| ProcError::Read { path: path.to_owned(), source })
}

/// The lines of a file, without their ends.
pub(crate) fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty())
}

/// The words of a line.
pub(crate) fn words(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty())
}

/// A decimal number.
pub(crate) fn decimal(word: &[u8]) -> Option<u64> {
    number(word, 10)
}

/// A hexadecimal number without prefix.
pub(crate) fn hexadecimal(word: &[u8]) -> Option<u64> {
    number(word, 16)
}

fn number(word: &[u8], radix: u32) -> Option<u64> {
    if word.is_empty() {
        return None;
    }
    word.iter().try_fold(0_u64, |value, byte| {
        let digit = char::from(*byte).to_digit(radix)?;
        value.checked_mul(radix.into())?.checked_add(digit.into())
    })
}

/// Splits `Key:   value` at the colon.
pub(crate) fn field(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = line.iter().position(|byte| *byte == b':')?;
    Some((&line[..colon], line[colon + 1..].trim_ascii()))
}

/// The value of `123 kB`.
pub(crate) fn kib(value: &[u8]) -> Option<Bytes> {
    let mut words = words(value);
    let number = decimal(words.next()?)?;
    (words.next()? == b"kB").then(|| Bytes::from_kib(number))
}

/// A line for an error message.
pub(crate) fn text(line: &[u8]) -> String {
    String::from_utf8_lossy(line).into_owned()
}
