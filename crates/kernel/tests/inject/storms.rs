//! fork, exec, exit and other injectors meanwhile; and what is left behind after thousands of injections.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use pagefold_kernel::inject::{Call, CallNumber, InjectError, Options, Refusal, inject};
use pagefold_kernel::{Bytes, Pid, maps, membership, status};

use crate::harness::{self, Target, wait_until};

#[test]
fn threads_come_and_go_and_children_are_made() {
    let mut target = Target::start(&["fork", "threads", "epoll_timed", "nanosleep", "compute"]);
    for round in 0..600 {
        target.switch(round % 2 == 0, None);
        target.switch(round % 2 == 1, Some("threads"));
    }
    println!("{:#?}", target.check());
}

/// Any end of a process in the middle is an outcome: gone, or done before.
#[test]
fn processes_that_end_or_execute_others_meanwhile() {
    let scripts = ["exit 0", "exec true", "sleep 0.01; exec sleep 0.01", "for i in 1 2 3 4; do true & done; wait"];
    let mut outcomes = std::collections::BTreeMap::<String, u32>::new();
    for round in 0..400 {
        let script = scripts[round % scripts.len()];
        let mut child = Command::new("sh").args(["-c", script]).stdout(Stdio::null()).spawn().unwrap();
        let pid = Pid(child.id().cast_signed());
        std::thread::sleep(Duration::from_micros(100 * (round as u64 % 40)));
        let outcome = match inject(pid, &[Call::memory_merge(true), Call::getpid()], &Options::default()) {
            Ok(done) => {
                assert_eq!(done.results, [Ok(0), Ok(pid.0 as u64)]);
                "done".to_owned()
            }
            Err(InjectError::Refused { refusal: refusal @ (Refusal::Gone | Refusal::Zombie), .. }) => {
                refusal.word().to_owned()
            }
            Err(error) => panic!("{script}: {error:?}"),
        };
        *outcomes.entry(outcome).or_default() += 1;
        assert!(child.wait().unwrap().success(), "{script}");
    }
    println!("{outcomes:?}");
    assert!(outcomes["done"] > 10);
}

/// Killed while it is held.
#[test]
fn processes_that_are_killed_meanwhile() {
    for round in 0..200 {
        let mut target = Target::start(&["nanosleep", "compute"]);
        let pid = target.pid();
        std::thread::scope(|scope| {
            let injections = scope.spawn(move || {
                loop {
                    match inject(pid, &[Call::memory_merge(true)], &Options::default()) {
                        Ok(done) => assert_eq!(done.results, [Ok(0)]),
                        Err(error) => return error,
                    }
                }
            });
            std::thread::sleep(Duration::from_micros(2000 + 37 * round));
            target.child.kill().unwrap();
            let error = injections.join().unwrap();
            assert!(matches!(error.refusal(), Some(Refusal::Gone | Refusal::Zombie)), "{error:?}");
        });
        assert!(!target.child.wait().unwrap().success());
    }
}

#[test]
fn many_injectors_at_once() {
    let mut target = Target::start(&["nanosleep", "epoll_timed", "epoll_pwait2", "compute", "read", "semtimedop"]);
    let pid = target.pid();
    let tids: Vec<Pid> = target.tids.values().copied().collect();
    std::thread::scope(|scope| {
        for tid in tids {
            scope.spawn(move || {
                let options = Options { tid: Some(tid), timeout: Duration::from_secs(60), ..Options::default() };
                for round in 0..300 {
                    let done = inject(pid, &[Call::memory_merge(round % 2 == 0)], &options).unwrap();
                    assert_eq!(done.results, [Ok(0)]);
                }
            });
        }
        // And injectors that are processes.
        for _ in 0..3 {
            scope.spawn(move || {
                let status = harness::injector(pid, None, 300, None).wait().unwrap();
                assert!(status.success());
            });
        }
    });
    target.check();
}

