//! `pagefold ksm set`: the administrator's changes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::process::ExitCode;

use ksm::set::{Set, SetError, before_at, set_at, unmerge_host_at, word};
use ksm::{Knob, KsmError, KsmSysfs, StatePath, Takes, Values};
use serde::Serialize;

use crate::args::ksm_set::SetArgs;
use crate::{NOT_HERE, USAGE, say};

/// Lists, or changes.
pub(crate) fn set(args: &SetArgs) -> anyhow::Result<ExitCode> {
    let (sysfs, path) = (KsmSysfs::host(), StatePath::for_this_user());
    if args.settings.is_empty() {
        if args.unmerge_host {
            say::note("--unmerge-host goes with run=2");
            return Ok(ExitCode::from(USAGE));
        }
        return list(&sysfs, &path, args.json);
    }
    let mut wish = Values::default();
    for (knob, value) in &args.settings {
        if wish.contains(*knob) {
            say::note(format_args!("{knob} is given twice"));
            return Ok(ExitCode::from(USAGE));
        }
        wish.set(*knob, *value);
    }
    let unmerges = wish.get(Knob::Run) == Some(2);
    if unmerges != args.unmerge_host || unmerges && args.settings.len() > 1 {
        say::note(
            "run=2 gives every user of every merged page of the whole host a copy of its own: it wants --unmerge-host, and \
             no other setting beside it",
        );
        return Ok(ExitCode::from(USAGE));
    }
    if unmerges {
        return unmerge(&sysfs, &path, args);
    }
    let done = match set_at(&path, &sysfs, &wish) {
        Ok(done) => done,
        Err(error) => return refused(error),
    };
    tell(&done, args.json)?;
    Ok(code(&done))
}

fn refused(error: SetError) -> anyhow::Result<ExitCode> {
    match error {
        SetError::Ksm(error) => not_here(error),
        error => {
            say::note(format_args!("nothing was changed: {error}"));
            Ok(ExitCode::from(if matches!(error, SetError::NotHere { .. }) { NOT_HERE } else { 1 }))
        }
    }
}

/// Says what is missing, if it is that.
pub(super) fn not_here(error: KsmError) -> anyhow::Result<ExitCode> {
    let way_out = match &error {
        KsmError::Missing { .. } => "it needs a kernel with CONFIG_KSM and a mounted /sys",
        KsmError::ReadOnly { .. } => "only root may, on the host and not in a container with a read-only /sys",
        _ => return Err(error.into()),
    };
    say::note(format_args!("{:#}; {way_out}", anyhow::Error::new(error)));
    Ok(ExitCode::from(NOT_HERE))
}

