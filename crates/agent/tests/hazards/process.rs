//! V1, C4, D-7, D-8: what a program and its surroundings see of the helper.

use std::time::{Duration, Instant};

use kernel::Pid;
use kernel::sched::{Policy, policy, set_policy};
use kernel::stat::Stat;

use crate::stand::Stand;
use crate::victim::{Region, Victim, errno, merge_now, merge_pair, merged_pair, pid, reap, tell, wait_until};

pub(crate) const VICTIMS: &[Victim] = &[
    ("alone", alone),
    ("credentials", credentials),
    ("parent", parent),
    ("quiet_child", quiet_child),
    ("show_helper", show_helper),
    ("writes_again", writes_again),
    ("synchronised_filter", synchronised_filter),
    ("execs_itself", execs_itself),
];

const PAGES: usize = 24;

fn status_of(process: &str, field: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.unwrap_or_default().trim().to_owned()
}

/// The program has one thread and no children that it did not make, and may do what only single threads may.
fn alone() {
    let (one, two) = merged_pair(PAGES, 50);
    assert_eq!(status_of("self", "Threads"), "1");
    let mut status = 0;
    for flags in [libc::WNOHANG, libc::WNOHANG | libc::__WALL] {
        // SAFETY: the kernel writes the status.
        let got = unsafe { libc::waitpid(-1, &raw mut status, flags) };
        assert_eq!((got, errno()), (-1, libc::ECHILD), "a child that the program did not make");
    }
    reap(crate::victim::fork(|| {
        // SAFETY: changes name spaces of this child only.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWUSER) }, 0, "{}", std::io::Error::last_os_error());
        one.check_from(50);
    }));
    for flags in [libc::CLONE_NEWNS, libc::CLONE_FILES | libc::CLONE_FS, libc::CLONE_NEWUSER] {
        // SAFETY: as above, of this process.
        assert_eq!(unsafe { libc::unshare(flags) }, 0, "{flags:#x}: {}", std::io::Error::last_os_error());
    }
    one.fill_from(70);
    one.fill_from(50);
    merge_now();
    one.check_from(50);
    two.check_from(50);
}

/// V1, D-7: the helper is neither thread nor child of the program; unshare works.
#[test]
fn v1_the_program_is_alone() {
    let stand = Stand::on_request();
    stand.run("alone");
    stand.assert_merged(PAGES as u64);
}

/// setuid from several threads.
fn credentials() {
    let (one, two) = merged_pair(PAGES, 50);
    let threads: Vec<_> =
        (0..3).map(|_| std::thread::spawn(|| std::thread::sleep(Duration::from_millis(50)))).collect();
    // SAFETY: gives up rights that this victim does not need.
    unsafe {
        assert_eq!(libc::setgid(65_534), 0);
        assert_eq!(libc::setuid(65_534), 0);
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(status_of("self", "Uid").starts_with("65534\t65534"));
    one.fill(3, 9);
    one.check_from_but(50, 3);
    assert_eq!(one.part(5, 9).advise(libc::MADV_DONTNEED), 0);
    one.part(5, 9).check_zero();
    two.check_from(50);
    let fresh = Region::map(4);
    fresh.mergeable();
    fresh.check_zero();
}

impl Region {
    fn check_from_but(&self, first: u64, other: usize) {
        self.part(0, other).check_from(first);
        self.part(other + 1, self.pages).check_from(first + other as u64 + 1);
    }
}

/// V1: setuid() reaches all threads and hangs on none.
#[test]
fn v1_setuid() {
    let stand = Stand::on_request();
    stand.run("credentials");
    stand.assert_merged(PAGES as u64);
}

fn quiet_child() {
    let (one, _two) = merged_pair(PAGES, 50);
    one.check_from(50);
}

/// Starts a managed program and waits for anything at all: only that program may come, once.
fn parent() {
    let program = std::env::current_exe().unwrap();
    // The child's wishes go to the test, as this process's would.
    let mut child = std::process::Command::new(program).env("VICTIM", "quiet_child").spawn().unwrap();
    let id = i32::try_from(child.id()).unwrap();
    let mut status = 0;
    // SAFETY: the kernel writes the status.
    assert_eq!(unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) }, id);
    assert_eq!(status, 0);
    assert!(child.wait().is_err(), "it has been waited for");
    // SAFETY: as above.
    assert_eq!(unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) }, -1);
    assert_eq!(errno(), libc::ECHILD);
}

