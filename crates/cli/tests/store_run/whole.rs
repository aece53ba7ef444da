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

/// Raises the limit of its stack, and needs nearly all of that.
const DEEP: &str = r#"
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
static __attribute__((noinline)) long down(int levels) {
    volatile char frame[16000];
    memset((char *)frame, levels, sizeof frame);
    return levels == 0 ? 0 : down(levels - 1) + (frame[5] == (char)levels);
}
int main(void) {
    struct rlimit limit = {120 << 20, 120 << 20};
    if (setrlimit(RLIMIT_STACK, &limit)) return 2;
    printf("%ld\n", down(7000));
    return 0;
}
"#;

/// What `sh` executes has the 128 MiB between its libraries and its stack that the kernel leaves, and no more. Seen to fail:
/// the agent's code lay in the middle of them, and the program died.
#[test]
fn a_stack_may_grow_as_far_as_without_an_agent() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("deep");
    let Some(program) = temp.compile("deep", DEEP, &["-O1"]) else { return };
    let options = ["--scope", "all", "--layout", "shared"];
    let run = run_with(&options, &["sh", "-c", "\"$0\"; echo $?", &program]).output().unwrap();
    assert_eq!(text(&run.stdout), "7000\n0\n", "{}", said(&run));
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
    let own_rights = temp.join("own-rights");
    testing::copy_program("/usr/bin/id", &own_rights);
    fs::set_permissions(&own_rights, Permissions::from_mode(0o4755)).unwrap();
    // Whoever executes it becomes another user.
    let setuid = temp.join("setuid");
    testing::copy_program("/usr/bin/sleep", &setuid);
    std::os::unix::fs::chown(&setuid, Some(65534), None).unwrap();
    fs::set_permissions(&setuid, Permissions::from_mode(0o4755)).unwrap();
    let go = Path::new("/usr/bin/fzf");
    if !go.exists() {
        return println!("skipped: no Go program here (fzf)");
    }
    let script = "\"$0\" & \"$1\" & \"$2\" -u & \"$3\" 3 & (echo go; sleep 3) | fzf -f go & \"$4\" -c \"$5\" 4 & wait";
    let options = ["--scope", "all", "--stable", "0.2", "--summary", &file];
    let run = output(&options, &["bash", "-c", script, &dangerous, &fixed, &own_rights, &setuid, PYTHON, HOLDS]);
    let mut lines: Vec<String> = text(&run.stdout).lines().map(str::to_owned).collect();
    lines.sort_unstable();
    assert_eq!(
        (run.status.code(), lines),
        (Some(0), ["0", "go", "raw", "right", "static"].map(str::to_owned).into()),
        "{}",
        said(&run)
    );
    let summary = summary(&file);
    let refused: Vec<&str> = summary["helper_refused"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let told = |program: &str| refused.iter().any(|why| why.contains(program) && why.contains("not proven"));
    assert!(told("/dangerous"), "{refused:?}");
    assert!(said(&run).contains("is not proven: "), "{}", said(&run));
    let outside = summary["no_agent"].as_array().unwrap();
    let reason = |program: &str| {
        let one = outside.iter().find(|one| one["program"].as_str().unwrap().ends_with(program));
        one.and_then(|one| one["reason"].as_str()).unwrap_or_default()
    };
    assert!(reason("/static").contains("statically linked"), "{outside:?}");
    assert!(reason("/fzf").contains("a Go program"), "{outside:?}");
    assert!(reason("/setuid").contains("set-user-ID"), "{outside:?}");
    let managed = summary["managed"].as_array().unwrap();
    let python = managed.iter().find(|one| one["program"].as_str().unwrap().contains("/python3")).unwrap();
    assert!(python["processes"].as_u64() == Some(1) && python["merges"].as_u64().unwrap() > 0, "{managed:?}");
    assert!(said(&run).contains("1 python3"), "{}", said(&run));
}

/// Asks for a helper, and makes room for another program at once, a few times over.
const EXECUTES: &str = r#"
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main(int count, char **words) {
    size_t size = 9 << 20;
    for (int i = 0; i < 2; i++) memset(malloc(size), 1, size);
    if (count < 2) return sleep(3);
    return execv(words[1], words + 1);
}
"#;

/// Seen to fail: the first steps of a program that had been executed meanwhile were taken for code of the one before it,
/// "60 KiB of executable memory in 8 mappings", which `doctor --proof` knew nothing about.
#[test]
fn what_executes_at_once_is_not_judged_for_what_comes() {
    if !can_merge() || !is_root() {
        return;
    }
    let temp = Temp::new("executes");
    let Some(executes) = temp.compile("executes", EXECUTES, &["-O1"]) else { return };
    for _ in 0..3 {
        let options = ["--scope", "all", "--stable", "0.2"];
        let run = output(&options, &[&*executes, &executes, &executes, &executes, &executes]);
        assert_eq!(run.status.code(), Some(0), "{}", said(&run));
        assert!(!said(&run).contains("left alone"), "{}", said(&run));
        assert!(said(&run).contains(" executes)"), "{}", said(&run));
    }
}

