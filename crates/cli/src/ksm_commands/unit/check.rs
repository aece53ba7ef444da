//! `pagefold ksm unit --check`: whether the processes of a unit are merged, and if not, why.

use std::fmt::Write as _;
use std::process::ExitCode;

use eval::printable;
use kernel::ksm_sysfs::ksm_stat;
use kernel::{Pid, membership, smaps, status};
use serde::Serialize;

use super::name::UnitName;
use super::systemd::{self, Properties};
use crate::{NOT_HERE, say};

/// One process of the unit.
#[derive(Debug, Serialize)]
struct Member {
    pid: i32,
    comm: String,
    /// How its switch stands; `None` if it may not be looked at.
    ksm_merge_any: Option<bool>,
}

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Document {
    unit: String,
    systemd_version: Option<u32>,
    active_state: Option<String>,
    /// What the manager says; `None` if it does not know the setting.
    memory_ksm: Option<bool>,
    need_daemon_reload: bool,
    control_group: Option<String>,
    processes: Vec<Member>,
    /// All of them have their switch on.
    merged: bool,
    /// Why not.
    causes: Vec<String>,
}

pub(super) fn check(unit: &UnitName, user: bool, json: bool) -> anyhow::Result<ExitCode> {
    let properties = match Properties::of(unit, user) {
        Ok(properties) => properties,
        Err(said) => {
            say::note(format_args!("cannot ask systemd about {unit}: {said}"));
            return Ok(ExitCode::from(NOT_HERE));
        }
    };
    let main = properties.get("MainPID").and_then(|pid| pid.parse().ok()).filter(|pid| *pid > 0);
    let control_group = properties.get("ControlGroup").filter(|group| !group.is_empty());
    let members = control_group.map(|group| membership::members_of(group.as_ref()).unwrap_or_default());
    let processes: Vec<Member> = members.unwrap_or_default().into_iter().filter_map(look).collect();
    let mut document = Document {
        unit: unit.to_string(),
        systemd_version: systemd::version(),
        active_state: properties.get("ActiveState").map(str::to_owned),
        memory_ksm: properties.get("MemoryKSM").map(|value| value == "yes"),
        need_daemon_reload: properties.get("NeedDaemonReload") == Some("yes"),
        control_group: control_group.map(str::to_owned),
        merged: !processes.is_empty() && processes.iter().all(|member| member.ksm_merge_any == Some(true)),
        processes,
        causes: Vec::new(),
    };
    document.causes = causes(&document, properties.get("LoadState"), main);
    if json {
        say::answer(&format!("{}\n", serde_json::to_string_pretty(&document)?))?;
    } else {
        say::answer(&table(&document)?)?;
    }
    let unseen = document.processes.iter().any(|member| member.ksm_merge_any.is_none());
    Ok(if document.merged { ExitCode::SUCCESS } else { ExitCode::from(if unseen { NOT_HERE } else { 1 }) })
}

/// `None` for a process that has ended.
fn look(pid: Pid) -> Option<Member> {
    let comm = printable(&status::read(pid).ok()?.name.to_string_lossy());
    let ksm_merge_any = match ksm_stat(pid) {
        Ok(stat) => stat.ksm_merge_any.or_else(|| all_marked(pid)),
        Err(error) if error.is_gone() => return None,
        Err(_) => None,
    };
    Some(Member { pid: pid.get(), comm, ksm_merge_any })
}

/// Before Linux 6.16 nothing shows the switch, but what it does: all private memory is marked, the stack apart, which an exec
/// makes unmarked.
fn all_marked(pid: Pid) -> Option<bool> {
    let vmas = smaps::read(pid).ok()?;
    let mut meant = vmas
        .iter()
        .filter(|entry| entry.flags.ksm_compatible() && !entry.vma.is_special() && entry.vma.name != "[stack]");
    Some(meant.all(|entry| entry.flags.mergeable()))
}