/// D-7: a program's parent sees the program end, and no helper.
#[test]
fn d_7_a_parent_sees_one_child() {
    let stand = Stand::on_request();
    stand.run("parent");
    stand.assert_merged(PAGES as u64);
}

/// Much is merged over and over.
fn writes_again() {
    const MANY: usize = 2048;
    let (one, two) = merged_pair(MANY, 50);
    tell(&format!("shown {}", pid()));
    let told = std::thread::spawn(crate::victim::hear);
    while !told.is_finished() {
        one.fill_from(50);
        std::thread::sleep(Duration::from_millis(500));
    }
    told.join().unwrap();
    tell("written");
    crate::victim::hear();
    one.check_from(50);
    two.check_from(50);
}

fn show_helper() {
    let (one, two) = merged_pair(PAGES, 50);
    tell(&format!("shown {}", pid()));
    crate::victim::hear();
    one.check_from(50);
    two.check_from(50);
}

/// D-8, H1: the helper has no privileges, filters itself, shares no descriptors, sits in a process group of its own, and is
/// scheduled with its program.
///
/// Seen to fail: its session was its own as well. While processes of the program's session were busy it did not run for
/// seconds, was taken for dead after 20 of them, and was killed.
#[test]
fn d_8_the_helper_has_no_privileges() {
    let stand = Stand::on_request();
    let mut running = stand.start("show_helper");
    running.expect("shown");
    let helper = helper_of(running.pid());
    let helper = helper.to_string();
    for field in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status_of(&helper, field), "0000000000000000", "{field}");
    }
    assert_eq!(status_of(&helper, "Seccomp"), "2");
    assert_eq!(status_of(&helper, "NoNewPrivs"), "1");
    assert_eq!(status_of(&helper, "Name"), "pagefold-helper");
    assert_eq!(status_of(&helper, "Tgid"), helper, "a process of its own");
    let [ours, its] =
        [helper.as_str(), &running.pid().to_string()].map(|pid| Stat::read(Pid(pid.parse().unwrap())).unwrap());
    assert_eq!(ours.group.to_string(), helper, "a process group of its own");
    assert_eq!(ours.session, its.session, "the program's session");
    // Kernels without such groups have no such file.
    let group = |pid: &str| std::fs::read_to_string(format!("/proc/{pid}/autogroup")).ok();
    assert_eq!(group(&helper), group(&running.pid().to_string()), "scheduled with its program");
    for entry in std::fs::read_dir(format!("/proc/{helper}/fd")).unwrap().flatten() {
        let target = std::fs::read_link(entry.path()).unwrap_or_default();
        assert!(!target.to_string_lossy().starts_with("pipe:"), "it holds {}", target.display());
    }
    running.say("go on");
    running.succeed();
    stand.assert_merged(PAGES as u64);
}

/// D-10: whoever holds pages is not preempted.
///
/// Seen to fail, as root without CAP_SYS_RESOURCE: the helper could not be permitted to take the priority.
#[test]
fn d_10_the_helper_has_priority_while_it_merges() {
    let stand = Stand::watching();
    let mut running = stand.start("writes_again");
    running.expect("shown");
    let helper = helper_of(running.pid());
    // In a thread of its own: without CAP_SYS_NICE there is no way back.
    let may = std::thread::spawn(|| set_policy(Pid(0), Policy::Fifo { priority: 1 }).is_ok());
    if !may.join().unwrap() {
        return println!("skipped: no right to real-time priority");
    }
    let its_policy = || policy(Pid(helper)).unwrap_or(Policy::Other);
    let begun = Instant::now();
    while its_policy() != (Policy::Fifo { priority: 1 }) {
        assert!(begun.elapsed() < Duration::from_secs(30), "it has none");
    }
    running.say("go on");
    running.expect("written");
    std::thread::sleep(Duration::from_secs(1));
    wait_until("it has given it back", || its_policy() == Policy::Other);
    running.say("go on");
    running.succeed();
}

