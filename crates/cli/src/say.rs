//! What is said to people. Nobody has to be listening: a reader that has left changes no status and ends nothing.

use std::fmt::Display;
use std::io::{self, Write as _};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use eval::printable;

/// What was said so far.
struct Said {
    /// Anything that was asked for.
    answered: bool,
    /// What was said last beside it: of a command that fails, the reason.
    last: String,
}

static SAID: Mutex<Said> = Mutex::new(Said { answered: false, last: String::new() });

fn so_far() -> MutexGuard<'static, Said> {
    SAID.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A line on stderr. What cannot be said there can be said nowhere.
pub(crate) fn note(text: impl Display) {
    lines(&format!("pagefold: {text}\n"));
}

/// A line on stderr about what goes on, which is the reason of nothing.
pub(crate) fn meanwhile(text: impl Display) {
    let _ = io::stderr().write_all(shown(&format!("pagefold: {text}\n")).as_bytes());
}

/// Whole lines on stderr, in one write: what the command writes does not come in between.
pub(crate) fn lines(text: &str) {
    let text = shown(text);
    so_far().last = text.trim_start_matches("pagefold: ").trim_end().to_owned();
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Lines as a terminal may get them: names of files and control groups, whoever gave them, stand in reasons too.
fn shown(text: &str) -> String {
    text.split('\n').map(printable).collect::<Vec<_>>().join("\n")
}

/// The document of a command that was to print one and has failed before it had any: why.
pub(crate) fn failure() {
    let Said { answered: false, last } = &*so_far() else { return };
    let document = serde_json::json!({ "error": last });
    // Nobody listens, then.
    let _ = writeln!(io::stdout(), "{document:#}");
}

/// What was asked for, on stdout. A reader that has seen enough is no failure.
pub(crate) fn answer(text: &str) -> anyhow::Result<()> {
    read_on(text).map(|_| ())
}

/// A part of what was asked for, on stdout; false if the reader has seen enough.
pub(crate) fn read_on(text: &str) -> anyhow::Result<bool> {
    so_far().answered = true;
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("cannot write to stdout"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_said_steers_a_terminal() {
        assert_eq!(shown("a\x1b[31m\u{9b}b\nc\r\n"), "a\u{241b}[31m\u{fffd}b\nc\u{240d}\n");
    }
}
