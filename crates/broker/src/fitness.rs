//! Whether a process may be merged at this moment, beyond what its memory looks like.
//!
//! Each reason is a hang that was seen, or is known from reading the kernel: a real-time thread that runs into a frozen
//! page spins on the helper's CPU; a cgroup near `memory.high` puts the helper to sleep with pages frozen, since the
//! penalty follows the address space; a storage daemon may be what its own memory's reclaim waits for.

use std::path::Path;

use kernel::cgroup_memory::MemoryLimit;
use kernel::sched::{Policy, policy};
use kernel::{Pid, cgroup_memory, status};

use crate::attendant::CHECKER;

/// Share of a memory limit that must be free.
const FREE_PERCENT: u64 = 5;
/// Files whose holders serve the host's storage or its memory.
const STORAGE: [&str; 5] = ["/dev/fuse", "/dev/nbd", "/dev/ublk", "/dev/tcmu", "/dev/uio"];

/// Why a process is left alone for now, or `None`. The word is the one that reports use.
pub(crate) fn unfit(pid: Pid) -> Option<&'static str> {
    unfit_at(pid, Path::new("/proc"), Path::new("/sys/fs/cgroup"))
}

/// The same for a process whose whole memory is managed: what could change its mappings past the gate, or follow another
/// user's rights.
pub(crate) fn unfit_whole(pid: Pid, uid: u32) -> Option<&'static str> {
    let descriptors = Path::new("/proc").join(pid.get().to_string()).join("fd");
    let named = |target: String| match target.as_str() {
        "anon_inode:[io_uring]" => Some("io_uring"),
        "anon_inode:[userfaultfd]" => Some("userfaultfd"),
        _ => None,
    };
    let held = targets(&descriptors).find_map(named);
    held.or_else(|| status::read(pid).is_ok_and(|status| status.uid.effective != uid).then_some("other_user"))
}

fn unfit_at(pid: Pid, proc: &Path, cgroups: &Path) -> Option<&'static str> {
    let threads = status::threads(pid).unwrap_or_default();
    let real_time = |tid: &Pid| is_real_time(*tid) && !(pid == Pid::this() && is_ours(proc, *tid));
    if threads.iter().any(real_time) {
        return Some("real_time_threads");
    }
    let folder = proc.join(pid.get().to_string());
    if serves_storage(&folder.join("fd")) {
        return Some("storage_daemon");
    }
    if near_limit(&folder.join("cgroup"), cgroups) {
        return Some("memory_limit_near");
    }
    None
}

/// True for the threads of a broker that lives inside the member: they touch nothing but their own memory, and the one
/// that answers reference checks must run before the helper that waits for it.
fn is_ours(proc: &Path, tid: Pid) -> bool {
    let name = std::fs::read(proc.join(format!("self/task/{}/comm", tid.get())));
    name.is_ok_and(|name| name.starts_with(CHECKER.as_bytes()))
}

fn is_real_time(tid: Pid) -> bool {
    // SCHED_FIFO 1, SCHED_RR 2, SCHED_DEADLINE 6; batch and idle are ordinary.
    match policy(tid) {
        Ok(Policy::Fifo { .. }) => true,
        Ok(Policy::Unknown(number)) => number == 2 || number == 6,
        _ => false,
    }
}

/// True if a folder of descriptors holds one of a storage device.
fn serves_storage(descriptors: &Path) -> bool {
    targets(descriptors).any(|target| STORAGE.iter().any(|device| target.starts_with(device)))
}

/// What the descriptors in a folder stand for.
fn targets(descriptors: &Path) -> impl Iterator<Item = String> {
    let entries = std::fs::read_dir(descriptors).into_iter().flatten().filter_map(Result::ok);
    let links = entries.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    links.map(|target| target.to_string_lossy().into_owned())
}

/// True if a memory cgroup of the process, at any level, has less than a twentieth of its limit left.
fn near_limit(membership: &Path, cgroups: &Path) -> bool {
    let Ok(text) = std::fs::read_to_string(membership) else { return false };
    let tight = |set: MemoryLimit| set.limit.saturating_sub(set.used).get() < set.limit.get() / 100 * FREE_PERCENT;
    cgroup_memory::limits(&text, cgroups).into_iter().any(tight)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// Tests about this very process, one at a time.
    static THIS_PROCESS: std::sync::Mutex<()> = std::sync::Mutex::new(());

    #[test]
    fn an_ordinary_process_is_fit() {
        let _one = THIS_PROCESS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        assert_eq!(unfit(Pid::this()), None);
    }

    #[test]
    fn a_real_time_thread_is_told_from_our_own() {
        let _one = THIS_PROCESS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let with = |name: &str| {
            let (tell, told) = std::sync::mpsc::channel();
            let (end, ended) = std::sync::mpsc::channel::<()>();
            let run = move || {
                let raised = kernel::sched::set_policy(Pid(0), Policy::Fifo { priority: 1 }).is_ok();
                tell.send(raised).unwrap();
                let _ = ended.recv();
            };
            let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run).unwrap();
            let seen = told.recv().unwrap().then(|| unfit(Pid::this()));
            drop(end);
            thread.join().unwrap();
            seen
        };
        let Some(other) = with("other") else {
            println!("skipped: SCHED_FIFO");
            return;
        };
        assert_eq!(other, Some("real_time_threads"));
        assert_eq!(with(CHECKER), Some(None));
    }

    #[test]
    fn holders_of_storage_devices_are_told() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!serves_storage(folder.path()));
        std::os::unix::fs::symlink("/dev/null", folder.path().join("3")).unwrap();
        assert!(!serves_storage(folder.path()));
        std::os::unix::fs::symlink("/dev/nbd0", folder.path().join("4")).unwrap();
        assert!(serves_storage(folder.path()));
    }

    #[test]
    fn a_limit_at_any_level_counts() {
        let folder = tempfile::tempdir().unwrap();
        let (membership, root) = (folder.path().join("cgroup"), folder.path().join("sys"));
        let inner = root.join("a/b");
        std::fs::create_dir_all(&inner).unwrap();
        std::fs::write(&membership, "0::/a/b\n").unwrap();
        std::fs::write(inner.join("memory.current"), "1000\n").unwrap();
        std::fs::write(inner.join("memory.high"), "max\n").unwrap();
        assert!(!near_limit(&membership, &root));
        std::fs::write(root.join("a/memory.current"), "97000\n").unwrap();
        std::fs::write(root.join("a/memory.high"), "100000\n").unwrap();
        assert!(near_limit(&membership, &root), "97 % of memory.high, one level up");
        std::fs::write(root.join("a/memory.current"), "90000\n").unwrap();
        assert!(!near_limit(&membership, &root));
    }

    #[test]
    fn the_older_hierarchy_counts_too() {
        let folder = tempfile::tempdir().unwrap();
        let (membership, root) = (folder.path().join("cgroup"), folder.path().join("sys"));
        std::fs::create_dir_all(root.join("memory/x")).unwrap();
        std::fs::write(&membership, "5:cpu:/\n4:memory:/x\n").unwrap();
        std::fs::write(root.join("memory/x/memory.usage_in_bytes"), "99000").unwrap();
        std::fs::write(root.join("memory/x/memory.limit_in_bytes"), "100000").unwrap();
        assert!(near_limit(&membership, &root));
    }
}
