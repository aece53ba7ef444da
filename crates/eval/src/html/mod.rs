//! The report as one HTML page that needs nothing else: no network, no script, no font.
//!
//! What comes from processes, their names, command lines and files, is hostile. The template escapes it, control
//! characters are made visible, and the page's own policy (Content-Security-Policy) has a browser load and run nothing,
//! should that not be enough. Colours are those of the reader's scheme, light or dark. Everything that a drawing shows
//! stands in a table too.
//!
//! Values are made here, in Rust; `templates/report.html` only says where they go.

mod chart;
mod heat;
mod owners;
mod sweep;
mod tables;
mod treemap;
mod words;

use askama::Template;

pub use sweep::sweep_page;

use crate::report::{Report, Sample};

/// What a page can show beside the report.
#[derive(Clone, Copy, Debug, Default)]
pub struct Additions<'a> {
    /// Of what the report is: the machine, the command.
    pub about: Option<&'a str>,
    /// What the model of ksmd predicts, one line for each setting.
    pub predicted: Option<&'a [Series]>,
    /// Pages that almost equal others, and why.
    pub near: Option<&'a [NearCause]>,
}

/// Savings over time under one setting.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// The setting, as it is to be called.
    pub name: String,
    /// Seconds from the start, and bytes saved then.
    pub points: Vec<(f64, u64)>,
}

/// Why pages that could be equal are not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NearCause {
    /// The cause, in a few words.
    pub cause: String,
    /// Pages that it keeps apart.
    pub pages: u64,
    /// What these would save, in bytes.
    pub bytes: u64,
    /// What to do about it.
    pub remedy: String,
}

/// What the template is given. Nothing in it comes from processes but through [`words::name`].
#[derive(Template)]
#[template(path = "report.html")]
struct Page {
    about: String,
    version: &'static str,
    sections: Vec<(&'static str, &'static str)>,
    intro: String,
    estimate: Option<String>,
    frames_seen: bool,
    /// There was a second look.
    watched: bool,
    by: &'static str,
    headline: Vec<tables::Figure>,
    pages: Vec<tables::Pages>,
    apart: Vec<tables::Pages>,
    treemap: Option<treemap::Treemap>,
    steps: Vec<String>,
    classes: Vec<tables::Bar>,
    kinds: Vec<tables::Bar>,
    scopes: Vec<tables::Scope>,
    heats: Vec<heat::Heat>,
    chart: Option<chart::Chart>,
    near: Vec<tables::Near>,
    owners: Vec<owners::Owner>,
    owners_left: String,
    mappings: Vec<owners::Mapping>,
    mappings_left: String,
    contents: Vec<owners::Content>,
    skipped: Vec<owners::Left>,
    skipped_left: String,
    reading: Vec<(&'static str, String)>,
}

impl Report {
    /// The page: a whole HTML document.
    #[must_use]
    pub fn html(&self, additions: Additions<'_>) -> String {
        let chart = additions.predicted.and_then(chart::chart);
        let near = additions.near.map(tables::near).unwrap_or_default();
        let earning = self.vmas.iter().filter(|vma| vma.owned.bytes_saved_share > 0).count();
        let page = Page {
            about: additions.about.map(words::name).unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION"),
            sections: sections(chart.is_some(), !near.is_empty(), !self.skipped.is_empty()),
            intro: intro(self),
            estimate: self.sample.as_ref().map(estimate),
            frames_seen: self.reading.frames_seen,
            watched: self.totals.stable.is_some(),
            by: tables::group_word(self.groups.by),
            headline: tables::headline(self),
            pages: tables::pages(self),
            apart: tables::apart(self),
            treemap: treemap::treemap(self),
            steps: treemap::legend(),
            classes: tables::classes(self),
            kinds: tables::kinds(self),
            scopes: tables::scopes(self),
            heats: heat::groups(self).into_iter().chain(heat::processes(self)).collect(),
            chart,
            near,
            owners: owners::owners(self),
            owners_left: left(self.processes.len(), "processes"),
            mappings: owners::mappings(self),
            mappings_left: left(earning, "mappings"),
            contents: owners::contents(self),
            skipped: owners::skipped(self),
            skipped_left: left(self.skipped.len(), "processes"),
            reading: tables::reading(self),
        };
        page.render().expect("strings and numbers can be written to a string")
    }
}

/// What is where, for the list of contents.
fn sections(predicted: bool, near: bool, skipped: bool) -> Vec<(&'static str, &'static str)> {
    let all = [
        ("figures", "Figures", true),
        ("owners", "Who holds it", true),
        ("savings", "What merging saves", true),
        ("scopes", "How far apart", true),
        ("sharing", "Who shares with whom", true),
        ("predicted", "Savings over time", predicted),
        ("near", "Almost equal", near),
        ("processes", "Processes", true),
        ("mappings", "Mappings", true),
        ("skipped", "Not looked at", skipped),
        ("reading", "How it was read", true),
    ];
    all.into_iter().filter(|(_, _, there)| *there).map(|(id, name, _)| (id, name)).collect()
}

fn intro(report: &Report) -> String {
    let reading = &report.reading;
    let again = reading.watched_seconds.map_or_else(String::new, |time| format!(", and again {time:.0} s later"));
    let read = words::bytes(report.totals.counters.pages_scanned * report.page_size);
    let processes = words::count(report.processes.len() as u64);
    format!("{processes} processes, {read} read in {:.1} s{again}.", reading.elapsed_seconds)
}

fn estimate(sample: &Sample) -> String {
    let how = match sample.method {
        "pages" => "a share of all pages was read",
        _ => "every page was read, and a share of all contents kept",
    };
    format!(
        "An estimate: {how} ({} %). Duplicates of the whole: {}, plausible are {} to {}.",
        sample.fraction * 100.0,
        words::count(sample.duplicate_pages),
        words::count(sample.duplicate_pages_low),
        words::count(sample.duplicate_pages_high),
    )
}

/// What a table does not have.
fn left(of: usize, what: &str) -> String {
    match of.saturating_sub(owners::SHOWN) {
        0 => String::new(),
        more => format!("{} more {what} are not shown; --json has them.", words::count(more as u64)),
    }
}
