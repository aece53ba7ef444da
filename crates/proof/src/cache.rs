//! Facts about files, kept in a folder that only its owner can write to.
//!
//! One file for each object, named by device and inode. It holds what the object was when it was decoded (length, times
//! of its last changes, build-id) and the version of the rules; if any of it is different now, the entry is void. It is
//! written beside and renamed, so that a reader sees all of it or nothing. A check sum keeps what a crash or a bad disk
//! has left from being believed.
//!
//! An entry makes code trusted, so nobody else may write one: the folder and each file must be the calling user's own and
//! not writable by others, or they are not used.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use object::Endianness;
use object::elf::{self, FileHeader64};
use object::read::elf::{FileHeader, ProgramHeader};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use twox_hash::XxHash3_64;

use crate::object::{Facts, VERSION, hexadecimal};

/// Folders of it below the base, each the owner's alone.
const FOLDERS: [&str; 2] = ["pagefold", "proof"];
/// Where root keeps it; the second if the first cannot be written to.
const OF_ROOT: [&str; 2] = ["/var/cache", "/run"];
/// No entry is longer than this.
const LONGEST: u64 = 1 << 20;
/// With so many entries the oldest are removed: those of files that are long gone.
const MOST: usize = 16_384;
/// The head of a file, which has its program headers and nearly always its notes.
const HEAD: usize = 4096;
/// A file that was changed within the granularity of its times could be changed again without their telling.
const SETTLED_NS: i128 = 100_000_000;

/// Why there is no cache. Everything is decoded anew then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// Neither `XDG_CACHE_HOME` nor `HOME` names a folder.
    #[error("there is no home for a cache")]
    NoHome,
    /// The folder cannot be made or opened.
    #[error("cannot use {}", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// Somebody else could write entries.
    #[error("{} belongs to another user or can be written to by others", path.display())]
    Foreign {
        /// The folder.
        path: PathBuf,
    },
}

/// A folder of facts.
#[derive(Debug)]
pub struct Cache {
    folder: File,
    /// Whose it is.
    user: u32,
    /// Nobody has looked yet whether there are too many entries.
    is_untidy: AtomicBool,
}

/// What a file was when its facts were found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    version: u32,
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
    build_id: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    identity: Identity,
    facts: Facts,
}

impl Cache {
    /// The calling user's cache, which is made if it is missing.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn of_user() -> Result<Self, CacheError> {
        if rustix::process::geteuid().is_root() {
            let [first, second] = OF_ROOT.map(Path::new);
            return Self::below(first).or_else(|error| match error {
                // What somebody has prepared is not passed over in silence.
                CacheError::Foreign { .. } => Err(error),
                _ => Self::below(second),
            });
        }
        let absolute = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        Self::below(&base.ok_or(CacheError::NoHome)?)
    }

    /// A cache below this folder.
    ///
    /// # Errors
    /// [`CacheError`].
    pub fn below(base: &Path) -> Result<Self, CacheError> {
        let mut path = base.to_owned();
        let user = rustix::process::geteuid().as_raw();
        let fail = |path: &Path, errno: Errno| CacheError::Folder { path: path.to_owned(), source: errno.into() };
        // The base is found by its name, whatever leads there; what is below it is ours.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        if rustix::fs::access(&path, rustix::fs::Access::EXISTS).is_err() {
            // ~/.cache is made by whoever needs it first.
            let _ = rustix::fs::mkdir(&path, Mode::RWXU);
        }
        let mut folder = rustix::fs::open(&path, flags, Mode::empty()).map_err(|errno| fail(&path, errno))?;
        for name in FOLDERS {
            path.push(name);
            match rustix::fs::mkdirat(&folder, name, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(errno) => return Err(fail(&path, errno)),
            }
            folder = rustix::fs::openat(&folder, name, flags | OFlags::NOFOLLOW, Mode::empty())
                .map_err(|errno| fail(&path, errno))?;
            let about = rustix::fs::fstat(&folder).map_err(|errno| fail(&path, errno))?;
            if !is_own(user, about.st_uid, about.st_mode) {
                return Err(CacheError::Foreign { path });
            }
        }
        Ok(Self { folder: folder.into(), user, is_untidy: AtomicBool::new(true) })
    }

    /// The facts about an open file, if they were kept and it is still what it was.
    #[must_use]
    pub fn get(&self, file: &File) -> Option<Facts> {
        let identity = Identity::of(file)?;
        let name = entry_name(identity.device, identity.inode);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let kept = File::from(rustix::fs::openat(&self.folder, &name, flags, Mode::empty()).ok()?);
        let own = kept.metadata().ok()?;
        if !own.is_file() || !is_own(self.user, own.uid(), own.mode()) || own.nlink() != 1 || own.len() > LONGEST {
            return None;
        }
        let mut bytes = vec![0; usize::try_from(own.len()).ok()?];
        kept.read_exact_at(&mut bytes, 0).ok()?;
        let entry = unpack(&bytes)?;
        (entry.identity == identity).then_some(entry.facts)
    }

    /// Decodes a file and keeps what was found, if the file was at rest meanwhile.
    #[must_use]
    pub fn decode(&self, file: &File) -> Facts {
        let before = Identity::of(file);
        let facts = Facts::of(file);
        if let Some(identity) =
            before.filter(|before| before.is_settled() && Identity::of(file).as_ref() == Some(before))
            && facts.build_id == identity.build_id
        {
            // A cache that is full or read-only costs time, and nothing else.
            let _ = self.put(Entry { identity, facts: facts.clone() });
        }
        facts
    }

    fn put(&self, entry: Entry) -> std::io::Result<()> {
        let name = entry_name(entry.identity.device, entry.identity.inode);
        let bytes = pack(&entry)?;
        // Two writers never share this name, and nobody else can take it.
        static WRITTEN: AtomicU64 = AtomicU64::new(0);
        let count = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let beside = format!(".{name}.{}.{count}.{now:x}", std::process::id());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(&self.folder, &beside, flags, Mode::RUSR | Mode::WUSR)?);
        let written =
            file.write_all(&bytes).and_then(|()| Ok(rustix::fs::renameat(&self.folder, &beside, &self.folder, &name)?));
        if written.is_err() {
            let _ = rustix::fs::unlinkat(&self.folder, &beside, AtFlags::empty());
        }
        if self.is_untidy.swap(false, Ordering::Relaxed) {
            self.tidy();
        }
        written
    }

    /// Removes the older half of the entries when there are too many, and what a killed writer has left.
    fn tidy(&self) {
        let Ok(entries) = rustix::fs::Dir::read_from(&self.folder) else { return };
        let names = entries.filter_map(Result::ok).map(|entry| entry.file_name().to_owned());
        let names: Vec<_> = names.filter(|name| !matches!(name.to_bytes(), b"." | b"..")).collect();
        if names.len() <= MOST {
            return;
        }
        let stat = |name: &std::ffi::CString| rustix::fs::statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW);
        let mut aged: Vec<_> = names.into_iter().filter_map(|name| Some((stat(&name).ok()?.st_mtime, name))).collect();
        aged.sort_unstable();
        for (_, name) in aged.iter().take(aged.len() / 2) {
            let _ = rustix::fs::unlinkat(&self.folder, name, AtFlags::empty());
        }
    }
}

