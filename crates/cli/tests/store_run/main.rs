//! `pagefold run` with the store as a user meets it. Nothing of the host's settings is touched here.
#![allow(clippy::unwrap_used, reason = "tests")]
use std::fs::{self, OpenOptions, Permissions};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use kernel::{Features, Pid, Pidfd, Signal};
use serde_json::Value;

mod disturbed;
mod elsewhere;
mod limits;
mod merging;
mod messages;
mod repeats;
mod signals;
mod summaries;
mod whole;

const PAGEFOLD: &str = env!("CARGO_BIN_EXE_pagefold");
const PYTHON: &str = "/usr/bin/python3";

/// Fills memory of its own, marks it, does what it is told on stdin, and says whether the memory is what it must be.
/// `merged` waits until pages of the store are mapped.
const MARKS: &str = r"
import hashlib, mmap, os, random, sys, time
data = random.Random(7).randbytes(2 << 20)
def mark():
    memory = mmap.mmap(-1, len(data), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = data
    memory.madvise(mmap.MADV_MERGEABLE)
    return memory
memory, twin = mark(), mark()
original = hashlib.sha256(data).digest()
def merged():
    deadline = time.monotonic() + 8
    while '/memfd:pagefold ' not in open('/proc/self/maps').read():
        assert time.monotonic() < deadline, 'not merged within 8 s'
        time.sleep(0.01)
def right():
    assert hashlib.sha256(memory).digest() == hashlib.sha256(data).digest(), 'the memory has changed'
    assert hashlib.sha256(twin).digest() == original, 'memory that nobody wrote has changed'
def fork():
    for n in range(4):
        child = os.fork()
        if child == 0:
            right()
            memory[n * 8192] ^= 255
            os._exit(0 if memory[n * 8192] == data[n * 8192] ^ 255 else 1)
        deadline = time.monotonic() + 5
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            assert time.monotonic() < deadline, 'a fork hangs'
            time.sleep(0.01)
        assert status == 0, 'a fork saw other memory'
    right()
def write():
    global data
    data = bytearray(data)
    for at in range(0, len(data), 4096 * 7):
        memory[at] = data[at] = memory[at] ^ 1
def say(word):
    sys.stdout.write(word + '\n')
    sys.stdout.flush()
";

struct Temp(PathBuf);

impl Temp {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("pagefold-store-run-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        Self(path)
    }

    fn join(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    /// This program where every user may execute it.
    fn pagefold(&self) -> String {
        let copy = self.join("pagefold");
        testing::copy_program(PAGEFOLD, &copy);
        copy
    }

    /// A C program.
    fn compile(&self, name: &str, source: &str, options: &[&str]) -> Option<String> {
        let (code, program) = (self.join(&format!("{name}.c")), self.join(name));
        fs::write(&code, source).unwrap();
        let done = Command::new("cc").args(["-o", &program, &code]).args(options).output();
        match done {
            Ok(done) if done.status.success() => Some(program),
            _ => {
                println!("skipped: no cc or no static libc");
                None
            }
        }
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Tests that were started in the background, or under nohup, ignore signals, and shells let nobody trap such ones.
fn run_with(options: &[&str], command: &[&str]) -> Command {
    let mut run = Command::new("env");
    run.args(["--default-signal", PAGEFOLD, "run"]).args(options).arg("--").args(command).env_remove("PAGEFOLD_AGENT");
    run
}

fn output(options: &[&str], command: &[&str]) -> Output {
    run_with(options, command).output().unwrap()
}

/// A shell that changes something and becomes pagefold, `$0`.
fn after(change: &str, command: &[&str]) -> Output {
    let script = format!("{change}; exec \"$0\" run -- \"$@\"");
    Command::new("sh").args(["-c", &script, PAGEFOLD]).args(command).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn said(output: &Output) -> String {
    text(&output.stderr)
}

fn send(pid: u32, signal: Signal) {
    Pidfd::open(Pid(pid.cast_signed())).unwrap().send_signal(signal).unwrap();
}

/// Live merging and Python, or what is missing.
fn can_merge() -> bool {
    if let Err(missing) = Features::probe().live_merge() {
        println!("skipped: {missing}");
        return false;
    }
    if !Path::new(PYTHON).exists() {
        println!("skipped: no {PYTHON}");
        return false;
    }
    true
}

fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: root");
    }
    root
}

/// A run whose command takes words on stdin and answers on stdout.
struct Talk {
    run: Child,
    input: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Talk {
    fn start(options: &[&str], command: &[&str]) -> Self {
        Self::spawn(run_with(options, command))
    }

    fn spawn(mut command: Command) -> Self {
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut run = piped.spawn().unwrap();
        let (input, answers) = (run.stdin.take().unwrap(), BufReader::new(run.stdout.take().unwrap()));
        Self { run, input, answers }
    }

    /// A program that has marked memory and does line by line what it is asked.
    fn member(options: &[&str]) -> Self {
        let program = format!("{MARKS}\nfor line in sys.stdin:\n    eval(line)\n    say('done')");
        Self::start(&[&["--stable", "0.1"], options].concat(), &[PYTHON, "-c", &program])
    }

    fn ask(&mut self, call: &str) {
        writeln!(self.input, "{call}").unwrap();
        assert_eq!(self.answer(), "done", "{call}");
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Ends the command's input, and tells all that it and the run said.
    fn end(mut self) -> (std::process::ExitStatus, String, String) {
        drop(self.input);
        let (mut out, mut lines) = (String::new(), String::new());
        self.answers.read_to_string(&mut out).unwrap();
        self.run.stderr.take().unwrap().read_to_string(&mut lines).unwrap();
        (self.run.wait().unwrap(), out, lines)
    }
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(8);
    while !done() {
        assert!(Instant::now() < deadline, "not within 8 s: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
