//! What is said to people. Nobody has to be listening: a reader that has left changes no status and ends nothing.

use std::fmt::Display;
use std::io::{self, Write as _};

use anyhow::Context as _;

/// A line on stderr. What cannot be said there can be said nowhere.
pub(crate) fn note(text: impl Display) {
    lines(&format!("pagefold: {text}\n"));
}

/// Whole lines on stderr, as they are, in one write: what the command writes does not come in between.
pub(crate) fn lines(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// What was asked for, on stdout. A reader that has seen enough is no failure.
pub(crate) fn answer(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot write to stdout"),
    }
}
