//! The lease on KSM's settings.
use std::sync::atomic::{AtomicU64, Ordering};

use kernel::ksm_sysfs::KsmSysfs;

use crate::error::KsmError;
use crate::knob::{AdvisorMode, Knob, Values, write_order};
use crate::proc_stat::ProcessId;
use crate::repaired::{Change, Foreign, Refused, Repaired};
use crate::state::{Holder, Life, Locked, State, StatePath};
use crate::sysfs;
use crate::wanted::{Wanted, asked, combine};

/// A right to have KSM's settings changed. Dropping it gives it back, and with the last one the administrator's values.
#[derive(Debug)]
pub struct Lease {
    sysfs: KsmSysfs,
    path: StatePath,
    process: ProcessId,
    serial: u64,
    life: Life,
    released: bool,
}

/// Leases of one process are told apart by this.
static NEXT_SERIAL: AtomicU64 = AtomicU64::new(0);

impl Lease {
    /// Becomes a holder who asks for `wanted`, at the usual state file of this user.
    ///
    /// # Errors
    /// [`KsmError::ReadOnly`] if KSM's files cannot be written, and errors of the state file.
    pub fn acquire(sysfs: &KsmSysfs, wanted: Wanted) -> Result<Self, KsmError> {
        Self::acquire_at(&StatePath::for_this_user(), sysfs, wanted).map(|(lease, _)| lease)
    }

    /// As [`Lease::acquire`] with a state file of one's own, and with what was put right on the way.
    ///
    /// # Errors
    /// As [`Lease::acquire`].
    pub fn acquire_at(path: &StatePath, sysfs: &KsmSysfs, wanted: Wanted) -> Result<(Self, Repaired), KsmError> {
        sysfs::check_writable(sysfs)?;
        let serial = NEXT_SERIAL.fetch_add(1, Ordering::Relaxed);
        let mut holder = Holder::current(serial, wanted)?;
        let process = holder.process;
        let life = holder.begin_life(path, &Locked::new(path)?)?;
        let enter = |session: &mut Session<'_>| {
            session.state.holders.push(holder);
            session.see_what_is_left(&wanted);
        };
        match change(path, sysfs, enter) {
            Ok(repaired) => {
                let (sysfs, path) = (sysfs.clone(), path.clone());
                Ok((Self { sysfs, path, process, serial, life, released: false }, repaired))
            }
            Err(error) => {
                path.forget_life(&life.name);
                Err(error)
            }
        }
    }

    /// Asks for something else.
    ///
    /// # Errors
    /// Those of the state file and of reading KSM's files. What the kernel refused is in the answer.
    pub fn update(&self, wanted: Wanted) -> Result<Repaired, KsmError> {
        let anew = Holder { life: self.life.name.clone(), ..Holder::current(self.serial, wanted)? };
        change(&self.path, &self.sysfs, |session| {
            match session.state.holders.iter_mut().find(|holder| holder.is(self.process, self.serial)) {
                Some(holder) => {
                    holder.wanted = wanted;
                    session.repaired.foreign = std::mem::take(&mut holder.unheard);
                }
                // Somebody removed the state file: a lease that is still held goes on.
                None => session.state.holders.push(anew),
            }
            session.see_what_is_left(&wanted);
        })
    }

    /// Gives back, and says what was restored.
    ///
    /// # Errors
    /// Those of the state file and of reading KSM's files; the lease is then left to its guardian or the next use.
    pub fn release(mut self) -> Result<Repaired, KsmError> {
        self.end()
    }

    fn end(&mut self) -> Result<Repaired, KsmError> {
        self.released = true;
        let leave = |session: &mut Session<'_>| {
            let holders = &mut session.state.holders;
            if let Some(at) = holders.iter().position(|holder| holder.is(self.process, self.serial)) {
                session.repaired.foreign = holders.remove(at).unheard;
            }
        };
        let repaired = change(&self.path, &self.sysfs, leave)?;
        self.path.forget_life(&self.life.name);
        Ok(repaired)
    }

    /// The settings this lease is about.
    #[must_use]
    pub fn sysfs(&self) -> &KsmSysfs {
        &self.sysfs
    }

    /// Removes holders that died and restores what they left, at the usual state file of this user.
    ///
    /// # Errors
    /// As [`Lease::acquire`].
    pub fn repair(sysfs: &KsmSysfs) -> Result<Repaired, KsmError> {
        Self::repair_at(&StatePath::for_this_user(), sysfs)
    }

    /// As [`Lease::repair`] with a state file of one's own.
    ///
    /// # Errors
    /// As [`Lease::acquire`].
    pub fn repair_at(path: &StatePath, sysfs: &KsmSysfs) -> Result<Repaired, KsmError> {
        // Without a state file nothing was ever leased: nothing is created for a mere look.
        if !path.as_path().exists() {
            return Ok(Repaired::default());
        }
        change(path, sysfs, |_| ())
    }

    /// Who holds the settings now, the dead apart.
    ///
    /// # Errors
    /// Those of the state file.
    pub fn holders_at(path: &StatePath) -> Result<Vec<Holder>, KsmError> {
        if !path.as_path().exists() {
            return Ok(Vec::new());
        }
        let mut holders = Locked::new(path)?.load()?.holders;
        holders.retain(|holder| !holder.is_dead(path));
        Ok(holders)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // In a child made by fork this is a copy of its parent's lease, which goes on.
        if !self.released && self.process.pid == i32::try_from(std::process::id()).unwrap_or_default() {
            // Drop has nobody to tell; the guardian and the next use look again.
            let _ = self.end();
        }
    }
}

