//! Guests that really boot.
#![allow(clippy::unwrap_used, reason = "tests")]

mod kernels;

use std::fs::{OpenOptions, Permissions};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use bench::guest::{DISK, Fleet, GuestFile, GuestOptions, check_initramfs, run_inside};
use kernels::kernel;

const MINUTES: Duration = Duration::from_secs(60);

#[test]
fn a_program_runs_on_other_kernels() {
    for series in ["6.1", "6.12"] {
        let Some(kernel) = kernel(series) else { continue };
        let files = [GuestFile { path: "/bin/od".to_owned(), from: "/usr/bin/od".into() }];
        // A dynamic program of this host, what it says, and its status.
        let output = run_inside(&kernel, &[], &files, &["/bin/od", "-c", "/nothing"], MINUTES).unwrap();
        assert_eq!(output.status, Some(1), "{output:?}");
        assert!(output.text.contains("No such file"), "{output:?}");
        let script = "uname -r; id -u; grep -c cgroup2 /proc/mounts; ls /dev/userfaultfd; kill -9 $$";
        let output = run_inside(&kernel, &[], &[], &["/bin/sh", "-c", script], MINUTES).unwrap();
        let expected = format!("{}\n0\n1\n/dev/userfaultfd\n", kernel.release);
        assert!(output.text.starts_with(&expected), "{} {}", output.text, output.console);
        assert_eq!(output.status, Some(128 + 9));
        println!("{}: {:?}", kernel.release, output.elapsed);
    }
}

#[test]
fn a_program_that_does_not_end_has_no_status() {
    let Some(kernel) = kernel("6.1") else { return };
    let command = ["/bin/sh", "-c", "echo begun; sleep 1000"];
    let output = run_inside(&kernel, &[], &[], &command, Duration::from_secs(12)).unwrap();
    assert_eq!((output.status, output.text.trim()), (None, "begun"));
}

/// QEMU's emulation may stop before a guest's kernel has said a word. Here the first one is stopped on purpose.
#[test]
fn a_guest_that_stands_still_starts_once_more() {
    if kernel("6.1").is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let emulator = folder.path().join("qemu-system-x86_64");
    let script = "#!/bin/sh\nPATH=${PATH#*:}\n[ -e \"$0.began\" ] || set -- -S \"$@\"\n: > \"$0.began\"\nexec qemu-system-x86_64 \"$@\"\n";
    std::fs::write(&emulator, script).unwrap();
    std::fs::set_permissions(&emulator, Permissions::from_mode(0o755)).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args(["guest", "run", "--kernel", "6.1", "--timeout", "20", "/bin/echo", "at last"])
        .env("PATH", format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap()))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && output.stdout == b"at last\n", "{output:?}");
    assert!(said.contains("it starts once more"), "{said}");
}

#[test]
fn a_guest_checks_its_memory_and_its_disk() {
    let Some(kernel) = kernel("6.1") else { return };
    let folder = tempfile::tempdir().unwrap();
    let initramfs = folder.path().join("initramfs");
    check_initramfs(&kernel, &initramfs).unwrap();
    let disk = folder.path().join("disk");
    std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    let mut options = GuestOptions::new("one", &kernel, &initramfs);
    options.append = "check.mib=32 check.pause=0".to_owned();
    options.disk = Some(disk.clone());
    let mut fleet = Fleet::start(&["env".into(), "FLEET=1".into()], folder.path(), vec![options]).unwrap();
    fleet.wait_ready(MINUTES).unwrap();
    let verdicts = fleet.verdicts(MINUTES).unwrap();
    assert!(verdicts[0].ok && verdicts[0].rounds >= 2 && verdicts[0].bad == 0, "{verdicts:?}");
    let checks = fleet.guests[0].checks().unwrap();
    assert!(checks.bad.is_empty() && checks.mib >= 20, "{checks:?}");

    let mut qmp = fleet.guests[0].qmp().unwrap();
    qmp.balloon(240).unwrap();
    let shrunk = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(100));
        qmp.balloon_size().unwrap() <= 240
    });
    assert!(shrunk, "the balloon took nothing");

    // The check must be able to fail: wrong bytes in its memory...
    let pid = fleet.guests[0].pid().unwrap();
    assert!(spoil(pid, 256 << 20) > 0, "no page of the repeated text in the guest's memory");
    let bad = fleet.guests[0].wait(MINUTES, |checks| checks.bad.first().cloned()).unwrap();
    assert!(bad.contains("file=text"), "{bad}");
    // ... and on its disk.
    let written = written_blocks(&disk);
    assert!(written > 0, "nothing reached the disk");
    std::fs::write(&disk, vec![0xee; 64 << 20]).unwrap();
    fleet.guests[0].wait(MINUTES, |checks| checks.bad.iter().find(|line| line.contains("disk")).cloned()).unwrap();
    let verdicts = fleet.verdicts(MINUTES).unwrap();
    assert!(!verdicts[0].ok && verdicts[0].bad > 0, "{verdicts:?}");
    drop(qmp);
    assert!(fleet.stop(MINUTES).unwrap().success());
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

