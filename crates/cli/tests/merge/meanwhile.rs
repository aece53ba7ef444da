//! What happens to processes while they are merged.

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Command, Stdio};
use std::time::Duration;

use kernel::{Pid, Range, Vaddr};

use crate::host::{Host, json, merge, merged_pages, wait_until};
use crate::target::Target;

#[test]
fn two_merges_at_the_same_time_both_end_well() {
    let Some(host) = Host::lock() else { return };
    let (mut one, mut other) = (Target::start(), Target::start());
    let ranges = [one.hold(4096, 2, 21), other.hold(4096, 2, 22)];
    // Two on different processes, then two on the same, whose injections must wait for each other.
    for pids in [[one.pid(), other.pid()], [one.pid(), one.pid()]] {
        let fresh = [one.hold(2048, 2, 23), one.hold(2048, 2, 24)];
        let ranges = if pids[0] == pids[1] { fresh } else { ranges };
        let (first, second) = std::thread::scope(|scope| {
            let first = scope.spawn(|| json(&mut merge(pids[0], ranges[0])));
            let second = json(&mut merge(pids[1], ranges[1]));
            (first.join().unwrap(), second)
        });
        for (status, found) in [first, second] {
            assert_eq!((status, found["end"].as_str()), (Some(0), Some("done")), "{found:#}");
            assert_eq!(found["pages_merged"], found["pages_marked"], "{found:#}");
        }
        host.wait_until_restored();
    }
    assert_eq!((one.wrong_words(), other.wrong_words()), (0, 0));
}

#[test]
fn processes_that_end_or_execute_something_else_are_counted_and_no_failure() {
    let Some(host) = Host::lock() else { return };
    for round in 0..8 {
        let mut targets = [Target::start(), Target::start()];
        let ranges = [targets[0].hold(8192, 2, 30), targets[1].hold(8192, 2, 31)];
        let mut command = merge(targets[0].pid(), ranges[0]);
        command.args(["--pid", &targets[1].pid().to_string(), "--range", &ranges[1].to_string()]);
        let mut run = command.arg("--json").stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // Past the first look: before it, a process that is not there is a mistake of whoever named it.
        wait_until("it has begun", || opens(run.id(), &format!("{}/mem", targets[0].pid())));
        std::thread::sleep(Duration::from_millis(60 * round));
        if round % 2 == 0 {
            targets[0].kill();
        } else {
            targets[0].tell("exec");
        }
        let mut text = String::new();
        run.stdout.take().unwrap().read_to_string(&mut text).unwrap();
        let status = run.wait().unwrap();
        let found: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert!(status.success(), "round {round}: {status} {found:#}");
        let living = targets[1].pid().get();
        let processes = found["processes"].as_array().unwrap();
        let other = processes.iter().find(|process| process["pid"] == living).unwrap();
        assert_eq!(other["pages_merged"], other["pages_marked"], "round {round}: {found:#}");
        assert_eq!(targets[1].wrong_words(), 0);
        host.wait_until_restored();
    }
}

/// Whether a process has a file open whose name ends so.
fn opens(pid: u32, end: &str) -> bool {
    let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.filter_map(|file| std::fs::read_link(file.path()).ok()).any(|file| file.to_string_lossy().ends_with(end))
}

/// Pages that a pipe holds, as a driver's pin would.
const PINNED: &str = r"
import ctypes, mmap, os, sys
libc = ctypes.CDLL(None, use_errno=True)
P = mmap.PAGESIZE
area = mmap.mmap(-1, 64 * P, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for at in range(64):
    area[at * P:at * P + 16] = b'%16d' % (at % 32)
address = ctypes.addressof(ctypes.c_char.from_buffer(area))
class Iovec(ctypes.Structure): _fields_ = [('base', ctypes.c_void_p), ('length', ctypes.c_size_t)]
inward, outward = os.pipe()
iovec = Iovec(address, 4 * P)
assert libc.vmsplice(outward, ctypes.byref(iovec), 1, 0) == 4 * P
print('%x' % address, flush=True)
sys.stdin.read()
";

#[test]
fn pages_that_something_holds_are_refused_and_said_to_be() {
    let Some(_host) = Host::lock() else { return };
    let mut child =
        Command::new("python3").args(["-c", PINNED]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let start = Vaddr(u64::from_str_radix(line.trim(), 16).unwrap());
    let range = Range::from_pages(start, kernel::PageCount(64)).unwrap();
    let pid = Pid(child.id().cast_signed());
    let (status, found) = json(&mut merge(pid, range));
    let merged = merged_pages(pid);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!((status, found["end"].as_str()), (Some(0), Some("done")), "{found:#}");
    // Of four pairs one page is held, and its partner has nobody else.
    assert_eq!((found["pages_merged"].as_u64(), merged), (Some(56), 56), "{found:#}");
    assert_eq!(found["refused"], serde_json::json!({ "held": 8 }), "{found:#}");
    let _ = child.stdout.take().map(|mut out| out.read_to_string(&mut String::new()));
}

#[test]
fn programs_that_hold_secrets_are_left_alone_unless_it_is_insisted() {
    let Some(_host) = Host::lock() else { return };
    let folder = tempfile::tempdir().unwrap();
    // The list goes by the name of the file that is executed.
    let agent = folder.path().join("ssh-agent");
    testing::copy_program(std::env::current_exe().unwrap(), &agent);
    let mut target = Target::start_by(Command::new(agent));
    let range = target.hold(256, 2, 50);
    let (status, found) = json(&mut merge(target.pid(), range));
    assert_eq!((status, found["pages_read"].as_u64(), merged_pages(target.pid())), (Some(1), Some(0), 0), "{found:#}");
    let left = found["processes"][0]["left"].as_str().unwrap();
    assert!(left.contains("--never-merge-anyway"), "{left}");
    let (status, found) = json(merge(target.pid(), range).arg("--never-merge-anyway"));
    assert_eq!((status, merged_pages(target.pid())), (Some(0), 256), "{found:#}");
}
