//! Causes in a process that need no merging.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::stand::{Host, PAGEFOLD, Said, Stage, doctor, script};

/// What is said of a process in the state that a script leaves it in.
fn said(script: &str) -> Option<(Said, u32)> {
    let _host = Host::lock()?;
    let stage = Stage::new(script);
    let said = Said::of(&[stage.pid()]);
    assert_eq!(said.status, Some(0));
    Some((said, stage.pid()))
}

#[test]
fn never_marked() {
    let Some((said, pid)) = said("a = area(1024); fill(a); stay()") else { return };
    said.process("blocks", "not-marked", pid, "no madvise, no prctl");
}

#[test]
fn marked_in_all_ways() {
    for how in ["prctl(1)", "mergeable(a)"] {
        let Some((said, pid)) = said(&format!("a = area(4096); fill(a); {how}; stay()")) else { return };
        for code in ["not-marked", "mark-lost", "nothing-there", "shared-memory", "hugetlb", "pinned", "seccomp"] {
            said.no(code);
        }
        assert!(said.findings.iter().all(|found| found["severity"] != "blocks" || found["pid"] != pid), "{said:?}");
    }
}

#[test]
fn marks_that_exec_or_the_program_took_away() {
    for lost in [
        "prctl(1)\npid = os.fork()\nif pid == 0:\n prctl(0)\n",
        "a = area(64); mergeable(a); fill(a)\npid = os.fork()\nif pid == 0:\n",
    ] {
        let Some(_host) = Host::lock() else { return };
        let exec = " os.dup2(os.open('/dev/null', os.O_WRONLY), 1)\n os.execvp('sleep', ['sleep', '60'])\n";
        let tell = "import time; time.sleep(0.3)\nprint('here')\nstay(pid)\nos.kill(pid, 9)\n";
        let script = format!("{lost}{exec}{tell}");
        let mut stage = Stage::new(&script);
        let sleeper: u32 = stage.line().parse().unwrap();
        let said = Said::of(&[sleeper, stage.pid()]);
        said.process("blocks", "mark-lost", sleeper, &format!("though its parent's is ({})", stage.pid()));
        said.no("not-marked");
        stage.end();
    }
}

#[test]
fn a_stack_after_exec() {
    let Some(_host) = Host::lock() else { return };
    let after = script("stay()").replace('\'', "\"");
    let begin = script(&format!("prctl(1); os.execvp('python3', ['python3', '-c', '''{after}'''])"));
    let stage = Stage::of(Command::new("python3").args(["-c", &begin]));
    let said = Said::of(&[stage.pid()]);
    said.process("note", "stack-unmarked", stage.pid(), "is not mergeable: the prctl came before exec");
    drop(stage);
    // A process that sets it itself has its stack taken in.
    let stage = Stage::new("prctl(1); stay()");
    Said::of(&[stage.pid()]).no("stack-unmarked");
}

#[test]
fn memory_that_is_passed_over_without_a_word() {
    // madvise says that all is well.
    let shared = "a = area(8192, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS); mergeable(a); fill(a); stay()";
    let Some((found, pid)) = said(shared) else { return };
    found.process("blocks", "shared-memory", pid, "32 MiB of shared memory");
    found.process("blocks", "not-marked", pid, "");
    let memfd = "f = os.memfd_create('guest'); os.ftruncate(f, 8192 * PAGE)\n\
                 a = area(8192, mmap.MAP_SHARED, f); mergeable(a); fill(a); stay()";
    let Some((found, pid)) = said(memfd) else { return };
    found.process("blocks", "shared-memfd", pid, "32 MiB of shared mappings of memory files");
    found.no("shared-memory");
    // Beside much more that can be merged it does not matter, and privately mapped it can be.
    let private = memfd.replace("MAP_SHARED", "MAP_PRIVATE");
    let Some((found, _)) = said(&private) else { return };
    found.no("shared-memfd");
    found.no("not-marked");
}

#[test]
fn huge_pages_of_a_pool() {
    // MAP_HUGETLB and MAP_NORESERVE: such a mapping can be made without a pool.
    let script = "a = area(16384, PRIVATE | 0x40000 | 0x4000)\n\
                  assert libc.madvise(ctypes.c_void_p(address(a)), ctypes.c_size_t(16384 * PAGE), 12) == 0; stay()";
    let Some((said, pid)) = said(script) else { return };
    said.process("blocks", "hugetlb", pid, "64 MiB of mappings of hugetlb pages");
}

