//! `pagefold eval`: what merging would save, where and why, before anything is changed.

use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::Duration;

use eval::{EvalError, GroupBy, ModelReport, Options, Pace, Report, SampleBy, Selection, Snapshot, Stage};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kernel::Pid;
use serde::Serialize;

use crate::args::{EvalArgs, GroupByArg};
use crate::eval_html::PageFile;
use crate::eval_model::model_table;
use crate::eval_table::table;
use crate::{NOT_HERE, say, summary_file};

/// Mappings that a document has one by one; a table shows fewer.
const VMAS: usize = 10_000;

/// Evaluates and prints.
pub(crate) fn eval(args: &EvalArgs) -> anyhow::Result<ExitCode> {
    if let Some(file) = &args.capture {
        let refused = |error| anyhow::Error::new(error).context(format!("cannot write the capture {}", file.display()));
        summary_file::regular(file).map_err(refused)?;
    }
    let page = args.html.as_deref().map(PageFile::open).transpose()?;
    let options = options(args);
    let snapshot = match &args.from {
        Some(file) => Ok(Snapshot::read(file, options.pace.threads)?),
        None => {
            let bar = Bar::new(args.json || args.quiet);
            let snapshot = Snapshot::take(&options, &|stage| bar.tell(stage));
            bar.clear();
            snapshot
        }
    };
    let snapshot = match snapshot {
        Ok(snapshot) => snapshot,
        Err(error) if error.is_permission() => {
            say::note(format_args!("{:#}", anyhow::Error::new(error)));
            return Ok(ExitCode::from(NOT_HERE));
        }
        Err(error @ EvalError::NothingNamed) => {
            say::note(format_args!("{error}: --pid, --cgroup, --comm or --all"));
            return Ok(ExitCode::from(crate::USAGE));
        }
        Err(error) => return Err(error.into()),
    };
    let document = Document {
        report: snapshot.report(&options),
        model: args
            .model
            .then(|| snapshot.model(args.model_share, Duration::from_secs_f64(args.model_within)))
            .transpose()?,
    };
    if let Some(file) = &args.capture {
        snapshot.write(file)?;
    }
    if let Some(page) = &page {
        page.write(&document.report, document.model.as_ref())?;
    }
    if args.json {
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
    } else {
        let mut text = table(&document.report)?;
        if let Some(model) = &document.model {
            text.push_str(&model_table(model)?);
        }
        say::answer(&text)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What `--json` prints.
#[derive(Serialize)]
struct Document {
    #[serde(flatten)]
    report: Report,
    /// What ksmd would do, where it was asked for.
    model: Option<ModelReport>,
}

fn options(args: &EvalArgs) -> Options {
    let threads = args.threads.map(usize::from).or_else(|| std::thread::available_parallelism().ok().map(Into::into));
    let sample = args.sample_hash.map(SampleBy::HashSpace);
    let sample = sample.or(args.sample_pages.map(SampleBy::Pages));
    Options {
        selection: Selection {
            pids: args.pid.iter().copied().map(Pid).collect(),
            children: !args.no_children,
            cgroups: args.cgroup.clone(),
            comms: args.comm.clone(),
            all: args.all,
        },
        ranges: args.range.clone(),
        group_by: match args.group_by {
            GroupByArg::Command => GroupBy::Command,
            GroupByArg::Cgroup => GroupBy::Cgroup,
            GroupByArg::User => GroupBy::User,
        },
        pace: Pace { threads: threads.unwrap_or(1), limit: args.limit_rate.map(|mib| mib << 20) },
        watch: args.watch.map(Duration::from_secs_f64),
        looks: args.looks.into(),
        record: args.capture.is_some() || args.model,
        // Keeping a share of all contents is exact for each of them, so it is the better one as long as reading all is
        // no trouble.
        sample: sample.or(args.sample.map(SampleBy::HashSpace)),
        near: args.near,
        top: VMAS,
    }
}

/// Progress on stderr, if somebody looks at it.
struct Bar(ProgressBar);

impl Bar {
    fn new(hidden: bool) -> Self {
        let shown = !hidden && std::io::stderr().is_terminal();
        let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target);
        let style = "{msg:10} {wide_bar} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
        bar.set_style(ProgressStyle::with_template(style).expect("the template is well-formed"));
        Self(bar)
    }

    fn tell(&self, stage: Stage) {
        let bar = &self.0;
        match stage {
            Stage::Walking { done, of } => {
                bar.set_message("looking");
                bar.set_length(of as u64);
                bar.set_position(done as u64);
            }
            Stage::Reading { done, of, again } => {
                let word = if again { "re-reading" } else { "reading" };
                if bar.message() != word {
                    bar.set_message(word);
                    bar.reset_eta();
                }
                bar.set_length(of.get());
                bar.set_position(done.get());
            }
            Stage::Waiting { left } => bar.set_message(format!("{:.0} s", left.as_secs_f64())),
            Stage::Counting => bar.set_message("counting"),
        }
    }

    fn clear(&self) {
        self.0.finish_and_clear();
    }
}
