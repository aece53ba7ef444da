//! A group of equal workers below one command, which ends them when this process goes, however it goes.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use kernel::Launch;
use ksm::{Layout, StackLimit};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

use super::interrupt;
use super::kind::Program;
use super::way::Way;
use super::wire::Launcher;
use super::worker::Worker;
use crate::vm::host;

/// How often it is looked whether the command has ended.
const TICK: Duration = Duration::from_millis(50);
/// How long workers, broker and guardian may take to end after they were told.
const FAREWELL: Duration = Duration::from_secs(60);
/// The same when something has failed already.
const SHORT_FAREWELL: Duration = Duration::from_secs(5);

/// A device that a user may open who may not open the host's, in a mount namespace that goes with the command: the
/// host's own stays as it is. $1 is an empty folder, the rest is the command.
const OWN_USERFAULTFD: &str = r#"set -e
if [ -e /dev/userfaultfd ]; then
    mount -t tmpfs -o mode=755 none "$1"
    cp -a /dev/userfaultfd "$1/device"
    chmod 666 "$1/device"
    mount --bind "$1/device" /dev/userfaultfd
fi
shift
exec "$@""#;

/// How a group is merged.
#[derive(Clone, Debug)]
pub(super) struct Merging {
    pub(super) way: Way,
    pub(super) pagefold: PathBuf,
    /// More options for `pagefold run`.
    pub(super) options: Vec<OsString>,
}

/// Workers that have loaded their data.
pub(super) struct Group {
    pub(super) workers: Vec<Box<dyn Worker>>,
    /// What each said after loading.
    digests: Vec<String>,
    launcher: Launcher,
    child: Child,
    /// Its end ends the workers.
    stdin: Option<ChildStdin>,
    summary: PathBuf,
}

impl Group {
    /// Starts workers, whose files lie in `folder`, and waits until all have loaded their data.
    ///
    /// # Errors
    /// When one does not come to that.
    pub(super) fn start(program: &Program, merging: &Merging, count: usize, folder: &Path) -> Result<Self> {
        fs::create_dir(folder).context("create a folder for workers")?;
        program.give(folder)?;
        let launcher = Launcher::default();
        let (workers, script) = program.workers(folder, count, &launcher)?;
        let summary = folder.join("summary.json");
        let mut words: Vec<OsString> = Vec::new();
        if program.user.is_some() && merging.way.is_ours() {
            let devices = folder.join("devices");
            fs::create_dir(&devices)?;
            words.extend(["unshare", "--mount", "sh", "-c", OWN_USERFAULTFD, "sh"].map(OsString::from));
            words.push(devices.into());
        }
        words.extend(program.as_user().into_iter().map(OsString::from));
        words.extend(merging.way.prefix(&merging.pagefold, &merging.options, &summary));
        words.extend(["sh", "-c", &script].map(OsString::from));
        let (first, rest) = words.split_first().context("a command has a program")?;
        let log = folder.join("launcher.log");
        let output = File::create(&log).context("create a log")?;
        let mut command = Command::new(first);
        command
            .args(rest)
            // Equal hashes, whoever merges.
            .env("PYTHONHASHSEED", "0")
            .current_dir(folder)
            .stdin(Stdio::piped())
            .stdout(output.try_clone()?)
            .stderr(output)
            // Keys of the terminal are for us.
            .process_group(0);
        interrupt::let_through(&mut command);
        let mut launch = Launch::new(command);
        if merging.way.wanted(1).is_some() {
            launch.memory_merge(true);
        }
        // What runs below it inherits both.
        let shared = merging.way.is_shared_layout() && !merging.way.is_ours();
        let layout = if shared { Layout::draw()? } else { Layout::Default };
        let (launched, _) =
            layout.spawn(launch, StackLimit::PutBack).with_context(|| format!("run {}", first.display()))?;
        let mut child = launched.child;
        let stdin = child.stdin.take();
        launcher.started(launched.pidfd);
        let mut group = Self { workers, digests: Vec::new(), launcher, child, stdin, summary };
        let loaded = group.load();
        group.digests = loaded.with_context(|| said(folder))?;
        Ok(group)
    }

