//! `--scope all`: programs that mark nothing.

use super::*;

/// Holds what its twins hold, reads it when it is told to, and says whether it is what it must be.
const HOLDS: &str = r"
import hashlib, random, sys, time
data = {n: ('key %d' % n, [n] * 8) for n in range(60000)}
block = bytearray(random.Random(7).randbytes(8 << 20))
digest = hashlib.sha256(block).digest()
deadline = time.monotonic() + float(sys.argv[1])
while time.monotonic() < deadline:
    time.sleep(0.05)
assert sum(len(value[1]) for value in data.values()) == 480000
assert hashlib.sha256(block).digest() == digest
block[:4096] = bytes(4096)
del data
print('right')
";

fn summary(file: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

#[test]
fn workers_that_mark_nothing_are_merged_whole() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("whole");
    let file = temp.join("summary");
    let options = ["--scope", "all", "--layout", "shared", "--stable", "0.5", "--summary", &file];
    let script = "for n in 1 2 3; do \"$0\" -c \"$1\" 8 & done; wait";
    let mut run = run_with(&options, &["bash", "-c", script, PYTHON, HOLDS]);
    let run = run.env("PYTHONHASHSEED", "0").output().unwrap();
    assert_eq!((run.status.code(), text(&run.stdout).as_str()), (Some(0), "right\nright\nright\n"), "{}", said(&run));
    let summary = summary(&file);
    assert!(summary["processes_ever"].as_u64().unwrap() >= 3, "{summary:#}");
    // Of three equal ones two are saved: 16 MiB of the blocks alone.
    assert!(summary["bytes_saved_peak"].as_u64().unwrap() > 16 << 20, "{summary:#}");
}

/// A program that changes its mappings by its own system calls, and checks that it gets what it asked for.
const RAW: &str = r#"
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <sys/mman.h>
static long raw(long n, long a, long b, long c) {
    long r;
    __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return r;
}
int main(void) {
    size_t size = 16 << 20;
    char *p = mmap(0, size, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(p, 7, size);
    for (time_t end = time(0) + 4; time(0) < end;) {
        raw(28, (long)p, 4096 * 16, 4); /* madvise, DONTNEED */
        for (int i = 0; i < 4096 * 16; i++) if (p[i]) return 1;
        memset(p, 7, 4096 * 16);
    }
    puts("raw");
    return 0;
}
"#;

#[test]
fn a_tree_of_all_kinds_runs_as_if_nothing_had_been() {
    if !can_merge() || !is_root() {
        return;
    }
    let temp = Temp::new("tree");
    let file = temp.join("summary");
    let Some(dangerous) = temp.compile("dangerous", RAW, &["-O1"]) else { return };
    let Some(fixed) = temp.compile(
        "static",
        "int puts(const char*); unsigned sleep(unsigned); int main(void) { puts(\"static\"); sleep(3); }",
        &["-static"],
    ) else {
        return;
    };
    let other = temp.join("setuid");
    testing::copy_program("/usr/bin/id", &other);
    fs::set_permissions(&other, Permissions::from_mode(0o4755)).unwrap();
    let script = "\"$0\" & \"$1\" & \"$2\" -u & \"$3\" -c \"$4\" 4 & wait";
    let options = ["--scope", "all", "--stable", "0.2", "--summary", &file];
    let run = output(&options, &["bash", "-c", script, &dangerous, &fixed, &other, PYTHON, HOLDS]);
    let mut lines: Vec<String> = text(&run.stdout).lines().map(str::to_owned).collect();
    lines.sort_unstable();
    assert_eq!(
        (run.status.code(), lines),
        (Some(0), ["0", "raw", "right", "static"].map(str::to_owned).into()),
        "{}",
        said(&run)
    );
    let summary = summary(&file);
    let refused: Vec<&str> = summary["helper_refused"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let told = |program: &str| refused.iter().any(|why| why.contains(program) && why.contains("not proven"));
    assert!(told("/dangerous"), "{refused:?}");
    assert!(said(&run).contains("is not proven: "), "{}", said(&run));
    let outside = summary["no_agent"].as_array().unwrap();
    let reason = |program: &str| outside.iter().find(|one| one["program"].as_str().unwrap().ends_with(program));
    assert!(reason("/static").is_some(), "{outside:?}");
    assert!(summary["processes_ever"].as_u64().unwrap() >= 1, "{summary:#}");
}

#[test]
fn trust_is_for_whole_programs_alone() {
    let run = output(&["--trust", "/dev/null"], &["true"]);
    assert_eq!(run.status.code(), Some(2), "{}", said(&run));
    assert!(said(&run).contains("--scope all"), "{}", said(&run));
}
