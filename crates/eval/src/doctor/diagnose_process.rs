//! What stands in the way in one process.

use std::time::Duration;

use kernel::{Bytes, page_size};

use super::diagnose::{SEVERAL_PASSES, equals};
use super::finding::Findings;
use super::host::HostFacts;
use super::process::{Observed, ProcessFacts};
use super::words::{count, percent, size};
use super::{Code, Finding, Severity, Subject};

use Severity::{Blocks, Hampers, Note};

/// Less than this of a kind of memory is not worth a word.
const LEAST: Bytes = Bytes(1 << 20);
/// Nor is less than this percentage of what the process has.
const LEAST_PERCENT: u64 = 10;
/// A limit of memory is near from this percentage on.
const NEAR_LIMIT_PERCENT: u64 = 95;
/// If it is not known how long passes take, several of them take so long.
const SOME_TIME: Duration = Duration::from_mins(1);

pub(super) fn all(observed: &Observed, host: &HostFacts, out: &mut Vec<Finding>) {
    let facts = match observed {
        Observed::Facts(facts) => facts,
        other => return unseen(other, out),
    };
    let mut findings = Findings::about(Subject::Process { pid: facts.pid }, out);
    marks(facts, &mut findings);
    other_memory(facts, &mut findings);
    held(facts, &mut findings);
    surroundings(facts, &mut findings);
    if host.settings.run == Some(1) {
        progress(facts, host, &mut findings);
    }
}

/// Processes that could not be looked at.
fn unseen(observed: &Observed, out: &mut Vec<Finding>) {
    let mut add = |pid, code, cause: String, remedy: String| {
        Findings::about(Subject::Process { pid }, out).add(code, Blocks, cause, remedy);
    };
    match observed {
        Observed::Facts(_) => {}
        Observed::Gone { pid } => {
            add(
                *pid,
                Code::Gone,
                "there is no such process: it has ended, or /proc hides it (hidepid)".into(),
                "ask for one that runs".into(),
            );
        }
        Observed::Zombie { pid, parent } => {
            let cause = format!("it has ended and has no memory; its parent {parent} has not asked for its status");
            add(*pid, Code::Zombie, cause, "ask for one that runs".into());
        }
        Observed::KernelThread { pid, name } => {
            let cause = format!("it is a thread of the kernel ({name}) and has no memory of its own");
            add(*pid, Code::KernelThread, cause, "ask for a process".into());
        }
        Observed::NotPermitted { pid, uid, file } => {
            let needed = if *file == "ksm_stat" { "CAP_DAC_READ_SEARCH" } else { "CAP_SYS_PTRACE" };
            let cause = format!("not permitted to read its {file}: it belongs to user {uid} or has more rights");
            let remedy =
                format!("run as its user, as root, or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH ({file}: {needed})");
            add(*pid, Code::NotPermitted, cause, remedy);
        }
    }
}

fn marks(facts: &ProcessFacts, findings: &mut Findings<'_>) {
    let memory = &facts.memory;
    if !facts.is_marked() && memory.stored > Bytes(0) {
        findings.add(
            Code::InPartition,
            Note,
            format!(
                "pagefold's page store merges it: {} of it lie in a partition; kernel KSM is kept out",
                size(memory.stored)
            ),
            "nothing to do; pagefold run --summary FILE tells what it saves",
        );
    } else if !facts.is_marked() {
        if facts.parent_marked == Some(true) {
            findings.add(
                Code::MarkLost,
                Blocks,
                format!("none of its memory is mergeable, though its parent's is ({})", facts.status.ppid),
                "what madvise marks ends with exec, and PR_SET_MEMORY_MERGE with a call that sets it to 0 (with exec too \
                 before Linux 6.7): set it again after, as pagefold run --backend ksm -- CMD does for what it starts",
            );
        } else {
            findings.add(
                Code::NotMarked,
                Blocks,
                "none of its memory is mergeable: no madvise, no prctl (ksm_merge_any no)".into(),
                "start it with pagefold run --backend ksm -- CMD or MemoryKSM=yes of systemd; \
                 nobody can mark the memory of a running process from outside",
            );
        }
    } else if memory.marked == Bytes(0) {
        let cause = format!(
            "its {} no pages of their own: only anonymous and privately written pages can be merged",
            count(memory.marked_mappings, "mergeable mapping holds", "mergeable mappings hold")
        );
        findings.add(
            Code::NothingThere,
            Blocks,
            cause,
            "mark the memory that is in use: see /proc/PID/smaps, Anonymous",
        );
    }
    if facts.is_marked() && matters(memory.unmarked, memory.unmarked + memory.marked) {
        let how = if facts.merge_any() { "though the prctl is on" } else { "marked by madvise, mapping by mapping" };
        let all = size(memory.unmarked + memory.marked);
        let cause = format!("{} of its {all} of private memory are not mergeable ({how})", size(memory.unmarked));
        let remedy = "madvise(MADV_MERGEABLE) on the rest, or pagefold run --backend ksm -- CMD for all of it; \
                      MADV_UNMERGEABLE takes mappings out";
        findings.add(Code::PartlyMarked, Note, cause, remedy);
    }
    if facts.merge_any() && !memory.stack_marked && memory.stack > Bytes(0) {
        let cause = format!("its stack ({}) is not mergeable: the prctl came before exec", size(memory.stack));
        let remedy =
            "madvise(MADV_MERGEABLE) on the stack in the program, if it holds much; a second prctl changes nothing";
        findings.add(Code::StackUnmarked, Note, cause, remedy);
    }
}

