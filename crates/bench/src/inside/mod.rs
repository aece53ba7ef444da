//! `bench inside NAME`: what is tried on other kernels, in guests that [`run_inside`](crate::guest::run_inside) boots.
//!
//! Each of these does what docs/hazards.md calls a hazard, by the library, and compares every byte. It says what it saw
//! in one line of JSON, and whoever started it judges that: an error means that it could not be tried.
//!
//! * [`nfs`]: requests of a network file system hold the pages that are merged;
//! * [`limit`]: a cgroup's memory limit is near;
//! * [`live`]: merging and the way back, with what the checks of references are worth here;
//! * [`rest`]: a kernel that cannot merge live, and memory at rest;
//! * [`nodes`]: kernel KSM on several memory nodes.

pub mod limit;
pub mod live;
pub mod nfs;
pub mod nodes;
mod pages;
pub mod rest;
mod server;

use std::process::ExitCode;

use anyhow::Result;
use clap::Subcommand;
use serde::Serialize;

/// What to try.
#[derive(Clone, Copy, Debug, Subcommand)]
pub enum InsideCommand {
    /// O_DIRECT on a network file system whose server answers late.
    Nfs {
        /// Vouch that nobody holds references, which is not true: the check must be able to fail.
        #[arg(long)]
        vouch: bool,
    },
    /// A memory limit that is nearly reached, in a cgroup of version 2.
    Limit,
    /// Merging live, and the way back.
    Live,
    /// Merging memory at rest, where merging live is not possible.
    Rest,
    /// Kernel KSM, on a machine with several memory nodes.
    Nodes,
}

impl InsideCommand {
    /// Tries it and prints what was seen.
    ///
    /// # Errors
    /// When it cannot be tried here.
    pub fn run(self) -> Result<ExitCode> {
        match self {
            Self::Nfs { vouch } => print(&nfs::run(vouch)?),
            Self::Limit => print(&limit::run()?),
            Self::Live => print(&live::run()?),
            Self::Rest => print(&rest::run()?),
            Self::Nodes => print(&nodes::run()?),
        }
    }
}

fn print(report: &impl Serialize) -> Result<ExitCode> {
    println!("{}", serde_json::to_string(report)?);
    Ok(ExitCode::SUCCESS)
}
