//! Who holds KSM's settings.

use std::path::PathBuf;

use serde::Serialize;

use crate::error::KsmError;
use crate::knob::{Knob, Values};
use crate::state::{Locked, StatePath};
use crate::wanted::Wanted;

/// Who holds KSM's settings, and what they were before.
#[derive(Clone, Debug, Serialize)]
pub struct LeaseStatus {
    /// The file in which it is recorded.
    pub state: PathBuf,
    /// Who holds; empty if the settings are the administrator's own.
    pub holders: Vec<HolderStatus>,
    /// The administrator's values while somebody holds: they come back with the last holder's end.
    pub administrator: Values,
    /// Settings that somebody else wrote meanwhile, which are left to him.
    pub left: Vec<Knob>,
    /// Why it is not known, e.g. another user's.
    pub unknown: Option<String>,
}

/// One holder.
#[derive(Clone, Debug, Serialize)]
pub struct HolderStatus {
    /// The process, as its own PID namespace numbers it.
    pub pid: i32,
    /// Its command name.
    pub command: String,
    /// What it asks for.
    pub wanted: Wanted,
}

impl LeaseStatus {
    /// Looks without changing anything: who died holding is left to the next use.
    pub(crate) fn look(path: &StatePath) -> Self {
        let mut status = Self {
            state: path.as_path().to_owned(),
            holders: Vec::new(),
            administrator: Values::default(),
            left: Vec::new(),
            unknown: unseen(path),
        };
        if !path.as_path().exists() {
            return status;
        }
        let state = match Locked::new(path).and_then(|locked| locked.load()) {
            Ok(state) => state,
            Err(error) => return Self { unknown: Some(reason(&error)), ..status },
        };
        let living = state.holders.iter().filter(|holder| !holder.is_dead(path));
        let told = living.map(|holder| HolderStatus {
            pid: holder.process.pid,
            command: holder.command.clone(),
            wanted: holder.wanted,
        });
        status.holders = told.collect();
        status.administrator = state.administrator;
        status.left = state.given_up;
        status
    }
}

fn reason(error: &KsmError) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// Root's state is root's to read.
fn unseen(path: &StatePath) -> Option<String> {
    let of_root = StatePath::of_root();
    let folder = of_root.as_path().parent()?;
    let hidden = *path != of_root && folder.exists() && std::fs::read_dir(folder).is_err();
    hidden.then(|| format!("whether root holds the settings cannot be seen by this user ({})", folder.display()))
}
