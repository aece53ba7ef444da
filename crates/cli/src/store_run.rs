//! `pagefold run` with the store: launches a command tree in a partition, with the broker in this process.
//!
//! The command is always started, managed or not, and its status and signals pass through. What cannot be managed is
//! said once, with the way out.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use broker::{AgentFiles, Broker, BrokerHandle, CheckChoice, Settings, Summary};
use kernel::launch::{Launch, LaunchError, Launched};
use kernel::probe::Missing;
use kernel::signals::{self, SignalFd};
use kernel::{Pid, Signal};
use ksm::{Layout, StackLimit};

use crate::args::{Check, LayoutArg, RunArgs};
use crate::ksm_run::{pass_on, replace};

/// The hidden subcommand under which this binary is its own guardian.
pub(crate) const GUARDIAN: &str = "store-guardian";

const FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
const SUMMARY_EVERY: Duration = Duration::from_secs(10);

/// Runs the command.
pub(crate) fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    let summary_file = match args.summary.as_deref().map(SummaryFile::open).transpose() {
        Ok(file) => file,
        Err(error) => {
            eprintln!("pagefold: {error:#}");
            return Ok(ExitCode::from(FAILED));
        }
    };
    let signals = SignalFd::block(&[Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT, Signal::USR1, Signal::CHILD])
        .context("cannot take signals")?;
    // Helpers are adopted by this process, not by the program that they serve.
    kernel::task::set_child_subreaper(true).context("cannot become a child subreaper")?;
    let say = |text: &str| {
        if !args.quiet {
            eprintln!("pagefold: {text}");
        }
    };
    let unmanaged = args.command.first().and_then(unmanageable);
    if let Some(reason) = &unmanaged {
        say(&format!("the command runs unmanaged: {reason}"));
    }
    let (managed, launched) = match start(args, &signals, &say) {
        Ok(started) => started,
        Err(error) => {
            let status = match &error {
                LaunchError::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound => NOT_FOUND,
                LaunchError::Exec { .. } => NOT_EXECUTABLE,
                _ => FAILED,
            };
            eprintln!("pagefold: {:#}", anyhow::Error::new(error));
            if let Some(file) = summary_file {
                file.remove();
            }
            return Ok(ExitCode::from(status));
        }
    };
    let mut report = Reporter {
        managed: managed.as_ref(),
        file: summary_file,
        quiet: args.quiet,
        args,
        unmanaged: unmanaged.is_some(),
    };
    let status = report.watch(launched, &signals)?;
    report.end();
    if let Some(Managed { broker, files }) = managed {
        // Helpers leave with the broker; what is then still below this process are the command's own.
        drop(broker);
        signals::reap_others(Pid(0));
        if has_children() {
            files.leave();
        }
    }
    Ok(pass_on(status))
}

/// The broker and the agent's files.
struct Managed {
    broker: BrokerHandle,
    files: AgentFiles,
}

/// Why a program cannot get the agent, if it cannot.
fn unmanageable(program: &OsString) -> Option<String> {
    match proof::resolve_program(Path::new(program)).ok()?.class {
        proof::Class::NoAgent(reason) => Some(format!("{reason}")),
        _ => None,
    }
}

fn start(args: &RunArgs, signals: &SignalFd, say: &dyn Fn(&str)) -> Result<(Option<Managed>, Launched), LaunchError> {
    let managed = match manage(args) {
        Ok(managed) => Some(managed),
        Err(error) => {
            let way_out = error
                .downcast_ref::<Missing>()
                .map_or_else(String::new, |missing| format!("; way out: {}, or --backend ksm", missing.remedy));
            say(&format!("the command runs unmanaged: {error:#}{way_out}"));
            None
        }
    };
    let (program, arguments) = args.command.split_first().ok_or_else(|| LaunchError::Exec {
        program: OsString::new(),
        source: io::Error::from(io::ErrorKind::NotFound),
    })?;
    let mut command = Command::new(program);
    command.args(arguments);
    signals.restore_in(&mut command);
    if let Some(managed) = &managed {
        managed.lead_in(&mut command);
    }
    let mut launch = Launch::new(command);
    // ksmd must not compete for the same pages; a kernel without KSM has nothing to switch off.
    if kernel::ksm_sysfs::memory_merge().is_ok_and(|on| on) {
        launch.memory_merge(false);
    }
    let layout = match args.layout {
        LayoutArg::Shared => Layout::inherited().map_or_else(Layout::draw, Ok).unwrap_or_else(|error| {
            say(&format!("no shared layout: {error:#}"));
            Layout::Default
        }),
        LayoutArg::Default => Layout::Default,
    };
    let (launched, _) = layout.spawn(launch, StackLimit::PutBack)?;
    Ok((managed, launched))
}

fn manage(args: &RunArgs) -> anyhow::Result<Managed> {
    kernel::probe::Features::probe().live_merge().map_err(anyhow::Error::new)?;
    let files = AgentFiles::write()?;
    let program = std::env::current_exe().context("cannot find this program for the guardian")?;
    let settings = Settings {
        label: args.partition.clone(),
        strict: args.strict,
        check: match args.check {
            Check::Auto => CheckChoice::Auto,
            Check::Bpf => CheckChoice::Bpf,
            Check::Collapse => CheckChoice::Collapse,
            Check::Vouch => CheckChoice::Vouch,
        },
        stable: Some(Duration::from_secs_f64(args.stable)),
        store_limit: args.store_limit.map(|mib| mib << 20),
        guardian: Some((program, vec![GUARDIAN.to_owned()])),
        ..Settings::default()
    };
    Ok(Managed { broker: Broker::start(settings)?, files })
}

