//! `pagefold ksm unit`: a service whose processes are merged, by a drop-in of systemd.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use serde::Serialize;

use crate::args::ksm_unit::UnitArgs;
use crate::{NOT_HERE, say};

mod check;
mod name;
pub(crate) mod survival;
mod systemd;

pub(crate) use name::UnitName;

use survival::Survival;

/// How the drop-in's file is called.
const FILE: &str = "pagefold-ksm.conf";

/// What `--json` prints without `--check`.
#[derive(Serialize)]
struct Document<'a> {
    unit: &'a str,
    /// Where the file belongs.
    path: String,
    content: &'a str,
    systemd_version: Option<u32>,
    /// What is done: `MemoryKSM` by systemd itself, or `ExecStartPost` by this program.
    method: &'static str,
    /// What real children showed; absent if the kernel has no such switch.
    survives: Option<Survival>,
}

pub(crate) fn unit(args: &UnitArgs) -> anyhow::Result<ExitCode> {
    if args.check {
        return check::check(&args.name, args.user, args.json);
    }
    let version = systemd::version();
    let older = args.older || version.is_some_and(|version| version < systemd::FIRST);
    if older && args.name.section() != "Service" {
        say::note(format_args!("{}: systemd before {} can do this for services only", args.name, systemd::FIRST));
        return Ok(ExitCode::from(NOT_HERE));
    }
    let survives = Survival::try_it().context("cannot see whether the switch survives an exec")?;
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let content = if older { after_start(&program, args.user) } else { setting(args.name.section()) };
    let folder = if args.user { "~/.config/systemd/user" } else { "/etc/systemd/system" };
    let path = format!("{folder}/{}.d/{FILE}", args.name);
    if args.json {
        let document = Document {
            unit: args.name.as_str(),
            path,
            content: &content,
            systemd_version: version,
            method: if older { "ExecStartPost" } else { "MemoryKSM" },
            survives,
        };
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
        return Ok(status(survives, older));
    }
    say::answer(&content)?;
    say::lines(&advice(args, version, &path, older));
    say::note(told(survives));
    Ok(status(survives, older))
}

/// For systemd from 254 on: each process that it starts for the unit turns its switch before it executes the program.
fn setting(section: &str) -> String {
    format!(
        "# All memory of this unit's processes, and of what they start, may be merged by ksmd.\n\
         # systemd {first} or later; an older one says \"Unknown key 'MemoryKSM'\" and ignores it.\n\
         [{section}]\nMemoryKSM=yes\n",
        first = systemd::FIRST
    )
}

/// For an older one: this program enables the main process and what it has started by then, which is all, since what they
/// start later inherits it. A failure must not keep the service from starting.
fn after_start(program: &Path, user: bool) -> String {
    // Quoted as systemd.service(5) wants it; % and $ stand for something there.
    let quoted = program.display().to_string().replace('\\', "\\\\").replace('"', "\\\"");
    let quoted = quoted.replace('%', "%%").replace('$', "$$");
    // A user's manager has no more rights to give.
    let prefix = if user { "-" } else { "+-" };
    format!(
        "# All memory of this service's processes, and of what they start, may be merged by ksmd.\n\
         # For systemd before {first}, which has no MemoryKSM=. systemd sets MAINPID.\n\
         [Service]\nExecStartPost={prefix}\"{quoted}\" enable --quiet --children $MAINPID\n",
        first = systemd::FIRST
    )
}

/// Where the file belongs, and what comes then.
fn advice(args: &UnitArgs, version: Option<u32>, path: &str, older: bool) -> String {
    let (user, sudo) = if args.user { (" --user", "") } else { ("", "sudo ") };
    let (name, folder) = (&args.name, path.rsplit_once('/').map_or("", |(folder, _)| folder));
    let started = if name.is_template() { "each of its instances".to_owned() } else { name.to_string() };
    let flags = if args.older { " --older" } else { "" };
    let found = match version {
        Some(version) if older => format!("systemd here is {version}"),
        Some(version) => format!("systemd here is {version}, which has MemoryKSM="),
        None => format!("no systemd is installed here: where it is older than {}, use --older", systemd::FIRST),
    };
    format!(
        "{found}\nput it into {path}:\n  {sudo}mkdir -p '{folder}'\n  pagefold ksm unit{user}{flags} '{name}' 2>/dev/null | \
         {sudo}tee '{path}'\n  {sudo}systemctl{user} daemon-reload\nrestart {started}, and look with\n  \
         {sudo}pagefold ksm unit{user} --check '{name}'\nwhat runs now can be enabled without a restart: pagefold enable --cgroup\n"
    )
}

fn told(survives: Option<Survival>) -> String {
    match survives {
        None => "this kernel has no KSM for whole processes: that came with Linux 6.4".to_owned(),
        Some(Survival { exec: true, fork_and_exec: true }) => {
            "tried on this kernel: the switch of a process survives exec, and fork and exec".to_owned()
        }
        Some(_) => {
            "tried on this kernel: the switch of a process does NOT survive exec, which came with Linux 6.7, so the program \
             of a service would not be merged: use --older"
                .to_owned()
        }
    }
}

/// What systemd does before an exec is lost where the switch does not survive one.
fn status(survives: Option<Survival>, older: bool) -> ExitCode {
    match survives {
        Some(survival) if older || survival.exec => ExitCode::SUCCESS,
        _ => ExitCode::from(NOT_HERE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_quoted_for_systemd() {
        let text = after_start(Path::new("/opt/a b/50%/$x/\"pagefold\""), false);
        assert!(text.contains("ExecStartPost=+-\"/opt/a b/50%%/$$x/\\\"pagefold\\\"\" enable"), "{text}");
        assert!(after_start(Path::new("/p"), true).contains("ExecStartPost=-\"/p\" enable"));
    }
}
