//! Members into which the agent cannot be loaded: they run as if nothing had been there, and nothing is on their stderr.

use super::*;

/// Runs a shell's script, whose `$0` is a folder, under the store. What its members print, on either stream.
pub(crate) fn streams(folder: &str, script: &str) -> (Option<i32>, String, String) {
    let errors = format!("{folder}/errors");
    let script = format!("{{ {script}; }} 2>\"$0/errors\"");
    let run = output(&["--scope", "all", "--quiet"], &["sh", "-c", &script, folder]);
    (run.status.code(), text(&run.stdout), fs::read_to_string(errors).unwrap())
}

pub(crate) fn runs_alike(folder: &str, script: &str, printed: &str) {
    assert_eq!(streams(folder, script), (Some(0), printed.to_owned(), String::new()), "{script}");
}

/// Copies a program, its loader and its libraries into a folder.
fn copy_whole(program: &str, folder: &str) {
    let script = "set -e; mkdir -p \"$1/bin\"; cp \"$0\" \"$1/bin/\"; \
        ldd \"$0\" | grep -o '/[^ ]*' | while read -r file; do mkdir -p \"$1${file%/*}\"; cp \"$file\" \"$1$file\"; done";
    let done = Command::new("sh").args(["-c", script, program, folder]).output().unwrap();
    assert!(done.status.success(), "{}", text(&done.stderr));
}

/// Seen to fail: the loader says that the agent cannot be preloaded.
#[test]
fn where_the_agents_file_is_not_there() {
    if !can_merge() || !is_root() {
        return;
    }
    let temp = Temp::new("elsewhere");
    let folder = temp.join("root");
    copy_whole("/usr/bin/env", &folder);
    // In a chroot, and not the agent's variables either; what a member puts there itself stays.
    runs_alike(&folder, "chroot \"$0\" /bin/env | grep -c -e PRELOAD -e AGENT || true", "0\n");
    runs_alike(&folder, "export MINE=1; chroot \"$0\" /bin/env | grep MINE", "MINE=1\n");
    // In a mount name space where something else lies over it, as in a container; by vfork, posix_spawn and system().
    let hidden = "unshare -m sh -c 'mount -t tmpfs none /run; mount -t tmpfs none /tmp; ";
    runs_alike(&folder, &format!("{hidden} echo here; env true; exec env echo there'"), "here\nthere\n");
    let python = "import os, subprocess; os.system(\"echo one\"); subprocess.run([\"echo\", \"two\"]); \
        os.posix_spawn(\"/usr/bin/env\", [\"env\", \"echo\", \"three\"], os.environ); os.wait()";
    runs_alike(&folder, &format!("{hidden} exec {PYTHON} -Sc \"$0\"' '{}'", python), "one\ntwo\nthree\n");
    // Where nothing can be executed.
    let noexec = "unshare -m sh -c 'mount -t tmpfs -o noexec none /mnt; cp -r ${LD_PRELOAD%/*} /mnt; \
        mount -n --move /mnt /run; exec env echo here'";
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        runs_alike(&folder, noexec, "here\n");
    }
}

/// What could have the agent and has not is named.
#[test]
fn who_has_no_agent_is_named() {
    if !can_merge() || !is_root() {
        return;
    }
    let temp = Temp::new("named");
    let (folder, file) = (temp.join("root"), temp.join("summary"));
    copy_whole("/usr/bin/sleep", &folder);
    let script = "chroot \"$0\" /bin/sleep 3 & env -i sleep 3 & sleep 3 & wait";
    let run = output(&["--scope", "all", "--summary", &file], &["sh", "-c", script, &folder]);
    assert_eq!(run.status.code(), Some(0), "{}", said(&run));
    let summary: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let mut told: Vec<(String, u64)> = summary["no_agent"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|row| row["reason"].as_str().unwrap().contains("agent's file cannot be loaded"))
        .map(|row| (row["program"].as_str().unwrap().to_owned(), row["processes"].as_u64().unwrap()))
        .collect();
    told.sort();
    let inside = format!("{folder}/bin/sleep");
    let mut expected = [(inside, 1), ("/usr/bin/sleep".to_owned(), 1)];
    expected.sort();
    assert_eq!(told, expected, "{summary:#}");
}

/// An auditor of the loader's work, in a name space of its own with a libc of its own.
const AUDITS: &str =
    "#include <stdio.h>\nunsigned la_version(unsigned version) { return puts(\"\") < 0 ? 0 : version; }";

