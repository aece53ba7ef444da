//! Processes to keep rules for, and the command.

use std::io::{BufRead as _, Read as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kernel::ksm_sysfs::ksm_stat;
use kernel::{KsmStat, KsmSysfs, Pid, Signal};
use ksm::ProcessId;
use ksm::enable::{Goal, Outcome};
use serde_json::Value;

/// Whether rules can be applied here. Also the lock: what is on record is the host's.
pub(crate) fn lock() -> Option<std::fs::File> {
    if !rustix::process::geteuid().is_root() || !KsmSysfs::host().exists() {
        println!("skipped: root, and KSM");
        return None;
    }
    Some(ksm::host_lock().unwrap())
}

/// Waits for something that is bound to happen.
pub(crate) fn until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within a minute: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// `pagefold ksm rules ...`.
pub(crate) fn rules(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pagefold")).args(["ksm", "rules"]).args(words).output().unwrap()
}

pub(crate) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Its document.
pub(crate) fn document(words: &[&str]) -> Value {
    let output = rules(words);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{words:?}: {error}: {}", said(&output)))
}

/// A folder with programs of its own, so that rules meet nobody else's processes, and a file of rules.
pub(crate) struct Stand {
    folder: tempfile::TempDir,
}

impl Stand {
    pub(crate) fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.folder.path().canonicalize().unwrap()
    }

    /// Writes the file of rules. `DIR` stands for the folder.
    pub(crate) fn write(&self, text: &str) -> String {
        let file = self.folder().join("rules.toml");
        std::fs::write(&file, format!("version = 1\n{}", text.replace("DIR", self.folder().to_str().unwrap())))
            .unwrap();
        file.to_str().unwrap().to_owned()
    }

    /// A copy of a program under another name.
    pub(crate) fn copy(&self, of: &str, name: &str) -> PathBuf {
        let to = self.folder().join(name);
        if !to.exists() {
            testing::copy_program(Path::new(of).canonicalize().unwrap(), &to);
        }
        to
    }

    /// Starts a copy of `sleep`.
    pub(crate) fn sleeper(&self, name: &str) -> Running {
        let program = self.copy("/usr/bin/sleep", name);
        Running::start(Command::new(program).arg("600"), name)
    }
}

/// A process that is ended with the test.
pub(crate) struct Running(pub(crate) Child);

impl Running {
    /// Starts it, and waits until it has been executed.
    pub(crate) fn start(command: &mut Command, comm: &str) -> Self {
        let running = Self(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
        let name = &comm[..comm.len().min(15)];
        until(comm, || {
            let status = kernel::status::read(running.pid()).unwrap();
            (status.name == *name).then_some(())
        });
        running
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid(self.0.id().cast_signed())
    }

    pub(crate) fn stat(&self) -> KsmStat {
        ksm_stat(self.pid()).unwrap()
    }

    pub(crate) fn is_mergeable(&self) -> bool {
        is_mergeable(self.pid())
    }

    /// As an administrator does it, with `enable` or `disable`.
    pub(crate) fn set(&self, on: bool) {
        set(self.pid(), on);
    }
}

pub(crate) fn set(pid: Pid, on: bool) {
    let goal = if on { Goal::enable() } else { Goal::disable() };
    let how = ksm::enable::Rules {
        goal: &goal,
        force: false,
        timeout: Duration::from_secs(10),
        stop: &|| false,
        never: &|_| None,
    };
    let process = ProcessId::of(pid.get()).unwrap();
    assert_eq!(ksm::enable::apply(process, &how).outcome, Outcome::Done);
}

pub(crate) fn is_mergeable(pid: Pid) -> bool {
    let stat = ksm_stat(pid).unwrap_or_default();
    stat.ksm_merge_any == Some(true) || stat.ksm_mergeable == Some(true)
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process that a process of the test has started, ended with the test.
pub(crate) struct Grandchild(pub(crate) Pid);

impl Grandchild {
    /// Of a shell that prints its number.
    pub(crate) fn of(shell: &mut Running) -> Self {
        let mut line = String::new();
        std::io::BufReader::new(shell.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        Self(Pid(line.trim().parse().unwrap()))
    }
}

impl Drop for Grandchild {
    fn drop(&mut self) {
        if let Ok(process) = kernel::Pidfd::open(self.0) {
            let _ = process.send_signal(Signal::KILL);
        }
    }
}

/// `pagefold ksm rules apply --watch`, at work.
pub(crate) struct Watching {
    child: Child,
    log: PathBuf,
}

impl Watching {
    pub(crate) fn start(stand: &Stand, file: &str, more: &[&str]) -> Self {
        let log = stand.folder().join("log");
        let child = Command::new(env!("CARGO_BIN_EXE_pagefold"))
            .args(["ksm", "rules", "apply", file, "--watch", "0.2"])
            .args(more)
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let watching = Self { child, log };
        watching.says("looking again every");
        watching
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until it has said so.
    pub(crate) fn says(&self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "it does not say {text:?}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kernel::Pidfd::open(Pid(self.child.id().cast_signed())).unwrap().send_signal(signal).unwrap();
    }

    /// Waits for its end; its status and what it has printed.
    pub(crate) fn end(mut self, signal: Signal) -> (Option<i32>, String) {
        self.signal(signal);
        let mut printed = String::new();
        self.child.stdout.take().unwrap().read_to_string(&mut printed).unwrap();
        (self.child.wait().unwrap().code(), printed)
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Everything on record is undone at the end, so that no process of a test that failed stays there.
pub(crate) struct Undone;

impl Drop for Undone {
    fn drop(&mut self) {
        let _ = rules(&["undo", "--quiet"]);
    }
}
