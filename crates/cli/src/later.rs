//! Commands whose names are settled and which are not built yet.

use std::process::ExitCode;

/// Says so.
pub(crate) fn say(name: &str) -> ExitCode {
    eprintln!("pagefold: `{name}` is not built yet; `pagefold --help` lists what is");
    ExitCode::from(crate::NOT_HERE)
}
