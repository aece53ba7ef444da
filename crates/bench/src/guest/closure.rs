//! The libraries that a program needs, as its own loader finds them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// Loader and libraries of a dynamic program, by absolute path; empty for a static one and for what is no program.
///
/// # Errors
///
/// When the loader cannot be run, or misses a library.
pub(crate) fn closure(program: &Path) -> Result<Vec<PathBuf>> {
    let image = std::fs::read(program).with_context(|| format!("read {}", program.display()))?;
    let Some(loader) = loader(&image) else { return Ok(Vec::new()) };
    let output = Command::new(&loader)
        .arg("--list")
        .arg(program)
        .output()
        .with_context(|| format!("run {}", loader.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() || text.contains("not found") {
        bail!("{} lacks a library: {text}{}", program.display(), String::from_utf8_lossy(&output.stderr));
    }
    // "libc.so.6 => /lib/... (0x...)", or a bare path for the loader; the vdso has none.
    let libraries = text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from);
    let mut files: Vec<PathBuf> = libraries.chain([loader]).collect();
    files.sort();
    files.dedup();
    Ok(files)
}

/// The path in `PT_INTERP` of a 64-bit little-endian ELF file.
fn loader(image: &[u8]) -> Option<PathBuf> {
    const PT_INTERP: u64 = 3;

    if !image.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let number = |at: usize, bytes: usize| -> Option<u64> {
        image.get(at..at + bytes)?.iter().rev().try_fold(0_u64, |value, byte| Some(value << 8 | u64::from(*byte)))
    };
    let at = |value: u64| usize::try_from(value).ok();
    let (headers, size, count) = (at(number(32, 8)?)?, at(number(54, 2)?)?, at(number(56, 2)?)?);
    (0..count).map(|index| headers + index * size).find_map(|header| {
        if number(header, 4)? != PT_INTERP {
            return None;
        }
        let offset = at(number(header + 8, 8)?)?;
        let name = image.get(offset..)?.split(|byte| *byte == 0).next()?;
        Some(PathBuf::from(String::from_utf8_lossy(name).into_owned()))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_dynamic_program_needs_libc_and_its_loader() {
        let files = closure(Path::new("/bin/sh")).unwrap();
        assert!(files.iter().any(|file| file.ends_with("libc.so.6")), "{files:?}");
        assert!(files.iter().any(|file| file.to_string_lossy().contains("ld-linux")), "{files:?}");
    }

    #[test]
    fn a_text_needs_nothing() {
        assert!(closure(Path::new("/etc/passwd")).unwrap().is_empty());
    }
}
