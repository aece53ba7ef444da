//! What is said: a line at the end, and the reason and the way out where nothing is merged.

use super::*;

#[test]
fn a_run_that_marked_nothing_says_so() {
    let run = output(&[], &["true"]);
    assert_eq!(said(&run).lines().count(), 1, "{}", said(&run));
    if Features::probe().live_merge().is_err() {
        return println!("skipped: live merging");
    }
    assert!(said(&run).contains("no process marked memory mergeable"), "{}", said(&run));
    assert!(said(&run).contains("network namespace"), "{}", said(&run));
    assert_eq!(said(&output(&["--quiet"], &["true"])), "");
}

#[test]
fn programs_that_cannot_be_managed_run_and_the_reason_is_named() {
    let temp = Temp::new("unmanaged");
    let main = "int main(void) { return 7; }";
    let expect = |program: &str, reason: &str| {
        let run = output(&[], &[program]);
        assert_eq!(run.status.code(), Some(7), "{program}: {}", said(&run));
        let said = said(&run);
        assert!(said.contains(&format!("the command runs unmanaged: {reason}")), "{said}");
        assert!(said.contains("--backend ksm"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    };
    if let Some(program) = temp.compile("static", main, &["-static"]) {
        expect(&program, "statically linked");
    }
    let go = format!(
        "{main}\n__asm__(\".section .note.go.buildid,\\\"a\\\",@note\\n.long 4,0,4\\n.asciz \\\"Go\\\"\\n.byte 0\\n.previous\");"
    );
    if let Some(program) = temp.compile("go", &go, &[]) {
        expect(&program, "a Go program");
    }
    if let Some(program) = temp.compile("setuid", main, &[])
        && is_root()
    {
        std::os::unix::fs::chown(&program, Some(65_534), None).unwrap();
        fs::set_permissions(&program, Permissions::from_mode(0o4755)).unwrap();
        expect(&program, "set-user-ID program");
    }
}

#[test]
fn a_run_inside_a_run_uses_the_outer_ones_partition() {
    if !can_merge() {
        return;
    }
    let program = format!("{MARKS}\nmerged()\nright()\ntime.sleep(0.3)");
    let inner = [PAGEFOLD, "run", "--", PYTHON, "-c", &program];
    let run = output(&["--stable", "0.1"], &inner);
    assert!(run.status.success(), "{}", said(&run));
    let said = said(&run);
    assert!(said.contains("inside a pagefold run already"), "{said}");
    assert!(said.contains("pages merged in 1 processes"), "{said}");
    assert_eq!(said.lines().count(), 2, "{said}");
}

/// What a run that has ended leaves in the environment of those who go on.
#[test]
fn a_run_after_a_run_is_managed() {
    if !can_merge() {
        return;
    }
    let gone = "/run/pagefold-0000000000000000";
    let program = format!("{MARKS}\nmerged()\nright()\nassert '{gone}' not in os.environ['LD_PRELOAD']");
    let mut run = run_with(&["--stable", "0.1"], &[PYTHON, "-c", &program]);
    run.env("PAGEFOLD_AGENT", format!("pagefold-gone:{:032x}:{gone}/sites", 7));
    let run = run.env("LD_PRELOAD", format!("{gone}/agent.so")).output().unwrap();
    assert!(run.status.success(), "{}", said(&run));
    assert!(said(&run).contains("pages merged in 1 processes"), "{}", said(&run));
}

#[test]
fn where_the_agent_cannot_be_written_the_way_out_is_named() {
    if !can_merge() || !is_root() {
        return;
    }
    let hide =
        "for at in /run /tmp; do mount -t tmpfs -o ro none $at || exit 1; done; exec \"$0\" run -- sh -c 'exit 7'";
    let mut run = Command::new("unshare");
    run.args(["--mount", "sh", "-c", hide, PAGEFOLD]).env_remove("TMPDIR").env_remove("XDG_RUNTIME_DIR");
    let run = run.output().unwrap();
    assert_eq!(run.status.code(), Some(7), "{}", said(&run));
    assert!(said(&run).contains("cannot write the agent") && said(&run).contains("TMPDIR"), "{}", said(&run));
}
