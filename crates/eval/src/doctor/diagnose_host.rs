//! What stands in the way on the whole host.

use std::time::Duration;

use kernel::PageCount;

use super::diagnose::{SEVERAL_PASSES, equals};
use super::finding::Findings;
use super::host::{HostFacts, Writable};
use super::words::{count, percent, size, time};
use super::{Code, Severity};

use Severity::{Blocks, Hampers, Note};

/// pages_to_scan and sleep_millisecs as the kernel sets them at boot (mm/ksm.c): enough to show that it works.
const DEMONSTRATION: (u64, u64) = (100, 20);
/// A pass that takes longer is slow.
const SLOW_PASS: Duration = Duration::from_mins(10);
/// With the settings of the demonstration, a pass that takes longer matters.
const SHORT_PASS: Duration = Duration::from_mins(1);
/// Smart scan matters where it passes over more than this percentage.
const MOST_SKIPPED_PERCENT: u64 = 50;
/// What a record of a page takes (mm/ksm.c, `struct ksm_rmap_item`).
const RECORD_BYTES: u64 = 64;

pub(super) fn all(host: &HostFacts, findings: &mut Findings<'_>) {
    if !host.present {
        let hidden = if host.prctl { ", or something is mounted over its directory: its prctl is there" } else { "" };
        findings.add(
            Code::KsmMissing,
            Blocks,
            format!("KSM is not built into this kernel: there is no /sys/kernel/mm/ksm/run{hidden}"),
            "a kernel with CONFIG_KSM=y; in a container the host's /sys; or the page store: pagefold run -- CMD",
        );
        return;
    }
    switch(host, findings);
    rights(host, findings);
    rate(host, findings);
    advisor(host, findings);
    marks(host, findings);
    if host.settings.run == Some(1) {
        progress(host, findings);
    }
    results(host, findings);
    apart(host, findings);
}

fn switch(host: &HostFacts, findings: &mut Findings<'_>) {
    const REMEDY: &str = "echo 1 > /sys/kernel/mm/ksm/run, or pagefold run --backend ksm -- CMD";
    match host.settings.run {
        Some(0) => findings.add(Code::KsmOff, Blocks, "KSM is built in but switched off (run is 0)".into(), REMEDY),
        Some(2) => {
            let cause = "KSM is stopped and everything has been un-merged (run is 2)".to_owned();
            findings.add(Code::KsmUnmerging, Blocks, cause, REMEDY);
        }
        _ => {}
    }
}

fn rights(host: &HostFacts, findings: &mut Findings<'_>) {
    // What runs already needs nobody to switch it on.
    let severity = if host.settings.run == Some(1) { Note } else { Hampers };
    match host.writable {
        Writable::Yes => {}
        Writable::ReadOnly => findings.add(
            Code::ReadOnly,
            severity,
            "sysfs is mounted read-only here, as in a container: KSM's settings cannot be changed".into(),
            "change them on the host, or mount -o remount,rw /sys with CAP_SYS_ADMIN",
        ),
        Writable::NotPermitted => findings.add(
            Code::NotWritable,
            severity,
            "KSM's settings belong to root: this user cannot change them".into(),
            "run as root (CAP_DAC_OVERRIDE), or have the administrator set them",
        ),
    }
}

fn rate(host: &HostFacts, findings: &mut Findings<'_>) {
    let settings = &host.settings;
    let (Some(pages), Some(sleep)) = (settings.pages_to_scan, settings.sleep_millisecs) else { return };
    if pages == 0 {
        let cause = "pages_to_scan is 0: ksmd looks at nothing".to_owned();
        return findings.add(Code::ScanNothing, Blocks, cause, "echo 5000 > /sys/kernel/mm/ksm/pages_to_scan");
    }
    let default = (pages, sleep) == DEMONSTRATION;
    let pass = host.pass_time();
    let takes_over = |limit| pass.is_some_and(|pass| pass > limit);
    if !default && !takes_over(SLOW_PASS) {
        return;
    }
    let batch = format!("{} every {sleep} ms", count(pages, "page", "pages"));
    let speed = settings
        .most_pages_per_second()
        .map_or(String::new(), |rate| format!(", {} a second at most", size(PageCount(rate as u64).bytes())));
    let takes = pass.map_or(String::new(), |pass| {
        format!(": a pass over {} of marked memory takes about {}", size(host.pass().bytes()), time(pass))
    });
    let settings = if default { "ksmd's settings are those of a demonstration" } else { "ksmd is slow" };
    let severity = if takes_over(SHORT_PASS) { Hampers } else { Note };
    findings.add(
        Code::ScanRate,
        severity,
        format!("{settings} ({batch}{speed}){takes}"),
        "echo 5000 > /sys/kernel/mm/ksm/pages_to_scan, or echo scan-time > advisor_mode there, \
         or pagefold run --backend ksm -- CMD, which drives ksmd while it is of use",
    );
}

