//! What the headers of an executed file say.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use kernel::Pid;

const PT_INTERP: u32 = 3;
/// Program headers beyond so many are not looked at; the kernel takes no file with more (64 KiB).
const HEADERS_MOST: u64 = 2340;

/// Whether the file that a process executes names a loader (PT_INTERP). A loader does not, nor does a program that is
/// linked statically. `None` if it cannot be read, or is no ELF file.
pub(crate) fn asks_for_loader(pid: Pid) -> Option<bool> {
    let file = File::open(format!("/proc/{pid}/exe")).ok()?;
    names_loader(|bytes, at| file.read_exact_at(bytes, at))
}

fn names_loader(read: impl Fn(&mut [u8], u64) -> io::Result<()>) -> Option<bool> {
    let number = |at: u64, width: usize| {
        let mut bytes = [0; 8];
        read(&mut bytes[..width], at).ok()?;
        Some(u64::from_le_bytes(bytes))
    };
    let mut start = [0; 6];
    read(&mut start, 0).ok()?;
    let (table, size, count) = match &start {
        b"\x7fELF\x02\x01" => (number(0x20, 8)?, number(0x36, 2)?, number(0x38, 2)?),
        b"\x7fELF\x01\x01" => (number(0x1c, 4)?, number(0x2a, 2)?, number(0x2c, 2)?),
        _ => return None,
    };
    for index in 0..count.min(HEADERS_MOST) {
        if number(table.checked_add(size * index)?, 4)? == u64::from(PT_INTERP) {
            return Some(true);
        }
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::path::Path;

    fn of_file(file: &Path) -> Option<bool> {
        let file = File::open(file).unwrap();
        names_loader(|bytes, at| file.read_exact_at(bytes, at))
    }

    #[test]
    fn programs_name_their_loader_and_loaders_none() {
        assert_eq!(asks_for_loader(Pid::this()), Some(true));
        let maps = kernel::maps::read(Pid::this()).unwrap();
        let loader = maps.iter().find(|vma| vma.name.to_string_lossy().contains("/ld-")).unwrap();
        assert_eq!(of_file(Path::new(&loader.name)), Some(false));
        assert_eq!(of_file(Path::new("/proc/self/maps")), None);
        assert_eq!(asks_for_loader(Pid(i32::MAX)), None);
    }

    #[test]
    fn hostile_headers_say_nothing() {
        let mut image = [0_u8; 64];
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        image[0x20..0x28].fill(0xff);
        image[0x36..0x3a].fill(0xff);
        let read = |bytes: &mut [u8], at: u64| {
            let at = usize::try_from(at).unwrap_or(usize::MAX);
            let part = at.checked_add(bytes.len()).and_then(|end| image.get(at..end));
            part.map(|part| bytes.copy_from_slice(part)).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        };
        assert_eq!(names_loader(read), None);
    }
}
