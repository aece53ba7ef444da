//! The first file system of a guest.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use super::closure::closure;
use super::cpio::{CHARACTER, DIRECTORY, LINK, REGULAR, Writer};
use super::kernel::Kernel;
use super::modules::modules;

/// Where the static busybox of Debian's package busybox-static may lie.
const BUSYBOX: [&str; 3] = ["/bin/busybox", "/usr/bin/busybox", "/usr/local/bin/busybox"];
const INIT: &str = include_str!("init.sh");
const CHECK: &str = include_str!("check.sh");

/// Pseudo-random files that every checking guest has, each of [`SEED_SIZE`] bytes. `check.sh` knows the number.
const SEEDS: u64 = 8;
const SEED_SIZE: usize = 1 << 20;

struct Entry {
    mode: u32,
    device: (u32, u32),
    data: Vec<u8>,
}

/// A file system image in the making: busybox and an init that runs `/job` on the second serial port.
pub struct Initramfs {
    entries: BTreeMap<String, Entry>,
}

impl Initramfs {
    /// An image with a job, which is a script or a program, and with kernel modules that are loaded before it runs.
    ///
    /// # Errors
    ///
    /// When there is no busybox, or the kernel lacks a module.
    pub fn new(kernel: &Kernel, names: &[&str], job: &[u8]) -> Result<Self> {
        let Some(busybox) = BUSYBOX.iter().find(|path| Path::new(path).exists()) else {
            bail!("no busybox: install Debian's busybox-static");
        };
        if !closure(Path::new(busybox))?.is_empty() {
            bail!("{busybox} is not static: install Debian's busybox-static");
        }
        let mut image = Self { entries: BTreeMap::new() };
        image.add_file("/bin/busybox", fs::read(busybox).with_context(|| format!("read {busybox}"))?, 0o755);
        image.add_file("/init", INIT.as_bytes().to_vec(), 0o755);
        image.add_file("/job", job.to_vec(), 0o755);
        image.add_file(
            "/etc/passwd",
            b"root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n".to_vec(),
            0o644,
        );
        image.add_file("/etc/group", b"root:x:0:\nnogroup:x:65534:\n".to_vec(), 0o644);
        // Init writes to it before it has mounted /dev.
        image.put("dev/console", Entry { mode: CHARACTER | 0o600, device: (5, 1), data: Vec::new() });
        let mut order = String::new();
        for module in modules(kernel, names)? {
            let file = format!("{}.ko", module.name);
            order.push_str(&file);
            order.push('\n');
            image.add_file(&format!("/modules/{file}"), module.image, 0o644);
        }
        image.add_file("/modules/order", order.into_bytes(), 0o644);
        Ok(image)
    }

    /// Adds a file by its absolute path in the guest.
    pub fn add_file(&mut self, path: &str, data: Vec<u8>, mode: u32) {
        self.put(path.trim_start_matches('/'), Entry { mode: REGULAR | mode, device: (0, 0), data });
    }

    /// Adds a file of this host, with loader and libraries where it is a dynamic program.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or a library is missing here.
    pub fn add_program(&mut self, path: &str, program: &Path) -> Result<()> {
        use std::os::unix::fs::PermissionsExt as _;

        let mode = fs::metadata(program).with_context(|| format!("read {}", program.display()))?.permissions().mode();
        self.add_file(path, lean(program)?, mode & 0o7777);
        for library in closure(program)? {
            let data = fs::read(&library).with_context(|| format!("read {}", library.display()))?;
            self.add_file(&library.to_string_lossy(), data, 0o755);
        }
        Ok(())
    }

    /// Adds a symbolic link by its absolute path in the guest.
    pub fn add_link(&mut self, path: &str, target: &str) {
        let data = target.as_bytes().to_vec();
        self.put(path.trim_start_matches('/'), Entry { mode: LINK | 0o777, device: (0, 0), data });
    }

