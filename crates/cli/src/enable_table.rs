//! What `enable` and `disable` say to people.

use std::collections::BTreeSet;
use std::fmt;

use eval::{printable, size};
use ksm::enable::{Goal, Outcome, Processed, Report};

/// The answer as a table, with what has to be known beside it.
pub(crate) struct Told<'a> {
    pub(crate) report: &'a Report,
    pub(crate) goal: &'a Goal,
    /// KSM's `run`.
    pub(crate) run: Option<i64>,
}

impl Told<'_> {
    fn word(&self, processed: &Processed) -> &'static str {
        match (&processed.outcome, self.goal.merged) {
            (Outcome::Done, true) => "enabled",
            (Outcome::Done, false) => "disabled",
            (Outcome::Already, true) => "was enabled",
            (Outcome::Already, false) => "was not enabled",
            (Outcome::Nothing, _) => "nothing to mark",
            (Outcome::Refused { .. }, _) => "refused",
            (Outcome::Ended, _) => "gone",
        }
    }

    fn rows(&self) -> Vec<[String; 6]> {
        let row = |processed: &Processed| {
            let marks = processed.marks.unwrap_or_default();
            let known = |text: String| if processed.marks.is_some() { text } else { "-".to_owned() };
            let merged = processed.ksm_stat.and_then(|stat| stat.ksm_merging_pages);
            [
                processed.process.pid.to_string(),
                printable(&processed.comm),
                self.word(processed).to_owned(),
                known(format!("{} mappings, {}", marks.marked_vmas, size(marks.marked_bytes))),
                known(size(marks.marked_anonymous_bytes)),
                merged.map_or_else(|| "-".to_owned(), |pages| format!("{pages} pages")),
            ]
        };
        self.report.processes.iter().map(row).collect()
    }

    /// Reasons, each with whom it is about.
    fn reasons(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for processed in &self.report.processes {
            if let Outcome::Refused { reason, detail } = &processed.outcome {
                writeln!(f, "{}: {} [{reason}]", processed.process.pid, printable(detail))?;
            }
        }
        Ok(())
    }

    fn notes(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for processed in self.report.processes.iter().filter(|processed| processed.interrupted > 0) {
            let (pid, calls) = (processed.process.pid, processed.interrupted);
            writeln!(f, "note: {pid}: {calls} of its calls returned early for it, as after a signal")?;
        }
        // Nowhere: a word that some have and others have not is no mistake.
        let processes = || self.report.processes.iter().filter(|processed| processed.marks.is_some());
        let words: BTreeSet<&String> = processes().flat_map(|processed| &processed.without_a_mapping).collect();
        for word in words {
            if processes().all(|processed| processed.without_a_mapping.contains(word)) {
                writeln!(f, "note: {} is the name of no mapping there", printable(word))?;
            }
        }
        if let Some(why) = &self.report.incomplete {
            writeln!(f, "note: not known to be all: {why}")?;
        }
        let done = self.report.processes.iter().any(|processed| processed.outcome.is_done());
        if !done {
            return Ok(());
        }
        if self.goal.merged && self.run != Some(1) {
            let run = self.run.map_or_else(|| "unreadable".to_owned(), |run| run.to_string());
            writeln!(
                f,
                "note: ksmd does not run (/sys/kernel/mm/ksm/run is {run}), so nothing is merged yet: \
                 pagefold ksm advise, or pagefold ksm set run=1"
            )?;
        }
        if self.goal.merged && !self.goal.exclude.is_empty() && self.goal.only.is_empty() {
            let text = if self.goal.later {
                "what is mapped later is merged too, mappings of the excluded names among them"
            } else {
                "what is mapped from now on is not merged until enable is called again; what is excluded never is"
            };
            writeln!(f, "note: {text}")?;
        }
        let still = |processed: &Processed| processed.ksm_stat.is_some_and(|stat| stat.ksm_merge_any == Some(true));
        if !self.goal.merged && self.goal.switch().is_none() && processes().any(still) {
            writeln!(f, "note: the switch of the process stays on, so what is mapped later is merged")?;
        }
        Ok(())
    }
}

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = ["PID", "COMMAND", "OUTCOME", "MARKED", "CAN MERGE", "MERGED"].map(str::to_owned);
        let rows: Vec<[String; 6]> = std::iter::once(head).chain(self.rows()).collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..6).map(width).collect();
        for row in &rows {
            let [pid, comm, word, marked, anonymous, merged] = row;
            writeln!(
                f,
                "{pid:>w0$}  {comm:w1$}  {word:w2$}  {marked:>w3$}  {anonymous:>w4$}  {merged:>w5$}",
                w0 = widths[0],
                w1 = widths[1],
                w2 = widths[2],
                w3 = widths[3],
                w4 = widths[4],
                w5 = widths[5],
            )?;
        }
        self.reasons(f)?;
        self.notes(f)
    }
}
