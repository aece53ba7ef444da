//! Ours: a broker in this process, with its guardian, and workers that are its members.

use std::os::fd::OwnedFd;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use broker::{AgentFiles, Broker, BrokerHandle, MergeReport, Settings, Summary, Wish, Wished};
use clap::Args;
use kernel::sched::{Whose, process_cpu_time, usage};
use kernel::{Pid, Pidfd, status};

/// How long workers may take to become members.
const MEMBERS_WITHIN: Duration = Duration::from_secs(20);

/// A partition with every safety step on, merging on request.
#[derive(Debug)]
pub struct Store {
    broker: BrokerHandle,
    files: AgentFiles,
}

impl Store {
    /// Opens a partition.
    ///
    /// # Errors
    /// When this machine cannot merge live; the message names what is missing.
    pub fn open() -> Result<Self> {
        Self::open_with(Settings::default())
    }

    /// Opens a partition that merges by itself what has stayed unwritten for `stable`, and rests while more than
    /// `max_runnable` threads want each CPU.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_scanning(stable: Duration, max_runnable: u64) -> Result<Self> {
        Self::open_with(Settings { stable: Some(stable), runnable_per_cpu: max_runnable, ..Settings::default() })
    }

    fn open_with(settings: Settings) -> Result<Self> {
        kernel::probe::Features::probe().live_merge().map_err(anyhow::Error::new)?;
        // Helpers are adopted by this process, so that their CPU time can be found.
        kernel::task::set_child_subreaper(true).context("cannot become a child subreaper")?;
        let program = std::env::current_exe().context("cannot find this program for the guardian")?;
        let settings = Settings { guardian: Some((program, vec!["guardian".to_owned()])), ..settings };
        Ok(Self { broker: Broker::start(settings)?, files: AgentFiles::write()? })
    }

    /// Leads the agent into a command.
    pub fn lead_in(&self, command: &mut Command) {
        command.env("LD_PRELOAD", self.files.image()).env("PAGEFOLD_AGENT", self.files.variable(&self.broker, false));
    }

    /// Waits until there are so many members.
    ///
    /// # Errors
    /// When there are not after some time, with the reasons why helpers were refused.
    pub fn wait_for_members(&self, count: u64) -> Result<()> {
        let deadline = Instant::now() + MEMBERS_WITHIN;
        loop {
            let summary = self.summary()?;
            if summary.processes >= count {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("only {} of {count} workers became members: {:?}", summary.processes, summary.helper_refused);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Merges everything that these members have handed over, and returns what was done.
    ///
    /// # Errors
    /// When the broker has ended or one is no member.
    pub fn merge(&self, members: impl IntoIterator<Item = Pid>) -> Result<MergeReport> {
        let mut sum = MergeReport::default();
        for pid in members {
            match self.broker.ask(Wish::Merge { pid, ranges: Vec::new() })? {
                Wished::Report(report) => sum.add(&report),
                other => bail!("process {pid} cannot be merged: {other:?}"),
            }
        }
        Ok(sum)
    }

    /// The state now.
    ///
    /// # Errors
    /// When the broker has ended.
    pub fn summary(&self) -> Result<Summary> {
        Ok(self.broker.summary()?)
    }

    /// CPU time of this process, with all that the broker does, and of every helper that is there.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn cpu(&self) -> Result<Duration> {
        Ok(usage(Whose::Own).cpu() + Self::helpers_cpu()?)
    }

    /// CPU time of the helpers alone.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn helpers_cpu() -> Result<Duration> {
        let mut sum = Duration::ZERO;
        for pid in status::processes().context("list processes")? {
            // One that has just ended is not there any more.
            let Ok(process) = status::read(pid) else { continue };
            if process.ppid == Pid::this().0 && process.name == "pagefold-helper" {
                sum += process_cpu_time(pid).unwrap_or_default();
            }
        }
        Ok(sum)
    }
}

/// `bench guardian`: the guardian of this program's broker. Not for people.
#[derive(Args, Clone, Copy, Debug)]
pub struct GuardianCommand {
    /// Number of the inherited socket.
    socket: i32,
}

impl GuardianCommand {
    /// Runs until the broker has ended.
    ///
    /// # Errors
    /// When there is no such descriptor.
    pub fn run(self) -> Result<ExitCode> {
        // Through a pidfd the number becomes a descriptor of our own without taking anything on trust.
        let socket: OwnedFd = Pidfd::open(Pid::this())?.getfd(self.socket).context("there is no such descriptor")?;
        broker::guardian::run(socket);
        Ok(ExitCode::SUCCESS)
    }
}
