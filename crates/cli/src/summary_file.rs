//! Where the summary goes: a file that is rewritten whole, or something that takes one document after the other. Other
//! documents that are files are written by the same way.

use std::fs::{self, File, Metadata, OpenOptions};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kernel::{Pid, Pidfd};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use serde::Serialize;

/// For how long a reader that does not read is waited for: the command's signals wait meanwhile.
const PATIENCE: Duration = Duration::from_secs(1);
/// What a pipe that can be written takes without waiting (`PIPE_BUF`).
const AT_ONCE: usize = 4096;
/// Links that the kernel follows one after the other.
const LINKS: usize = 40;
/// Not held up by a pipe with nobody at its other end, and no terminal becomes ours.
pub(crate) const CAREFUL: i32 = OFlags::NONBLOCK.union(OFlags::NOCTTY).bits().cast_signed();

/// Where the summary goes, settled once: what the name leads to later is of no interest.
pub(crate) struct SummaryFile {
    name: PathBuf,
    target: Target,
}

enum Target {
    /// A regular file that is there or will be, under a name that is no link.
    File(PathBuf),
    /// A descriptor that this process was started with, a pipe, a terminal, a device.
    Stream(OwnedFd),
}

/// What a name leads to.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    /// The name of a file, which may not be there yet, in a folder without links.
    Named(PathBuf),
    /// An entry of /proc/PID/fd: no name, whatever it looks like.
    Descriptor(PathBuf),
}

impl SummaryFile {
    /// Makes sure that it can be written, before anything is started. What is there stays as it is.
    pub(crate) fn open(name: &Path) -> anyhow::Result<Self> {
        let target = target(name).with_context(|| format!("cannot write the summary {}", name.display()))?;
        Ok(Self { name: name.to_owned(), target })
    }

    /// Writes a document.
    pub(crate) fn write(&self, summary: &impl Serialize) -> anyhow::Result<()> {
        let mut text = serde_json::to_vec_pretty(summary).context("cannot write the summary as JSON")?;
        text.push(b'\n');
        let written = match &self.target {
            Target::File(path) => replace(path, &text),
            Target::Stream(stream) => write_patiently(stream, &text),
        };
        written.with_context(|| format!("cannot write the summary {}", self.name.display()))
    }
}

fn target(name: &Path) -> io::Result<Target> {
    let path = match resolve(name)? {
        Place::Descriptor(path) => return descriptor(&path).map(Target::Stream),
        Place::Named(path) => path,
    };
    let Ok(found) = fs::metadata(&path) else { return writable(&path).map(|()| Target::File(path)) };
    if let Some(own) = own_descriptor_of(&found) {
        return Ok(Target::Stream(own));
    }
    if found.is_file() {
        return writable(&path).map(|()| Target::File(path));
    }
    let stream = OpenOptions::new().write(true).custom_flags(CAREFUL).open(&path);
    let stream: OwnedFd = stream
        .map_err(|error| match found.file_type().is_fifo() {
            true => io::Error::new(error.kind(), format!("nobody reads it ({error})")),
            false => error,
        })?
        .into();
    // A full device says so now.
    write_patiently(&stream, b"{}\n")?;
    Ok(Target::Stream(stream))
}

/// Makes sure that a regular file can be written under this name, or under the one that a link leads to, and says which.
/// What is there stays as it is.
pub(crate) fn regular(name: &Path) -> io::Result<PathBuf> {
    let not_a_file = || io::Error::other("it is not a regular file");
    let Place::Named(path) = resolve(name)? else { return Err(not_a_file()) };
    if fs::metadata(&path).is_ok_and(|found| !found.is_file()) {
        return Err(not_a_file());
    }
    writable(&path).map(|()| path)
}

