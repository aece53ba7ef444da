//! Which program a process runs.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use crate::procfs::ProcError;
use crate::units::Pid;

/// The file that a process executes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Its path as the process sees it; ` (deleted)` follows one that is no longer there.
    pub path: PathBuf,
    /// False for a 32-bit program; `None` if the file is no ELF file or cannot be read.
    pub is_64_bit: Option<bool>,
    /// Who executes it gets other rights than its own: the file is setuid or setgid.
    pub is_setuid: bool,
    /// Which file it is, whatever its name: device and inode; `None` if it cannot be looked at.
    pub file: Option<(u64, u64)>,
}

/// S_ISUID and S_ISGID.
const SET_IDS: u32 = 0o6000;

/// Looks at /proc/PID/exe.
///
/// # Errors
/// [`ProcError::Gone`], for a kernel thread too; [`ProcError::Denied`] without ptrace rights.
pub fn program(pid: Pid) -> Result<Program, ProcError> {
    let link = format!("/proc/{pid}/exe");
    let path = std::fs::read_link(&link).map_err(|source| ProcError::of(pid, "exe", source))?;
    let mut head = [0; 5];
    let read = File::open(&link).and_then(|mut file| file.read_exact(&mut head));
    let file = std::fs::metadata(&link).ok();
    Ok(Program {
        path,
        is_64_bit: read.ok().and_then(|()| is_64_bit(head)),
        is_setuid: file.as_ref().is_some_and(|file| file.mode() & SET_IDS != 0),
        file: file.map(|file| (file.dev(), file.ino())),
    })
}

/// The class byte of an ELF header (elf(5), `EI_CLASS`).
fn is_64_bit(head: [u8; 5]) -> Option<bool> {
    match head {
        [0x7f, b'E', b'L', b'F', 1] => Some(false),
        [0x7f, b'E', b'L', b'F', 2] => Some(true),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn our_own_program() {
        let found = program(Pid::this()).unwrap();
        assert_eq!(found.path, std::env::current_exe().unwrap());
        assert_eq!(found.is_64_bit, Some(cfg!(target_pointer_width = "64")));
        let own = std::fs::metadata("/proc/self/exe").unwrap();
        assert_eq!((found.file, found.is_setuid), (Some((own.dev(), own.ino())), false));
        assert!(program(Pid(i32::MAX)).unwrap_err().is_gone());
    }

    #[test]
    fn classes_of_elf_files() {
        assert_eq!(is_64_bit(*b"\x7fELF\x01"), Some(false));
        assert_eq!(is_64_bit(*b"\x7fELF\x02"), Some(true));
        assert_eq!((is_64_bit(*b"\x7fELF\x03"), is_64_bit(*b"#!/bi")), (None, None));
    }
}
