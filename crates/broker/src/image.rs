//! The agent's files: the image that this binary carries, and the table of system-call sites for this machine's libc.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use proof::table::FILE_NAME as SITES;
use rustix::fs::{FlockOperation, Mode, OFlags};

use crate::broker::BrokerHandle;
use crate::changed::{self, Read};
use crate::error::BrokerError;

/// A launcher has made and locked its folder within this time.
const MADE_BY_NOW: Duration = Duration::from_secs(60);

static IMAGE: &[u8] = include_bytes!(env!("PAGEFOLD_AGENT_IMAGE"));

/// The name of the agent's shared object where members load it from.
pub const AGENT: &str = "agent.so";

/// The agent's shared object.
#[must_use]
pub fn image_bytes() -> &'static [u8] {
    IMAGE
}

/// The agent's files in a folder of their own, removed when this value goes.
///
/// The folder is readable for everybody: members may run under another user. What it holds is no secret.
#[derive(Debug)]
pub struct AgentFiles {
    folder: PathBuf,
    /// The folder, locked for as long as this process lives: who finds it unlocked knows that it was left behind.
    _held: OwnedFd,
}

impl AgentFiles {
    /// Writes the files, under the first of `XDG_RUNTIME_DIR`, `/run`, `TMPDIR`, `/tmp` where that works and code may
    /// be executed. What the loader could not find under its name is passed over.
    ///
    /// # Errors
    /// [`BrokerError::Sites`] if this machine's libc is not understood, [`BrokerError::Agent`] if no folder can be had.
    pub fn write() -> Result<Self, BrokerError> {
        let objects = host_objects()?;
        let sites =
            changed::table_with_pages(&objects).map_err(|error| BrokerError::Sites { reason: error.to_string() })?;
        let bases = ["XDG_RUNTIME_DIR", "TMPDIR"].map(|name| std::env::var_os(name).map(PathBuf::from));
        let [runtime, temporary] = bases;
        let candidates = [runtime, Some("/run".into()), temporary, Some("/tmp".into())];
        Self::write_below_first(candidates.into_iter().flatten(), &sites)
    }

    /// Under the first base where that works; else what is wrong with each of them.
    fn write_below_first(bases: impl Iterator<Item = PathBuf>, sites: &[u8]) -> Result<Self, BrokerError> {
        let mut failure: Option<(PathBuf, String)> = None;
        for base in bases {
            let (path, source) = match Self::write_below(&base, sites) {
                Ok(files) => return Ok(files),
                Err(BrokerError::Agent { path, source }) => (path, source),
                Err(error) => return Err(error),
            };
            match &mut failure {
                None => failure = Some((path, source.to_string())),
                Some((_, reasons)) => reasons.push_str(&format!("; to {}: {source}", path.display())),
            }
        }
        let (path, reasons) = failure.expect("two candidates are always tried");
        Err(BrokerError::Agent { path, source: std::io::Error::other(reasons) })
    }

