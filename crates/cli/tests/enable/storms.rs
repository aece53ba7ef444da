//! Fork and exec storms: nobody is left out. Each process of a storm looks at itself, all the time, and counts if it is not
//! as all must be since the command has returned.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::stand::{Cgroup, Running, V2, pagefold};

/// Runs of each kind. More are asked for by PAGEFOLD_STORMS.
fn runs() -> u32 {
    std::env::var("PAGEFOLD_STORMS").ok().and_then(|text| text.parse().ok()).unwrap_or(3)
}

/// The program, compiled; `None` if it cannot be.
fn program() -> Option<&'static PathBuf> {
    static PROGRAM: std::sync::OnceLock<Option<PathBuf>> = std::sync::OnceLock::new();
    let compile = || {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let (source, program) = (concat!(env!("CARGO_MANIFEST_DIR"), "/tests/enable/storm.c"), folder.join("storm"));
        let status = Command::new("cc").args(["-O1", "-Wall", "-pthread", "-o"]).arg(&program).arg(source).status();
        status.is_ok_and(|status| status.success()).then_some(program)
    };
    let program = PROGRAM.get_or_init(compile).as_ref();
    if program.is_none() {
        println!("skipped: cc");
    }
    program
}

/// Counters that all processes of a storm share: see storm.c.
struct Shared(File, #[expect(dead_code, reason = "removes the file when it is dropped")] tempfile::TempPath);

impl Shared {
    fn new() -> (Self, PathBuf) {
        let (file, path) = tempfile::NamedTempFile::new().unwrap().into_parts();
        file.set_len(4096).unwrap();
        let name = path.to_path_buf();
        (Self(file, path), name)
    }

    fn set(&self, index: u64, value: i32) {
        self.0.write_all_at(&value.to_ne_bytes(), index * 4).unwrap();
    }

    fn get(&self, index: u64) -> i32 {
        let mut bytes = [0; 4];
        self.0.read_exact_at(&mut bytes, index * 4).unwrap();
        i32::from_ne_bytes(bytes)
    }
}

fn storm(mode: &str, by_cgroup: bool) {
    let Some(program) = program() else { return };
    for run in 0..runs() {
        let Some(group) = Cgroup::new(&V2, &format!("storm-{mode}-{by_cgroup}")) else { return };
        let (shared, path) = Shared::new();
        let mut command = Command::new(program);
        command.args(["reaper", group.text(), mode]).arg(&path);
        let mut reaper = Running::start(command.stderr(Stdio::inherit()));
        let pid = reaper.line();
        let began = Instant::now();
        while shared.get(3) < 2 {
            assert!(began.elapsed() < Duration::from_secs(10), "{mode}: no storm");
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(u64::from(run)));
        let whom: &[&str] = if by_cgroup { &["--cgroup", group.text()] } else { &[&pid, "--children"] };
        for (action, must) in [("enable", 1), ("disable", 2)] {
            shared.set(1, 0);
            let said = pagefold(&[&[action, "--timeout", "60"], whom].concat());
            shared.set(1, must);
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(shared.get(2), 0, "{mode}: run {run}: {} is left out of {action}: {said:?}", shared.get(4));
            assert_eq!((said.status, &said.document["complete"]), (Some(0), &true.into()), "{mode}: {said:?}");
            assert!(!group.members().is_empty(), "{mode}: the storm is over");
        }
        shared.set(0, 1);
        // It collects all of them.
        reaper.child.wait().unwrap();
    }
}

#[test]
fn processes_that_fork_and_exit_at_once_in_a_cgroup() {
    storm("chain", true);
}

#[test]
fn processes_that_fork_and_exit_at_once_below_one() {
    storm("chain", false);
}

#[test]
fn trees_that_grow_and_wither_in_a_cgroup() {
    storm("bush", true);
}

#[test]
fn trees_that_grow_and_wither_below_one() {
    storm("bush", false);
}

#[test]
fn threads_that_fork_and_start_programs_in_a_cgroup() {
    storm("threads", true);
}

#[test]
fn threads_that_fork_and_start_programs_below_one() {
    storm("threads", false);
}

#[test]
fn one_program_after_the_other_in_a_cgroup() {
    storm("exec", true);
}

#[test]
fn one_program_after_the_other_by_itself() {
    storm("exec", false);
}
