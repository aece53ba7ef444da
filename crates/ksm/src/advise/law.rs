//! The law: from what is seen to what is asked of ksmd. No I/O, no clock of its own.
use std::collections::VecDeque;
use std::fmt;
use std::time::Duration;

use super::estimate::Estimate;
use super::goals::{Goals, Look};
use super::pace_for::rate_for;
use super::passes::{Pass, Passes};
use super::stage::{Stage, Turn};
use crate::pace::Phase;
use crate::wanted::Rate;

/// For how long back ksmd's use of the processor is held against the ceiling.
const CEILING_OVER: Duration = Duration::from_secs(20);
/// What is aimed at of the ceiling, so that it holds although costs vary.
const BELOW_CEILING: f64 = 0.92;
/// Nearly a whole processor, above which ksmd gets no sleep at all: only for a ceiling that allows it.
const NEARLY_ALL: f64 = 0.96;
/// After so many seconds an unused part of the ceiling may be made up for, by this factor at most.
const SETTLED: f64 = 3.0;
const HEADROOM: f64 = 1.5;
/// The most by which memory pressure makes scanning faster, and CPU pressure slower.
const HURRY: f64 = 8.0;
const PATIENCE: f64 = 4.0;

/// What settles the pace.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
#[serde(tag = "by", rename_all = "snake_case")]
pub enum Pace {
    /// The goal for the time of a pass.
    ScanTime,
    /// The ceiling: the goal for the time of a pass gives way.
    Ceiling {
        /// Share of a processor that the pace would have needed.
        needed: f64,
    },
    /// New memory: as fast as the boost's ceiling lets it.
    Boost,
    /// Memory is short: faster than the goal.
    MemoryPressure {
        /// PSI, per cent.
        some_avg10: f64,
    },
    /// Processors are short: slower than the goal.
    CpuPressure {
        /// PSI, per cent.
        some_avg10: f64,
    },
    /// Nothing is asked: ksmd does what the administrator had it do.
    Rest,
    /// Somebody else asks for another rate, which is in force: no goal is held.
    Overruled {
        /// That rate; `None` if ksmd is stopped.
        in_force: Option<Rate>,
    },
}

/// What is to be done until the next look.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision {
    /// What ksmd is asked for; `None` for nothing.
    pub rate: Option<Rate>,
    /// The phase.
    pub phase: Phase,
    /// Why the phase changed, if it did.
    pub turn: Option<Turn>,
    /// What settles the pace.
    pub pace: Pace,
    /// Pages a second that this should make.
    pub pages_per_second: f64,
    /// Pages that a pass meets, as far as is known.
    pub pass_pages: f64,
    /// A pass that ended since the last look.
    pub pass: Option<Pass>,
    /// When to look again.
    pub next: Duration,
}

/// The advisor's mind.
#[derive(Clone, Debug)]
pub struct Law {
    goals: Goals,
    costs: Estimate,
    passes: Passes,
    stage: Stage,
    first: Option<Turn>,
    last: Look,
    /// Pages compared, where the kernel counts them or not.
    scanned: f64,
    asked: Option<Rate>,
    spent: VecDeque<(Duration, Duration)>,
}

impl Law {
    /// Begins with a first look.
    #[must_use]
    pub fn new(goals: Goals, look: Look) -> Self {
        let (stage, turn) = Stage::begin(&goals, &look);
        Self {
            goals,
            costs: Estimate::NEW,
            passes: Passes::default(),
            stage,
            first: Some(turn),
            last: look,
            scanned: 0.0,
            asked: None,
            spent: VecDeque::new(),
        }
    }

    /// What is to be held.
    #[must_use]
    pub fn goals(&self) -> &Goals {
        &self.goals
    }

    /// Pages merged since the start, each time counted that they were.
    #[must_use]
    pub fn merges(&self) -> u64 {
        self.stage.merges()
    }

