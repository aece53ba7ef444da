//! What became of a process, in words and as a row.

use std::path::{Path, PathBuf};

use eval::{printable, size};
use ksm::keeper::{Event, Left, Planned, Step, What};
use rules::{Container, Decision, Why};
use serde::Serialize;

/// What is to be done, in a few words.
pub(super) fn step(step: Step) -> String {
    match step {
        Step::Enable => "enable".to_owned(),
        Step::Disable => "disable".to_owned(),
        Step::Keep => "is enabled".to_owned(),
        Step::Nothing => "nothing".to_owned(),
        Step::Leave(left) => format!("leave: {}", self::left(left)),
    }
}

fn left(left: Left) -> String {
    match left {
        Left::Released => "it was disabled by somebody".to_owned(),
        Left::Dropped { retry_seconds } => format!("it did not pay, again in {retry_seconds} s"),
        Left::Paused => "it was refused a moment ago".to_owned(),
        Left::Store => "the store takes it in when it starts".to_owned(),
        Left::Unreadable => "its marks cannot be read".to_owned(),
    }
}

/// An event as a line.
pub(super) fn event(event: &Event) -> String {
    let who = format!("{} ({})", event.process.pid, printable(&event.comm));
    let why = printable(&event.why.to_string());
    match &event.what {
        What::Enabled => format!("enabled {who}: {why}"),
        What::Disabled => format!("disabled {who}: {why}"),
        What::Refused { reason, detail } => {
            format!(
                "{who} is refused: {} [{reason}]; {} was asked for by {why}",
                printable(detail),
                event.action.word()
            )
        }
        What::Dropped { ksm_process_profit, passes, retry_seconds } => format!(
            "dropped {who}: merging it has lost {} (ksm_process_profit {ksm_process_profit}) over {passes} passes of ksmd; \
             tried again in {retry_seconds} s",
            size(ksm_process_profit.unsigned_abs())
        ),
        What::Released => format!("{who} was disabled by somebody else: left so"),
    }
}

/// A process as `--json` has it.
#[derive(Serialize)]
pub(super) struct Row<'a> {
    pid: i32,
    start_time: u64,
    comm: &'a str,
    exe: Option<&'a Path>,
    /// The programs that `exe` runs if it is the dynamic loader.
    loaded: &'a [PathBuf],
    script: Option<&'a str>,
    uid: u32,
    user: Option<&'a str>,
    cgroups: &'a [String],
    containers: &'a [Container],
    units: &'a [String],
    age_seconds: f64,
    rss: u64,
    rss_anon: u64,
    /// Some of its memory is mergeable now; null where that does not matter, or cannot be seen.
    mergeable: Option<bool>,
    /// Enabled by an earlier `apply`, or by inheritance from what that has enabled.
    by_rules: bool,
    ksm_process_profit: Option<i64>,
    step: Step,
    #[serde(flatten)]
    decision: &'a Decision,
}

impl<'a> Row<'a> {
    pub(super) fn new(planned: &'a Planned) -> Self {
        let facts = &planned.facts;
        Self {
            pid: planned.process.pid,
            start_time: planned.process.start_time,
            comm: &facts.comm,
            exe: facts.exe.as_deref(),
            loaded: &facts.loaded,
            script: facts.script.as_deref(),
            uid: facts.uid,
            user: facts.user.as_deref(),
            cgroups: &facts.cgroups,
            containers: &facts.containers,
            units: &facts.units,
            age_seconds: facts.age.as_secs_f64(),
            rss: facts.rss.get(),
            rss_anon: facts.anon.get(),
            mergeable: planned.merged,
            by_rules: planned.is_ours,
            ksm_process_profit: planned.stat.and_then(|stat| stat.ksm_process_profit),
            step: planned.step,
            decision: &planned.decision,
        }
    }
}

/// Processes as a table.
pub(super) fn table<'a>(planned: impl Iterator<Item = &'a Planned>) -> String {
    let head = ["PID", "USER", "COMMAND", "ANONYMOUS", "STEP", "BECAUSE OF"].map(str::to_owned);
    let rows: Vec<[String; 6]> = std::iter::once(head).chain(planned.map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let [w0, w1, w2, w3, w4] = [0, 1, 2, 3, 4].map(width);
    let line = |[pid, user, comm, anon, step, why]: &[String; 6]| {
        format!("{pid:>w0$}  {user:w1$}  {comm:w2$}  {anon:>w3$}  {step:w4$}  {why}\n")
    };
    rows.iter().map(line).collect()
}

fn row(planned: &Planned) -> [String; 6] {
    let facts = &planned.facts;
    let because = match &planned.decision.why {
        Why::NotPermitted => "not permitted".to_owned(),
        why => why.to_string(),
    };
    [
        planned.process.pid.to_string(),
        printable(facts.user.as_deref().unwrap_or(&facts.uid.to_string())),
        printable(&facts.comm),
        size(facts.anon.get()),
        step(planned.step),
        printable(&because),
    ]
}