fn unmerge(sysfs: &KsmSysfs, path: &StatePath, args: &SetArgs) -> anyhow::Result<ExitCode> {
    let unmerged = match unmerge_host_at(path, sysfs, args.force) {
        Ok(unmerged) => unmerged,
        Err(error @ SetError::Unmerge { .. }) => return Err(error.into()),
        Err(error @ SetError::TooLittle { .. }) => {
            say::note(format_args!("nothing was changed: {error}; --force goes on all the same"));
            return Ok(ExitCode::FAILURE);
        }
        Err(error) => return refused(error),
    };
    let seconds = unmerged.time.as_secs_f64();
    if args.json {
        let document = serde_json::json!({ "pages_unmerged": unmerged.pages, "seconds": seconds });
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
    } else {
        say::answer(&format!(
            "{} pages unmerged in {seconds:.2} s; ksmd stands still, and full_scans begins again at 0\n",
            unmerged.pages
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// A failure if the kernel did not take something, or something was left.
pub(super) fn code(done: &Set) -> ExitCode {
    ExitCode::from(u8::from(!done.refused.is_empty() || !done.foreign.is_empty()))
}

/// What `--json` prints.
#[derive(Serialize)]
struct Document {
    changed: BTreeMap<&'static str, Changed>,
    waiting: BTreeMap<&'static str, Waits>,
    holders: Vec<i32>,
    left: BTreeMap<&'static str, Left>,
    refused: BTreeMap<&'static str, String>,
}

#[derive(Serialize)]
struct Changed {
    from: String,
    to: String,
}

#[derive(Serialize)]
struct Waits {
    wanted: String,
    in_force: String,
}

#[derive(Serialize)]
struct Left {
    ours: String,
    found: String,
}

/// What was done, and what was not.
pub(super) fn tell(done: &Set, json: bool) -> anyhow::Result<()> {
    for dead in &done.dead {
        say::note(format_args!("{} (pid {}) had died holding KSM's settings", dead.command, dead.process.pid));
    }
    let document = Document {
        changed: done
            .changed
            .iter()
            .map(|change| {
                let (from, to) = (word(change.knob, change.from), word(change.knob, change.to));
                (change.knob.file_name(), Changed { from, to })
            })
            .collect(),
        waiting: done
            .waiting
            .iter()
            .map(|waits| {
                let (wanted, in_force) = (word(waits.knob, waits.wanted), word(waits.knob, waits.in_force));
                (waits.knob.file_name(), Waits { wanted, in_force })
            })
            .collect(),
        holders: done.holders.iter().map(|holder| holder.process.pid).collect::<BTreeSet<_>>().into_iter().collect(),
        left: done
            .foreign
            .iter()
            .map(|foreign| {
                let (ours, found) = (word(foreign.knob, foreign.ours), word(foreign.knob, foreign.found));
                (foreign.knob.file_name(), Left { ours, found })
            })
            .collect(),
        refused: done.refused.iter().map(|refused| (refused.knob.file_name(), refused.to_string())).collect(),
    };
    if json {
        return say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?));
    }
    let mut text = String::new();
    for (name, change) in &document.changed {
        writeln!(text, "{name} {} -> {}", change.from, change.to)?;
    }
    let who: Vec<_> =
        done.holders.iter().map(|holder| format!("{} ({})", holder.command, holder.process.pid)).collect();
    for (name, waits) in &document.waiting {
        writeln!(text, "{name} will be {} when {} ends; until then {}", waits.wanted, who.join(", "), waits.in_force)?;
    }
    for (name, left) in &document.left {
        writeln!(text, "{name} left at {}: somebody wrote it after {} (--force overwrites)", left.found, left.ours)?;
    }
    for reason in document.refused.values() {
        say::note(reason);
    }
    if text.is_empty() && done.refused.is_empty() {
        text.push_str("nothing to change\n");
    }
    say::answer(&text)
}

#[derive(Serialize)]
struct Listed {
    value: String,
    /// What `ksm restore` would put back.
    before: Option<String>,
    unit: &'static str,
    takes: String,
    meaning: &'static str,
}

/// All settings, with what they take.
fn list(sysfs: &KsmSysfs, path: &StatePath, json: bool) -> anyhow::Result<ExitCode> {
    if !sysfs.exists() {
        return not_here(KsmError::Missing { path: sysfs.root().to_owned() });
    }
    let before = before_at(path)?;
    let mut listed = BTreeMap::new();
    for knob in Knob::ALL {
        let Some(value) = sysfs.knob(knob.file_name())? else { continue };
        let about = knob.about();
        let takes = match about.takes {
            Takes::Number { least, most } => format!("{least} to {most}"),
            Takes::Switch => "0 or 1".to_owned(),
            Takes::Word(words) => words.join(" or "),
        };
        let before = before.get(knob).map(|value| word(knob, value));
        listed.insert(knob.file_name(), Listed { value, before, unit: about.unit, takes, meaning: about.meaning });
    }
    if json {
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&listed)?))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    writeln!(text, "{:34} {:>10} {:>10} {:10} {:17} meaning", "setting", "value", "before", "unit", "takes")?;
    for (name, one) in &listed {
        let before = one.before.as_deref().unwrap_or("");
        writeln!(text, "{name:34} {:>10} {before:>10} {:10} {:17} {}", one.value, one.unit, one.takes, one.meaning)?;
    }
    say::answer(&text)?;
    Ok(ExitCode::SUCCESS)
}
