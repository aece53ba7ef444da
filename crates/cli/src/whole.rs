//! `--scope all`: which programs may be managed whole, and which code may come into them.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::Context as _;
use broker::Judge;
use kernel::{Pid, Range};
use proof::{Cache, Lists, Object, Progress, Prover, Report, Trust};
use rules::{Users, facts, never_merge};

/// Judges programs by all code that they run, and by the list of those that must never be merged.
#[derive(Debug)]
pub(crate) struct Whole {
    lists: Lists,
    cache: Option<Cache>,
    /// Programs that are managed.
    known: Mutex<HashMap<Pid, Managed>>,
}

/// Programs that are remembered before it is looked which of them have ended.
const FORGET_BEYOND: usize = 64;

/// What is remembered of a program.
#[derive(Clone, Debug, Default)]
struct Managed {
    /// Its file.
    program: PathBuf,
    own_code: Vec<Range>,
}

impl Whole {
    /// With what the operator trusts. What was found out about files is kept where only this user can write, if that can be
    /// had.
    pub(crate) fn new(trust: Option<&Path>) -> anyhow::Result<Self> {
        Ok(Self { lists: lists(trust)?, cache: Cache::of_user().ok(), known: Mutex::default() })
    }

    fn judge(&self, pid: Pid, own_code: &[Range]) -> Result<Report, String> {
        let mut nobody = |_: Progress<'_>| {};
        let prover = Prover::new(&self.lists, self.cache.as_ref(), &mut nobody);
        prover.without(own_code).judge_process(pid).map_err(|error| kernel::error_chain(&error))
    }

    fn remember(&self, pid: Pid, managed: Managed) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(pid, managed);
        // Those that have ended, now and then: a long run sees many.
        if known.len() > FORGET_BEYOND && known.len() == known.capacity() {
            known.retain(|pid, _| kernel::status::read(*pid).is_ok());
        }
    }

    fn managed(&self, pid: Pid) -> Option<Managed> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(&pid).cloned()
    }
}

/// What is known of libraries, of the agent, and by the operator's word.
pub(crate) fn lists(trust: Option<&Path>) -> anyhow::Result<Lists> {
    let lists = match trust {
        Some(path) => Lists::with(Trust::read(path).context("cannot use the trust file")?),
        None => Lists::default(),
    };
    Ok(lists.with_agent(broker::AGENT, broker::image_bytes()))
}

impl Judge for Whole {
    fn program(&self, pid: Pid, own: &[Range]) -> Result<(), String> {
        let found = facts(pid, &Users::host()).ok_or("a process ended while it was looked at")?;
        let name = match &found.exe {
            Some(exe) => exe.display().to_string(),
            None => found.comm.clone(),
        };
        if let Some(reason) = never_merge(&found) {
            return Err(format!("{name}: {}, never merged: {}", reason.name, reason.reason));
        }
        let report = self.judge(pid, own)?;
        if !report.verdict.is_proven() {
            let spoils = report.objects.first().map(spoilt).unwrap_or_default();
            return Err(format!(
                "{name} is not proven: {spoils}; `pagefold doctor --proof {name}` has all; --backend ksm merges it"
            ));
        }
        let managed = Managed { program: found.exe.unwrap_or_default(), own_code: own.to_vec() };
        self.remember(pid, managed);
        Ok(())
    }

    fn admits(&self, pid: Pid, file: Option<&File>) -> Result<(), String> {
        let managed = self.managed(pid).ok_or("it is not known")?;
        match file {
            Some(file) => {
                let mut nobody = |_: Progress<'_>| {};
                let mut prover = Prover::new(&self.lists, self.cache.as_ref(), &mut nobody);
                let object = prover.judge_what_comes(file, &path_of(file), &managed.program);
                if object.judgement.verdict.is_proven() { Ok(()) } else { Err(refused(&object)) }
            }
            // Memory does not tell which engine has made it: all that are there must be trusted.
            None => {
                let report = self.judge(pid, &managed.own_code)?;
                let engines = || report.objects.iter().filter(|object| object.engine.is_some());
                let trusted = |object: &&Object| object.engine.as_ref().is_some_and(|engine| engine.why.is_some());
                match (report.verdict.is_proven(), engines().find(|object| !trusted(object)), engines().next()) {
                    (false, ..) => Err(report.objects.first().map(refused).unwrap_or_default()),
                    (true, Some(engine), _) => {
                        Err(format!("what {} compiles{}", engine.path.display(), trust(engine.engine_line())))
                    }
                    (true, None, None) => Err("what it has written itself, and no engine that is trusted".to_owned()),
                    (true, None, Some(_)) => Ok(()),
                }
            }
        }
    }
}

/// What is wrong with an object, in a few words.
fn spoilt(object: &Object) -> String {
    let reason = object.judgement.reasons.first().map_or_else(String::new, |reason| format!(": {reason}"));
    format!("{}{reason}", object.path.display())
}

/// The same, with the way out.
fn refused(object: &Object) -> String {
    spoilt(object) + &trust(object.judgement.trust_line.clone())
}

/// How an operator can vouch for something.
fn trust(line: Option<String>) -> String {
    line.map_or_else(String::new, |line| format!(" (if you vouch for it: --trust FILE with the line `{line}`)"))
}

/// Where an open file lies.
fn path_of(file: &File) -> PathBuf {
    use std::os::fd::AsRawFd as _;
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn programs_that_have_ended_are_forgotten() {
        let whole = Whole::new(None).unwrap();
        whole.remember(Pid::this(), Managed::default());
        // Beyond the largest number that a process can have.
        for pid in 5_000_000..5_010_000 {
            whole.remember(Pid(pid), Managed::default());
        }
        assert!(whole.managed(Pid::this()).is_some());
        let known = whole.known.lock().unwrap().len();
        assert!(known < 1000, "{known}");
    }
}
