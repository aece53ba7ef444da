//! What is left alone, and the reason that is given. Whoever is refused goes on as it was.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pagefold_kernel::inject::{Call, CallNumber, InjectError, Injected, Options, Refusal, inject};
use pagefold_kernel::{Pid, status};

use crate::harness::{Target, wait_until};

fn refused(result: Result<Injected, InjectError>) -> Refusal {
    match result {
        Err(InjectError::Refused { refusal, .. }) => refusal,
        other => panic!("not refused: {other:?}"),
    }
}

fn attempt(pid: Pid) -> Result<Injected, InjectError> {
    inject(pid, &[Call::memory_merge(true)], &Options { timeout: Duration::from_secs(2), ..Options::default() })
}

/// Root is needed to become somebody else, and to read filters.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: root");
    }
    root
}

struct Killed(Child);

impl Killed {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }
    fn pid(&self) -> Pid {
        Pid(self.0.id().cast_signed())
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn sleeper() -> Killed {
    let sleeper = Killed::start(Command::new("sleep").arg("600"));
    wait_until("asleep", || {
        fs::read_to_string(format!("/proc/{}/syscall", sleeper.pid())).is_ok_and(|text| text.starts_with("230 "))
    });
    sleeper
}

#[test]
fn the_gone_the_dead_and_the_kernels_own() {
    let mut child = Command::new("true").spawn().unwrap();
    let pid = Pid(child.id().cast_signed());
    wait_until("it has ended", || status::read(pid).unwrap().state == b'Z');
    assert_eq!(refused(attempt(pid)), Refusal::Zombie);
    child.wait().unwrap();
    assert_eq!(refused(attempt(pid)), Refusal::Gone);
    assert_eq!(refused(attempt(Pid::this())), Refusal::Own);
    assert_eq!(refused(attempt(Pid(2))), Refusal::KernelThread);
}

#[test]
fn the_stopped_and_the_traced() {
    let sleeper = sleeper();
    let pid = sleeper.pid();
    // SAFETY: the call takes numbers only.
    assert_eq!(unsafe { libc::kill(pid.0, libc::SIGSTOP) }, 0);
    wait_until("stopped", || status::read(pid).unwrap().state == b'T');
    assert_eq!(refused(attempt(pid)), Refusal::Stopped);
    assert_eq!(status::read(pid).unwrap().state, b'T');
    // SAFETY: as above.
    assert_eq!(unsafe { libc::kill(pid.0, libc::SIGCONT) }, 0);
    std::thread::scope(|scope| {
        let (told, tell) = std::sync::mpsc::channel::<()>();
        let (ready, is_ready) = std::sync::mpsc::channel::<i64>();
        scope.spawn(move || {
            // SAFETY: PTRACE_SEIZE takes no address of this process.
            let result = unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid.0, 0, 0) };
            ready.send(result).unwrap();
            let _ = tell.recv();
        });
        assert_eq!(is_ready.recv().unwrap(), 0);
        assert_eq!(refused(attempt(pid)), Refusal::Traced { by: Pid::this() });
        drop(told);
    });
    wait_until("untraced", || status::read(pid).unwrap().tracer_pid == 0);
    assert_eq!(attempt(pid).unwrap().results, [Ok(0)]);
}