/// Changes one byte in each copy of a text in QEMU's mapping of this size, the guest's memory.
fn spoil(pid: u32, size: u64) -> usize {
    let text = b"a line that is repeated, and so are the pages that it fills, from some page on\n".repeat(3);
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let range = maps.lines().find_map(|line| {
        let (from, to) = line.split_once(' ')?.0.split_once('-')?;
        let (from, to) = (u64::from_str_radix(from, 16).ok()?, u64::from_str_radix(to, 16).ok()?);
        (to - from == size).then_some(from..to)
    });
    let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
    let mut spoilt = 0;
    let mut page = vec![0; 1 << 16];
    for at in range.unwrap().step_by(page.len()) {
        memory.read_exact_at(&mut page, at).unwrap();
        if let Some(found) = page.windows(text.len()).position(|window| window == text) {
            memory.write_all_at(b"A", at + found as u64).unwrap();
            spoilt += 1;
        }
    }
    spoilt
}

/// Blocks of 1 MiB that hold anything.
fn written_blocks(disk: &Path) -> usize {
    std::fs::read(disk).unwrap().chunks(1 << 20).filter(|block| block.iter().any(|byte| *byte != 0)).count()
}

#[test]
fn a_guest_that_is_killed_is_not_waited_for() {
    let Some(kernel) = kernel("6.1") else { return };
    let folder = tempfile::tempdir().unwrap();
    let initramfs = folder.path().join("initramfs");
    check_initramfs(&kernel, &initramfs).unwrap();
    let mut fleet = Fleet::start(&[], folder.path(), vec![GuestOptions::new("one", &kernel, &initramfs)]).unwrap();
    let pid = loop {
        match fleet.guests[0].pid() {
            Ok(pid) => break pid,
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let error = fleet.wait_ready(MINUTES).unwrap_err();
    assert!(error.to_string().starts_with("guest one ended"), "{error}");
}

#[test]
fn dropping_a_fleet_leaves_no_guest_behind() {
    let Some(kernel) = kernel("6.1") else { return };
    let folder = tempfile::tempdir().unwrap();
    let initramfs = folder.path().join("initramfs");
    check_initramfs(&kernel, &initramfs).unwrap();
    let options = ["a", "b"].map(|name| GuestOptions::new(name, &kernel, &initramfs));
    let mut fleet = Fleet::start(&[], folder.path(), options.to_vec()).unwrap();
    let mut pids = Vec::new();
    while pids.len() < 2 {
        std::thread::sleep(Duration::from_millis(20));
        pids = fleet.guests.iter_mut().filter_map(|guest| guest.pid().ok()).collect();
    }
    drop(fleet);
    for pid in pids {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        assert!(state.is_empty() || state.contains(") Z "), "{state}");
    }
}

#[test]
fn modules_are_loaded() {
    for series in ["6.1", "6.12"] {
        let Some(kernel) = kernel(series) else { continue };
        let names = [DISK, bench::guest::NFS].concat();
        let script = "for m in virtio_blk virtio_balloon nfsd nfsv4; do [ -d /sys/module/$m ] || echo no $m; done";
        let output = run_inside(&kernel, &names, &[], &["/bin/sh", "-c", script], MINUTES).unwrap();
        assert_eq!((output.status, output.text.as_str()), (Some(0), ""), "{}", output.console);
    }
}
