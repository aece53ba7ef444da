//! What cannot be made on every machine, and the bounds of what is said.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use kernel::cgroup_memory::MemoryLimit;
use kernel::descriptors::Holding;
use kernel::{Bytes, KsmCounters, KsmStat, PageCount, Pid, Status, Vaddr};

use super::*;

/// A host on which KSM runs fast, several passes are done and all is well.
fn host() -> HostFacts {
    HostFacts {
        present: true,
        prctl: true,
        settings: Settings {
            run: Some(1),
            pages_to_scan: Some(5000),
            sleep_millisecs: Some(20),
            max_page_sharing: Some(256),
            smart_scan: Some(0),
            merge_across_nodes: Some(1),
            advisor_mode: Some("none".into()),
            ..Settings::default()
        },
        counters: KsmCounters {
            pages_shared: Some(1000),
            pages_sharing: Some(5000),
            pages_unshared: Some(1000),
            pages_volatile: Some(100),
            full_scans: Some(9),
            general_profit: Some(1 << 20),
            stable_node_chains: Some(0),
            stable_node_dups: Some(0),
            ..KsmCounters::default()
        },
        look: Some(Look { time: Duration::from_secs(1), scanned: 7100, skipped: 0 }),
        fleet: Fleet { marked: vec![marked(10, 3600, 1)], refused: 0, told: true, complete: true },
        nodes: 1,
        ..HostFacts::default()
    }
}

fn marked(pid: i32, seconds: u64, layout: u64) -> Marked {
    let layout = ProgramLayout {
        program: "/usr/bin/worker".into(),
        program_start: Vaddr(layout << 12),
        ..ProgramLayout::default()
    };
    let (pid, age) = (Pid(pid), Duration::from_secs(seconds));
    Marked { pid, age, anonymous: PageCount(7100).bytes(), layout: Some(layout) }
}

/// A process of which all is well.
fn process() -> ProcessFacts {
    ProcessFacts {
        pid: Pid(10),
        status: Status { rss_anon: Bytes(64 << 20), ..Status::default() },
        stat: Some(KsmStat {
            ksm_rmap_items: Some(16_384),
            ksm_zero_pages: Some(0),
            ksm_merging_pages: Some(12_000),
            ksm_process_profit: Some(1 << 20),
            ksm_merge_any: Some(true),
            ksm_mergeable: Some(true),
        }),
        memory: MemoryKinds {
            marked: Bytes(64 << 20),
            marked_mappings: 9,
            stack: Bytes(8192),
            stack_marked: true,
            ..MemoryKinds::default()
        },
        age: Duration::from_secs(3600),
        layout: marked(10, 0, 1).layout.unwrap(),
        parent_marked: Some(false),
        holding: Holding::default(),
        is_32_bit: false,
        limit: None,
    }
}

fn found(host: &HostFacts, processes: &[ProcessFacts]) -> Vec<(Code, Severity)> {
    let observed: Vec<Observed> = processes.iter().cloned().map(|facts| Observed::Facts(Box::new(facts))).collect();
    diagnose(host, &observed).into_iter().map(|finding| (finding.code, finding.severity)).collect()
}

/// What is found once `change` has been made to a healthy host.
fn host_with(change: impl FnOnce(&mut HostFacts)) -> Vec<(Code, Severity)> {
    let mut host = host();
    change(&mut host);
    found(&host, &[])
}

fn process_with(change: impl FnOnce(&mut ProcessFacts)) -> Vec<(Code, Severity)> {
    let mut facts = process();
    change(&mut facts);
    found(&host(), &[facts])
}

use Severity::{Blocks, Hampers, Note};

#[test]
fn nothing_is_found_where_all_is_well() {
    assert_eq!(found(&host(), &[process()]), []);
}

