//! The test's side: an image with faults, a broker's host, victims, and the deaths.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use kernel::{Pid, Pidfd, Signal, signals};

/// After that long something hangs.
pub(crate) const WATCHDOG: Duration = Duration::from_secs(90);
/// How long helpers may take to come to their step.
const ARRIVE: Duration = Duration::from_secs(20);

/// What outer cargo passes on and must not reach the inner one.
const OUTER: [&str; 6] = [
    "CARGO_ENCODED_RUSTFLAGS",
    "RUSTFLAGS",
    "RUSTC_WRAPPER",
    "RUSTC_WORKSPACE_WRAPPER",
    "CARGO_BUILD_TARGET",
    "CARGO_TARGET_DIR",
];

/// The agent with faults, and the table of sites.
pub(crate) struct Image {
    pub(crate) image: PathBuf,
    pub(crate) sites: PathBuf,
}

impl Image {
    pub(crate) fn build() -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("faults");
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("image/Cargo.toml");
        let mut command = Command::new(env!("CARGO"));
        command.args(["build", "--release", "--quiet", "--features", "faults", "--manifest-path"]).arg(manifest);
        command.arg("--target-dir").arg(&folder);
        OUTER.iter().for_each(|variable| {
            command.env_remove(variable);
        });
        assert!(command.status().unwrap().success(), "the image with faults could not be built");
        let sites = folder.join(format!("sites.{}", std::process::id()));
        std::fs::write(&sites, broker::host_sites().unwrap()).unwrap();
        Self { image: folder.join("release/libpagefold_agent_image.so"), sites }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.sites);
    }
}

/// Which plans the helpers stop in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Plain,
    Zero,
    Diverged,
    Unmerge,
    /// The same of memory that nobody may read.
    Hidden,
}

impl Kind {
    /// What is merged before is given back.
    fn gives_back(self) -> bool {
        matches!(self, Self::Unmerge | Self::Hidden)
    }
}

/// Who dies while the helpers stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Death {
    Helper,
    HelperBroker,
    BrokerHelper,
    HelperGuardian,
    BrokerGuardian,
    Broker,
    Guardian,
    VictimExits,
    VictimExecs,
    VictimCrashes,
    VictimKilled,
    VictimKilledHelperToo,
}

impl Death {
    pub(crate) const ALL: [Self; 12] = [
        Self::Helper,
        Self::HelperBroker,
        Self::BrokerHelper,
        Self::HelperGuardian,
        Self::BrokerGuardian,
        Self::Broker,
        Self::Guardian,
        Self::VictimExits,
        Self::VictimExecs,
        Self::VictimCrashes,
        Self::VictimKilled,
        Self::VictimKilledHelperToo,
    ];
}

/// A child whose output is read by a thread, so that every wait has an end.
pub(crate) struct Player {
    pub(crate) child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    name: String,
}