/// Memory that KSM passes over without a word: madvise returns 0 for it.
fn other_memory(facts: &ProcessFacts, findings: &mut Findings<'_>) {
    let memory = &facts.memory;
    let all = facts.status.rss_anon + memory.shared + memory.shared_memfd + memory.hugetlb;
    let mut add = |code, bytes: Bytes, what: &str, remedy: &str| {
        if matters(bytes, all) {
            let severity = if percent(bytes.get(), all.get()) >= 50 { Blocks } else { Hampers };
            let cause = format!("{} of {what}, which KSM passes over, madvise or not", size(bytes));
            findings.add(code, severity, cause, remedy);
        }
    };
    add(
        Code::SharedMemory,
        memory.shared,
        "shared memory (MAP_SHARED, System V, /dev/shm)",
        "map it MAP_PRIVATE; QEMU: share=off and no mem-path in /dev/shm; what is shared already exists once",
    );
    add(
        Code::SharedMemfd,
        memory.shared_memfd,
        "shared mappings of memory files (memfd)",
        "QEMU: memory-backend-ram, or memory-backend-memfd,share=off, with merge=on; not possible with vhost-user or virtiofs",
    );
    add(
        Code::Hugetlb,
        memory.hugetlb,
        "mappings of hugetlb pages",
        "base pages instead of the pool: no MAP_HUGETLB, no mem-path in hugetlbfs",
    );
}

/// Pages that are there and cannot be replaced.
fn held(facts: &ProcessFacts, findings: &mut Findings<'_>) {
    let (pinned, locked) = (facts.status.vm_pin, facts.status.vm_lck);
    let holding = &facts.holding;
    let mut by = Vec::new();
    for (number, one, many) in [
        (holding.registered_buffers, "registered buffer of io_uring", "registered buffers of io_uring"),
        (holding.vfio.into(), "VFIO descriptor", "VFIO descriptors"),
        (holding.rdma.into(), "RDMA descriptor", "RDMA descriptors"),
    ] {
        if number > 0 {
            by.push(count(number, one, many));
        }
    }
    let by = by.join(", ");
    if pinned > Bytes(0) {
        let by = if by.is_empty() { String::new() } else { format!(" ({by})") };
        let cause = format!("{} are pinned for input and output{by}: pinned pages are not merged", size(pinned));
        let remedy = "keep buffers for devices in mappings of their own; unregister them when they are idle";
        findings.add(Code::Pinned, Hampers, cause, remedy);
    } else if holding.vfio > 0 || holding.rdma > 0 {
        let locked = if locked > Bytes(0) { format!("; {} are locked", size(locked)) } else { String::new() };
        let cause = format!("memory that is mapped for a device is pinned and not merged ({by}{locked})");
        let remedy =
            "a guest with a passed-through device has all of its memory pinned: use emulated or virtio devices";
        findings.add(Code::Pinned, Hampers, cause, remedy);
    } else if holding.io_uring > 0 {
        let rings = count(holding.io_uring.into(), "ring", "rings");
        let cause = format!("{rings} of io_uring: pages are pinned while they are read or written, none for good now");
        findings.add(Code::MayPin, Note, cause, "nothing, unless buffers are registered: then keep them apart");
    }
    let memory = &facts.memory;
    if memory.marked_huge > Bytes(0) {
        let cause = format!(
            "{} of its {} of mergeable memory are huge pages: each is split once a part of it has an equal, and its zeros \
             are freed by that and not counted as merged",
            size(memory.marked_huge),
            size(memory.marked)
        );
        let remedy = "nothing to merge more; madvise(MADV_NOHUGEPAGE) if it is collapsed again and again, \
                      and no MADV_MERGEABLE where huge pages matter more";
        findings.add(Code::HugePages, Note, cause, remedy);
    }
    if matters(memory.marked_swapped, memory.marked_swapped + memory.marked) {
        let cause = format!(
            "{} of its mergeable memory are swapped out: ksmd does not look there",
            size(memory.marked_swapped)
        );
        let remedy = "merge before memory runs out: a larger pages_to_scan; or less swapping (vm.swappiness)";
        findings.add(Code::SwappedOut, Hampers, cause, remedy);
    }
}