#[test]
fn what_is_off_or_cannot_be_set() {
    assert_eq!(host_with(|host| host.present = false), [(Code::KsmMissing, Blocks)]);
    assert_eq!(host_with(|host| host.settings.run = Some(0)), [(Code::KsmOff, Blocks)]);
    assert_eq!(host_with(|host| host.settings.run = Some(2)), [(Code::KsmUnmerging, Blocks)]);
    assert_eq!(host_with(|host| host.writable = Writable::ReadOnly), [(Code::ReadOnly, Note)]);
    assert_eq!(host_with(|host| host.writable = Writable::NotPermitted), [(Code::NotWritable, Note)]);
    let mut off = host();
    (off.settings.run, off.writable) = (Some(0), Writable::ReadOnly);
    assert_eq!(found(&off, &[]), [(Code::KsmOff, Blocks), (Code::ReadOnly, Hampers)]);
}

#[test]
fn how_fast_ksmd_goes() {
    let settings = |pages, sleep| {
        move |host: &mut HostFacts| {
            (host.settings.pages_to_scan, host.settings.sleep_millisecs) = (Some(pages), Some(sleep));
        }
    };
    assert_eq!(host_with(settings(100, 20)), [(Code::ScanRate, Note)], "a pass of a second");
    assert_eq!(host_with(settings(0, 20)), [(Code::ScanNothing, Blocks)]);
    // 4 GiB at 19.5 MiB/s: three and a half minutes, which is long only for what could be changed.
    let large = |host: &mut HostFacts| {
        host.counters.pages_sharing = Some(1 << 20);
        host.look = Some(Look { time: Duration::from_secs(1), scanned: 5000, skipped: 0 });
    };
    assert_eq!(host_with(large), []);
    let mut host = host();
    large(&mut host);
    settings(100, 20)(&mut host);
    let all = diagnose(&host, &[]);
    assert_eq!((all[0].code, all[0].severity), (Code::ScanRate, Hampers));
    assert!(all[0].cause.contains("19.5 MiB a second") && all[0].cause.contains("about 4 min"), "{}", all[0].cause);
    host.settings.pages_to_scan = Some(99);
    host.look = Some(Look { time: Duration::from_secs(1), scanned: 1000, skipped: 0 });
    assert_eq!(found(&host, &[]), [(Code::ScanRate, Hampers)], "17 minutes, whatever the settings are");
    // Before the first pass, what is marked counts.
    host.counters = KsmCounters { full_scans: Some(0), ..KsmCounters::default() };
    host.look = None;
    assert_eq!(host.pass(), PageCount(7100));
    assert_eq!(host.pass_time(), Some(Duration::from_secs_f64(7100.0 / 4950.0)));
    host.settings.sleep_millisecs = Some(0);
    assert_eq!(host.pass_time(), None);
}

#[test]
fn the_advisor_is_said() {
    assert_eq!(host_with(|host| host.settings.advisor_mode = Some("scan-time".into())), [(Code::Advisor, Note)]);
    assert_eq!(host_with(|host| host.settings.advisor_mode = None), []);
}

#[test]
fn ksmd_that_does_nothing() {
    let idle = |host: &mut HostFacts| host.look = Some(Look { time: Duration::from_secs(1), scanned: 0, skipped: 0 });
    assert_eq!(host_with(idle), [(Code::NotScanning, Hampers)]);
    let mut asleep = host();
    idle(&mut asleep);
    asleep.settings.sleep_millisecs = Some(60_000);
    let all = diagnose(&asleep, &[]);
    assert!(all.iter().any(|finding| finding.cause.contains("sleeps for 60000 ms")), "{all:?}");
    asleep.fleet.marked.clear();
    assert_eq!(found(&asleep, &[]), [(Code::NothingMarked, Blocks)], "nothing to do is no failure of ksmd");
}

