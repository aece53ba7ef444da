//! Where a process belongs: its command line, its cgroup, and who else is in a cgroup.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

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

/// The cgroups of a process in all hierarchies, without those at their root and each path once. The one that
/// [`cgroup`] tells comes first, so that none is left is the same as being at the root.
///
/// # Errors
/// [`ProcError`].
pub fn cgroups(pid: Pid) -> Result<Vec<String>, ProcError> {
    let mut buffer = Vec::new();
    procfs::read_into(pid, "cgroup", &mut buffer)?;
    Ok(parse_cgroups(&procfs::text(&buffer)))
}

fn parse_cgroups(text: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let others = hierarchies(text).map(|(_, path)| path.to_owned());
    for path in std::iter::once(parse_cgroup(text)).chain(others) {
        if path != "/" && !found.contains(&path) {
            found.push(path);
        }
    }
    found
}

/// Controllers and path, for each hierarchy.
pub(crate) fn hierarchies(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'))
}

fn parse_cgroup(text: &str) -> String {
    let paths = || hierarchies(text);
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

/// The processes of a cgroup and of all below it, named as for [`cgroup_folder`].
///
/// # Errors
/// As [`cgroup_folder`] and [`cgroup_members`].
pub fn members_of(path: &Path) -> io::Result<Vec<Pid>> {
    cgroup_members(&cgroup_folder(path)?)
}

/// The directory of a cgroup that is named by it, or by its path below /sys/fs/cgroup: there of the unified hierarchy, or of
/// any of those of cgroup v1.
///
/// # Errors
/// [`io::ErrorKind::NotFound`] if there is none, else what the kernel says of the path as it was given.
pub fn cgroup_folder(path: &Path) -> io::Result<PathBuf> {
    let is_cgroup = |folder: &Path| fs::metadata(folder.join("cgroup.procs")).map(|_| ());
    let Err(error) = is_cgroup(path) else { return Ok(path.to_owned()) };
    let root = Path::new("/sys/fs/cgroup");
    let first = [root.to_owned(), root.join("unified"), root.join("memory")];
    let others = fs::read_dir(root).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let below = path.strip_prefix("/").unwrap_or(path);
    let mut places = first.into_iter().chain(others).map(|hierarchy| hierarchy.join(below));
    places.find(|folder| is_cgroup(folder).is_ok()).ok_or(error)
}

fn own_members(folder: &Path) -> io::Result<Vec<Pid>> {
    match fs::read_to_string(folder.join("cgroup.procs")) {
        Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).map(Pid).collect()),
        // A threaded cgroup has threads only; their processes belong to the one above.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// True if the cgroup of a process is frozen, by itself or with one above it (cgroup.freeze, or the freezer of cgroup
/// v1). What the mounted groups do not show is taken to run.
///
/// # Errors
/// [`ProcError`].
pub fn is_frozen(pid: Pid) -> Result<bool, ProcError> {
    let mut buffer = Vec::new();
    procfs::read_into(pid, "cgroup", &mut buffer)?;
    Ok(frozen(&procfs::text(&buffer), Path::new("/sys/fs/cgroup")))
}

fn frozen(membership: &str, mounted: &Path) -> bool {
    hierarchies(membership).any(|(controllers, path)| {
        let says = |folder: &Path, file: &str, word: &str| {
            let text = fs::read_to_string(folder.join(path.trim_start_matches('/')).join(file));
            text.is_ok_and(|text| text.lines().any(|line| line.starts_with(word)))
        };
        if controllers.is_empty() {
            let roots = [mounted.to_owned(), mounted.join("unified")];
            roots.iter().any(|root| says(root, "cgroup.events", "frozen 1"))
        } else {
            controllers.split(',').any(|controller| controller == "freezer")
                && says(&mounted.join("freezer"), "freezer.state", "FR")
        }
    })
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
    fn every_hierarchy_is_told_once_and_no_root() {
        assert_eq!(
            parse_cgroups("4:cpu,memory:/docker/1\n3:pids:/docker/1\n1:name=systemd:/a:b\n0::/\n"),
            ["/docker/1", "/a:b"]
        );
        assert_eq!(parse_cgroups("1:name=systemd:/z\n0::/\n"), ["/z"]);
        assert_eq!(parse_cgroups("0::/x\n"), ["/x"]);
        assert!(parse_cgroups("0::/\n").is_empty());
        assert!(cgroups(Pid(i32::MAX)).unwrap_err().is_gone());
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

    #[test]
    fn frozen_by_either_kind_of_group() {
        let folder = tempfile::tempdir().unwrap();
        let write = |group: &str, file: &str, text: &str| {
            fs::create_dir_all(folder.path().join(group)).unwrap();
            fs::write(folder.path().join(group).join(file), text).unwrap();
        };
        write("a", "cgroup.events", "populated 1\nfrozen 1\n");
        write("unified/b", "cgroup.events", "populated 1\nfrozen 0\n");
        write("freezer/c", "freezer.state", "FREEZING\n");
        write("freezer/d", "freezer.state", "THAWED\n");
        let frozen = |text| frozen(text, folder.path());
        assert!(frozen("0::/a\n") && frozen("0::/b\n4:freezer:/c\n"));
        assert!(!frozen("0::/b\n4:freezer:/d\n") && !frozen("0::/nothing\n4:cpu:/c\n"));
        assert!(!is_frozen(Pid::this()).unwrap());
    }
}
