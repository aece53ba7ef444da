//! Who of a tree is not managed because the agent never came in: static programs, those of another C library or word size,
//! those that gain privileges. The broker does not hear of them, so the tree is looked at.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ksm::{ProcessId, Tree};
use serde::Serialize;

use crate::store_run::unmanageable;

/// How often. What lives shorter would not be managed either.
const EVERY: Duration = Duration::from_secs(1);
/// Different programs that are remembered.
const PROGRAMS_MAX: usize = 256;

/// One program that is not managed, or was not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Outsider {
    /// Its file.
    pub(crate) program: String,
    /// Why.
    pub(crate) reason: String,
    /// Processes that ran it.
    pub(crate) processes: u64,
}

/// What was seen so far.
pub(crate) struct Outsiders {
    tree: Tree,
    next: Instant,
    /// Processes that are there, each with what it ran when it was looked at.
    seen: HashSet<(ProcessId, PathBuf)>,
    found: BTreeMap<(String, String), u64>,
}

impl Outsiders {
    pub(crate) fn below_self() -> Self {
        Self { tree: Tree::below_self(), next: Instant::now(), seen: HashSet::new(), found: BTreeMap::new() }
    }

    /// When to look the next time.
    pub(crate) fn next(&self) -> Instant {
        self.next
    }

    /// Looks at the tree, if it is time.
    pub(crate) fn look(&mut self) {
        if Instant::now() < self.next {
            return;
        }
        let mut there = HashSet::new();
        for member in self.tree.members() {
            // A process that ends meanwhile, or that is not this user's to look at.
            let link = PathBuf::from(format!("/proc/{}/exe", member.process.pid));
            let Ok(program) = std::fs::read_link(&link) else { continue };
            let this = (member.process, program);
            if !self.seen.contains(&this)
                && let Some(reason) = unmanageable(&link)
            {
                let program = this.1.display().to_string();
                if self.found.len() < PROGRAMS_MAX || self.found.contains_key(&(program.clone(), reason.clone())) {
                    *self.found.entry((program, reason)).or_default() += 1;
                }
            }
            there.insert(this);
        }
        self.seen = there;
        self.next = Instant::now() + EVERY;
    }

    /// All of them, by name.
    pub(crate) fn list(&self) -> Vec<Outsider> {
        let outsider = |((program, reason), processes): (&(String, String), &u64)| Outsider {
            program: program.clone(),
            reason: reason.clone(),
            processes: *processes,
        };
        self.found.iter().map(outsider).collect()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn whoever_could_have_the_agent_is_no_outsider() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let mut outsiders = Outsiders::below_self();
        outsiders.look();
        assert_eq!(outsiders.list(), []);
        assert!(outsiders.next() > Instant::now() - Duration::from_millis(1));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