#[test]
fn who_is_marked() {
    assert_eq!(host_with(|host| host.fleet.marked.clear()), [(Code::NothingMarked, Blocks)]);
    let refused = |host: &mut HostFacts| {
        host.fleet.marked.clear();
        host.fleet.refused = 3;
    };
    assert_eq!(host_with(refused), [(Code::MarksUnseen, Note)]);
    assert_eq!(host_with(|host| host.fleet.refused = 3), [], "somebody is marked");
    assert_eq!(host_with(|host| host.fleet = Fleet::default()), [(Code::MarksUnseen, Note)]);
    // Before Linux 6.16, only what ksmd has come to is known.
    let old = |passes| {
        move |host: &mut HostFacts| {
            host.fleet = Fleet { told: true, ..Fleet::default() };
            host.counters.full_scans = Some(passes);
        }
    };
    assert_eq!(host_with(old(9)), [(Code::NothingMarked, Blocks)]);
    assert_eq!(host_with(old(0)), []);
}

#[test]
fn passes_and_lives() {
    assert_eq!(host_with(|host| host.counters.full_scans = Some(1)), [(Code::TooEarly, Hampers)]);
    // A pass takes a second.
    let ages = |ages: &'static [u64]| {
        move |host: &mut HostFacts| {
            host.fleet.marked = ages.iter().zip(1..).map(|(age, pid)| marked(pid, *age, 1)).collect();
        }
    };
    assert_eq!(host_with(ages(&[1, 1, 100])), [(Code::PassTooLong, Hampers)]);
    assert_eq!(host_with(ages(&[1, 50, 100])), []);
}

#[test]
fn what_came_of_it() {
    let counters = |sharing, unshared, volatile| {
        move |host: &mut HostFacts| {
            let counters = &mut host.counters;
            counters.pages_shared = Some(sharing / 5);
            (counters.pages_sharing, counters.pages_unshared) = (Some(sharing), Some(unshared));
            counters.pages_volatile = Some(volatile);
        }
    };
    assert_eq!(host_with(counters(0, 5000, 0)), [(Code::NothingEqual, Blocks)]);
    assert_eq!(host_with(counters(0, 0, 0)), [], "nothing was compared");
    assert_eq!(host_with(counters(200, 5000, 0)), [(Code::FewEqual, Hampers)]);
    assert_eq!(host_with(counters(5000, 1000, 9000)), [(Code::Changing, Hampers)]);
    let early = |host: &mut HostFacts| {
        counters(0, 5000, 0)(host);
        host.counters.full_scans = Some(2);
    };
    assert_eq!(host_with(early), []);
    assert_eq!(host_with(|host| host.counters.general_profit = Some(-5)), [(Code::NoProfit, Note)]);
}

#[test]
fn smart_scan_matters_where_it_skips_and_little_is_merged() {
    let skips = |host: &mut HostFacts| {
        host.settings.smart_scan = Some(1);
        host.look = Some(Look { time: Duration::from_secs(1), scanned: 1000, skipped: 8000 });
    };
    assert_eq!(host_with(skips), [(Code::SmartScan, Note)]);
    let mut host = host();
    skips(&mut host);
    host.counters.pages_volatile = Some(20_000);
    assert_eq!(found(&host, &[]), [(Code::SmartScan, Hampers)], "what is skipped is not taken for changing");
    host.settings.smart_scan = Some(0);
    host.look = Some(Look { time: Duration::from_secs(1), scanned: 9000, skipped: 0 });
    assert_eq!(found(&host, &[]), [(Code::Changing, Hampers)]);
}

#[test]
fn what_is_kept_apart() {
    let chains = |dups| {
        move |host: &mut HostFacts| {
            (host.counters.stable_node_chains, host.counters.stable_node_dups) = (Some(2), Some(dups));
        }
    };
    assert_eq!(host_with(chains(2)), [], "one copy of each is left");
    assert_eq!(host_with(chains(10)), [(Code::MaxPageSharing, Note)]);
    assert_eq!(host_with(chains(1000)), [(Code::MaxPageSharing, Hampers)]);
    let mut apart = host();
    apart.settings.merge_across_nodes = Some(0);
    assert_eq!(found(&apart, &[]), [], "a single node");
    apart.nodes = 2;
    assert_eq!(found(&apart, &[]), [(Code::NodesApart, Hampers)]);
}

