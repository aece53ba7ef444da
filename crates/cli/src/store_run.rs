//! `pagefold run` with the store: launches a command tree in a partition, with the broker in this process.
//!
//! The command is always started, managed or not, and its status and signals pass through. What cannot be managed is
//! said once, with the way out.

use std::cell::RefCell;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use broker::{AgentFiles, Broker, BrokerError, BrokerHandle, CheckChoice, Settings};
use kernel::launch::{Launch, LaunchError, Launched};
use kernel::probe::{Missing, Name};
use kernel::signals;
use kernel::{Pid, Seqpacket};
use ksm::{Layout, StackLimit};

use crate::args::{Check, LayoutArg, RunArgs, Scope};
use crate::outsiders::Outsiders;
use crate::say;
use crate::start::{Ready, not_started, told};
use crate::store_report::Reporter;
use crate::watch::{Seen, Watch, pass_on};
use crate::whole::Whole;

/// The hidden subcommand under which this binary is its own guardian.
pub(crate) const GUARDIAN: &str = "store-guardian";

const SUMMARY_EVERY: Duration = Duration::from_secs(10);
/// For a command that cannot be started for want of something.
const TRIES: u32 = 20;
const MOMENT: Duration = Duration::from_millis(20);
/// Where the agent finds its broker: `NAME:SECRET:SITES`, with `all:` before the sites where everything is managed.
const AGENT_VARIABLE: &str = "PAGEFOLD_AGENT";

/// Runs the command.
pub(crate) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let ready = match Ready::get(args.summary.as_deref()) {
        Ok(ready) => ready,
        Err(status) => return Ok(status),
    };
    let say = |text: &str| {
        if !args.quiet {
            say::note(text);
        }
    };
    let unmanageable = args.command.first().and_then(unmanageable);
    if let Some(reason) = &unmanageable {
        say(&format!("the command runs unmanaged: {reason}"));
    }
    let (managed, launched) = match start(args, &ready, &say) {
        Ok(started) => started,
        Err(error) => return Ok(not_started(error)),
    };
    let all = managed.as_ref().is_some_and(|managed| managed.all);
    let reporter = Reporter {
        broker: managed.as_ref().map(|managed| &managed.broker),
        outsiders: all.then(|| RefCell::new(Outsiders::below_self())),
        file: ready.summary.as_ref(),
        args,
        unmanaged: unmanageable.is_some(),
    };
    reporter.write();
    let status = watch(&mut Watch::new(launched, &ready.signals), &reporter)?;
    reporter.end();
    if let Some(Managed { broker, files, .. }) = managed {
        // Helpers leave with the broker; what is then still below this process are the command's own.
        drop(broker);
        signals::reap_others(Pid(0));
        if has_children() {
            files.leave();
        }
    }
    Ok(pass_on(status))
}

/// Runs until the command has ended.
fn watch(watch: &mut Watch<'_>, reporter: &Reporter<'_>) -> anyhow::Result<ExitStatus> {
    let mut next = Instant::now() + SUMMARY_EVERY;
    loop {
        match watch.look()? {
            Seen::Ended(status) => return Ok(status),
            Seen::Runs { asked: true } => reporter.state(),
            Seen::Runs { asked: false } => {}
        }
        if Instant::now() >= next {
            next += SUMMARY_EVERY;
            reporter.write();
        }
        watch.wait(reporter.look_for_outsiders().map_or(next, |look| look.min(next)))?;
    }
}

/// The broker and the agent's files.
pub(crate) struct Managed {
    broker: BrokerHandle,
    files: AgentFiles,
    /// Everything eligible is managed.
    all: bool,
}

/// Why a program cannot get the agent, if it cannot.
pub(crate) fn unmanageable(program: impl AsRef<Path>) -> Option<String> {
    match proof::resolve_program(program.as_ref()).ok()?.class {
        proof::Class::NoAgent(reason) => Some(reason.to_string()),
        _ => None,
    }
}

/// True for a program that the agent's name would do harm to: its loader says that it cannot load the agent, or it does
/// not start. Others without an agent pass the name on to what they execute.
fn is_disturbed(program: impl AsRef<Path>) -> bool {
    use proof::{Class::NoAgent, Reason};

    let class = proof::resolve_program(program.as_ref()).map(|program| program.class);
    let Ok(NoAgent(reason)) = class else { return false };
    matches!(reason, Reason::ThirtyTwoBit | Reason::Machine { .. } | Reason::Musl | Reason::AddressSanitizer)
}

