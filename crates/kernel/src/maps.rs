//! /proc/PID/maps: the mappings of a process, all of them or the one at an address.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use crate::procfs::{self, ProcError};
use crate::sys;
use crate::uapi::{PROCMAP_QUERY, PROCMAP_QUERY_COVERING_OR_NEXT_VMA, ProcmapQuery};
use crate::units::{Pid, Range, Vaddr};

/// One mapping.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vma {
    /// Its pages.
    pub range: Range,
    /// May be read.
    pub read: bool,
    /// May be written.
    pub write: bool,
    /// May be executed.
    pub exec: bool,
    /// MAP_SHARED.
    pub shared: bool,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Major number of the file's device.
    pub dev_major: u32,
    /// Minor number of the file's device.
    pub dev_minor: u32,
    /// Inode of the file, 0 for anonymous memory.
    pub inode: u64,
    /// Path of the file, a name in brackets such as `[heap]`, or nothing. A deleted file's path ends in ` (deleted)`;
    /// a newline in a path is shown as `\012`.
    pub name: OsString,
}

impl Vma {
    /// Takes away what lies before `behind`; false if nothing is left.
    ///
    /// The kernel gives lists of mappings in pieces, each from the end of the last mapping of the one before. One that has
    /// grown over this place meanwhile begins before it, and would stand for the same pages a second time.
    pub(crate) fn keep_behind(&mut self, behind: Vaddr) -> bool {
        let start = self.range.start().max(behind);
        let Some(range) = Range::new(start, self.range.end()).ok().filter(|range| range.pages().get() > 0) else {
            return false;
        };
        if self.inode != 0 {
            self.offset = self.offset.wrapping_add(start.get() - self.range.start().get());
        }
        self.range = range;
        true
    }

    /// Private memory without a file, whatever it is called.
    #[must_use]
    pub fn is_private_anonymous(&self) -> bool {
        !self.shared && self.inode == 0 && !self.is_special()
    }

    /// One of the kernel's own: vdso, vvar, vsyscall.
    #[must_use]
    pub fn is_special(&self) -> bool {
        let name = self.name.as_bytes();
        name.starts_with(b"[v") && (name.starts_with(b"[vdso") || name.starts_with(b"[vvar") || name == b"[vsyscall]")
    }

    /// A mapping of the file with this device and inode.
    #[must_use]
    pub fn is_file(&self, dev_major: u32, dev_minor: u32, inode: u64) -> bool {
        self.inode == inode && self.dev_major == dev_major && self.dev_minor == dev_minor && inode != 0
    }
}

/// Reads the mappings of one process after the other through one buffer.
#[derive(Debug, Default)]
pub struct MapsReader {
    buffer: Vec<u8>,
}

impl MapsReader {
    /// A reader with an empty buffer.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads all mappings of a process into `out`, which is cleared: in the order of their addresses, and none overlaps
    /// another. Of mappings that change meanwhile a part may be missing. A kernel thread has none.
    ///
    /// # Errors
    /// [`ProcError`].
    pub fn read(&mut self, pid: Pid, out: &mut Vec<Vma>) -> Result<(), ProcError> {
        out.clear();
        procfs::read_into(pid, "maps", &mut self.buffer)?;
        parse(&self.buffer, out).map_err(|line| ProcError::Parse { path: format!("/proc/{pid}/maps"), line })
    }
}

/// The whole file; the error is the line that is not understood.
fn parse(bytes: &[u8], out: &mut Vec<Vma>) -> Result<(), String> {
    let mut behind = Vaddr(0);
    for line in procfs::lines(bytes) {
        let mut vma = parse_line(line).ok_or_else(|| procfs::text(line))?;
        if vma.keep_behind(behind) {
            behind = vma.range.end();
            out.push(vma);
        }
    }
    Ok(())
}

/// All mappings of a process.
///
/// # Errors
/// [`ProcError`].
pub fn read(pid: Pid) -> Result<Vec<Vma>, ProcError> {
    let mut out = Vec::new();
    MapsReader::new().read(pid, &mut out)?;
    Ok(out)
}