/// What is around it.
fn surroundings(facts: &ProcessFacts, findings: &mut Findings<'_>) {
    if facts.status.seccomp != 0 {
        let filters = match facts.status.seccomp_filters {
            0 => "seccomp".to_owned(),
            number => count(number.into(), "seccomp filter", "seccomp filters"),
        };
        let (severity, effect) = if facts.is_marked() {
            (Note, "more memory may not be marked")
        } else {
            (Hampers, "that may be why nothing is marked")
        };
        let cause = format!("{filters} may refuse madvise and prctl: {effect}");
        let remedy = "let madvise(MADV_MERGEABLE) and prctl(PR_SET_MEMORY_MERGE) through, or set the prctl before the \
                      filter, as pagefold run --backend ksm -- CMD does: it is inherited";
        findings.add(Code::Seccomp, severity, cause, remedy);
    }
    if let Some(limit) = facts.limit.as_ref().filter(|limit| limit.percent() >= NEAR_LIMIT_PERCENT) {
        let cause = format!(
            "its memory group is at {} % of {} ({}): what is reclaimed is not there to be merged",
            limit.percent(),
            size(limit.limit),
            limit.file.display()
        );
        findings.add(Code::MemoryLimit, Hampers, cause, "a higher limit, at least until its pages are merged");
    }
    if facts.is_32_bit {
        let cause = "it is a 32-bit program: the page store cannot take it in, kernel KSM can".to_owned();
        findings.add(Code::ThirtyTwoBit, Note, cause, "pagefold run --backend ksm -- CMD");
    }
}

/// What ksmd has done for it.
fn progress(facts: &ProcessFacts, host: &HostFacts, findings: &mut Findings<'_>) {
    let (records, merged) = (facts.records(), facts.merged());
    let marked = facts.memory.marked.get() / page_size();
    // Less than the noise of a process that comes and goes.
    if facts.stat.is_none() || marked < LEAST.get() / page_size() {
        return;
    }
    if records * 2 < marked {
        let cause = format!("ksmd has come to {records} of its {marked} mergeable pages so far");
        let remedy = "wait: merging takes two full passes; or let ksmd go faster (pages_to_scan)";
        findings.add(Code::NotReached, Hampers, cause, remedy);
        return;
    }
    let passes = host.counters.full_scans.unwrap_or(0);
    let several = host.pass_time().map_or(SOME_TIME, |pass| pass.saturating_mul(SEVERAL_PASSES as u32));
    if passes >= SEVERAL_PASSES && facts.age > several {
        equals(merged, records.max(merged), "of it", findings);
    }
    let profit = facts.stat.and_then(|stat| stat.ksm_process_profit).unwrap_or(0);
    if profit < 0 && merged > 0 {
        let lost = size(Bytes(profit.unsigned_abs()));
        let cause = format!("the kernel's records of its pages take {lost} more than merging them saves");
        findings.add(Code::NoProfit, Note, cause, "mark only the mappings that hold equal pages, by madvise");
    }
}

/// True if a part is large in itself and beside the whole.
fn matters(part: Bytes, whole: Bytes) -> bool {
    part >= LEAST && percent(part.get(), whole.get()) >= LEAST_PERCENT
}