fn advisor(host: &HostFacts, findings: &mut Findings<'_>) {
    let settings = &host.settings;
    if !settings.is_advised() {
        return;
    }
    let target =
        settings.advisor_target_scan_time.map_or(String::new(), |seconds| format!(" for passes of {seconds} s"));
    let most = settings.advisor_max_pages_to_scan.map_or(String::new(), |most| format!(", {most} at most"));
    let now = settings.pages_to_scan.unwrap_or(0);
    findings.add(
        Code::Advisor,
        Note,
        format!(
            "the advisor sets pages_to_scan itself{target} (now {now}{most}): writing it fails, and what was written \
             before is gone"
        ),
        "echo none > /sys/kernel/mm/ksm/advisor_mode before writing pages_to_scan, or set advisor_target_scan_time",
    );
}

fn marks(host: &HostFacts, findings: &mut Findings<'_>) {
    const REMEDY: &str = "start programs with pagefold run --backend ksm -- CMD or MemoryKSM=yes of systemd; \
                          madvise(MADV_MERGEABLE) in the program; merge=on for the memory of QEMU";
    let fleet = &host.fleet;
    let nobody = fleet.marked.is_empty();
    if !fleet.told {
        let cause = "which processes have mergeable memory cannot be told: no /proc/PID/ksm_stat here, or the /proc of \
                     another PID namespace";
        findings.add(Code::MarksUnseen, Note, cause.into(), "Linux 6.1, and mount -t proc proc /proc");
    } else if fleet.refused > 0 && nobody {
        let processes = count(fleet.refused, "process", "processes");
        let cause = format!("{processes} of other users could not be looked at; no other has mergeable memory");
        findings.add(Code::MarksUnseen, Note, cause, "run as root (CAP_DAC_READ_SEARCH for ksm_stat, CAP_SYS_PTRACE)");
    } else if nobody && fleet.complete {
        let cause = "no process has mergeable memory: neither by madvise nor by prctl".to_owned();
        findings.add(Code::NothingMarked, Blocks, cause, REMEDY);
    } else if nobody && host.counters.full_scans.unwrap_or(0) > 0 {
        let cause = "no process has mergeable memory that ksmd would know of".to_owned();
        findings.add(Code::NothingMarked, Blocks, cause, REMEDY);
    }
}

/// What ksmd gets done.
fn progress(host: &HostFacts, findings: &mut Findings<'_>) {
    let marked = &host.fleet.marked;
    let passes = host.counters.full_scans.unwrap_or(0);
    let asleep = host.settings.sleep_millisecs.unwrap_or(0);
    if let Some(look) = host.look
        && look.scanned + look.skipped == 0
        && host.fleet.anonymous().get() > 0
        && host.settings.pages_to_scan != Some(0)
    {
        let watched = time(look.time);
        let (cause, remedy) = if u128::from(asleep) * 2 > look.time.as_millis() {
            let cause = format!("ksmd looked at no page in {watched}: it sleeps for {asleep} ms after each batch");
            (cause, "echo 20 > /sys/kernel/mm/ksm/sleep_millisecs, which wakes it too")
        } else {
            let cause = format!("KSM is on, but ksmd looked at no page in {watched}");
            (cause, "see whether ksmd gets processor time: its nice value, its cpuset, a frozen or stuck thread")
        };
        findings.add(Code::NotScanning, Hampers, cause, remedy);
    }
    if !marked.is_empty() && passes < 2 {
        let done = count(passes, "pass", "passes");
        let cause =
            format!("ksmd has completed {done} since KSM was last un-merged; merging takes two looks at a page");
        findings.add(Code::TooEarly, Hampers, cause, "wait, or let it go faster: a larger pages_to_scan");
    }
    if let Some(pass) = host.pass_time() {
        let two = pass.saturating_mul(2);
        let younger = marked.iter().filter(|marked| marked.age < two).count();
        if younger > 0 && younger * 2 >= marked.len() {
            let cause = format!(
                "a full pass takes about {}, and merging takes two: {younger} of {} marked processes are younger",
                time(pass),
                marked.len()
            );
            let remedy = "a larger pages_to_scan, so that passes are shorter than the processes live; \
                          or fork the processes from one that is merged";
            findings.add(Code::PassTooLong, Hampers, cause, remedy);
        }
    }
}

