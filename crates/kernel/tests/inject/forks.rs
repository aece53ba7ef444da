//! Slots that a fork copies, marked as the parent's.

use std::fs;

use pagefold_kernel::Pid;
use pagefold_kernel::inject::{Call, InjectError, Injected, Options, Refusal, inject};

use crate::harness::{Target, wait_until};
use crate::signals::{send, waits_in};

/// The only slot is in use for a call that goes on in it. Has a child made by a signal; the child.
fn child_of(target: &mut Target, in_use_for: &str, signal: i32) -> Pid {
    let (pid, forks, holder) = (target.pid(), target.tid("fork_when_told"), target.tid(in_use_for));
    target.leave_one_slot();
    wait_until("it waits", || waits_in(holder, libc::SYS_epoll_wait));
    target.switch(true, Some(in_use_for));
    send(pid, forks, signal);
    let mut child = 0;
    wait_until("it has a child", || {
        child = target.ask()["fork_when_told"].count;
        child != 0
    });
    Pid(i32::try_from(child).unwrap())
}

fn attempt(child: Pid) -> Result<Injected, InjectError> {
    inject(child, &[Call::getpid()], &Options::default())
}

#[test]
fn a_slot_that_its_thread_had_left_before_the_fork_is_free_in_the_child() {
    let mut target = Target::start(&["fork_when_told"]);
    let child = child_of(&mut target, "fork_when_told", libc::SIGUSR1);
    assert_eq!(attempt(child).unwrap().results, [Ok(child.0 as u64)]);
}

#[test]
fn a_slot_of_a_thread_that_did_not_come_along_is_free_in_the_child() {
    let mut target = Target::start(&["fork_when_told", "epoll_hour"]);
    let child = child_of(&mut target, "epoll_hour", libc::SIGUSR1);
    assert_eq!(attempt(child).unwrap().results, [Ok(child.0 as u64)]);
    target.switch(false, Some("epoll_hour"));
    target.check();
}

/// The child is in a handler that was called in the slot, and will return there.
#[test]
fn a_slot_that_the_child_will_return_to_is_not_free() {
    let mut target = Target::start(&["fork_when_told"]);
    let child = child_of(&mut target, "fork_when_told", libc::SIGRTMIN() + 4);
    wait_until("it is in its handler", || waits_in(child, libc::SYS_read));
    let error = attempt(child).unwrap_err();
    assert!(matches!(error.refusal(), Some(Refusal::NoPlaceForCode { .. })), "{error:?}");
    send(child, child, libc::SIGUSR1);
    wait_until("it has come back", || waits_in(child, libc::SYS_pause));
    assert!(fs::metadata(format!("/proc/{child}")).is_ok());
    assert_eq!(attempt(child).unwrap().results, [Ok(child.0 as u64)]);
}