/// Starts the command, managed if that can be had.
fn start(args: &RunArgs, ready: &Ready, say: &dyn Fn(&str)) -> Result<(Option<Managed>, Launched), LaunchError> {
    let outer = OuterRun::find();
    let managed = match manage(args, outer.as_ref()) {
        Ok(managed) => Some(managed),
        Err(error) => {
            say(&format!("the command runs unmanaged: {error:#}{}", way_out(&error)));
            // Helpers of an outer run are none of ours to adopt, and do not come where they would be.
            let _ = kernel::task::set_child_subreaper(false);
            None
        }
    };
    let layout = match args.layout {
        LayoutArg::Shared => Layout::of_partition().unwrap_or_else(|error| {
            say(&format!("no shared layout: {error:#}"));
            Layout::Default
        }),
        LayoutArg::Default => Layout::Default,
    };
    let error = match spawn(ready, args, managed.as_ref(), outer.as_ref(), layout) {
        Err(error) if error.is_scarcity() => error,
        spawned => return spawned.map(|launched| (managed, launched)),
    };
    // The broker has what the command lacks, or the layout takes it.
    if managed.is_some() || layout != Layout::Default {
        say(&format!("the command runs unmanaged, since with the broker too little is left: {}", told(&error)));
    }
    drop(managed);
    let mut last = error;
    for _ in 0..TRIES {
        // What was begun and given up may take a moment to end.
        signals::reap_others(Pid(0));
        std::thread::sleep(MOMENT);
        match spawn(ready, args, None, outer.as_ref(), Layout::Default) {
            Err(error) if error.is_scarcity() => last = error,
            spawned => return spawned.map(|launched| (None, launched)),
        }
    }
    Err(last)
}

fn spawn(
    ready: &Ready,
    args: &RunArgs,
    managed: Option<&Managed>,
    outer: Option<&OuterRun>,
    layout: Layout,
) -> Result<Launched, LaunchError> {
    let mut launch = ready.launch(&args.command)?;
    if args.command.first().is_some_and(is_disturbed) {
        without_agent(launch.command());
    } else if let Some(managed) = managed {
        managed.enter_from(&mut launch, outer);
    }
    // ksmd must not compete for the same pages; a kernel without KSM has nothing to switch off.
    if kernel::ksm_sysfs::memory_merge().is_ok_and(|on| on) {
        launch.memory_merge(false);
    }
    layout.spawn(launch, StackLimit::PutBack).map(|(launched, _)| launched)
}

/// Takes the agent of a run that this process is a part of off a command, which then is nobody's member.
pub(crate) fn without_agent(command: &mut Command) {
    let outer = OuterRun::find();
    if outer.is_none() {
        return;
    }
    command.env_remove(AGENT_VARIABLE);
    match preloaded(outer.as_ref()) {
        Some(own) => command.env("LD_PRELOAD", own),
        None => command.env_remove("LD_PRELOAD"),
    };
}

/// What the user preloads, without the agent of the run that started this process, which may have ended.
fn preloaded(outer: Option<&OuterRun>) -> Option<OsString> {
    let own = std::env::var_os("LD_PRELOAD")?;
    let dead = outer.and_then(|outer| outer.sites.parent());
    let kept = own.to_str().map(|text| {
        let words = text.split([':', ' ']).filter(|word| !word.is_empty() && Path::new(word).parent() != dead);
        OsString::from(words.collect::<Vec<_>>().join(":"))
    });
    Some(kept.unwrap_or(own)).filter(|words| !words.is_empty())
}

/// The way out of what keeps a command from being managed.
fn way_out(error: &anyhow::Error) -> String {
    let missing = error.downcast_ref::<Missing>().map(|missing| missing.remedy.as_str());
    let remedy = match error.downcast_ref::<BrokerError>() {
        Some(BrokerError::Agent { .. }) => {
            "XDG_RUNTIME_DIR or TMPDIR with a folder that can be written and executed from"
        }
        _ => missing.unwrap_or_default(),
    };
    // Nor would another backend be of use without /proc.
    if error.downcast_ref::<Missing>().is_some_and(|missing| missing.what == Name::OwnProc.text()) {
        return format!("; way out: {remedy}");
    }
    match (missing, remedy) {
        (None, "") => String::new(),
        (_, "") => "; way out: --backend ksm".to_owned(),
        (_, remedy) => format!("; way out: {remedy}, or --backend ksm"),
    }
}

/// A run with the store that this process is itself a part of, as the environment tells.
struct OuterRun {
    name: String,
    sites: PathBuf,
}

