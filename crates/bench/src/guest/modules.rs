//! Kernel modules and what they depend on.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::kernel::Kernel;

/// A disk and a balloon by virtio. The PCI transport is built in from Debian's 6.12 on.
pub const DISK: &[&str] = &["virtio_pci", "virtio_blk", "virtio_balloon"];
/// NFS server and client of versions 3 and 4.
pub const NFS: &[&str] = &["nfsd", "nfsv3", "nfsv4"];

/// A module, ready to be loaded.
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) image: Vec<u8>,
}

/// The modules of these names with all that they depend on, in an order in which they can be loaded. What is built into
/// the kernel is left out.
pub(crate) fn modules(kernel: &Kernel, names: &[&str]) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    find(&kernel.modules.join("kernel"), &mut files)?;
    let built_in = std::fs::read_to_string(kernel.modules.join("modules.builtin")).unwrap_or_default();
    let built_in: Vec<String> = built_in.lines().map(|line| stem(Path::new(line))).collect();
    let mut loaded = Vec::new();
    for name in names {
        load(name, &files, &built_in, &mut loaded)
            .with_context(|| format!("module {name} of kernel {}", kernel.release))?;
    }
    Ok(loaded)
}

fn load(name: &str, files: &BTreeMap<String, PathBuf>, built_in: &[String], loaded: &mut Vec<Module>) -> Result<()> {
    let name = name.replace('-', "_");
    if loaded.iter().any(|module| module.name == name) || built_in.contains(&name) {
        return Ok(());
    }
    let Some(file) = files.get(&name) else { bail!("neither a file nor built in: {name}") };
    let image = image(file)?;
    for dependency in dependencies(&image) {
        load(&dependency, files, built_in, loaded)?;
    }
    loaded.push(Module { name, image });
    Ok(())
}

/// The module's ELF file, without compression.
fn image(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_none_or(|extension| extension != "xz") {
        return std::fs::read(file).with_context(|| format!("read {}", file.display()));
    }
    let output = Command::new("xz").arg("-dc").arg(file).output().context("run xz")?;
    if !output.status.success() {
        bail!("xz -dc {}: {}", file.display(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(output.stdout)
}

/// The `depends=` string of the section `.modinfo`, which is a list of strings that end in zero bytes.
fn dependencies(image: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = image.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = image.get(at + KEY.len()..).and_then(|rest| rest.split(|byte| *byte == 0).next()).unwrap_or_default();
    String::from_utf8_lossy(value).split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// Every module file below a folder, by module name.
fn find(folder: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, files)?;
        } else {
            files.insert(stem(&path), path);
        }
    }
    Ok(())
}

/// `virtio-blk.ko.xz` is the module `virtio_blk`.
fn stem(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.split(".ko").next().unwrap_or_default().replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_dependencies_are_read() {
        assert_eq!(stem(Path::new("a/virtio-blk.ko.xz")), "virtio_blk");
        assert_eq!(stem(Path::new("nfsd.ko")), "nfsd");
        let info = b"license=GPL\0depends=virtio,virtio-ring\0intree=Y\0";
        assert_eq!(dependencies(info), ["virtio", "virtio-ring"]);
        assert!(dependencies(b"license=GPL\0depends=\0").is_empty());
    }
}