/// D-20: the end of the program wakes its helper, which has its memory and all that is mapped there until it has left.
///
/// Seen to fail: it looked ten times a second, and files that programs had been were busy for as long after their end.
#[test]
fn d_20_the_helper_waits_for_the_end_of_its_program() {
    const FUTEX_WAITV: &str = "449 ";
    let stand = Stand::on_request();
    let mut running = stand.start("show_helper");
    running.expect("shown");
    let helper = helper_of(running.pid());
    let waits =
        || std::fs::read_to_string(format!("/proc/{helper}/syscall")).is_ok_and(|call| call.starts_with(FUTEX_WAITV));
    wait_until("it waits for two words", waits);
    running.say("go on");
    running.succeed();
    wait_until("it has left", || !crate::stand::lives(helper));
}

/// The helper that shares a process's memory.
pub(crate) fn helper_of(program: i32) -> i32 {
    let helpers = helpers_of(program);
    assert!(!helpers.is_empty(), "process {program} has no helper");
    helpers[0]
}

/// All of them: one that has left may still be on its way out.
pub(crate) fn helpers_of(program: i32) -> Vec<i32> {
    const KCMP_VM: i32 = 1;
    let is_helper = |id: &i32| {
        let name = std::fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
        // SAFETY: compares two processes.
        name == "pagefold-helper\n" && unsafe { libc::syscall(libc::SYS_kcmp, program, *id, KCMP_VM, 0, 0) } == 0
    };
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_helper).collect()
}

/// The program filters all its threads after its memory was merged.
fn synchronised_filter() {
    const RET_ALLOW: u32 = 0x7fff_0000;
    const RET_KILL: u32 = 0x8000_0000;
    let (one, two) = merged_pair(PAGES, 50);
    // Kills whoever calls ioctl.
    let program = [
        (0x20_u16, 0_u8, 0_u8, 0_u32),
        (0x15, 0, 1, libc::SYS_ioctl as u32),
        (0x06, 0, 0, RET_KILL),
        (0x06, 0, 0, RET_ALLOW),
    ];
    let filter: Vec<libc::sock_filter> =
        program.iter().map(|(code, jt, jf, k)| libc::sock_filter { code: *code, jt: *jt, jf: *jf, k: *k }).collect();
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: binds this process; the kernel reads the program.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(
            libc::syscall(libc::SYS_seccomp, 1, 1, &raw const program),
            0,
            "{}",
            std::io::Error::last_os_error()
        );
    }
    one.fill_from(90);
    two.fill_from(90);
    wait_until("pages are merged under the filter", || {
        merge_now();
        one.merged() >= PAGES - 2
    });
    one.check_from(90);
}

/// C4: a filter synchronised to all threads does not reach the helper.
#[test]
fn c4_a_filter_for_all_threads() {
    let stand = Stand::on_request();
    stand.run("synchronised_filter");
    stand.assert_merged(PAGES as u64);
}

/// Executes itself with merged memory, several times.
fn execs_itself() {
    let round: u32 = std::env::var("ROUND").map_or(0, |round| round.parse().unwrap());
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(50);
    two.fill_from(50);
    merge_pair(one, two);
    one.check_from(50);
    if round < 5 {
        use std::os::unix::process::CommandExt as _;
        let error =
            std::process::Command::new(std::env::current_exe().unwrap()).env("ROUND", (round + 1).to_string()).exec();
        panic!("{error}");
    }
}

/// Section 6: exec leaves the helper behind, and the new program gets its own.
#[test]
fn a_program_executes_itself() {
    let stand = Stand::on_request();
    stand.run("execs_itself");
    assert_eq!(stand.summary().processes_ever, 6);
    stand.assert_merged(PAGES as u64);
}