/// Follows links to where a file is or will be.
fn resolve(name: &Path) -> io::Result<Place> {
    let mut name = std::path::absolute(name)?;
    for _ in 0..LINKS {
        let (Some(folder), Some(last)) = (name.parent(), name.file_name()) else {
            return Err(io::ErrorKind::IsADirectory.into());
        };
        let path = fs::canonicalize(folder)?.join(last);
        if is_descriptor(&path) {
            return Ok(Place::Descriptor(path));
        }
        match fs::symlink_metadata(&path) {
            Ok(found) if found.is_symlink() => name = path.with_file_name(fs::read_link(&path)?),
            Ok(_) => return Ok(Place::Named(path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Place::Named(path)),
            Err(error) => return Err(error),
        }
    }
    Err(rustix::io::Errno::LOOP.into())
}

/// True for /proc/PID/fd/N and /proc/PID/task/TID/fd/N.
fn is_descriptor(path: &Path) -> bool {
    let numeric = path.file_name().is_some_and(|last| last.as_encoded_bytes().iter().all(u8::is_ascii_digit));
    path.starts_with("/proc") && numeric && path.parent().is_some_and(|folder| folder.ends_with("fd"))
}

/// The descriptor that an entry of /proc/PID/fd stands for. Its own offset and mode are those of whoever opened it, so it
/// is duplicated and not opened once more: what the command writes there is neither overwritten nor cut off.
fn descriptor(path: &Path) -> io::Result<OwnedFd> {
    let number = |word: Option<&std::ffi::OsStr>| word.and_then(|word| word.to_str()?.parse::<i32>().ok());
    let pid = number(path.iter().nth(2)).ok_or(io::ErrorKind::InvalidInput)?;
    let number = number(path.file_name()).ok_or(io::ErrorKind::InvalidInput)?;
    let duplicate = if pid == Pid::this().get() { own(number)? } else { duplicate(Pid(pid), number)? };
    if is_writable(&duplicate) { Ok(duplicate) } else { Err(io::Error::other("it is open for reading only")) }
}

fn own(number: i32) -> io::Result<OwnedFd> {
    match number {
        0 => io::stdin().as_fd().try_clone_to_owned(),
        1 => io::stdout().as_fd().try_clone_to_owned(),
        2 => io::stderr().as_fd().try_clone_to_owned(),
        _ => duplicate(Pid::this(), number),
    }
}

fn duplicate(pid: Pid, number: i32) -> io::Result<OwnedFd> {
    Pidfd::open(pid).and_then(|process| process.getfd(number)).map_err(|error| match error {
        kernel::PidfdError::GetFd { source, .. } | kernel::PidfdError::Open { source, .. } => source,
        other => io::Error::other(other),
    })
}

/// A descriptor that this process was started with and that writes to this very file, as after `--summary log > log`.
fn own_descriptor_of(file: &Metadata) -> Option<OwnedFd> {
    let others = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
    let others = others.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(|number| *number > 2);
    [1, 2, 0].into_iter().chain(others).filter_map(|number| own(number).ok()).find(|candidate| {
        let same = |other: Metadata| (other.dev(), other.ino()) == (file.dev(), file.ino());
        let found = candidate.try_clone().map(File::from).and_then(|file| file.metadata());
        found.is_ok_and(same) && is_writable(candidate)
    })
}

fn is_writable(descriptor: &OwnedFd) -> bool {
    rustix::fs::fcntl_getfl(descriptor).is_ok_and(|flags| flags.intersects(OFlags::WRONLY | OFlags::RDWR))
}

/// That a file can be replaced or, where its folder does not allow that, written.
fn writable(path: &Path) -> io::Result<()> {
    let made = Replacement::make(path);
    match made {
        Ok(new) => new.file_takes_bytes(),
        Err(error) => {
            OpenOptions::new().write(true).custom_flags(CAREFUL).open(path).map(|_| ()).map_err(|_neither| error)
        }
    }
}

/// Rewrites a file so that whoever reads it finds a whole document, the old or the new one.
pub(crate) fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let there = fs::symlink_metadata(path).ok();
    if there.as_ref().is_some_and(|found| !found.is_file()) {
        return Err(io::Error::other("something else has taken its place"));
    }
    let mut new = match (Replacement::make(path), &there) {
        (Ok(new), Some(old)) if old.nlink() == 1 && new.looks_like(old) => new,
        (Ok(new), None) => new,
        (Err(error), None) => return Err(error),
        // A second name, another owner, a folder that may not be written: the file itself.
        (_, Some(_)) => {
            let mut file = OpenOptions::new().write(true).custom_flags(CAREFUL).open(path)?;
            file.set_len(0)?;
            return file.write_all(text);
        }
    };
    new.file.write_all(text)?;
    new.put(path)
}

