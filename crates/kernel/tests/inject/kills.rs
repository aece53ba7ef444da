//! The injector is killed, at each of its steps and anywhere else.

use std::time::Duration;

use pagefold_kernel::inject::{Call, Options, Refusal, Step, inject};

use crate::harness::{Target, injector, wait_until};

const ROLES: [&str; 12] = [
    "nanosleep",
    "poll",
    "futex_timed",
    "epoll_timed",
    "epoll_pwait2",
    "sigtimedwait",
    "ppoll",
    "ppoll_closed",
    "read",
    "futex",
    "epoll",
    "compute",
];

/// Not reached unless there is a signal.
const NEEDS_SIGNAL: Step = Step::SignalPassed;

#[test]
fn at_each_step_in_each_call() {
    let mut target = Target::start(&ROLES);
    for step in Step::ALL.into_iter().filter(|step| *step != NEEDS_SIGNAL) {
        for role in ROLES {
            // A call that a stop breaks shows it, if the injector dies before it has so much as read the registers.
            let shows = matches!(role, "epoll_timed" | "epoll_pwait2" | "sigtimedwait" | "epoll");
            if matches!(step, Step::Interrupted | Step::Stopped) && shows {
                continue;
            }
            // Repaired, and the slot not cleared, only where a call was broken, which depends on the moment.
            let status = injector(target.pid(), Some(target.tid(role)), 50, Some((step, 0))).wait().unwrap();
            println!("{step:?} {role}: {status}");
            let lives = target.check();
            assert!(lives.contains_key(role));
            target.switch(true, Some(role));
        }
    }
    target.check();
}

/// What a dead injector leaves is not taken from a thread that runs, of which nobody knows where; the thread itself can
/// have it again.
#[test]
fn a_slot_is_not_taken_from_a_thread_that_runs() {
    let mut target = Target::start(&["compute", "nanosleep"]);
    target.leave_one_slot();
    let (pid, runs, sleeps) = (target.pid(), target.tid("compute"), target.tid("nanosleep"));
    injector(pid, Some(runs), 1, Some((Step::AtEntry, 0))).wait().unwrap();
    let only = |tid| Options { tid: Some(tid), ..Options::default() };
    let error = inject(pid, &[Call::memory_merge(true)], &only(sleeps)).unwrap_err();
    assert!(matches!(error.refusal(), Some(Refusal::NoPlaceForCode { .. })), "{error:?}");
    target.switch(true, Some("compute"));
    target.switch(false, Some("nanosleep"));
    target.check();
}

#[test]
fn anywhere_five_hundred_times() {
    let roles: Vec<&str> =
        ROLES.into_iter().filter(|role| !role.starts_with("epoll") && *role != "sigtimedwait").collect();
    let mut target = Target::start(&roles);
    let mut seed = 12345_u64;
    for round in 0..500 {
        let role = roles[round % roles.len()];
        let mut child = injector(target.pid(), Some(target.tid(role)), 1_000_000, None);
        // Until it is at it.
        let tid = target.tid(role);
        wait_until("no injector came", || pagefold_kernel::status::read(tid).unwrap().tracer_pid != 0);
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_micros(seed >> 54));
        child.kill().unwrap();
        child.wait().unwrap();
        if round % 25 == 0 {
            target.check();
            target.switch(round % 2 == 0, Some(role));
        }
    }
    for role in roles {
        target.switch(true, Some(role));
    }
    println!("{:#?}", target.check());
}