/// What one process has: descriptors, threads, memory, mappings.
fn holdings(pid: Pid) -> (usize, u32, Bytes, usize) {
    let status = status::read(pid).unwrap();
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    (descriptors, status.threads, status.rss_anon, maps::read(pid).unwrap().len())
}

#[test]
fn thousands_of_injections_leave_one_page() {
    let mut target = Target::start(&["nanosleep"]);
    let pid = target.pid();
    target.check();
    let before = holdings(pid);
    target.switch(true, None);
    let own = holdings(Pid::this());
    for round in 0..5000 {
        target.switch(round % 2 == 0, None);
    }
    let after = holdings(pid);
    println!("target {before:?} {after:?}, this process {own:?} {:?}", holdings(Pid::this()));
    assert_eq!((before.0, before.1, before.3), (after.0, after.1, after.3));
    // Its page tables and stack may have grown meanwhile by themselves.
    assert!(after.2.0 <= before.2.0 + 4 * 4096, "{before:?} {after:?}");
    target.check();
}

/// A call that takes longer than the time-out is left to the thread, which then goes on by itself.
#[test]
fn a_call_that_takes_too_long_is_left_to_the_thread() {
    let mut target = Target::start(&["nanosleep", "poll"]);
    let tid = target.tid("nanosleep");
    // Waits for no signal.
    let memory = target.memory_with(&[0, 0, 300_000_000]).0;
    let call = Call { number: CallNumber(libc::SYS_rt_sigtimedwait), arguments: [memory, 0, memory + 8, 8, 0, 0] };
    let options = Options { tid: Some(tid), timeout: Duration::from_millis(50), ..Options::default() };
    match inject(target.pid(), &[call], &options) {
        Err(InjectError::Unfinished { tid: by, .. }) => assert_eq!(by, tid),
        other => panic!("{other:?}"),
    }
    assert_eq!(status::read(tid).unwrap().tracer_pid, 0);
    target.check();
    target.switch(true, Some("nanosleep"));
    target.check();
}

/// A thread that is still in its slot, the only one, does not get it for another call: the code would change under it.
#[test]
fn a_slot_is_not_taken_from_under_its_thread() {
    let mut target = Target::start(&["nanosleep"]);
    target.leave_one_slot();
    let memory = target.memory_with(&[0, 3, 0]).0;
    let call = Call { number: CallNumber(libc::SYS_rt_sigtimedwait), arguments: [memory, 0, memory + 8, 8, 0, 0] };
    let only = Options { tid: Some(target.tid("nanosleep")), ..Options::default() };
    let short = Options { timeout: Duration::from_millis(100), ..only.clone() };
    for _ in 0..3 {
        wait_until("the call takes too long", || match inject(target.pid(), &[call], &short) {
            Err(InjectError::Unfinished { .. }) => true,
            Err(InjectError::Refused { refusal: Refusal::WontStop { .. }, .. }) => false,
            other => panic!("{other:?}"),
        });
        for _ in 0..3 {
            let error = inject(target.pid(), &[Call::memory_merge(true)], &only).unwrap_err();
            assert!(matches!(error.refusal(), Some(Refusal::NoPlaceForCode { .. })), "{error:?}");
        }
        target.check();
        // When it has come back the slot is free, for it and for others.
        target.switch(true, Some("nanosleep"));
        target.switch(false, None);
    }
    target.check();
}

/// A child that runs in its parent's memory is injected into like others, while others inject into the parent: one of
/// them at a time.
#[test]
fn children_in_their_parents_memory() {
    let mut target = Target::start(&["vfork", "nanosleep", "epoll_timed"]);
    let (pid, forks) = (target.pid(), target.tid("vfork"));
    let mut met = 0;
    std::thread::scope(|scope| {
        let others = scope.spawn(move || {
            for round in 0..1000 {
                let done = inject(pid, &[Call::memory_merge(round % 2 == 0)], &Options::default()).unwrap();
                assert_eq!(done.results, [Ok(0)]);
            }
        });
        while !others.is_finished() {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{forks}/children")).unwrap();
            let Ok(child) = children.trim().parse().map(Pid) else { continue };
            match inject(child, &[Call::getpid()], &Options::default()) {
                Ok(done) => assert_eq!(done.results, [Ok(child.0 as u64)]),
                Err(InjectError::Refused { refusal: Refusal::Gone | Refusal::Zombie, .. }) => {}
                Err(error) => panic!("{error:?}"),
            }
            met += 1;
        }
        others.join().unwrap();
    });
    println!("{met} children met");
    assert!(met > 0);
    target.check();
}

