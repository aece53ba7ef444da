//! `/etc/ld.so.cache`: where the loader finds libraries by name.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// The format of glibc 2.2 and later; `version` follows.
const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
/// The older format, which may stand in front of it.
const OLD_MAGIC: &[u8] = b"ld.so-1.7.0\0";
/// `FLAG_X8664_LIB64 | FLAG_ELF_LIBC6` in sysdeps/generic/ldconfig.h.
const X86_64: u32 = 0x0303;
/// Bytes of the header and of an entry.
const HEADER: usize = 48;
const ENTRY: usize = 24;
const OLD_HEADER: usize = 16;
const OLD_ENTRY: usize = 12;
/// No cache is longer than this.
const LONGEST: u64 = 64 << 20;

/// What the cache says.
#[derive(Debug, Default)]
pub(crate) struct LdCache {
    paths: HashMap<Vec<u8>, Vec<PathBuf>>,
}

impl LdCache {
    /// Reads a cache. One that is missing or not understood has no entries, as for the loader.
    pub(crate) fn read(path: &Path) -> Self {
        use std::io::Read as _;

        let mut bytes = Vec::new();
        let read = std::fs::File::open(path).and_then(|file| file.take(LONGEST).read_to_end(&mut bytes));
        if read.is_err() { Self::default() } else { Self::parse(&bytes).unwrap_or_default() }
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut bytes = bytes;
        if bytes.starts_with(OLD_MAGIC) {
            let entries = usize::try_from(number(bytes, OLD_MAGIC.len())?).ok()?;
            let end = OLD_HEADER.checked_add(entries.checked_mul(OLD_ENTRY)?)?;
            bytes = bytes.get(end.next_multiple_of(8)..)?;
        }
        if !bytes.starts_with(MAGIC) {
            return None;
        }
        let mut cache = Self::default();
        let entries = usize::try_from(number(bytes, MAGIC.len())?).ok()?;
        for entry in bytes.get(HEADER..)?.chunks_exact(ENTRY).take(entries) {
            if number(entry, 0)? != X86_64 {
                continue;
            }
            // Offsets of strings count from the header on. Those for single processors are variants of one library.
            let name = text(bytes, number(entry, 4)?)?.to_owned();
            let path = PathBuf::from(OsStr::from_bytes(text(bytes, number(entry, 8)?)?));
            cache.paths.entry(name).or_default().push(path);
        }
        Some(cache)
    }

    /// All files that the loader may take for a name, variants for single processors among them.
    pub(crate) fn find(&self, name: &str) -> &[PathBuf] {
        self.paths.get(name.as_bytes()).map_or(&[], Vec::as_slice)
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes)
}

fn text(bytes: &[u8], at: u32) -> Option<&[u8]> {
    let rest = bytes.get(usize::try_from(at).ok()?..)?;
    rest.iter().take(4096).position(|byte| *byte == 0).and_then(|end| rest.get(..end))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn cache(entries: &[(u32, &str, &str)]) -> Vec<u8> {
        let mut strings = Vec::new();
        let mut table = Vec::new();
        let base = HEADER + ENTRY * entries.len();
        for (flags, name, path) in entries {
            table.extend(flags.to_le_bytes());
            for text in [name, path] {
                table.extend(u32::try_from(base + strings.len()).unwrap().to_le_bytes());
                strings.extend(text.as_bytes());
                strings.push(0);
            }
            table.extend([0; 12]);
        }
        let mut bytes = MAGIC.to_vec();
        bytes.extend(u32::try_from(entries.len()).unwrap().to_le_bytes());
        bytes.resize(HEADER, 0);
        [bytes, table, strings].concat()
    }

    #[test]
    fn libraries_of_this_machine_are_found_and_no_others() {
        let bytes = cache(&[
            (X86_64, "liba.so", "/v3/liba.so"),
            (3, "liba.so", "/i386/liba.so"),
            (X86_64, "liba.so", "/liba.so"),
        ]);
        let read = LdCache::parse(&bytes).unwrap();
        assert_eq!(read.find("liba.so"), [PathBuf::from("/v3/liba.so"), PathBuf::from("/liba.so")]);
        assert!(read.find("libb.so").is_empty());
        let mut behind = OLD_MAGIC.to_vec();
        behind.extend(1_u32.to_le_bytes());
        behind.resize(32, 0);
        behind.extend(&bytes);
        assert_eq!(LdCache::parse(&behind).unwrap().find("liba.so").len(), 2);
    }

    #[test]
    fn every_truncation_and_flipped_byte_is_survived() {
        let bytes = cache(&[(X86_64, "liba.so", "/liba.so")]);
        for at in 0..bytes.len() {
            let _ = LdCache::parse(&bytes[..at]);
            let mut flipped = bytes.clone();
            flipped[at] ^= 0xff;
            let _ = LdCache::parse(&flipped);
        }
    }
}
