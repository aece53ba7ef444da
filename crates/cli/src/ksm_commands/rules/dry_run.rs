//! `pagefold ksm rules dry-run`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use ksm::ProcessId;
use ksm::keeper::{Keeper, Planned, Record, Step};
use serde::Serialize;

use super::words::{self, Row};
use super::{apply, read_right};
use crate::args::ksm_rules::DryRunArgs;
use crate::{NOT_HERE, say};

/// What `--json` prints.
#[derive(Serialize)]
struct Document<'a> {
    file: &'a Path,
    #[serde(flatten)]
    counts: Counts,
    processes: Vec<Row<'a>>,
}

/// How many processes there are of each kind.
#[derive(Default, Serialize)]
struct Counts {
    enable: usize,
    disable: usize,
    keep: usize,
    leave: usize,
    nothing: usize,
}

impl Counts {
    fn of(planned: &[Planned]) -> Self {
        let mut counts = Self::default();
        for planned in planned {
            *match planned.step {
                Step::Enable => &mut counts.enable,
                Step::Disable => &mut counts.disable,
                Step::Keep => &mut counts.keep,
                Step::Leave(_) => &mut counts.leave,
                Step::Nothing => &mut counts.nothing,
            } += 1;
        }
        counts
    }
}

pub(super) fn dry_run(args: &DryRunArgs) -> anyhow::Result<ExitCode> {
    let Some(rules) = read_right(&args.file)? else { return Ok(ExitCode::FAILURE) };
    if let Err(error) = ProcessId::current() {
        say::note(error);
        return Ok(ExitCode::from(NOT_HERE));
    }
    // With what is on record: it says who would be left alone.
    let record = Record::read(&Record::path_for_this_user()).context("cannot read the record of earlier calls")?;
    let planned = Keeper::new(rules, record, Duration::ZERO).plan().context("cannot look at the processes")?;
    let counts = Counts::of(&planned);
    if args.json {
        let document = Document { file: &args.file, counts, processes: planned.iter().map(Row::new).collect() };
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
        return Ok(ExitCode::SUCCESS);
    }
    let shown = planned.iter().filter(|planned| args.all || planned.step != Step::Nothing);
    let Counts { enable, disable, keep, leave, nothing } = counts;
    let sum = format!(
        "{enable} would be enabled, {disable} disabled; {keep} are enabled already, {leave} would be left as they are, \
         nothing for the other {nothing}\n"
    );
    say::answer(&format!("{}{sum}{}", words::table(shown), apply::ksmd_note().unwrap_or_default()))?;
    Ok(ExitCode::SUCCESS)
}
