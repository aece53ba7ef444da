//! One cycle: watch, look, fill, order, and write down what became of it.

use std::os::fd::AsFd;
use std::time::Duration;

use abi::place::Outcome;
use abi::wire::Message;
use kernel::{Pagemap, memfd, page_size};
use page::{Location, PageNumber, PageRange};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Broker;
use crate::cycle::{Findings, Look, Regions, fill, look};
use crate::member::Member;
use crate::order::{Item, Result1, Task, is_soon_over};
use crate::sample::SegmentFile;

/// Contents that are copied into the store at one time: some segments, so that those that stay short are few.
const FILL_AT_ONCE: usize = 1024;
/// Pages that wait for contents at one time: in one run, enough for as many copies as there can be.
const TAKERS_AT_ONCE: usize = 1 << 14;
/// Pages looked at before what was found is acted upon: whole huge pages, and so few that helpers do not wait long.
const LOOK_AT_ONCE: u64 = 512;
/// For how long a helper's plan holds up everybody else: an ordinary one takes a few milliseconds.
const PATIENCE: Duration = Duration::from_millis(250);
/// A zero page is dropped after so many times the settling time: its program may be about to use it.
const ZERO_PATIENCE: u32 = 4;

impl Broker {
    /// One cycle of user-space scanning: watch writes, look at what has settled, merge what has a twin.
    pub(super) fn tick(&mut self) {
        let mut findings = Findings::of_settled();
        let mut regions = Regions::new();
        let mut rest = self.is_crowded();
        if !rest {
            self.drain_batches();
        }
        self.note_stopped();
        let owners: Vec<u32> = self.members.iter().map(|member| member.index).collect();
        for owner in owners {
            // Still at what it was ordered earlier.
            if self.queues.get(&owner).is_some_and(|queue| !queue.is_idle()) {
                continue;
            }
            if !self.refresh(owner) {
                continue;
            }
            let Some(position) = self.members.iter().position(|member| member.index == owner) else { continue };
            let Ok(pagemap) = Pagemap::open(self.members[position].helper) else { continue };
            let mut due: Vec<PageRange> = Vec::new();
            for index in 0..self.members[position].view.areas.len() {
                let member = &mut self.members[position];
                let area = &mut member.view.areas[index];
                let before = area.ages.counts();
                let watched = area.watch(&pagemap, &mut regions);
                let after = area.ages.counts();
                self.totals.unshared += before.merged.saturating_sub(after.merged);
                if !rest {
                    due.extend(area.ages.due());
                }
                if !watched {
                    let (start, end) = (area.range.start().get(), area.range.end().get());
                    member.tell(Message::Track { start, end }, None);
                }
            }
            if let Some(reason) = self.members[position].unfit {
                self.totals.refused.add(reason, due.iter().map(|pages| pages.pages()).sum());
                continue;
            }
            for pages in due.into_iter().flat_map(pieces) {
                // What is not looked at stays due.
                rest = rest || self.is_crowded();
                if rest
                    || !self.look_at(owner, pages, &pagemap, ZERO_PATIENCE * self.policy.settle, true, &mut findings)
                {
                    break;
                }
                self.act_early(&mut findings, &mut |_, _| {});
            }
        }
        self.act(&mut findings, &mut |_, _| {});
        self.totals.refused.add("huge_page", findings.spared);
        self.drive(&mut |_, _| {});
        self.eyes.index.grow_older();
        if rest {
            self.totals.held_back += self.interval.unwrap_or_default();
        }
    }

    /// True while so many others want the machine's CPUs that nothing new is begun.
    fn is_crowded(&self) -> bool {
        let helpers = self.members.iter().filter(|member| member.busy_since.is_some()).count();
        self.crowd.is_there(1 + helpers as u64)
    }

