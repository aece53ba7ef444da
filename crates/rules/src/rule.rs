//! Rules as they were read.

use std::time::Duration;

use kernel::{Bytes, MappingWord};
use serde::Serialize;

use crate::glob::Glob;

/// The only version of the file format that there is.
pub const VERSION: u32 = 1;

/// A file of rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// For whoever no rule fits, and for what a rule leaves open.
    pub defaults: Defaults,
    /// When a process is let go because merging it does not pay.
    pub profit: ProfitRules,
    /// The rules; the first that fits a process decides.
    pub rules: Vec<Rule>,
}

/// `[defaults]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Defaults {
    /// What is done with processes that no rule fits.
    pub action: Action,
    /// Mappings that are left out where a rule does not say which.
    pub exclude: Vec<MappingWord>,
    /// Who merges where a rule does not say.
    pub backend: Backend,
}

/// `[profit]`: a process is let go if its `ksm_process_profit` was below `-loss` at every look while ksmd made `passes`
/// passes; it is tried again after `retry`, then after twice as long each time, up to `retry_most`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProfitRules {
    /// Passes of ksmd. 0: nobody is let go.
    pub passes: u64,
    /// What merging may cost in bytes.
    pub loss: Bytes,
    /// First time without it.
    pub retry: Duration,
    /// Longest time without it.
    pub retry_most: Duration,
}

impl Default for ProfitRules {
    fn default() -> Self {
        Self {
            // Smart scan looks at a page at its passes 0, 1, 2, 3, 5, 8, 13 and 22, and needs two looks to merge it.
            passes: 16,
            loss: Bytes::from_kib(64),
            retry: Duration::from_secs(600),
            retry_most: Duration::from_secs(86_400),
        }
    }
}

/// `[[rule]]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// Line of the file where it begins, from 1 on.
    pub line: usize,
    /// What it is called in answers.
    pub name: Option<String>,
    /// Why it is there.
    pub reason: Option<String>,
    /// Whom it fits.
    pub conditions: Conditions,
    /// What is done with them.
    pub action: Action,
    /// Only these mappings are made mergeable; none named: the whole process.
    pub vma: Vec<MappingWord>,
    /// Mappings that are left out.
    pub exclude: Option<Vec<MappingWord>>,
    /// Who merges.
    pub backend: Option<Backend>,
    /// The partition's label, with the store.
    pub partition: Option<String>,
    /// It holds for programs of the never-merge list too.
    pub override_never_merge: bool,
}

/// `match`: a process must fulfil all that are there. With lists of patterns, one must fit; with `args`, all must.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Conditions {
    /// The path of the executable. The process cannot change it.
    pub exe: Vec<Glob>,
    /// What an interpreter runs, as its command line says.
    pub script: Vec<Glob>,
    /// The command name. The process can change it.
    pub comm: Vec<Glob>,
    /// Words of the command line behind the first. The process can change them.
    pub args: Vec<Glob>,
    /// The effective user.
    pub user: Vec<User>,
    /// Paths of cgroups.
    pub cgroup: Vec<Glob>,
    /// A container: any or none.
    pub in_container: Option<bool>,
    /// `RUNTIME:ID`, or just the runtime.
    pub container: Vec<Glob>,
    /// The unique id of the pod.
    pub pod: Vec<Glob>,
    /// A service, scope or slice of systemd.
    pub unit: Vec<Glob>,
    /// Least and most time since it was started.
    pub age: Bounds<Duration>,
    /// Least and most resident memory.
    pub rss: Bounds<Bytes>,
    /// Least and most anonymous resident memory.
    pub anon: Bounds<Bytes>,
    /// The executable is setuid or setgid, or the user ids differ.
    pub setuid: Option<bool>,
    /// The process lives in another PID namespace than this one.
    pub other_pid_namespace: Option<bool>,
}

/// From `min` to `max`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bounds<T> {
    /// Least.
    pub min: Option<T>,
    /// Most.
    pub max: Option<T>,
}

impl<T> Default for Bounds<T> {
    fn default() -> Self {
        Self { min: None, max: None }
    }
}

impl<T: PartialOrd> Bounds<T> {
    /// True if it lies between them.
    pub fn hold(&self, value: &T) -> bool {
        self.min.as_ref().is_none_or(|min| value >= min) && self.max.as_ref().is_none_or(|max| value <= max)
    }
}

/// A user as a rule names one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum User {
    /// By name.
    Name(String),
    /// By number.
    Id(u32),
}

/// What is done with a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// It is made mergeable.
    Enable,
    /// Its merging is ended, and begun by nobody's inheritance.
    Disable,
    /// It is left as it is.
    #[default]
    Ignore,
}

impl Action {
    pub(crate) const ALL: [Self; 3] = [Self::Enable, Self::Disable, Self::Ignore];

    /// As a file has it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Enable => "enable",
            Self::Disable => "disable",
            Self::Ignore => "ignore",
        }
    }
}

/// Who merges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Backend {
    /// The kernel's KSM.
    #[default]
    Ksm,
    /// pagefold's page store, which takes a program in when it is started.
    Store,
}

impl Backend {
    pub(crate) const ALL: [Self; 2] = [Self::Ksm, Self::Store];

    /// As a file has it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Ksm => "ksm",
            Self::Store => "store",
        }
    }
}
