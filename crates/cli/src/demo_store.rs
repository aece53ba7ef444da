//! Part (a) of `pagefold demo`: worker processes merged through the library.

use std::ffi::OsString;
use std::process::ExitCode;

use serde::Serialize;

use crate::args::DemoArgs;

/// The hidden subcommand of a worker.
pub(crate) const WORKER: &str = "demo-worker";

/// What was seen.
#[derive(Serialize)]
pub(crate) struct PartA {
    pub(crate) bytes_saved: u64,
    pub(crate) digests_equal: bool,
}

impl PartA {
    pub(crate) fn table(&self) -> String {
        String::new()
    }
}

pub(crate) fn part_a(_args: &DemoArgs) -> anyhow::Result<PartA> {
    anyhow::bail!("the library part comes with the library")
}

pub(crate) fn worker_main(_args: &[OsString]) -> anyhow::Result<ExitCode> {
    Ok(ExitCode::SUCCESS)
}