/// What came of it.
fn results(host: &HostFacts, findings: &mut Findings<'_>) {
    let counters = &host.counters;
    let number = |count: Option<u64>| count.unwrap_or(0);
    let saved = number(counters.pages_sharing) + number(counters.ksm_zero_pages);
    let (alone, restless) = (number(counters.pages_unshared), number(counters.pages_volatile));
    let skipping = host.settings.smart_scan == Some(1);
    let skipped = host.look.map_or(0, |look| percent(look.skipped, look.scanned + look.skipped));
    if number(counters.full_scans) >= SEVERAL_PASSES {
        // Those that are merged were compared too; those that smart scan passes over are not in any tree now.
        if alone > 0 || saved > 0 {
            equals(saved, saved + alone + number(counters.pages_shared), "of all processes", findings);
        }
        let share = percent(restless, host.records());
        if share >= 50 && skipped < MOST_SKIPPED_PERCENT {
            let cause = format!("{share} % of the pages that ksmd knows change from one look to the next, or are new");
            let remedy =
                "mark only what stays as it is; if it stays for a while, a larger pages_to_scan: shorter passes";
            findings.add(Code::Changing, Hampers, cause, remedy);
        }
    }
    if skipping && skipped >= MOST_SKIPPED_PERCENT {
        let cause = format!(
            "smart scan passes over {skipped} % of the pages: what is new meets an old equal page only when both are \
             looked at in the same pass, every ninth or never"
        );
        // What is merged well does not suffer.
        let severity = if saved >= alone + restless { Note } else { Hampers };
        findings.add(
            Code::SmartScan,
            severity,
            cause,
            "echo 0 > /sys/kernel/mm/ksm/smart_scan, at least for some passes",
        );
    }
    if let Some(profit) = counters.general_profit.filter(|profit| *profit < 0 && saved > 0) {
        let lost = size(kernel::Bytes(profit.unsigned_abs()));
        let cause = format!("KSM's records ({RECORD_BYTES} bytes for each page) take {lost} more than merging saves");
        findings.add(Code::NoProfit, Note, cause, "mark less: only the mappings that hold equal pages, by madvise");
    }
}

/// Equal pages that are kept apart on purpose.
fn apart(host: &HostFacts, findings: &mut Findings<'_>) {
    let (chains, dups) = (host.counters.stable_node_chains.unwrap_or(0), host.counters.stable_node_dups.unwrap_or(0));
    let copies = dups.saturating_sub(chains);
    // A content that has only one copy left stays a chain until ksmd comes by.
    if copies > 0 {
        let most = host.settings.max_page_sharing.unwrap_or(0);
        let contents = count(chains, "content has", "contents have");
        let saved = host.counters.pages_sharing.unwrap_or(0);
        let severity = if percent(copies, saved + copies) >= 5 { Hampers } else { Note };
        findings.add(
            Code::MaxPageSharing,
            severity,
            format!(
                "{contents} more users than one page may have (max_page_sharing is {most}): {copies} more {} kept ({})",
                if copies == 1 { "copy is" } else { "copies are" },
                size(PageCount(copies).bytes())
            ),
            "echo 2 > /sys/kernel/mm/ksm/run, echo 4096 > max_page_sharing, echo 1 > run: it can only be set while \
             nothing is merged; for pages of zeros echo 1 > use_zero_pages",
        );
    }
    if host.settings.merge_across_nodes == Some(0) && host.nodes > 1 {
        let cause = format!("merge_across_nodes is 0: equal pages on different ones of {} nodes are kept", host.nodes);
        let remedy =
            "echo 2 > /sys/kernel/mm/ksm/run, echo 1 > merge_across_nodes, echo 1 > run, if remote memory will do";
        findings.add(Code::NodesApart, Hampers, cause, remedy);
    }
}
