//! The test's side: a broker in this process, and victims that are started with the agent inside.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use broker::{
    AgentFiles, Broker, BrokerHandle, CheckChoice, Judge, MergeReport, Scope, Settings, Summary, Wish, Wished,
};
use kernel::{Pid, Range, Vaddr};

/// How long a victim may take before it counts as hanging.
pub(crate) const WATCHDOG: Duration = Duration::from_secs(40);

/// A partition with the agent's files.
pub(crate) struct Stand {
    pub(crate) broker: Arc<BrokerHandle>,
    files: AgentFiles,
    all: bool,
}

/// Trusts every program; code may come if this says so.
#[derive(Debug)]
struct Trusting(fn(Option<&File>) -> bool);

impl Judge for Trusting {
    fn program(&self, _pid: Pid, own: &[Range]) -> Result<(), String> {
        // The image, trampolines for libc and the loader, and the pages of these that lead there.
        assert!(own.len() >= 5, "{own:?}");
        Ok(())
    }

    fn admits(&self, _pid: Pid, file: Option<&File>) -> Result<(), String> {
        if (self.0)(file) { Ok(()) } else { Err("code that this test refuses".to_owned()) }
    }
}

impl Stand {
    /// Pages that stay unwritten for 0.2 s are merged, and whatever a victim asks for at once.
    pub(crate) fn watching() -> Self {
        Self::with(Settings { stable: Some(Duration::from_millis(200)), ..Settings::default() })
    }

    /// Nothing is merged unless a victim asks.
    pub(crate) fn on_request() -> Self {
        Self::with(Settings::default())
    }

    pub(crate) fn checked_by(check: CheckChoice) -> Self {
        Self::with(Settings { stable: Some(Duration::from_millis(200)), check, ..Settings::default() })
    }

    /// Whatever is eligible in a victim is managed and merged after 0.2 s; code may come if `admits` says so.
    pub(crate) fn of_all(admits: fn(Option<&File>) -> bool) -> Self {
        let scope = Scope::All(Arc::new(Trusting(admits)));
        Self::with(Settings { stable: Some(Duration::from_millis(200)), scope, ..Settings::default() })
    }

    /// With `HAZARDS_SCOPE=all` in the environment every victim is managed whole.
    pub(crate) fn with(mut settings: Settings) -> Self {
        if std::env::var_os("HAZARDS_SCOPE").is_some() && matches!(settings.scope, Scope::Marked) {
            settings.scope = Scope::All(Arc::new(Trusting(|_| true)));
        }
        let all = matches!(settings.scope, Scope::All(_));
        let files = AgentFiles::write().expect("the agent's files can be written");
        Self { broker: Arc::new(Broker::start(settings).expect("a broker starts")), files, all }
    }

    /// Changes a byte of each changed page of libc and the loader in the launcher's file, but not at a site.
    pub(crate) fn damage_changed_code(&self) {
        let path = self.files.sites();
        let mut bytes = std::fs::read(&path).expect("the table is there");
        let first = u32::from_le_bytes(bytes[12..16].try_into().expect("four bytes")) as usize;
        assert!(first > 0, "there are changed pages");
        // No site begins with the last byte of a page and ends there.
        for page in bytes[first * 4096..].chunks_exact_mut(4096) {
            page[4095] ^= 1;
        }
        // Nobody can write to the file as it is.
        std::fs::remove_file(&path).expect("the folder is ours");
        std::fs::write(path, bytes).expect("the table is ours");
    }

    /// This binary as a victim.
    pub(crate) fn command(&self, victim: &str) -> Command {
        let mut command = plain_command(victim);
        command.env("LD_PRELOAD", self.files.image());
        command.env("PAGEFOLD_AGENT", self.files.variable(&self.broker, self.all));
        command
    }

    pub(crate) fn start(&self, victim: &str) -> Running {
        self.start_command(self.command(victim))
    }

    pub(crate) fn start_command(&self, command: Command) -> Running {
        Running::start(command, Some(Arc::clone(&self.broker)))
    }

    /// Runs a victim to its end, serving its wishes; it must succeed.
    pub(crate) fn run(&self, victim: &str) -> String {
        self.start(victim).succeed()
    }

    pub(crate) fn summary(&self) -> Summary {
        self.broker.summary().expect("the broker lives")
    }

    /// The test would prove nothing if nothing had been merged.
    pub(crate) fn assert_merged(&self, at_least: u64) {
        let summary = self.summary();
        let merged = summary.merges + summary.retaken;
        assert!(merged >= at_least, "{merged} pages merged, {} again, refused {:?}", summary.retaken, summary.refused);
    }
}

/// This binary as a victim without the agent.
pub(crate) fn plain_command(victim: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("this binary has a path"));
    command.env("VICTIM", victim).env("RUST_BACKTRACE", "0").env_remove("LD_PRELOAD").env_remove("PAGEFOLD_AGENT");
    command
}

/// Merges what a member has handed over, now.
pub(crate) fn merge(broker: &BrokerHandle, pid: i32, ranges: Vec<Range>) -> MergeReport {
    match broker.ask(Wish::Merge { pid: Pid(pid), ranges }) {
        Ok(Wished::Report(report)) => report,
        _ => MergeReport::default(),
    }
}

/// True until a process has ended, even if nobody has asked for its status yet.
pub(crate) fn lives(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(['Z', 'X']))
}

/// A victim that runs.
pub(crate) struct Running {
    child: Child,
    input: Option<ChildStdin>,
    lines: Receiver<String>,
    log: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
    broker: Option<Arc<BrokerHandle>>,
    dense: Vec<(Arc<AtomicBool>, JoinHandle<u64>)>,
    started: Instant,
    watchdog: Duration,
}

