//! Other users, and other namespaces.

use std::process::Command;

use crate::stand::{Running, pagefold, said};

/// This test binary's program as user nobody, who must be able to reach it.
fn as_nobody(arguments: &[&str]) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", env!("CARGO_BIN_EXE_pagefold")]);
    command.args(arguments).arg("--json");
    command
}

#[test]
fn users_enable_what_is_theirs() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: root, to be somebody else");
        return;
    }
    let script = "import time, sys; print('here', flush=True); sys.stdin.read()";
    let mut own = Running::start(Command::new("setpriv").args([
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "/usr/bin/python3",
        "-c",
        script,
    ]));
    assert_eq!(own.line(), "here");
    let theirs = Running::python("serve()");
    let answer = said(&mut as_nobody(&["enable", &own.text()]));
    assert_eq!((answer.status, answer.outcome(own.pid())), (Some(0), "done"), "{answer:?}");
    assert!(own.is_on());
    let answer = said(&mut as_nobody(&["enable", &theirs.text()]));
    assert_eq!((answer.status, answer.reason(theirs.pid())), (Some(3), "not_permitted"), "{answer:?}");
    assert!(!theirs.is_on() && answer.detail(theirs.pid()).contains("CAP_SYS_PTRACE"), "{answer:?}");
    let answer = said(&mut as_nobody(&["disable", &own.text(), &theirs.text()]));
    assert_eq!((answer.status, answer.outcome(own.pid())), (Some(1), "done"), "some were done: {answer:?}");
}

#[test]
fn processes_of_other_namespaces() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: root, to make namespaces");
        return;
    }
    let script = "echo here; read line; echo $((40 + 2)); read line";
    let mut unshare = Command::new("unshare");
    unshare.args(["--pid", "--mount", "--net", "--ipc", "--uts", "--fork", "--mount-proc", "sh", "-c", script]);
    let mut target = Running::start(&mut unshare);
    assert_eq!(target.line(), "here");
    let answer = pagefold(&["enable", &target.text(), "--children"]);
    assert_eq!(answer.status, Some(0), "{answer:?}");
    let inside =
        answer.document["processes"].as_array().unwrap().iter().find(|process| process["comm"] == "sh").unwrap();
    let pid = kernel::Pid(i32::try_from(inside["pid"].as_i64().unwrap()).unwrap());
    assert_eq!(kernel::status::namespaces_below(pid).unwrap(), 1);
    assert_eq!(kernel::ksm_sysfs::ksm_stat(pid).unwrap().ksm_merge_any, Some(true));
    assert_eq!(target.ask("on"), "42");
    // In a namespace whose /proc is the host's, numbers are somebody else's.
    let mut command = Command::new("unshare");
    let program = env!("CARGO_BIN_EXE_pagefold");
    let answer = said(command.args(["--pid", "--fork", program, "enable", &target.text(), "--json"]));
    assert_eq!(answer.status, Some(3), "{answer:?}");
    assert!(answer.notes.contains("--mount-proc"), "{}", answer.notes);
}