/// How many mappings a process has.
///
/// # Errors
/// [`ProcError`].
pub fn count(pid: Pid) -> Result<u64, ProcError> {
    let mut buffer = Vec::new();
    procfs::read_into(pid, "maps", &mut buffer)?;
    Ok(procfs::lines(&buffer).count() as u64)
}

/// How many mappings a process may have (vm.max_map_count), the kernel's own value where that cannot be read.
#[must_use]
pub fn max_map_count() -> u64 {
    const DEFAULT: u64 = 65_530;
    let text = std::fs::read_to_string("/proc/sys/vm/max_map_count");
    text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(DEFAULT)
}

/// One line of the file; `None` if it is not one. Addresses between pages make no mapping.
#[must_use]
pub fn parse_line(line: &[u8]) -> Option<Vma> {
    let (range, rest) = word(line)?;
    let (permissions, rest) = word(rest)?;
    let (offset, rest) = word(rest)?;
    let (device, rest) = word(rest)?;
    let (inode, rest) = word(rest).unwrap_or((rest, b""));
    let (start, end) = split(range, b'-')?;
    let range = Range::new(Vaddr(procfs::hexadecimal(start)?), Vaddr(procfs::hexadecimal(end)?)).ok()?;
    let [read, write, exec, share] = permissions else { return None };
    let (major, minor) = split(device, b':')?;
    Some(Vma {
        range,
        read: *read == b'r',
        write: *write == b'w',
        exec: *exec == b'x',
        shared: *share == b's',
        offset: procfs::hexadecimal(offset)?,
        dev_major: procfs::hexadecimal(major)?.try_into().ok()?,
        dev_minor: procfs::hexadecimal(minor)?.try_into().ok()?,
        inode: procfs::decimal(inode)?,
        name: OsStr::from_bytes(rest.trim_ascii_start()).to_owned(),
    })
}

/// The first word, and what follows the space behind it.
fn word(line: &[u8]) -> Option<(&[u8], &[u8])> {
    split(line, b' ')
}

fn split(bytes: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let place = bytes.iter().position(|byte| *byte == at)?;
    Some((&bytes[..place], &bytes[place + 1..]))
}

/// An open /proc/PID/maps, to ask for single mappings (PROCMAP_QUERY, Linux 6.11).
#[derive(Debug)]
pub struct MapsFile {
    pid: Pid,
    fd: OwnedFd,
}

impl MapsFile {
    /// Opens the mappings of a process. The file stays with the address space it was opened on.
    ///
    /// # Errors
    /// [`ProcError`].
    pub fn open(pid: Pid) -> Result<Self, ProcError> {
        let file = File::open(format!("/proc/{pid}/maps")).map_err(|source| ProcError::of(pid, "maps", source))?;
        Ok(Self { pid, fd: file.into() })
    }

    /// The mapping that holds `address`, `None` if there is none.
    ///
    /// # Errors
    /// [`ProcError::NotSupported`] before Linux 6.11, [`ProcError::Gone`] when the address space is gone.
    pub fn query(&self, address: Vaddr) -> Result<Option<Vma>, ProcError> {
        procmap_query(self.fd.as_fd(), self.pid, address, 0)
    }

    /// The mapping that holds `address`, else the next one behind it; `None` if there is none.
    ///
    /// # Errors
    /// As [`MapsFile::query`].
    pub fn query_next(&self, address: Vaddr) -> Result<Option<Vma>, ProcError> {
        procmap_query(self.fd.as_fd(), self.pid, address, PROCMAP_QUERY_COVERING_OR_NEXT_VMA)
    }
}

