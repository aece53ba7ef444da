//! Kernels to boot: installed ones, and Debian packages unpacked into a cache.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::cache;

/// A kernel image with its modules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// What `uname -r` says on it.
    pub release: String,
    /// The bootable image.
    pub image: PathBuf,
    /// The folder that holds `kernel/` and `modules.builtin`.
    pub modules: PathBuf,
}

/// Debian's flavour for virtual machines: small, boots in two seconds under emulation, has nfs and nfsd but no 9p.
const FLAVOUR: &str = "-cloud-amd64";

/// Where kernels are looked for. The host's own sources stay as they are.
const SOURCES: &str = "\
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian-security bookworm-security main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm-backports main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian-security trixie-security main
";

impl Kernel {
    /// A kernel of a series like `6.1` or `6.12`: installed, cached, or fetched from Debian into the [`cache`]. Nothing
    /// is installed.
    ///
    /// # Errors
    ///
    /// When there is none and it cannot be fetched, which needs apt-get, dpkg-deb and the network.
    pub fn of_series(series: &str) -> Result<Self> {
        if let Some(kernel) = Self::present(series)? {
            return Ok(kernel);
        }
        fetch(series).with_context(|| format!("fetch a kernel {series} from Debian"))?;
        Self::present(series)?.with_context(|| format!("the package of kernel {series} holds no kernel"))
    }

    /// The newest kernel of a series that is here already.
    ///
    /// # Errors
    ///
    /// When a folder of kernels cannot be listed.
    pub fn present(series: &str) -> Result<Option<Self>> {
        let mut roots = vec![PathBuf::from("/")];
        roots.extend(children(&cache().join("kernels"))?);
        let mut kernels = Vec::new();
        for root in roots {
            for image in children(&root.join("boot"))? {
                let name = image.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
                let Some(release) = name.strip_prefix("vmlinuz-") else { continue };
                if !is_of_series(release, series) || !release.ends_with(FLAVOUR) {
                    continue;
                }
                let modules = ["lib/modules", "usr/lib/modules"].map(|folder| root.join(folder).join(release));
                if let Some(modules) = modules.into_iter().find(|folder| folder.join("kernel").is_dir()) {
                    kernels.push(Self { release: release.to_owned(), image, modules });
                }
            }
        }
        Ok(kernels.into_iter().max_by_key(|kernel| numbers(&kernel.release)))
    }
}

/// Unpacks the newest package of a series into the cache.
fn fetch(series: &str) -> Result<()> {
    let cache = cache();
    fs::create_dir_all(&cache).with_context(|| format!("create {}", cache.display()))?;
    // One at a time: two runs would unpack into each other's folder. Closing the file unlocks it.
    let lock = File::create(cache.join("lock")).context("create the cache's lock")?;
    lock.lock().context("lock the cache")?;
    if Kernel::present(series)?.is_some() {
        return Ok(());
    }
    let apt = cache.join("apt");
    let unpacked = unpack(series, &cache, &apt);
    // Package lists and the package: six times what they were needed for.
    fs::remove_dir_all(&apt).context("remove apt's folder")?;
    unpacked
}

fn unpack(series: &str, cache: &Path, apt: &Path) -> Result<()> {
    for folder in ["etc/apt.conf.d", "etc/preferences.d", "etc/sources.list.d", "lists/partial", "archives/partial"] {
        fs::create_dir_all(apt.join(folder)).with_context(|| format!("create {}", apt.display()))?;
    }
    fs::write(apt.join("etc/sources.list"), SOURCES)?;
    let config = apt.join("apt.conf");
    fs::write(
        &config,
        format!(
            "Dir::Etc \"{0}/etc\";\nDir::State \"{0}\";\nDir::State::lists \"{0}/lists\";\n\
             Dir::State::status \"/dev/null\";\nDir::Cache \"{0}\";\nDir::Cache::archives \"{0}/archives\";\n\
             Acquire::Languages \"none\";\nAPT::Sandbox::User \"\";\n",
            apt.display()
        ),
    )?;
    let run = |program: &str, arguments: &[&str]| run(program, arguments, &config, apt);
    run("apt-get", &["update", "-qq"])?;
    let names = run("apt-cache", &["pkgnames", &format!("linux-image-{series}.")])?;
    let newest = names
        .lines()
        .filter_map(|name| name.strip_prefix("linux-image-"))
        .filter(|release| is_of_series(release, series) && release.ends_with(FLAVOUR))
        .max_by_key(|release| numbers(release))
        .with_context(|| format!("Debian has no kernel {series}{FLAVOUR}"))?
        .to_owned();
    run("apt-get", &["download", "-qq", &format!("linux-image-{newest}")])?;
    let package = children(apt)?
        .into_iter()
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt-get download left no package")?;
    let (unpacked, kernels) = (cache.join("unpacking"), cache.join("kernels"));
    if unpacked.exists() {
        fs::remove_dir_all(&unpacked)?;
    }
    run("dpkg-deb", &["-x", &package.to_string_lossy(), &unpacked.to_string_lossy()])?;
    fs::create_dir_all(&kernels)?;
    fs::rename(&unpacked, kernels.join(&newest)).context("move the kernel into the cache")
}

fn run(program: &str, arguments: &[&str], config: &Path, folder: &Path) -> Result<String> {
    let output = Command::new(program)
        .args(arguments)
        .env("APT_CONFIG", config)
        .current_dir(folder)
        .output()
        .with_context(|| format!("run {program}"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The entries of a folder; none where there is no folder.
fn children(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("list {}", folder.display()))?,
    };
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// `6.1` is not the series of `6.12.3`.
fn is_of_series(release: &str, series: &str) -> bool {
    release.strip_prefix(series).is_some_and(|rest| rest.starts_with('.'))
}

/// All numbers of a release, for comparing.
fn numbers(release: &str) -> Vec<u64> {
    release.split(|letter: char| !letter.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_by_number() {
        assert!(numbers("6.12.100+deb13-cloud-amd64") > numbers("6.12.95+deb12-cloud-amd64"));
        assert!(is_of_series("6.1.0-56-cloud-amd64", "6.1"));
        assert!(!is_of_series("6.12.95+deb12-cloud-amd64", "6.1"));
    }
}
