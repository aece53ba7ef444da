//! Calls go on as if nothing had been.

use std::time::Duration;

use pagefold_kernel::inject::{Call, Options, inject};

use crate::harness::{Target, scheduler_tells, wait_until};

/// All that sleep or compute for themselves.
const ALL: [&str; 19] = [
    "nanosleep",
    "clock_nanosleep",
    "poll",
    "futex_timed",
    "epoll_timed",
    "epoll_pwait",
    "epoll_pwait2",
    "sigtimedwait",
    "semtimedop",
    "io_getevents",
    "io_pgetevents",
    "ppoll",
    "select",
    "recv_timed",
    "read",
    "futex",
    "epoll",
    "accept",
    "compute",
];

#[test]
fn a_thousand_times_in_each_call_and_nobody_notices() {
    let mut target = Target::start(&ALL);
    for round in 0..1000 {
        for role in ALL {
            let done = target.switch(round % 2 == 0, Some(role));
            assert_eq!(done.tid, target.tid(role));
            assert_eq!(done.interrupted, 0, "{role}");
            assert!(
                done.timeouts_restarted == 0 || ["recv_timed", "read", "accept"].contains(&role),
                "{role}: {done:?}"
            );
        }
    }
    assert!(!target.merges());
    target.switch(true, None);
    assert!(target.merges());
    let said = target.check();
    println!("{said:#?}");
}

#[test]
fn a_time_out_is_not_put_off() {
    let roles = [
        "nanosleep_long",
        "poll_long",
        "futex_timed_long",
        "epoll_timed_long",
        "epoll_pwait2_long",
        "sigtimedwait_long",
        "semtimedop_long",
        "io_getevents_long",
        "io_pgetevents_long",
    ];
    let mut target = Target::start(&roles);
    // Each of them is stopped some hundred times in one of its waits of 400 ms.
    for round in 0..400 {
        for role in roles {
            target.switch(round % 2 == 0, Some(role));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    for (role, said) in target.check() {
        println!("{role}: {} waits, at most {:?} late", said.count, said.latest);
        assert!(said.count >= 2, "{role} is put off: {said:?}");
    }
}

/// One stop late in each wait: the time before it counts, wherever the scheduler can tell. That is for most waits even on
/// a busy machine; one of all of them must be.
#[test]
fn time_that_has_passed_before_the_first_stop_counts() {
    if !scheduler_tells() {
        return;
    }
    let mut lateness = Vec::new();
    for role in ["epoll_timed_long", "sigtimedwait_long", "semtimedop_long", "epoll_pwait2_long"] {
        for _ in 0..6 {
            let mut target = Target::start(&[role]);
            std::thread::sleep(Duration::from_millis(300));
            target.switch(true, Some(role));
            wait_until("the wait has ended", || target.ask()[role].count > 0);
            lateness.push(target.check()[role].latest);
        }
    }
    lateness.sort();
    println!("{lateness:?} late");
    assert!(lateness[0] < Duration::from_millis(200), "{lateness:?}");
}

/// Who is stopped inside a restartable sequence leaves it by its abort handler, as after any preemption: at each stop.
#[test]
fn a_restartable_sequence_is_aborted() {
    let mut target = Target::start(&["rseq"]);
    for round in 0..500 {
        target.switch(round % 2 == 0, Some("rseq"));
        let before = target.ask()["rseq"].count;
        target.switch(round % 2 == 0, Some("rseq"));
        wait_until("it was aborted", || target.ask()["rseq"].count > before);
    }
    target.check();
}

/// A thread in the middle of a transfer would return early: others are taken, unless it has just been woken, which cannot be
/// told from any other that runs. Where it is the only one, that is counted.
#[test]
fn a_transfer_is_left_alone_if_there_is_another_thread() {
    let mut target = Target::start(&["write_all", "epoll_timed"]);
    let writer = target.tid("write_all");
    let (mut taken, mut counted) = (0, 0);
    for round in 0..400 {
        let done = target.switch(round % 2 == 0, None);
        taken += u32::from(done.tid == writer);
        counted += done.interrupted;
    }
    assert!(taken < 100, "{taken} times of 400");
    let only: u32 = (0..100).map(|_| target.switch(false, Some("write_all")).interrupted).sum();
    let said = target.ask()["write_all"].clone();
    println!("taken {taken} times of 400; {counted} and {only} counted: {said:?}");
    assert!(only > 10 && said.errors <= u64::from(counted + only), "{counted} and {only} counted: {said:?}");
}

/// Once asked to stop, a thread is out of its call: it is waited for until that is repaired, however short the time-out.
#[test]
fn a_time_out_that_is_too_short_breaks_no_call() {
    for role in ["epoll_timed", "sigtimedwait", "semtimedop"] {
        let mut target = Target::start(&[role]);
        let options = Options { timeout: Duration::ZERO, tid: Some(target.tid(role)), ..Options::default() };
        for _ in 0..100 {
            let _ = inject(target.pid(), &[Call::getpid()], &options);
        }
        target.check();
    }
}
