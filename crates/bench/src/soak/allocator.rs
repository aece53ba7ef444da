//! Allocators that programs bring along.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::ValueEnum;

/// Whose memory it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Allocator {
    /// The C library's own.
    Libc,
    /// jemalloc, preloaded.
    Jemalloc,
    /// mimalloc, preloaded.
    Mimalloc,
}

impl Allocator {
    /// The library to preload; `None` for the C library's.
    ///
    /// # Errors
    /// If it is not installed.
    pub fn library(self) -> Result<Option<PathBuf>> {
        const FOLDERS: [&str; 4] = ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib"];
        let (names, package): (&[&str], _) = match self {
            Self::Libc => return Ok(None),
            Self::Jemalloc => (&["libjemalloc.so.2"], "libjemalloc2"),
            Self::Mimalloc => (&["libmimalloc.so.2", "libmimalloc.so.2.0", "libmimalloc.so.3"], "libmimalloc2.0"),
        };
        let places = FOLDERS.iter().flat_map(|folder| names.iter().map(|name| Path::new(folder).join(name)));
        match places.into_iter().find(|place| place.exists()) {
            Some(place) => Ok(Some(place)),
            None => bail!("{} is not installed; on Debian: apt install {package}", names[0]),
        }
    }
}
