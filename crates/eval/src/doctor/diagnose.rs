//! From facts to findings. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use kernel::Pid;

use super::finding::Findings;
use super::host::HostFacts;
use super::marked::ProgramLayout;
use super::process::Observed;
use super::words::{count, percent};
use super::{Code, Finding, Severity, Subject, diagnose_host, diagnose_process};

/// Passes after which what has no equal most likely will not get one: merging needs two looks at the same content, and
/// the third finds what came meanwhile.
pub(super) const SEVERAL_PASSES: u64 = 3;
/// Fewer equal pages than this percentage of those compared are few.
pub(super) const FEW_PERCENT: u64 = 10;

/// What stands in the way of merging, on the host and in the processes that were looked at. What blocks comes first, the
/// host before processes.
#[must_use]
pub fn diagnose(host: &HostFacts, processes: &[Observed]) -> Vec<Finding> {
    let mut out = Vec::new();
    let mut about_host = Findings::about(Subject::Host, &mut out);
    diagnose_host::all(host, &mut about_host);
    layouts(host, processes, &mut about_host);
    for process in processes {
        diagnose_process::all(process, host, &mut out);
    }
    out.sort_by_key(|finding| finding.severity);
    out
}

/// Whether processes of one program differ in where it lies: pages with pointers in them are then different.
fn layouts(host: &HostFacts, processes: &[Observed], findings: &mut Findings<'_>) {
    let mut programs: BTreeMap<&Path, BTreeMap<Pid, &ProgramLayout>> = BTreeMap::new();
    let marked = host.fleet.marked.iter().filter_map(|marked| Some((marked.pid, marked.layout.as_ref()?)));
    let asked = processes.iter().filter_map(Observed::facts).map(|facts| (facts.pid, &facts.layout));
    for (pid, layout) in marked.chain(asked) {
        programs.entry(&layout.program).or_default().insert(pid, layout);
    }
    for (program, members) in programs {
        let layouts: BTreeSet<&ProgramLayout> = members.values().copied().collect();
        if layouts.len() < 2 {
            continue;
        }
        findings.add(
            Code::Layout,
            Severity::Hampers,
            format!(
                "{} processes of {} have {} address-space layouts: pages that hold pointers differ",
                members.len(),
                program.display(),
                layouts.len()
            ),
            "start them with `pagefold run --layout shared`, or fork them from one process; \
             `pagefold eval` tells what that would be worth",
        );
    }
}

/// Whether what was compared is equal: the same question for the host and for a process.
pub(super) fn equals(merged: u64, compared: u64, whose: &str, findings: &mut Findings<'_>) {
    const REMEDY: &str = "`pagefold eval` tells what is equal, and what would be but for pointers or hash seeds";
    if compared == 0 {
        return;
    }
    let pages = count(compared, "page", "pages");
    if merged == 0 {
        let cause = format!("nothing is equal: ksmd has been over {pages} {whose} several times and merged none");
        findings.add(Code::NothingEqual, Severity::Blocks, cause, REMEDY);
    } else if percent(merged, compared) < FEW_PERCENT {
        let share = percent(merged, compared);
        let cause =
            format!("little is equal: of {pages} {whose} that ksmd has been over, {merged} are merged ({share} %)");
        findings.add(Code::FewEqual, Severity::Hampers, cause, REMEDY);
    }
}