/// A filter in the target's own words: `rules` says which numbers get which answer, all others pass.
fn filtered(rules: &[(i64, u32)], roles: &[&str]) -> Target {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut program = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for (number, answer) in rules {
        let jump = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        program.push(libc::sock_filter { code: jump as u16, jt: 0, jf: 1, k: *number as u32 });
        program.push(statement(libc::BPF_RET | libc::BPF_K, *answer));
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    let mut command = Command::new(crate::harness::program());
    // SAFETY: the closure makes system calls only, with memory that was allocated before the fork.
    unsafe {
        command.pre_exec(move || {
            let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
            if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
                || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) != 0
            {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        })
    };
    Target::of(command, roles)
}

/// Seen to fail: a stop makes the kernel restart such a call by one that the filter kills for.
#[test]
fn a_filter_that_forbids_restarts_kills_nobody() {
    if !is_root() {
        return;
    }
    let roles = ["nanosleep", "poll", "futex_timed"];
    let mut target = filtered(&[(libc::SYS_restart_syscall, libc::SECCOMP_RET_KILL_PROCESS)], &roles);
    for round in 0..10 {
        for role in roles {
            target.switch(round % 2 == 0, Some(role));
        }
    }
    target.check();
}

#[test]
fn filters_are_asked_before_and_named() {
    if !is_root() {
        return;
    }
    let roles = ["epoll_timed", "nanosleep", "compute"];
    let mut allows = filtered(&[(libc::SYS_madvise, libc::SECCOMP_RET_KILL_PROCESS)], &roles);
    for _ in 0..50 {
        for role in roles {
            allows.switch(true, Some(role));
        }
    }
    assert!(allows.merges());
    allows.check();
    for (answer, action) in [
        (libc::SECCOMP_RET_KILL_PROCESS, "killing the process"),
        (libc::SECCOMP_RET_ERRNO | 1, "an error"),
        (libc::SECCOMP_RET_TRAP, "SIGSYS"),
        (libc::SECCOMP_RET_TRACE, "a stop for its tracer"),
    ] {
        let mut denies = filtered(&[(libc::SYS_prctl, answer)], &roles);
        let expected = Refusal::Seccomp { filter: 0, action, call: CallNumber(libc::SYS_prctl) };
        for _ in 0..20 {
            for role in roles {
                let options = Options { tid: Some(denies.tid(role)), ..Options::default() };
                assert_eq!(refused(inject(denies.pid(), &[Call::memory_merge(true)], &options)), expected);
            }
        }
        assert!(!denies.merges());
        denies.check();
        // What the filter lets through is done.
        assert_eq!(
            inject(denies.pid(), &[Call::getpid()], &Options::default()).unwrap().results,
            [Ok(denies.pid().0 as u64)]
        );
    }
}

/// A time-out is not put off by refusals either.
#[test]
fn a_refusal_puts_no_time_out_off() {
    if !is_root() {
        return;
    }
    let mut target = filtered(&[(libc::SYS_prctl, libc::SECCOMP_RET_ERRNO | 1)], &["epoll_timed_long"]);
    let options = Options { tid: Some(target.tid("epoll_timed_long")), ..Options::default() };
    for _ in 0..300 {
        refused(inject(target.pid(), &[Call::memory_merge(true)], &options));
        std::thread::sleep(Duration::from_millis(5));
    }
    let said = target.check()["epoll_timed_long"].clone();
    println!("{said:?}");
    assert!(said.count >= 2, "{said:?}");
}

#[test]
fn threads_that_protect_themselves() {
    let mut target = Target::start(&["strict", "caught", "stepping", "nanosleep"]);
    let pid = target.pid();
    wait_until("they are ready", || {
        let ready = target.ask().values().all(|said| said.count > 0);
        ready && status::read(target.tid("strict")).unwrap().seccomp == 1
    });
    let only = |role| Options { tid: Some(target.tid(role)), ..Options::default() };
    for (role, expected) in [("strict", Refusal::SeccompStrict), ("caught", Refusal::SyscallUserDispatch)] {
        for _ in 0..20 {
            assert_eq!(refused(inject(pid, &[Call::memory_merge(true)], &only(role))), expected, "{role}");
        }
    }
    // Its handler runs without the flag, and can be used.
    let outcomes = (0..200).map(|_| inject(pid, &[Call::memory_merge(false)], &only("stepping")));
    let refusals: Vec<Refusal> = outcomes.filter(Result::is_err).map(refused).collect();
    println!("{} of 200 times while it steps", refusals.len());
    assert!(refusals.iter().all(|refusal| *refusal == Refusal::TrapFlag), "{refusals:?}");
    assert!(!target.merges());
    // Another thread does it.
    let done = target.switch(true, None);
    assert!(target.merges() && (done.tid == pid || done.tid == target.tid("nanosleep")), "{done:?}");
    wait_until("they are as they were", || {
        ["strict", "caught"].iter().all(|role| status::read(target.tid(role)).unwrap().state == b'S')
    });
}

/// Runs an injection as another user, in a process of its own; what it was refused for.
fn as_nobody(pid: Pid) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "refusals::runs_as_nobody", "--nocapture"])
        .env("INJECT_AS_NOBODY", pid.to_string())
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find_map(|line| line.split_once("answer: "));
    line.unwrap_or_else(|| panic!("{text}")).1.to_owned()
}

/// Not a test: what [`as_nobody`] starts.
#[test]
fn runs_as_nobody() {
    let Ok(pid) = std::env::var("INJECT_AS_NOBODY") else { return };
    println!("answer: {:?}", attempt(Pid(pid.parse().unwrap())).map(|done| done.results));
}