/// Who has the agent, and cannot be managed for all that, is named with the reason.
///
/// By hand, before: of none of them anything was said, and at the end that no process had marked memory.
#[test]
fn whose_agent_cannot_work_is_named() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("hindered");
    let file = temp.join("summary");
    let Some(audit) = temp.compile("audit.so", AUDITS, &["-shared", "-fPIC"]) else { return };
    let denied = "import ctypes, os; ctypes.CDLL(None).prctl(65, 1, 0, 0, 0); os.execvp(\"sleep\", [\"sleep\", \"4\"])";
    let script =
        format!("{PYTHON} -c '{denied}' & LD_AUDIT=\"$0\" sleep 4 >/dev/null & env -u PAGEFOLD_AGENT sleep 4 & wait");
    let run = output(&["--scope", "all", "--summary", &file], &["bash", "-c", &script, &audit]);
    assert_eq!(run.status.code(), Some(0), "{}", said(&run));
    let summary: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let rows = summary["no_agent"].as_array().unwrap();
    let told = |words: &str| rows.iter().any(|row| row["reason"].as_str().unwrap().contains(words));
    // Not where the kernel has no PR_SET_MDWE (before 6.3).
    let knows_mdwe = Command::new(PYTHON)
        .args(["-c", "import ctypes; exit(ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) < 0)"])
        .status()
        .is_ok_and(|status| status.success());
    assert!(told("PR_SET_MDWE") || !knows_mdwe, "{summary:#}");
    assert!(told("LD_AUDIT"), "{summary:#}");
    assert!(told("PAGEFOLD_AGENT"), "{summary:#}");
    assert!(said(&run).contains("has no agent at work: "), "{}", said(&run));
    assert!(!said(&run).contains("marked memory"), "{}", said(&run));
}

/// Where everything is managed nobody has to mark memory.
///
/// By hand, before: it was said that no process had marked memory.
#[test]
fn what_lives_short_is_said_to() {
    if !can_merge() {
        return;
    }
    let run = output(&["--scope", "all"], &["true"]);
    assert!(said(&run).contains("no program lived for a second"), "{}", said(&run));
    assert!(!said(&run).contains("marked memory"), "{}", said(&run));
}

/// Exits with 7 by its system call.
const LEAVES: &str = "void _start(void) { __asm__ volatile(\"int $0x80\" : : \"a\"(1), \"b\"(7)); }";

#[test]
fn programs_of_32_bits() {
    if !can_merge() {
        return;
    }
    if !Path::new("/lib/ld-linux.so.2").exists() {
        return println!("skipped: the loader of 32-bit programs");
    }
    let temp = Temp::new("narrow");
    // It names the loader, which then reads LD_PRELOAD.
    let options = ["-m32", "-nostdlib", "-fPIE", "-pie", "-Wl,--dynamic-linker=/lib/ld-linux.so.2"];
    let Some(_) = temp.compile("narrow", LEAVES, &options) else { return };
    let folder = temp.join("");
    runs_alike(&folder, "\"$0/narrow\"; echo $?", "7\n");
    testing::write_program(temp.join("script"), format!("#! {} word\n", temp.join("narrow")));
    fs::set_permissions(temp.join("script"), Permissions::from_mode(0o755)).unwrap();
    runs_alike(&folder, "\"$0/script\"; echo $?", "7\n");
    // As the command itself.
    let run = output(&["--scope", "all"], &[&temp.join("narrow")]);
    assert_eq!(run.status.code(), Some(7));
    assert!(said(&run).contains("32-bit") && !said(&run).contains("ld.so"), "{}", said(&run));
    // By its descriptor, and what a member preloads by itself is its own.
    let by_descriptor = "import os; os.execve(os.open(os.sys.argv[1], os.O_RDONLY), [\"x\"], os.environ)";
    runs_alike(&folder, &format!("{PYTHON} -c '{by_descriptor}' \"$0/narrow\"; echo $?"), "7\n");
    let (_, _, errors) = streams(&folder, "LD_PRELOAD=/nowhere.so:$LD_PRELOAD \"$0/narrow\"");
    assert!(errors.contains("/nowhere.so") && !errors.contains("agent.so"), "{errors}");
}

