//! What is told of real processes.
#![allow(clippy::unwrap_used, reason = "tests")]
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use kernel::{Pid, page_size};
use pagefold_ksm::status::{Meter, Request, Status};
use pagefold_ksm::{KsmSysfs, Lease, Rate, StatePath, Wanted, check_writable, host_lock};

/// Merges what it has, forks, and has a child that shares its memory, as it is told to.
const PROGRAM: &str = r"
import ctypes, mmap, os, platform, signal, sys
SYS_VFORK = {'x86_64': 58}.get(platform.machine())
libc = ctypes.CDLL(None)
area = mmap.mmap(-1, 600 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(600):
    area[page * mmap.PAGESIZE:page * mmap.PAGESIZE + 6] = b'status'
at = ctypes.addressof(ctypes.c_char.from_buffer(area))
assert libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(600 * mmap.PAGESIZE), 12) == 0
print(hex(at), flush=True)
for line in sys.stdin:
    if line == 'fork\n':
        pid = os.fork()
        if pid == 0:
            signal.pause()
        print(pid, flush=True)
    else:
        # vfork: this process stands still while its child, with the same memory, says who it is and stays.
        libc.syscall(SYS_VFORK)
        print(os.getpid(), flush=True)
        signal.pause()
";

struct Program {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    at: u64,
}