#[test]
fn other_users_and_the_protected() {
    if !is_root() {
        return;
    }
    // Somebody else's.
    let other = sleeper();
    let said = as_nobody(other.pid());
    assert!(said.contains("NotPermitted") && said.contains("belongs to user 0"), "{said}");
    // One's own.
    let own = Killed::start(Command::new("sleep").arg("600").uid(65534).gid(65534));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(as_nobody(own.pid()), "Ok([Ok(0)])");
    // One's own, but a program with privileges: a copy of sleep with a setuid bit.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let program: PathBuf = folder.path().join("sleep");
    testing::copy_program("/bin/sleep", &program);
    fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o4755)).unwrap();
    let setuid = Killed::start(Command::new(&program).arg("600").uid(65534).gid(65534));
    std::thread::sleep(Duration::from_millis(50));
    let said = as_nobody(setuid.pid());
    assert!(said.contains("NotPermitted"), "{said}");
    assert_eq!(attempt(setuid.pid()).unwrap().results, [Ok(0)], "root may");
    // One's own, but not dumpable.
    let mut command = Command::new(crate::harness::program());
    command.uid(65534).gid(65534);
    let mut hidden = Target::of(command, &["hidden"]);
    wait_until("it hides", || hidden.ask()["hidden"].count == 1);
    let said = as_nobody(hidden.pid());
    assert!(said.contains("NotPermitted") && said.contains("PR_SET_DUMPABLE"), "{said}");
}

/// A 32-bit program that waits: `pause()` by int 0x80, as small as an ELF file can be.
fn program_of_32_bits(folder: &std::path::Path) -> PathBuf {
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0");
    let base = 0x0804_8000_u32;
    let code = [0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7];
    let total = 52 + 32 + code.len() as u32;
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    let word = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
    // Executable, 386, version 1, entry, one program header right behind, no sections.
    half(&mut file, 2);
    half(&mut file, 3);
    for value in [1, base + 84, 52, 0, 0] {
        word(&mut file, value);
    }
    for value in [52, 32, 1, 40, 0, 0] {
        half(&mut file, value);
    }
    for value in [1, 0, base, base, total, total, 5, 0x1000] {
        word(&mut file, value);
    }
    file.extend(code);
    let path = folder.join("program");
    testing::write_program(&path, file);
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    path
}

#[test]
fn programs_of_32_bits() {
    let folder = tempfile::tempdir().unwrap();
    let path = program_of_32_bits(folder.path());
    let child = match Command::new(&path).spawn() {
        Ok(child) => Killed(child),
        Err(error) => {
            println!("skipped: 32-bit programs ({error})");
            return;
        }
    };
    wait_until("it waits", || fs::read_to_string(format!("/proc/{}/syscall", child.pid())).unwrap().starts_with("29 "));
    assert_eq!(refused(attempt(child.pid())), Refusal::Other32Bit);
    wait_until("it still waits", || status::read(child.pid()).unwrap().state == b'S');
}

/// Everybody can open a descriptor of a process and hold the lock behind it; /proc/PID/mem is for those who may attach.
#[test]
fn a_lock_that_everybody_can_hold_keeps_nobody_from_it() {
    use rustix::fs::{FlockOperation, flock};
    let sleeper = sleeper();
    let pidfd = pagefold_kernel::Pidfd::open(sleeper.pid()).unwrap();
    flock(&pidfd, FlockOperation::NonBlockingLockExclusive).unwrap();
    assert_eq!(attempt(sleeper.pid()).unwrap().results, [Ok(0)]);
    let memory = fs::File::open(format!("/proc/{}/mem", sleeper.pid())).unwrap();
    flock(&memory, FlockOperation::NonBlockingLockExclusive).unwrap();
    let short = Options { timeout: Duration::from_millis(100), ..Options::default() };
    assert_eq!(refused(inject(sleeper.pid(), &[Call::getpid()], &short)), Refusal::Busy);
    drop(memory);
    assert_eq!(attempt(sleeper.pid()).unwrap().results, [Ok(0)]);
}

#[test]
fn a_thread_is_named_with_its_process() {
    let mut target = Target::start(&["nanosleep"]);
    let thread = target.tid("nanosleep");
    assert_eq!(refused(attempt(thread)), Refusal::Thread { of: target.pid() });
    target.check();
}

/// Nothing but its child ends the wait of a vfork, so it is not waited for; another thread does it.
#[test]
fn a_parent_that_waits_for_its_vfork() {
    let target = Target::start(&["vfork_forever"]);
    let forks = target.tid("vfork_forever");
    let children = || fs::read_to_string(format!("/proc/{}/task/{forks}/children", target.pid())).unwrap();
    wait_until("it waits for its child", || !children().is_empty() && status::read(forks).unwrap().state == b'D');
    let begun = std::time::Instant::now();
    let only = Options { tid: Some(forks), ..Options::default() };
    let refusal = refused(inject(target.pid(), &[Call::getpid()], &only));
    assert_eq!(refusal, Refusal::Vfork { child: Pid(children().trim().parse().unwrap()) });
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(attempt(target.pid()).unwrap().results, [Ok(0)]);
}
