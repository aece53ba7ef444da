//! Scarce descriptors, processes and files: the command runs, with the status that it would have had.

use super::*;

#[test]
fn few_descriptors_are_no_reason_not_to_run() {
    for limit in 8..40 {
        let run = after(&format!("ulimit -n {limit}"), &["sh", "-c", "exit 7"]);
        assert_eq!(run.status.code(), Some(7), "{limit}: {}", said(&run));
    }
    let run = after("ulimit -n 10", &["sh", "-c", "exit 7"]);
    assert!(said(&run).contains("unmanaged") && said(&run).contains("ulimit -n"), "{}", said(&run));
}

#[test]
fn the_command_has_the_limit_of_open_files_that_the_caller_has() {
    let run = after("ulimit -Sn 77", &["sh", "-c", "ulimit -Sn"]);
    assert_eq!(text(&run.stdout), "77\n");
}

#[test]
fn few_processes_are_no_reason_not_to_run() {
    if !is_root() {
        return;
    }
    let temp = Temp::new("processes");
    let program = temp.pagefold();
    // A user of nobody else's, who may have a userfaultfd. Each limit fails at another step.
    for limit in 2..8 {
        let user = ["--reuid=61233", "--regid=61233", "--clear-groups", "--inh-caps=-all,+sys_ptrace"];
        let mut run = Command::new("setpriv");
        run.args(user).args(["--ambient-caps=-all,+sys_ptrace", "--bounding-set=-sys_resource,-sys_admin"]);
        run.args(["prlimit", &format!("--nproc={limit}"), &program, "run", "--", "sh", "-c", "exit 7"]);
        let Ok(run) = run.output() else { return println!("skipped: no setpriv") };
        assert!(limit > 2 || said(&run).contains("Resource temporarily unavailable"), "{}", said(&run));
        assert_eq!(run.status.code(), Some(7), "{limit}: {}", said(&run));
        assert!(!said(&run).contains("panicked"), "{limit}: {}", said(&run));
    }
}

#[test]
fn a_file_size_limit_is_the_commands_own() {
    for limit in [0, 1, 64] {
        let run = after(&format!("ulimit -f {limit}"), &["sh", "-c", "ulimit -f; exit 7"]);
        assert_eq!(run.status.code(), Some(7), "{limit}: {}", said(&run));
        assert_eq!(text(&run.stdout), format!("{limit}\n"));
        assert!(said(&run).contains("unmanaged"), "{limit}: {}", said(&run));
    }
    // What pagefold itself cannot write ends nobody.
    let temp = Temp::new("file-size");
    let script = "ulimit -f 1; exec \"$0\" run --summary \"$1\" -- sh -c 'sleep 0.2; exit 7'";
    let run = Command::new("sh").args(["-c", script, PAGEFOLD, &temp.join("summary")]).output().unwrap();
    assert_eq!(run.status.code(), Some(7), "{}", said(&run));
    assert!(said(&run).contains("cannot write the summary"), "{}", said(&run));
    // Its signal too is the command's own.
    let file = temp.join("file");
    let run = after("ulimit -f 1", &["sh", "-c", "exec head -c 9999 /dev/zero > \"$0\"", &file]);
    assert_eq!(run.status.signal(), Some(Signal::XFSZ.as_raw()), "{}", said(&run));
}

/// Seen to fail: `memory allocation of 32 bytes failed` in the middle of the run, and status 134.
#[test]
fn little_address_space_ends_neither_the_run_nor_its_command() {
    if !can_merge() {
        return;
    }
    let member = format!("{MARKS}\ntime.sleep(4)\nright()");
    let crowd = "for n in $(seq 40); do \"$1\" -c \"$0\" & done; wait; exit 7";
    for limit in [150_000, 200_000] {
        let run = after(&format!("ulimit -v {limit}"), &["sh", "-c", crowd, &member, PYTHON]);
        assert_eq!(run.status.code(), Some(7), "{limit}: {}", said(&run));
        assert!(said(&run).contains("pages merged in "), "{limit}: {}", said(&run));
        for line in said(&run).lines().filter(|line| line.contains("left alone")) {
            assert!(line.contains("RLIMIT_AS"), "{limit}: {}", said(&run));
        }
        assert!(!said(&run).contains("Error") && !said(&run).contains("memory allocation"), "{}", said(&run));
    }
}

/// Seen to fail: `failed to spawn thread` in the guardian, which ended with all that it was to give back.
#[test]
fn little_address_space_does_not_end_the_guardian() {
    if !can_merge() {
        return;
    }
    let member = format!("{MARKS}\ntime.sleep(8)\nright()");
    let crowd = "for n in $(seq 60); do \"$1\" -c \"$0\" & done; sleep 6; kill -9 $PPID; wait";
    let run = after("ulimit -v 150000", &["sh", "-c", crowd, &member, PYTHON]);
    assert_eq!(run.status.signal(), Some(Signal::KILL.as_raw()), "{}", said(&run));
    assert_eq!(said(&run), "");
}

/// Seen to fail: a soft limit was the broker's own, and one in which no broker has room was not named.
#[test]
fn a_limit_of_address_space_is_the_commands_own() {
    let run = after("ulimit -Sv 150000", &["sh", "-c", "ulimit -Sv; grep 'Max address' /proc/$PPID/limits; exit 7"]);
    let answers = text(&run.stdout);
    assert_eq!((run.status.code(), answers.lines().next()), (Some(7), Some("150000")), "{}", said(&run));
    let words: Vec<&str> = answers.lines().nth(1).unwrap().split_whitespace().collect();
    assert_eq!(words[3], words[4], "soft and hard: {answers}");
    for limit in [20_000, 35_000, 50_000, 65_000] {
        let run = after(&format!("ulimit -v {limit}"), &["sh", "-c", "exit 7"]);
        assert_eq!(run.status.code(), Some(7), "{limit}: {}", said(&run));
        assert!(limit > 50_000 || said(&run).contains("RLIMIT_AS"), "{limit}: {}", said(&run));
    }
}

