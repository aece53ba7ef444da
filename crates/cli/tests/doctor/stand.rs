//! The host's settings, processes in a given state, and what the doctor says of them.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use ksm::{Knob, KsmSysfs, Lease, check_writable, host_lock};
use serde_json::Value;

/// KSM's settings belong to the whole host, and so does the question who has mergeable memory: one test at a time, and
/// everything put back whatever happens.
pub(crate) struct Host {
    _lock: File,
    before: Vec<(Knob, String)>,
}

impl Host {
    pub(crate) fn lock() -> Option<Self> {
        if let Err(missing) = check_writable(&KsmSysfs::host()) {
            println!("skipped: {missing}");
            return None;
        }
        let lock = host_lock().unwrap();
        Lease::repair(&KsmSysfs::host()).unwrap();
        let sysfs = KsmSysfs::host();
        let before =
            Knob::ALL.into_iter().filter_map(|knob| Some((knob, sysfs.knob(knob.file_name()).unwrap()?))).collect();
        Some(Self { _lock: lock, before })
    }

    pub(crate) fn set(&self, settings: &[(&str, u64)]) {
        for (name, value) in settings {
            KsmSysfs::host().write(name, &value.to_string()).unwrap();
        }
    }

    pub(crate) fn write(&self, name: &str, value: &str) {
        KsmSysfs::host().write(name, value).unwrap();
    }

    /// Nothing is merged, and ksmd has made no pass.
    pub(crate) fn fresh(&self) {
        self.set(&[("run", 2)]);
    }

    /// Lets ksmd make some more passes.
    pub(crate) fn passes(&self, more: u64) {
        let passes = || KsmSysfs::host().counters().unwrap().full_scans.unwrap();
        let (first, deadline) = (passes(), Instant::now() + Duration::from_secs(60));
        while passes() < first + more {
            assert!(Instant::now() < deadline, "{} of {more} passes in a minute", passes() - first);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Some settings can only be written while nothing is merged.
        let _ = KsmSysfs::host().write("run", "2");
        for (knob, value) in &self.before {
            let _ = KsmSysfs::host().write(knob.file_name(), value);
        }
    }
}

/// A Python process in a state of its own. Ends with the test.
pub(crate) struct Stage {
    child: Child,
    out: BufReader<ChildStdout>,
}

/// What all scripts begin with. `said` says a line; `stay` does that and waits for the end.
const PRELUDE: &str = r"
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
MERGEABLE, HUGEPAGE, PAGE = 12, 14, mmap.PAGESIZE
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
kept = []
def prctl(on): assert libc.prctl(67, on, 0, 0, 0) == 0
def area(pages, flags=PRIVATE, fd=-1):
    kept.append(mmap.mmap(fd, pages * PAGE, flags=flags))
    return kept[-1]
def address(area): return ctypes.addressof(ctypes.c_char.from_buffer(area))
def advise(area, advice, length=None):
    return libc.madvise(ctypes.c_void_p(address(area)), ctypes.c_size_t(length or len(area)), advice)
def mergeable(area, length=None): assert advise(area, MERGEABLE, length) == 0
def fill(area, content=b'x'):
    for at in range(0, len(area), PAGE): area[at:at + len(content)] = content
def unique(area):
    for at in range(0, len(area), PAGE): area[at:at + 16] = os.urandom(16)
def stay(word='here'):
    print(word, flush=True)
    sys.stdin.read()
";

impl Stage {
    /// Starts a script and waits until it stays.
    pub(crate) fn new(script: &str) -> Self {
        let script = format!("{PRELUDE}{script}");
        Self::of(Command::new("python3").args(["-c", &script]))
    }

    /// The same, of any command that leads to one.
    pub(crate) fn of(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut stage = Self { child, out };
        let first = stage.line();
        assert_eq!(first, "here");
        stage
    }

    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets it come to its end by itself.
    pub(crate) fn end(&mut self) {
        drop(self.child.stdin.take());
        self.child.wait().unwrap();
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        // Those that do something else than to wait for the end of their input.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mut rest = String::new();
        let _ = self.out.read_to_string(&mut rest);
    }
}

/// The script that a stage begins with, for those that are started in another way.
pub(crate) fn script(rest: &str) -> String {
    format!("{PRELUDE}{rest}")
}

/// What the doctor said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) status: Option<i32>,
    pub(crate) findings: Vec<Value>,
    /// The same for being managed whole, a document for each process.
    pub(crate) whole: Vec<Value>,
}

impl Said {
    /// Of a command that ends in `pagefold doctor --json`.
    pub(crate) fn by(command: &mut Command) -> Self {
        let output = command.output().unwrap();
        let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let document: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}{errors}"));
        assert!(document["features"].as_array().unwrap().len() > 10, "the probe is there as well");
        let list = |name: &str| document[name].as_array().unwrap().clone();
        Self { status: output.status.code(), findings: list("findings"), whole: list("whole") }
    }

    /// Of the host alone.
    pub(crate) fn of_the_host() -> Self {
        Self::by(&mut doctor(&[]))
    }

    /// Of the host and some processes.
    pub(crate) fn of(pids: &[u32]) -> Self {
        Self::by(&mut doctor(pids))
    }

    fn find(&self, code: &str, pid: Option<u32>) -> Option<&Value> {
        let subject = if pid.is_some() { "process" } else { "host" };
        let fits = |found: &&Value| {
            found["code"] == code && found["subject"] == subject && pid.is_none_or(|pid| found["pid"] == pid)
        };
        self.findings.iter().find(fits)
    }

    /// Requires a finding about the host, with words in its cause.
    pub(crate) fn host(&self, severity: &str, code: &str, words: &str) {
        self.require(severity, code, None, words);
    }

    /// Requires a finding about a process.
    pub(crate) fn process(&self, severity: &str, code: &str, pid: u32, words: &str) {
        self.require(severity, code, Some(pid), words);
    }

    fn require(&self, severity: &str, code: &str, pid: Option<u32>, words: &str) {
        let found = self.find(code, pid).unwrap_or_else(|| panic!("no {code} of {pid:?}: {:#?}", self.findings));
        assert_eq!(found["severity"], severity, "{found:#}");
        assert!(found["cause"].as_str().unwrap().contains(words), "no {words:?} in {found:#}");
        let remedy = found["remedy"].as_str().unwrap();
        assert!(!remedy.is_empty() && !remedy.contains('\n') && !remedy.contains("  "), "{found:#}");
    }

    /// Requires that there is no such finding about anybody.
    pub(crate) fn no(&self, code: &str) {
        let found: Vec<&Value> = self.findings.iter().filter(|found| found["code"] == code).collect();
        assert!(found.is_empty(), "{found:#?}");
    }
}

/// The command.
pub(crate) const PAGEFOLD: &str = env!("CARGO_BIN_EXE_pagefold");

/// `pagefold doctor --json`.
pub(crate) fn doctor(pids: &[u32]) -> Command {
    let mut command = Command::new(PAGEFOLD);
    command.args(["doctor", "--json"]);
    for pid in pids {
        command.args(["--pid", &pid.to_string()]);
    }
    command
}

/// A shell command, and then `pagefold doctor --json`, in namespaces of their own.
pub(crate) fn apart(namespaces: &[&str], before: &str) -> Command {
    let mut command = Command::new("unshare");
    command.args(namespaces).args(["sh", "-c", &format!("{before} exec \"$0\" doctor --json"), PAGEFOLD]);
    command
}