#[test]
fn a_filter_that_refuses_madvise() {
    // BPF: load the number of the call; madvise (28) gives EPERM, anything else passes.
    let script = "import struct\n\
        program = b''.join(struct.pack('HBBI', *i) for i in \
        [(0x20, 0, 0, 0), (0x15, 0, 1, 28), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7fff0000)])\n\
        code = ctypes.create_string_buffer(program)\n\
        head = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', 4, ctypes.addressof(code)))\n\
        a = area(64); fill(a)\n\
        assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, head, 0, 0) == 0\n\
        assert advise(a, MERGEABLE) == -1 and ctypes.get_errno() == 1\n\
        stay()";
    let Some((said, pid)) = said(script) else { return };
    said.process("hampers", "seccomp", pid, "1 seccomp filter may refuse madvise");
    said.process("blocks", "not-marked", pid, "");
}

#[test]
fn pages_that_are_pinned() {
    let ring = "ring = libc.syscall(425, 4, ctypes.byref((ctypes.c_uint8 * 120)())); assert ring >= 0\n\
                a = area(64); mergeable(a); fill(a)\n";
    let Some((found, pid)) = said(&format!("{ring}stay()")) else { return };
    found.process("note", "may-pin", pid, "1 ring of io_uring");
    found.no("pinned");
    let buffers = "piece = (ctypes.c_size_t * 2)(address(a), len(a))\n\
                   assert libc.syscall(427, ring, 0, ctypes.byref(piece), 1) == 0\n";
    let Some((found, pid)) = said(&format!("{ring}{buffers}stay()")) else { return };
    found.process(
        "hampers",
        "pinned",
        pid,
        "256 KiB are pinned for input and output (1 registered buffer of io_uring)",
    );
    found.no("may-pin");
}

#[test]
fn nothing_or_little_is_there() {
    let Some((found, pid)) = said("a = area(1024); mergeable(a); stay()") else { return };
    found.process("blocks", "nothing-there", pid, "1 mergeable mapping holds no pages of their own");
    let Some((found, pid)) = said("a = area(4096); fill(a); mergeable(a, 1024 * PAGE); stay()") else { return };
    found.process("note", "partly-marked", pid, "are not mergeable (marked by madvise");
    found.no("nothing-there");
}

#[test]
fn transparent_huge_pages() {
    let huge = "a = area(2048); assert advise(a, HUGEPAGE) == 0; mergeable(a); fill(a); stay()";
    let Some((found, pid)) = said(huge) else { return };
    found.process("note", "huge-pages", pid, "MiB of mergeable memory are huge pages");
    let small = "a = area(2048); assert advise(a, 15) == 0; mergeable(a); fill(a); stay()";
    let Some((found, _)) = said(small) else { return };
    found.no("huge-pages");
}

/// A memory group of cgroup v2 or v1, empty. Removed with the test.
struct Group(PathBuf);

