//! D-7: programs that adopt the orphans below them, and must not get a helper for one.

use std::os::unix::process::CommandExt as _;

use crate::stand::Stand;
use crate::victim::{Region, Victim, end_with, errno, fork, merge_now, merge_pair, pid, reap, tell, wait_until};

pub(crate) const VICTIMS: &[Victim] = &[
    ("reaper", reaper),
    ("reaper_again", reaper_again),
    ("reaper_of_others", reaper_of_others),
    ("reaper_with_threads", reaper_with_threads),
    ("reaper_above", reaper_above),
    ("reaper_above_unseen", reaper_above_unseen),
    ("below", below),
    ("first_of_a_name_space", first_of_a_name_space),
];

const PAGES: usize = 24;

/// Becomes a child subreaper, or ends to be one.
fn adopt_orphans(on: bool) {
    // SAFETY: an attribute of this process.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, u64::from(on), 0, 0, 0) }, 0);
    assert_eq!(adopts_orphans(), on);
}

fn adopts_orphans() -> bool {
    let mut on = 0_i32;
    // SAFETY: the kernel writes one integer.
    assert_eq!(unsafe { libc::prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut on, 0, 0, 0) }, 0);
    on != 0
}

/// SIGCHLD is blocked, and kept for later.
fn hold_back_sigchld() {
    // SAFETY: an empty set that is filled in, and this thread's own mask.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        assert_eq!(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()), 0);
    }
}

fn sigchld_came() -> bool {
    // SAFETY: the kernel fills the set in.
    unsafe {
        let mut set = std::mem::zeroed();
        assert_eq!(libc::sigpending(&raw mut set), 0);
        libc::sigismember(&raw const set, libc::SIGCHLD) == 1
    }
}

/// Waits for any child; its id, or the error.
fn wait_for_any(flags: i32) -> Result<i32, i32> {
    let mut status = 0;
    // SAFETY: the kernel writes the status.
    let got = unsafe { libc::waitpid(-1, &raw mut status, flags) };
    if got < 0 { Err(errno()) } else { Ok(got) }
}

fn nobody_is_below() {
    for flags in [libc::WNOHANG, libc::WNOHANG | libc::__WALL] {
        assert_eq!(wait_for_any(flags), Err(libc::ECHILD), "a child that the program did not make");
    }
    assert_eq!(wait_for_any(0), Err(libc::ECHILD));
    assert!(!sigchld_came(), "a child ended that the program did not make");
}

/// A program that waits until nobody is below it any more.
fn reaper() {
    hold_back_sigchld();
    adopt_orphans(true);
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(50);
    two.fill_from(50);
    merge_pair(one, two);
    nobody_is_below();
    assert!(adopts_orphans(), "it still is one");
    // It adopts its own orphans as before.
    let (mut ends, mut orphan) = ([0; 2], 0_i32);
    // SAFETY: makes two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let child = fork(|| {
        let orphan = fork(|| std::thread::sleep(std::time::Duration::from_millis(100)));
        // SAFETY: the kernel reads one integer.
        assert_eq!(unsafe { libc::write(ends[1], (&raw const orphan).cast(), 4) }, 4);
    });
    // SAFETY: the kernel writes one integer.
    assert_eq!(unsafe { libc::read(ends[0], (&raw mut orphan).cast(), 4) }, 4);
    let mut gone = [wait_for_any(0).unwrap(), wait_for_any(0).unwrap()];
    gone.sort_unstable();
    assert_eq!(gone, [child.min(orphan), child.max(orphan)]);
    assert_eq!(wait_for_any(0), Err(libc::ECHILD));
    one.check_from(50);
    two.check_from(50);
}

/// D-7: a child subreaper is merged, and its helper is not among its children.
///
/// Seen to fail: before the attribute was cleared around the clones, waitpid found the helper.
#[test]
fn d_7_a_subreaper_does_not_adopt_its_helper() {
    let stand = Stand::on_request();
    stand.run("reaper");
    stand.assert_merged(PAGES as u64);
}

/// Becomes one after its helper came, and executes itself as one.
fn reaper_again() {
    if std::env::var("ROUND").is_ok() {
        assert!(adopts_orphans(), "exec keeps it");
        // The helper of the program before is not this one's child either.
        reaper();
        return;
    }
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(50);
    two.fill_from(50);
    merge_pair(one, two);
    hold_back_sigchld();
    adopt_orphans(true);
    nobody_is_below();
    let error = std::process::Command::new(std::env::current_exe().unwrap()).env("ROUND", "1").exec();
    panic!("{error}");
}

/// D-7: neither a helper that was there before, nor one of the program that was executed over.
#[test]
fn d_7_a_subreaper_executes_itself() {
    let stand = Stand::on_request();
    stand.run("reaper_again");
    stand.assert_merged(2 * PAGES as u64);
}

/// Hands memory over while it has children, who may end and leave orphans at any moment.
fn reaper_of_others() {
    hold_back_sigchld();
    adopt_orphans(true);
    let (mut ends, mut byte) = ([0; 2], [0_u8]);
    // SAFETY: makes two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let child = fork(|| {
        // SAFETY: the child's own descriptor; ends when the parent closes its end.
        unsafe {
            libc::close(ends[1]);
            libc::read(ends[0], byte.as_mut_ptr().cast(), 1);
        }
    });
    stays_plain();
    assert!(adopts_orphans());
    assert_eq!(wait_for_any(libc::WNOHANG), Ok(0), "the child lives");
    // SAFETY: the victim's own descriptor.
    unsafe { libc::close(ends[1]) };
    assert_eq!(wait_for_any(0), Ok(child));
    assert_eq!(wait_for_any(0), Err(libc::ECHILD));
}

