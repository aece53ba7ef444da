//! What a run has come to so far: it is told however the run ends.

use std::io::Write as _;

use anyhow::{Context as _, Result};
use serde::Serialize;
use serde_json::{Value, json};

use super::compare;
use super::measure::Outcome;
use super::rounds::{Rounds, plain_of};
use crate::report::{Machine, Report};

/// What is known.
#[derive(Debug, Serialize)]
pub(super) struct Findings {
    #[serde(flatten)]
    report: Report,
    /// Somebody has ended the run before everything was measured.
    interrupted: bool,
    /// Whatever was measured was right, and nothing failed.
    #[serde(skip)]
    pub(super) right: bool,
}

/// What was not measured, and why.
#[derive(Clone, Debug)]
pub(super) enum Not {
    /// It cannot be measured here.
    Skipped(String),
    /// It can, and something was wrong.
    Failed(String),
    /// There was no time for it.
    Interrupted,
}

/// A line for people. Whoever reads them may be gone, as a `tee` that got the same Ctrl-C: what was measured has to be
/// told all the same.
pub(super) fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

impl Findings {
    /// Nothing yet.
    pub(super) fn new() -> Self {
        let report = Report { scenario: "workers", machine: Machine::here(), samples: Vec::new(), ratios: Vec::new() };
        Self { report, interrupted: false, right: true }
    }

    /// Says and notes that something was not measured; `what` names it in the report.
    pub(super) fn not(&mut self, name: &str, what: Value, not: Not) {
        let (word, why) = match not {
            Not::Skipped(why) => ("skipped", why),
            Not::Failed(why) => ("failed", why),
            Not::Interrupted => ("interrupted", "it was not measured to its end".to_owned()),
        };
        self.right &= word == "skipped";
        say(&format!("{name}: {word}: {why}"));
        let mut sample = what;
        if let Some(fields) = sample.as_object_mut() {
            fields.insert(word.to_owned(), json!(why));
        }
        self.report.samples.push(sample);
    }

    /// Adds what came of all ways under one load in so many rounds, or of what there was time for, and says what
    /// several rounds come to.
    ///
    /// # Errors
    /// When it cannot be put in JSON.
    pub(super) fn add(&mut self, outcomes: &[Outcome], rounds: u16) -> Result<()> {
        for outcome in outcomes {
            self.right &= outcome.right();
            self.report.samples.push(compare::sample(outcome, plain_of(outcomes, outcome.round))?);
        }
        for way in Rounds::of_all(outcomes).iter().filter(|_| rounds > 1) {
            say(&way.row(rounds));
        }
        self.report.ratios.extend(compare::ratios(outcomes));
        Ok(())
    }

    /// Says what was missed, and prints everything as one JSON document if that is wanted.
    ///
    /// # Errors
    /// When it cannot be printed.
    pub(super) fn print(&mut self, json: bool, interrupted: bool) -> Result<()> {
        self.interrupted = interrupted;
        for ratio in self.report.ratios.iter().filter(|ratio| !ratio.met) {
            say(&format!(
                "missed: {}: {:.3} {} against {:.3} ({}), ratio {:.3}, goal {:.2}",
                ratio.metric, ratio.ours, ratio.unit, ratio.theirs, ratio.against, ratio.ratio, ratio.goal
            ));
        }
        if interrupted {
            say("interrupted: this is what was measured until then");
        }
        if json {
            let text = serde_json::to_string_pretty(self)?;
            writeln!(std::io::stdout(), "{text}").context("print the report")?;
        }
        Ok(())
    }
}
