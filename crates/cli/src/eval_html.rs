//! The page of `pagefold eval --html FILE`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use eval::report::NearReason;
use eval::{Additions, ModelReport, NearCause, Report, Series};

use crate::eval_model::settings_name;
use crate::summary_file;

/// The file that the page goes to.
pub(crate) struct PageFile {
    name: PathBuf,
    path: PathBuf,
}

impl PageFile {
    /// Makes sure that it can be written, before the long work starts. What is there stays until the page is complete.
    pub(crate) fn open(name: &Path) -> anyhow::Result<Self> {
        let path = summary_file::regular(name).with_context(|| format!("cannot write the page {}", name.display()))?;
        Ok(Self { name: name.to_owned(), path })
    }

    /// Writes the page.
    pub(crate) fn write(&self, report: &Report, model: Option<&ModelReport>) -> anyhow::Result<()> {
        let about = about();
        let predicted = model.map(curves);
        let near = report.near.as_ref().map(|near| near.causes.iter().map(cause).collect::<Vec<_>>());
        let additions = Additions { about: Some(&about), predicted: predicted.as_deref(), near: near.as_deref() };
        let page = report.html(additions);
        summary_file::replace(&self.path, page.as_bytes())
            .with_context(|| format!("cannot write the page {}", self.name.display()))
    }
}

/// What this machine's settings save over time, and the recommended ones, and the fastest.
fn curves(model: &ModelReport) -> Vec<Series> {
    let fastest = model.trials.iter().max_by_key(|trial| trial.series.get(5).map(|(_, bytes)| *bytes));
    let chosen = model.recommended.and_then(|at| model.trials.get(at));
    let now = model.trials.iter().find(|trial| trial.now);
    let mut curves: Vec<Series> = Vec::new();
    for (what, trial) in [("now", now), ("recommended", chosen), ("fastest", fastest)] {
        let Some(trial) = trial else { continue };
        let name = format!("{what}: {}", settings_name(trial));
        if curves.iter().all(|curve| curve.points != trial.series) {
            curves.push(Series { name, points: trial.series.clone() });
        }
    }
    curves
}

fn cause(reason: &NearReason) -> NearCause {
    NearCause {
        cause: reason.cause.to_owned(),
        pages: reason.pages_worth,
        bytes: reason.bytes_worth,
        remedy: reason.remedy.to_owned(),
    }
}

/// Which machine, and what was asked.
fn about() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let command = std::iter::once("pagefold".to_owned()).chain(words).collect::<Vec<_>>().join(" ");
    match host.trim() {
        "" => command,
        host => format!("{host}: {command}"),
    }
}
