//! Signals that arrive meanwhile have the effect that they would have had.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pagefold_kernel::Pid;
use pagefold_kernel::inject::{Call, Options, inject};

use crate::harness::{Target, injector, wait_until};

/// Sends a signal to one thread.
pub(crate) fn send(pid: Pid, tid: Pid, signal: i32) {
    // SAFETY: the call takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_tgkill, pid.0, tid.0, signal) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// True while a thread is in a call of its own with this number, asleep and not in a stop.
pub(crate) fn waits_in(tid: Pid, number: i64) -> bool {
    fs::read_to_string(format!("/proc/{tid}/syscall")).unwrap().starts_with(&format!("{number} "))
}

/// Does `work` while injections into a thread go on, and count up.
fn while_injecting(pid: Pid, tid: Pid, work: impl FnOnce(&AtomicU32)) {
    let (stop, count) = (AtomicBool::new(false), AtomicU32::new(0));
    std::thread::scope(|scope| {
        let injections = scope.spawn(|| {
            let options = Options { tid: Some(tid), ..Options::default() };
            while !stop.load(Ordering::Relaxed) {
                let on = count.fetch_add(1, Ordering::Relaxed).is_multiple_of(2);
                assert_eq!(inject(pid, &[Call::memory_merge(on)], &options).unwrap().results, [Ok(0)]);
            }
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(&count)));
        stop.store(true, Ordering::Relaxed);
        injections.join().unwrap();
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

const WAITS: [(&str, i64); 6] = [
    ("read_forever", libc::SYS_read),
    ("epoll_forever", libc::SYS_epoll_wait),
    ("epoll_hour", libc::SYS_epoll_wait),
    ("epoll_pwait2_hour", libc::SYS_epoll_pwait2),
    ("sleep_hour", libc::SYS_nanosleep),
    ("futex_forever", libc::SYS_futex),
];

/// A handler without SA_RESTART ends the call that it interrupts with EINTR: each signal that arrives in a call ends it
/// once, and nothing else does. Except for the moment in which a thread is on its way back to its call, which the kernel
/// has decided to make again by then: a signal comes before the call, as after any other stop (SIGSTOP, strace). On a
/// loaded machine that was seen once in some ten thousand signals here.
#[test]
fn each_signal_ends_the_call_it_interrupts_and_nothing_else_does() {
    for (role, number) in WAITS {
        let mut target = Target::start(&[role]);
        let (pid, tid) = (target.pid(), target.tid(role));
        let (mut sent, mut before_the_call) = (0, 0);
        while_injecting(pid, tid, |injections| {
            while sent < 200 || injections.load(Ordering::Relaxed) < 300 {
                wait_until(role, || waits_in(tid, number) || waits_in(tid, libc::SYS_restart_syscall));
                send(pid, tid, libc::SIGUSR1);
                sent += 1;
                let mut handled = None;
                wait_until(role, || {
                    let said = target.ask()[role].clone();
                    assert_eq!(said.errors, 0, "{said:?}");
                    if said.handled < sent {
                        return false;
                    }
                    let late = handled.get_or_insert_with(Instant::now).elapsed() > Duration::from_secs(2);
                    before_the_call += u64::from(late);
                    (said.count + before_the_call, said.handled) == (sent, sent)
                });
            }
            assert!(before_the_call <= 1 + sent / 200, "{role}: {before_the_call} of {sent} signals ended no call");
        });
        std::thread::sleep(Duration::from_millis(20));
        let said = target.check()[role].clone();
        println!("{role}: {said:?}");
        assert_eq!((said.count + before_the_call, said.handled), (sent, sent), "{role}");
    }
}

/// Handlers with SA_RESTART change nothing at all; every signal of a storm is handled once.
#[test]
fn a_storm_is_handled_signal_by_signal() {
    let restart = libc::SIGRTMIN() + 2;
    for role in ["read", "futex", "compute"] {
        let mut target = Target::start(&[role]);
        let (pid, tid) = (target.pid(), target.tid(role));
        let mut sent = 0;
        while_injecting(pid, tid, |injections| {
            while sent < 3000 || injections.load(Ordering::Relaxed) < 300 {
                send(pid, tid, restart);
                sent += 1;
                std::thread::sleep(Duration::from_micros(100));
            }
        });
        wait_until(role, || target.ask()[role].handled == sent);
        println!("{role}: {:?}", target.check());
    }
}

/// A stop signal that arrives meanwhile is kept, and SIGCONT ends it.
#[test]
fn a_process_that_is_stopped_meanwhile_stays_stopped() {
    let mut target = Target::start(&["nanosleep", "compute", "epoll_timed"]);
    let pid = target.pid();
    for round in 0..100 {
        let mut other = injector(pid, None, 1_000_000, None);
        std::thread::sleep(Duration::from_millis(15 + round % 5));
        // SAFETY: the call takes numbers only.
        assert_eq!(unsafe { libc::kill(pid.0, libc::SIGSTOP) }, 0);
        // Refuses what is stopped, so it ends.
        let status = other.wait().unwrap();
        assert!(!status.success());
        let states = |letter: u8| {
            let threads = pagefold_kernel::status::threads(pid).unwrap();
            threads.iter().all(|tid| pagefold_kernel::status::read(*tid).unwrap().state == letter)
        };
        wait_until("the process is stopped", || states(b'T'));
        std::thread::sleep(Duration::from_millis(2));
        assert!(states(b'T'));
        // SAFETY: as above.
        assert_eq!(unsafe { libc::kill(pid.0, libc::SIGCONT) }, 0);
        // The stop itself breaks calls, as without us: those roles that it breaks are not in here but epoll.
        let said = target.ask();
        assert_eq!(said["nanosleep"].errors + said["compute"].errors, 0, "{said:?}");
    }
}

/// A handler that was called in a slot goes over to another stack, and comes back to the slot much later.
#[test]
fn handlers_that_switch_stacks_come_back_to_their_slot() {
    let mut target = Target::start(&["fibers"]);
    let (pid, tid) = (target.pid(), target.tid("fibers"));
    let switch = libc::SIGRTMIN() + 3;
    for round in 0..200_u64 {
        for _ in 0..3 {
            wait_until("it waits", || waits_in(tid, libc::SYS_epoll_wait));
            target.switch(round % 2 == 0, Some("fibers"));
        }
        // Not on its way back to the call, which a signal does not end before it is made.
        wait_until("it waits", || waits_in(tid, libc::SYS_epoll_wait));
        send(pid, tid, switch);
        // Each time but the first, the context that it goes over to returns from its own handler, and ends its call.
        wait_until("it has switched", || {
            let said = target.ask()["fibers"].clone();
            assert_eq!(said.errors, 0, "{said:?}");
            (said.handled, said.count) == (round + 1, round)
        });
    }
    target.check();
}

/// Calls with a mask of their own: a signal that is let through only in the call ends it, each one once.
#[test]
fn signals_that_only_the_call_lets_through_end_it() {
    for role in ["ppoll_open", "pselect_open", "epoll_pwait_open", "epoll_pwait_open_hour", "sigsuspend_open"] {
        let mut target = Target::start(&[role]);
        let (pid, tid) = (target.pid(), target.tid(role));
        let mut sent = 0;
        while_injecting(pid, tid, |injections| {
            while sent < 300 || injections.load(Ordering::Relaxed) < 1000 {
                send(pid, tid, libc::SIGUSR1);
                sent += 1;
                wait_until(role, || {
                    let said = target.ask()[role].clone();
                    assert_eq!(said.errors, 0, "{role}: {said:?}");
                    (said.count, said.handled) == (sent, sent)
                });
            }
        });
        println!("{role}: {:?}", target.ask()[role]);
    }
}

/// A signal that is kept away only in the call waits for its end.
#[test]
fn signals_that_only_the_call_keeps_away_do_not_end_it() {
    for role in ["ppoll_closed", "epoll_pwait_closed", "epoll_pwait_closed_hour"] {
        let mut target = Target::start(&[role]);
        let (pid, tid) = (target.pid(), target.tid(role));
        let mut sent = 0;
        while_injecting(pid, tid, |injections| {
            while sent < 1000 || injections.load(Ordering::Relaxed) < 1000 {
                send(pid, tid, libc::SIGUSR1);
                sent += 1;
                wait_until(role, || target.ask()[role].handled == sent);
            }
        });
        println!("{role}: {:?}", target.check()[role]);
    }
}