/// Seen to fail: `cannot set the stack limit of a new process` and status 125, with both backends.
#[test]
fn a_lowered_stack_limit_costs_a_run_inside_a_run_its_layout_only() {
    for backend in ["store", "ksm"] {
        if backend == "ksm" && !is_root() {
            return;
        }
        let inner = "ulimit -Hs 8192; exec \"$0\" run --layout shared --backend \"$1\" -- sh -c 'exit 4'";
        // Without KSM's settings, which are the whole host's.
        let hide = if backend == "ksm" { "mount -t tmpfs none /sys || exit 1; exec \"$@\"" } else { "exec \"$@\"" };
        let mut run = Command::new(if backend == "ksm" { "unshare" } else { "env" });
        if backend == "ksm" {
            run.arg("--mount");
        }
        run.args(["sh", "-c", hide, "sh", PAGEFOLD, "run", "--layout", "shared", "--backend", backend, "--"]);
        let run = run.args(["sh", "-c", inner, PAGEFOLD, backend]).output().unwrap();
        assert_eq!(run.status.code(), Some(4), "{backend}: {}", said(&run));
        assert!(said(&run).contains("no shared layout: the hard stack limit"), "{backend}: {}", said(&run));
    }
}

#[test]
fn without_proc_the_command_runs() {
    if !is_root() {
        return;
    }
    for (backend, expected) in [("store", "/proc"), ("ksm", "ksmd is not driven")] {
        let hide = "mount -t tmpfs none /proc && exec \"$0\" run --backend $1 -- sh -c 'exit 7'";
        let run = Command::new("unshare").args(["--mount", "sh", "-c", hide, PAGEFOLD, backend]).output().unwrap();
        assert_eq!(run.status.code(), Some(7), "{backend}: {}", said(&run));
        assert!(said(&run).contains(expected), "{backend}: {}", said(&run));
        assert!(!said(&run).contains("process 1 is gone") && !said(&run).contains("is missing: process"));
    }
}

/// Seen to fail: the store merged nothing and did not say why, and KSM was driven for a process that was not there.
#[test]
fn with_the_proc_of_another_namespace_the_command_runs() {
    if !is_root() {
        return;
    }
    for backend in ["store", "ksm"] {
        let mut run = Command::new("unshare");
        run.args(["--pid", "--fork", PAGEFOLD, "run", "--backend", backend, "--", "sh", "-c", "exit 7"]);
        let run = run.output().unwrap();
        assert_eq!(run.status.code(), Some(7), "{backend}: {}", said(&run));
        let said = said(&run);
        assert!(said.contains("belongs to another PID namespace") && said.contains("mount -t proc"), "{said}");
        assert_eq!(said.contains("runs unmanaged"), backend == "store", "{said}");
        assert!(!said.contains("--backend ksm"), "{said}");
    }
}

/// Seen to fail: `can merging memory at rest` and `can driving kernel KSM` without a /proc, and a check that was not there.
#[test]
fn the_doctor_names_what_is_missing_and_which_check_there_is() {
    if !is_root() {
        return;
    }
    let doctor = "mount -t tmpfs none /proc && exec \"$0\" doctor";
    let blind = text(&Command::new("unshare").args(["--mount", "sh", "-c", doctor, PAGEFOLD]).output().unwrap().stdout);
    for what in ["merging live", "merging memory at rest", "driving kernel KSM"] {
        let line = blind.lines().find(|line| line.contains(what)).unwrap();
        assert!(line.contains("can't") && line.contains("it is not mounted; mount -t proc"), "{line}");
    }
    let temp = Temp::new("doctor");
    let mut doctor = Command::new("setpriv");
    doctor.args(["--reuid=65534", "--regid=65534", "--clear-groups", &temp.pagefold(), "doctor"]);
    let Ok(found) = doctor.current_dir("/").output() else { return println!("skipped: no setpriv") };
    let found = text(&found.stdout);
    let line = found.lines().find(|line| line.contains("exact reference check")).unwrap();
    assert!(line.contains("can't") || line.contains("(by MADV_COLLAPSE)"), "{found}");
}

/// C3: with a userfaultfd for user mode only, system calls that touch a frozen page would fail. Without a full one
/// nothing is frozen.
#[test]
fn c3_without_a_full_userfaultfd_the_command_runs_and_the_grant_is_named() {
    if !is_root() {
        return;
    }
    if fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd").is_ok_and(|now| now.trim() == "1") {
        return println!("skipped: everybody may have a userfaultfd here");
    }
    let temp = Temp::new("nobody");
    let program = temp.pagefold();
    let marks = format!("{MARKS}\ntime.sleep(0.5)\nright()\nassert 'pagefold' not in open('/proc/self/maps').read()");
    let mut run = Command::new("setpriv");
    run.args(["--reuid=65534", "--regid=65534", "--clear-groups", &program, "run", "--stable", "0.1", "--"]);
    let Ok(run) = run.args([PYTHON, "-c", &marks]).current_dir("/").output() else {
        return println!("skipped: no setpriv");
    };
    assert!(run.status.success(), "{}", said(&run));
    let said = said(&run);
    assert!(said.contains("runs unmanaged: userfaultfd is missing"), "{said}");
    assert!(said.contains("way out: access to /dev/userfaultfd"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
}