impl Player {
    pub(crate) fn start(mut command: Command, name: String) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (sender, lines) = channel();
        let out = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
        Self { stdin: child.stdin.take(), child, lines, name }
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid(i32::try_from(self.child.id()).unwrap())
    }

    pub(crate) fn send(&mut self, text: &str) {
        let _ = writeln!(self.stdin.as_mut().unwrap(), "{text}");
    }

    pub(crate) fn hear(&self) -> String {
        match self.lines.recv_timeout(WATCHDOG) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => {
                let pid = self.child.id();
                panic!("{} (process {pid}) hangs:\n{}", self.name, state(pid));
            }
            Err(RecvTimeoutError::Disconnected) => panic!("{} has ended", self.name),
        }
    }

    pub(crate) fn ask(&mut self, text: &str) -> String {
        self.send(text);
        self.hear()
    }

    /// Ends its input and waits for its end.
    pub(crate) fn end(&mut self) -> ExitStatus {
        self.stdin = None;
        let deadline = Instant::now() + WATCHDOG;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "{} does not end:\n{}", self.name, state(self.child.id()));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Player {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where every thread of a process stands.
fn state(pid: u32) -> String {
    let read = |path: String| std::fs::read_to_string(path).unwrap_or_default();
    let mut text = String::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().filter_map(Result::ok) {
        let path = task.path().display().to_string();
        text += &format!(
            "{} {} wchan {} call {}{}",
            task.file_name().display(),
            read(format!("{path}/comm")).trim(),
            read(format!("{path}/wchan")),
            read(format!("{path}/syscall")),
            read(format!("{path}/stack")),
        );
    }
    text
}

/// A process that may end at any time, and whose number may then be somebody else's.
#[derive(Clone)]
pub(crate) struct Other {
    pid: Pid,
    pidfd: std::rc::Rc<Pidfd>,
}

impl Other {
    pub(crate) fn new(pid: Pid) -> Self {
        Self { pid, pidfd: std::rc::Rc::new(Pidfd::open(pid).unwrap()) }
    }

    pub(crate) fn kill(&self, signal: Signal) {
        let _ = self.pidfd.send_signal(signal);
    }

    pub(crate) fn stopped(&self) -> bool {
        !self.pidfd.exited().unwrap() && letter(self.pid) == Some('T')
    }

    pub(crate) fn wait_gone(&self, who: &str) {
        let gone = self.pidfd.wait_exited(WATCHDOG).unwrap();
        assert!(gone, "{who} (process {}) does not end:\n{}", self.pid.get(), state(self.pid.get() as u32));
    }
}

/// The state letter of a process, `None` once it is gone.
fn letter(pid: Pid) -> Option<char> {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.get())).ok()?;
    stat.rsplit_once(") ")?.1.chars().next()
}

fn gone(pid: Pid) -> bool {
    letter(pid).is_none_or(|letter| letter == 'Z' || letter == 'X')
}

fn children(pid: Pid) -> Vec<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", pid.get())).into_iter().flatten().filter_map(Result::ok);
    tasks
        .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid).collect::<Vec<_>>())
        .collect()
}

pub(crate) struct Victim {
    pub(crate) player: Player,
    pub(crate) helper: Other,
}

/// A broker with its guardian.
pub(crate) struct Stage<'a> {
    image: &'a Image,
    pub(crate) broker: Player,
    pub(crate) guardian: Other,
    pub(crate) address: String,
}

impl<'a> Stage<'a> {
    pub(crate) fn new(image: &'a Image) -> Self {
        Self::with(image, &["--broker"])
    }

    /// Everything of its victims is managed, whoever they are.
    pub(crate) fn of_all(image: &'a Image) -> Self {
        Self::with(image, &["--broker", "all"])
    }

    fn with(image: &'a Image, role: &[&str]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(role);
        let broker = Player::start(command, "broker".to_owned());
        let address = broker.hear();
        let guardian = Other::new(*children(broker.pid()).first().expect("the broker has a guardian"));
        Self { image, broker, guardian, address }
    }

    pub(crate) fn command(&self, role: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg(role);
        command.env("LD_PRELOAD", &self.image.image);
        command.env("PAGEFOLD_AGENT", format!("{}:{}", self.address, self.image.sites.display()));
        command
    }

    pub(crate) fn victim(&self, name: &str) -> Victim {
        self.victim_of(self.command("--victim"), name)
    }

    pub(crate) fn victim_of(&self, command: Command, name: &str) -> Victim {
        let player = Player::start(command, name.to_owned());
        let ready = player.hear();
        let helper = ready.strip_prefix("ready ").and_then(|pid| pid.parse().ok()).map(Pid).expect("a helper's pid");
        assert_ne!(helper, Pid(0), "no helper came up");
        Victim { player, helper: Other::new(helper) }
    }

    /// Ends the broker, if it lives, and looks for processes that are left.
    pub(crate) fn end(mut self, helpers: &[Other]) {
        if self.broker.child.try_wait().unwrap().is_none() {
            assert!(self.broker.end().success(), "the broker ends in order");
        }
        self.guardian.wait_gone("the guardian");
        helpers.iter().for_each(|helper| helper.wait_gone("a helper"));
        signals::reap_others(Pid(0));
        let left: Vec<Pid> = children(Pid::this()).into_iter().filter(|pid| !gone(*pid)).collect();
        assert!(left.is_empty(), "processes are left: {left:?}");
    }

