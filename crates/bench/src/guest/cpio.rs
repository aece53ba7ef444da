//! The archive format of an initramfs, "newc" (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::io::{self, Write};

/// File type bits of a mode word.
pub(crate) const DIRECTORY: u32 = 0o040_000;
pub(crate) const REGULAR: u32 = 0o100_000;
pub(crate) const LINK: u32 = 0o120_000;
pub(crate) const CHARACTER: u32 = 0o020_000;

/// Name of the entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// Writes entries one behind the other.
pub(crate) struct Writer<W> {
    to: W,
    /// Bytes written so far, for the padding.
    written: usize,
    inode: u32,
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(to: W) -> Self {
        Self { to, written: 0, inode: 0 }
    }

    /// One entry. `name` has no leading slash; `device` is major and minor of a node.
    pub(crate) fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> io::Result<()> {
        self.inode += 1;
        let links = if mode & 0o170_000 == DIRECTORY { 2 } else { 1 };
        let size = u32::try_from(data.len()).map_err(|error| io::Error::new(io::ErrorKind::FileTooLarge, error))?;
        let name_size =
            u32::try_from(name.len() + 1).map_err(|error| io::Error::new(io::ErrorKind::InvalidFilename, error))?;
        let mut header = "070701".to_owned();
        // ino, mode, uid, gid, nlink, mtime, size, device of the archive, device of the node, name, checksum (unused)
        for field in [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0] {
            header.push_str(&format!("{field:08x}"));
        }
        self.put(header.as_bytes())?;
        self.put(name.as_bytes())?;
        self.put(&[0])?;
        self.align(4)?;
        self.put(data)?;
        self.align(4)
    }

    /// Ends the archive and gives the writer back.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entry(TRAILER, 0, (0, 0), &[])?;
        self.align(512)?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.to.write_all(bytes)
    }

    fn align(&mut self, to: usize) -> io::Result<()> {
        let missing = self.written.next_multiple_of(to) - self.written;
        self.put(&vec![0; missing])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn cpio_reads_what_was_written() {
        let folder = tempfile::tempdir().unwrap();
        let archive = folder.path().join("archive");
        let mut writer = Writer::new(std::fs::File::create(&archive).unwrap());
        writer.entry("etc", DIRECTORY | 0o755, (0, 0), &[]).unwrap();
        writer.entry("etc/odd", REGULAR | 0o640, (0, 0), b"12345").unwrap();
        writer.entry("etc/link", LINK | 0o777, (0, 0), b"odd").unwrap();
        writer.finish().unwrap();
        let extracted = Command::new("busybox")
            .args(["cpio", "-idm", "--quiet"])
            .current_dir(folder.path())
            .stdin(Stdio::from(std::fs::File::open(&archive).unwrap()))
            .status();
        let Ok(status) = extracted else {
            println!("skipped: no busybox");
            return;
        };
        assert!(status.success());
        assert_eq!(std::fs::read(folder.path().join("etc/link")).unwrap(), b"12345");
    }
}
