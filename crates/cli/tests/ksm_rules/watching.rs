//! Rules are kept for as long as somebody watches.

use std::process::Command;

use kernel::{Pid, Signal};

use crate::stand::{Running, Stand, Undone, Watching, document, is_mergeable, lock, rules, said, until};

const WORKERS: &str = "[[rule]]\nmatch = { exe = \"DIR/worker\" }\naction = \"enable\"\n";
const ALL: &str = "[[rule]]\nmatch = { exe = \"DIR/*\" }\naction = \"enable\"\n";

#[test]
fn what_is_started_later_is_enabled_and_left_so_at_the_end() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let first = stand.sleeper("worker");
    let watching = Watching::start(&stand, &stand.write(WORKERS), &["--json"]);
    assert!(first.is_mergeable());
    let second = stand.sleeper("worker");
    until("the second one is enabled", || second.is_mergeable().then_some(()));
    // Nobody else may keep rules meanwhile.
    let other = rules(&["apply", &stand.write(WORKERS)]);
    assert_eq!(other.status.code(), Some(1));
    assert!(said(&other).contains("another pagefold ksm rules is at work (process "), "{}", said(&other));
    watching.says(&format!("enabled {} (worker)", second.pid()));
    let (code, printed) = watching.end(Signal::INT);
    let document: serde_json::Value = serde_json::from_str(&printed).unwrap();
    assert_eq!((code, &document["enabled"]), (Some(0), &2.into()));
    assert!(document["looks"].as_u64().unwrap() > 1 && document["cpu_seconds"].as_f64().unwrap() > 0.0);
    assert!(first.is_mergeable() && second.is_mergeable());
}

#[test]
fn with_undo_all_is_disabled_at_the_end() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let (worker, marked) = (stand.sleeper("worker"), stand.sleeper("worker"));
    marked.set(true);
    let watching = Watching::start(&stand, &stand.write(WORKERS), &["--undo"]);
    assert!(worker.is_mergeable());
    assert_eq!(watching.end(Signal::TERM).0, Some(0));
    assert!(!worker.is_mergeable() && marked.is_mergeable(), "only what it has enabled itself");
}

/// Killed in whatever moment: what it has done is on record.
#[test]
fn what_a_killed_one_has_enabled_can_be_undone() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let workers: Vec<Running> = (0..8).map(|_| stand.sleeper("worker")).collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_pagefold"));
    command.args(["ksm", "rules", "apply", &stand.write(WORKERS), "--watch", "0.1", "--quiet"]);
    let mut watching = command.spawn().unwrap();
    until("one is enabled", || workers.iter().any(Running::is_mergeable).then_some(()));
    watching.kill().unwrap();
    watching.wait().unwrap();
    assert_eq!(document(&["undo", "--json"])["refused"], 0);
    assert!(!workers.iter().any(Running::is_mergeable));
}

/// A shell that a rule enables becomes an agent of keys.
#[test]
fn a_process_that_becomes_a_secret_is_disabled() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let (shell, agent) = (stand.copy("/bin/sh", "shell"), stand.copy("/usr/bin/sleep", "ssh-agent"));
    let script = format!("read line; exec {} 600", agent.display());
    let mut process = Running::start(Command::new(shell).args(["-c", &script]), "shell");
    let watching = Watching::start(&stand, &stand.write(ALL), &[]);
    assert!(process.is_mergeable());
    use std::io::Write as _;
    writeln!(process.0.stdin.as_mut().unwrap()).unwrap();
    until("it is the agent", || (kernel::status::read(process.pid()).unwrap().name == "ssh-agent").then_some(()));
    until("it is disabled", || (!process.is_mergeable()).then_some(()));
    watching.says(&format!("disabled {} (ssh-agent): never-merge list, key agents", process.pid()));
    watching.end(Signal::INT);
}

#[test]
fn a_file_is_read_again_on_demand_and_a_broken_one_changes_nothing() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let (worker, other) = (stand.sleeper("worker"), stand.sleeper("other"));
    let watching = Watching::start(&stand, &stand.write(WORKERS), &[]);
    assert!(worker.is_mergeable() && !other.is_mergeable());

    stand.write("[[rule]]\nmatch = { exxe = \"DIR/other\" }\naction = \"enable\"\n");
    watching.says("rules.toml has changed; kill -HUP ");
    watching.signal(Signal::HUP);
    watching.says("rules.toml:3:11: unknown key `exxe`");
    watching.says("the rules that were read before stay in force");
    let third = stand.sleeper("worker");
    until("the old rules go on", || third.is_mergeable().then_some(()));

    stand.write(
        "[[rule]]\nmatch = { exe = \"DIR/other\" }\naction = \"enable\"\n\
         [[rule]]\nmatch = { exe = \"DIR/worker\" }\naction = \"disable\"\n",
    );
    assert!(!other.is_mergeable(), "not before it is told so");
    watching.signal(Signal::HUP);
    until("the new rules hold", || {
        (other.is_mergeable() && !worker.is_mergeable() && !third.is_mergeable()).then_some(())
    });
    std::fs::remove_file(stand.folder().join("rules.toml")).unwrap();
    watching.signal(Signal::HUP);
    watching.says("cannot read ");
    assert_eq!(watching.end(Signal::INT).0, Some(0));
    assert!(other.is_mergeable());
}

/// Workers come and go, and each of them starts others: nobody is left out for longer than a look.
#[test]
fn a_server_that_forks_all_the_time() {
    let Some(_lock) = lock() else { return };
    let _undone = Undone;
    let stand = Stand::new();
    let shell = stand.copy("/bin/sh", "shell");
    let script = "while :; do sh -c 'sleep 0.05' & sleep 0.02; done";
    let server = Running::start(Command::new(shell).args(["-c", script]), "shell");
    let watching = Watching::start(&stand, &stand.write(ALL), &["--undo"]);
    until("the server is enabled", || server.is_mergeable().then_some(()));
    let children = || {
        let children =
            std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", server.pid())).unwrap_or_default();
        children.split_whitespace().filter_map(|pid| pid.parse().ok()).map(Pid).collect::<Vec<_>>()
    };
    until("its children are as it is", || {
        let children = children();
        (!children.is_empty() && children.iter().all(|pid| is_mergeable(*pid) || kernel::status::read(*pid).is_err()))
            .then_some(())
    });
    assert_eq!(watching.end(Signal::INT).0, Some(0));
    assert!(!server.is_mergeable());
}