impl Group {
    fn new() -> Option<Self> {
        let name = format!("pagefold-doctor-{}", std::process::id());
        for (root, limit) in [("/sys/fs/cgroup", "memory.high"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")] {
            let folder = Path::new(root).join(&name);
            if std::fs::create_dir(&folder).is_err() {
                continue;
            }
            let group = Self(folder);
            if group.0.join(limit).exists() {
                return Some(group);
            }
        }
        None
    }

    /// Leaves three percent of what is in use above it.
    fn limit(&self) {
        for (usage, limit) in [("memory.current", "memory.high"), ("memory.usage_in_bytes", "memory.limit_in_bytes")] {
            if let Ok(used) = std::fs::read_to_string(self.0.join(usage)) {
                let used: u64 = used.trim().parse().unwrap();
                std::fs::write(self.0.join(limit), (used * 100 / 97).to_string()).unwrap();
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn near_a_limit_of_memory() {
    let Some(_host) = Host::lock() else { return };
    let Some(group) = Group::new() else { return println!("skipped: a memory group") };
    let inside = format!("echo $$ > {}/cgroup.procs; exec python3 -c \"$0\"", group.0.display());
    let stage = Stage::of(Command::new("sh").args(["-c", &inside, &script("a = area(16384); fill(a); stay()")]));
    Said::of(&[stage.pid()]).no("memory-limit");
    group.limit();
    let said = Said::of(&[stage.pid()]);
    said.process("hampers", "memory-limit", stage.pid(), &group.0.display().to_string());
    drop(stage);
}

/// A file to swap to. Off with the test.
struct Swap(PathBuf);

impl Swap {
    fn on() -> Option<Self> {
        let swap = Self(Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("doctor-swap-{}", std::process::id())));
        // Without holes, and readable to nobody else.
        std::fs::write(&swap.0, vec![0; 32 << 20]).unwrap();
        std::fs::set_permissions(&swap.0, std::fs::Permissions::from_mode(0o600)).unwrap();
        let done = |program: &str| Command::new(program).arg(&swap.0).output().is_ok_and(|run| run.status.success());
        (done("mkswap") && done("swapon")).then_some(swap)
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let _ = Command::new("swapoff").arg(&self.0).output();
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn memory_that_is_swapped_out() {
    let Some(_host) = Host::lock() else { return };
    let Some(_swap) = Swap::on() else { return println!("skipped: swap in {}", env!("CARGO_TARGET_TMPDIR")) };
    let stage = Stage::new("a = area(4096); fill(a); mergeable(a); stay()");
    Said::of(&[stage.pid()]).no("swapped-out");
    drop(stage);
    // MADV_PAGEOUT.
    let stage = Stage::new("a = area(4096); fill(a); mergeable(a); assert advise(a, 21, 2048 * PAGE) == 0; stay()");
    let said = Said::of(&[stage.pid()]);
    said.process("hampers", "swapped-out", stage.pid(), "MiB of its mergeable memory are swapped out");
}

#[test]
fn a_program_of_32_bits() {
    let Some(_host) = Host::lock() else { return };
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("doctor-32-{}", std::process::id()));
    // Waits for ever (pause).
    let source = "printf '.globl _start\n_start: mov $29,%%eax\nint $0x80\njmp _start\n' | \
                  cc -m32 -nostdlib -static -x assembler -o \"$0\" -";
    let Ok(true) = Command::new("sh").args(["-c", source]).arg(&program).status().map(|status| status.success()) else {
        return println!("skipped: cc that makes 32-bit programs");
    };
    let mut child = Command::new(&program).spawn().unwrap();
    let said = Said::of(&[child.id(), std::process::id()]);
    child.kill().unwrap();
    child.wait().unwrap();
    std::fs::remove_file(&program).unwrap();
    said.process("note", "32-bit", child.id(), "the page store cannot take it in");
    assert_eq!(said.findings.iter().filter(|found| found["code"] == "32-bit").count(), 1, "not of a 64-bit program");
}

#[test]
fn processes_that_cannot_be_looked_at() {
    let Some(_host) = Host::lock() else { return };
    let mut ended = Command::new("true").spawn().unwrap();
    let pid = ended.id();
    // The state stands behind the name in parentheses.
    let stat = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    while !stat().contains(") Z ") {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let said = Said::of(&[pid]);
    said.process("blocks", "zombie", pid, &format!("its parent {}", std::process::id()));
    assert_eq!(said.status, Some(1));
    ended.wait().unwrap();
    let said = Said::of(&[pid]);
    said.process("blocks", "gone", pid, "there is no such process");
    assert_eq!(said.status, Some(1));
    // One that can be looked at is enough.
    let own = std::process::id();
    let said = Said::of(&[pid, own]);
    said.process("blocks", "gone", pid, "");
    assert_eq!(said.status, Some(0));
    let Ok("kthreadd\n") = std::fs::read_to_string("/proc/2/comm").as_deref() else {
        return println!("skipped: a kernel thread");
    };
    let said = Said::of(&[2]);
    said.process("blocks", "kernel-thread", 2, "thread of the kernel (kthreadd)");
    assert_eq!(said.status, Some(1));
}

#[test]
fn processes_of_others() {
    let Some(_host) = Host::lock() else { return };
    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid=65534", "--regid=65534", "--clear-groups", PAGEFOLD]);
    let own = std::process::id();
    let said = Said::by(nobody.args(doctor(&[own]).get_args()));
    said.process("blocks", "not-permitted", own, "it belongs to user 0");
    let remedy = said.findings.iter().find(|found| found["code"] == "not-permitted").unwrap()["remedy"].clone();
    assert!(remedy.as_str().unwrap().contains("CAP_SYS_PTRACE"), "{remedy}");
    assert_eq!(said.status, Some(3));
}

#[test]
fn numbers_that_are_no_process() {
    for word in ["0", "-5", "self", "99999999999"] {
        let output = Command::new(PAGEFOLD).args(["doctor", &format!("--pid={word}")]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{word}");
        assert!(output.stdout.is_empty());
    }
}

/// Of what a program holds, what `run --scope all` would never touch.
#[test]
fn what_is_never_managed_whole() {
    let script = "a = area(1024); fill(a); b = area(512); assert advise(b, 16) == 0; fill(b); stay()";
    let Some((said, pid)) = said(script) else { return };
    let whole = &said.whole[0];
    assert_eq!(whole["pid"], pid);
    assert!(whole["process"].is_null(), "{whole}");
    let bytes = |pointer: &str| whole.pointer(pointer).and_then(serde_json::Value::as_u64).unwrap_or(0);
    assert_eq!(bytes("/left_alone/not_dumped"), 512 * 4096, "{whole}");
    assert!(bytes("/left_alone/stack") > 0 && bytes("/left_alone/file") > 0, "{whole}");
    assert!(bytes("/anonymous") > 1536 * 4096, "{whole}");
}
