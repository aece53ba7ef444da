//! A stopped thread is looked at, its call repaired, and its way back written into a slot.

use std::time::Duration;

use super::arch::{self, Onward, Registers};
use super::attempt::{Attempt, End, IN_USE, failed};
use super::call::Call;
use super::forbidden::Rules;
use super::mask;
use super::nap::{self, Nap};
use super::place;
use super::refusal::Refusal;
use super::restart::{self, Interrupted, TimeOut};
use super::rseq;
use super::slot::{HEAD, Head, SLOT, Slot, StackPage};
use super::transfer;
use super::{Step, clock};
use crate::ptrace::Tracee;
use crate::remote;
use crate::units::Pid;

/// A stopped thread, ready for calls.
pub(super) struct Stopped {
    /// The registers that it is put back with: the kernel then decides about its call.
    pub(super) back: Registers,
    /// Where its code is.
    pub(super) slot: Slot,
    /// Its call goes on in the slot, which must stay.
    pub(super) stays: bool,
    /// The signals that only its call keeps away.
    pub(super) kept_away: u64,
}

/// A call that goes on in a slot, found there by a later injection.
struct Home {
    slot: Slot,
    head: Head,
    /// The thread as if it were in the original call.
    outside: Registers,
}

/// A call that was broken, and has a time-out.
#[derive(Clone, Copy)]
struct Limit {
    call: Call,
    time_out: TimeOut,
    total: Duration,
    /// When it is to end, nanoseconds of the monotonic clock.
    ends: u64,
}