#[test]
fn trust_is_for_whole_programs_alone() {
    let run = output(&["--trust", "/dev/null"], &["true"]);
    assert_eq!(run.status.code(), Some(2), "{}", said(&run));
    assert!(said(&run).contains("--scope all"), "{}", said(&run));
}

/// Holds equal pages until they are merged, then lets code in by the lines of its first argument, and says after each
/// whether the pages are still the store's.
const LETS_IN: &str = r"
import ctypes, mmap, os, sys, time
block = bytearray(b'\7' * (16 << 20))
def is_merged():
    return '/memfd:pagefold ' in open('/proc/self/maps').read()
deadline = time.monotonic() + 20
while not is_merged():
    assert time.monotonic() < deadline, 'not merged within 20 s'
    time.sleep(0.05)
def compiles():
    return mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ | mmap.PROT_EXEC)
def maps(path, prot):
    return mmap.mmap(os.open(path, os.O_RDONLY), 4096, flags=mmap.MAP_PRIVATE, prot=prot)
kept = []
for line in sys.argv[1].split(';'):
    kept.append(eval(line))
    print('merged' if is_merged() else 'plain')
assert block.count(7) == len(block)
";

/// Runs [`LETS_IN`]; what it says, and what the run says.
fn lets_in(temp: &Temp, options: &[&str], lines: &str) -> (String, String) {
    let file = temp.join("summary");
    let options = [&["--scope", "all", "--stable", "0.2", "--summary", &file], options].concat();
    let run = output(&options, &[PYTHON, "-c", LETS_IN, lines]);
    assert_eq!(run.status.code(), Some(0), "{}", said(&run));
    let stopped = summary(&file)["stopped"].to_string();
    (text(&run.stdout), stopped)
}

/// Seen to fail: a copy of libc was judged as the file that the gate is in, and let in without one.
#[test]
fn another_libc_ends_merging_before_it_comes() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("libc");
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let libc = maps.split_whitespace().find(|word| word.ends_with("/libc.so.6")).unwrap();
    let copy = temp.join("libc.so.6");
    fs::copy(libc, &copy).unwrap();
    let (said, stopped) = lets_in(&temp, &[], &format!("ctypes.CDLL(None).dlmopen(-1, b'{copy}', 2)"));
    assert_eq!(said, "plain\n");
    assert!(stopped.contains("nobody vouches for: ") && stopped.contains("C library and loader"), "{stopped}");
}

/// Seen to fail: the file was judged by what was in it.
#[test]
fn code_that_can_be_changed_ends_merging_before_it_comes() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("changing");
    let (said, stopped) = lets_in(&temp, &[], "maps('/bin/true', 5);maps('/bin/true', 7)");
    assert_eq!(said, "merged\nplain\n");
    assert!(stopped.contains("nobody vouches for: "), "{stopped}");
}

/// Seen to fail: once one engine was trusted, everything that was compiled later was taken for its code.
#[test]
fn an_engine_that_comes_later_is_asked_about() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("engine");
    let options = ["-shared", "-fPIC", "-Wl,-soname,libluajit-5.1.so.2", "-Wl,--build-id"];
    let Some(engine) = temp.compile("engine", "int luaJIT_version(void) { return 2; }", &options) else { return };
    let python = fs::canonicalize(PYTHON).unwrap();
    let proof = Command::new(PAGEFOLD).args(["doctor", "--json", "--proof"]).arg(&python).output().unwrap();
    let proof: Value = serde_json::from_slice(&proof.stdout).unwrap();
    let own = proof["objects"].as_array().unwrap().iter().find(|one| one["path"].as_str() == python.to_str()).unwrap();
    let (build_id, name) = (own["build_id"].as_str().unwrap(), python.file_name().unwrap().display());
    let trust = temp.join("trust");
    fs::write(&trust, format!("jit {build_id} {name}\n")).unwrap();
    let lines = format!("compiles();compiles();ctypes.CDLL('{engine}');compiles()");
    let (said, stopped) = lets_in(&temp, &["--trust", &trust], &lines);
    assert_eq!(said, "merged\nmerged\nmerged\nplain\n", "{stopped}");
    assert!(stopped.contains("engine is on no list") || stopped.contains("LuaJIT"), "{stopped}");
}