impl AsFd for MapsFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn procmap_query(fd: BorrowedFd<'_>, pid: Pid, address: Vaddr, flags: u64) -> Result<Option<Vma>, ProcError> {
    let mut name = [0_u8; 4096 + 32];
    let mut arg = ProcmapQuery {
        size: size_of::<ProcmapQuery>() as u64,
        query_flags: flags,
        query_addr: address.0,
        vma_name_size: name.len() as u32,
        vma_name_addr: name.as_mut_ptr().expose_provenance() as u64,
        ..ProcmapQuery::default()
    };
    // SAFETY: PROCMAP_QUERY takes this structure and writes at most `vma_name_size` bytes to the name.
    if let Err(source) = unsafe { sys::ioctl(fd, PROCMAP_QUERY, &mut arg) } {
        return match sys::errno(&source) {
            libc::ENOENT => Ok(None),
            libc::ENOTTY => Err(ProcError::NotSupported { interface: "PROCMAP_QUERY (Linux 6.11)" }),
            _ => Err(ProcError::of(pid, "maps", source)),
        };
    }
    // The size counts the terminating zero.
    let name = &name[..(arg.vma_name_size as usize).saturating_sub(1).min(name.len())];
    Ok(Some(Vma {
        range: Range::new(Vaddr(arg.vma_start), Vaddr(arg.vma_end)).unwrap_or_default(),
        read: arg.vma_flags & 1 != 0,
        write: arg.vma_flags & 2 != 0,
        exec: arg.vma_flags & 4 != 0,
        shared: arg.vma_flags & 8 != 0,
        offset: arg.vma_offset,
        dev_major: arg.dev_major,
        dev_minor: arg.dev_minor,
        inode: arg.inode,
        name: OsStr::from_bytes(name).to_owned(),
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn lines_of_all_kinds() {
        let line = b"7f1c2e400000-7f1c2e428000 r--p 00001000 fe:01 131090                     /usr/lib/lib c.so.6";
        let vma = parse_line(line).unwrap();
        assert_eq!(vma.range.to_string(), "7f1c2e400000-7f1c2e428000");
        assert!(vma.read && !vma.write && !vma.exec && !vma.shared);
        assert_eq!((vma.offset, vma.dev_major, vma.dev_minor, vma.inode), (0x1000, 0xfe, 1, 131_090));
        assert_eq!(vma.name, "/usr/lib/lib c.so.6");
        let vma = parse_line(b"7ffd10000000-7ffd10021000 rw-s 00000000 00:00 0 ").unwrap();
        assert!(vma.shared && vma.name.is_empty());
        assert!(
            parse_line(b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0   [vsyscall]").unwrap().is_special()
        );
        for bad in [&b""[..], b"x", b"1-2 r--p 0 0:0 0", b"1000-2000 r-p 0 0:0 0", b"2000-1000 r--p 0 0:0 0"] {
            assert_eq!(parse_line(bad), None);
        }
    }

    #[test]
    fn what_the_kernel_shows_twice_is_there_once() {
        let file = b"1000-3000 r--p 00000000 fe:01 7 /a\n2000-5000 r--p 00001000 fe:01 7 /a\n\
            2000-4000 r--p 00001000 fe:01 7 /a\n4000-6000 rw-p 00000000 00:00 0 \n";
        let mut all = Vec::new();
        parse(file, &mut all).unwrap();
        let seen: Vec<_> = all.iter().map(|vma| (vma.range.start().get(), vma.range.end().get(), vma.offset)).collect();
        assert_eq!(seen, [(0x1000, 0x3000, 0), (0x3000, 0x5000, 0x2000), (0x5000, 0x6000, 0)]);
    }

    #[test]
    fn the_query_and_the_file_agree() {
        let file = MapsFile::open(Pid::this()).unwrap();
        let on_the_stack = 0_u8;
        let code = the_query_and_the_file_agree as fn() as usize as u64;
        for address in [Vaddr(code), Vaddr((&raw const on_the_stack).addr() as u64)] {
            let vma = match file.query(address) {
                Ok(vma) => vma.unwrap(),
                Err(ProcError::NotSupported { interface }) => {
                    println!("skipped: no {interface}");
                    return;
                }
                Err(error) => panic!("{error}"),
            };
            assert!(vma.range.contains(address));
            assert!(read(Pid::this()).unwrap().contains(&vma), "{vma:?}");
        }
        assert_eq!(file.query(Vaddr(0)).unwrap(), None);
        let first = file.query_next(Vaddr(0)).unwrap().unwrap();
        assert!(first.range.start() > Vaddr(0));
    }

    #[test]
    fn a_process_that_has_ended_is_gone() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = Pid(child.id().cast_signed());
        child.wait().unwrap();
        assert!(read(pid).unwrap_err().is_gone());
    }
}
