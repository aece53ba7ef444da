//! The helper's life: introduce itself, execute plans, answer the program, leave.
//!
//! What if, at any step,
//! * the program is stopped, debugged or frozen? The helper is no thread of it and goes on.
//! * the program exits or execs? The address space lives as long as the helper; the kernel clears the main thread's
//!   tid word, the broker sees the process end or have another address space, either makes the helper leave. On its way
//!   out it wakes everybody who waits on that word, since a wake-up meant for pthread_join may have come to nobody.
//! * the program changes its uid? The helper has no privileges left that could outlive that.
//! * the broker dies? The socket ends; the batch in hand is finished or given back (the reference check has a time
//!   limit), then the helper leaves. What is merged stays merged. Where the broker chose what to manage the helper stays,
//!   to give pages back and for nothing else, as long as any are merged: the program does not know of them, and may have
//!   to have its own before it can go on (code comes, a ring is set up).
//! * the helper itself is killed? The broker and the guardian hold the userfaultfd too: pages stay frozen until they
//!   are given back, and then the gate is opened. See the broker.

use core::sync::atomic::Ordering::SeqCst;

use abi::control::{ask, check_mode, plan, plan_flags};
use abi::mark::Keep;
use abi::place::{Action, Outcome};
use abi::wire::Message;
use abi::{BATCH_MAX, PLAN_MAX};
use merge::{AddressSpace, Ended, Entry, Order, PageState, Pages, RegisterMode, run_plan};

use crate::alone;
use crate::calls::USER_END;
use crate::gate;
use crate::introduction::{SETUP, introduce};
use crate::link::{self, Link, Received};
use crate::priority::Priority;
use crate::scope;
use crate::space::Space;
use crate::state::STATE;
use crate::sys::{self, PAGE, nr, sys};

/// How often the helper looks up without being rung.
const LOOK_UP_NS: u64 = 100_000_000;
const PR_SET_NAME: u64 = 15;
/// For how long a piece is tried that somebody else holds or keeps changing: who asked waits, and hears an error else. On a
/// machine with ten threads for each CPU, 0.2 s were too few: one of some hundred libraries could not be loaded.
const ASK_PATIENCE_NS: u64 = 1_000_000_000;

/// Runs until it is time to leave. The caller then ends the process.
pub(crate) fn main(connect: fn() -> Option<Link>) {
    // SAFETY: names this process only.
    unsafe { sys!(nr::PRCTL, PR_SET_NAME, c"pagefold-helper".as_ptr() as u64, 0, 0, 0) };
    let before = STATE.control();
    let Some((mut space, link)) = introduce(connect) else {
        if SETUP.ready.load(SeqCst) == 0 {
            SETUP.ready.store(2, SeqCst);
            sys::futex_wake(&SETUP.ready);
        }
        leave();
        return;
    };
    // From here on it moves pages.
    alone::is_shared();
    if before.is_none_or(gate::wait_until_left) {
        serve(&mut space, &link);
    }
    leave();
}

/// Says that no helper is here any more, and wakes those who may have missed a wake-up through it.
fn leave() {
    // The next one may be there already.
    let pid = sys::getpid();
    if let Some(control) = STATE.control() {
        let _ = control.helper.compare_exchange(pid, 0, SeqCst, SeqCst);
    }
    let _ = STATE.helper.compare_exchange(pid, 0, SeqCst, SeqCst);
    let word = STATE.tid_word.load(SeqCst);
    if word != 0 {
        // SAFETY: the kernel looks an address up; nothing is read or written.
        unsafe { sys!(nr::FUTEX, word, 1, i32::MAX as u64) };
    }
    if let Some(control) = STATE.control() {
        sys::futex_wake(&control.ask.state);
    }
}

