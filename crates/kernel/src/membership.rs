//! Where a process belongs: its command line, its cgroup, and who else is in a cgroup.

use std::fs;
use std::io;
use std::path::Path;

use crate::procfs::{self, ProcError};
use crate::units::Pid;

/// The words with which a process was started, as it shows them; empty for kernel threads and zombies. A process may
/// have overwritten them.
///
/// # Errors
/// [`ProcError`].
pub fn command_line(pid: Pid) -> Result<Vec<String>, ProcError> {
    let mut buffer = Vec::new();
    procfs::read_into(pid, "cmdline", &mut buffer)?;
    let text = buffer.strip_suffix(b"\0").unwrap_or(&buffer);
    if text.is_empty() {
        return Ok(Vec::new());
    }
    Ok(text.split(|byte| *byte == 0).map(procfs::text).collect())
}

/// The cgroup of a process, as a path from the hierarchy's root: the unified one's, unless the process is at its root
/// and in a memory cgroup of the older kind.
///
/// # Errors
/// [`ProcError`].
pub fn cgroup(pid: Pid) -> Result<String, ProcError> {
    let mut buffer = Vec::new();
    procfs::read_into(pid, "cgroup", &mut buffer)?;
    Ok(parse_cgroup(&procfs::text(&buffer)))
}

fn parse_cgroup(text: &str) -> String {
    let paths = || text.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let unified = paths().find(|(controllers, path)| controllers.is_empty() && *path != "/");
    let memory = || paths().find(|(controllers, _)| controllers.split(',').any(|word| word == "memory"));
    unified.or_else(memory).map_or_else(|| "/".to_owned(), |(_, path)| path.to_owned())
}

/// The processes of a cgroup's directory and of all below it. A cgroup that goes meanwhile is left out.
///
/// # Errors
/// What the kernel says of the directory itself; [`io::ErrorKind::NotFound`] too for one that is not a cgroup's.
pub fn cgroup_members(folder: &Path) -> io::Result<Vec<Pid>> {
    let mut pids = own_members(folder)?;
    for entry in fs::read_dir(folder)?.filter_map(Result::ok) {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            pids.extend(cgroup_members(&entry.path()).unwrap_or_default());
        }
    }
    Ok(pids)
}

fn own_members(folder: &Path) -> io::Result<Vec<Pid>> {
    match fs::read_to_string(folder.join("cgroup.procs")) {
        Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).map(Pid).collect()),
        // A threaded cgroup has threads only; their processes belong to the one above.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_process_shows_its_words_and_a_thread_of_the_kernel_none() {
        let mut child = std::process::Command::new("sleep").args(["60", "0"]).spawn().unwrap();
        let pid = Pid(child.id().cast_signed());
        let words = (0..200).find_map(|_| {
            std::thread::sleep(std::time::Duration::from_millis(5));
            command_line(pid).ok().filter(|words| words.first().is_some_and(|word| word.ends_with("sleep")))
        });
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(words.unwrap()[1..], ["60", "0"]);
        assert!(command_line(pid).unwrap_err().is_gone());
    }

    #[test]
    fn the_unified_hierarchy_comes_first_unless_nothing_is_said_there() {
        assert_eq!(parse_cgroup("0::/user.slice/a b\n"), "/user.slice/a b");
        assert_eq!(parse_cgroup("4:cpu,memory:/docker/1\n0::/\n"), "/docker/1");
        assert_eq!(parse_cgroup("4:cpu,memory:/docker/1\n0::/x:y\n"), "/x:y");
        assert_eq!(parse_cgroup("1:name=systemd:/z\n"), "/");
        assert!(cgroup(Pid::this()).unwrap().starts_with('/'));
    }

    #[test]
    fn members_are_found_below_too() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(cgroup_members(folder.path()).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::create_dir(folder.path().join("inner")).unwrap();
        fs::write(folder.path().join("cgroup.procs"), "12\n").unwrap();
        fs::write(folder.path().join("inner/cgroup.procs"), "13\n14\n").unwrap();
        let mut members = cgroup_members(folder.path()).unwrap();
        members.sort();
        assert_eq!(members, [Pid(12), Pid(13), Pid(14)]);
    }
}