/// Does one change of the holders under the lock and brings the kernel's settings in line.
fn change(path: &StatePath, sysfs: &KsmSysfs, edit: impl FnOnce(&mut Session<'_>)) -> Result<Repaired, KsmError> {
    let mut session = Session::open(path, sysfs)?;
    edit(&mut session);
    session.apply(&Values::default())?;
    Ok(session.repaired)
}

/// The lease's state under its lock, compared with what the kernel has.
pub(crate) struct Session<'a> {
    pub(crate) locked: Locked,
    pub(crate) state: State,
    /// The kernel's values when the session was opened.
    pub(crate) current: Values,
    pub(crate) repaired: Repaired,
    sysfs: &'a KsmSysfs,
}

impl<'a> Session<'a> {
    pub(crate) fn open(path: &StatePath, sysfs: &'a KsmSysfs) -> Result<Self, KsmError> {
        let locked = Locked::new(path)?;
        let mut state = locked.load()?;
        let mut repaired = Repaired::default();
        state.holders.retain(|holder| {
            let dead = holder.is_dead(path);
            if dead {
                repaired.dead.push(holder.clone());
            }
            !dead
        });
        // What the dead have not heard is news to whoever tidies up after them.
        for &foreign in repaired.dead.iter().flat_map(|holder| &holder.unheard) {
            if !repaired.foreign.contains(&foreign) {
                repaired.foreign.push(foreign);
            }
        }
        let current = sysfs::values(sysfs)?;
        judge(&mut state, &current, &mut repaired);
        Ok(Self { locked, state, current, repaired, sysfs })
    }

    /// Notes what a holder's wish names and cannot have.
    fn see_what_is_left(&mut self, wanted: &Wanted) {
        let asked = asked(&self.state.administrator, std::iter::once(wanted));
        self.repaired.left = self.state.given_up.iter().copied().filter(|&knob| asked.contains(knob)).collect();
    }

    /// Brings the kernel's settings in line with the holders' wishes over the administrator's values, of which `wish`
    /// says some anew. What he wishes now is in force at once where no holder asks for something else, and otherwise
    /// when the last of these has gone.
    pub(crate) fn apply(&mut self, wish: &Values) -> Result<(), KsmError> {
        bring_in_line(&self.locked, &mut self.state, wish, self.sysfs, &mut self.repaired)?;
        self.locked.forget_the_dead(&self.state);
        Ok(())
    }
}

/// Compares what is found with what was written under the lease.
fn judge(state: &mut State, current: &Values, repaired: &mut Repaired) {
    if state.is_over() {
        state.administrator = current.clone();
        state.given_up.clear();
        return;
    }
    let asked = asked(&state.administrator, state.holders.iter().map(|holder| &holder.wanted));
    for (knob, found) in current.iter() {
        let was_written = state.written.get(knob);
        let was_pending = state.pending.get(knob);
        if knob == Knob::PagesToScan && advisor_touches_pages(state, current) {
            // The kernel writes this one too, at each change of the advisor's mode and after each pass under it.
            if let Some(ours) = was_written.or(was_pending) {
                state.written.set(knob, ours);
            }
            continue;
        }
        let administrator = state.administrator.get(knob);
        if was_pending == Some(found) {
            // The write took place before its writer was killed.
            state.written.set(knob, found);
        } else if was_written == Some(found) || (was_written.is_none() && administrator == Some(found)) {
            // As expected.
        } else {
            // What a holder asks for may be the administrator's value too: it is in force and was never written.
            let in_force = was_written.or(was_pending).or(administrator.filter(|_| asked.contains(knob)));
            if let Some(ours) = in_force.filter(|_| !state.given_up.contains(&knob)) {
                let foreign = Foreign { knob, ours, found };
                repaired.foreign.push(foreign);
                state.holders.iter_mut().for_each(|holder| holder.unheard.push(foreign));
                state.given_up.push(knob);
            }
            state.written.remove(knob);
            state.administrator.set(knob, found);
        }
        if state.written.get(knob) == state.administrator.get(knob) {
            state.written.remove(knob);
        }
    }
    state.pending = Values::default();
}