impl Identity {
    fn of(file: &File) -> Option<Self> {
        let about = file.metadata().ok()?;
        about.is_file().then(|| Self {
            version: VERSION,
            device: about.dev(),
            inode: about.ino(),
            length: about.len(),
            modified: (about.mtime(), about.mtime_nsec()),
            changed: (about.ctime(), about.ctime_nsec()),
            build_id: build_id(file),
        })
    }

    /// Was the last change long enough ago that another one would show?
    fn is_settled(&self) -> bool {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let changed = i128::from(self.changed.0) * 1_000_000_000 + i128::from(self.changed.1);
        i128::try_from(now).is_ok_and(|now| now - changed > SETTLED_NS)
    }
}

/// Is it this user's, and can nobody else write to it?
fn is_own(user: u32, uid: u32, mode: u32) -> bool {
    uid == user && mode & 0o022 == 0
}

fn entry_name(device: u64, inode: u64) -> String {
    format!("{device:x}-{inode:x}")
}

fn pack(entry: &Entry) -> std::io::Result<Vec<u8>> {
    let body = serde_json::to_vec(entry)?;
    let mut bytes = format!("{:016x}\n", XxHash3_64::oneshot(&body)).into_bytes();
    bytes.extend(body);
    Ok(bytes)
}

fn unpack(bytes: &[u8]) -> Option<Entry> {
    let (sum, body) = bytes.split_at_checked(17)?;
    let sum = std::str::from_utf8(sum.strip_suffix(b"\n")?).ok()?;
    (u64::from_str_radix(sum, 16).ok()? == XxHash3_64::oneshot(body)).then(|| serde_json::from_slice(body).ok())?
}

/// The build-id, read in one call where it lies in the head of the file. An entry is looked up seventy times for one
/// process, so this has to be quick.
fn build_id(file: &File) -> Option<String> {
    let mut head = [0_u8; HEAD];
    let length = file.read_at(&mut head, 0).ok()?;
    let head = head.get(..length)?;
    let header = FileHeader64::<Endianness>::parse(head).ok()?;
    let endian = header.endian().ok()?;
    for segment in header.program_headers(endian, head).ok()? {
        if segment.p_type(endian) != elf::PT_NOTE {
            continue;
        }
        let (offset, size) = segment.file_range(endian);
        let mut elsewhere = Vec::new();
        let bytes = match usize::try_from(offset).ok().zip(usize::try_from(size).ok()) {
            Some((offset, size)) if offset.saturating_add(size) <= head.len() => head.get(offset..offset + size)?,
            Some((_, size)) if size <= HEAD => {
                elsewhere.resize(size, 0);
                file.read_exact_at(&mut elsewhere, offset).ok()?;
                &elsewhere
            }
            _ => continue,
        };
        let mut notes =
            object::read::elf::NoteIterator::<FileHeader64<Endianness>>::new(endian, segment.p_align(endian), bytes)
                .ok()?;
        while let Ok(Some(note)) = notes.next() {
            if note.name() == elf::ELF_NOTE_GNU && note.n_type(endian) == elf::NT_GNU_BUILD_ID {
                return Some(hexadecimal(note.desc()));
            }
        }
    }
    None
}

#[cfg(test)]
#[path = "cache/tests.rs"]
mod tests;
