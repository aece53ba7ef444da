//! The pagefold command: words, tables, progress, JSON.
#![forbid(unsafe_code)]
// They panic when nobody reads: see `say`.
#![cfg_attr(not(test), deny(clippy::print_stderr, clippy::print_stdout))]

use std::process::ExitCode;

use clap::{ArgMatches, CommandFactory as _, FromArgMatches as _};

mod agent_told;
mod args;
mod demo;
mod demo_fleet;
mod demo_hearing;
mod demo_interpreter;
mod demo_ksm;
mod demo_store;
mod demo_whole;
mod demo_worker;
mod doctor;
mod doctor_proof;
mod doctor_whole;
mod enable;
mod enable_table;
mod eval;
mod eval_html;
mod eval_model;
mod eval_table;
mod guarded;
mod ksm_commands;
mod ksm_report;
mod ksm_run;
mod later;
#[cfg(test)]
mod man;
mod merge;
mod outsiders;
mod run;
mod say;
mod start;
mod store_report;
mod store_run;
mod summary_file;
mod text_file;
mod watch;
mod whole;

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
            guarded::GUARDIAN => Some(guarded::guardian_main(rest)),
            store_run::GUARDIAN => Some(store_run::guardian_main(rest)),
            demo_store::WORKER => Some(demo_store::worker_main(rest)),
            ksm_commands::unit::survival::WORD => Some(ksm_commands::unit::survival::switch_main(rest)),
            _ => None,
        };
        if let Some(result) = hidden {
            return finish(result);
        }
    }
    let parsed = args::Cli::command().try_get_matches_from(words).and_then(|matches| {
        let command = args::Cli::from_arg_matches(&matches)?.command;
        Ok((command, wants_json(&matches)))
    });
    match parsed {
        Ok((command, json)) => {
            let code = finish(dispatch(command));
            if json && code != ExitCode::SUCCESS {
                say::failure();
            }
            code
        }
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

/// Whether the command was asked for a document.
fn wants_json(matches: &ArgMatches) -> bool {
    let here = matches.try_get_one::<bool>("json").is_ok_and(|flag| flag == Some(&true));
    here || matches.subcommand().is_some_and(|(_, inner)| wants_json(inner))
}

fn dispatch(command: args::Command) -> anyhow::Result<ExitCode> {
    let quiet = match &command {
        args::Command::Run(args) => args.quiet,
        args::Command::Demo(args) => args.json,
        _ => false,
    };
    if !quiet {
        ksm::tell_waits(|waits| say::meanwhile(waits));
    }
    put_right(quiet);
    match command {
        args::Command::Demo(args) => demo::demo(&args),
        args::Command::Run(args) => run::run(args),
        args::Command::Doctor(args) => doctor::doctor(&args),
        args::Command::Eval(args) => eval::eval(&args),
        args::Command::Enable(args) => enable::enable(&args),
        args::Command::Disable(args) => enable::disable(&args),
        args::Command::Merge(args) => merge::merge(&args),
        args::Command::Unmerge(args) => merge::unmerge(&args),
        args::Command::Ksm(args) => ksm_commands::ksm(args),
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