#[test]
fn layouts_differ_within_a_program_only() {
    let layouts = |layouts: &'static [u64]| {
        move |host: &mut HostFacts| {
            host.fleet.marked = layouts.iter().zip(1..).map(|(layout, pid)| marked(pid, 3600, *layout)).collect();
        }
    };
    assert_eq!(host_with(layouts(&[4, 4, 4])), []);
    assert_eq!(host_with(layouts(&[4, 5, 4])), [(Code::Layout, Hampers)]);
    let mut two = host();
    layouts(&[4, 5])(&mut two);
    two.fleet.marked[1].layout.as_mut().unwrap().program = "/usr/bin/other".into();
    assert_eq!(found(&two, &[]), []);
    // Those that were asked for count too, each once.
    assert_eq!(found(&host(), &[process()]), []);
    let other = ProcessFacts { pid: Pid(11), layout: marked(11, 0, 2).layout.unwrap(), ..process() };
    let all = diagnose(&host(), &[Observed::Facts(Box::new(other))]);
    assert!(all[0].cause.starts_with("2 processes of /usr/bin/worker have 2 "), "{all:?}");
}

#[test]
fn processes_that_cannot_be_looked_at() {
    let unseen = [
        Observed::Gone { pid: Pid(7) },
        Observed::Zombie { pid: Pid(7), parent: Pid(6) },
        Observed::KernelThread { pid: Pid(7), name: "ksmd".into() },
        Observed::NotPermitted { pid: Pid(7), uid: 1000, file: "smaps" },
    ];
    let all = diagnose(&host(), &unseen);
    let codes: Vec<Code> = all.iter().map(|finding| finding.code).collect();
    assert_eq!(codes, [Code::Gone, Code::Zombie, Code::KernelThread, Code::NotPermitted]);
    assert!(all.iter().all(|finding| finding.subject == Subject::Process { pid: Pid(7) }));
    assert!(all[3].cause.contains("user 1000") && all[3].remedy.contains("CAP_SYS_PTRACE"), "{all:?}");
}

#[test]
fn marks_of_a_process() {
    let unmarked = |facts: &mut ProcessFacts| {
        facts.stat = Some(KsmStat { ksm_merge_any: Some(false), ..KsmStat::default() });
        facts.memory = MemoryKinds { unmarked: Bytes(64 << 20), ..MemoryKinds::default() };
    };
    assert_eq!(process_with(unmarked), [(Code::NotMarked, Blocks)]);
    let member = |facts: &mut ProcessFacts| {
        unmarked(facts);
        facts.memory.stored = Bytes(1 << 20);
    };
    assert_eq!(process_with(member), [(Code::InPartition, Note)]);
    let lost = |facts: &mut ProcessFacts| {
        unmarked(facts);
        facts.parent_marked = Some(true);
    };
    assert_eq!(process_with(lost), [(Code::MarkLost, Blocks)]);
    assert_eq!(process_with(|facts| facts.memory.marked = Bytes(0)), [(Code::NothingThere, Blocks)]);
    assert_eq!(process_with(|facts| facts.memory.unmarked = Bytes(32 << 20)), [(Code::PartlyMarked, Note)]);
    assert_eq!(process_with(|facts| facts.memory.unmarked = Bytes(1 << 20)), [], "2 %");
    assert_eq!(process_with(|facts| facts.memory.stack_marked = false), [(Code::StackUnmarked, Note)]);
}

#[test]
fn memory_that_ksm_passes_over_or_cannot_take() {
    for (code, place) in [
        (Code::SharedMemory, (|kinds| &mut kinds.shared) as fn(&mut MemoryKinds) -> &mut Bytes),
        (Code::SharedMemfd, |kinds| &mut kinds.shared_memfd),
        (Code::Hugetlb, |kinds| &mut kinds.hugetlb),
    ] {
        let sized = |bytes| move |facts: &mut ProcessFacts| *place(&mut facts.memory) = Bytes(bytes);
        assert_eq!(process_with(sized(1 << 30)), [(code, Blocks)]);
        assert_eq!(process_with(sized(32 << 20)), [(code, Hampers)]);
        assert_eq!(process_with(sized(2 << 20)), [], "3 %");
    }
    assert_eq!(process_with(|facts| facts.memory.marked_huge = Bytes(2 << 20)), [(Code::HugePages, Note)]);
    assert_eq!(process_with(|facts| facts.memory.marked_swapped = Bytes(32 << 20)), [(Code::SwappedOut, Hampers)]);
    assert_eq!(process_with(|facts| facts.is_32_bit = true), [(Code::ThirtyTwoBit, Note)]);
}

