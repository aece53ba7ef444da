//! Which rule fits, and what is done.

use kernel::MappingWord;
use serde::{Serialize, Serializer};

use crate::facts::{Facts, Kind};
use crate::glob::Glob;
use crate::never;
use crate::rule::{Action, Backend, Conditions, Rule, Rules, User};

/// What is done with a process, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Decision {
    /// What.
    pub action: Action,
    /// Only these mappings; none named: the whole process.
    #[serde(serialize_with = "words")]
    pub vma: Vec<MappingWord>,
    /// Mappings that are left out.
    #[serde(serialize_with = "words")]
    pub exclude: Vec<MappingWord>,
    /// Who merges.
    pub backend: Backend,
    /// The partition's label, with the store.
    pub partition: Option<String>,
    /// It holds for programs of the never-merge list too.
    #[serde(skip)]
    pub overrides_never_merge: bool,
    /// Because of what.
    pub why: Why,
}

impl Decision {
    /// Not all of the process's memory is meant.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        !self.vma.is_empty() || !self.exclude.is_empty()
    }
}

fn words<S: Serializer>(words: &[MappingWord], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(words.iter().map(ToString::to_string))
}

/// Because of what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum Why {
    /// It is on the never-merge list.
    NeverMerge(Reason),
    /// A rule fits.
    Rule {
        /// Its place among the rules, from 1 on.
        number: usize,
        /// Its line in the file.
        line: usize,
        /// Its name.
        name: Option<String>,
        /// Its reason.
        reason: Option<String>,
    },
    /// No rule fits.
    Defaults,
    /// A thread of the kernel has no memory of its own.
    KernelThread,
    /// It has ended.
    Zombie,
    /// It is pagefold's own.
    Pagefold,
    /// What the rules have done is undone, whatever they say.
    Undone,
    /// This user may not see which program it runs, so the never-merge list cannot be asked.
    NotPermitted,
}

/// Why a program is never merged.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// The entry of the list.
    pub name: String,
    /// What merging it would tell, and to whom.
    pub reason: String,
}

impl Rules {
    /// Decides about a process: kernel threads, what has ended and pagefold itself are left alone, then the never-merge
    /// list holds unless a rule that fits overrides it, then the first rule that fits, then the defaults.
    #[must_use]
    pub fn decide(&self, facts: &Facts) -> Decision {
        if let Some(why) = untouchable(facts) {
            return self.plain(Action::Ignore, why);
        }
        let found = self.rules.iter().enumerate().find(|(_, rule)| rule.conditions.fit(facts));
        if !found.is_some_and(|(_, rule)| rule.override_never_merge)
            && let Some(entry) = never::entry(facts)
        {
            return self.plain(entry.action, Why::NeverMerge(never::reason(entry)));
        }
        found.map_or_else(|| self.plain(self.defaults.action, Why::Defaults), |(at, rule)| self.by_rule(at, rule))
    }

    fn plain(&self, action: Action, why: Why) -> Decision {
        Decision {
            action,
            vma: Vec::new(),
            exclude: self.defaults.exclude.clone(),
            backend: self.defaults.backend,
            partition: None,
            overrides_never_merge: false,
            why,
        }
    }

    fn by_rule(&self, at: usize, rule: &Rule) -> Decision {
        let why = Why::Rule { number: at + 1, line: rule.line, name: rule.name.clone(), reason: rule.reason.clone() };
        Decision {
            action: rule.action,
            vma: rule.vma.clone(),
            exclude: rule.exclude.clone().unwrap_or_else(|| self.defaults.exclude.clone()),
            backend: rule.backend.unwrap_or(self.defaults.backend),
            partition: rule.partition.clone(),
            overrides_never_merge: rule.override_never_merge,
            why,
        }
    }
}

/// What nobody's rule changes.
fn untouchable(facts: &Facts) -> Option<Why> {
    match facts.kind {
        Kind::KernelThread => Some(Why::KernelThread),
        Kind::Zombie => Some(Why::Zombie),
        Kind::Program if facts.is_pagefold => Some(Why::Pagefold),
        Kind::Program if facts.exe.is_none() => Some(Why::NotPermitted),
        Kind::Program => None,
    }
}

impl Conditions {
    /// True if a process fulfils all of them.
    #[must_use]
    pub fn fit(&self, facts: &Facts) -> bool {
        let any = |globs: &[Glob], text: Option<&str>| {
            globs.is_empty() || text.is_some_and(|text| globs.iter().any(|glob| glob.matches(text)))
        };
        let any_of = |globs: &[Glob], texts: &[String]| {
            globs.is_empty() || texts.iter().any(|text| globs.iter().any(|glob| glob.matches(text)))
        };
        let executes = || {
            facts.programs().any(|exe| {
                let exe = exe.to_string_lossy();
                any(&self.exe, Some(&exe)) || unwrapped(&exe).is_some_and(|exe| any(&self.exe, Some(&exe)))
            })
        };
        let words = facts.command_line.get(1..).unwrap_or_default();
        // The cheap and the rare ones first.
        self.setuid.is_none_or(|wanted| wanted == facts.setuid)
            && self.other_pid_namespace.is_none_or(|wanted| wanted == facts.other_pid_namespace)
            && self.in_container.is_none_or(|wanted| wanted != facts.containers.is_empty())
            && self.age.hold(&facts.age)
            && self.rss.hold(&facts.rss)
            && self.anon.hold(&facts.anon)
            && (self.user.is_empty() || self.user.iter().any(|user| user.is(facts)))
            && (self.exe.is_empty() || executes())
            && any(&self.comm, Some(&facts.comm))
            && any(&self.script, facts.script.as_deref())
            && self.args.iter().all(|glob| words.iter().any(|word| glob.matches(word)))
            && any_of(&self.cgroup, &facts.cgroups)
            && any_of(&self.unit, &facts.units)
            && (self.container.is_empty()
                || facts.containers.iter().any(|it| {
                    let full = format!("{}:{}", it.runtime, it.id);
                    self.container.iter().any(|glob| glob.matches(it.runtime) || glob.matches(&full))
                }))
            && (self.pod.is_empty()
                || facts.containers.iter().any(|it| it.pod.as_deref().is_some_and(|pod| any(&self.pod, Some(pod)))))
    }
}

/// Nix hides programs behind scripts and calls them `.NAME-wrapped`: the path that they would have without.
fn unwrapped(exe: &str) -> Option<String> {
    let (folder, file) = exe.rsplit_once('/')?;
    let mut name = file.strip_prefix('.')?.trim_end_matches('_').strip_suffix("-wrapped")?;
    // Wrapped twice.
    while let Some(inner) = name.strip_prefix('.').and_then(|inner| inner.strip_suffix("-wrapped")) {
        name = inner;
    }
    Some(format!("{folder}/{name}"))
}

impl User {
    fn is(&self, facts: &Facts) -> bool {
        match self {
            Self::Name(name) => facts.user.as_ref() == Some(name),
            Self::Id(id) => *id == facts.uid,
        }
    }
}
