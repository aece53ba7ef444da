//! The memory limits of the control groups that a process is in.

use std::fs;
use std::path::{Path, PathBuf};

use crate::membership::hierarchies;
use crate::procfs::{self, ProcError};
use crate::units::{Bytes, Pid};

/// A limit on the memory of a process and of the others in its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryLimit {
    /// The file that sets it: `memory.high` or `memory.max`, or `memory.limit_in_bytes` of cgroup v1.
    pub file: PathBuf,
    /// The limit.
    pub limit: Bytes,
    /// What its group and those below have in memory.
    pub used: Bytes,
}

impl MemoryLimit {
    /// Percent of the limit that are in use, over 100 for a `memory.high` that is exceeded.
    #[must_use]
    pub fn percent(&self) -> u64 {
        u64::try_from(u128::from(self.used.0) * 100 / u128::from(self.limit.0.max(1))).unwrap_or(u64::MAX)
    }

    /// What of `used` is page cache, which the kernel drops before it keeps the group from growing. 0 if it does not say.
    #[must_use]
    pub fn file_cache(&self) -> Bytes {
        let text = fs::read_to_string(self.file.with_file_name("memory.stat")).unwrap_or_default();
        let values = |names: [&str; 2]| -> u64 {
            let lines = text.lines().filter_map(|line| line.split_once(' '));
            lines.filter(|(name, _)| names.contains(name)).filter_map(|(_, value)| value.parse::<u64>().ok()).sum()
        };
        // cgroup v1 counts the groups below apart; there the first two are the group's own.
        let below = values(["total_active_file", "total_inactive_file"]);
        Bytes(if below > 0 { below } else { values(["active_file", "inactive_file"]) }.min(self.used.0))
    }
}

/// The limit that a process is nearest to, of all levels of its groups; `None` without any, or where the groups are not
/// mounted.
///
/// # Errors
/// [`ProcError`] if its groups cannot be read.
pub fn nearest_limit(pid: Pid) -> Result<Option<MemoryLimit>, ProcError> {
    Ok(nearest(limits_of(pid)?))
}

/// All limits that hold for a process, of all levels of its groups.
///
/// # Errors
/// [`ProcError`] if its groups cannot be read.
pub fn limits_of(pid: Pid) -> Result<Vec<MemoryLimit>, ProcError> {
    let mut buffer = Vec::new();
    procfs::read_into(pid, "cgroup", &mut buffer)?;
    Ok(limits(&String::from_utf8_lossy(&buffer), Path::new("/sys/fs/cgroup")))
}

fn nearest(limits: Vec<MemoryLimit>) -> Option<MemoryLimit> {
    limits.into_iter().max_by_key(MemoryLimit::percent)
}

/// How much memory a process may still take before a limit of its groups is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// The limit that leaves the least.
    pub limit: MemoryLimit,
    /// What it leaves, with what the kernel would get back by dropping pages of files.
    pub room: Bytes,
}

/// The limit that leaves a process the least room, of all levels of its groups; `None` without any, or where the groups
/// are not mounted.
///
/// # Errors
/// [`ProcError`] if its groups cannot be read.
pub fn least_room(pid: Pid) -> Result<Option<Room>, ProcError> {
    Ok(least(limits_of(pid)?))
}

fn least(limits: Vec<MemoryLimit>) -> Option<Room> {
    let room = |limit: MemoryLimit| {
        let room = limit.limit.saturating_sub(limit.used.saturating_sub(limit.file_cache()));
        Room { limit, room }
    };
    limits.into_iter().map(room).min_by_key(|room| room.room)
}

/// A limit above this is cgroup v1's way to say that there is none (mm/page_counter.h, `PAGE_COUNTER_MAX`).
const NO_LIMIT: u64 = 1 << 62;

/// All limits that hold for a member, of all levels. `membership`: what its /proc/PID/cgroup says; `mounted`: where the
/// groups are, /sys/fs/cgroup.
#[must_use]
pub fn limits(membership: &str, mounted: &Path) -> Vec<MemoryLimit> {
    let mut all = Vec::new();
    for (controllers, path) in hierarchies(membership) {
        let path = path.trim_start_matches('/');
        if controllers.is_empty() {
            for root in [mounted.to_owned(), mounted.join("unified")] {
                levels(&root, path, &["memory.high", "memory.max"], "memory.current", &mut all);
            }
        } else if controllers.split(',').any(|controller| controller == "memory") {
            levels(&mounted.join("memory"), path, &["memory.limit_in_bytes"], "memory.usage_in_bytes", &mut all);
        }
    }
    all
}