/// A program that preloads something of its own beside the agent, or instead of it.
#[test]
fn members_preload_what_they_like() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("preload");
    let Some(library) = temp.compile("lib.so", "int answer = 42;", &["-shared", "-fPIC"]) else { return };
    let folder = temp.join("");
    let loaded = "grep -c lib.so /proc/self/maps >/dev/null && echo loaded";
    for value in [library.clone(), format!("{library}:$LD_PRELOAD"), format!("$LD_PRELOAD {library}")] {
        runs_alike(&folder, &format!("LD_PRELOAD=\"{value}\" sh -c '{loaded}'"), "loaded\n");
    }
    // Without an environment nothing is managed, and nothing is wrong.
    runs_alike(&folder, "env -i /bin/sh -c 'echo bare'", "bare\n");
}

/// Seen to fail: looking at a program's file dropped the record locks that its process held on it.
#[test]
fn who_executes_itself_keeps_its_locks() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("locks");
    // A program that opens nothing of what it is itself.
    testing::copy_program("/usr/bin/env", temp.join("program"));
    let check = "import fcntl, os, sys\n\
        try: fcntl.lockf(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)\n\
        except OSError: sys.exit(7)";
    // The lock is seen by another process.
    let second = format!("import subprocess, sys; print(subprocess.run([\"{PYTHON}\", *sys.argv[1:]]).returncode)");
    let first = "import fcntl, os, sys\n\
        file = os.open(sys.argv[1], os.O_RDONLY)\n\
        fcntl.lockf(file, fcntl.LOCK_SH)\n\
        os.set_inheritable(file, True)\n\
        os.execv(sys.argv[1], sys.argv[1:])";
    for (name, text) in [("check.py", check), ("second.py", &second), ("first.py", first)] {
        fs::write(temp.join(name), text).unwrap();
    }
    let script = format!("cd \"$0\"; exec {PYTHON} first.py ./program {PYTHON} second.py check.py ./program");
    runs_alike(&temp.join(""), &script, "7\n");
}

/// Kills itself at any call that the gate could make of its own accord, and executes a program that makes none of them.
const RESTRICTED: &str = r#"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#define DENY(nr) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (nr), 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS)
int main(int count, char **words) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        DENY(SYS_getpid), DENY(SYS_process_vm_readv), DENY(SYS_newfstatat), DENY(SYS_openat), DENY(SYS_pread64),
        DENY(SYS_fstatfs), DENY(SYS_clone), DENY(SYS_wait4), DENY(SYS_close), DENY(SYS_rt_sigprocmask),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = { sizeof code / sizeof *code, code };
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (count > 2 ? syscall(SYS_seccomp, 1, 0, &program) : prctl(PR_SET_SECCOMP, 2, &program)) return 1;
    execv(words[1], words + 1);
    return 2;
}
"#;

/// Seen to fail: a filter of its own killed the program when it executed another.
#[test]
fn who_has_restricted_itself_may_execute() {
    if !can_merge() {
        return;
    }
    let temp = Temp::new("restricted");
    let leaves = LEAVES.replace("int $0x80", "syscall").replace("\"a\"(1), \"b\"(7)", "\"a\"(60), \"D\"(7)");
    let bare = ["-nostdlib", "-static", "-fno-stack-protector"];
    let Some(_) = temp.compile("leaves", &leaves, &bare) else { return };
    let Some(_) = temp.compile("restricted", RESTRICTED, &[]) else { return };
    let folder = temp.join("");
    runs_alike(&folder, "\"$0/restricted\" \"$0/leaves\"; echo $?", "7\n");
    runs_alike(&folder, "\"$0/restricted\" \"$0/leaves\" more; echo $?", "7\n");
}

/// The first process that is made after `unshare -p` is the first of a process name space, and with its end nobody can be
/// made there any more: it must be one of the program's.
#[test]
fn the_first_process_of_a_name_space_is_the_programs_own() {
    if !can_merge() || !is_root() {
        return;
    }
    let temp = Temp::new("first");
    let folder = temp.join("");
    runs_alike(&folder, "unshare -p sh -c 'sh -c \"echo \\$\\$\"; echo here'", "1\nhere\n");
    let old = "import subprocess, time; held = bytearray(20 << 20); time.sleep(1.5); more = bytearray(20 << 20); \
        time.sleep(0.5); subprocess.run([\"sh\", \"-c\", \"echo $$\"])";
    runs_alike(&folder, &format!("unshare -p {PYTHON} -c '{old}'"), "1\n");
}