impl Attempt<'_> {
    /// Does all of it. `nap`: what was seen before the thread was asked to stop, and when that was.
    pub(super) fn prepare(&mut self, tracee: Tracee, nap: Option<(Nap, u64)>) -> Result<Stopped, End> {
        let now = clock();
        let tid = tracee.tid();
        let mut registers =
            match Registers::read(tracee, self.seen.take().as_ref()).map_err(failed("read the registers of"))? {
                Ok(registers) => registers,
                Err(refusal) => return Err(self.leave(tracee, refusal)),
            };
        // Before anything else is looked at: should this process die now, the call is at least made again.
        if registers.was_interrupted() && registers.call().is_some_and(|call| restart::may_begin_again(call.number.0)) {
            let mut again = registers;
            again.set_restart();
            again.write(tracee).map_err(failed("repair the call of"))?;
        }
        let rules = Rules::read(tracee).map_err(failed("read the filters of"))?;
        // Once stopped, such a call is made again as restart_syscall(2), which a filter that knows nothing of stops may
        // answer with a signal that kills. Made again as itself it begins anew.
        if registers.waits_for_restart_call() && rules.forbid_restart(registers.instruction()) {
            registers.set_restart();
            registers.write(tracee).map_err(failed("repair the call of"))?;
            self.progress.timeouts_restarted += 1;
        }
        let home = self.home(tid, &registers);
        let limit = self.repair(tracee, &mut registers, home.as_ref(), nap, now)?;
        let kept_away = if registers.call().is_some() { mask::kept_away(tracee)? } else { 0 };
        if registers.call().is_none() {
            if let Some(abort) = rseq::abort_of_critical_section(tracee, registers.instruction()) {
                registers.set_instruction(abort);
            }
        } else if registers.will_restart() && !made_by_known_instruction(tid, &registers) {
            return Err(self.leave(tracee, Refusal::OtherInterface));
        }
        let owner = self.place.owner(self.pid, tid, self.candidate.start_time);
        let slot = match &home {
            Some(home) if limit.is_some() && home.head.owner == owner => Some(home.slot),
            _ => self.place.choose(&owner, registers.stack(), registers.instruction()),
        };
        let Some(slot) = slot else {
            self.progress.timeouts_restarted += u32::from(limit.is_some());
            return Err(self.leave(tracee, IN_USE));
        };
        let refusal = rules.refusal(self.calls, slot);
        let mut head = Head { owner, stack: StackPage::of(registers.stack()), deadline: 0, left: [0; 2] };
        let mut stopped = Stopped { back: registers, slot, stays: false, kept_away };
        let mut onward = registers.onward();
        if let Some(limit) = limit {
            let whole = home.as_ref().map_or(registers, |home| home.outside);
            let (rest, left, call) = go_on(&whole, limit, slot, now);
            if rules.refusal(&[call], slot).is_none() {
                (head.deadline, head.left) = (limit.ends, [left.as_secs(), left.subsec_nanos().into()]);
                stopped = Stopped { back: whole.inside(slot, &rest), stays: true, ..stopped };
                onward = rest;
            } else {
                self.progress.timeouts_restarted += 1;
            }
        }
        if let Some(refusal) = &refusal
            && !stopped.stays
        {
            return Err(self.leave(tracee, refusal.clone()));
        }
        let mut bytes = [0; SLOT as usize];
        let (start, code) = bytes.split_at_mut(HEAD as usize);
        start.copy_from_slice(&head.to_bytes());
        let Some(encoded) = arch::encode(&onward, slot.code().0) else {
            return Err(self.leave(tracee, Refusal::NoPlaceForCode { why: "its vDSO is too far away from its code" }));
        };
        code.copy_from_slice(&encoded);
        if !self.place.write(tracee, slot, &bytes).map_err(failed("write code for"))? {
            return Err(self.leave_as(tracee, End::Moved));
        }
        self.step(Step::SlotWritten);
        if let Some(refusal) = refusal {
            // Its time-out must not begin anew each time that it is refused.
            stopped.back.write(tracee).map_err(failed("put back"))?;
            return Err(self.leave(tracee, refusal));
        }
        Ok(stopped)
    }

    /// Where a call goes on in a slot, the thread is in its original call as far as it knows.
    fn home(&self, tid: Pid, registers: &Registers) -> Option<Home> {
        let (slot, bytes) = self.place.at(tid, registers.instruction())?;
        let outside = registers.outside(slot, &arch::decode(&bytes[HEAD as usize..], slot.code().0)?)?;
        Some(Home { slot, head: Head::from_bytes(&bytes)?, outside })
    }

    /// Makes a call restart that the stop has broken; the rest of its time, if it has a time-out.
    fn repair(
        &mut self,
        tracee: Tracee,
        registers: &mut Registers,
        home: Option<&Home>,
        nap: Option<(Nap, u64)>,
        now: u64,
    ) -> Result<Option<Limit>, End> {
        if let (None, Some(call)) = (home, registers.call())
            && transfer::broke_off(tracee.tid(), &call, registers.result())
        {
            self.progress.interrupted += 1;
        }
        // In a slot it may have been repaired before, when a signal came that it ignores.
        let anew = || registers.call().is_some_and(|call| restart::begins_anew(call.number.0));
        let broken = registers.was_interrupted() || registers.will_restart() && (home.is_some() || anew());
        let Some(call) = home.map_or(*registers, |home| home.outside).call().filter(|_| broken) else {
            return Ok(None);
        };
        let tid = tracee.tid();
        let kind = restart::sort(&call, |address| place::two_words(tid, address));
        if kind == Interrupted::Leave {
            self.progress.interrupted += 1;
            return Ok(None);
        }
        // First of all: from here on a death is no harm.
        registers.set_restart();
        registers.write(tracee).map_err(failed("repair the call of"))?;
        self.step(Step::Repaired);
        self.progress.timeouts_restarted += u32::from(kind == Interrupted::AgainHidden);
        let Interrupted::Limited { time_out, total } = kind else { return Ok(None) };
        let ends = match home {
            Some(home) => home.head.deadline.min(nap::rest(now, None, total)),
            None => {
                let began = nap.and_then(|(before, asked)| before.began(asked, Nap::look(tid)?, total));
                nap::rest(now, began, total)
            }
        };
        Ok(Some(Limit { call, time_out, total, ends }))
    }
}

/// How a call with a time-out goes on in a slot: the code, the rest of its time, and the call as it is made there.
fn go_on(whole: &Registers, limit: Limit, slot: Slot, now: u64) -> (Onward, Duration, Call) {
    let left = Duration::from_nanos(limit.ends.saturating_sub(now)).min(limit.total);
    let (argument, value) = match limit.time_out {
        TimeOut::Milliseconds(argument) => (argument, restart::milliseconds(left)),
        TimeOut::Timespec(argument) => (argument, slot.left().0),
    };
    let mut call = limit.call;
    call.arguments[argument] = value;
    (whole.onward_with(argument, value), left, call)
}

fn made_by_known_instruction(tid: Pid, registers: &Registers) -> bool {
    let mut bytes = [0; arch::CALL_INSTRUCTION as usize];
    remote::read(tid, registers.made_by(), &mut bytes).is_ok() && Registers::is_call_instruction(&bytes)
}
