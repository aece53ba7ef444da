//! The way back.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kernel::ksm_sysfs::ksm_stat;
use kernel::{Pid, page_size};

use crate::host::{Host, all, json, merge, merged_pages, pagefold, text, wait_until, write};
use crate::target::Target;

fn marked(pid: Pid) -> usize {
    kernel::smaps::read(pid).unwrap().iter().filter(|vma| vma.flags.mergeable()).count()
}

#[test]
fn merged_pages_become_a_processs_own_again_in_steps() {
    let Some(_host) = Host::lock() else { return };
    let mut target = Target::start();
    let range = target.hold(8192, 2, 41);
    assert!(merge(target.pid(), range).arg("--quiet").status().unwrap().success());
    assert_eq!(merged_pages(target.pid()), 8192);
    // First a part of it.
    let half = kernel::Range::from_pages(range.start(), kernel::PageCount(4096)).unwrap();
    let (status, found) = json(pagefold("unmerge", target.pid()).args(["--range", &half.to_string(), "--step", "4"]));
    assert_eq!((status, found["end"].as_str()), (Some(0), Some("done")), "{found:#}");
    let process = &found["processes"][0];
    assert_eq!((process["pages_unmerged"].as_u64(), process["stops"].as_u64()), (Some(4096), Some(4)), "{found:#}");
    assert_eq!((merged_pages(target.pid()), marked(target.pid())), (4096, 1));
    let (status, found) = json(&mut pagefold("unmerge", target.pid()));
    assert_eq!((status, merged_pages(target.pid()), marked(target.pid())), (Some(0), 0, 0), "{found:#}");
    assert_eq!(target.wrong_words(), 0);
}

#[test]
fn the_switch_of_the_whole_process_stays_unless_all_is_asked_for() {
    let Some(_host) = Host::lock() else { return };
    let mut by = Command::new("python3");
    let script = "import ctypes, os, sys; assert ctypes.CDLL(None).prctl(67, 1, 0, 0, 0) == 0; os.execv(sys.argv[1], sys.argv[1:])";
    by.args(["-c", script]).arg(std::env::current_exe().unwrap());
    let mut target = Target::start_by(by);
    let range = target.hold(1024, 2, 42);
    assert!(merge(target.pid(), range).arg("--quiet").status().unwrap().success());
    let Some(true) = ksm_stat(target.pid()).unwrap().ksm_merge_any else {
        return println!("skipped: ksm_merge_any (Linux 6.16)");
    };
    let output = pagefold("unmerge", target.pid()).output().unwrap();
    assert!(output.status.success() && text(&output.stderr).contains("--all"), "{}", all(&output));
    assert_eq!((merged_pages(target.pid()), marked(target.pid())), (0, 0));
    target.hold(16, 2, 43);
    assert!(marked(target.pid()) > 0, "new memory is marked by itself");
    let output = pagefold("unmerge", target.pid()).arg("--all").output().unwrap();
    assert!(output.status.success() && !text(&output.stderr).contains("--all"), "{}", all(&output));
    target.hold(16, 2, 44);
    assert_eq!((ksm_stat(target.pid()).unwrap().ksm_merge_any, marked(target.pid())), (Some(false), 0));
    assert_eq!(target.wrong_words(), 0);
}

/// A memory control group of its own, gone with the test.
struct Group(PathBuf);

impl Group {
    fn new() -> Option<Self> {
        let (unified, older) = (Path::new("/sys/fs/cgroup"), Path::new("/sys/fs/cgroup/memory"));
        let root = if older.join("memory.limit_in_bytes").exists() { older } else { unified };
        if root == unified {
            // Fails where it is on already, or cannot be had.
            let _ = fs::write(unified.join("cgroup.subtree_control"), "+memory");
        }
        let folder = root.join(format!("pagefold-unmerge-{}", std::process::id()));
        fs::create_dir(&folder).ok()?;
        let group = Self(folder);
        (group.limit_file().exists()).then_some(group)
    }

    fn limit_file(&self) -> PathBuf {
        let older = self.0.join("memory.limit_in_bytes");
        if older.exists() { older } else { self.0.join("memory.max") }
    }

    fn used(&self) -> u64 {
        let older = self.0.join("memory.usage_in_bytes");
        let file = if older.exists() { older } else { self.0.join("memory.current") };
        fs::read_to_string(file).unwrap().trim().parse().unwrap()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        wait_until("the group is empty", || fs::remove_dir(&self.0).is_ok());
    }
}

