//! The man page, made from the same definitions that `--help` prints.
//!
//! `man/pagefold.1` is a golden file: the test below fails when it no longer says what the arguments say, and writes it
//! anew when it is run with `BLESS=1`.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use clap::{Command, CommandFactory as _};
use clap_mangen::Man;

use crate::args::Cli;

const PAGE: &str = "man/pagefold.1";

/// What the arguments do not say. Troff, one section each.
const SECTIONS: &str = r#".SH "EXIT STATUS"
.TP
\fB0\fR
Done.
.TP
\fB1\fR
Failed, a digest was not what it must be (\fBdemo\fR), or there was no process to look at (\fBdoctor\fR).
.TP
\fB2\fR
Wrong usage.
.TP
\fB3\fR
Not permitted or not supported here, or a command that is not built yet. The message names the missing thing and how to get it.
.PP
\fBrun\fR ends as the command ended: with its status, or by the signal that killed it. Its own failures are those of \fBenv\fR(1): 125 if \fBpagefold\fR itself failed, 126 if the command cannot be executed, 127 if there is no such command. A command that cannot be managed is no failure: it runs unmerged.
.SH SIGNALS
\fBrun\fR passes every signal that it can take on to the command when another process sent it, but SIGUSR1, which prints the state on standard error, SIGCHLD, and the stop signals of job control. Those of the terminal reach the command by themselves.
.SH ENVIRONMENT
.TP
\fBLD_PRELOAD\fR
The store backend puts its agent in front of what is there already.
.TP
\fBPAGEFOLD_AGENT\fR
Set for the command by the store backend: where its processes find the broker.
.TP
\fBPAGEFOLD_LAYOUT_STACK\fR, \fBPAGEFOLD_STACK_SOFT\fR
Set for the command by \fB\-\-layout shared\fR: the partition's layout, and the caller's own stack limit.
.TP
\fBXDG_RUNTIME_DIR\fR, \fBTMPDIR\fR
Where the agent's files are put while a command runs, before /run and /tmp.
.SH FILES
.TP
\fI/run/pagefold/ksm\-lease.json\fR
Who uses KSM's settings, and the administrator's own values; there only while somebody does. For a user other than root it lies below \fBXDG_RUNTIME_DIR\fR.
.SH "SEE ALSO"
\fBmadvise\fR(2), \fBuserfaultfd\fR(2), \fBmemfd_create\fR(2), \fBPR_SET_MEMORY_MERGE\fR(2const), \fBenv\fR(1)
"#;

fn page() -> String {
    let command = Cli::command();
    let mut out = Vec::new();
    let main = Man::new(command.clone()).section("1").manual("User Commands").source("pagefold");
    main.render_title(&mut out).unwrap();
    let mut text = String::from_utf8(out).unwrap();
    let about = about(&command);
    let (what, how) = about.split_once(": ").unwrap();
    text.push_str(&format!(".SH NAME\npagefold \\- {}\n", what.to_lowercase()));
    text.push_str(".SH SYNOPSIS\n\\fBpagefold\\fR \\fICOMMAND\\fR [\\fIOPTION\\fR]...\n");
    text.push_str(&format!(".SH DESCRIPTION\n{what}, {how}.\n.SH COMMANDS\n"));
    let (built, later): (Vec<&Command>, Vec<&Command>) =
        command.get_subcommands().partition(|sub| !self::about(sub).ends_with("(not built yet)"));
    for sub in built {
        text.push_str(&section(sub));
    }
    text.push_str(".SS \"Not built yet\"\nThe names are settled; each says so and ends with status 3.\n");
    for sub in later {
        let about = self::about(sub);
        text.push_str(&format!(".TP\n\\fB{}\\fR\n{}.\n", sub.get_name(), about.trim_end_matches(" (not built yet)")));
    }
    text.push_str(SECTIONS);
    text
}

fn about(command: &Command) -> String {
    command.get_about().map(ToString::to_string).unwrap_or_default().trim_end_matches('.').to_owned()
}

/// What a subcommand does, its usage and its options.
fn section(command: &Command) -> String {
    let name = command.get_name();
    let mut options = Vec::new();
    Man::new(command.clone()).render_options_section(&mut options).unwrap();
    let options = String::from_utf8(options).unwrap();
    // The heading, the line breaks around possible values and what every page begins with.
    let noise = |line: &&str| !line.starts_with(".ie") && !line.starts_with(".el") && *line != ".SH OPTIONS";
    let options: Vec<&str> = options.lines().filter(noise).collect();
    let usage = command.clone().bin_name(format!("pagefold {name}")).render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ").replace('-', "\\-");
    format!(".SS \"pagefold {name}\"\n{}.\n.PP\n.nf\n\\fB{usage}\\fR\n.fi\n{}\n", about(command), options.join("\n"))
}

#[test]
fn the_page_says_what_the_arguments_say() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(PAGE);
    let page = page();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &page).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == page, "{} is out of date: run `BLESS=1 cargo test -p pagefold-cli man::`", path.display());
}

/// Names that a document must explain, as `name` in backquotes.
fn all_explained(document: &str, names: impl IntoIterator<Item = String>) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(document);
    let text = std::fs::read_to_string(&path).unwrap();
    let missing: Vec<String> = names.into_iter().filter(|name| !text.contains(&format!("`{name}"))).collect();
    assert!(missing.is_empty(), "docs/{document} does not explain {missing:?}");
}

#[test]
fn the_documents_explain_every_option_field_and_reason() {
    let command = Cli::command();
    let run = command.find_subcommand("run").unwrap();
    let options = run.get_opts().chain(run.get_positionals()).filter_map(clap::Arg::get_long);
    all_explained("run.md", options.map(|long| format!("--{long}")));
    let fields = serde_json::to_value(broker::Summary::default()).unwrap();
    all_explained("run.md", fields.as_object().unwrap().keys().cloned());
    all_explained("run.md", abi::place::Outcome::REFUSALS.map(|(_, word)| word.to_owned()));
}

#[test]
fn every_cause_that_the_doctor_knows_is_in_the_document() {
    all_explained("doctor.md", eval::doctor::Code::ALL.iter().map(|code| format!("{}`", code.word())));
}

#[test]
fn the_document_on_eval_explains_every_option_and_field() {
    let command = Cli::command();
    let eval = command.find_subcommand("eval").unwrap();
    all_explained("evaluate.md", eval.get_opts().filter_map(clap::Arg::get_long).map(|long| format!("--{long}")));
    let options = eval::Options {
        selection: eval::Selection { pids: vec![kernel::Pid::this()], ..eval::Selection::default() },
        ..eval::Options::default()
    };
    let report = serde_json::to_value(eval::evaluate(&options, &|_| {}).unwrap()).unwrap();
    all_explained("evaluate.md", report.as_object().unwrap().keys().cloned());
}

#[test]
fn every_feature_of_the_probe_is_in_the_document() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/kernels.md");
    let text = std::fs::read_to_string(&path).unwrap();
    for feature in kernel::probe::Features::probe().list() {
        let name = feature.name.text();
        assert!(text.contains(name), "docs/kernels.md does not mention {name}");
    }
}