/// Nothing is run in a frozen cgroup, and a process that is frozen meanwhile goes on when it is thawed.
#[test]
fn frozen_groups() {
    let Some(group) = Group::make() else { return };
    let mut target = Target::start(&["nanosleep", "compute", "read"]);
    let pid = target.pid();
    fs::write(group.0.join("cgroup.procs"), pid.to_string()).unwrap();
    for round in 0..40 {
        std::thread::scope(|scope| {
            let options = Options { timeout: Duration::from_millis(300), ..Options::default() };
            let injections = scope.spawn(move || {
                loop {
                    if let Err(error) = inject(pid, &[Call::memory_merge(true)], &options) {
                        return error;
                    }
                }
            });
            std::thread::sleep(Duration::from_micros(3000 + 137 * round));
            group.freeze(true);
            match injections.join().unwrap() {
                InjectError::Refused { refusal: Refusal::Frozen | Refusal::WontStop { .. }, .. } => {}
                InjectError::Unfinished { .. } => {}
                other => panic!("{other:?}"),
            }
        });
        wait_until("frozen", || membership::is_frozen(pid).unwrap());
        let options = Options { timeout: Duration::from_millis(100), ..Options::default() };
        let error = inject(pid, &[Call::memory_merge(true)], &options).unwrap_err();
        assert_eq!(error.refusal(), Some(&Refusal::Frozen));
        group.freeze(false);
        target.check();
    }
}

/// A cgroup of a test's own.
struct Group(PathBuf);

impl Group {
    /// `None` where there is no unified hierarchy, or no right to it.
    fn make() -> Option<Self> {
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
        let root = roots.iter().find(|root| Path::new(root).join("cgroup.controllers").exists());
        let group = root.map(|root| Path::new(root).join(format!("inject-test-{}", std::process::id())));
        match group.filter(|group| fs::create_dir(group).is_ok()) {
            Some(group) if group.join("cgroup.freeze").exists() => Some(Self(group)),
            other => {
                other.map(fs::remove_dir);
                println!("skipped: a cgroup that can be frozen");
                None
            }
        }
    }

    fn freeze(&self, on: bool) {
        fs::write(self.0.join("cgroup.freeze"), if on { "1" } else { "0" }).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.freeze(false);
        // The processes in it have ended, or are about to.
        wait_until("the group is empty", || fs::remove_dir(&self.0).is_ok());
    }
}

/// In another PID and mount namespace, with numbers of its own.
#[test]
fn other_namespaces() {
    let mut command = Command::new("unshare");
    command.args(["--fork", "--pid", "--mount-proc", "--kill-child"]).arg(harness::program());
    if !rustix::process::geteuid().is_root() {
        println!("skipped: root");
        return;
    }
    let target = Target::of(command, &["nanosleep", "epoll_timed"]);
    let inner = fs::read_to_string(format!("/proc/{0}/task/{0}/children", target.pid())).unwrap();
    let inner = Pid(inner.trim().parse().unwrap());
    for round in 0..100 {
        let done = inject(inner, &[Call::memory_merge(round % 2 == 1), Call::getpid()], &Options::default()).unwrap();
        assert_eq!(done.results, [Ok(0), Ok(1)]);
    }
    let stat = fs::read_to_string(format!("/proc/{inner}/ksm_stat")).unwrap();
    assert!(stat.contains("ksm_merge_any: yes"), "{stat}");
}
