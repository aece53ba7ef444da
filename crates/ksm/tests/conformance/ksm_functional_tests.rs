//! The cases of tools/testing/selftests/mm/ksm_functional_tests.c: each about 2 MiB of one worker.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use kernel::ksm_sysfs::{ksm_stat, memory_merge, set_memory_merge};
use kernel::{Mode, Pid, Pidfd, Uffd, UffdFeatures, page_size};
use pagefold_ksm::Wanted;

use super::stand::{Host, has_duplicate_frames};
use super::worker::{DONTNEED, Memory, UNMERGEABLE, Worker};

const PAGES: u64 = 512;

/// Merges an area, which must come of it.
fn merged(host: &Host, worker: &mut Worker, byte: u8, marked: bool) -> Memory {
    let area = worker.map(PAGES, byte, marked);
    merge(host, worker.pid(), area);
    area
}

fn merge(host: &Host, pid: Pid, area: Memory) {
    let lease = host.merge(Wanted::default());
    host.scans(2);
    lease.release().unwrap();
    assert!(ksm_stat(pid).unwrap().ksm_merging_pages.unwrap() > 0, "nothing was merged");
    assert!(has_duplicate_frames(pid, area.range()));
}

#[test]
fn test_unmerge() {
    let Some(host) = Host::lock() else { return };
    let mut worker = Worker::new();
    let area = merged(&host, &mut worker, 0xcf, true);
    worker.advise(area, UNMERGEABLE);
    assert!(!has_duplicate_frames(worker.pid(), area.range()));
}

#[test]
fn test_unmerge_zero_pages() {
    let Some(host) = Host::lock() else { return };
    let mut worker = Worker::new();
    let area = worker.map(PAGES, 0, true);
    let lease = host.merge(Wanted { use_zero_pages: Some(true), ..Wanted::default() });
    host.scans(2);
    lease.release().unwrap();
    assert_eq!(worker.stat().ksm_zero_pages, Some(PAGES));
    let (first, second) = (area.part(0, PAGES / 2), area.part(PAGES / 2, PAGES / 2));
    worker.advise(first, UNMERGEABLE);
    assert_eq!(worker.stat().ksm_zero_pages, Some(PAGES / 2));
    worker.touch(second, 1);
    assert_eq!(worker.stat().ksm_zero_pages, Some(0));
    assert!(!has_duplicate_frames(worker.pid(), area.range()));
}

#[test]
fn test_unmerge_discarded() {
    let Some(host) = Host::lock() else { return };
    let mut worker = Worker::new();
    let area = merged(&host, &mut worker, 0xcf, true);
    worker.advise(area.part(0, PAGES / 2), DONTNEED);
    worker.advise(area, UNMERGEABLE);
    assert!(!has_duplicate_frames(worker.pid(), area.range()));
}

#[test]
fn test_unmerge_uffd_wp() {
    let Some(host) = Host::lock() else { return };
    let mut worker = Worker::new();
    let area = merged(&host, &mut worker, 0xcf, true);
    let number = worker.ask("userfaultfd").parse().unwrap();
    let uffd = Uffd::from_owned_fd(Pidfd::open(worker.pid()).unwrap().getfd(number).unwrap()).unwrap();
    uffd.api(UffdFeatures::PAGEFAULT_FLAG_WP).unwrap();
    uffd.register(area.range(), Mode::WP).unwrap();
    uffd.write_protect(area.range(), true).unwrap();
    worker.advise(area, UNMERGEABLE);
    assert!(!has_duplicate_frames(worker.pid(), area.range()));
    // Nobody had to answer a fault.
    assert!(!uffd.event_is_pending());
}

#[test]
fn test_prot_none() {
    let Some(host) = Host::lock() else { return };
    let mut worker = Worker::new();
    let area = worker.map(PAGES, 0x11, true);
    worker.ask(&format!("protect {} {PAGES} 0", area.start));
    merge(&host, worker.pid(), area);
    // Written as a debugger does.
    let memory = File::options().write(true).open(format!("/proc/{}/mem", worker.pid())).unwrap();
    for page in 0..PAGES / 2 {
        memory.write_all_at(&[0x12], area.start + page * page_size()).unwrap();
    }
    worker.advise(area.part(PAGES / 2, PAGES / 2), UNMERGEABLE);
    assert!(!has_duplicate_frames(worker.pid(), area.range()));
}

#[test]
fn test_prctl() {
    let own = std::env::var_os("CONFORMANCE_PRCTL").is_some();
    if !own {
        // The switch stays with a process: one of its own.
        let this = std::env::current_exe().unwrap();
        let name = "ksm_functional_tests::test_prctl";
        let output = std::process::Command::new(this)
            .args(["--exact", name, "--nocapture"])
            .env("CONFORMANCE_PRCTL", "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success() && text.contains("1 passed"), "{output:?}");
        return;
    }
    if let Err(error) = memory_merge() {
        return println!("skipped: no such prctl here ({error})");
    }
    set_memory_merge(true).unwrap();
    assert!(memory_merge().unwrap());
    assert_eq!(ksm_stat(Pid::this()).unwrap().ksm_merge_any, Some(true));
    set_memory_merge(false).unwrap();
    assert!(!memory_merge().unwrap());
}

/// What comes with `fork`, or with `exec` after it: the switch, and memory that is merged without a mark.
fn inherited(how: &str, rounds: usize) {
    let Some(host) = Host::lock() else { return };
    let mut worker = Worker::with_merging(true);
    // ksmd runs while processes exec: what is registered must not be lost on the way.
    let lease = host.merge(Wanted::default());
    for _ in 0..rounds {
        let (pid, area, switch) = worker.child(how, PAGES, 0xcf);
        assert!(switch, "the child says of itself");
        assert_eq!(ksm_stat(pid).unwrap().ksm_merge_any, Some(true));
        host.scans(2);
        assert!(has_duplicate_frames(pid, area.range()), "{how}");
    }
    lease.release().unwrap();
}

#[test]
fn test_prctl_fork() {
    inherited("fork", 1);
}

#[test]
fn test_prctl_fork_exec() {
    inherited("exec", 10);
}

#[test]
fn test_prctl_unmerge() {
    let Some(host) = Host::lock() else { return };
    let mut worker = Worker::with_merging(true);
    let area = merged(&host, &mut worker, 0xcf, false);
    assert_eq!(worker.ask("prctl 0"), "0");
    assert!(!has_duplicate_frames(worker.pid(), area.range()));
}

#[test]
fn test_fork_ksm_merging_page_count() {
    let Some(host) = Host::lock() else { return };
    let mut worker = Worker::new();
    let area = merged(&host, &mut worker, 0xcf, true);
    let child = worker.forked();
    assert_eq!(ksm_stat(child).unwrap().ksm_merging_pages, Some(0));
    // It has them all the same.
    assert!(has_duplicate_frames(child, area.range()));
}