impl Program {
    fn new() -> Self {
        let mut child =
            Command::new("python3").args(["-c", PROGRAM]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (to, mut from) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut line = String::new();
        from.read_line(&mut line).unwrap();
        let at = u64::from_str_radix(line.trim().trim_start_matches("0x"), 16).unwrap();
        Self { child, to, from, at }
    }

    fn pid(&self) -> Pid {
        Pid(self.child.id().cast_signed())
    }

    fn ask(&mut self, what: &str) -> Pid {
        writeln!(self.to, "{what}").unwrap();
        let mut line = String::new();
        self.from.read_line(&mut line).unwrap();
        Pid(line.trim().parse().unwrap())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn host() -> Option<(File, KsmSysfs, tempfile::TempDir)> {
    let sysfs = KsmSysfs::host();
    if let Err(missing) = check_writable(&sysfs) {
        println!("skipped: {missing}");
        return None;
    }
    if Command::new("python3").arg("--version").output().is_err() {
        println!("skipped: no python3 for the processes to merge");
        return None;
    }
    Some((host_lock().unwrap(), sysfs, tempfile::tempdir().unwrap()))
}

#[test]
fn merged_pages_are_told_of_whoever_has_them() {
    let Some((_lock, sysfs, temp)) = host() else { return };
    let path = StatePath::at(temp.path().join("lease.json"));
    let mut programs = [Program::new(), Program::new()];
    // As the answer has them: numbers begin anew at the largest.
    programs.sort_by_key(|program| program.pid().get());
    let wanted = Wanted {
        run: Some(true),
        rate: Some(Rate::FLAT_OUT),
        smart_scan: Some(false),
        use_zero_pages: Some(true),
        ..Wanted::default()
    };
    let lease = Lease::acquire_at(&path, &sysfs, wanted).unwrap().0;
    let mut meter = Meter::new(&sysfs).unwrap();
    let request = Request { pids: programs.iter().map(Program::pid).collect(), vmas: true, ..Request::default() };
    let deadline = Instant::now() + Duration::from_secs(60);
    let status = loop {
        let status = Status::look(&sysfs, &path, &request, Some(&mut meter)).unwrap();
        if status.processes.iter().all(|process| process.ksm.ksm_merging_pages == Some(600)) {
            break status;
        }
        assert!(Instant::now() < deadline, "{status:#?}");
        std::thread::sleep(Duration::from_millis(50));
    };
    // The lease, and ksmd at work.
    assert_eq!(status.lease.holders[0].pid, Pid::this().get());
    assert!(status.lease.administrator.get(pagefold_ksm::Knob::Run).is_some());
    std::thread::sleep(Duration::from_millis(300));
    let now = Status::look(&sysfs, &path, &request, Some(&mut meter)).unwrap().now.unwrap();
    assert!(now.pages_scanned_per_second.unwrap() > 0.0 && now.pass.unwrap().seconds() > 0.0, "{now:?}");
    assert!(now.ksmd_cpu_percent.unwrap() > 0.0);
    lease.release().unwrap();

    // ksmd stands still: all numbers hold still too.
    let status = Status::look(&sysfs, &path, &request, None).unwrap();
    assert!(status.lease.holders.is_empty());
    for (process, program) in status.processes.iter().zip(&programs) {
        assert_eq!(process.ksm_bytes, Some(600 * page_size()));
        let vmas = process.vmas.as_ref().unwrap();
        let vma = vmas.iter().find(|vma| (vma.start..vma.end).contains(&program.at)).unwrap();
        assert!(vma.mergeable && vma.ksm == 600 * page_size(), "{vma:?}");
        assert_eq!(serde_json::to_value(vma).unwrap()["start"], format!("{:#x}", vma.start));
        let kernels = process.ksm.ksm_process_profit.unwrap();
        assert!(process.bytes_saved < kernels, "the copies that stay are taken off: {process:?}");
    }
    // The parts of all who have merged pages are the whole.
    let all = Status::look(&sysfs, &path, &Request::default(), None).unwrap();
    let parts: i64 = all.processes.iter().map(|process| process.bytes_saved).sum();
    let nodes = all.host.counters.pages_shared.unwrap() + all.host.counters.stable_node_chains.unwrap();
    let records_of_ended = all.host.bytes_bookkeeping
        - nodes * 64
        - all.processes.iter().map(|process| process.bytes_bookkeeping).sum::<u64>();
    let whole = all.host.bytes_saved + i64::try_from(nodes * 64 + records_of_ended).unwrap();
    assert!((parts - whole).abs() <= all.processes.len() as i64 * 2, "{parts} of {whole}: {all:#?}");

    // A child has what its parent had, and the kernel counts nothing of it.
    let child = programs[0].ask("fork");
    let request = Request { pids: vec![child], ..Request::default() };
    let forked = &Status::look(&sysfs, &path, &request, None).unwrap().processes[0];
    assert_eq!(forked.ksm.ksm_merging_pages, Some(0));
    assert!(forked.registered && forked.ksm_bytes.unwrap() >= 590 * page_size(), "{forked:?}");
    assert_eq!(forked.inherited_bytes(page_size()), forked.ksm_bytes.unwrap());
    kill(child);

    // Who has ended is still counted by the kernel until ksmd runs again.
    let before = all.host.bytes_of_ended.unwrap();
    drop(programs);
    let ended = Status::look(&sysfs, &path, &Request::default(), None).unwrap().host;
    assert!(ended.bytes_of_ended.unwrap() >= before + 1190 * page_size(), "{before} and then {ended:?}");
}

#[test]
fn processes_that_share_their_memory_are_one() {
    let sysfs = KsmSysfs::host();
    if !sysfs.exists() {
        return println!("skipped: no KSM");
    }
    if !cfg!(target_arch = "x86_64") || Command::new("python3").arg("--version").output().is_err() {
        return println!("skipped: vfork by its number on x86-64, python3");
    }
    let temp = tempfile::tempdir().unwrap();
    let path = StatePath::at(temp.path().join("lease.json"));
    let mut program = Program::new();
    let child = program.ask("vfork");
    assert_ne!(child, program.pid());
    let request = Request { pids: vec![program.pid(), child], ..Request::default() };
    let status = Status::look(&sysfs, &path, &request, None).unwrap();
    kill(child);
    assert_eq!(status.processes.len(), 1, "{status:#?}");
    let (first, other) = (status.processes[0].pid, &status.processes[0].shares_memory_with);
    let mut both = [program.pid().get(), child.get()];
    both.sort_unstable();
    assert_eq!((first, other.as_slice()), (both[0], &both[1..]));
    assert!(status.processes[0].registered && status.cgroups[0].processes == 1);
}

#[test]
fn who_is_not_there_is_said_and_nothing_is_made() {
    let sysfs = KsmSysfs::host();
    if !sysfs.exists() {
        return println!("skipped: no KSM");
    }
    let temp = tempfile::tempdir().unwrap();
    let path = StatePath::at(temp.path().join("lease.json"));
    let missing = Request { pids: vec![Pid(i32::MAX), Pid(2)], ..Request::default() };
    let status = Status::look(&sysfs, &path, &missing, None).unwrap();
    assert!(status.processes.is_empty() && status.skipped.len() == 2, "{status:#?}");
    assert!(status.now.is_none());
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
    let nowhere = Request { cgroups: vec!["/no/such/cgroup".into()], ..Request::default() };
    assert!(Status::look(&sysfs, &path, &nowhere, None).is_err());
}

fn kill(pid: Pid) {
    let pid = rustix::process::Pid::from_raw(pid.get()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}