/// Memory that is handed over, and not merged.
fn stays_plain() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(50);
    two.fill_from(50);
    // What the kernel's own KSM says.
    one.mergeable();
    two.mergeable();
    assert_eq!(merge_now(), 0);
    assert_eq!((one.stored(), two.stored()), (Vec::new(), Vec::new()));
    one.check_from(50);
    two.check_from(50);
    let theirs = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!theirs.contains("pagefold-control"), "a helper was set up");
}

fn is_told(stand: &Stand) {
    // The word of a victim that has ended may still be on its way.
    wait_until("the broker is told", || {
        stand.summary().helper_refused.iter().any(|text| text.contains("child subreaper"))
    });
}

/// D-7: with a child that could leave an orphan behind meanwhile the attribute cannot be cleared, so there is no helper.
#[test]
fn d_7_a_subreaper_with_children_is_left_alone() {
    let stand = Stand::on_request();
    stand.run("reaper_of_others");
    is_told(&stand);
}

fn reaper_with_threads() {
    hold_back_sigchld();
    adopt_orphans(true);
    let thread = std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_secs(2)));
    stays_plain();
    nobody_is_below();
    assert!(adopts_orphans());
    thread.join().unwrap();
}

/// D-7: nor with threads, which may fork, or look.
#[test]
fn d_7_a_subreaper_with_threads_is_left_alone() {
    let stand = Stand::on_request();
    stand.run("reaper_with_threads");
    is_told(&stand);
}

/// Memory handed over below a subreaper.
fn below() {
    stays_plain();
}

/// Starts a program two levels below that hands memory over.
fn starts_below(seen: impl FnOnce(i32)) {
    let program = std::env::current_exe().unwrap();
    let child = fork(|| {
        let mut command = std::process::Command::new(program);
        let error = command.env("VICTIM", "below").exec();
        panic!("{error}");
    });
    seen(child);
}

fn reaper_above() {
    hold_back_sigchld();
    adopt_orphans(true);
    starts_below(|child| {
        assert_eq!(wait_for_any(libc::__WALL), Ok(child));
        assert_eq!(wait_for_any(libc::__WALL), Err(libc::ECHILD));
    });
    // It has ended to be one: the next program below it is merged.
    adopt_orphans(false);
    reap(fork(|| {
        let (one, two) = (Region::map(PAGES), Region::map(PAGES));
        one.fill_from(50);
        two.fill_from(50);
        merge_pair(one, two);
    }));
    assert_eq!(wait_for_any(libc::__WALL), Err(libc::ECHILD));
}

/// D-7: a subreaper between a program and the broker gets no stray child; the program is left alone.
///
/// Seen to fail: before anybody looked, waitpid found the helper of the program below.
#[test]
fn d_7_a_subreaper_above_gets_no_stray_child() {
    let stand = Stand::on_request();
    stand.run("reaper_above");
    is_told(&stand);
    stand.assert_merged(PAGES as u64);
}

/// As a program that the gate does not see into.
fn reaper_above_unseen() {
    let result: i64;
    // SAFETY: prctl(PR_SET_CHILD_SUBREAPER, 1), not by way of libc.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") libc::SYS_prctl => result,
            in("rdi") i64::from(libc::PR_SET_CHILD_SUBREAPER),
            in("rsi") 1,
            in("rdx") 0,
            in("r10") 0,
            in("r8") 0,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    assert_eq!(result, 0);
    assert!(adopts_orphans());
    starts_below(|child| {
        let mut gone = Vec::new();
        while let Ok(id) = wait_for_any(libc::__WALL) {
            gone.push(id);
        }
        assert!(gone.contains(&child));
        assert_eq!(gone.len(), 2, "a helper that finds itself adopted leaves, and does so once");
    });
}

/// D-7: where nobody could know, the helper finds out who has adopted it, and leaves before it has done anything.
#[test]
fn d_7_a_helper_that_was_adopted_wrongly_leaves() {
    let stand = Stand::on_request();
    stand.run("reaper_above_unseen");
    is_told(&stand);
}

fn first_of_a_name_space() {
    // SAFETY: concerns the children to come.
    if unsafe { libc::unshare(libc::CLONE_NEWPID) } != 0 {
        tell("skipped: no right to make a process name space");
        return;
    }
    let first = fork(|| {
        assert_eq!(pid(), 1);
        let (one, two) = (Region::map(PAGES), Region::map(PAGES));
        one.mergeable();
        two.mergeable();
        for flags in [libc::WNOHANG, libc::WNOHANG | libc::__WALL] {
            assert_eq!(wait_for_any(flags), Err(libc::ECHILD), "the first process got a stray child");
        }
        // Another one, of which the first would adopt the helper.
        let second = fork(|| {
            let (one, two) = (Region::map(PAGES), Region::map(PAGES));
            one.mergeable();
            two.mergeable();
        });
        assert_eq!(wait_for_any(libc::__WALL), Ok(second));
        assert_eq!(wait_for_any(libc::__WALL), Err(libc::ECHILD));
        end_with(|| ());
    });
    reap(first);
}

/// D-7: the first process of a name space adopts every orphan in it.
#[test]
fn d_7_the_first_process_of_a_name_space() {
    let stand = Stand::on_request();
    let output = stand.run("first_of_a_name_space");
    if !output.contains("skipped:") {
        is_told(&stand);
    }
}