    /// Decides. Looks come in the order of time.
    pub fn look(&mut self, now: Look) -> Decision {
        let before = std::mem::replace(&mut self.last, now);
        let compared = self.compared(&before, &now);
        let scanned_before = self.scanned;
        self.scanned += compared;
        if let Some(rate) = now.in_force
            && compared > 0.0
        {
            self.costs.learn(&before, &now, rate, compared);
        }
        let pass = self.passes.follow((&before, scanned_before), (&now, self.scanned));
        if let (None, Some(pass), Some(rate)) = (now.pages_scanned, pass, now.in_force) {
            self.costs.correct(now.rmap_items.max(1) as f64 / (pass.pages_scanned.max(1) as f64), rate);
            self.passes.count_records(&now);
        }
        let turn = self.first.take().or_else(|| self.stage.follow(&self.goals, &before, &now));
        if turn.is_some() {
            // Another phase, another ceiling.
            self.spent.clear();
        }
        let overruled = self.asked.is_some() && now.in_force != self.asked;
        let mut decision = self.decide(&now, overruled);
        if decision.pace != Pace::ScanTime {
            self.passes.not_held();
        }
        if decision.rate.is_none() || now.in_force.is_none() {
            self.passes.forget_present();
        }
        self.asked = decision.rate;
        decision.turn = turn;
        decision.pass = pass;
        decision
    }

    /// Pages compared between two looks.
    fn compared(&self, before: &Look, now: &Look) -> f64 {
        match (before.pages_scanned, now.pages_scanned) {
            (Some(before), Some(now)) => now.saturating_sub(before) as f64,
            // Not counted here: what the rate in force should have made.
            _ => now
                .in_force
                .map_or(0.0, |rate| self.costs.pages_per_second(rate) * now.at.saturating_sub(before.at).as_secs_f64()),
        }
    }

    fn decide(&mut self, now: &Look, overruled: bool) -> Decision {
        let pass_pages = self.passes.pages(now);
        let phase = self.stage.phase;
        let ceiling = match (phase, self.goals.boost) {
            (Phase::Boost, Some(boost)) => boost.max(self.goals.max_cpu),
            _ => self.goals.max_cpu,
        };
        let most = self.allowed(now, ceiling) / self.costs.page;
        let (wanted, mut pace) = match phase {
            Phase::Idle => (0.0, Pace::Rest),
            Phase::Boost => (most, Pace::Boost),
            Phase::Steady => {
                let (factor, pace) = self.pressed(now);
                (self.for_goal(now, pass_pages, self.scan_time() / factor), pace)
            }
        };
        // A boost may not scan slower than the goal either.
        let held = if phase == Phase::Idle { 0.0 } else { pass_pages / self.scan_time() };
        let pages_per_second = wanted.min(most);
        if phase == Phase::Steady && most < held && pages_per_second < wanted {
            pace = Pace::Ceiling { needed: self.costs.share(held) };
        }
        if overruled {
            pace = Pace::Overruled { in_force: now.in_force };
        }
        let rate = (phase != Phase::Idle).then(|| rate_for(pages_per_second, pass_pages, &self.costs, self.asked));
        let next = match phase {
            Phase::Idle => self.stage.rest_left(now.at).clamp(Duration::from_millis(500), Duration::from_secs(1)),
            Phase::Boost => Duration::from_millis(100),
            Phase::Steady => (self.goals.scan_time / 40).clamp(Duration::from_millis(50), Duration::from_secs(1)),
        };
        Decision { rate, phase, turn: None, pace, pages_per_second, pass_pages, pass: None, next }
    }

    fn scan_time(&self) -> f64 {
        self.goals.scan_time.as_secs_f64().max(0.01)
    }

    /// Pages a second with which the present pass ends `scan_time` seconds after its start.
    fn for_goal(&self, now: &Look, pass_pages: f64, scan_time: f64) -> f64 {
        let even = pass_pages / scan_time;
        let Some(progress) = self.passes.progress(now, self.scanned) else { return even };
        let left = pass_pages - progress.met;
        let seconds = scan_time - progress.seconds;
        let wanted = if left <= 0.0 {
            // More is there than was thought, nobody knows how much.
            even
        } else if seconds <= 0.0 {
            even * 4.0
        } else {
            left / seconds
        };
        // Little of a pass that was met so far says little of what is to come.
        let compared = if progress.met > pass_pages / 20.0 { progress.compared } else { 1.0 };
        wanted.clamp(even / 10.0, even * 4.0) * compared.max(1e-3)
    }

