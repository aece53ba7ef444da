//! Descriptors of a process through which its pages may be held: a device, or the kernel for one, reads and writes them
//! behind the page tables' back. Such pages cannot be merged.

use std::fs;
use std::path::Path;

use crate::procfs::{self, ProcError};
use crate::units::Pid;

/// How many a process has of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// Rings of io_uring.
    pub io_uring: u32,
    /// Buffers registered with them; these stay pinned until they are unregistered (io_uring/fdinfo.c, `UserBufs`).
    pub registered_buffers: u64,
    /// VFIO containers, groups and devices, and iommufd: memory mapped for a device is pinned.
    pub vfio: u32,
    /// Verbs of RDMA adapters: registered memory regions are pinned.
    pub rdma: u32,
}

/// Looks at all descriptors of a process. Those that are closed meanwhile are not counted.
///
/// # Errors
/// [`ProcError::Gone`], [`ProcError::Denied`] without ptrace rights.
pub fn holding(pid: Pid) -> Result<Holding, ProcError> {
    let folder = format!("/proc/{pid}/fd");
    let mut found = Holding::default();
    for entry in fs::read_dir(&folder).map_err(|source| ProcError::of(pid, "fd", source))? {
        let entry = entry.map_err(|source| ProcError::of(pid, "fd", source))?;
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let target = target.to_string_lossy();
        if target == "anon_inode:[io_uring]" {
            found.io_uring += 1;
            let information = Path::new("/proc").join(pid.to_string()).join("fdinfo").join(entry.file_name());
            found.registered_buffers += fs::read(information).map_or(0, |text| registered(&text));
        } else if ["/dev/vfio", "anon_inode:[vfio", "/dev/iommu"].iter().any(|name| target.starts_with(name)) {
            found.vfio += 1;
        } else if target.starts_with("/dev/infiniband/") {
            found.rdma += 1;
        }
    }
    Ok(found)
}

/// `UserBufs:` of a ring's fdinfo.
fn registered(information: &[u8]) -> u64 {
    let count = procfs::lines(information).filter_map(procfs::field).find(|(key, _)| *key == b"UserBufs");
    count.and_then(|(_, value)| procfs::decimal(value)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::io::BufRead as _;
    use std::process::{Command, Stdio};

    /// A ring, and a buffer of it.
    const RING: &str = "
import ctypes, mmap, sys
libc = ctypes.CDLL(None)
ring = libc.syscall(425, 4, ctypes.byref((ctypes.c_uint8 * 120)()))
area = mmap.mmap(-1, 65536, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
area[0] = 1
piece = (ctypes.c_size_t * 2)(ctypes.addressof(ctypes.c_char.from_buffer(area)), 65536)
print(ring, libc.syscall(427, ring, 0, ctypes.byref(piece), 1), flush=True)
sys.stdin.read()
";

    #[test]
    fn a_ring_with_a_registered_buffer() {
        let mut python = Command::new("python3");
        let Ok(mut child) = python.args(["-c", RING]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn() else {
            return println!("skipped: python3");
        };
        let mut line = String::new();
        std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let pid = Pid(child.id().cast_signed());
        let (found, status) = (holding(pid), crate::status::read(pid));
        drop(child.stdin.take());
        child.wait().unwrap();
        if line.starts_with('-') {
            return println!("skipped: io_uring");
        }
        assert!(line.ends_with(" 0\n"), "{line}");
        assert_eq!(found.unwrap(), Holding { io_uring: 1, registered_buffers: 1, ..Holding::default() });
        assert_eq!(status.unwrap().vm_pin, crate::Bytes(65536));
        assert!(holding(pid).unwrap_err().is_gone());
    }

    #[test]
    fn a_process_without_any() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let found = holding(Pid(child.id().cast_signed()));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(found.unwrap(), Holding::default());
    }
}
