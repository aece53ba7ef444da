//! Programs that the agent would do harm to: of musl, with AddressSanitizer, under valgrind. They run as if nothing had been
//! there.

use super::elsewhere::runs_alike;
use super::*;

/// Says whether the agent's name has come to it.
const TELLS: &str = "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>\n\
    int main(void) { char *own = getenv(\"LD_PRELOAD\"); \
    puts(getenv(\"PAGEFOLD_AGENT\") || (own && strstr(own, \"agent.so\")) ? \"named\" : \"bare\"); return 0; }";

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