    pub(super) fn look_at(
        &mut self,
        owner: u32,
        pages: PageRange,
        pagemap: &Pagemap,
        zero_patience: u32,
        spare_huge: bool,
        findings: &mut Findings,
    ) -> bool {
        let Some(member) = self.members.iter_mut().find(|member| member.index == owner) else { return false };
        let (memory, view) = member.read();
        let Some(area) = view.area_of(pages.start) else { return true };
        let first = (area.first, area.ages.range().start);
        let this = Look { owner, memory, pagemap, first, ages: &area.ages, zero_patience, spare_huge };
        let seen = look(&this, pages, &mut self.eyes, &self.partition, findings);
        // Whatever turned out not to be there is not worth another look until it is written.
        let mut waiting = findings.once_more.drain(..).peekable();
        for page in pages.iter() {
            if waiting.next_if_eq(&page).is_none() {
                area.ages.looked(page);
            }
        }
        drop(waiting);
        seen
    }

    /// Fills the store with what was found and orders the merges.
    pub(super) fn act(&mut self, findings: &mut Findings, report: &mut dyn FnMut(u32, &[Result1])) {
        self.fill_store(findings);
        let owners: Vec<u32> = findings.items.keys().copied().collect();
        for owner in owners {
            let items = findings.items.remove(&owner).unwrap_or_default();
            self.note_segments(&items);
            self.order(owner, items);
        }
        self.pump(report);
    }

    /// Does of this what is worth while before more is found: fills some segments, orders what lies close together, and
    /// keeps the helpers at work.
    pub(super) fn act_early(&mut self, findings: &mut Findings, report: &mut dyn FnMut(u32, &[Result1])) {
        if findings.fills() >= FILL_AT_ONCE || findings.takers.len() >= TAKERS_AT_ONCE {
            self.fill_store(findings);
        }
        let owners: Vec<u32> = findings.items.keys().copied().collect();
        for owner in owners {
            if !findings.is_dense(owner) {
                continue;
            }
            let items = findings.items.remove(&owner).unwrap_or_default();
            self.note_segments(&items);
            self.order(owner, items);
        }
        self.pump(report);
    }

    /// Copies what was found into the store.
    fn fill_store(&mut self, findings: &mut Findings) {
        if findings.fills() == 0 {
            return;
        }
        let members = &mut self.members;
        let age_of = |location: Location| {
            let member = members.iter_mut().find(|member| member.index == location.owner)?;
            member.view.area_of(location.page)?.ages.age(location.page)
        };
        let before = findings.no_room;
        fill(&mut self.eyes, &mut self.partition, findings, age_of);
        self.totals.refused.add("budget", findings.no_room - before);
    }

    pub(super) fn note_segments(&mut self, items: &[Item]) {
        for item in items {
            let (Task::Merge(place, _) | Task::Retake(place, _)) = item.task else { continue };
            if self.inode_of.contains_key(&place.segment) {
                continue;
            }
            if let store::HandOut::File { file, pages } =
                self.partition.hand_out(place.segment, self.settings.uid, |_| true)
                && let Ok((device, inode)) = memfd::identity(file)
            {
                let device = (rustix::fs::major(device), rustix::fs::minor(device));
                self.inodes.insert(inode, SegmentFile { segment: place.segment, device, pages: pages.into() });
                self.inode_of.insert(place.segment, inode);
            }
        }
    }

    /// Starts and finishes what can be, without waiting.
    pub(super) fn pump(&mut self, report: &mut dyn FnMut(u32, &[Result1])) {
        let mut dead = Vec::new();
        let mut results = Vec::new();
        for member in &mut self.members {
            let Some(queue) = self.queues.get_mut(&member.index) else { continue };
            let finished = queue.finish(member);
            let check = self.check.as_mut();
            let started = finished.is_ok() && queue.start_next(member, &self.partition, &self.settings, check);
            let left_out = queue.take_left_out();
            if !left_out.is_empty() {
                results.push((member.index, left_out));
            }
            match finished {
                Ok(Some(done)) => results.push((member.index, done)),
                Ok(None) => {}
                Err(()) => dead.push(member.index),
            }
            if !started && !dead.contains(&member.index) {
                dead.push(member.index);
            }
        }
        for (owner, done) in results {
            self.apply(owner, &done);
            report(owner, &done);
        }
        for owner in dead {
            if let Some(index) = self.members.iter().position(|member| member.index == owner) {
                self.remove(index);
            }
        }
    }