#[test]
fn short_of_memory_it_stops_before_the_oom_killer_and_goes_on_later() {
    let Some(_host) = Host::lock() else { return };
    let Some(group) = Group::new() else { return println!("skipped: a memory cgroup") };
    let mut target = Target::start();
    write(&group.0.join("cgroup.procs"), &target.pid().to_string());
    let range = target.hold(16_384, 64, 45);
    assert!(merge(target.pid(), range).arg("--quiet").status().unwrap().success());
    assert_eq!(merged_pages(target.pid()), 16_384);
    wait_until("merged pages are not charged any more", || group.used() < 32 << 20);
    // Room for a part of the 64 MiB.
    let limit = group.used() + (24 << 20);
    write(&group.limit_file(), &limit.to_string());
    let output = pagefold("unmerge", target.pid()).args(["--step", "4"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", all(&output));
    let said = text(&output.stderr);
    assert!(said.contains("before memory runs out") && said.contains("pagefold-unmerge"), "{}", all(&output));
    let left = merged_pages(target.pid());
    assert!(left < 16_384 && left > 8192, "{left} pages are still merged: {}", all(&output));
    assert_eq!(target.wrong_words(), 0, "it lives");
    write(&group.limit_file(), &(limit + 16_384 * page_size()).to_string());
    let (status, found) = json(&mut pagefold("unmerge", target.pid()));
    assert_eq!((status, merged_pages(target.pid())), (Some(0), 0), "{found:#}");
    assert_eq!(found["processes"][0]["pages_unmerged"], left, "it goes on where it was: {found:#}");
    assert_eq!(target.wrong_words(), 0);
}

/// Seen to fail: every page whose mark was taken off was counted as un-merged, and by a root without the right none was.
#[test]
fn who_may_not_see_frames_does_not_say_how_many_were_unmerged() {
    let Some(_host) = Host::lock() else { return };
    let mut target = Target::start();
    let range = target.hold(512, 2, 47);
    assert!(merge(target.pid(), range).arg("--quiet").status().unwrap().success());
    let without = |word: &str| {
        let mut command = Command::new("setpriv");
        command.args(["--bounding-set=-sys_admin", "--inh-caps=-sys_admin", env!("CARGO_BIN_EXE_pagefold")]);
        command.args([word, "--pid", &target.pid().to_string()]);
        command
    };
    let refused = without("merge").args(["--backend", "ksm"]).output();
    let Some(refused) = refused.ok().filter(|output| !text(&output.stderr).contains("setpriv:")) else {
        return println!("skipped: setpriv as root");
    };
    assert_eq!(refused.status.code(), Some(3), "{}", all(&refused));
    let (status, found) = json(&mut without("unmerge"));
    assert_eq!((status, merged_pages(target.pid()), marked(target.pid())), (Some(0), 0, 0), "{found:#}");
    let process = &found["processes"][0];
    assert!(process["pages_unmerged"].is_null() && process["bytes_unmarked"] == 512 * page_size(), "{found:#}");
    let again = without("unmerge").output().unwrap();
    assert!(text(&again.stderr).contains("unknown"), "{}", all(&again));
    assert_eq!(target.wrong_words(), 0);
}

#[test]
fn the_whole_host_is_unmerged_only_when_asked_for_and_not_under_a_lease() {
    let Some(host) = Host::lock() else { return };
    let mut target = Target::start();
    let range = target.hold(2048, 2, 46);
    assert!(merge(target.pid(), range).arg("--quiet").status().unwrap().success());
    let sysfs = ksm::KsmSysfs::host();
    let lease = ksm::Lease::acquire(&sysfs, ksm::Wanted::default()).unwrap();
    let refused = Command::new(env!("CARGO_BIN_EXE_pagefold")).args(["unmerge", "--host"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "{}", all(&refused));
    assert!(text(&refused.stderr).contains(&format!("({})", std::process::id())), "{}", all(&refused));
    assert_eq!(merged_pages(target.pid()), 2048);
    lease.release().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagefold"));
    let (status, found) = json(command.args(["unmerge", "--host"]));
    assert_eq!((status, found["run"].as_u64()), (Some(0), Some(2)), "{found:#}");
    assert!(found["pages_unmerged"].as_u64().unwrap() >= 1024, "{found:#}");
    assert_eq!(sysfs.number("run").unwrap(), Some(2));
    assert_eq!((merged_pages(target.pid()), target.wrong_words()), (0, 0));
    // Gives back what is recorded of before.
    assert!(Command::new(env!("CARGO_BIN_EXE_pagefold")).args(["ksm", "restore"]).output().unwrap().status.success());
    assert_eq!(crate::host::settings(), host.before);
}
