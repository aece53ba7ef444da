//! `pagefold ksm sweep`: a command under a list of settings.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use kernel::Pid;
use kernel::launch::{LaunchError, Launched};
use kernel::signals::SignalFd;
use ksm::sweep::{Aim, Plan, Report, Run, Setting, Step, Sweep, SweepError};
use ksm::{KsmError, KsmSysfs, StatePath, Tree};

use super::refused::refused;
use super::sweep_table::{ended, table};
use crate::args::ksm_sweep::{AimArg, SweepArgs};
use crate::guarded::Guardian;
use crate::say;
use crate::start::{Ready, not_started};
use crate::summary_file;
use crate::text_file::text_of;

pub(crate) fn sweep(args: &SweepArgs) -> anyhow::Result<ExitCode> {
    let settings = match settings(args) {
        Ok(settings) => settings,
        Err(error) => {
            say::note(format_args!("{error:#}"));
            return Ok(ExitCode::from(crate::USAGE));
        }
    };
    tried(args, settings).or_else(refused)
}

fn settings(args: &SweepArgs) -> anyhow::Result<Vec<Setting>> {
    if !args.grid.is_empty() {
        return Setting::grid(&args.grid).context("--grid");
    }
    let Some(path) = &args.settings else { return Ok(Setting::usual()) };
    let text = text_of(path).with_context(|| format!("cannot read {}", path.display()))?;
    Setting::parse_lines(&text).map_err(|(line, error)| match line {
        0 => anyhow::anyhow!("{}: {error}", path.display()),
        line => anyhow::anyhow!("{}, line {line}: {error}", path.display()),
    })
}

fn tried(args: &SweepArgs, settings: Vec<Setting>) -> anyhow::Result<ExitCode> {
    let ready = match Ready::get(None) {
        Ok(ready) => ready,
        Err(status) => return Ok(status),
    };
    let outputs = Outputs::open(args)?;
    let (sysfs, path) = (KsmSysfs::host(), StatePath::for_this_user());
    ksm::check_writable(&sysfs)?;
    // First the guardian, then the lease: at no moment is there a lease that nobody would end.
    let guardian = Guardian::start(&path, &sysfs, args.quiet)?;
    // All that is below this process is the command's, but the guardian, and what whoever became this process by exec had
    // started before: that is his.
    let tree = Tree::below_self().without(guardian.pid()).without_those_there();
    let (mut sweep, repaired) = match Sweep::begin(&path, &sysfs, tree, plan(args, settings)) {
        Ok(begun) => begun,
        Err(error) => {
            guardian.end();
            if let SweepError::NotHere { .. } = error {
                say::note(error);
                return Ok(ExitCode::from(crate::NOT_HERE));
            }
            return Err(lifted(error));
        }
    };
    if !args.quiet && !repaired.is_clean() {
        say::note(&repaired);
    }
    let mut interrupted = Interrupted { signals: &ready.signals, command: None, given_up: false };
    let mut unwritten = None;
    let mut input = Input::of_this();
    let done = {
        let asked = std::cell::RefCell::new(&mut interrupted);
        let mut start = || {
            let launched = launch(args, &ready, &mut input)?;
            asked.borrow_mut().command = Some(launched.pid());
            Ok(launched)
        };
        sweep.run(&mut start, &mut || asked.borrow_mut().look(), &mut |step| {
            if let Step::SoFar(report) = step {
                // What is there is kept, whatever comes.
                unwritten = outputs.write(report).err();
            } else if !args.quiet {
                progress(step);
            }
        })
    };
    let report = sweep.report(matches!(done, Ok(true)));
    let released = sweep.end();
    if released.is_ok() {
        guardian.end();
    }
    let any = report.settings.iter().any(|tried| !tried.runs.is_empty());
    if any {
        unwritten = outputs.write(&report).err();
        say::lines(&table(&report));
        if args.json {
            say::answer(&format!("{}\n", serde_json::to_string(&report)?))?;
        }
    }
    if let Err(error) = released {
        return Err(lifted(error).context("KSM's settings are not restored yet"));
    }
    match done {
        Err(SweepError::Launch(error)) => return Ok(not_started(error)),
        Err(error) => return Err(lifted(error)),
        Ok(true) => {}
        Ok(false) => say::note("interrupted: what was measured is kept, KSM's settings are restored"),
    }
    if let Some(error) = unwritten {
        return Err(error);
    }
    let good = report.complete && report.settings.iter().all(|tried| tried.good > 0);
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn plan(args: &SweepArgs, settings: Vec<Setting>) -> Plan {
    Plan {
        settings,
        repeat: args.repeat,
        warm_up: !args.no_warm_up,
        at_most: args.duration.map(Duration::from_secs_f64),
        settle: Duration::from_secs_f64(args.settle),
        aim: match args.goal {
            AimArg::Balanced => Aim::Balanced,
            AimArg::Saved => Aim::Saved,
            AimArg::Efficiency => Aim::Efficiency,
            AimArg::RunTime => Aim::RunTime,
        },
        command: args.command.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
    }
}

/// The command as the caller wants it, with all its memory mergeable.
fn launch(args: &SweepArgs, ready: &Ready, input: &mut Input) -> Result<Launched, SweepError> {
    let mut launch = ready.launch(&args.command)?;
    launch.memory_merge(true);
    let stdin = input.anew().map_err(|source| LaunchError::Setup { what: "the stdin", source })?;
    launch.command().stdin(stdin);
    if args.json {
        let stderr = std::io::stderr().as_fd().try_clone_to_owned();
        // Without a stderr there is nowhere to send it.
        launch.command().stdout(stderr.map_or_else(|_error| Stdio::null(), Stdio::from));
    }
    Ok(launch.spawn()?)
}

/// What the command reads, in each run the same.
enum Input {
    /// From this place on.
    File(File, u64),
    /// What a pipe or a terminal has can be read once only, and the first run would take it from the others.
    Nothing,
}

impl Input {
    /// This process's own, if it can be read again.
    fn of_this() -> Self {
        let file = std::io::stdin().as_fd().try_clone_to_owned().map(File::from);
        let placed = file.and_then(|mut file| file.stream_position().map(|place| Self::File(file, place)));
        placed.unwrap_or(Self::Nothing)
    }

    /// For one more run.
    fn anew(&mut self) -> std::io::Result<Stdio> {
        match self {
            Self::File(file, place) => {
                file.seek(SeekFrom::Start(*place))?;
                file.try_clone().map(Stdio::from)
            }
            Self::Nothing => Ok(Stdio::null()),
        }
    }
}

/// The errors of KSM as such, so that their way out can be said.
fn lifted(error: SweepError) -> anyhow::Error {
    match error {
        SweepError::Ksm(error) => anyhow::Error::new::<KsmError>(error),
        other => other.into(),
    }
}

/// Whether somebody asked this process to end.
struct Interrupted<'a> {
    signals: &'a SignalFd,
    command: Option<Pid>,
    given_up: bool,
}

