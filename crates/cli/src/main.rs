//! The pagefold command: words, tables, progress, JSON.
#![forbid(unsafe_code)]
// They panic when nobody reads: see `say`.
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

use std::process::ExitCode;

use clap::Parser;

mod args;
mod demo;
mod demo_hearing;
mod demo_interpreter;
mod demo_ksm;
mod demo_store;
mod demo_worker;
mod doctor;
mod eval;
mod eval_html;
mod eval_model;
mod eval_table;
mod ksm_report;
mod ksm_run;
mod later;
#[cfg(test)]
mod man;
mod run;
mod say;
mod start;
mod store_report;
mod store_run;
mod summary_file;
mod watch;

/// Wrong usage.
const USAGE: u8 = 2;
/// Not permitted or not supported here.
const NOT_HERE: u8 = 3;

fn main() -> ExitCode {
    kernel::signals::keep_ended_children();
    let words: Vec<_> = std::env::args_os().collect();
    // The hidden ways in: this binary is its own guardian and its own demonstration worker.
    if let Some(word) = words.get(1).and_then(|word| word.to_str()) {
        let rest = &words[2..];
        let hidden = match word {
            ksm_run::GUARDIAN => Some(ksm_run::guardian_main(rest)),
            store_run::GUARDIAN => Some(store_run::guardian_main(rest)),
            demo_store::WORKER => Some(demo_store::worker_main(rest)),
            _ => None,
        };
        if let Some(result) = hidden {
            return finish(result);
        }
    }
    match args::Cli::try_parse_from(words) {
        Ok(cli) => finish(dispatch(cli.command)),
        Err(error) => {
            // Help and version go to stdout and are no failure.
            let code = if error.use_stderr() { USAGE } else { 0 };
            match error.print() {
                Err(unwritten) if code == 0 && unwritten.kind() != std::io::ErrorKind::BrokenPipe => {
                    finish(Err(anyhow::Error::new(unwritten).context("cannot write to stdout")))
                }
                _ => ExitCode::from(code),
            }
        }
    }
}

fn dispatch(command: args::Command) -> anyhow::Result<ExitCode> {
    let quiet = match &command {
        args::Command::Run(args) => args.quiet,
        args::Command::Demo(args) => args.json,
        _ => false,
    };
    put_right(quiet);
    match command {
        args::Command::Demo(args) => demo::demo(&args),
        args::Command::Run(args) => run::run(args),
        args::Command::Doctor(args) => doctor::doctor(&args),
        args::Command::Eval(args) => eval::eval(&args),
        other => Ok(later::say(other.name())),
    }
}

/// Gives the administrator's settings of KSM back that were left by a run that took its guardian with it, as the first
/// process of a PID namespace does.
fn put_right(quiet: bool) {
    // Whoever wants to change settings hears of errors, this one only of what was changed.
    if let Ok(repaired) = ksm::Lease::repair(&ksm::KsmSysfs::host())
        && !repaired.dead.is_empty()
        && !quiet
    {
        say::note(&repaired);
    }
}

fn finish(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        let missing = error.downcast_ref::<kernel::probe::Missing>().is_some();
        say::note(format_args!("{error:#}"));
        ExitCode::from(if missing { NOT_HERE } else { 1 })
    })
}
