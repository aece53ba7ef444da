//! Guests under `pagefold run` for about a minute: disturbed from outside, and with another user of their memory.
//! `PAGEFOLD_BINARY` names a binary to test instead of one built here.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use bench::guest::{Fleet, GuestOptions, Kernel, check_initramfs};
use bench::vm::{Phase, VmCommand};
use clap::Parser;
use serde_json::{Value, json};

/// Longest wait for anything that a guest does; the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(300);

/// Guests take a processor each: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// The guests' kernel and the binary, or a word on what is missing.
fn fixtures() -> Option<(Kernel, PathBuf)> {
    for (program, argument) in [("qemu-system-x86_64", "--version"), ("busybox", "true"), ("xz", "--version")] {
        if !Command::new(program).arg(argument).output().is_ok_and(|output| output.status.success()) {
            println!("skipped: no {program}");
            return None;
        }
    }
    if let Err(missing) = kernel::probe::Features::probe().live_merge() {
        println!("skipped: {missing}");
        return None;
    }
    let kernel = match Kernel::of_series("6.1") {
        Ok(kernel) => kernel,
        Err(error) => {
            println!("skipped: {error:#}");
            return None;
        }
    };
    if let Some(given) = std::env::var_os("PAGEFOLD_BINARY") {
        return Some((kernel, given.into()));
    }
    // Cargo builds the binaries of this package for its tests, but not those of another.
    let built = Command::new(env!("CARGO")).args(["build", "-q", "-p", "pagefold-cli"]).status().unwrap();
    assert!(built.success());
    let own = std::env::current_exe().unwrap();
    let debug = own.ancestors().skip(1).map(|folder| folder.join("pagefold")).find(|file| file.is_file());
    Some((kernel, debug.unwrap()))
}

#[derive(Parser)]
struct Words {
    #[command(flatten)]
    command: VmCommand,
}

#[test]
fn disturbed_guests_stay_right_and_share_memory() {
    let _alone = ALONE.lock();
    let Some((_, pagefold)) = fixtures() else { return };
    let mut command = Words::parse_from(["vm", "--short", "--disturb"]).command;
    command.phases = vec![Phase::Pagefold];
    command.pagefold = Some(pagefold);
    let (report, right) = command.measure().unwrap();
    let sample = &report.samples[0];
    assert!(right, "{sample:#}");
    let number = |pointer: &str| sample.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
    assert!(number("/checks") > 20 && number("/rounds_ok") > 2, "{sample:#}");
    assert!(number("/summary/merges") > 2_000, "{sample:#}");
    let disturbed: u64 = sample["disturbed"].as_object().unwrap().values().filter_map(Value::as_u64).sum();
    assert!(disturbed > 3, "{sample:#}");
}

/// Starts one checking guest, with more arguments for QEMU.
fn start(kernel: &Kernel, folder: &Path, initramfs: &Path, name: &str, prefix: &[OsString], more: &[&str]) -> Fleet {
    let mut options = GuestOptions::new(name, kernel, initramfs);
    options.append = "check.mib=32".to_owned();
    options.arguments = more.iter().map(OsString::from).collect();
    Fleet::start(prefix, folder, vec![options]).unwrap()
}

/// QEMU writes the guest's state to a file while the guest goes on: it write-protects the guest's memory through a
/// userfaultfd of its own.
fn snapshot(fleet: &Fleet, file: &Path) -> Value {
    let mut qmp = fleet.guests[0].qmp().unwrap();
    let capability = json!([{ "capability": "background-snapshot", "state": true }]);
    qmp.execute("migrate-set-capabilities", &json!({ "capabilities": capability })).unwrap();
    // The default of 32 MiB/s is for networks.
    qmp.execute("migrate-set-parameters", &json!({ "max-bandwidth": 1_u64 << 32 })).unwrap();
    qmp.execute("migrate", &json!({ "uri": format!("exec:cat > '{}'", file.display()) })).unwrap();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let state = qmp.execute("query-migrate", &json!({})).unwrap();
        match state["status"].as_str() {
            Some("completed") => return state,
            Some("failed" | "cancelled") => panic!("{state:#}"),
            _ if Instant::now() > deadline => panic!("{state:#}"),
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

#[test]
fn a_background_snapshot_gets_merged_memory_back_first() {
    let _alone = ALONE.lock();
    let Some((kernel, pagefold)) = fixtures() else { return };
    let folder = tempfile::Builder::new().prefix("snap").tempdir().unwrap();
    let (initramfs, summary) = (folder.path().join("initramfs"), folder.path().join("summary"));
    check_initramfs(&kernel, &initramfs).unwrap();
    let mut prefix: Vec<OsString> = vec![pagefold.into(), "run".into(), "--stable".into(), "1".into()];
    prefix.extend(["--summary".into(), summary.clone().into(), "--".into()]);
    let mut fleet = start(&kernel, folder.path(), &initramfs, "one", &prefix, &[]);
    fleet.wait_ready(PATIENCE).unwrap();
    let read = || -> Value { serde_json::from_slice(&std::fs::read(&summary).unwrap()).unwrap_or_default() };
    let deadline = Instant::now() + PATIENCE;
    while read()["pages_sharing"].as_u64().unwrap_or(0) < 500 {
        assert!(Instant::now() < deadline, "{:#}", read());
        std::thread::sleep(Duration::from_millis(200));
    }

    let file = folder.path().join("snapshot");
    snapshot(&fleet, &file);
    let verdicts = fleet.verdicts(PATIENCE).unwrap();
    assert!(verdicts[0].ok && verdicts[0].bad == 0, "{verdicts:?}");
    assert!(fleet.stop(PATIENCE).unwrap().success());

    // What was written is the guest as it was: it goes on from there, and its files have their sums.
    let incoming = format!("exec:cat '{}'", file.display());
    let mut fleet = start(&kernel, folder.path(), &initramfs, "two", &[], &["-incoming", &incoming]);
    fleet.guests[0].wait(PATIENCE, |checks| (checks.rounds_ok > 0).then_some(())).unwrap();
    let verdicts = fleet.verdicts(PATIENCE).unwrap();
    assert!(verdicts[0].ok && verdicts[0].bad == 0, "{verdicts:?}");
    assert!(fleet.stop(PATIENCE).unwrap().success());
}
