//! One process with thousands of mappings: what is to be done to it can be broken off, and takes few calls where it can.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kernel::{Pid, Pidfd, Signal};
use serde_json::Value;

use crate::stand::{Running, pagefold};

/// Mappings of a page each, with holes between them, or side by side where every second one cannot be written to.
fn with_mappings(count: u32, holes: bool) -> Running {
    let change = if holes { "libc.munmap(at, 4096)" } else { "libc.mprotect(at, 4096, 1)" };
    Running::python(&format!(
        r"
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
pages = 2 * {count} if {holes} else {count}
first = libc.mmap(None, ctypes.c_size_t(pages * 4096), 3, 0x22, -1, 0)
for at in range(first, first + pages * 4096, 8192):
    at = ctypes.c_void_p(at)
    {change}
serve()",
        holes = if holes { "True" } else { "False" },
    ))
}

#[test]
fn neighbours_are_unmarked_together() {
    let target = with_mappings(8000, false);
    let marked = pagefold(&["enable", &target.text(), "--vma", "anon"]);
    assert_eq!(marked.outcome(target.pid()), "done", "{marked:?}");
    assert!(marked.of(target.pid())["marks"]["marked_vmas"].as_u64().unwrap() > 8000);
    let said = pagefold(&["disable", &target.text()]);
    assert_eq!(said.outcome(target.pid()), "done", "{said:?}");
    assert!(said.of(target.pid())["injections"].as_u64().unwrap() < 20, "{said:?}");
    assert!(target.marked().is_empty());
}

#[test]
fn a_time_out_is_for_all_of_it_and_the_next_call_goes_on() {
    let target = with_mappings(6000, true);
    let said = pagefold(&["enable", &target.text(), "--vma", "anon", "--timeout", "0.05"]);
    assert_eq!((said.status, said.reason(target.pid())), (Some(1), "time_up"), "{said:?}");
    let done = said.of(target.pid())["marks"]["marked_vmas"].as_u64().unwrap();
    assert_eq!(done, target.marked().len() as u64, "what is said is how it is left");
    assert!((32..6000).contains(&done), "{done} are marked");
    let rest = pagefold(&["enable", &target.text(), "--vma", "anon"]);
    assert_eq!(rest.outcome(target.pid()), "done", "{rest:?}");
    assert!(target.marked().len() >= 6000);
}

#[test]
fn ctrl_c_ends_it_between_two_calls() {
    let target = with_mappings(20_000, true);
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagefold"));
    command.args(["enable", &target.text(), "--vma", "anon", "--json", "--quiet"]);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
    let pid = Pid(child.id().cast_signed());
    let began = Instant::now();
    let injects = |tid: &Pid| std::fs::read(format!("/proc/{tid}/comm")).is_ok_and(|comm| comm == b"inject\n");
    while !kernel::status::threads(pid).unwrap().iter().any(injects) {
        assert!(began.elapsed() < Duration::from_secs(10), "it does nothing");
    }
    Pidfd::open(pid).unwrap().send_signal(Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    let process = &document["processes"][0];
    assert_eq!((output.status.code(), &process["reason"]), (Some(1), &"broken_off".into()), "{document}");
    assert_eq!((&document["complete"], &document["incomplete"]), (&false.into(), &"it was broken off".into()));
    assert!(target.marked().len() < 20_000, "{document}");
}

/// A lock that somebody else holds is not waited for as long as he holds it, and said to be that.
#[test]
fn who_is_at_work_on_it_is_waited_for_a_moment() {
    let target = Running::python("serve()");
    let memory = std::fs::File::open(format!("/proc/{}/mem", target.pid())).unwrap();
    memory.lock().unwrap();
    let began = Instant::now();
    let said = pagefold(&["enable", &target.text()]);
    assert_eq!((said.status, said.reason(target.pid())), (Some(1), "busy"), "{said:?}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    let began = Instant::now();
    let said = pagefold(&["enable", &target.text(), "--vma", "heap", "--timeout", "0.5"]);
    assert_eq!((said.status, said.reason(target.pid())), (Some(1), "busy"), "{said:?}");
    assert!(said.detail(target.pid()).contains("another injector"), "{said:?}");
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
}
