//! Who of a tree is not managed because no agent is at work there. It never came in: static programs, those of another C
//! library or word size, those that gain privileges, those that cannot reach its file. Or it did and could not go on. The
//! broker does not hear of them, so the tree is looked at.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kernel::Pid;
use ksm::{ProcessId, Tree};
use serde::Serialize;

use crate::agent_told::{self, InProcess};
use crate::store_run::unmanageable;

/// How often. What lives shorter would not be managed either.
const EVERY: Duration = Duration::from_secs(1);
/// Why a program that could have the agent does not have it.
const ABSENT: &str = "it runs where the agent's file cannot be loaded (a chroot, a container), or with an environment of its own; start \
     `pagefold run` inside of that, or pass LD_PRELOAD and PAGEFOLD_AGENT on";
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

/// One process that is there.
#[derive(Clone, Copy, Default)]
struct Seen {
    /// How often it was looked at.
    looks: u32,
    /// It is one of those that are not managed.
    named: bool,
}

/// What was seen so far.
pub(crate) struct Outsiders {
    tree: Tree,
    /// This program.
    own: Option<PathBuf>,
    next: Instant,
    /// Processes that are there, each with what it ran when it was looked at.
    seen: HashMap<(ProcessId, PathBuf), Seen>,
    found: BTreeMap<(String, String), u64>,
}

impl Outsiders {
    pub(crate) fn below_self() -> Self {
        let own = std::fs::read_link("/proc/self/exe").ok();
        Self { tree: Tree::below_self(), own, next: Instant::now(), seen: HashMap::new(), found: BTreeMap::new() }
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
        let mut there = HashMap::new();
        for member in self.tree.members() {
            // A process that ends meanwhile, or that is not this user's to look at.
            let link = PathBuf::from(format!("/proc/{}/exe", member.process.pid));
            let Ok(program) = std::fs::read_link(&link) else { continue };
            // Pagefold's own guardian, too.
            if self.own.as_ref() == Some(&program) {
                continue;
            }
            let this = (member.process, program);
            let mut seen = self.seen.get(&this).copied().unwrap_or_default();
            let pid = Pid(member.process.pid);
            let reason = match seen.looks {
                _ if seen.named => None,
                0 => unmanageable(&link),
                // What has just been executed may still be loading its libraries, and a helper comes when it is worth it:
                // looked at less and less often.
                looks if looks.is_power_of_two() => match agent_told::look(pid) {
                    InProcess::Absent if looks == 1 => Some(ABSENT.to_owned()),
                    InProcess::Hindered(why) => Some(why.to_owned()),
                    _ => None,
                },
                _ => None,
            };
            seen.looks = seen.looks.saturating_add(1);
            seen.named |= reason.is_some();
            if let Some(reason) = reason {
                let program = this.1.display().to_string();
                if self.found.len() < PROGRAMS_MAX || self.found.contains_key(&(program.clone(), reason.clone())) {
                    *self.found.entry((program, reason)).or_default() += 1;
                }
            }
            there.insert(this, seen);
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
