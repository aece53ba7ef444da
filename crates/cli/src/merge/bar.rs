//! Progress on stderr, if somebody looks at it.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use ksm::request::Stage;

/// A line that is drawn anew.
pub(super) struct Bar(ProgressBar);

impl Bar {
    pub(super) fn new(hidden: bool) -> Self {
        let shown = !hidden && std::io::stderr().is_terminal();
        let target = if shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(None, target);
        let style = "{msg:22} {wide_bar} {human_pos} of {human_len}, {elapsed}, {eta} left";
        bar.set_style(ProgressStyle::with_template(style).expect("the template is well-formed"));
        Self(bar)
    }

    pub(super) fn tell(&self, stage: Stage) {
        let (word, done, of) = match stage {
            Stage::Listing { done, of } => ("looking at processes", done as u64, of as u64),
            Stage::Reading { pages, of } => ("reading pages", pages, of),
            Stage::ReadingElsewhere => ("reading shared pages", 0, 0),
            Stage::Marking { runs, of } => ("marking ranges", runs, of),
            Stage::Merging { pages, of } => ("merging pages", pages, of),
            Stage::Unmerging { bytes, of } => ("un-merging pages", bytes.pages().get(), of.pages().get()),
        };
        let bar = &self.0;
        if bar.message() != word {
            bar.set_message(word);
            bar.reset_eta();
        }
        bar.set_length(of);
        bar.set_position(done);
    }

    pub(super) fn clear(&self) {
        self.0.finish_and_clear();
    }
}
