//! Captures say what the processes said, and damaged ones are refused.
#![allow(clippy::unwrap_used, reason = "tests")]

mod children;

use std::time::Duration;

use children::{Mode, hold, place};
use kernel::Pid;
use pagefold_eval::{CaptureError, Options, Pace, Report, Selection, Snapshot};

#[test]
#[ignore = "what the other tests start"]
fn child() {
    children::child_main();
}

fn options(pids: &[Pid], pages: usize) -> Options {
    Options {
        selection: Selection { pids: pids.to_vec(), ..Selection::default() },
        ranges: vec![place(pages)],
        pace: Pace { threads: 2, limit: None },
        watch: Some(Duration::from_millis(300)),
        looks: 3,
        record: true,
        ..Options::default()
    }
}

/// What of a report does not depend on when and how it was read.
fn lasting(report: &Report) -> serde_json::Value {
    let mut value = serde_json::to_value(report).unwrap();
    let fields = value.as_object_mut().unwrap();
    for field in ["elapsed_seconds", "bytes_per_second", "cpu_seconds", "index_bytes", "watched_seconds", "lost_pages"]
    {
        fields.remove(field).unwrap();
    }
    value
}

#[test]
fn a_capture_says_what_the_processes_said() {
    let contents: Vec<u32> = (0..700).map(|at| at / 3).collect();
    let (quiet, busy) = (hold(&contents, Mode::Rest), hold(&contents, Mode::Rewrite));
    let options = options(&[quiet.pid(), busy.pid()], contents.len());
    let snapshot = Snapshot::take(&options, &|_| {}).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("capture.parquet");
    snapshot.write(&file).unwrap();
    let again = Snapshot::read(&file, 2).unwrap();
    let (first, second) = (snapshot.report(&options), again.report(&options));
    assert_eq!(lasting(&first), lasting(&second));
    assert_eq!(first.totals.volatile_pages, 350);
    let model = |snapshot: &Snapshot| snapshot.model(0.9, Duration::from_secs(60)).unwrap();
    let (live, read) = (model(&snapshot), model(&again));
    assert_eq!(serde_json::to_value(&live).unwrap(), serde_json::to_value(&read).unwrap());
    assert!(live.recommended.is_some() && live.bytes_reachable > 0, "{live:?}");
    assert!(std::fs::read_dir(folder.path()).unwrap().count() == 1, "something is left beside the capture");
}

#[test]
fn what_is_no_capture_is_refused() {
    let child = hold(&[1, 2, 3, 3], Mode::Rest);
    let snapshot = Snapshot::take(&options(&[child.pid()], 4), &|_| {}).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("capture.parquet");
    snapshot.write(&file).unwrap();
    let whole = std::fs::read(&file).unwrap();
    for length in [0, 3, 4, 50, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&file, &whole[..length]).unwrap();
        let error = Snapshot::read(&file, 1).err().unwrap();
        assert!(matches!(error, CaptureError::Parquet { .. }), "{length}: {error:?}");
    }
    // Every byte is flipped once: an error or an answer, never a crash.
    let mut refused = 0;
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        std::fs::write(&file, &bytes).unwrap();
        match Snapshot::read(&file, 1) {
            Ok(snapshot) => drop(snapshot.report(&options(&[child.pid()], 4))),
            Err(_) => refused += 1,
        }
    }
    assert!(refused > whole.len() / 4, "{refused} of {}", whole.len());
    let missing = Snapshot::read(&folder.path().join("none"), 1).err().unwrap();
    assert!(matches!(missing, CaptureError::Open { .. }));
    let unwritable = snapshot.write(&folder.path().join("no/such/folder")).unwrap_err();
    assert!(matches!(unwritable, CaptureError::Open { .. }));
}
