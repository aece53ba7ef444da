//! The kernel's tracepoints, through an instance of tracefs of one's own: a set of buffers that shares nothing with the
//! host's trace but the tracepoints themselves.
//!
//! Where tracefs is not mounted it is mounted for this process alone, at no place: nobody else sees it, and it goes with
//! the process. An instance stays when its process is killed, and its buffers and events with it. It is therefore locked
//! (flock) for as long as its process lives, in whatever PID namespace, and [`Tracefs::remove_dead`] removes those that
//! nobody locks.

mod format;
mod mount;
mod pipe;
mod ring;

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Dir, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use thiserror::Error;

use crate::units::{Bytes, Pid};

pub use format::{Field, Format};
pub use pipe::{Pipe, Record};
pub use ring::PageLayout;

/// What can go wrong with tracefs.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TraceError {
    /// No tracefs is mounted, and this process may not mount one, or the kernel has none.
    #[error("no tracefs: it is not mounted where this user may see it, and it cannot be mounted")]
    NoTracefs {
        /// What the kernel said.
        source: io::Error,
    },
    /// No instance could be made.
    #[error("cannot make an instance of tracefs")]
    Instance {
        /// What the kernel said: EACCES without root, EPERM under lockdown.
        source: io::Error,
    },
    /// A file could not be read.
    #[error("cannot read {path} of tracefs")]
    Read {
        /// The file, below the instance.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {value:?} to {path} of tracefs")]
    Write {
        /// The file, below the instance.
        path: String,
        /// The value.
        value: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A description of events is not understood.
    #[error("cannot understand {path} of tracefs")]
    Parse {
        /// The file, below the instance.
        path: String,
    },
}

impl TraceError {
    /// True if it is this user's rights, or the kernel's lack, and no failure.
    #[must_use]
    pub fn is_not_here(&self) -> bool {
        matches!(self, Self::NoTracefs { .. } | Self::Instance { .. })
    }

    /// True if the kernel has no such file.
    #[must_use]
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Read { source, .. } | Self::Write { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// How the names of our instances begin.
const PREFIX: &str = "pagefold-";
const INSTANCES: &str = "instances";

/// tracefs.
#[derive(Debug)]
pub struct Tracefs {
    root: OwnedFd,
}

impl Tracefs {
    /// Opens it where it is mounted, or else mounts it for this process alone.
    ///
    /// # Errors
    /// [`TraceError::NoTracefs`].
    pub fn open() -> Result<Self, TraceError> {
        mount::open().map(|root| Self { root }).map_err(|source| TraceError::NoTracefs { source })
    }

    /// Removes instances whose process has died without removing them, and returns their names.
    ///
    /// # Errors
    /// [`TraceError::Read`] if they cannot be listed. One that cannot be removed is left.
    pub fn remove_dead(&self) -> Result<Vec<String>, TraceError> {
        let failed = |source: Errno| TraceError::Read { path: INSTANCES.to_owned(), source: source.into() };
        let folder = rustix::fs::openat(&self.root, INSTANCES, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let mut removed = Vec::new();
        for entry in Dir::new(folder.map_err(failed)?).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name().to_string_lossy().into_owned();
            // Whoever holds the lock lives. One whose maker has not come to lock it looks again after he has.
            if !name.starts_with(PREFIX) {
                continue;
            }
            // Held until it is gone: its maker could come to lock it meanwhile.
            let held = self.lock(&name);
            if matches!(held, Ok(Some(_))) && self.remove(&name).is_ok() {
                removed.push(name);
            }
        }
        Ok(removed)
    }

    fn path(name: &str) -> String {
        format!("{INSTANCES}/{name}")
    }

    /// The directory of an instance, locked; `None` if somebody else has the lock.
    fn lock(&self, name: &str) -> Result<Option<OwnedFd>, Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(&self.root, Self::path(name), flags, Mode::empty())?;
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(folder)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn remove(&self, name: &str) -> Result<(), Errno> {
        rustix::fs::unlinkat(&self.root, Self::path(name), AtFlags::REMOVEDIR)
    }
}

/// An instance, removed when it is dropped. Its [`Pipe`]s and its marker must have been dropped before: an open file keeps it.
#[derive(Debug)]
pub struct Instance {
    tracefs: Tracefs,
    name: String,
    /// Its directory, and the lock that shows that its maker lives.
    folder: OwnedFd,
}

/// Instances of one process, and of processes of the same number in other namespaces.
const NAMES: u32 = 64;

impl Instance {
    /// Makes one, named after this process.
    ///
    /// # Errors
    /// [`TraceError::Instance`].
    pub fn create(tracefs: Tracefs) -> Result<Self, TraceError> {
        let mut last = Errno::EXIST;
        for number in 0..NAMES {
            let name = format!("{PREFIX}{}-{number}", Pid::this());
            match rustix::fs::mkdirat(&tracefs.root, Tracefs::path(&name), Mode::RWXU) {
                Ok(()) => {}
                Err(Errno::EXIST) => continue,
                Err(error) => return Err(TraceError::Instance { source: error.into() }),
            }
            match tracefs.lock(&name) {
                // Somebody who removes the dead may have come between, before there was a lock.
                Ok(Some(folder)) if is_there(&tracefs, &name, &folder) => return Ok(Self { tracefs, name, folder }),
                Ok(_) => {}
                Err(error) => last = error,
            }
        }
        Err(TraceError::Instance { source: last.into() })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    fn open(&self, path: &str, flags: OFlags) -> io::Result<File> {
        Ok(File::from(rustix::fs::openat(&self.folder, path, flags | OFlags::CLOEXEC, Mode::empty())?))
    }

    /// A file of it.
    ///
    /// # Errors
    /// [`TraceError::Read`].
    pub fn read(&self, path: &str) -> Result<Vec<u8>, TraceError> {
        let whole = |mut file: File| {
            // Some of these files have nothing more to say after the first read, however short that was.
            let mut text = vec![0; 1 << 16];
            let first = file.read(&mut text)?;
            text.truncate(first);
            file.read_to_end(&mut text)?;
            Ok(text)
        };
        self.open(path, OFlags::RDONLY)
            .and_then(whole)
            .map_err(|source| TraceError::Read { path: path.to_owned(), source })
    }

    /// Writes to a file of it.
    ///
    /// # Errors
    /// [`TraceError::Write`].
    pub fn write(&self, path: &str, value: &str) -> Result<(), TraceError> {
        self.open(path, OFlags::WRONLY | OFlags::TRUNC)
            .and_then(|mut file| file.write_all(value.as_bytes()))
            .map_err(|source| TraceError::Write { path: path.to_owned(), value: value.to_owned(), source })
    }

    /// How an event, e.g. `ksm/ksm_enter`, lies in a record.
    ///
    /// # Errors
    /// [`TraceError::Read`], also for an event that this kernel does not have; [`TraceError::Parse`].
    pub fn format(&self, event: &str) -> Result<Format, TraceError> {
        let path = format!("events/{event}/format");
        Format::parse(&self.read(&path)?).ok_or(TraceError::Parse { path })
    }

    /// A file to write marks into: each write becomes a record of the event `ftrace/print`.
    ///
    /// # Errors
    /// [`TraceError::Write`].
    pub fn marker(&self) -> Result<File, TraceError> {
        let path = "trace_marker";
        self.open(path, OFlags::WRONLY).map_err(|source| TraceError::Write {
            path: path.to_owned(),
            value: String::new(),
            source,
        })
    }

    /// The records of each CPU, to be read as they come.
    ///
    /// # Errors
    /// [`TraceError::Read`], [`TraceError::Parse`].
    pub fn pipes(&self) -> Result<Vec<Pipe>, TraceError> {
        let path = "events/header_page";
        let layout = PageLayout::parse(&self.read(path)?).ok_or_else(|| TraceError::Parse { path: path.to_owned() })?;
        let names = self.cpus()?;
        let pipes = names.into_iter().map(|name| {
            let path = format!("per_cpu/{name}/trace_pipe_raw");
            let file = self.open(&path, OFlags::RDONLY | OFlags::NONBLOCK);
            file.map(|file| Pipe::new(file, layout)).map_err(|source| TraceError::Read { path, source })
        });
        pipes.collect()
    }

    /// The buffers' size for each CPU.
    ///
    /// # Errors
    /// [`TraceError::Write`].
    pub fn set_buffer(&self, size: Bytes) -> Result<(), TraceError> {
        self.write("buffer_size_kb", &(size.get() / 1024).max(1).to_string())
    }

    /// Records that were lost so far because nobody read them in time.
    ///
    /// # Errors
    /// [`TraceError::Read`].
    pub fn lost(&self) -> Result<u64, TraceError> {
        let mut lost = 0;
        for name in self.cpus()? {
            let text = self.read(&format!("per_cpu/{name}/stats"))?;
            let fields = String::from_utf8_lossy(&text).into_owned();
            lost += fields
                .lines()
                .filter_map(|line| line.split_once(": "))
                .filter(|(key, _)| matches!(*key, "overrun" | "commit overrun" | "dropped events"))
                .filter_map(|(_, value)| value.trim().parse::<u64>().ok())
                .sum::<u64>();
        }
        Ok(lost)
    }

    /// The directories of the CPUs.
    fn cpus(&self) -> Result<Vec<String>, TraceError> {
        let failed = |source: Errno| TraceError::Read { path: "per_cpu".to_owned(), source: source.into() };
        let folder = rustix::fs::openat(&self.folder, "per_cpu", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        let mut names = Vec::new();
        for entry in Dir::new(folder.map_err(failed)?).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes()).to_string_lossy().into_owned();
            if name.strip_prefix("cpu").is_some_and(|number| number.parse::<u32>().is_ok()) {
                names.push(name);
            }
        }
        Ok(names)
    }
}

/// True if the directory that we have is still the one of that name.
fn is_there(tracefs: &Tracefs, name: &str, folder: &OwnedFd) -> bool {
    let named = rustix::fs::statat(&tracefs.root, Tracefs::path(name), AtFlags::SYMLINK_NOFOLLOW);
    let held = rustix::fs::fstat(folder);
    named.is_ok_and(|named| held.is_ok_and(|held| held.st_ino == named.st_ino))
}

/// How long an instance is waited for that a child still holds open, and between two looks.
const HELD: Duration = Duration::from_secs(1);
const LOOK: Duration = Duration::from_millis(5);

impl Drop for Instance {
    fn drop(&mut self) {
        // Another thread's child has copies of our open files until it executes its program, and the kernel does not
        // remove what is open. Events are switched off with it. What fails here is found by whoever removes the dead.
        let until = Instant::now() + HELD;
        while self.tracefs.remove(&self.name) == Err(Errno::BUSY) && Instant::now() < until {
            std::thread::sleep(LOOK);
        }
    }
}

#[cfg(test)]
mod tests;