    /// One death, with a victim for each step. Returns how many came to their step.
    pub(crate) fn round(mut self, kind: Kind, death: Death, steps: &[u64]) -> usize {
        let victim = |step: &u64| {
            let mut command = self.command("--victim");
            if kind == Kind::Hidden {
                // Its threads would touch what is forbidden.
                command.arg("--quiet");
            }
            self.victim_of(command, &format!("victim at step {step} of {kind:?}"))
        };
        let mut victims: Vec<Victim> = steps.iter().map(victim).collect();
        let number = match kind {
            Kind::Plain => 1,
            Kind::Zero => 2,
            Kind::Diverged => 3,
            Kind::Unmerge | Kind::Hidden => 5,
        };
        let begin = if kind == Kind::Zero { "zero" } else { "fill" };
        if kind == Kind::Diverged || kind.gives_back() {
            for victim in &mut victims {
                victim.player.ask("fill");
            }
            for victim in &mut victims {
                assert_eq!(victim.player.ask("merged"), "merged", "{}", self.broker.ask("summary"));
            }
        }
        for (victim, step) in victims.iter_mut().zip(steps) {
            victim.player.ask(&format!("arm {number} {step}"));
        }
        if kind.gives_back() {
            // Else whoever gets through to a frozen page's place would find the same bytes there, the store's.
            victims.iter_mut().for_each(|victim| _ = victim.player.ask("diverge"));
        }
        let order = match kind {
            Kind::Plain | Kind::Zero => begin,
            Kind::Diverged => "diverge",
            Kind::Unmerge => "unmerge",
            Kind::Hidden => "unmerge-hidden",
        };
        victims.iter_mut().for_each(|victim| victim.player.send(order));
        let stopped = arrived(&victims);
        // Forks past the gate: with the broker alive from before the death on, else once it is dead. (Who is killed between
        // reading a fork's event and filling its child takes the content with him.)
        let fork = |victims: &mut [Victim]| {
            victims.iter_mut().for_each(|victim| victim.player.send("forks"));
            std::thread::sleep(Duration::from_millis(50));
        };
        // The threads that fork are not there.
        let forking = kind != Kind::Hidden;
        let forks_before = forking && matches!(death, Death::Helper | Death::HelperGuardian | Death::Guardian);
        let forks_after = forking && matches!(death, Death::HelperBroker | Death::BrokerHelper | Death::Broker);
        if forks_before {
            fork(&mut victims);
        }
        let helpers: Vec<Other> = victims.iter().map(|victim| victim.helper.clone()).collect();
        let all = |signal: Signal| helpers.iter().for_each(|helper| helper.kill(signal));
        let victim_order = match death {
            Death::VictimExits => Some("exit"),
            Death::VictimExecs => Some("exec"),
            Death::VictimCrashes => Some("crash"),
            Death::VictimKilled | Death::VictimKilledHelperToo => Some("kill"),
            _ => None,
        };
        match death {
            Death::Helper => all(Signal::KILL),
            Death::HelperBroker => {
                all(Signal::KILL);
                Other::new(self.broker.pid()).kill(Signal::KILL);
                fork(&mut victims);
            }
            Death::BrokerHelper => {
                Other::new(self.broker.pid()).kill(Signal::KILL);
                fork(&mut victims);
                all(Signal::KILL);
            }
            Death::HelperGuardian => {
                self.guardian.kill(Signal::KILL);
                all(Signal::KILL);
            }
            Death::BrokerGuardian => {
                self.guardian.kill(Signal::KILL);
                Other::new(self.broker.pid()).kill(Signal::KILL);
                Other::new(self.broker.pid()).wait_gone("the broker");
                all(Signal::CONT);
            }
            Death::Broker => {
                Other::new(self.broker.pid()).kill(Signal::KILL);
                fork(&mut victims);
                all(Signal::CONT);
            }
            Death::Guardian => {
                self.guardian.kill(Signal::KILL);
                all(Signal::CONT);
            }
            _ => {}
        }
        match victim_order {
            None => victims.iter_mut().zip(steps).for_each(|(victim, step)| {
                assert_eq!(victim.player.hear(), "done");
                let answer = victim.player.ask("finish");
                assert!(answer.starts_with("fine "), "step {step} of {kind:?}, {death:?}: {answer}");
                let forks: Option<u64> = answer.rsplit(' ').next().and_then(|forks| forks.parse().ok());
                let forking = forks_before || forks_after;
                assert!(!forking || forks > Some(0), "step {step} of {kind:?}, {death:?}: nothing was forked");
                assert!(victim.player.end().success());
            }),
            Some(order) => {
                for victim in &mut victims {
                    if order == "kill" {
                        Other::new(victim.player.pid()).kill(Signal::KILL);
                    } else {
                        // It may be waiting on a frozen page with the first order: then this one comes too late.
                        victim.player.send(order);
                    }
                }
                if order != "kill" {
                    // The main thread of a victim may itself wait for a page.
                    std::thread::sleep(Duration::from_millis(300));
                    all(Signal::CONT);
                }
                for victim in &mut victims {
                    let status = victim.player.end();
                    let right = match order {
                        "exit" => status.code() == Some(42),
                        "exec" => status.code() == Some(43),
                        "crash" => status.signal() == Some(11),
                        _ => status.signal() == Some(9),
                    };
                    assert!(right, "{death:?} in {kind:?}: {status}");
                }
                if death == Death::VictimKilledHelperToo { all(Signal::KILL) } else { all(Signal::CONT) }
            }
        }
        drop(victims);
        self.end(&helpers);
        stopped
    }
}

