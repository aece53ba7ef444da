//! The dynamic loader called by hand, as `ld-linux-x86-64.so.2 /usr/bin/ssh-agent`: the kernel shows the loader as what is
//! executed then, and the program is just a file that it has mapped.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use kernel::Pid;
use kernel::maps::{self, Vma};
use kernel::procfs::ProcError;

use crate::elf;
use crate::facts::without_deleted;

/// Options of the loaders of glibc and musl that take the next word with them.
const VALUED: [&str; 7] = [
    "--library-path",
    "--inhibit-rpath",
    "--audit",
    "--preload",
    "--argv0",
    "--glibc-hwcaps-prepend",
    "--glibc-hwcaps-mask",
];

/// A file called `NAME.so` or `NAME.so.VERSION`. One that is executed is the loader, which is libc itself with musl.
pub(crate) fn is_shared_object(file: &Path) -> bool {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    name.ends_with(".so") || name.contains(".so.")
}

/// Most files that are taken for loaded programs: a loader loads one. A process may map as many as it likes.
const LOADED_MOST: usize = 64;

/// True if this file, which a process executes, may be a loader: by its name, or because it is a program without one.
pub(crate) fn may_be_loader(pid: Pid, exe: &Path) -> bool {
    is_shared_object(exe) || elf::asks_for_loader(pid) == Some(false)
}

/// The programs that the loader `exe` has loaded: other files that are mapped for execution and are no shared objects. By
/// the mappings and not by the words that it was called with, which a process may overwrite.
///
/// # Errors
/// [`ProcError::Gone`]. What may not be seen is left out.
pub(crate) fn loaded(pid: Pid, exe: &Path) -> Result<Vec<PathBuf>, ProcError> {
    let vmas = match maps::read(pid) {
        Err(error) if !error.is_gone() => return Ok(Vec::new()),
        other => other?,
    };
    Ok(programs(&vmas, exe))
}

fn programs(vmas: &[Vma], exe: &Path) -> Vec<PathBuf> {
    let mut met = HashSet::new();
    let executed = vmas.iter().filter(|vma| vma.exec && vma.inode != 0 && met.insert(&vma.name));
    let files = executed.map(|vma| without_deleted(Path::new(&vma.name)));
    files.filter(|file| file != exe && !is_shared_object(file)).take(LOADED_MOST).collect()
}

/// The words of the program's own command line: from its name on.
pub(crate) fn words_behind(command_line: &[String]) -> &[String] {
    let mut at = 1;
    while let Some(word) = command_line.get(at) {
        match word.as_str() {
            "--" => return &command_line[at + 1..],
            option if VALUED.contains(&option) => at += 2,
            option if option.starts_with("--") => at += 1,
            _ => break,
        }
    }
    command_line.get(at..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loaders_by_their_names() {
        for file in ["/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", "/lib/ld-2.31.so", "/lib/ld-musl-x86_64.so.1"] {
            assert!(is_shared_object(Path::new(file)), "{file}");
        }
        for file in ["/usr/bin/ssh-agent", "/usr/bin/also", "/opt/x.so/bin/y", "/usr/bin/ldso"] {
            assert!(!is_shared_object(Path::new(file)), "{file}");
        }
    }

    fn mapped(name: &str) -> Vma {
        Vma { exec: true, inode: 1, name: name.into(), ..Vma::default() }
    }

    #[test]
    fn what_is_loaded_is_neither_the_loader_nor_a_library() {
        let mut vmas =
            ["/tmp/myloader", "/usr/bin/ssh-agent", "/lib/libc.so.6", "/usr/bin/ssh-agent"].map(mapped).to_vec();
        vmas.push(Vma { exec: false, ..mapped("/usr/share/data") });
        assert_eq!(programs(&vmas, Path::new("/tmp/myloader")), [Path::new("/usr/bin/ssh-agent")]);
    }

    #[test]
    fn nobody_makes_us_carry_thousands_of_files() {
        let vmas: Vec<Vma> = (0..20_000).map(|number| mapped(&format!("/tmp/{number}"))).collect();
        assert_eq!(programs(&vmas, Path::new("/lib/ld.so")).len(), LOADED_MOST);
    }

    #[test]
    fn the_words_of_the_program() {
        for (line, own) in [
            ("ld.so /bin/sh -c x", "/bin/sh -c x"),
            ("ld.so --library-path /a:/b --inhibit-cache --argv0 me /bin/sh x", "/bin/sh x"),
            ("ld.so --preload=x.so -- --sh x", "--sh x"),
            ("ld.so --argv0", ""),
            ("ld.so", ""),
            ("", ""),
        ] {
            let words: Vec<String> = line.split(' ').map(ToOwned::to_owned).collect();
            assert_eq!(words_behind(&words).join(" "), own, "{line}");
        }
    }
}
