//! The memory limits of the control groups that a process is in.

use std::fs;
use std::path::{Path, PathBuf};

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
}

/// The limit that a process is nearest to, of all levels of its groups; `None` without any, or where the groups are not
/// mounted.
///
/// # Errors
/// [`ProcError`] if its groups cannot be read.
pub fn nearest_limit(pid: Pid) -> Result<Option<MemoryLimit>, ProcError> {
    let mut buffer = Vec::new();
    procfs::read_into(pid, "cgroup", &mut buffer)?;
    Ok(nearest(&String::from_utf8_lossy(&buffer), Path::new("/sys/fs/cgroup")))
}

fn nearest(membership: &str, mounted: &Path) -> Option<MemoryLimit> {
    limits(membership, mounted).into_iter().max_by_key(MemoryLimit::percent)
}

/// A limit above this is cgroup v1's way to say that there is none (mm/page_counter.h, `PAGE_COUNTER_MAX`).
const NO_LIMIT: u64 = 1 << 62;

/// All limits that hold for a member, of all levels. `membership`: what its /proc/PID/cgroup says; `mounted`: where the
/// groups are, /sys/fs/cgroup.
#[must_use]
pub fn limits(membership: &str, mounted: &Path) -> Vec<MemoryLimit> {
    let groups = membership.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let mut all = Vec::new();
    for (controllers, path) in groups {
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
        let found = nearest("0::/outer/inner\n", tree.path()).unwrap();
        assert_eq!(found.file, tree.path().join("outer/memory.high"));
        assert_eq!((found.limit, found.used, found.percent()), (Bytes(2000), Bytes(1900), 95));
        assert_eq!(nearest("0::/elsewhere\n", tree.path()), None);
        let v1 = tree.path().join("memory/group");
        fs::create_dir_all(&v1).unwrap();
        write(&v1, &[("memory.limit_in_bytes", "9223372036854771712\n"), ("memory.usage_in_bytes", "5\n")]);
        assert_eq!(nearest("5:cpu,memory:/group\n", tree.path()), None, "no limit in cgroup v1's words");
        write(&v1, &[("memory.limit_in_bytes", "10\n")]);
        assert_eq!(nearest("5:cpu,memory:/group\n", tree.path()).unwrap().percent(), 50);
    }

    #[test]
    fn our_own_groups_can_be_read() {
        if let Some(limit) = nearest_limit(Pid::this()).unwrap() {
            assert!(limit.limit > Bytes(0) && limit.file.is_absolute(), "{limit:?}");
        }
        assert!(nearest_limit(Pid(i32::MAX)).unwrap_err().is_gone());
    }
}