    fn put(&mut self, path: &str, entry: Entry) {
        for folder in Path::new(path).ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty()) {
            self.entries.entry(folder.to_string_lossy().into_owned()).or_insert_with(|| Entry {
                mode: DIRECTORY | 0o755,
                device: (0, 0),
                data: Vec::new(),
            });
        }
        self.entries.insert(path.to_owned(), entry);
    }

    /// Writes the image, uncompressed: unpacking under emulation would cost more than it saves.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn write(&self, file: &Path) -> Result<()> {
        let context = || format!("write {}", file.display());
        let mut writer = Writer::new(BufWriter::new(File::create(file).with_context(context)?));
        // A folder sorts before what is in it.
        for (name, entry) in &self.entries {
            writer.entry(name, entry.mode, entry.device, &entry.data).with_context(context)?;
        }
        writer.finish().with_context(context)?;
        Ok(())
    }
}

/// A program without its debugging information where `strip` is installed: it is most of a test's program, and a guest has
/// all of it in memory twice while it unpacks its first file system.
fn lean(program: &Path) -> Result<Vec<u8>> {
    let folder = tempfile::Builder::new().prefix("lean").tempdir().context("create a folder")?;
    let copy = folder.path().join("program");
    let stripped = Command::new("strip").args(["--strip-debug", "-o"]).arg(&copy).arg(program).output();
    let from = if stripped.is_ok_and(|done| done.status.success()) { &copy } else { program };
    fs::read(from).with_context(|| format!("read {}", from.display()))
}

/// Writes the image of a guest that checks its memory for ever (see [`Fleet`](super::Fleet)).
///
/// # Errors
///
/// As [`Initramfs::new`] and [`Initramfs::write`].
pub fn check_initramfs(kernel: &Kernel, file: &Path) -> Result<()> {
    let mut image = Initramfs::new(kernel, super::DISK, CHECK.as_bytes())?;
    let mut sums = String::new();
    for seed in 0..SEEDS {
        let data = pseudo_random(seed, SEED_SIZE);
        sums.push_str(&format!("{}  {seed}\n", sha256(&data)?));
        image.add_file(&format!("/seed/{seed}"), data, 0o644);
    }
    image.add_file("/seed/sums", sums.into_bytes(), 0o644);
    image.write(file)
}

/// Bytes without repetition, the same ones for the same seed (xorshift64*).
fn pseudo_random(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut data = Vec::with_capacity(size);
    while data.len() < size {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        data.extend(state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    data.truncate(size);
    data
}

/// By coreutils: the guest's sums are worth more when the host's come from other code.
fn sha256(data: &[u8]) -> Result<String> {
    let mut child =
        Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("run sha256sum")?;
    // The pipe closes with the end of this statement. sha256sum answers only then, so nothing can block.
    child.stdin.take().context("sha256sum has a standard input")?.write_all(data)?;
    let output = child.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    text.split_whitespace().next().map(str::to_owned).context("sha256sum printed nothing")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn parents_are_made_before_their_children() {
        let mut image = Initramfs { entries: BTreeMap::new() };
        image.add_file("/a/b/c", vec![1], 0o644);
        image.add_link("/a/d", "b/c");
        let modes: Vec<_> = image.entries.iter().map(|(name, entry)| (name.as_str(), entry.mode)).collect();
        assert_eq!(
            modes,
            [("a", DIRECTORY | 0o755), ("a/b", DIRECTORY | 0o755), ("a/b/c", REGULAR | 0o644), ("a/d", LINK | 0o777)]
        );
    }

    #[test]
    fn sums_are_sha256() {
        assert_eq!(sha256(b"abc").unwrap(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn seeds_differ_and_stay_the_same() {
        assert_eq!(pseudo_random(3, 4100), pseudo_random(3, 8200)[..4100]);
        assert_ne!(pseudo_random(3, 4096), pseudo_random(4, 4096));
    }
}
