//! Whether the switch of a process survives fork and exec on this kernel: services depend on it, for what systemd starts is a
//! child that turns the switch and then executes the program.

use std::ffi::OsString;
use std::process::{Command, ExitCode, Stdio};

use anyhow::Context as _;
use kernel::launch::Launch;
use serde::Serialize;

use crate::say;

/// The hidden subcommand under which this binary tells how its switch stands.
pub(crate) const WORD: &str = "ksm-switch";

/// What a look at real children found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Survival {
    /// A program that is executed with the switch on has it on (Linux 6.7, and reliably 6.10).
    pub(crate) exec: bool,
    /// And so has a program that this one starts.
    pub(crate) fork_and_exec: bool,
}

impl Survival {
    /// Tries it. `None` on a kernel without such a switch (before 6.4).
    pub(crate) fn try_it() -> anyhow::Result<Option<Self>> {
        if kernel::ksm_sysfs::memory_merge().is_err() {
            return Ok(None);
        }
        let told = |on: bool| {
            let mut command = Command::new("/proc/self/exe");
            command.args([WORD, "again"]).stdin(Stdio::null()).stdout(Stdio::piped());
            let mut launch = Launch::new(command);
            launch.memory_merge(on);
            let output = launch.spawn().context("cannot start a child")?.child.wait_with_output()?;
            anyhow::Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        // The other way round too: an answer that is always yes says nothing.
        anyhow::ensure!(told(false)? == "off\noff\n", "a child whose switch is off says that it is on");
        let on = told(true)?;
        let mut lines = on.lines().map(|line| line == "on");
        Ok(Some(Self { exec: lines.next() == Some(true), fork_and_exec: lines.next() == Some(true) }))
    }
}

/// The hidden subcommand: says how the switch stands, and with an argument has a child of its own say it too.
pub(crate) fn switch_main(args: &[OsString]) -> anyhow::Result<ExitCode> {
    let on = kernel::ksm_sysfs::memory_merge()?;
    say::answer(if on { "on\n" } else { "off\n" })?;
    if !args.is_empty() {
        Command::new("/proc/self/exe").arg(WORD).status().context("cannot start a child")?;
    }
    Ok(ExitCode::SUCCESS)
}