/// The new content of a file, under another name beside it until it is complete.
struct Replacement {
    file: File,
    path: PathBuf,
}

impl Replacement {
    fn make(path: &Path) -> io::Result<Self> {
        // Short, whatever the file's own name, and another one for each: runs in other PID namespaces have the same number.
        let mut hash = DefaultHasher::new();
        path.file_name().ok_or(io::ErrorKind::InvalidFilename)?.hash(&mut hash);
        let path = path.with_file_name(format!(".pagefold-{:016x}-{}", hash.finish(), std::process::id()));
        // Whatever a process of this number has left. In a folder that others can write, it is created or nothing is.
        let _ = fs::remove_file(&path);
        let file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        Ok(Self { file, path })
    }

    /// Gives it mode and owner of the file that it will replace. False if that is not permitted.
    fn looks_like(&self, old: &Metadata) -> bool {
        let owner = |found: &Metadata| (found.uid(), found.gid());
        let Ok(own) = self.file.metadata() else { return false };
        let chown = || std::os::unix::fs::fchown(&self.file, Some(old.uid()), Some(old.gid())).is_ok();
        (owner(&own) == owner(old) || chown())
            && self.file.set_permissions(fs::Permissions::from_mode(old.mode() & 0o7777)).is_ok()
    }

    fn file_takes_bytes(mut self) -> io::Result<()> {
        self.file.write_all(b"{}\n")
    }

    fn put(self, path: &Path) -> io::Result<()> {
        fs::rename(&self.path, path)
    }
}

impl Drop for Replacement {
    fn drop(&mut self) {
        // There no more once it has been put in its place.
        let _ = fs::remove_file(&self.path);
    }
}