fn serve(space: &mut Space, link: &Link) {
    let control = space.control;
    let mut alone = false;
    loop {
        let bell = control.bell.load(SeqCst);
        if alone {
            // Something may have stayed registered all the same.
            space.dismiss_forks();
        }
        if control.ask.state.compare_exchange(ask::ASKED, ask::SERVED, SeqCst, SeqCst).is_ok() {
            let answer = if give_back(space) { ask::DONE } else { ask::FAILED };
            // Unless who asked has died meanwhile, and somebody else asks for something else.
            let _ = control.ask.state.compare_exchange(ask::SERVED, answer, SeqCst, SeqCst);
            sys::futex_wake(&control.ask.state);
            // Nobody reads events: only when the userfaultfd goes does a fork go on that came by another way than the gate.
            if alone && (!is_needed() || space.fork_is_pending()) {
                return;
            }
        }
        while !alone {
            match link.receive(false) {
                Received::Nothing => break,
                Received::Gone if stays_alone(space) => alone = true,
                Received::Message(Message::Stay, _) if stays_alone(space) => {
                    alone = true;
                    link.send(Message::Stay, None);
                }
                Received::Gone | Received::Message(Message::Leave | Message::Stay, _) => return,
                Received::Message(Message::Segment { index, pages }, Some(fd)) => space.segments.add(index, pages, fd),
                Received::Message(Message::Retire { index }, _) => space.segments.retire(index),
                Received::Message(Message::Adopt { start, end }, _) => {
                    scope::adopt(space, start, end);
                }
                Received::Message(Message::Track { start, end }, _) => track(space, start, end),
                Received::Message(Message::Run, _) => {
                    let count = execute(space);
                    space.priority.end_plan();
                    control.counters.helper_cpu_ns.store(sys::cpu_time(), SeqCst);
                    // If nobody is there any more the next look tells.
                    link.send(Message::Done { count }, None);
                }
                Received::Message(_, descriptor) => {
                    if let Some(fd) = descriptor {
                        link::close(fd);
                    }
                }
            }
        }
        // The kernel clears the word, and wakes who waits on it, when the program ends or executes another one. Until its
        // helper has left, the program's memory, its file and what it has mapped stay in use: whoever waited for its end
        // and replaces the file would hear that it is busy.
        match main_thread(space.pid) {
            None => {
                sys::futex_wait(&control.bell, bell, LOOK_UP_NS);
            }
            Some((_, 0)) => return,
            Some((word, tid)) => sys::futex_wait_both(&control.bell, bell, word, tid, LOOK_UP_NS),
        }
    }
}

/// True if the program cannot do without its helper even when the broker is gone.
fn is_needed() -> bool {
    STATE.all.load(SeqCst) != 0 && STATE.tid_word.load(SeqCst) != 0 && STATE.table.next_merged(0, USER_END).is_some()
}

/// The broker goes. True if the helper is needed on, and no memory is registered any more: a fork of the program would
/// wait for somebody who reads its event. One that waits already does so inside of the gate, which could not be closed.
fn stays_alone(space: &mut Space) -> bool {
    const TRIES: u32 = 100;
    // It may have been given priority for a plan of which the broker did not live to tell.
    space.priority.lower();
    let mut release = |_| {
        space.dismiss_forks();
        let released = gate::while_closed(space.control, |_| {
            let mut at = 0;
            while let Some((start, end)) = STATE.table.next_managed(at, USER_END) {
                space.release(start, end);
                at = end;
            }
        });
        released.is_some()
    };
    let released = is_needed() && (0..TRIES).any(&mut release);
    if released {
        // Whoever read the events may have been killed in the middle of it. Nobody has any to read from now on.
        space.let_forks_pass();
        space.control.filling.store(0, SeqCst);
    }
    released
}

/// Where the main thread's tid word lies, and its id as the word has it, which the kernel clears: 0 once it has ended, or
/// the program has execed. `None` if that is not known. The word lies in a thread control block, which is never frozen.
fn main_thread(helper: u32) -> Option<(u64, u32)> {
    let word = STATE.tid_word.load(SeqCst);
    let mut tid = [0_u8; 4];
    (word != 0 && sys::read_own(helper, word, &mut tid)).then(|| (word, u32::from_ne_bytes(tid)))
}

/// Executes the broker's plan. Returns how many entries were finished.
fn execute(space: &mut Space) -> u32 {
    let control = space.control;
    let order = &control.plan;
    if order.state.load(SeqCst) != plan::READY {
        return 0;
    }
    let count = (order.count.load(SeqCst) as usize).min(PLAN_MAX);
    let flags = order.flags.load(SeqCst);
    space.check_mode = order.check.load(SeqCst);
    space.layout_epoch = order.layout_epoch.load(SeqCst);
    space.thread_epoch = order.thread_epoch.load(SeqCst);
    space.priority = Priority::of_plan(flags);
    let settings = Order {
        keep: Keep::from_bits(order.keep.load(SeqCst) as u8),
        range_start: order.range_start.load(SeqCst),
        range_end: order.range_end.load(SeqCst),
        track: flags & plan_flags::TRACK != 0,
        forked: flags & plan_flags::FORKED != 0,
        exact_check: space.check_mode == check_mode::BPF,
        vouched: space.check_mode == check_mode::VOUCH,
    };
    let entry = |index: usize| {
        let action = Action::decode(order.action.get(index)?.load(SeqCst))?;
        Some(Entry { address: order.address.get(index)?.load(SeqCst), action })
    };
    let mut done = 0;
    let mut report = |index: usize, outcome: Outcome| {
        if let Some(slot) = order.outcome.get(index) {
            slot.store(outcome as u32, SeqCst);
        }
        done += 1;
        order.done.store(done, SeqCst);
    };
    if !space.open_scratch() {
        (0..count).for_each(|index| report(index, Outcome::Budget));
        order.state.store(plan::DONE, SeqCst);
        return done;
    }
    // A thread of the program that waits for its memory, or wants it back for good, goes first, and so does its end.
    let helper = space.pid;
    let carry_on = || control.ask.state.load(SeqCst) != ask::ASKED && !matches!(main_thread(helper), Some((_, 0)));
    #[cfg(feature = "faults")]
    crate::faults::plan((order.action[0].load(SeqCst) >> 56) as u32);
    let ended = run_plan(space, &settings, entry, count, report, carry_on);
    if ended == Ended::Trapped {
        end_as_if_killed();
    }
    #[cfg(feature = "faults")]
    crate::faults::plan(0);
    space.close_scratch();
    space.segments.close_views();
    order.state.store(plan::DONE, SeqCst);
    done
}

