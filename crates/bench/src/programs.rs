//! Programs of other crates that tests and the soak run: built where they are not named.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// Where they are.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The command `pagefold`.
    pub pagefold: PathBuf,
    /// The program that tortures managed memory.
    pub torture: PathBuf,
    /// The one that tortures its allocator.
    pub heap: PathBuf,
}

impl Programs {
    /// The named ones, and for the others those of this source, built in the profile of this program.
    ///
    /// # Errors
    /// When this program does not lie in a target folder, or cargo fails.
    pub fn named_or_built(pagefold: Option<&Path>, torture: Option<&Path>) -> Result<Self> {
        if let (Some(pagefold), Some(torture)) = (pagefold, torture) {
            let heap = torture.with_file_name("heap");
            return Ok(Self { pagefold: pagefold.to_owned(), torture: torture.to_owned(), heap });
        }
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../Cargo.toml");
        let own = std::env::current_exe().context("cannot find this program")?;
        // target/PROFILE/bench, target/PROFILE/deps/soak-...
        let folder = own
            .ancestors()
            .find(|folder| folder.file_name().is_some_and(|name| name == "release" || name == "debug"))
            .context("this program does not lie in a target folder: name --pagefold and --torture")?;
        let target = folder.parent().context("a target folder has a name")?;
        let profile = if folder.ends_with("release") { "release" } else { "dev" };
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let status = Command::new(cargo)
            .args(["build", "--quiet", "--profile", profile, "-p", "pagefold-cli", "-p", "pagefold-agent"])
            .args(["--bin", "pagefold", "--example", "torture", "--example", "heap", "--manifest-path"])
            .arg(manifest)
            .arg("--target-dir")
            .arg(target)
            .status()
            .context("cannot run cargo")?;
        ensure!(status.success(), "the programs could not be built");
        Ok(Self {
            pagefold: pagefold.map_or_else(|| folder.join("pagefold"), Path::to_owned),
            torture: torture.map_or_else(|| folder.join("examples/torture"), Path::to_owned),
            heap: folder.join("examples/heap"),
        })
    }
}

/// The `pagefold` program: the named one, or the one that was built beside this one.
///
/// # Errors
/// When there is none.
pub fn pagefold_beside(named: Option<&Path>) -> Result<PathBuf> {
    if let Some(file) = named {
        ensure!(file.is_file(), "there is no file {}", file.display());
        return Ok(std::path::absolute(file)?);
    }
    let own = std::env::current_exe().context("find this program")?;
    // A test's binary lies one folder deeper.
    let beside = own.ancestors().skip(1).take(2).map(|folder| folder.join("pagefold")).find(|file| file.exists());
    beside.context("no pagefold binary beside this one: build it (cargo build -p pagefold-cli), or --pagefold FILE")
}
