//! A workload under a list of settings: which is best, and why.
//!
//! Every setting is run several times, in turns, so that what changes on the machine meanwhile hits all of them. Before
//! each run ksmd is made to forget the one before: it starts from the same state. All under one lease, so the
//! administrator's settings come back however it ends.
mod judge;
mod report;
mod run;
mod setting;
mod stage;

use std::io;
use std::time::Duration;

use kernel::ksm_sysfs::KsmSysfs;
use kernel::launch::{LaunchError, Launched};

pub use judge::{Aim, Verdict};
pub use report::{Report, Spread, Tried};
pub use run::{Run, Sample};
pub use setting::{How, MOST, Setting, SettingError};

use crate::error::KsmError;
use crate::knob::Knob;
use crate::repaired::{Refused, Repaired};
use crate::set::{by, users};
use crate::state::StatePath;
use crate::tree::Tree;
use crate::wanted::Wanted;
use run::{Ahead, End, run};
use stage::Stage;

/// What ends a sweep before its time.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SweepError {
    /// KSM's settings, or the lease on them.
    #[error(transparent)]
    Ksm(#[from] KsmError),
    /// This kernel has no such file.
    #[error("{setting}: this kernel has no {knob}")]
    NotHere {
        /// The setting's name.
        setting: String,
        /// What it names.
        knob: Knob,
    },
    /// The workload could not be started.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The kernel did not take a setting.
    #[error("{setting}: {refused}")]
    Refused {
        /// The setting's name.
        setting: String,
        /// What the kernel said.
        refused: String,
    },
    /// A setting was written by somebody else and is left his, so the sweep cannot go on.
    #[error(
        "{0} was written by somebody else while pagefold held KSM's settings, and is left so: nothing more can be measured"
    )]
    Taken(Knob),
    /// The workload could not be waited for.
    #[error("cannot wait for the command")]
    Wait(#[source] io::Error),
    /// The workload could not be watched.
    #[error("cannot watch the command")]
    Watch(#[source] kernel::PidfdError),
}

/// What is to be tried, and how.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The settings.
    pub settings: Vec<Setting>,
    /// How often each is run.
    pub repeat: u32,
    /// One run before all others, with ksmd off, that does not count: it fills caches.
    pub warm_up: bool,
    /// End the workload after so long; `None` to wait for its end.
    pub at_most: Option<Duration>,
    /// How long to wait before a run for ksmd to forget the one before.
    pub settle: Duration,
    /// What is wanted most.
    pub aim: Aim,
    /// The command, for the report.
    pub command: Vec<String>,
}

/// What happens.
#[derive(Debug)]
pub enum Step<'a> {
    /// ksmd is being made to forget the run before.
    Settling,
    /// A run begins: its number from 0, how many there are, the setting's name. The warm-up has none.
    Begins(Option<(usize, usize, &'a str)>),
    /// A run ended.
    Ended(&'a str, &'a Run),
    /// The report as it is so far, after each run.
    SoFar(&'a Report),
}

/// A sweep, holding the lease.
#[derive(Debug)]
pub struct Sweep {
    stage: Stage,
    plan: Plan,
    runs: Vec<Vec<Run>>,
}

impl Sweep {
    /// Takes the lease. `tree` is what the workload's processes are below; nothing else may be in it.
    ///
    /// # Errors
    /// [`SweepError::NotHere`], and as [`Lease::acquire_at`](crate::Lease::acquire_at).
    pub fn begin(path: &StatePath, sysfs: &KsmSysfs, tree: Tree, plan: Plan) -> Result<(Self, Repaired), SweepError> {
        let here = crate::sysfs::values(sysfs)?;
        for setting in &plan.settings {
            if let Some(knob) = setting.named().find(|&knob| !here.contains(knob)) {
                return Err(SweepError::NotHere { setting: setting.name.clone(), knob });
            }
        }
        let (stage, repaired) = Stage::set(path, sysfs, tree)?;
        let runs = vec![Vec::new(); plan.settings.len()];
        Ok((Self { stage, plan, runs }, repaired))
    }

    /// Makes all runs, in turns. Returns whether it came to the end; `interrupted` is asked often.
    ///
    /// # Errors
    /// [`SweepError`]. Runs that have ended are kept.
    pub fn run(
        &mut self,
        start: &mut dyn FnMut() -> Result<Launched, SweepError>,
        interrupted: &mut dyn FnMut() -> bool,
        tell: &mut dyn FnMut(Step<'_>),
    ) -> Result<bool, SweepError> {
        if self.plan.warm_up {
            tell(Step::Begins(None));
            let off = Setting { name: "warm-up".to_owned(), how: How::Off };
            let ask = || self.ask(&off);
            let ahead = Ahead { setting: &off, number: 0, fresh: true, at_most: self.plan.at_most };
            if let End::Interrupted = run(&self.stage, ahead, start, &ask, interrupted)? {
                return Ok(false);
            }
        }
        let count = self.plan.settings.len();
        let all = count * self.plan.repeat as usize;
        for number in 0..all {
            // Each round begins with another setting: what comes first is not always the same.
            let (round, place) = (number / count, number % count);
            let at = (place + round) % count;
            tell(Step::Settling);
            let fresh = self.stage.forget(self.plan.settle, interrupted)?;
            if interrupted() {
                return Ok(false);
            }
            let setting = self.plan.settings[at].clone();
            self.stage.unchanged(&setting.wanted())?;
            tell(Step::Begins(Some((number, all, &setting.name))));
            let ask = || self.ask(&setting);
            let ahead = Ahead { setting: &setting, number, fresh, at_most: self.plan.at_most };
            let ended = run(&self.stage, ahead, start, &ask, interrupted)?;
            // Now it is heard whether the setting was in force to the end, and all that it leaves alone as it was.
            let to_the_end =
                self.stage.ask(Wanted::default()).and_then(|_refused| self.stage.unchanged(&setting.wanted()));
            let End::Over(mut ended) = ended else { return to_the_end.map(|()| false) };
            if let Err(SweepError::Taken(knob)) = to_the_end {
                ended.taken = Some(knob);
            }
            tell(Step::Ended(&setting.name, &ended));
            self.runs[at].push(*ended);
            tell(Step::SoFar(&self.report(to_the_end.is_ok() && number + 1 == all)));
            to_the_end?;
        }
        Ok(true)
    }

    /// Puts a setting in force, all of it.
    fn ask(&self, setting: &Setting) -> Result<(), SweepError> {
        let Some(refused) = self.stage.ask(setting.wanted())?.into_iter().next() else { return Ok(()) };
        Err(SweepError::Refused { setting: setting.name.clone(), refused: reason(&refused) })
    }

    /// What is known so far.
    #[must_use]
    pub fn report(&self, complete: bool) -> Report {
        let Plan { settings, aim, repeat, command, .. } = &self.plan;
        let tried = settings.iter().cloned().zip(self.runs.clone()).map(|(setting, runs)| Tried::of(setting, runs));
        Report::new(command.clone(), (*aim, *repeat, complete, self.stage.sees_ksmd()), tried.collect())
    }

    /// Gives the settings back.
    ///
    /// # Errors
    /// As [`Lease::release`](crate::Lease::release).
    pub fn end(self) -> Result<Repaired, SweepError> {
        self.stage.leave()
    }
}

/// What the kernel did not take, and why.
fn reason(refused: &Refused) -> String {
    if refused.is_busy() {
        return format!(
            "{refused}. It cannot be changed while pages are merged{}. The way out: unmerge them (`pagefold disable` on \
             these processes, or their end)",
            by(&users())
        );
    }
    refused.to_string()
}