    /// What pressure makes of the pace. Memory that is short hurts more than processors that are.
    fn pressed(&self, now: &Look) -> (f64, Pace) {
        let above = |limit: Option<f64>, found: Option<f64>| limit.zip(found).filter(|(limit, found)| found > limit);
        if let Some((limit, some_avg10)) = above(self.goals.memory_pressure, now.memory_pressure) {
            return ((1.0 + some_avg10 / limit.max(0.1)).min(HURRY), Pace::MemoryPressure { some_avg10 });
        }
        if let Some((limit, some_avg10)) = above(self.goals.cpu_pressure, now.cpu_pressure) {
            return ((limit / some_avg10).max(1.0 / PATIENCE), Pace::CpuPressure { some_avg10 });
        }
        (1.0, Pace::ScanTime)
    }

    /// The share of a processor that ksmd may use now, so that it stays below the ceiling over some time.
    fn allowed(&mut self, now: &Look, ceiling: f64) -> f64 {
        let Some(cpu) = now.ksmd_cpu else { return ceiling * BELOW_CEILING };
        self.spent.push_back((now.at, cpu));
        while self.spent.get(1).is_some_and(|(at, _)| now.at.saturating_sub(*at) > CEILING_OVER) {
            self.spent.pop_front();
        }
        let (at, before) = self.spent[0];
        let seconds = now.at.saturating_sub(at).as_secs_f64();
        let used = cpu.saturating_sub(before).as_secs_f64() / seconds.max(1.0) / ceiling;
        // What a page costs goes up and down: what was not used may be used now, once there is something to go by.
        // Above the ceiling, as after others had ksmd run, no less than a fifth is left, or nothing would be learnt.
        let most = if seconds > SETTLED { HEADROOM } else { 1.0 };
        let factor = if used > 1.0 { 1.0 / (used * used) } else { 2.0 - used };
        (ceiling * BELOW_CEILING * factor.clamp(0.2, most)).min(NEARLY_ALL.max(ceiling))
    }
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ScanTime => f.write_str("holding the pass time"),
            Self::Ceiling { needed } => {
                write!(f, "at the ceiling; the pass time gives way (it would take {:.1} % of a CPU)", needed * 100.0)
            }
            Self::Boost => f.write_str("boost: new memory is looked at as fast as the ceiling allows"),
            Self::MemoryPressure { some_avg10 } => write!(f, "faster: memory pressure is {some_avg10:.1} %"),
            Self::CpuPressure { some_avg10 } => write!(f, "slower: CPU pressure is {some_avg10:.1} %"),
            Self::Rest => f.write_str("resting: ksmd is as the administrator had it"),
            Self::Overruled { in_force: None } => f.write_str("somebody else has stopped ksmd: no goal is held"),
            Self::Overruled { in_force: Some(rate) } => write!(
                f,
                "somebody else asks for {} pages every {} ms, which is in force: no goal is held",
                rate.pages_to_scan, rate.sleep_millisecs
            ),
        }
    }
}

impl fmt::Display for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Started { mergeable_pages } => {
                write!(f, "start: up to {mergeable_pages} pages of processes that KSM may merge")
            }
            Self::Grown { pages } => write!(f, "{pages} new pages have appeared"),
            Self::Little { merged } => write!(f, "the last passes merged little ({merged} pages)"),
            Self::Nothing { merged } => write!(f, "nothing to gain: the last passes merged {merged} pages"),
            Self::Unprofitable { general_profit } => {
                write!(f, "no gain: bookkeeping takes {} bytes more than merging saves", general_profit.unsigned_abs())
            }
            Self::NobodyThere => f.write_str("no process has memory that KSM may merge"),
            Self::LookAgain { after_seconds } => write!(f, "looking again after {after_seconds} s"),
        }
    }
}