/// A helper is killed with pages frozen, and nobody has given them back yet when the program asks for another one and moves
/// its memory. Seen to fail: the call passed the new helper's gate, and moved the place without the pages.
pub(crate) fn another_helper(image: &Image) {
    let mut stopped = 0;
    for step in [12, 25, 40] {
        let mut stage = Stage::new(image);
        let mut command = stage.command("--victim");
        command.arg("--quiet");
        let mut victim = stage.victim_of(command, "victim that asks for another helper");
        victim.player.ask(&format!("arm 1 {step}"));
        victim.player.ask("fill");
        stopped += arrived(std::slice::from_ref(&victim));
        let broker = Other::new(stage.broker.pid());
        broker.kill(Signal::STOP);
        victim.helper.kill(Signal::KILL);
        victim.helper.wait_gone("the helper");
        // As long as its number exists it could be one that lives.
        signals::reap_others(victim.player.pid());
        victim.player.send("move");
        std::thread::sleep(Duration::from_millis(500));
        broker.kill(Signal::CONT);
        assert_eq!(victim.player.hear(), "done");
        let answer = victim.player.ask("finish");
        assert!(answer.starts_with("fine "), "step {step}: {answer}");
        assert!(victim.player.end().success());
        stage.broker.ask("summary");
        let helper = victim.helper.clone();
        drop(victim);
        stage.end(&[helper]);
    }
    assert!(stopped > 0, "no helper stood still");
}

/// Waits until the helpers stand still, or have nothing more to do.
fn arrived(victims: &[Victim]) -> usize {
    let deadline = Instant::now() + ARRIVE;
    let mut quiet = Instant::now();
    let mut before = 0;
    loop {
        let stopped = victims.iter().filter(|victim| victim.helper.stopped()).count();
        if stopped != before {
            (before, quiet) = (stopped, Instant::now());
        }
        // Those that are late have plans that are shorter.
        let enough = stopped > 0 && quiet.elapsed() > Duration::from_millis(1500);
        if stopped == victims.len() || enough || Instant::now() > deadline {
            return stopped;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