/// Writes to what may have a reader, who may have left or be slow: the run goes on in any case.
fn write_patiently(stream: &OwnedFd, text: &[u8]) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut file = File::from(stream.try_clone()?);
    let mut left = text;
    while !left.is_empty() {
        let patience = deadline.saturating_duration_since(Instant::now());
        let limit = Timespec { tv_sec: patience.as_secs().cast_signed(), tv_nsec: patience.subsec_nanos().into() };
        if rustix::event::poll(&mut [PollFd::new(stream, PollFlags::OUT)], Some(&limit))? == 0 {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "nobody reads it"));
        }
        match file.write(&left[..left.len().min(AT_ONCE)]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => left = &left[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // Room, but not for all of it.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !patience.is_zero() => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("pagefold-summary-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(fs::canonicalize(path).unwrap())
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn links_are_followed_once_and_kept() {
        let folder = Folder::new("links");
        let (link, file) = (folder.0.join("link"), folder.0.join("sub/file"));
        fs::create_dir(folder.0.join("sub")).unwrap();
        std::os::unix::fs::symlink("sub/file", &link).unwrap();
        // Dangling at first: its target is made.
        let summary = SummaryFile::open(&link).unwrap();
        assert!(!file.exists(), "nothing is written before there is something to say");
        summary.write(&[1]).unwrap();
        summary.write(&[2]).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&file).unwrap(), "[\n  2\n]\n");
        assert_eq!(fs::read_dir(folder.0.join("sub")).unwrap().count(), 1);
        // A link that is put there later is not followed.
        fs::rename(&file, folder.0.join("other")).unwrap();
        std::os::unix::fs::symlink("../other", &file).unwrap();
        summary.write(&[3]).unwrap_err();
        assert_eq!(fs::read_to_string(folder.0.join("other")).unwrap(), "[\n  2\n]\n");
        std::os::unix::fs::symlink("loop", folder.0.join("loop")).unwrap();
        assert!(SummaryFile::open(&folder.0.join("loop")).is_err());
        assert!(SummaryFile::open(&folder.0.join("sub")).is_err());
    }

    /// Seen to fail: `File name too long`, since the name of the new content was longer.
    #[test]
    fn a_name_may_be_as_long_as_names_can_be() {
        let folder = Folder::new("long");
        let file = folder.0.join("x".repeat(255));
        SummaryFile::open(&file).unwrap().write(&[1]).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "[\n  1\n]\n");
        assert_eq!(fs::read_dir(&folder.0).unwrap().count(), 1, "nothing else is left");
    }

    #[test]
    fn mode_owner_and_second_names_stay() {
        let folder = Folder::new("mode");
        let file = folder.0.join("file");
        fs::write(&file, "old").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o604)).unwrap();
        let root = std::os::unix::fs::chown(&file, Some(12_345), None).is_ok();
        let summary = SummaryFile::open(&file).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), "old", "a command that is not started changes nothing");
        summary.write(&[1]).unwrap();
        let found = fs::metadata(&file).unwrap();
        assert_eq!(found.mode() & 0o7777, 0o604);
        assert!(!root || found.uid() == 12_345);
        fs::hard_link(&file, folder.0.join("second")).unwrap();
        summary.write(&[2]).unwrap();
        assert_eq!(fs::read_to_string(folder.0.join("second")).unwrap(), "[\n  2\n]\n");
    }

    #[test]
    fn a_pipe_without_a_reader_holds_nobody_up() {
        let folder = Folder::new("fifo");
        let fifo = folder.0.join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let error = SummaryFile::open(&fifo).err().unwrap();
        assert!(format!("{error:#}").contains("nobody reads it"), "{error:#}");
        let reader = OpenOptions::new().read(true).custom_flags(CAREFUL).open(&fifo).unwrap();
        let summary = SummaryFile::open(&fifo).unwrap();
        summary.write(&[1]).unwrap();
        // A reader that does not read, and then none.
        let begun = Instant::now();
        let failed = (0..100).any(|_| summary.write(&vec![7_u64; 1000]).is_err());
        assert!(failed && begun.elapsed() < Duration::from_secs(5));
        drop(reader);
        assert!(summary.write(&[1]).is_err());
        assert!(SummaryFile::open(Path::new("/dev/full")).is_err());
        SummaryFile::open(Path::new("/dev/null")).unwrap().write(&[1]).unwrap();
    }

    #[test]
    fn an_open_descriptor_is_written_through_whatever_names_it() {
        use std::os::fd::AsRawFd as _;
        let folder = Folder::new("descriptor");
        let path = folder.0.join("log");
        let mut log = File::create(&path).unwrap();
        log.write_all(b"before\n").unwrap();
        let link = folder.0.join("link");
        std::os::unix::fs::symlink(format!("/dev/fd/{}", log.as_raw_fd()), &link).unwrap();
        for name in [link.clone(), path.clone()] {
            SummaryFile::open(&name).unwrap().write(&[1]).unwrap();
            log.write_all(b"after\n").unwrap();
        }
        let one = "[\n  1\n]\nafter\n";
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("before\n{one}{one}"));
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        let reading = File::open("/dev/null").unwrap();
        assert!(SummaryFile::open(Path::new(&format!("/dev/fd/{}", reading.as_raw_fd()))).is_err());
        assert!(SummaryFile::open(Path::new("/dev/fd/9999")).is_err());
    }
}