/// The limits of a group and of those above it.
fn levels(root: &Path, path: &str, limits: &[&str], usage: &str, out: &mut Vec<MemoryLimit>) {
    let mut folder = root.join(path);
    while folder.starts_with(root) {
        if let Some(used) = number(&folder.join(usage)) {
            let set = limits.iter().map(|name| folder.join(name)).filter_map(|file| Some((number(&file)?, file)));
            out.extend(set.filter(|(limit, _)| *limit < NO_LIMIT).map(|(limit, file)| MemoryLimit {
                file,
                limit: Bytes(limit),
                used: Bytes(used),
            }));
        }
        if !folder.pop() {
            return;
        }
    }
}

/// The number in a file; `None` for `max` and for files that are not there.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_tightest_of_all_levels_counts() {
        let tree = tempfile::tempdir().unwrap();
        let inner = tree.path().join("outer/inner");
        fs::create_dir_all(&inner).unwrap();
        let write = |folder: &Path, files: &[(&str, &str)]| {
            files.iter().for_each(|(name, text)| fs::write(folder.join(name), text).unwrap());
        };
        write(&inner, &[("memory.high", "max\n"), ("memory.max", "1000\n"), ("memory.current", "500\n")]);
        write(inner.parent().unwrap(), &[("memory.high", "2000\n"), ("memory.current", "1900\n")]);
        let found = nearest(limits("0::/outer/inner\n", tree.path())).unwrap();
        assert_eq!(found.file, tree.path().join("outer/memory.high"));
        assert_eq!((found.limit, found.used, found.percent()), (Bytes(2000), Bytes(1900), 95));
        assert_eq!(nearest(limits("0::/elsewhere\n", tree.path())), None);
        let room = least(limits("0::/outer/inner\n", tree.path())).unwrap();
        assert_eq!((room.limit.file, room.room), (tree.path().join("outer/memory.high"), Bytes(100)));
        write(inner.parent().unwrap(), &[("memory.stat", "anon 3\ninactive_file 700\n")]);
        let room = least(limits("0::/outer/inner\n", tree.path())).unwrap();
        assert_eq!((room.limit.file, room.room), (inner.join("memory.max"), Bytes(500)));
        fs::remove_file(tree.path().join("outer/memory.stat")).unwrap();
        let v1 = tree.path().join("memory/group");
        fs::create_dir_all(&v1).unwrap();
        write(&v1, &[("memory.limit_in_bytes", "9223372036854771712\n"), ("memory.usage_in_bytes", "5\n")]);
        assert_eq!(nearest(limits("5:cpu,memory:/group\n", tree.path())), None, "no limit in cgroup v1's words");
        write(&v1, &[("memory.limit_in_bytes", "10\n")]);
        assert_eq!(nearest(limits("5:cpu,memory:/group\n", tree.path())).unwrap().percent(), 50);
        write(&v1, &[("memory.stat", "cache 9\nactive_file 1\ntotal_active_file 1\ntotal_inactive_file 2\n")]);
        assert_eq!(nearest(limits("5:cpu,memory:/group\n", tree.path())).unwrap().file_cache(), Bytes(3));
        write(&inner, &[("memory.stat", "active_file 100\ninactive_file 7000\n")]);
        let inner = nearest(limits("0::/outer/inner\n", tree.path())).unwrap();
        assert_eq!(inner.file_cache(), Bytes(0), "the outer group's file says nothing");
        assert_eq!(limits("0::/outer/inner\n", tree.path())[0].file_cache(), Bytes(500), "no more than is used");
    }

    #[test]
    fn our_own_groups_can_be_read() {
        if let Some(limit) = nearest_limit(Pid::this()).unwrap() {
            assert!(limit.limit > Bytes(0) && limit.file.is_absolute(), "{limit:?}");
        }
        assert!(nearest_limit(Pid(i32::MAX)).unwrap_err().is_gone());
    }
}
