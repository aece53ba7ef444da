//! The agent's files: the image that this binary carries, and the table of system-call sites for this machine's libc.

use std::collections::HashSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::BrokerError;

static IMAGE: &[u8] = include_bytes!(env!("PAGEFOLD_AGENT_IMAGE"));

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
}

impl AgentFiles {
    /// Writes the files, under the first of `XDG_RUNTIME_DIR`, `/run`, `TMPDIR`, `/tmp` where that works and code may
    /// be executed.
    ///
    /// # Errors
    /// [`BrokerError::Sites`] if this machine's libc is not understood, [`BrokerError::Agent`] if no folder can be had.
    pub fn write() -> Result<Self, BrokerError> {
        let sites = host_sites()?;
        let bases = ["XDG_RUNTIME_DIR", "TMPDIR"].map(|name| std::env::var_os(name).map(PathBuf::from));
        let [runtime, temporary] = bases;
        let candidates = [runtime, Some("/run".into()), temporary, Some("/tmp".into())];
        let mut failure = None;
        for base in candidates.into_iter().flatten() {
            match Self::write_below(&base, &sites) {
                Ok(files) => return Ok(files),
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.expect("two candidates are always tried"))
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
        if forbids_execution(base) {
            return Err(fail(base)(std::io::Error::other("the file system is mounted noexec")));
        }
        fs::DirBuilder::new().mode(0o755).create(&folder).map_err(fail(&folder))?;
        let files = Self { folder };
        for (path, content) in [(files.image(), IMAGE), (files.sites(), sites)] {
            let mut file = fs::OpenOptions::new();
            let mut file = file.write(true).create_new(true).mode(0o644).open(&path).map_err(fail(&path))?;
            file.write_all(content).map_err(fail(&path))?;
        }
        Ok(files)
    }

    /// The shared object for LD_PRELOAD.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.folder.join("agent.so")
    }

    /// Leaves the files where they are: processes that go on after the launcher still name them in their environment,
    /// and whatever they execute would otherwise hear the loader complain.
    pub fn leave(self) {
        let _kept = std::mem::ManuallyDrop::new(self);
    }

    /// The table of system-call sites.
    #[must_use]
    pub fn sites(&self) -> PathBuf {
        self.folder.join("sites")
    }
}

impl Drop for AgentFiles {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn forbids_execution(base: &Path) -> bool {
    rustix::fs::statvfs(base).is_ok_and(|about| about.f_flag.contains(rustix::fs::StatVfsMountFlags::NOEXEC))
}

/// The table of sites for the libc and the loader that this process itself runs with.
///
/// # Errors
/// [`BrokerError::Sites`].
pub fn host_sites() -> Result<Vec<u8>, BrokerError> {
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
        objects.push(sites);
    }
    if objects.len() != 2 {
        return Err(reason(format!(
            "{} of libc and the loader found in this process; a statically linked pagefold cannot read them off",
            objects.len()
        )));
    }
    Ok(proof::encode(&objects))
}