#[test]
fn who_holds_its_pages() {
    assert_eq!(process_with(|facts| facts.status.vm_pin = Bytes(4096)), [(Code::Pinned, Hampers)]);
    let holding = |holding: Holding| move |facts: &mut ProcessFacts| facts.holding = holding;
    let vfio = Holding { vfio: 2, ..Holding::default() };
    assert_eq!(process_with(holding(vfio)), [(Code::Pinned, Hampers)], "VFIO's pins are counted as locked memory");
    assert_eq!(process_with(holding(Holding { rdma: 1, ..Holding::default() })), [(Code::Pinned, Hampers)]);
    assert_eq!(process_with(holding(Holding { io_uring: 1, ..Holding::default() })), [(Code::MayPin, Note)]);
}

#[test]
fn filters_and_limits() {
    let filtered = |facts: &mut ProcessFacts| (facts.status.seccomp, facts.status.seccomp_filters) = (2, 1);
    assert_eq!(process_with(filtered), [(Code::Seccomp, Note)]);
    let unmarked = |facts: &mut ProcessFacts| {
        filtered(facts);
        facts.stat = None;
        facts.memory.marked_mappings = 0;
    };
    assert_eq!(process_with(unmarked), [(Code::NotMarked, Blocks), (Code::Seccomp, Hampers)]);
    let limit = |used| {
        move |facts: &mut ProcessFacts| {
            facts.limit =
                Some(MemoryLimit { file: "/group/memory.high".into(), limit: Bytes(1000), used: Bytes(used) });
        }
    };
    assert_eq!(process_with(limit(990)), [(Code::MemoryLimit, Hampers)]);
    assert_eq!(process_with(limit(900)), []);
}

#[test]
fn what_ksmd_has_done_for_a_process() {
    let stat = |items, merging| {
        move |facts: &mut ProcessFacts| {
            let stat = facts.stat.as_mut().unwrap();
            (stat.ksm_rmap_items, stat.ksm_merging_pages) = (Some(items), Some(merging));
        }
    };
    assert_eq!(process_with(stat(8000, 0)), [(Code::NotReached, Hampers)]);
    assert_eq!(process_with(stat(16_000, 0)), [(Code::NothingEqual, Blocks)]);
    assert_eq!(process_with(stat(16_000, 900)), [(Code::FewEqual, Hampers)]);
    let young = |facts: &mut ProcessFacts| {
        stat(16_000, 0)(facts);
        facts.age = Duration::from_secs(2);
    };
    assert_eq!(process_with(young), [], "a pass takes a second: two were not several");
    let small = |facts: &mut ProcessFacts| {
        stat(0, 0)(facts);
        facts.memory.marked = Bytes(4096);
    };
    assert_eq!(process_with(small), []);
    let loss = |facts: &mut ProcessFacts| facts.stat.as_mut().unwrap().ksm_process_profit = Some(-64);
    assert_eq!(process_with(loss), [(Code::NoProfit, Note)]);
}

#[test]
fn json_has_code_severity_subject_cause_and_remedy() {
    let subject = Subject::Process { pid: Pid(7) };
    let finding = Finding { code: Code::Gone, severity: Blocks, subject, cause: "c".into(), remedy: "r".into() };
    let expected = serde_json::json!(
        { "code": "gone", "severity": "blocks", "subject": "process", "pid": 7, "cause": "c", "remedy": "r" }
    );
    assert_eq!(serde_json::to_value(&finding).unwrap(), expected);
    assert_eq!(serde_json::to_value(Subject::Host).unwrap(), serde_json::json!({ "subject": "host" }));
}