/// Ends with pages frozen and the gate closed: the broker or the guardian gives the pages back.
fn end_as_if_killed() {
    // SAFETY: ends this process, which shares its memory with nobody who would miss its stack.
    unsafe { sys!(nr::EXIT_GROUP, 1) };
}

/// Registers memory for the tracking of writes, if it is managed. Registered memory is a mapping of its own to the kernel:
/// where it is not managed any more, the program's own mremap of what it knows as one mapping would fail (EFAULT). And
/// never beside a batch, whose window it would take out of the registration that everybody waits by. So it is the helper
/// that does it, between two plans and with the gate closed.
fn track(space: &mut Space, start: u64, end: u64) {
    gate::while_closed(space.control, |_| {
        if STATE.table.covers(start, end) {
            // Another userfaultfd may have it. Then it is merged without knowing what was written.
            let _ = space.register(start, end, RegisterMode::Track);
        }
    });
}

/// A page that a living child or parent shares is never given a copy, since nobody can tell who else holds it. The
/// kernel can: a write to it copies. The memory is about to be needed anyway.
fn own_shared(space: &mut Space, start: u64, end: u64) {
    let mut at = start;
    while at < end {
        let mut states = [PageState::Absent; BATCH_MAX];
        let count = ((end - at) / PAGE).min(BATCH_MAX as u64) as usize;
        if !space.page_states(at, &mut states[..count]) {
            return;
        }
        for (index, _) in states[..count].iter().enumerate().filter(|(_, state)| **state == PageState::Shared) {
            space.own(Pages { start: at + index as u64 * PAGE, count: 1 });
        }
        at += count as u64 * PAGE;
    }
}

/// Takes a range out of the registration: what of it is managed, or all of what was until just now. Whatever else lies there
/// may be registered with somebody else's userfaultfd, whom up to Linux 6.16 it would be taken from.
fn let_go(space: &mut Space, start: u64, end: u64) {
    if STATE.table.next_managed(start, end).is_none() {
        return space.release(start, end);
    }
    let mut at = start;
    while let Some((from, to)) = STATE.table.next_managed(at, end) {
        space.release(from, to);
        at = to;
    }
}

/// Gives a range its own copies back, for a thread of the program, and releases it from the userfaultfd.
fn give_back(space: &mut Space) -> bool {
    let control = space.control;
    let (start, end) = (control.ask.start.load(SeqCst), control.ask.end.load(SeqCst));
    space.check_mode = check_mode::BPF;
    let until = sys::monotonic().saturating_add(ASK_PATIENCE_NS);
    loop {
        let mut at = start;
        while let Some(piece) = STATE.table.next_merged(at, end) {
            at = piece.end;
            own_shared(space, piece.start, piece.end);
            space.layout_epoch = control.layout_epoch.load(SeqCst);
            space.thread_epoch = control.thread_epoch.load(SeqCst);
            let settings = Order {
                keep: piece.mark.keep().unwrap_or_default(),
                range_start: piece.start,
                range_end: piece.end,
                track: false,
                forked: false,
                exact_check: true,
                vouched: false,
            };
            let entry =
                |index: usize| Some(Entry { address: piece.start + index as u64 * PAGE, action: Action::Unmerge });
            let pages = ((piece.end - piece.start) / PAGE) as usize;
            #[cfg(feature = "faults")]
            crate::faults::plan(5);
            let ended = run_plan(space, &settings, entry, pages, |_, _| {}, || true);
            if ended == Ended::Trapped {
                end_as_if_killed();
            }
            #[cfg(feature = "faults")]
            crate::faults::plan(0);
        }
        if STATE.table.next_merged(start, end).is_none() {
            let_go(space, start, end);
            return true;
        }
        // A page that was written just now is still in some CPU's batch for the LRU lists, which counts as a reference.
        // The collapse drains them all; its answer does not matter, and nothing is frozen.
        let _ = space.ask_collapse();
        if sys::monotonic() > until {
            return false;
        }
        space.pause();
    }
}
