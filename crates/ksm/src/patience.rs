//! The lease's lock, and what is said while it is waited for.
use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

/// Changes take milliseconds; un-merging a host and a ksmd in the middle of a large batch take longer.
const SILENT: Duration = Duration::from_secs(1);

static TELL: OnceLock<fn(&Waits)> = OnceLock::new();

/// Has `tell` called, by a thread of its own, when the lease's lock has been waited for for a second. Once for a process.
pub fn tell_waits(tell: fn(&Waits)) {
    // A second one comes too late.
    let _ = TELL.set(tell);
}

/// The lease's lock is waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waits {
    /// The file that is locked.
    pub file: PathBuf,
    /// Who has locked it, its number and its command name; `None` if the kernel does not show it here.
    pub by: Option<(i32, String)>,
}

impl fmt::Display for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("waiting for ")?;
        match &self.by {
            Some((pid, command)) => write!(f, "{} ({pid})", command.escape_debug())?,
            None => f.write_str("somebody")?,
        }
        write!(f, ", who is at KSM's settings and has locked {}", self.file.display())
    }
}

/// Locks a file, however long that takes.
pub(crate) fn lock(file: &File, path: &Path) -> io::Result<()> {
    match file.try_lock() {
        Ok(()) => return Ok(()),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let Some(tell) = TELL.get() else { return file.lock() };
    let (locked, is_locked) = channel::<()>();
    thread::scope(|scope| {
        // Asking again and again instead would let everybody else go first. Where there is no room for a thread it is
        // silent.
        let _ = thread::Builder::new().spawn_scoped(scope, move || {
            if is_locked.recv_timeout(SILENT) == Err(RecvTimeoutError::Timeout) {
                tell(&Waits { file: path.to_owned(), by: holder(path) });
            }
        });
        let result = file.lock();
        drop(locked);
        result
    })
}

/// Who holds the lock of a file: /proc/locks names files by device and inode.
fn holder(path: &Path) -> Option<(i32, String)> {
    let file = fs::metadata(path).ok()?;
    let (major, minor) = (rustix::fs::major(file.dev()), rustix::fs::minor(file.dev()));
    let name = format!("{major:02x}:{minor:02x}:{}", file.ino());
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let pid = locks.lines().find_map(|line| {
        // "1: FLOCK  ADVISORY  WRITE 4711 00:1a:123 0 EOF"; those who wait have an arrow in front.
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        (words.get(1) == Some(&"FLOCK") && words.get(5) == Some(&name.as_str())).then(|| words[4].parse().ok())?
    })?;
    let command = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
    Some((pid, String::from_utf8_lossy(&command).trim_end().to_owned()))
}
