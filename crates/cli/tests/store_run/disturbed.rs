//! Programs that the agent would do harm to: of musl, with AddressSanitizer, under valgrind. They run as if nothing had been
//! there.

use super::elsewhere::{runs_alike, streams};
use super::*;

/// Says whether the agent's name has come to it.
const TELLS: &str = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n\
    int main(void) { char *own = getenv(\"LD_PRELOAD\"); \
    puts(getenv(\"PAGEFOLD_AGENT\") || (own && strstr(own, \"agent.so\")) ? \"named\" : \"bare\"); return 0; }";

/// False, said, if a tool is missing.
fn has(tool: &str, package: &str) -> bool {
    let there = Command::new(tool).arg("--version").output().is_ok();
    if !there {
        println!("skipped: no {tool} ({package})");
    }
    there
}

/// Seen to fail: the program died in the agent's constructor, to which the loader of musl passes nothing.
#[test]
fn programs_of_musl() {
    if !can_merge() || !has("musl-gcc", "musl-tools") {
        return;
    }
    let temp = Temp::new("musl");
    let (code, program, folder) = (temp.join("tells.c"), temp.join("tells"), temp.join(""));
    fs::write(&code, TELLS).unwrap();
    let done = Command::new("musl-gcc").args(["-o", &program, &code]).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
    runs_alike(&folder, "\"$0/tells\"", "bare\n");
    let run = output(&["--scope", "all"], &[&program]);
    assert_eq!((run.status.code(), text(&run.stdout)), (Some(0), "bare\n".to_owned()), "{}", said(&run));
    assert!(said(&run).contains("linked against musl"), "{}", said(&run));
    // A static shell has no gate, and passes on all that it has.
    if has("busybox", "busybox-static") {
        runs_alike(&folder, "busybox sh -c '\"$0/tells\"; busybox env | grep -c AGENT=' \"$0\"", "named\n1\n");
    }
}

/// Seen to fail: `ASan runtime does not come first in initial library list`, since the agent did.
#[test]
fn programs_with_address_sanitizer() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("asan");
    let (program, folder) = (temp.join("tells"), temp.join(""));
    let Some(_) = temp.compile("tells", TELLS, &["-fsanitize=address"]) else { return };
    runs_alike(&folder, "\"$0/tells\"", "bare\n");
    testing::write_program(temp.join("script"), format!("#! {program}\n"));
    fs::set_permissions(temp.join("script"), Permissions::from_mode(0o755)).unwrap();
    // By the shell's vfork, by exec, by posix_spawn, and as the interpreter of a script.
    runs_alike(&folder, "\"$0/script\"; exec \"$0/tells\"", "bare\nbare\n");
    let spawn = "import os; os.posix_spawn(os.sys.argv[1], [\"x\"], os.environ); os.wait()";
    runs_alike(&folder, &format!("{PYTHON} -c '{spawn}' \"$0/tells\""), "bare\n");
    let run = output(&["--scope", "all"], &[&program]);
    assert_eq!((run.status.code(), text(&run.stdout)), (Some(0), "bare\n".to_owned()), "{}", said(&run));
    assert!(said(&run).contains("AddressSanitizer"), "{}", said(&run));
    let told = Command::new(PAGEFOLD).args(["doctor", "--proof", &program]).output().unwrap();
    assert!(text(&told.stdout).contains("built with AddressSanitizer"), "{}", text(&told.stdout));
}

/// Seen to fail: valgrind found errors, which the agent had made, and so its own status came out.
#[test]
fn programs_under_valgrind() {
    if !can_merge() || !has("valgrind", "valgrind") {
        return;
    }
    let temp = Temp::new("valgrind");
    let folder = temp.join("");
    let errors = "valgrind -q --error-exitcode=9 /bin/true; echo $?";
    runs_alike(&folder, errors, "0\n");
    let run = output(&["--scope", "all", "--quiet"], &["valgrind", "-q", "--error-exitcode=9", "/bin/true"]);
    assert_eq!((run.status.code(), said(&run)), (Some(0), String::new()));
    // What a program under valgrind executes without it has its agent again.
    let (status, out, _) =
        streams(&folder, "valgrind -q sh -c 'grep -c agent.so /proc/self/maps >/dev/null && echo there'");
    assert_eq!((status, out.as_str()), (Some(0), "there\n"));
}
