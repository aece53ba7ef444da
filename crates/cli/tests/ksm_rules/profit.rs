//! What does not pay is let go.

use std::process::{Command, Stdio};

use kernel::{Bytes, KsmSysfs, Signal};

use crate::stand::{Running, Stand, Undone, Watching, lock, until};

/// ksmd at work, with the administrator's settings put back at the end.
struct Ksmd(Vec<(&'static str, String)>);

impl Ksmd {
    fn start() -> Self {
        let sysfs = KsmSysfs::host();
        let before = sysfs.knobs().unwrap();
        let ksmd = Self(before);
        for (name, value) in
            [("advisor_mode", "none"), ("pages_to_scan", "20000"), ("sleep_millisecs", "10"), ("run", "1")]
        {
            if sysfs.read(name).unwrap().is_some() {
                sysfs.write(name, value).unwrap();
            }
        }
        ksmd
    }
}

impl Drop for Ksmd {
    fn drop(&mut self) {
        for (name, value) in &self.0 {
            let _ = KsmSysfs::host().write(name, value);
        }
    }
}

/// A process with 32 MiB of pages from a device, and nearly nothing else: `dd` with a block that nobody takes from it.
fn worker(stand: &Stand, name: &str, device: &str) -> Running {
    let program = stand.copy("/usr/bin/dd", name);
    let mut command = Command::new(program);
    command.args([&format!("if={device}"), "bs=32M", "iflag=fullblock"]).stderr(Stdio::null());
    let running = Running::start(&mut command, name);
    until("it has read its block", || {
        let status = kernel::status::read(running.pid()).unwrap();
        (status.rss_anon >= Bytes::from_mib(32) && status.state == b'S').then_some(())
    });
    running
}

#[test]
fn a_process_of_unique_pages_is_dropped_and_tried_again_and_one_that_pays_is_kept() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let unique = worker(&stand, "unique", "/dev/urandom");
    let equal = worker(&stand, "equal", "/dev/zero");
    let file = stand.write(
        "[profit]\npasses = 4\nloss = \"64KiB\"\nretry = \"1s\"\nretry_most = \"2s\"\n\
         [[rule]]\nmatch = { exe = \"DIR/*\" }\naction = \"enable\"\n",
    );
    let _ksmd = Ksmd::start();
    let watching = Watching::start(&stand, &file, &["--json"]);
    let dropped = format!("dropped {} (unique): merging it has lost ", unique.pid());
    watching.says(&dropped);
    assert!(watching.log().contains("tried again in 1 s"), "{}", watching.log());
    // Twice the time, and no more than the most.
    until("it was dropped three times", || (watching.log().matches(&dropped).count() >= 3).then_some(()));
    assert_eq!(watching.log().matches("tried again in 2 s").count(), 2, "{}", watching.log());
    assert_eq!(watching.log().matches(&format!("enabled {} (unique)", unique.pid())).count(), 3);
    until("nothing of it is merged", || (!unique.is_mergeable()).then_some(()));
    let stat = equal.stat();
    assert!(equal.is_mergeable() && stat.ksm_merging_pages.unwrap() > 7000 && stat.ksm_process_profit.unwrap() > 0);
    let (code, printed) = watching.end(Signal::INT);
    let document: serde_json::Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(code, Some(0));
    assert!(document["dropped"].as_u64().unwrap() >= 3, "{document}");
    let events = document["events"].as_array().unwrap();
    let drops = events.iter().filter(|event| event["event"] == "dropped");
    for drop in drops {
        assert_eq!(drop["pid"], unique.pid().get());
        assert!(
            drop["ksm_process_profit"].as_i64().unwrap() < -65536 && drop["passes"].as_u64().unwrap() >= 4,
            "{drop}"
        );
    }
}
