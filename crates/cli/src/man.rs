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
With \fB\-\-json\fR, a command that fails before it has anything to print prints a document with the field \fBerror\fR: what it also says on standard error.
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
Who uses KSM's settings, and the administrator's own values; there only while somebody does.
.TP
\fI/run/pagefold/ksm\-set.json\fR
The settings that \fBksm set\fR has replaced, for \fBksm restore\fR.
.TP
\fI/run/pagefold/ksm\-rules.json\fR
What \fBksm rules apply\fR has enabled, and what others have disabled since, for the next call and for \fBksm rules undo\fR.
.PP
They hold until the next boot. Those of a user other than root lie below \fBXDG_RUNTIME_DIR\fR.
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
    let mut later = Vec::new();
    for sub in command.get_subcommands() {
        sections("", sub, &mut text, &mut later);
    }
    text.push_str(".SS \"Not built yet\"\nThe names are settled; each says so and ends with status 3.\n");
    for (name, about) in later {
        text.push_str(&format!(".TP\n\\fB{name}\\fR\n{}.\n", about.trim_end_matches(NOT_BUILT)));
    }
    text.push_str(SECTIONS);
    text
}

fn about(command: &Command) -> String {
    command.get_about().map(ToString::to_string).unwrap_or_default().trim_end_matches('.').to_owned()
}

/// How a command that is not built yet ends what it says of itself.
const NOT_BUILT: &str = " (not built yet)";

/// The section of a subcommand and those of its own subcommands, or its name for the list of those to come.
fn sections(above: &str, command: &Command, text: &mut String, later: &mut Vec<(String, String)>) {
    let name = format!("{above}{}", command.get_name());
    let about = about(command);
    if about.ends_with(NOT_BUILT) {
        later.push((name, about));
        return;
    }
    let mut own = command.get_subcommands().peekable();
    if own.peek().is_none() {
        text.push_str(&section(&name, command));
    }
    for sub in own {
        sections(&format!("{name} "), sub, text, later);
    }
}