impl Managed {
    /// Leads the agent into a command, and keeps what the user had.
    fn lead_in(&self, command: &mut Command) {
        let mut preload = self.files.image().into_os_string();
        if let Some(own) = std::env::var_os("LD_PRELOAD").filter(|own| !own.is_empty()) {
            preload.push(":");
            preload.push(own);
        }
        command.env("LD_PRELOAD", preload);
        command.env("PAGEFOLD_AGENT", self.variable());
    }

    fn variable(&self) -> String {
        let sites = self.files.sites();
        let token = self.broker.token();
        format!("{}:{:016x}{:016x}:{}", self.broker.name(), token.0, token.1, sites.display())
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

struct Reporter<'a> {
    managed: Option<&'a Managed>,
    file: Option<SummaryFile>,
    quiet: bool,
    args: &'a RunArgs,
    /// It was said already why nothing can be merged.
    unmanaged: bool,
}

impl Reporter<'_> {
    fn summary(&self) -> Summary {
        let live = self.managed.and_then(|managed| managed.broker.summary().ok());
        live.unwrap_or_else(|| Summary {
            partition: self.args.partition.clone(),
            backend: "store",
            check: "none",
            ..Summary::default()
        })
    }

    /// Runs until the command has ended.
    fn watch(&mut self, mut launched: Launched, signals: &SignalFd) -> anyhow::Result<ExitStatus> {
        let mut next = Instant::now() + SUMMARY_EVERY;
        loop {
            while let Some(arrived) = signals.take().context("cannot read signals")? {
                match arrived.signal {
                    Signal::CHILD => {}
                    Signal::USR1 => eprint!("{}", state(&self.summary())),
                    // A key of the terminal has reached the command too, which is of the same process group.
                    _ if arrived.sender.is_none() => {}
                    signal => {
                        let _ = launched.pidfd.send_signal(signal);
                    }
                }
            }
            if let Some(status) = launched.child.try_wait().context("cannot wait for the command")? {
                return Ok(status);
            }
            signals::reap_others(launched.pid());
            if Instant::now() >= next {
                next += SUMMARY_EVERY;
                self.write();
            }
            kernel::pidfd::poll_in(signals.as_fd(), Some(next.saturating_duration_since(Instant::now())))
                .context("cannot wait for signals")?;
        }
    }

    fn write(&self) {
        if let Some(file) = &self.file
            && let Err(error) = file.write(&self.summary())
            && !self.quiet
        {
            eprintln!("pagefold: {error:#}");
        }
    }

    /// The last line.
    fn end(&self) {
        self.write();
        if self.quiet || self.managed.is_none() {
            return;
        }
        let summary = self.summary();
        for reason in &summary.helper_refused {
            eprintln!("pagefold: a process was left alone: {reason}");
        }
        if summary.processes_ever == 0 && summary.helper_refused.is_empty() && !self.unmanaged {
            eprintln!(
                "pagefold: nothing was marked mergeable (madvise MADV_MERGEABLE), so nothing was merged; \
                 --backend ksm merges all memory of any program"
            );
            return;
        }
        if summary.processes_ever == 0 {
            return;
        }
        eprintln!(
            "pagefold: {} pages merged in {} processes, {} saved at most, {} refused, longest wait {:.1} ms, CPU {:.2} s",
            summary.merges + summary.retaken,
            summary.processes_ever,
            mib(summary.bytes_saved_peak),
            summary.refused.total(),
            summary.frozen_seconds.max * 1e3,
            summary.cpu_seconds,
        );
    }
}

fn state(summary: &Summary) -> String {
    let mut text = format!(
        "pagefold: {} processes, {} managed, {} saved ({} at most), {} shared pages for {} more, {} zero pages, \
         {} diverged, check {}\n",
        summary.processes,
        mib(summary.pages_managed * kernel::page_size()),
        mib(summary.bytes_saved),
        mib(summary.bytes_saved_peak),
        summary.pages_shared,
        summary.pages_sharing,
        summary.zero_pages,
        summary.diverged,
        summary.check,
    );
    for (reason, pages) in &summary.refused.0 {
        text.push_str(&format!("pagefold:   refused {pages}: {reason}\n"));
    }
    text
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// The summary file, rewritten whole.
struct SummaryFile {
    path: PathBuf,
}

impl SummaryFile {
    /// Makes sure before the start that it can be written.
    fn open(path: &Path) -> anyhow::Result<Self> {
        let file = Self { path: path.to_owned() };
        replace(&file.path, b"{}\n").with_context(|| format!("cannot write the summary {}", path.display()))?;
        Ok(file)
    }

    fn write(&self, summary: &Summary) -> anyhow::Result<()> {
        let mut text = serde_json::to_vec_pretty(summary).context("cannot write the summary as JSON")?;
        text.push(b'\n');
        replace(&self.path, &text).with_context(|| format!("cannot write the summary {}", self.path.display()))
    }

    fn remove(&self) {
        // A terminal or a device is nobody's to remove.
        if self.path.is_file() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
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
    broker::guardian::run(socket);
    Ok(ExitCode::SUCCESS)
}