fn causes(document: &Document, load_state: Option<&str>, main: Option<i32>) -> Vec<String> {
    let unit = &document.unit;
    let mut causes = Vec::new();
    if load_state == Some("not-found") {
        return vec![format!("systemd knows no {unit}")];
    }
    if document.processes.is_empty() {
        let state = document.active_state.as_deref().unwrap_or("unknown");
        return vec![format!("it has no processes: its state is {state}")];
    }
    if document.merged {
        return causes;
    }
    if document.need_daemon_reload {
        causes.push(
            "its files have changed since systemd read them: systemctl daemon-reload, then restart it".to_owned(),
        );
    }
    match (document.memory_ksm, document.systemd_version) {
        (None, Some(version)) if version < systemd::FIRST => causes.push(format!(
            "systemd {version} has no MemoryKSM= (that came with {}): pagefold ksm unit --older {unit}",
            systemd::FIRST
        )),
        (None, _) => causes.push("this systemd does not know MemoryKSM=".to_owned()),
        (Some(false), _) => causes.push(format!("MemoryKSM= is not set for it: pagefold ksm unit {unit} prints how")),
        (Some(true), _) => {}
    }
    if document.processes.iter().any(|member| member.ksm_merge_any.is_none()) {
        causes.push("some of its processes may not be looked at by this user: sudo".to_owned());
    }
    let off: Vec<i32> = document
        .processes
        .iter()
        .filter(|member| member.ksm_merge_any == Some(false))
        .map(|member| member.pid)
        .collect();
    if document.memory_ksm == Some(true) && !off.is_empty() {
        causes.push(if main.is_some_and(|main| off.contains(&main)) {
            "it was started before the setting was there: restart it".to_owned()
        } else {
            format!("process {} turned it off itself, or came into the unit from elsewhere", off[0])
        });
    }
    causes
}

fn table(document: &Document) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    for member in &document.processes {
        let word = match member.ksm_merge_any {
            Some(true) => "merged",
            Some(false) => "not merged",
            None => "not permitted to look",
        };
        writeln!(text, "{:>8}  {:16} {word}", member.pid, member.comm)?;
    }
    if document.merged {
        writeln!(text, "{}: all {} processes are marked for ksmd", document.unit, document.processes.len())?;
    }
    for cause in &document.causes {
        writeln!(text, "{}: {cause}", document.unit)?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(memory_ksm: Option<bool>, version: u32, on: &[bool]) -> Document {
        let member = |(index, on): (usize, &bool)| Member {
            pid: i32::try_from(index).unwrap_or(0) + 10,
            comm: String::new(),
            ksm_merge_any: Some(*on),
        };
        Document {
            unit: "x.service".to_owned(),
            systemd_version: Some(version),
            active_state: Some("active".to_owned()),
            memory_ksm,
            need_daemon_reload: false,
            control_group: None,
            processes: on.iter().enumerate().map(member).collect(),
            merged: !on.is_empty() && on.iter().all(|on| *on),
            causes: Vec::new(),
        }
    }

    #[test]
    fn each_cause_is_named() {
        let first = |document: &Document, main| causes(document, Some("loaded"), main).join("; ");
        assert!(first(&document(None, 252, &[false]), Some(10)).contains("systemd 252 has no MemoryKSM="));
        assert!(first(&document(Some(false), 257, &[false]), Some(10)).contains("is not set"));
        assert!(first(&document(Some(true), 257, &[false, true]), Some(10)).contains("restart it"));
        assert!(first(&document(Some(true), 257, &[true, false]), Some(10)).contains("process 11 turned it off"));
        assert!(first(&document(Some(true), 257, &[]), None).contains("no processes"));
        assert_eq!(first(&document(Some(true), 257, &[true, true]), Some(10)), "");
        let changed = Document { need_daemon_reload: true, ..document(Some(false), 257, &[false]) };
        assert!(first(&changed, None).contains("daemon-reload"));
        assert_eq!(causes(&document(None, 257, &[]), Some("not-found"), None), ["systemd knows no x.service"]);
    }
}
