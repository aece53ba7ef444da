//! What both backends do before and when they start a command.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::Context as _;
use kernel::Pid;
use kernel::launch::{Launch, LaunchError};
use kernel::sched::{Limit, Resource, limit, set_limit};
use kernel::signals::SignalFd;

use crate::say;
use crate::summary_file::SummaryFile;

/// Statuses of env(1).
const FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// This process, ready to start a command and to stand for it.
pub(crate) struct Ready {
    pub(crate) summary: Option<SummaryFile>,
    pub(crate) signals: SignalFd,
    /// The caller's limits of open files and of address space, for the command.
    soft_open_files: Option<u64>,
    soft_address_space: Option<u64>,
}

impl Ready {
    /// Gets ready, or says what failed: then nothing is started.
    pub(crate) fn get(summary: Option<&Path>) -> Result<Self, ExitCode> {
        let prepare = || {
            // First of all: what arrives from now on is passed on and not lost, and a file size limit is an error.
            let signals = SignalFd::block_forwardable().context("cannot take signals")?;
            let summary = summary.map(SummaryFile::open).transpose()?;
            // Helpers and children that leave their parent stay below this process.
            kernel::task::set_child_subreaper(true).context("cannot become a child subreaper")?;
            // Members cost descriptors and threads, and a soft limit of open files is there for programs that use
            // select(2).
            let (soft_open_files, soft_address_space) = (raise(Resource::OpenFiles), raise(Resource::AddressSpace));
            // There are three threads for each member, all of which sleep nearly always.
            kernel::address_space::one_arena();
            Ok(Self { summary, signals, soft_open_files, soft_address_space })
        };
        prepare().map_err(|error: anyhow::Error| {
            say::note(format_args!("{error:#}"));
            ExitCode::from(FAILED)
        })
    }

    /// The command as the caller wants it.
    pub(crate) fn launch(&self, command: &[OsString]) -> Result<Launch, LaunchError> {
        let (program, arguments) = command.split_first().ok_or_else(|| LaunchError::Exec {
            program: OsString::new(),
            source: io::Error::from(io::ErrorKind::NotFound),
        })?;
        let mut command = Command::new(program);
        command.args(arguments);
        self.signals.restore_in(&mut command);
        let mut launch = Launch::new(command);
        if let Some(soft) = self.soft_open_files {
            launch.soft_open_files(soft);
        }
        if let Some(soft) = self.soft_address_space {
            launch.soft_address_space(soft);
        }
        Ok(launch)
    }
}

/// Raises a soft limit of this process to the hard one. Returns the old one if it was changed.
fn raise(resource: Resource) -> Option<u64> {
    let own = limit(Pid::this(), resource).ok()?;
    let soft = own.soft.filter(|_| own.soft != own.hard)?;
    set_limit(Pid::this(), resource, Limit { soft: own.hard, ..own }).ok().map(|_| soft)
}

/// Says why the command could not be started; the status for it.
pub(crate) fn not_started(error: LaunchError) -> ExitCode {
    let status = match &error {
        // Found, and perhaps executable at another time.
        error if error.is_scarcity() => FAILED,
        LaunchError::Exec { source, .. } if source.kind() == io::ErrorKind::NotFound => NOT_FOUND,
        LaunchError::Exec { .. } => NOT_EXECUTABLE,
        _ => FAILED,
    };
    say::note(told(&error));
    ExitCode::from(status)
}

/// An error with all that is below it, on one line, and the way out of scarcity.
pub(crate) fn told(error: &LaunchError) -> String {
    let mut text = kernel::error_chain(error);
    if error.is_scarcity() {
        text.push_str("; raise ulimit -n, ulimit -u or the memory that may be used");
    }
    text
}
