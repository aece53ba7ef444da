//! Programs that are managed whole and whose helper or broker is killed.

use crate::new_code::{bring, bring_all, bring_alone, in_company, stand_without_shell, try_to_bring};
use crate::process::helpers_of;
use crate::stand::Stand;
use crate::victim::{Region, Victim, fork, hear, pid, reap, tell, wait_until};
use crate::whole::{FIRST, LARGE, large_pair, wait_whole};

pub(crate) const VICTIMS: &[Victim] =
    &[("whole_orphan", orphan), ("whole_killed", killed), ("whole_forsaken", forsaken)];

/// The broker is gone, and what was merged is still merged; children are forked, and code comes.
fn orphan() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    tell("merged");
    hear();
    assert!(one.merged() >= LARGE - 8 && two.merged() >= LARGE - 8);
    // Forks by themselves.
    reap(fork(|| one.check_from(FIRST)));
    // Children that get no helper any more: whoever is alone gives the pages back by himself.
    reap(fork(|| bring_alone(one, two)));
    reap(fork(|| {
        in_company(2, || {
            let error = try_to_bring("/bin/sh").expect_err("code came into merged memory");
            assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
        });
        assert!(one.merged() >= LARGE - 8 && two.merged() >= LARGE - 8);
        wait_until("the others are gone", || {
            std::fs::read_to_string("/proc/self/status").unwrap().contains("\nThreads:\t1\n")
        });
        bring_alone(one, two);
    }));
    bring("/bin/sh");
    assert_eq!((one.stored().len(), two.stored().len()), (0, 0), "it came, and pages are still merged");
    one.check_from(FIRST);
    two.check_from(FIRST);
    tell(&format!("{} has its own", pid()));
}

/// Seen to fail: nobody was left who could give pages back, and the program could not load libraries any more (ENOMEM).
#[test]
fn code_comes_when_the_broker_has_gone() {
    let stand = Stand::of_all(|_| true);
    let mut victim = stand.start("whole_orphan");
    victim.expect("merged");
    let _ = stand.broker.ask(broker::Wish::Stop);
    victim.say("go on");
    victim.succeed();
}

/// Kills the helper, once there is one: any call through the gate may bring it.
fn kill_helper() {
    wait_until("a helper is there", || {
        Region::map(1).unmap();
        // SAFETY: sends a signal.
        helpers_of(pid()).first().is_some_and(|helper| unsafe { libc::kill(*helper, libc::SIGKILL) } == 0)
    });
}

/// Helpers are killed while everything is merged, and the program goes on at once.
fn killed() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    for _ in 0..2 {
        kill_helper();
        bring("/proc/self/exe");
        assert!(one.merged() >= LARGE - 40 && two.merged() >= LARGE - 8);
        kill_helper();
        let part = one.part(100, 120);
        // SAFETY: locks pages, and unlocks them.
        assert_eq!(unsafe { libc::mlock(part.pointer(0), part.len()) }, 0, "{}", std::io::Error::last_os_error());
        assert!(part.stored().is_empty());
        // SAFETY: as above.
        assert_eq!(unsafe { libc::munlock(part.pointer(0), part.len()) }, 0);
    }
    // What comes later is merged as well.
    kill_helper();
    let three = Region::map(LARGE);
    three.fill_from(FIRST);
    wait_until("another helper merges", || {
        Region::map(1).unmap();
        three.merged() >= LARGE - 8
    });
    kill_helper();
    bring_all(one, two);
    three.check_from(FIRST);
    bring("/bin/sh");
}

/// Seen to fail: while a helper that was killed had no successor, which was for ever, code that came was refused, and locks.
#[test]
fn a_killed_helper_is_replaced_at_once() {
    stand_without_shell().run("whole_killed");
}

/// Broker and helper are both gone, everything is merged, and there are other threads: nobody can give pages back.
fn forsaken() {
    let (one, two) = large_pair();
    wait_whole(one, two);
    tell("merged");
    hear();
    kill_helper();
    in_company(2, || {
        for _ in 0..4 {
            let error = try_to_bring("/bin/sh").expect_err("code came into merged memory");
            assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
            assert!(one.merged() >= LARGE - 8 && two.merged() >= LARGE - 8);
        }
    });
    one.check_from(FIRST);
    two.check_from(FIRST);
}

/// Seen to fail: what had been refused once was let in when it came again.
#[test]
fn who_asks_twice_hears_the_same() {
    let stand = Stand::of_all(|_| true);
    let mut victim = stand.start("whole_forsaken");
    victim.expect("merged");
    let _ = stand.broker.ask(broker::Wish::Stop);
    wait_until("the broker is gone", || stand.broker.summary().is_err());
    victim.say("go on");
    victim.succeed();
}
