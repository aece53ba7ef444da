//! C6, H2, V8: memory limits, pages that are freed lazily, threads with real-time priority.

use std::time::{Duration, Instant};

use crate::stand::Stand;
use crate::victim::{Region, Victim, fork, merge_densely, merge_now, reap, tell, wait_until};

pub(crate) const VICTIMS: &[Victim] = &[
    ("memory_cgroup", memory_cgroup),
    ("freed_lazily", freed_lazily),
    ("real_time", real_time),
    ("real_time_calls", real_time_calls),
];

const FIRST: u64 = 500;

/// A control group of the test's own, removed when its processes have ended.
pub(crate) struct Cgroup(pub(crate) std::path::PathBuf);

impl Cgroup {
    /// `None` where this controller of cgroup v1 is not to be had.
    pub(crate) fn make(controller: &str) -> Option<Self> {
        use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("pagefold-hazards-{}-{}", std::process::id(), NUMBER.fetch_add(1, SeqCst));
        let folder = format!("/sys/fs/cgroup/{controller}/{name}");
        let made = std::fs::create_dir(&folder).is_ok();
        if !made {
            println!("skipped: the {controller} controller of cgroup v1");
        }
        made.then(|| Self(folder.into()))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0.join("freezer.state"), "THAWED");
        for _ in 0..100 {
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Puts this victim into the group that the test has made.
fn join_group() -> std::path::PathBuf {
    let folder = std::path::PathBuf::from(std::env::var_os("CGROUP").expect("the test names a group"));
    std::fs::write(folder.join("cgroup.procs"), std::process::id().to_string()).unwrap();
    folder
}

/// Near the limit of the memory cgroup that it was put into.
fn memory_cgroup() {
    join_group();
    // 40 MiB of 48, half of it twins of the other half, and a hole as large.
    const HALF: usize = 5 << 10;
    let (one, two) = (Region::map(2 * HALF), Region::map(2 * HALF));
    one.part(0, HALF).fill_from(FIRST);
    two.part(0, HALF).fill_from(FIRST);
    reap(fork(|| {}));
    one.mergeable();
    two.mergeable();
    for _ in 0..10 {
        merge_now();
        if one.merged() > HALF / 2 {
            break;
        }
    }
    tell(&format!("{} of {HALF} merged", one.merged()));
    one.part(0, HALF).check_from(FIRST);
    two.part(0, HALF).check_from(FIRST);
    assert_eq!(one.part(0, HALF).advise(libc::MADV_DONTNEED), 0);
    one.part(0, HALF).check_zero();
}

/// C6, H2: merging near the limit of a memory cgroup kills nobody.
#[test]
fn c6_near_the_limit_of_a_cgroup() {
    let Some(group) = Cgroup::make("memory") else { return };
    std::fs::write(group.0.join("memory.limit_in_bytes"), (48 << 20).to_string()).unwrap();
    let stand = Stand::on_request();
    let mut command = stand.command("memory_cgroup");
    command.env("CGROUP", &group.0);
    let output = stand.start_command(command).succeed();
    println!("{}", output.lines().rfind(|line| line.ends_with("merged")).unwrap_or_default());
}

/// Pages that it has freed lazily before it hands them over, with the kernel reclaiming them all the time.
fn freed_lazily() {
    const PAGES: usize = 64;
    let reclaim = join_group().join("memory.force_empty");
    merge_densely();
    let (mut kept, mut gone) = (0, 0);
    let until = Instant::now() + Duration::from_secs(5);
    while Instant::now() < until {
        let (one, two) = (Region::map(PAGES), Region::map(PAGES));
        one.fill_from(FIRST);
        two.fill_from(FIRST);
        assert_eq!(one.advise(libc::MADV_FREE), 0);
        one.mergeable();
        two.mergeable();
        // Refused if nothing can be reclaimed.
        let _ = std::fs::write(&reclaim, "0");
        let is_gone = |index: usize| {
            let gone = one.holds(index, 0);
            assert!(gone || one.holds(index, FIRST + index as u64), "page {index} holds something else");
            gone
        };
        let seen: Vec<bool> = (0..PAGES).map(is_gone).collect();
        merge_now();
        let _ = std::fs::write(&reclaim, "0");
        for (index, was_gone) in seen.into_iter().enumerate() {
            let gone_now = is_gone(index);
            assert!(gone_now || !was_gone, "page {index} came back to life");
            kept += u32::from(!gone_now);
            gone += u32::from(gone_now);
        }
        two.check_from(FIRST);
        one.fill_from(FIRST);
        one.check_from(FIRST);
        one.unmap();
        two.unmap();
    }
    tell(&format!("{kept} kept, {gone} gone"));
    assert!(gone > 100, "hardly anything was reclaimed");
}

/// V8: a page that was freed lazily holds what it held or zeros, and once it is gone it stays so.
#[test]
fn v8_pages_freed_lazily_stay_gone() {
    let Some(group) = Cgroup::make("memory") else { return };
    let stand = Stand::on_request();
    let mut command = stand.command("freed_lazily");
    command.env("CGROUP", &group.0);
    let output = stand.start_command(command).succeed();
    println!("{}", output.lines().rfind(|line| line.ends_with("gone")).unwrap_or_default());
    stand.assert_merged(100);
}

/// One of its threads has real-time priority for a while.
fn real_time() {
    const PAGES: usize = 48;
    let raise = |policy: i32, priority: i32| {
        let wanted = libc::sched_param { sched_priority: priority };
        // SAFETY: the kernel reads the priority; it is this thread's.
        unsafe { libc::sched_setscheduler(0, policy, &raw const wanted) == 0 }
    };
    if !raise(libc::SCHED_FIFO, 1) {
        tell("skipped: SCHED_FIFO");
        return;
    }
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(FIRST);
    two.fill_from(FIRST);
    one.mergeable();
    two.mergeable();
    for _ in 0..20 {
        assert_eq!(merge_now(), 0);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(one.stored().len() + two.stored().len(), 0);
    assert!(raise(libc::SCHED_OTHER, 0));
    wait_until("pages are merged again", || {
        merge_now();
        one.merged() + 1 >= PAGES
    });
    one.check_from(FIRST);
    two.check_from(FIRST);
}

/// H2: a process is left alone for as long as one of its threads has real-time priority.
#[test]
fn h2_real_time_threads_are_left_alone() {
    let stand = Stand::on_request();
    stand.run("real_time");
    let summary = stand.summary();
    assert!(summary.refused.0.contains_key("real_time_threads"), "{:?}", summary.refused);
}

/// Two threads on one CPU make gated calls without end, one of them with real-time priority.
fn real_time_calls() {
    let region = Region::map(64);
    region.mergeable();
    // SAFETY: the set is plain integers; it is this process's.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(0, &mut set);
        assert_eq!(libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set), 0);
    }
    std::thread::spawn(move || {
        loop {
            region.part(0, 32).advise(libc::MADV_DONTNEED);
        }
    });
    let urgent = std::thread::spawn(move || {
        let wanted = libc::sched_param { sched_priority: 5 };
        // SAFETY: the kernel reads the priority; it is this thread's.
        if unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const wanted) } != 0 {
            tell("skipped: SCHED_FIFO");
            return;
        }
        let (mut worst, until) = (Duration::ZERO, Instant::now() + Duration::from_secs(4));
        while Instant::now() < until {
            let begun = Instant::now();
            region.part(32, 64).advise(libc::MADV_DONTNEED);
            worst = worst.max(begun.elapsed());
            std::thread::sleep(Duration::from_millis(1));
        }
        tell(&format!("at worst {worst:?}"));
        assert!(worst < Duration::from_secs(1), "a call took {worst:?}");
    });
    urgent.join().unwrap();
}

/// H2: whoever waits for another thread inside the gate lets it run, also on the same CPU at a higher priority.
///
/// Seen to fail: with a wait that only yielded one call took 11 s, as long as the kernel gives the other thread 50 ms of
/// each second; without the agent 20 us.
#[test]
fn h2_real_time_threads_and_the_gates_locks() {
    let output = Stand::on_request().run("real_time_calls");
    println!("{}", output.lines().rfind(|line| line.starts_with("at worst")).unwrap_or_default());
}