impl Interrupted<'_> {
    fn look(&mut self) -> bool {
        use kernel::Signal;
        // A descriptor that cannot be read any more is an end too: nobody could stop us otherwise.
        loop {
            match self.signals.take() {
                Ok(Some(arrived)) => {
                    let ends = [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT];
                    // What the command sends to its group or parent is its own affair.
                    let own = arrived.sender().is_some_and(|sender| Some(sender) == self.command);
                    self.given_up |= arrived.signal().is_some_and(|signal| ends.contains(&signal)) && !own;
                }
                Ok(None) => return self.given_up,
                Err(_) => {
                    self.given_up = true;
                    return true;
                }
            }
        }
    }
}

/// Where reports go.
struct Outputs {
    json: Option<PathBuf>,
    html: Vec<PathBuf>,
    about: String,
}

impl Outputs {
    /// Makes sure that they can be written, before the long work starts.
    fn open(args: &SweepArgs) -> anyhow::Result<Self> {
        let mut outputs = Self { json: None, html: Vec::new(), about: about() };
        let open = |path: &Path| {
            summary_file::regular(path).with_context(|| format!("cannot write the report {}", path.display()))
        };
        if let Some(folder) = &args.out {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
            outputs.json = Some(open(&folder.join("sweep.json"))?);
            outputs.html.push(open(&folder.join("sweep.html"))?);
        }
        if let Some(path) = &args.html {
            outputs.html.push(open(path)?);
        }
        Ok(outputs)
    }

    fn write(&self, report: &Report) -> anyhow::Result<()> {
        let put = |path: &Path, text: &str| {
            summary_file::replace(path, text.as_bytes())
                .with_context(|| format!("cannot write the report {}", path.display()))
        };
        if let Some(path) = &self.json {
            put(path, &format!("{}\n", serde_json::to_string(report)?))?;
        }
        if !self.html.is_empty() {
            let page = eval::sweep_page(report, &self.about);
            self.html.iter().try_for_each(|path| put(path, &page))?;
        }
        Ok(())
    }
}

/// Which machine, and what was asked.
fn about() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    format!("{}: pagefold {}", host.trim(), words.join(" "))
}

fn progress(step: Step<'_>) {
    match step {
        Step::Begins(None) => say::note("warm-up, with ksmd off"),
        Step::Begins(Some((number, all, name))) => say::note(format_args!("run {} of {all}: {name}", number + 1)),
        Step::Ended(_, run) => tell(run),
        Step::Settling | Step::SoFar(_) => {}
    }
}

fn tell(run: &Run) {
    say::note(ended(run));
}
