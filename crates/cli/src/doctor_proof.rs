//! `pagefold doctor --proof`: may a gate in libc and the loader be complete for a program?

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kernel::Pid;
use kernel::procfs::ProcError;
use proof::{Cache, Object, ProgramError, Progress, ProofError, Prover, Report, Verdict};
use serde::Serialize;

use crate::args::DoctorArgs;
use crate::whole::lists;
use crate::{NOT_HERE, say};

/// So many reasons are told of one object; `--json` has all.
const REASONS: usize = 5;

/// What is judged.
#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Subject {
    Pid(i32),
    File(PathBuf),
}

/// What `--json` prints.
#[derive(Serialize)]
struct Document<'a> {
    #[serde(flatten)]
    subject: &'a Subject,
    /// The gate may be complete.
    proven: bool,
    #[serde(flatten)]
    report: &'a Report,
    /// What to do, in a sentence.
    advice: String,
    /// Lines of a trust file that would allow what was refused.
    trust_lines: Vec<&'a str>,
}

/// Prints the verdict on a process or a file.
pub(crate) fn proof(word: &str, args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let lists = lists(args.trust.as_deref())?;
    let cache = Cache::of_user().map_err(|error| {
        say::note(format_args!("nothing is kept for the next time: {:#}", anyhow::Error::new(error)));
    });
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{pos}/{len} {wide_msg}") {
        bar.set_style(style);
    }
    let mut progress = |seen: Progress<'_>| {
        bar.set_length(seen.all as u64);
        bar.set_position(seen.done as u64);
        bar.set_message(plain(seen.path));
    };
    let mut prover = Prover::new(&lists, cache.as_ref().ok(), &mut progress);
    let judged = judge(word, &mut prover);
    bar.finish_and_clear();
    let (subject, report) = match judged {
        Ok(judged) => judged,
        Err(error) => {
            let refused = is_refusal(&error);
            say::note(format_args!("{error:#}"));
            return Ok(ExitCode::from(if refused { NOT_HERE } else { 1 }));
        }
    };
    if args.json {
        let document = Document {
            subject: &subject,
            proven: report.verdict.is_proven(),
            report: &report,
            advice: advice(&subject, &report),
            trust_lines: trust_lines(&report),
        };
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
    } else {
        say::answer(&table(&subject, &report)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A number is a process; anything else is a file, or a command along PATH.
fn judge(word: &str, prover: &mut Prover<'_>) -> anyhow::Result<(Subject, Report)> {
    if let Ok(pid) = word.parse::<i32>()
        && pid > 0
    {
        let report = prover.judge_process(Pid(pid)).with_context(|| format!("cannot look at process {pid}"))?;
        if report.objects.is_empty() {
            anyhow::bail!("process {pid} has no code of its own: it has ended, or is a thread of the kernel");
        }
        return Ok((Subject::Pid(pid), report));
    }
    let path = program(word)?;
    let report = prover.judge_file(&path).with_context(|| format!("cannot look at {}", path.display()))?;
    Ok((Subject::File(path), report))
}

/// The ELF file that a word stands for: itself, the command of that name, or the interpreter of a script.
fn program(word: &str) -> Result<PathBuf, ProgramError> {
    let path = Path::new(word);
    // Libraries and modules need not be executable, nor on any path.
    let mut head = [0_u8; 4];
    let is_image = path.is_file()
        && std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut head)).is_ok()
        && head == *b"\x7fELF";
    if is_image { Ok(path.to_owned()) } else { proof::resolve_program(path).map(|program| program.elf_path) }
}

/// Does it fail for want of a right?
fn is_refusal(error: &anyhow::Error) -> bool {
    let denied = |error: &std::io::Error| error.kind() == std::io::ErrorKind::PermissionDenied;
    error.chain().any(|cause| {
        matches!(cause.downcast_ref(), Some(ProcError::Denied { .. }))
            || matches!(cause.downcast_ref(), Some(ProgramError::Read { source, .. }) if denied(source))
            || matches!(cause.downcast_ref(), Some(ProofError::Read(source)) if denied(source))
    })
}

fn table(subject: &Subject, report: &Report) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    let of = match subject {
        Subject::Pid(pid) => format!("process {pid}"),
        Subject::File(path) => plain(path),
    };
    #[expect(clippy::cast_precision_loss, reason = "megabytes for people")]
    let megabytes = report.code_bytes as f64 / 1e6;
    let count = report.objects.len();
    let decoded = match report.decoded {
        0 => "all known from before".to_owned(),
        decoded => format!("{decoded} decoded now"),
    };
    writeln!(text, "{:9}  {of}: {count} objects, {megabytes:.1} MB of code, {decoded}\n", report.verdict.word())?;
    for object in &report.objects {
        let judged = &object.judgement;
        writeln!(text, "  {:9}  {}", judged.verdict.word(), plain(&object.path))?;
        for reason in judged.reasons.iter().take(REASONS) {
            writeln!(text, "  {:9}    {}", "", reason.replace('\n', " "))?;
        }
        if judged.reasons.len() > REASONS {
            writeln!(text, "  {:9}    and {} more", "", judged.reasons.len() - REASONS)?;
        }
        if let Some(engine) = &object.engine {
            let why = engine.why.as_deref().unwrap_or("this build is on no list");
            writeln!(text, "  {:9}    {} compiles while it runs. {}", "", engine.name, why.replace('\n', " "))?;
        }
    }
    writeln!(text, "\n  -> {}", advice(subject, report))?;
    let lines = trust_lines(report);
    if !lines.is_empty() {
        writeln!(text, "     What you have reviewed is allowed by its line in a file for --trust:")?;
        lines.iter().try_for_each(|line| writeln!(text, "     {line}"))?;
    }
    Ok(text)
}

/// One sentence.
fn advice(subject: &Subject, report: &Report) -> String {
    let spoilers: Vec<&Object> = report.objects.iter().filter(|object| !object.judgement.verdict.is_proven()).collect();
    if let [first, others @ ..] = spoilers.as_slice() {
        let more = if others.is_empty() { String::new() } else { format!(" and {} more", others.len()) };
        return format!(
            "not provable for {}{more}: merge ranges that the program hands over (run --scope marked), or with --backend ksm",
            plain(&first.path)
        );
    }
    match subject {
        Subject::Pid(_) => "every call that changes mappings passes a gate in libc and the loader".to_owned(),
        Subject::File(_) if report.objects.iter().any(|object| object.engine.is_some()) => {
            "a gate can be complete; modules that it opens and code that it compiles are judged by its PID".to_owned()
        }
        Subject::File(_) => {
            "a gate can be complete; modules that it opens while it runs are judged by its PID".to_owned()
        }
    }
}

fn trust_lines(report: &Report) -> Vec<&str> {
    let refused = report.objects.iter().filter(|object| object.judgement.verdict >= Verdict::Unknown);
    let mut lines: Vec<&str> = refused.filter_map(|object| object.judgement.trust_line.as_deref()).collect();
    lines.dedup();
    lines
}

/// A path for a terminal: names may hold anything but a slash.
fn plain(path: &Path) -> String {
    path.to_string_lossy().chars().map(|letter| if letter.is_control() { '?' } else { letter }).collect()
}