    /// Until every helper has finished what it was ordered. One that takes long is not waited for by everybody else:
    /// what comes of it is taken in later.
    pub(super) fn drive(&mut self, report: &mut dyn FnMut(u32, &[Result1])) {
        self.drive_for(None, report);
    }

    /// As [`Self::drive`], but one member is waited for in any case.
    pub(super) fn drive_for(&mut self, whom: Option<u32>, report: &mut dyn FnMut(u32, &[Result1])) {
        loop {
            self.order_postponed();
            self.pump(report);
            let waited_for = |member: &&Member| {
                let lags = member.busy_since.is_some_and(|since| since.elapsed() > PATIENCE);
                let busy = self.queues.get(&member.index).is_some_and(|queue| !queue.is_idle());
                busy && (!lags || whom == Some(member.index))
            };
            if !self.members.iter().any(|member| waited_for(&member)) {
                // Whatever was postponed is ordered or refused in the next round.
                if self.ready_postponed().is_empty() {
                    return;
                }
                continue;
            }
            let mut fds: Vec<PollFd<'_>> = self
                .members
                .iter()
                .filter(|member| member.busy_since.is_some())
                .map(|member| PollFd::from_borrowed_fd(member.link.as_fd(), PollFlags::IN))
                .collect();
            let limit = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            let _ = poll(&mut fds, Some(&limit));
        }
    }

    /// Empties the kernel's batches of pages on their way to the LRU lists if a page was refused because it is held: it
    /// may have been one of those. Not otherwise, since every CPU that has such a batch is interrupted for it.
    pub(super) fn drain_batches(&mut self) {
        if std::mem::take(&mut self.drain_due) {
            // Where it cannot be done such pages are merged later.
            let _ = kernel::lru::drain_batches();
        }
    }

    /// Writes down what became of a member's pages.
    fn apply(&mut self, owner: u32, results: &[Result1]) {
        let Some(position) = self.members.iter().position(|member| member.index == owner) else { return };
        let member = &mut self.members[position];
        let size = page_size();
        let (mut stale, mut merged) = (false, 0);
        for (item, outcome) in results {
            let number = PageNumber(item.address / size);
            let Some(area) = member.view.area_of(number) else { continue };
            let offset = number.0 - area.ages.range().start.0;
            match outcome {
                Outcome::Merged | Outcome::Retaken => {
                    area.merged(number);
                    merged += 1;
                    if *outcome == Outcome::Merged {
                        self.totals.merges += 1;
                    } else {
                        self.totals.retaken += 1;
                    }
                    if let Task::Merge(_, content) | Task::Retake(_, content) = item.task {
                        self.eyes.index.forget(content, area.first.offset(offset));
                    }
                }
                Outcome::Zero => {
                    self.totals.zero += 1;
                    area.ages.unmerged(number);
                    area.ages.looked(number);
                    area.dropped.set(offset, true);
                }
                Outcome::Unmerged => area.ages.unmerged(number),
                // The kernel's huge zero page, which a scan does not tell from a page of zeros: nothing to drop.
                Outcome::Shared if item.task == Task::DropZero => area.ages.looked(number),
                // Not tried: nothing is known against it.
                Outcome::Pending => area.ages.wake(number),
                refusal => {
                    stale |= *refusal == Outcome::LayoutChanged;
                    self.drain_due |= *refusal == Outcome::Referenced;
                    area.refused(number, is_soon_over(*refusal));
                    self.totals.refused.count(*refusal);
                }
            }
        }
        if stale {
            member.view.epoch = None;
        }
        self.roll.merged(owner, merged);
    }
}

/// Cuts pages into pieces to be looked at, at multiples of a huge page.
pub(super) fn pieces(pages: PageRange) -> impl Iterator<Item = PageRange> {
    let first = pages.start.0 / LOOK_AT_ONCE * LOOK_AT_ONCE;
    (first..pages.end.0).step_by(LOOK_AT_ONCE as usize).map(move |start| {
        let end = (start + LOOK_AT_ONCE).min(pages.end.0);
        PageRange::new(PageNumber(start.max(pages.start.0)), PageNumber(end))
    })
}