    fn write_below(base: &Path, sites: &[u8]) -> Result<Self, BrokerError> {
        let mut suffix = [0_u8; 8];
        let _ = rustix::rand::getrandom(&mut suffix, rustix::rand::GetRandomFlags::empty())
            .map_err(|errno| BrokerError::Secret(errno.into()))?;
        let folder = base.join(format!("pagefold-{:016x}", u64::from_le_bytes(suffix)));
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source| BrokerError::Agent { path, source }
        };
        if !can_be_preloaded(base) {
            let reason = "LD_PRELOAD cannot name what lies there (it is relative, or has a space, ':' or '$')";
            return Err(fail(base)(std::io::Error::other(reason)));
        }
        if forbids_execution(base) {
            return Err(fail(base)(std::io::Error::other("the file system is mounted noexec")));
        }
        remove_left_behind(base);
        fs::DirBuilder::new().mode(0o755).create(&folder).map_err(fail(&folder))?;
        // Whatever the launcher's umask: members can be of another user.
        let readable = fs::set_permissions(&folder, fs::Permissions::from_mode(0o755));
        let held = match readable.and_then(|()| lock(&folder)) {
            Ok(held) => held,
            Err(error) => {
                let _ = fs::remove_dir(&folder);
                return Err(fail(&folder)(error));
            }
        };
        let files = Self { folder, _held: held };
        for (path, content) in [(files.image(), IMAGE), (files.sites(), sites)] {
            let mut file = fs::OpenOptions::new();
            let mut file = file.write(true).create_new(true).mode(0o444).open(&path).map_err(fail(&path))?;
            file.write_all(content).map_err(fail(&path))?;
            file.set_permissions(fs::Permissions::from_mode(0o444)).map_err(fail(&path))?;
        }
        Ok(files)
    }

    /// The shared object for LD_PRELOAD.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.folder.join(AGENT)
    }

    /// Leaves the files where they are: processes that go on after the launcher still name them in their environment,
    /// and whatever they execute would otherwise hear the loader complain.
    pub fn leave(self) {
        let _kept = std::mem::ManuallyDrop::new(self);
    }

    /// The value of the environment variable `PAGEFOLD_AGENT` that leads an agent to a broker. `all`: the broker chooses
    /// what is managed.
    #[must_use]
    pub fn variable(&self, broker: &BrokerHandle, all: bool) -> String {
        let (token, scope) = (broker.token(), if all { "all:" } else { "" });
        format!("{}:{:016x}{:016x}:{scope}{}", broker.name(), token.0, token.1, self.sites().display())
    }

    /// The table of system-call sites.
    #[must_use]
    pub fn sites(&self) -> PathBuf {
        self.folder.join(SITES)
    }
}