/// What a subcommand does, its usage and its options.
fn section(name: &str, command: &Command) -> String {
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
fn the_document_on_programs_explains_the_options_words_and_keys() {
    use proof::{Engine, Judgement, Object, Report, Verdict};
    let command = Cli::command();
    let options = command.find_subcommand("doctor").unwrap().get_opts().filter_map(clap::Arg::get_long);
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/programs.md")).unwrap();
    for option in options.filter(|option| *option != "pid") {
        assert!(text.contains(&format!("--{option}")), "--{option}");
    }
    let verdicts = [Verdict::Clean, Verdict::Benign, Verdict::Known, Verdict::Unknown, Verdict::Dangerous];
    all_explained("programs.md", verdicts.map(|verdict| format!("{}`", verdict.word())));
    let object = Object {
        path: "/".into(),
        build_id: None,
        code_bytes: 0,
        judgement: Judgement::default(),
        engine: Some(Engine { name: String::new(), why: None }),
    };
    let report = Report { verdict: Verdict::Clean, objects: vec![object.clone()], code_bytes: 0, decoded: 0 };
    for document in [
        serde_json::to_value(&object.engine).unwrap(),
        serde_json::to_value(object).unwrap(),
        serde_json::to_value(report).unwrap(),
    ] {
        all_explained("programs.md", document.as_object().unwrap().keys().map(|key| format!("{key}`")));
    }
    let others = ["pid`", "file`", "proven`", "advice`", "trust_lines`"].map(str::to_owned);
    all_explained("programs.md", others);
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
fn the_document_on_ksm_explains_every_option_and_field() {
    let command = Cli::command();
    let ksm = command.find_subcommand("ksm").unwrap();
    for name in ["status", "set", "restore", "trace"] {
        let options = ksm.find_subcommand(name).unwrap().get_opts().filter_map(clap::Arg::get_long);
        all_explained("ksm-status.md", options.map(|long| format!("--{long}")));
    }
    let report = serde_json::to_value(ksm::trace::TraceReport::default()).unwrap();
    all_explained("ksm-status.md", report.as_object().unwrap().keys().cloned());
    let (sysfs, path) = (ksm::KsmSysfs::host(), ksm::StatePath::at("/nonexistent/state"));
    if sysfs.exists() {
        let status = ksm::status::Status::look(&sysfs, &path, &ksm::status::Request::default(), None).unwrap();
        let status = serde_json::to_value(status).unwrap();
        for object in [&status, &status["host"], &status["host"]["counters"]] {
            all_explained("ksm-status.md", object.as_object().unwrap().keys().cloned());
        }
    }
}

#[test]
fn the_document_on_enable_explains_every_option_field_and_reason() {
    let command = Cli::command();
    let ksm = command.find_subcommand("ksm").unwrap();
    for sub in [command.find_subcommand("enable"), command.find_subcommand("disable"), ksm.find_subcommand("unit")] {
        let options = sub.unwrap().get_opts().filter_map(clap::Arg::get_long);
        all_explained("enable.md", options.map(|long| format!("--{long}")));
    }
    let goal = ksm::enable::Goal::enable();
    let never = |_| None;
    let rules = ksm::enable::Rules {
        goal: &goal,
        force: false,
        timeout: std::time::Duration::from_secs(1),
        stop: &|| false,
        never: &never,
    };
    let own = ksm::enable::apply(ksm::ProcessId::current().unwrap(), &rules);
    let own = serde_json::to_value(own).unwrap();
    // What every process has is not explained.
    let fields = own.as_object().unwrap().keys().filter(|key| !["pid", "start_time", "comm"].contains(&key.as_str()));
    all_explained("enable.md", fields.cloned());
    all_explained("enable.md", [format!("{}`", own["reason"].as_str().unwrap())]);
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

#[test]
fn the_document_on_advise_explains_every_option() {
    let command = Cli::command();
    let advise = command.find_subcommand("ksm").and_then(|ksm| ksm.find_subcommand("advise")).unwrap();
    all_explained("ksm-advise.md", advise.get_opts().filter_map(clap::Arg::get_long).map(|long| format!("--{long}")));
}

#[test]
fn the_document_on_sweep_explains_every_option() {
    let command = Cli::command();
    let sweep = command.find_subcommand("ksm").and_then(|ksm| ksm.find_subcommand("sweep")).unwrap();
    let options = sweep.get_opts().filter_map(clap::Arg::get_long);
    all_explained("ksm-sweep.md", options.map(|long| format!("--{long}")));
}

#[test]
fn the_document_on_merging_explains_every_option_field_and_reason() {
    use ksm::request::{ProcessReport, Refusal, Report, UnmergeReport, UnmergedProcess};
    let command = Cli::command();
    for name in ["merge", "unmerge"] {
        let options = command.find_subcommand(name).unwrap().get_opts().filter_map(clap::Arg::get_long);
        all_explained("merge.md", options.map(|long| format!("--{long}")));
    }
    for document in [
        serde_json::to_value(Report::default()),
        serde_json::to_value(ProcessReport::default()),
        serde_json::to_value(UnmergeReport::default()),
        serde_json::to_value(UnmergedProcess::default()),
    ] {
        all_explained("merge.md", document.unwrap().as_object().unwrap().keys().cloned());
    }
    all_explained("merge.md", Refusal::ALL.map(|refusal| refusal.word().to_owned()));
}

#[test]
fn the_document_on_rules_explains_every_command_option_key_and_word() {
    let command = Cli::command();
    let commands = command.find_subcommand("ksm").and_then(|ksm| ksm.find_subcommand("rules")).unwrap();
    for sub in commands.get_subcommands() {
        all_explained("ksm-rules.md", [sub.get_name().to_owned()]);
        all_explained("ksm-rules.md", sub.get_opts().filter_map(clap::Arg::get_long).map(|long| format!("--{long}")));
    }
    for (_, keys) in rules::KEYS {
        all_explained("ksm-rules.md", keys.iter().map(|key| format!("{key}`")));
    }
    // The example is right, and the defaults that the document tells are those.
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
    let example = std::fs::read_to_string(folder.join("examples/rules.toml")).unwrap();
    assert_eq!(rules::Rules::parse(&example).unwrap().rules.len(), 6);
    let text = std::fs::read_to_string(folder.join("ksm-rules.md")).unwrap();
    let usual = rules::Rules { profit: rules::ProfitRules::default(), ..rules::Rules::default() };
    for (key, value) in [("passes", "16"), ("loss", "64KiB"), ("retry", "10m"), ("retry_most", "1d")] {
        assert!(text.contains(&format!("| `{key}` | {value} |")), "{key}");
        let number = value.parse::<u64>().map_or_else(|_| format!("\"{value}\""), |number| number.to_string());
        let file = format!("version = 1\n[profit]\n{key} = {number}\n");
        assert_eq!(rules::Rules::parse(&file).unwrap(), usual, "{key}");
    }
    // The small file of the document.
    let small = text.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    assert_eq!(rules::Rules::parse(small).unwrap().rules.len(), 1);
}