/// What the kernel sets pages_to_scan to when the advisor leaves (set_advisor_defaults, mm/ksm.c).
const PAGES_WITHOUT_ADVISOR: u64 = 100;

fn advisor_touches_pages(state: &State, current: &Values) -> bool {
    current.get(Knob::AdvisorMode) == Some(AdvisorMode::ScanTime.into()) || state.pending.contains(Knob::AdvisorMode)
}

/// Writes what the holders' wishes make different from what the kernel has. `wish`: what the administrator wants from now
/// on; the state says so only after it was written, so that a wish whose writer was killed half-way is taken back as a
/// whole by the next use.
fn bring_in_line(
    locked: &Locked,
    state: &mut State,
    wish: &Values,
    sysfs: &KsmSysfs,
    repaired: &mut Repaired,
) -> Result<(), KsmError> {
    let mut administrator = state.administrator.clone();
    for (knob, value) in wish.iter() {
        administrator.set(knob, value);
    }
    let mut target = combine(&administrator, state.holders.iter().map(|holder| &holder.wanted));
    if target.get(Knob::Run).is_some_and(|run| run > 1) {
        // The administrator had unmerged the host with 2. What that left is a stopped ksmd; unmerging again, of what
        // others merged since, is for him to ask.
        target.set(Knob::Run, 0);
    }
    for &knob in &state.given_up {
        target.remove(knob);
        if let Some(value) = wish.get(knob) {
            target.set(knob, value);
        }
    }
    let current = sysfs::values(sysfs)?;
    let mode = target.get(Knob::AdvisorMode).or(current.get(Knob::AdvisorMode));
    let under_advisor = mode == Some(AdvisorMode::ScanTime.into());
    if under_advisor {
        // The kernel's to set, and refused from anybody else.
        target.remove(Knob::PagesToScan);
    }
    let advisor_leaves =
        target.get(Knob::AdvisorMode).is_some_and(|mode| mode == 0 && current.get(Knob::AdvisorMode) != Some(mode));
    let due: Vec<(Knob, u64)> = write_order(&target)
        .into_iter()
        .filter_map(|knob| {
            let value = target.get(knob)?;
            // Leaving the advisor resets pages_to_scan, so it is written even where it seems right already.
            let due = current.get(knob) != Some(value) || (knob == Knob::PagesToScan && advisor_leaves);
            due.then_some((knob, value))
        })
        .collect();
    for &(knob, value) in &due {
        state.pending.set(knob, value);
    }
    // Somebody was killed after he had written the advisor's mode: pages_to_scan is as the kernel sets it then. Whoever is
    // killed before that is mended leaves the same.
    let pages_are_due = state.pending.contains(Knob::PagesToScan);
    if pages_are_due
        && current.get(Knob::PagesToScan) == Some(PAGES_WITHOUT_ADVISOR)
        && let Some(mode) = current.get(Knob::AdvisorMode)
        && !state.pending.contains(Knob::AdvisorMode)
    {
        state.pending.set(Knob::AdvisorMode, mode);
    }
    // Said before it is done, and said again after.
    locked.store(state)?;
    for (knob, value) in due {
        match sysfs::set(sysfs, knob, value) {
            Ok(()) => {
                let from = current.get(knob).unwrap_or_default();
                repaired.changed.push(Change { knob, from, to: value });
                state.written.set(knob, value);
            }
            Err(error) => {
                target.remove(knob);
                // What the kernel does not take from the administrator is no debt to him.
                match (wish.get(knob), state.administrator.get(knob)) {
                    (Some(wished), Some(before)) if wished == value => administrator.set(knob, before),
                    _ => {}
                }
                repaired.refused.push(Refused { knob, wanted: value, error });
            }
        }
    }
    state.administrator = administrator;
    for (knob, value) in target.iter() {
        // A holder's wish that was the administrator's value too may differ from it now.
        if state.administrator.get(knob) == Some(value) {
            state.written.remove(knob);
        } else {
            state.written.set(knob, value);
        }
    }
    if under_advisor {
        state.written.remove(Knob::PagesToScan);
    }
    state.pending = Values::default();
    if state.holders.is_empty() && repaired.refused.is_empty() {
        state.written = Values::default();
    }
    locked.store(state)
}