impl Drop for AgentFiles {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn lock(folder: &Path) -> std::io::Result<OwnedFd> {
    let held = rustix::fs::open(folder, OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    rustix::fs::flock(&held, FlockOperation::NonBlockingLockExclusive)?;
    Ok(held)
}

/// Removes folders of launchers that were killed: this user's, of nobody who lives, and named by no process that goes
/// on without its launcher and would hear the loader complain.
fn remove_left_behind(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else { return };
    for folder in entries.filter_map(Result::ok).map(|entry| entry.path()) {
        let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let ours = name.strip_prefix("pagefold-").is_some_and(|hex| u64::from_str_radix(hex, 16).is_ok());
        let Ok(found) = fs::symlink_metadata(&folder) else { continue };
        // One that is being made is not locked yet.
        let old = found.modified().is_ok_and(|then| then.elapsed().is_ok_and(|age| age > MADE_BY_NOW));
        if !ours || !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() || !old {
            continue;
        }
        let Ok(held) = lock(&folder) else { continue };
        if named_by_a_process(&folder) {
            continue;
        }
        for file in [AGENT, SITES] {
            let _ = rustix::fs::unlinkat(&held, file, rustix::fs::AtFlags::empty());
        }
        // If it holds anything else it is not ours after all.
        let _ = fs::remove_dir(&folder);
    }
}

fn named_by_a_process(folder: &Path) -> bool {
    let name = folder.as_os_str().as_encoded_bytes();
    let Ok(processes) = fs::read_dir("/proc") else { return true };
    processes.filter_map(Result::ok).any(|process| {
        fs::read(process.path().join("environ"))
            .is_ok_and(|variables| variables.windows(name.len()).any(|window| window == name))
    })
}

/// Spaces and colons divide LD_PRELOAD, `$ORIGIN` and its like are replaced in it, and a relative name means something else
/// in another folder: processes would run without the agent and complain.
fn can_be_preloaded(base: &Path) -> bool {
    base.is_absolute() && !base.as_os_str().as_encoded_bytes().iter().any(|byte| b" \t\n:$".contains(byte))
}

fn forbids_execution(base: &Path) -> bool {
    rustix::fs::statvfs(base).is_ok_and(|about| about.f_flag.contains(rustix::fs::StatVfsMountFlags::NOEXEC))
}

/// The table of sites for the libc and the loader that this process itself runs with.
///
/// # Errors
/// [`BrokerError::Sites`].
pub fn host_sites() -> Result<Vec<u8>, BrokerError> {
    let objects = host_objects()?;
    Ok(proof::encode(objects.iter().map(|(sites, _)| sites)))
}

/// That libc and that loader: their sites, and what is in their files.
pub(crate) fn host_objects() -> Result<Vec<Read>, BrokerError> {
    let reason = |reason: String| BrokerError::Sites { reason };
    let maps = kernel::maps::read(kernel::Pid::this()).map_err(|error| reason(error.to_string()))?;
    let mut objects = Vec::new();
    let mut seen = HashSet::new();
    // Where libc's text has been patched, each patched piece is a mapping of its own.
    let files = maps.iter().filter(|vma| vma.exec && vma.inode != 0);
    for path in files.filter(|vma| seen.insert((vma.dev_major, vma.dev_minor, vma.inode))).map(|vma| vma.name.clone()) {
        let path = PathBuf::from(path);
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let libc = name.starts_with("libc.so") || name.starts_with("libc-");
        if !libc && !name.starts_with("ld-linux") && !name.starts_with("ld-2.") {
            continue;
        }
        let file = fs::read(&path).map_err(|error| reason(format!("{}: {error}", path.display())))?;
        let sites = proof::sites(&file).map_err(|error| reason(format!("{}: {error}", path.display())))?;
        if libc && let Err(reasons) = proof::verdict(&sites) {
            return Err(reason(format!("{}: {}", path.display(), reasons.join("; "))));
        }
        objects.push((sites, file));
    }
    if objects.len() != 2 {
        return Err(reason(format!(
            "{} of libc and the loader found in this process; a statically linked pagefold cannot read them off",
            objects.len()
        )));
    }
    Ok(objects)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::time::SystemTime;

    /// Seen to fail: the first of these was taken, whatever its name.
    #[test]
    fn folders_that_the_loader_cannot_name_are_passed_over() {
        let base = std::env::temp_dir().join(format!("pagefold-image-names-{}", std::process::id()));
        let bad = ["a b", "a:b", "$ORIGIN"].map(|name| base.join(name));
        let good = base.join("good");
        for folder in bad.iter().chain([&good]) {
            fs::create_dir_all(folder).unwrap();
        }
        let relative = Some(PathBuf::from("."));
        let bases = bad.iter().cloned().chain(relative).chain([good.clone()]);
        let files = AgentFiles::write_below_first(bases, b"").unwrap();
        assert!(files.image().starts_with(&good) && files.image().exists());
        drop(files);
        let missing = base.join("missing");
        let bases = [bad[0].clone(), missing.clone()].into_iter();
        let error = AgentFiles::write_below_first(bases, b"").unwrap_err();
        let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
        assert!(text.contains("a b: LD_PRELOAD cannot name") && text.contains(missing.to_str().unwrap()), "{text}");
        fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn what_a_killed_launcher_left_is_removed_and_nothing_else() {
        let base = std::env::temp_dir().join(format!("pagefold-image-{}", std::process::id()));
        let make = |name: &str, minutes: u64| {
            let folder = base.join(name);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("sites"), "").unwrap();
            let then = SystemTime::now() - Duration::from_secs(60 * minutes);
            fs::File::open(&folder).unwrap().set_modified(then).unwrap();
            folder
        };
        let left = make("pagefold-00000000000000aa", 5);
        let new = make("pagefold-00000000000000ab", 0);
        let held = make("pagefold-00000000000000ac", 5);
        let lock = lock(&held).unwrap();
        let named = make("pagefold-00000000000000ad", 5);
        let mut survivor =
            std::process::Command::new("sleep").arg("60").env("LD_PRELOAD", named.join("agent.so")).spawn().unwrap();
        let other = make("pagefold-notes", 5);
        let full = make("pagefold-00000000000000ae", 5);
        fs::write(full.join("notes"), "").unwrap();
        fs::File::open(&full).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        let link = base.join("pagefold-00000000000000af");
        std::os::unix::fs::symlink(&other, &link).unwrap();
        remove_left_behind(&base);
        assert!(!left.exists());
        for kept in [&new, &held, &named, &other, &link] {
            assert!(kept.join("sites").exists(), "{}", kept.display());
        }
        assert!(full.join("notes").exists());
        survivor.kill().unwrap();
        survivor.wait().unwrap();
        drop(lock);
        // A process that another test has just forked has a copy of the lock until it executes something.
        for _ in 0..500 {
            remove_left_behind(&base);
            if !held.exists() && !named.exists() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(!held.exists() && !named.exists());
        fs::remove_dir_all(base).unwrap();
    }
}
