//! The program under test, and injectors that are processes of their own.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pagefold_kernel::inject::{Call, Injected, Options, Step, inject};
use pagefold_kernel::{Pid, Vaddr, maps, remote};

/// `target.c`, compiled once.
pub(crate) fn program() -> PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM
        .get_or_init(|| {
            let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/inject/target.c");
            let program =
                PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("inject-target-{}", std::process::id()));
            let status = Command::new("cc").args(["-O1", "-w", "-pthread", "-o"]).arg(&program).arg(source).status();
            assert!(status.unwrap().success());
            program
        })
        .clone()
}

/// Whether this kernel says when a thread last ran; if not, that is what a test is skipped for.
pub(crate) fn scheduler_tells() -> bool {
    let tells = Path::new("/proc/self/sched").exists();
    if !tells {
        println!("skipped: /proc/PID/sched");
    }
    tells
}

/// What one role says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) count: u64,
    pub(crate) errors: u64,
    pub(crate) latest: Duration,
    pub(crate) handled: u64,
    pub(crate) first_error: String,
}

/// A running program with its roles.
pub(crate) struct Target {
    pub(crate) child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    pub(crate) tids: BTreeMap<String, Pid>,
}

impl Target {
    pub(crate) fn start(roles: &[&str]) -> Self {
        Self::of(Command::new(program()), roles)
    }

    pub(crate) fn of(mut command: Command, roles: &[&str]) -> Self {
        let mut child = command.args(roles).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut target = Self { child, stdin, stdout, tids: BTreeMap::new() };
        for line in target.lines() {
            let (role, tid) = line.split_once(' ').unwrap();
            target.tids.insert(role.to_owned(), Pid(tid.parse().unwrap()));
        }
        target
    }

    fn lines(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            assert!(self.stdout.read_line(&mut line).unwrap() > 0, "the program has ended: {:?}", self.child.wait());
            if line == ".\n" {
                return lines;
            }
            lines.push(line.trim_end().to_owned());
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid(self.child.id().cast_signed())
    }

    pub(crate) fn tid(&self, role: &str) -> Pid {
        self.tids[role]
    }

    /// What the roles say now.
    pub(crate) fn ask(&mut self) -> BTreeMap<String, Said> {
        self.stdin.write_all(b"\n").unwrap();
        let parse = |line: String| {
            let mut words = line.splitn(6, ' ');
            let role = words.next().unwrap().to_owned();
            let mut number = || words.next().unwrap().parse::<u64>().unwrap();
            let (count, errors, latest, handled) = (number(), number(), number(), number());
            let first_error = words.next().unwrap_or_default().to_owned();
            (role, Said { count, errors, latest: Duration::from_micros(latest), handled, first_error })
        };
        self.lines().into_iter().map(parse).collect()
    }

    /// Panics if a role has seen anything wrong, or makes no progress.
    pub(crate) fn check(&mut self) -> BTreeMap<String, Said> {
        let before = self.ask();
        let lively = |role: &str| {
            !(role.ends_with("_forever") || role.ends_with("_hour") || ["fibers", "fork_when_told"].contains(&role))
        };
        for _ in 0..600 {
            let said = self.ask();
            for (role, said) in &said {
                assert_eq!(said.errors, 0, "{role}: {}", said.first_error);
            }
            if said.iter().all(|(role, said)| said.count > before[role].count || !lively(role)) {
                return said;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("no progress: {before:?} {:?}", self.ask());
    }

    /// Runs prctl in a thread; panics if that does not work.
    pub(crate) fn switch(&self, on: bool, role: Option<&str>) -> Injected {
        let options = Options { tid: role.map(|role| self.tid(role)), ..Options::default() };
        let done = inject(self.pid(), &[Call::memory_merge(on)], &options).unwrap();
        assert_eq!(done.results, [Ok(0)]);
        done
    }

    /// Puts words into the target's memory, where nobody else looks; where they are.
    pub(crate) fn memory_with(&self, words: &[u64]) -> Vaddr {
        let maps = maps::read(self.pid()).unwrap();
        let heap = maps.iter().find(|vma| vma.name == "[heap]").unwrap();
        let place = Vaddr(heap.range.end().0 - 64);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        remote::write(self.pid(), place, &bytes).unwrap();
        place
    }

    /// Puts marks of nobody's into all slots but the first that is taken, so that there is one only.
    pub(crate) fn leave_one_slot(&self) {
        let maps = maps::read(self.pid()).unwrap();
        let vdso = maps.iter().find(|vma| vma.name == "[vdso]").unwrap().range;
        let memory = fs::File::options().read(true).write(true).open(format!("/proc/{}/mem", self.pid())).unwrap();
        let mut at = vdso.end().0 - 192;
        loop {
            at -= 192;
            let mut bytes = [0; 192];
            memory.read_exact_at(&mut bytes, at).unwrap();
            if bytes.iter().any(|byte| *byte != 0) || at < vdso.end().0 - 4096 + 192 {
                return;
            }
            memory.write_all_at(&[0xcc; 192], at).unwrap();
        }
    }

    /// True if the kernel says that all of the memory may be merged.
    pub(crate) fn merges(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/ksm_stat", self.pid())).unwrap().contains("ksm_merge_any: yes")
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until a thread shows a state letter and, where it sleeps, is in this call.
pub(crate) fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..20_000 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    panic!("{what} within 10 s");
}

/// Where an injector of its own is to be killed.
static DIE_AT: AtomicU32 = AtomicU32::new(u32::MAX);
static PASSES: AtomicU32 = AtomicU32::new(0);

fn die(step: Step) {
    if step as u32 == DIE_AT.load(Ordering::Relaxed) && PASSES.fetch_sub(1, Ordering::Relaxed) == 0 {
        // SAFETY: kills this process.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        loop {
            std::hint::spin_loop();
        }
    }
}

/// A process that injects: `count` times, into one thread or any, and is killed at a step if one is named.
pub(crate) fn injector(pid: Pid, tid: Option<Pid>, count: u32, die_at: Option<(Step, u32)>) -> Child {
    let die_at = die_at.map(|(step, passes)| format!("{} {passes}", step as u32)).unwrap_or_default();
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "harness::runs_as_injector", "--nocapture", "--test-threads=1"])
        .env("INJECT_PID", pid.to_string())
        .env("INJECT_TID", tid.map(|tid| tid.to_string()).unwrap_or_default())
        .env("INJECT_COUNT", count.to_string())
        .env("INJECT_DIE_AT", die_at)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// Not a test: what [`injector`] starts.
#[test]
fn runs_as_injector() {
    let Ok(pid) = std::env::var("INJECT_PID") else { return };
    let number = |name: &str| std::env::var(name).unwrap().parse::<i32>().ok();
    if let Some((step, passes)) = std::env::var("INJECT_DIE_AT").unwrap().split_once(' ') {
        DIE_AT.store(step.parse().unwrap(), Ordering::Relaxed);
        PASSES.store(passes.parse().unwrap(), Ordering::Relaxed);
    }
    let options = Options { tid: number("INJECT_TID").map(Pid), on_step: Some(die), ..Options::default() };
    for index in 0..number("INJECT_COUNT").unwrap() {
        let done = inject(Pid(pid.parse().unwrap()), &[Call::memory_merge(index % 2 == 0)], &options).unwrap();
        assert_eq!(done.results, [Ok(0)]);
    }
}
