//! Commands whose names are settled and which are not built yet.

use std::process::ExitCode;

use crate::say::note;

/// Says so.
pub(crate) fn say(name: &str) -> ExitCode {
    note(format_args!("`{name}` is not built yet; `pagefold --help` lists what is"));
    ExitCode::from(crate::NOT_HERE)
}
