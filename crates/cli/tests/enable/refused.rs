//! Who is left alone, and that it is said why.

use std::process::{Command, Stdio};
use std::time::Duration;

use kernel::{Pid, Pidfd, Signal};

use crate::stand::{Cgroup, Host, Running, pagefold};

fn send(pid: Pid, signal: Signal) {
    Pidfd::open(pid).unwrap().send_signal(signal).unwrap();
}

#[test]
fn each_with_its_reason_and_one_does_not_keep_the_others_from_it() {
    let target = Running::python("serve()");
    let stopped = Running::python("serve()");
    send(stopped.pid(), Signal::STOP);
    std::thread::sleep(Duration::from_millis(50));
    let mut zombie = Command::new("true").stdin(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    let zombie_pid = Pid(zombie.id().cast_signed());
    let (kernel_thread, nobody) = (Pid(2), Pid(4_194_303));
    let numbers: Vec<String> =
        [target.pid(), stopped.pid(), zombie_pid, kernel_thread, nobody].map(|pid| pid.to_string()).into();
    let arguments: Vec<&str> = std::iter::once("enable").chain(numbers.iter().map(String::as_str)).collect();
    let said = pagefold(&arguments);
    send(stopped.pid(), Signal::CONT);
    zombie.wait().unwrap();
    assert_eq!((said.status, said.outcome(target.pid())), (Some(1), "done"), "{said:?}");
    assert_eq!(said.reason(stopped.pid()), "stopped");
    assert!(!stopped.is_on(), "nothing was done to it");
    assert_eq!((said.reason(zombie_pid), said.outcome(nobody)), ("zombie", "ended"));
    if rustix::process::geteuid().is_root() {
        assert_eq!(said.reason(kernel_thread), "kernel_thread");
    }
    assert!(said.detail(stopped.pid()).contains("SIGCONT"), "the way out: {said:?}");
}

#[test]
fn a_thread_is_not_taken_for_a_process() {
    let mut target = Running::python("import threading\nserve()");
    let thread = target.ask(
        "kept.append(threading.Event()) or threading.Thread(target=kept[0].wait, daemon=True).start() \
         or max(map(int, os.listdir('/proc/self/task')))",
    );
    let said = pagefold(&["enable", &thread]);
    assert_eq!((said.status, said.reason(Pid(thread.parse().unwrap()))), (Some(1), "thread"), "{said:?}");
    let named = said.detail(Pid(thread.parse().unwrap()));
    assert!(named.contains(&format!("process {}", target.pid())), "{said:?}");
    assert!(!target.is_on());
}

#[test]
fn no_time_at_all_is_a_mistake() {
    for time in ["0", "-1", "nan"] {
        let said = pagefold(&["enable", "1", "--timeout", time]);
        assert!(said.status == Some(2) && said.notes.contains("more than 0"), "{said:?}");
    }
}

/// Without a descriptor to be had it is this process that lacks something, and nobody else is blamed.
#[test]
fn what_is_lacking_here_is_said_so() {
    let target = Running::python("serve()");
    for limit in 5..12 {
        let script = format!("ulimit -n {limit}; exec \"$0\" enable {} --timeout 1 --json", target.pid());
        let mut command = Command::new("sh");
        let said = crate::stand::said(command.args(["-c", &script, env!("CARGO_BIN_EXE_pagefold")]));
        let reason = said.reason(target.pid());
        assert!(said.status == Some(0) || reason == "lacking", "{limit} descriptors: {said:?}");
        let named = said.status == Some(0) || said.detail(target.pid()).contains("os error 24");
        assert!(named, "{limit} descriptors: {said:?}");
    }
}

/// Nor a thread.
#[test]
fn no_thread_to_be_had_is_no_panic() {
    let Some(group) = Cgroup::new(&["/sys/fs/cgroup/pids"], "few") else { return };
    let target = Running::python("serve()");
    let script = "echo 1 > \"$1/pids.max\"; echo $$ > \"$1/cgroup.procs\"; exec \"$0\" enable \"$2\" --timeout 0.2";
    let mut command = Command::new("sh");
    command.args(["-c", script, env!("CARGO_BIN_EXE_pagefold"), group.text(), &target.text()]);
    let said = crate::stand::said(&mut command);
    assert_eq!(said.status, Some(1), "{said:?}");
    assert!(said.notes.contains("no thread can be started"), "{}", said.notes);
}

#[test]
fn one_that_is_traced_says_by_whom() {
    let target = Running::python("serve()");
    let script = format!("assert libc.ptrace(0x4206, {}, 0, 0) == 0\nserve()", target.pid());
    let tracer = Running::python(&format!("libc = ctypes.CDLL(None)\n{script}"));
    let said = pagefold(&["enable", &target.text(), "--timeout", "0.5"]);
    assert_eq!((said.status, said.reason(target.pid())), (Some(1), "traced"), "{said:?}");
    assert!(said.detail(target.pid()).contains(&tracer.text()), "{said:?}");
    assert!(!target.is_on());
}

#[test]
fn holders_of_secrets_only_if_asked_for_twice() {
    let folder = tempfile::tempdir().unwrap();
    let agent = folder.path().join("ssh-agent");
    testing::copy_program("/bin/sleep", &agent);
    let target = Running::start(Command::new(&agent).arg("60"));
    let began = std::time::Instant::now();
    while kernel::program::program(target.pid()).map(|found| found.path).ok() != agent.canonicalize().ok() {
        assert!(began.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(5));
    }
    let said = pagefold(&["enable", &target.text()]);
    assert_eq!((said.status, said.reason(target.pid())), (Some(1), "never_merge"), "{said:?}");
    assert!(!target.is_on() && said.detail(target.pid()).contains("--ignore-never-merge"));
    assert_eq!(pagefold(&["enable", &target.text(), "--ignore-never-merge"]).outcome(target.pid()), "done");
    // The way back is open to all.
    assert_eq!(pagefold(&["disable", &target.text()]).outcome(target.pid()), "done");
}

#[test]
fn names_that_lead_to_nobody() {
    let said = pagefold(&["enable", "--cgroup", "no/such/group"]);
    assert_eq!(said.status, Some(1));
    let error = said.document["error"].as_str().unwrap();
    assert!(error.contains("no cgroup no/such/group") && said.notes.contains(error), "{said:?}");
    let Some(group) = Cgroup::new(&crate::stand::V2, "empty") else { return };
    let said = pagefold(&["enable", "--cgroup", group.text()]);
    assert!(said.status == Some(1) && said.notes.contains("no process is in cgroup"), "{}", said.notes);
}

/// Copies of all merged pages, in a group that has not so much left.
#[test]
fn unmerging_is_weighed_against_the_memory_there_is() {
    let Some(group) = Cgroup::new(&["/sys/fs/cgroup/memory"], "short") else { return };
    let Some(host) = Host::busy() else { return };
    let mut target = Running::python("serve()");
    group.add(target.pid());
    target.ask("area(16384)");
    assert_eq!(pagefold(&["enable", &target.text(), "--vma", "anon"]).outcome(target.pid()), "done");
    host.passes(4);
    let merged = kernel::smaps::rollup(target.pid()).unwrap().ksm.get();
    assert!(merged > 60 << 20, "{merged} bytes merged");
    let limit = |mib: u64| std::fs::write(group.0.join("memory.limit_in_bytes"), (mib << 20).to_string()).unwrap();
    limit(50);
    let said = pagefold(&["disable", &target.text()]);
    assert_eq!((said.status, said.reason(target.pid())), (Some(1), "no_memory"), "{said:?}");
    let detail = said.detail(target.pid());
    assert!(detail.contains("memory.limit_in_bytes would leave") && detail.contains("--force"), "{detail}");
    assert_eq!(kernel::smaps::rollup(target.pid()).unwrap().ksm.get(), merged, "all or nothing");
    limit(1000);
    assert_eq!(pagefold(&["disable", &target.text()]).outcome(target.pid()), "done");
    assert_eq!(kernel::smaps::rollup(target.pid()).unwrap().ksm.get(), 0);
    assert_eq!(target.ask("kept[0][0:1] + kept[0][-4096:-4095]"), "b'xx'");
}

/// Whatever pagefold is killed in: the program goes on, and the next call does what is left.
#[test]
fn killed_at_random() {
    let mut target = Running::python("serve()");
    for round in 0_u64..60 {
        let action = if round % 2 == 0 { "enable" } else { "disable" };
        let mut command = Command::new(env!("CARGO_BIN_EXE_pagefold"));
        command.args([action, &target.text(), "--exclude", "heap", "--quiet"]).stdin(Stdio::null());
        let mut child = command.spawn().unwrap();
        std::thread::sleep(Duration::from_micros(1000 + 977 * round % 13_000));
        let _ = child.kill();
        child.wait().unwrap();
        assert_eq!(target.ask(&format!("{round} + 1")), (round + 1).to_string());
    }
    assert!(pagefold(&["enable", &target.text()]).of(target.pid())["outcome"] != "refused");
    assert!(target.is_on());
    assert_eq!(pagefold(&["disable", &target.text()]).status, Some(0));
    assert!(target.marked().is_empty());
}

/// As many mappings as a process may have, so that no further one can be split: seen to
/// end with "Resource temporarily unavailable" and no more.
#[test]
fn too_many_mappings_are_named_with_the_way_out() {
    let most = kernel::maps::max_map_count();
    if most > 200_000 {
        println!("skipped: vm.max_map_count is too large to be reached here");
        return;
    }
    let mut target = Running::python(CROWDED);
    let area = u64::from_str_radix(&target.ask("area(64)"), 16).unwrap();
    target.ask("crowd()");
    let page = kernel::page_size();
    let part = format!("{:x}-{:x}", area + 8 * page, area + 16 * page);
    let said = pagefold(&["enable", &target.text(), "--vma", &part]);
    assert_eq!((said.status, said.reason(target.pid())), (Some(1), "too_many_mappings"), "{said:?}");
    let detail = said.detail(target.pid());
    assert!(
        detail.contains(&format!("vm.max_map_count={}", 2 * most)) && detail.contains("whole mappings"),
        "{detail}"
    );
    // The way out without a change of the host.
    let whole = format!("{area:x}-{:x}", area + 64 * page);
    assert_eq!(pagefold(&["enable", &target.text(), "--vma", &whole]).outcome(target.pid()), "done");
}

/// `crowd` makes mappings until the kernel refuses.
const CROWDED: &str = r"
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
def crowd():
    size = mmap.PAGESIZE
    start = libc.mmap(None, (1 << 18) * size, 1, 0x4022, -1, 0)
    at = start + size
    while libc.mprotect(at, size, 3) == 0: at += 2 * size
    while libc.mprotect(at, size, 0) == 0: at += 2 * size
    return (at - start) // size
serve()
";