impl Running {
    pub(crate) fn start(mut command: Command, broker: Option<Arc<BrokerHandle>>) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("this binary can be started again");
        let log = Arc::new(Mutex::new(String::new()));
        let (sender, lines) = channel();
        let output = child.stdout.take().expect("it is piped");
        let errors = child.stderr.take().expect("it is piped");
        let (log1, log2) = (Arc::clone(&log), Arc::clone(&log));
        let note = |log: &Mutex<String>, line: &str| {
            let mut log = log.lock().expect("no reader panics");
            log.push_str(line);
            log.push('\n');
        };
        let readers = vec![
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    note(&log1, &line);
                    let _ = sender.send(line);
                }
            }),
            std::thread::spawn(move || {
                for line in BufReader::new(errors).lines().map_while(Result::ok) {
                    note(&log2, &line);
                }
            }),
        ];
        let input = child.stdin.take();
        Self {
            child,
            input,
            lines,
            log,
            readers,
            broker,
            dense: Vec::new(),
            started: Instant::now(),
            watchdog: WATCHDOG,
        }
    }

    /// Another time after which it counts as hanging.
    pub(crate) fn within(mut self, watchdog: Duration) -> Self {
        self.watchdog = watchdog;
        self
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("process ids are positive")
    }

    /// Tells the victim to go on.
    pub(crate) fn say(&mut self, line: &str) {
        if let Some(input) = &mut self.input {
            let _ = writeln!(input, "{line}");
        }
    }

    fn output(&self) -> String {
        self.log.lock().expect("no reader panics").clone()
    }

    fn fail(&mut self, why: &str) -> ! {
        let output = self.output();
        let pid = self.pid();
        let stuck = std::fs::read_to_string(format!("/proc/{pid}/stack")).unwrap_or_default();
        self.end();
        panic!("{why}; the victim said:\n{output}\nits main thread was at:\n{stuck}");
    }

    /// Serves the victim's wishes until it says `word`; returns what follows the word.
    pub(crate) fn expect(&mut self, word: &str) -> String {
        loop {
            match self.next_line() {
                Some(line) => {
                    if let Some(rest) = line.strip_prefix(word) {
                        return rest.trim().to_owned();
                    }
                    self.serve(&line);
                }
                None => self.fail(&format!("no `{word}` came")),
            }
        }
    }

    /// Serves until the victim has asked for dense merging.
    pub(crate) fn expect_dense(&mut self) {
        while self.dense.is_empty() {
            let Some(line) = self.next_line() else { self.fail("it never asked for dense merging") };
            self.serve(&line);
        }
    }

    fn next_line(&mut self) -> Option<String> {
        let left = self.watchdog.saturating_sub(self.started.elapsed());
        match self.lines.recv_timeout(left) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => self.fail("it hangs"),
        }
    }

    fn serve(&mut self, line: &str) {
        let Some(broker) = self.broker.clone() else { return };
        let words: Vec<&str> = line.split(' ').collect();
        let number = |index: usize| words.get(index).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        match words.first().copied() {
            Some("merge") => {
                let ranges = if words.len() > 3 {
                    vec![Range::new(Vaddr(number(2)), Vaddr(number(3))).expect("a victim names ranges rightly")]
                } else {
                    Vec::new()
                };
                let report = merge(&broker, number(1) as i32, ranges);
                self.note(&format!(
                    "  {} merged, {} zero, refused {:?}",
                    report.pages_merged, report.zero_pages, report.refused
                ));
                self.say(&format!("{}", report.pages_merged + report.zero_pages));
            }
            Some("dense") => {
                let (over, pid) = (Arc::new(AtomicBool::new(false)), number(1) as i32);
                let stop = Arc::clone(&over);
                let run = move || {
                    let mut merged = 0;
                    // The broker waits a while for a member that it does not know.
                    while !stop.load(SeqCst) && lives(pid) {
                        let report = merge(&broker, pid, Vec::new());
                        merged += report.pages_merged;
                        std::thread::sleep(Duration::from_micros(300));
                    }
                    merged
                };
                self.dense.push((over, std::thread::spawn(run)));
            }
            Some("summary") => {
                let summary = broker.summary().expect("the broker lives");
                self.say(&format!("{} {} {}", summary.merges, summary.retaken, summary.refused.total()));
            }
            _ => {}
        }
    }

    fn note(&self, line: &str) {
        let mut log = self.log.lock().expect("no reader panics");
        log.push_str(line);
        log.push('\n');
    }

    /// Serves until the victim's output ends, then says how it ended.
    pub(crate) fn finish(&mut self) -> (ExitStatus, String) {
        while let Some(line) = self.next_line() {
            self.serve(&line);
        }
        let status = loop {
            match self.child.try_wait().expect("it is a child") {
                Some(status) => break status,
                None if self.started.elapsed() > self.watchdog => self.fail("it does not end"),
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        };
        self.end();
        (status, self.output())
    }

    /// The victim must end with status 0. Returns what it said.
    pub(crate) fn succeed(mut self) -> String {
        let (status, output) = self.finish();
        assert!(status.success(), "the victim ended with {status}:\n{output}");
        for line in output.lines().filter(|line| line.starts_with("skipped:")) {
            println!("{line}");
        }
        output
    }

    fn end(&mut self) {
        for (over, thread) in self.dense.drain(..) {
            over.store(true, SeqCst);
            let _ = thread.join();
        }
        self.input = None;
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        // A process that the victim left behind may hold the pipes open.
        let begun = Instant::now();
        while !self.readers.iter().all(JoinHandle::is_finished) && begun.elapsed() < Duration::from_secs(1) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.readers.clear();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}