    /// All at the same time.
    fn load(&mut self) -> Result<Vec<String>> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = self.workers.iter_mut().map(|worker| scope.spawn(|| worker.loaded())).collect();
            let loaded = threads.into_iter().map(|thread| thread.join());
            loaded.map(|one| one.map_err(|_panic| anyhow::anyhow!("a thread has panicked"))?).collect()
        })
    }

    /// The command that all run below.
    pub(super) fn root(&self) -> u32 {
        self.child.id()
    }

    /// The same, to be asked whether it goes on.
    pub(super) fn launcher(&self) -> Launcher {
        self.launcher.clone()
    }

    /// What each said after loading.
    pub(super) fn digests(&self) -> &[String] {
        &self.digests
    }

    /// Workers that have not loaded or do not hold what is expected of their number, or what they were to write.
    ///
    /// # Errors
    /// When one is gone.
    pub(super) fn wrong(&mut self, expected: &[String]) -> Result<u64> {
        wrong(&mut self.workers, &self.digests, expected)
    }

    /// Ends the workers in order; the last summary, where pagefold merged.
    ///
    /// # Errors
    /// When they do not end.
    pub(super) fn end(mut self) -> Result<Option<Value>> {
        ensure!(self.leave(FAREWELL), "the workers do not end");
        let text = fs::read(&self.summary).unwrap_or_default();
        Ok(serde_json::from_slice(&text).ok())
    }

    /// Tells all to end, and waits; false if they do not.
    fn leave(&mut self, within: Duration) -> bool {
        self.workers.clear();
        self.stdin = None;
        let deadline = Instant::now() + within;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                return false;
            }
            std::thread::sleep(TICK);
        }
        true
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if self.leave(SHORT_FAREWELL) {
            return;
        }
        // All of them before the first is killed, whose children belong to somebody else then. Whoever is still below the
        // command after its descriptor was opened is the one that was meant.
        let open = |(pid, _): (kernel::Pid, String)| {
            let process = Pid::from_raw(pid.get()).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())?;
            Some((pid, process))
        };
        let all: Vec<_> = host::tree(self.child.id()).unwrap_or_default().into_iter().filter_map(open).collect();
        let again = host::tree(self.child.id()).unwrap_or_default();
        for (_, process) in all.iter().rev().filter(|(pid, _)| is_in(*pid, &again)) {
            // Gone already is as good.
            let _ = pidfd_send_signal(process, Signal::KILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn is_in(pid: kernel::Pid, tree: &[(kernel::Pid, String)]) -> bool {
    tree.iter().any(|(one, _)| *one == pid)
}

/// What the command and the workers have said, for an error.
fn said(folder: &Path) -> String {
    let mut all = String::from("the workers did not load their data");
    for name in ["launcher.log", "log"] {
        let text = fs::read_to_string(folder.join(name)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        for line in &lines[lines.len().saturating_sub(10)..] {
            all.push('\n');
            all.push_str(line);
        }
    }
    all
}

fn wrong(workers: &mut [Box<dyn Worker>], loaded: &[String], expected: &[String]) -> Result<u64> {
    let mut wrong = 0;
    for (number, worker) in workers.iter_mut().enumerate() {
        let proof = worker.check()?;
        let expected = expected.get(number);
        wrong += u64::from(!proof.right || expected != Some(&proof.digest) || expected != loaded.get(number));
    }
    Ok(wrong)
}

/// What each of so many workers says after loading while nobody merges: what its like has to hold in every way.
///
/// # Errors
/// As [`Group::start`] and [`Group::end`], and when two hold the same, so that they could not be told from each other.
pub(super) fn unmerged(program: &Program, count: usize) -> Result<Vec<String>> {
    let plain = Merging { way: Way::Plain, pagefold: PathBuf::new(), options: Vec::new() };
    let group = Group::start(program, &plain, count, &program.folder.join("unmerged"))?;
    let digests = group.digests.clone();
    group.end()?;
    for (number, digest) in digests.iter().enumerate() {
        ensure!(!digests[..number].contains(digest), "worker {number} holds nothing of its own");
    }
    Ok(digests)
}

/// One worker that starts, loads and ends as it will when it is measured, so that what is done only once is done:
/// programs are read from disk, and pagefold judges them.
///
/// # Errors
/// As [`Group::start`] and [`Group::end`].
pub(super) fn warm_up(program: &Program, merging: &Merging, expected: &[String]) -> Result<()> {
    let folder = program.folder.join("warm-up");
    let mut group = Group::start(program, merging, 1, &folder)?;
    // It is taken in once it has lived for a second.
    let deadline = Instant::now() + Duration::from_secs(3);
    while Instant::now() < deadline {
        interrupt::go_on()?;
        std::thread::sleep(TICK);
    }
    if group.wrong(expected)? > 0 {
        bail!("a worker does not hold what it loaded");
    }
    group.end()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::served::kind::Kind;
    use crate::served::worker::Proof;
    use std::os::unix::fs::FileExt as _;

    struct Says(&'static str);

    impl Worker for Says {
        fn loaded(&mut self) -> Result<String> {
            Ok(self.0.to_owned())
        }
        fn small(&mut self, _number: u32) -> Result<bool> {
            Ok(true)
        }
        fn all(&mut self) -> Result<bool> {
            Ok(true)
        }
        fn check(&mut self) -> Result<Proof> {
            Ok(Proof { digest: self.0.to_owned(), right: true })
        }
    }

    #[test]
    fn a_worker_has_to_say_what_is_expected_of_its_number() {
        let count = |says: [&'static str; 2], loaded: [&str; 2]| {
            let mut workers = says.map(|text| Box::new(Says(text)) as Box<dyn Worker>);
            let texts = |of: [&str; 2]| of.map(str::to_owned);
            wrong(&mut workers, &texts(loaded), &texts(["zero", "one"])).unwrap()
        };
        assert_eq!(count(["zero", "one"], ["zero", "one"]), 0);
        assert_eq!(count(["zero", "zero"], ["zero", "one"]), 1, "it holds what is another's");
        assert_eq!(count(["zero", "zero"], ["zero", "zero"]), 1, "it was so before it was asked first");
        assert_eq!(count(["one", "zero"], ["one", "zero"]), 2);
    }

    /// Puts bytes in the place of others wherever a process has those in memory of its own; how often.
    fn replace(pid: kernel::Pid, old: &[u8], new: &[u8]) -> usize {
        let memory = File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).unwrap();
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let mut replaced = 0;
        for line in maps.lines().filter(|line| line.contains(" rw-p ") && line.contains(" 00:00 0")) {
            let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let [from, to] = [from, to].map(|hex| u64::from_str_radix(hex, 16).unwrap());
            let mut bytes = vec![0; usize::try_from(to - from).unwrap()];
            memory.read_exact_at(&mut bytes, from).unwrap();
            let starts = bytes.windows(old.len()).enumerate().filter(|(_, found)| *found == old);
            for (start, _) in starts {
                memory.write_all_at(new, from + start as u64).unwrap();
                replaced += 1;
            }
        }
        replaced
    }

    #[test]
    fn what_belongs_to_another_worker_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let Ok(program) = Kind::Python.find(folder.path()).unwrap() else {
            println!("skipped: no python3 with sqlite3");
            return;
        };
        let expected = unmerged(&program, 2).unwrap();
        let plain = Merging { way: Way::Plain, pagefold: PathBuf::new(), options: Vec::new() };
        let mut group = Group::start(&program, &plain, 2, &folder.path().join("two")).unwrap();
        assert_eq!(group.wrong(&expected).unwrap(), 0);
        // The second worker's text at one place, as worker.py makes it, becomes the first one's.
        let text = |worker: u64| format!("{:08x}", (worker * 1_000_003 + 1000) * 2_654_435_761 % (1 << 30)).repeat(3);
        let second =
            |pid: kernel::Pid| fs::read(format!("/proc/{pid}/cmdline")).unwrap().ends_with(b"worker.py\x001\0");
        let tree = host::tree(group.root()).unwrap();
        let (pid, _) = tree.into_iter().find(|(pid, _)| second(*pid)).unwrap();
        assert!(replace(pid, text(1).as_bytes(), text(0).as_bytes()) > 0);
        assert_eq!(group.wrong(&expected).unwrap(), 1);
        group.end().unwrap();
    }
}
