//! Processes to be enabled, what pagefold says of them, and ksmd at work.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use kernel::{KsmStat, KsmSysfs, Pid, VmaUse, smaps};
use ksm::{Knob, Lease, check_writable, host_lock};
use serde_json::Value;

/// What `pagefold ARGUMENTS --json` said.
#[derive(Debug)]
pub(crate) struct Said {
    pub(crate) status: Option<i32>,
    pub(crate) document: Value,
    pub(crate) notes: String,
}

pub(crate) fn pagefold(arguments: &[&str]) -> Said {
    said(Command::new(env!("CARGO_BIN_EXE_pagefold")).args(arguments).arg("--json"))
}

/// What it says to people.
pub(crate) fn told(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_pagefold")).args(arguments).stdin(Stdio::null()).output().unwrap();
    assert!(output.stdout.is_empty());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn said(command: &mut Command) -> Said {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let notes = String::from_utf8_lossy(&output.stderr).into_owned();
    let document = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    Said { status: output.status.code(), document, notes }
}

impl Said {
    /// What is said of a process.
    pub(crate) fn of(&self, pid: Pid) -> &Value {
        let all = self.document["processes"].as_array().unwrap_or_else(|| panic!("no processes in {self:?}"));
        all.iter().find(|process| process["pid"] == pid.get()).unwrap_or_else(|| panic!("nothing of {pid} in {self:?}"))
    }

    pub(crate) fn outcome(&self, pid: Pid) -> &str {
        self.of(pid)["outcome"].as_str().unwrap()
    }

    pub(crate) fn reason(&self, pid: Pid) -> &str {
        self.of(pid)["reason"].as_str().unwrap_or("")
    }

    pub(crate) fn detail(&self, pid: Pid) -> &str {
        self.of(pid)["detail"].as_str().unwrap_or("")
    }
}

/// A child that ends with the test.
pub(crate) struct Running {
    pub(crate) child: Child,
    out: Option<BufReader<ChildStdout>>,
}

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let out = child.stdout.take().map(BufReader::new);
        Self { child, out }
    }

    /// A Python script, once it has said its first line.
    pub(crate) fn python(script: &str) -> Self {
        let script = format!("{PRELUDE}{script}");
        let mut running = Self::start(Command::new("/usr/bin/python3").args(["-c", &script]));
        assert_eq!(running.line(), "here");
        running
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid(self.child.id().cast_signed())
    }

    pub(crate) fn text(&self) -> String {
        self.child.id().to_string()
    }

    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.as_mut().unwrap().read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Says a line and waits for one.
    pub(crate) fn ask(&mut self, line: &str) -> String {
        let input = self.child.stdin.as_mut().unwrap();
        input.write_all(format!("{line}\n").as_bytes()).unwrap();
        input.flush().unwrap();
        self.line()
    }

    pub(crate) fn mappings(&self) -> Vec<VmaUse> {
        smaps::read(self.pid()).unwrap()
    }

    /// Whether the mapping at an address is marked.
    pub(crate) fn is_marked(&self, address: u64) -> bool {
        let found = self.mappings().into_iter().find(|entry| entry.vma.range.contains(kernel::Vaddr(address)));
        found.unwrap().flags.mergeable()
    }

    /// Marked mappings, by their names.
    pub(crate) fn marked(&self) -> Vec<String> {
        let marked = self.mappings().into_iter().filter(|entry| entry.flags.mergeable());
        marked.map(|entry| entry.vma.name.to_string_lossy().into_owned()).collect()
    }

    pub(crate) fn stat(&self) -> KsmStat {
        kernel::ksm_sysfs::ksm_stat(self.pid()).unwrap()
    }

    pub(crate) fn is_on(&self) -> bool {
        self.stat().ksm_merge_any == Some(true)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `area` maps pages and says their address in hexadecimal; each line that comes is executed and answered.
const PRELUDE: &str = r"
import ctypes, mmap, os, sys
kept = []
def area(pages, content=b'x'):
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, len(memory), mmap.PAGESIZE): memory[at:at + len(content)] = content
    kept.append(memory)
    return '%x' % ctypes.addressof(ctypes.c_char.from_buffer(memory))
def serve():
    print('here', flush=True)
    for line in sys.stdin: print(eval(line), flush=True)
";

/// KSM's settings belong to the whole host: one test at a time, and put back whatever happens.
pub(crate) struct Host {
    _lock: File,
    before: Vec<(Knob, String)>,
}

impl Host {
    /// ksmd runs flat out. `None` if it cannot be made to.
    pub(crate) fn busy() -> Option<Self> {
        if let Err(missing) = check_writable(&KsmSysfs::host()) {
            println!("skipped: {missing}");
            return None;
        }
        let lock = host_lock().unwrap();
        let sysfs = KsmSysfs::host();
        Lease::repair(&sysfs).unwrap();
        let value = |knob: Knob| Some((knob, sysfs.knob(knob.file_name()).unwrap()?));
        let host = Self { _lock: lock, before: Knob::ALL.into_iter().filter_map(value).collect() };
        for (name, value) in [("smart_scan", "0"), ("pages_to_scan", "20000"), ("sleep_millisecs", "1"), ("run", "1")] {
            sysfs.write(name, value).unwrap();
        }
        Some(host)
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
        for (knob, value) in &self.before {
            let _ = KsmSysfs::host().write(knob.file_name(), value);
        }
    }
}

/// A cgroup of our own in some hierarchy. Removed at the end, with whoever is still in it ended.
pub(crate) struct Cgroup(pub(crate) PathBuf);

impl Cgroup {
    /// `None` if there can be none.
    pub(crate) fn new(hierarchies: &[&str], name: &str) -> Option<Self> {
        let folder = hierarchies.iter().map(Path::new).find_map(|root| {
            let folder = root.join(format!("pagefold-{name}-{}", std::process::id()));
            // A file system that is not of cgroups makes a folder without this.
            let made = std::fs::create_dir(&folder).is_ok() && folder.join("cgroup.procs").exists();
            if !made {
                let _ = std::fs::remove_dir(&folder);
            }
            made.then_some(folder)
        });
        if folder.is_none() {
            println!("skipped: a cgroup of our own");
        }
        folder.map(Self)
    }

    pub(crate) fn add(&self, pid: Pid) {
        std::fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
    }

    pub(crate) fn text(&self) -> &str {
        self.0.to_str().unwrap()
    }

    pub(crate) fn members(&self) -> Vec<Pid> {
        kernel::membership::cgroup_members(&self.0).unwrap()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for _ in 0..200 {
            for pid in kernel::membership::cgroup_members(&self.0).unwrap_or_default() {
                if let Ok(pidfd) = kernel::Pidfd::open(pid) {
                    let _ = pidfd.send_signal(kernel::Signal::KILL);
                }
            }
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Where cgroups of version 2 are.
pub(crate) const V2: [&str; 2] = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