impl OuterRun {
    fn find() -> Option<Self> {
        let variable = std::env::var(AGENT_VARIABLE).ok()?;
        let mut words = variable.splitn(3, ':');
        let (name, _secret, sites) = (words.next()?, words.next()?, words.next()?);
        Some(Self { name: name.to_owned(), sites: sites.strip_prefix("all:").unwrap_or(sites).into() })
    }

    /// True if its broker is still there: what a run has left behind names one that has ended.
    fn goes_on(&self) -> bool {
        Seqpacket::connect_abstract(self.name.as_bytes()).is_ok()
    }
}

/// Whether this process can have a broker of its own that merges running programs.
fn can_manage(outer: Option<&OuterRun>) -> anyhow::Result<()> {
    if outer.is_some_and(OuterRun::goes_on) {
        anyhow::bail!("it is inside a pagefold run already, whose partition it belongs to");
    }
    broker::enough_for_a_broker()?;
    kernel::probe::Features::probe().live_merge().map_err(anyhow::Error::new)
}

fn manage(args: &RunArgs, outer: Option<&OuterRun>) -> anyhow::Result<Managed> {
    can_manage(outer)?;
    let scope = match args.scope {
        Scope::Marked => broker::Scope::Marked,
        Scope::All => broker::Scope::All(Arc::new(Whole::new(args.trust.as_deref())?)),
    };
    Managed::begin(Settings {
        label: args.partition.clone(),
        strict: args.strict,
        scope,
        check: match args.check {
            Check::Auto => CheckChoice::Auto,
            Check::Bpf => CheckChoice::Bpf,
            Check::Collapse => CheckChoice::Collapse,
            Check::Vouch => CheckChoice::Vouch,
        },
        stable: Some(Duration::from_secs_f64(args.stable)),
        store_limit: args.store_limit.map(|mib| mib << 20),
        runnable_per_cpu: args.max_runnable,
        ..Settings::default()
    })
}

impl Managed {
    /// As `run --scope all` manages a tree, in this process.
    ///
    /// # Errors
    /// What is missing, or that this process is itself a part of a run.
    pub(crate) fn whole(stable: Duration) -> anyhow::Result<Self> {
        can_manage(OuterRun::find().as_ref())?;
        let scope = broker::Scope::All(Arc::new(Whole::new(None)?));
        Self::begin(Settings { scope, stable: Some(stable), ..Settings::default() })
    }

    fn begin(settings: Settings) -> anyhow::Result<Self> {
        let files = AgentFiles::write()?;
        let program = std::env::current_exe().context("cannot find this program for the guardian")?;
        let all = matches!(settings.scope, broker::Scope::All(_));
        let guardian = Some((program, vec![GUARDIAN.to_owned()]));
        Ok(Self { broker: Broker::start(Settings { guardian, ..settings })?, files, all })
    }

    /// Puts the agent into a command.
    pub(crate) fn enter(&self, launch: &mut Launch) {
        self.enter_from(launch, OuterRun::find().as_ref());
    }

    fn enter_from(&self, launch: &mut Launch, outer: Option<&OuterRun>) {
        let mut preload = self.files.image().into_os_string();
        if let Some(own) = preloaded(outer) {
            preload.push(":");
            preload.push(own);
        }
        launch.command().env("LD_PRELOAD", preload).env(AGENT_VARIABLE, self.files.variable(&self.broker, self.all));
    }

    /// # Errors
    /// That the broker has ended.
    pub(crate) fn summary(&self) -> anyhow::Result<broker::Summary> {
        self.broker.summary().context("the broker has ended")
    }
}

/// True if a process below this one goes on.
fn has_children() -> bool {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return false };
    threads
        .filter_map(Result::ok)
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok())
        .any(|children| !children.trim().is_empty())
}

/// The guardian's process: `pagefold store-guardian FD`.
pub(crate) fn guardian_main(args: &[OsString]) -> anyhow::Result<ExitCode> {
    let number: i32 = args
        .first()
        .and_then(|number| number.to_str())
        .and_then(|number| number.parse().ok())
        .context("this is for pagefold itself")?;
    // Through /proc the number becomes a descriptor of our own without taking anything on trust.
    let socket: OwnedFd = kernel::Pidfd::open(Pid::this())?.getfd(number).context("there is no such descriptor")?;
    // With as many threads as there are members in the end, and the limits of the run.
    kernel::address_space::one_arena();
    broker::guardian::run(socket);
    Ok(ExitCode::SUCCESS)
}
