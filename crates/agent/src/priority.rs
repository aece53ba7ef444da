//! The helper's real-time priority while it merges: whoever is preempted with pages in its hands makes the program wait
//! for long.

use core::sync::atomic::Ordering::SeqCst;

use abi::control::{Plan, plan, plan_flags};

use crate::sys::{self, nr, sys};

const SCHED_OTHER: u64 = 0;
const SCHED_FIFO: u64 = 1;
const SCHED_RESET_ON_FORK: u64 = 0x4000_0000;

/// How long the helper sleeps between two batches while it has real-time priority all the time.
const OTHERS_TURN_NS: u64 = 50_000;

/// How the helper comes to its priority for the plan in hand.
#[derive(Default)]
pub(crate) struct Priority {
    /// It takes it itself for each batch: the broker has raised its limit.
    own: bool,
    /// The broker has given it for the whole plan.
    given: bool,
}

impl Priority {
    /// What the [`plan_flags`] of a plan say.
    pub(crate) fn of_plan(flags: u32) -> Self {
        Self { own: flags & plan_flags::RAISE != 0, given: flags & plan_flags::RAISED != 0 }
    }

    /// The gate was closed: pages are going to be frozen.
    pub(crate) fn begin_batch(&self) {
        if self.own {
            set_policy(SCHED_FIFO, 1);
        }
    }

    /// The gate is open again. Whoever was made to wait goes on now, before the next batch; `next` is the plan that may
    /// have been made ready meanwhile, before which the program is answered with the priority of that one.
    pub(crate) fn end_batch(&self, next: &Plan) {
        if self.own {
            set_policy(SCHED_OTHER, 0);
        }
        let given_for_next =
            || next.state.load(SeqCst) == plan::READY && next.flags.load(SeqCst) & plan_flags::RAISED != 0;
        if self.given || given_for_next() {
            sys::sleep_ns(OTHERS_TURN_NS);
        }
    }

    /// The plan is done with.
    pub(crate) fn end_plan(&mut self) {
        if self.given {
            self.lower();
        }
    }

    /// Gives back what the broker has given for a plan. It may be dead, and not do so itself.
    pub(crate) fn lower(&mut self) {
        self.given = false;
        // That children do not inherit it was the broker's wish, and is not to be taken back without privileges.
        set_policy(SCHED_OTHER | SCHED_RESET_ON_FORK, 0);
    }
}

fn set_policy(policy: u64, priority: u32) {
    // SAFETY: the kernel reads a sched_param, which is one integer. It concerns this process only.
    unsafe { sys!(nr::SCHED_SETSCHEDULER, 0, policy, (&raw const priority) as u64) };
}
