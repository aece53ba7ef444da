//! Orders to helpers: what is to be merged where, in plans that a helper executes, and what became of it.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use abi::PLAN_MAX;
use abi::control::{check_mode, plan, plan_flags};
use abi::mark::Keep;
use abi::place::{Action, Outcome};
use abi::wire::Message;
use kernel::refcheck::{BpfCheck, Holders, holders};
use kernel::sched::{Limit, Policy, Resource, limit, set_limit, set_policy};
use kernel::{Pid, ProcError, Range, Vaddr, task};
use page::{Fingerprint, Place, SegmentId};
use store::{HandOut, Partition};

use crate::member::Member;
use crate::settings::{CheckChoice, Settings};

/// Most pages of a plan while the helper runs with real-time priority: about a millisecond of work.
const PLAN_PAGES: usize = 1024;
/// A helper that has not finished a plan by then is not working any more.
const PLAN_WITHIN: Duration = Duration::from_secs(20);
/// Real-time CPU seconds in a row after which the kernel kills a helper: a plan takes a hundredth of that.
const RT_LIMIT_US: u64 = 1_000_000;
/// For how long a helper may keep its priority in one plan.
const RAISED_FOR: Duration = Duration::from_millis(200);
/// Most segments that a helper holds; the agent's table has room for as many.
const SEGMENTS_MAX: usize = 4096;

/// One page to be treated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Item {
    pub(crate) address: u64,
    pub(crate) task: Task,
}

/// What to do with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Task {
    Merge(Place, Fingerprint),
    DropZero,
    Retake(Place, Fingerprint),
    RetakeZero,
    Unmerge,
}

impl Task {
    fn place(self) -> Option<(Place, Fingerprint)> {
        match self {
            Self::Merge(place, fingerprint) | Self::Retake(place, fingerprint) => Some((place, fingerprint)),
            _ => None,
        }
    }
}

/// An order that is to be sent.
struct Job {
    order: Order,
    keep: Keep,
    threads: u32,
    /// Make its pages exclusive.
    owning: bool,
}

/// Items of one area, in the order in which they are to be executed.
#[derive(Debug)]
pub(crate) struct Order {
    pub(crate) area: Range,
    pub(crate) items: Vec<Item>,
    /// Contents that the member was found to hold, in a strict partition: a segment is handed out only to who holds all
    /// of it. Shared by the pieces of one order, since a segment's pages may fall into two.
    held: Arc<HashSet<Fingerprint>>,
    /// Its pages must not be made exclusive: who holds them cannot be counted.
    as_they_are: bool,
}

impl Order {
    pub(crate) fn new(area: Range, items: Vec<Item>, strict: bool) -> Self {
        let held = items.iter().filter(|_| strict).filter_map(|item| item.task.place()).map(|(_, held)| held).collect();
        Self { area, items, held: Arc::new(held), as_they_are: false }
    }
}

/// Orders that wait for a helper, and the one that it has.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: VecDeque<Order>,
    current: Option<Order>,
    /// Items that were left out of plans.
    left_out: Vec<Result1>,
    /// How long plans were with the helper, altogether.
    pub(crate) busy: Duration,
}

/// A page and what became of it.
pub(crate) type Result1 = (Item, Outcome);

/// Whether what stood in a page's way is over after a moment. The kernel itself holds what was just populated, until it
/// empties its batches.
pub(crate) const fn is_soon_over(outcome: Outcome) -> bool {
    matches!(outcome, Outcome::GateBusy | Outcome::NoCheck | Outcome::ThreadsChanged | Outcome::Referenced)
}

impl Queue {
    pub(crate) fn push(&mut self, mut order: Order) {
        while order.items.len() > PLAN_PAGES {
            let rest = order.items.split_off(PLAN_PAGES);
            let items = std::mem::replace(&mut order.items, rest);
            self.waiting.push_back(Order { items, held: Arc::clone(&order.held), ..order });
        }
        if !order.items.is_empty() {
            self.waiting.push_back(order);
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.current.is_none()
    }

    /// Everything that was not executed: for a helper that is gone.
    pub(crate) fn abandon(&mut self) -> Vec<Result1> {
        let orders = self.current.take().into_iter().chain(self.waiting.drain(..));
        orders.flat_map(|order| order.items).map(|item| (item, Outcome::Pending)).collect()
    }

    /// Gives the helper its next plan, if it has none. `false` if the helper is gone. `check` counts references, where
    /// that can be done.
    pub(crate) fn start_next(
        &mut self,
        member: &mut Member,
        partition: &Partition,
        settings: &Settings,
        mut check: Option<&mut BpfCheck>,
    ) -> bool {
        if self.current.is_some() {
            return true;
        }
        while let Some(mut order) = self.waiting.pop_front() {
            let Some(area) = member.view.areas.iter().find(|area| area.range == order.area) else {
                self.current = Some(order);
                member.busy_since = None;
                return true;
            };
            let keep = area.keep;
            // Before the references are counted: a fork since then raises the epoch, and the plan is void.
            let threads = look_at_threads(member);
            let mut owning = member.control().forks.load(SeqCst) > 0 && !order.as_they_are;
            if owning {
                (order, owning) = match (mode(member, settings), &mut check) {
                    (check_mode::VOUCH, _) => (order, true),
                    (check_mode::BPF, Some(check)) => self.leave_out_held(member, check, order),
                    // The kernel refuses what is not exclusive. The collapse oracle would come too late: it sees copies.
                    _ => (order, false),
                };
            }
            if !order.items.is_empty() {
                return self.send(member, partition, settings, Job { order, keep, threads, owning });
            }
        }
        true
    }

    /// What a plan left out since this was last asked.
    pub(crate) fn take_left_out(&mut self) -> Vec<Result1> {
        std::mem::take(&mut self.left_out)
    }

    /// Sorts the plain pages of a process that has forked: what nobody holds may be made exclusive, what somebody holds
    /// is refused, and what cannot be counted comes in a plan of its own. Returns whether anything is to be made exclusive.
    fn leave_out_held(&mut self, member: &Member, check: &mut BpfCheck, order: Order) -> (Order, bool) {
        let is_plain = |item: &Item| matches!(item.task, Task::Merge(..) | Task::DropZero);
        if !order.items.iter().all(is_plain) {
            // Diverged pages are moved whether they are exclusive or not, and counted after that.
            return (order, false);
        }
        let pages: Vec<Vaddr> = order.items.iter().map(|item| Vaddr(item.address)).collect();
        let (mut free, mut unknown) = (Vec::new(), Vec::new());
        for (item, holders) in order.items.into_iter().zip(holders(check, member.pagemap(), &pages)) {
            match holders {
                Holders::None => free.push(item),
                Holders::Some => self.left_out.push((item, Outcome::Referenced)),
                Holders::Unknown => unknown.push(item),
            }
        }
        let unknown = Order { items: unknown, held: Arc::clone(&order.held), as_they_are: true, area: order.area };
        if free.is_empty() {
            return (unknown, false);
        }
        if !unknown.items.is_empty() {
            self.waiting.push_front(unknown);
        }
        (Order { items: free, ..order }, true)
    }

    /// Writes a plan and tells the helper.
    fn send(&mut self, member: &mut Member, partition: &Partition, settings: &Settings, job: Job) -> bool {
        let Job { order, keep, threads, owning } = job;
        let actions = hand_out(member, partition, &order.items, &order.held);
        let control = member.control();
        let plan = &control.plan;
        if plan.state.load(SeqCst) == plan::READY {
            // It was given back unfinished; nobody executes it any more.
            plan.state.store(plan::IDLE, SeqCst);
        }
        for (index, (item, action)) in order.items.iter().zip(&actions).enumerate().take(PLAN_MAX) {
            plan.address[index].store(item.address, SeqCst);
            plan.action[index].store(action.map_or(0, Action::encode), SeqCst);
            plan.outcome[index].store(Outcome::Pending as u32, SeqCst);
        }
        plan.count.store(order.items.len().min(PLAN_MAX) as u32, SeqCst);
        plan.done.store(0, SeqCst);
        plan.check.store(mode(member, settings), SeqCst);
        let track = settings.stable.is_some();
        let raise = raise(member, settings);
        let flags = [(track, plan_flags::TRACK), (owning, plan_flags::FORKED)];
        let flags = flags.iter().filter(|(set, _)| *set).fold(raise, |flags, (_, flag)| flags | flag);
        plan.flags.store(flags, SeqCst);
        plan.layout_epoch.store(member.view.epoch.unwrap_or(0), SeqCst);
        plan.thread_epoch.store(threads, SeqCst);
        plan.keep.store(keep.bits().into(), SeqCst);
        plan.range_start.store(order.area.start().get(), SeqCst);
        plan.range_end.store(order.area.end().get(), SeqCst);
        plan.state.store(plan::READY, SeqCst);
        self.current = Some(order);
        member.busy_since = Some(Instant::now());
        follow_limits(member);
        member.tell(Message::Run, None)
    }

    /// Takes the outcomes of a finished plan. `None` while it runs; `Err` if the helper is gone or stuck.
    pub(crate) fn finish(&mut self, member: &mut Member) -> Result<Option<Vec<Result1>>, ()> {
        let Some(order) = &self.current else { return Ok(None) };
        let Some(since) = member.busy_since else {
            // It could not even be sent: the area is gone.
            let order = self.current.take().expect("looked at above");
            return Ok(Some(order.items.into_iter().map(|item| (item, Outcome::LayoutChanged)).collect()));
        };
        match member.hear()? {
            Some(Message::Done { .. }) => {}
            Some(_) => return Err(()),
            None if since.elapsed() > PLAN_WITHIN => return Err(()),
            None => {
                if since.elapsed() > RAISED_FOR {
                    // An honest helper is done long since. The limit alone does not stop one that sleeps now and then.
                    lower(member);
                }
                return Ok(None);
            }
        }
        self.busy += since.elapsed();
        lower(member);
        let plan = &member.control().plan;
        let outcomes: Vec<_> = order
            .items
            .iter()
            .enumerate()
            .map(|(index, item)| {
                let word = plan.outcome.get(index).map_or(0, |outcome| outcome.load(SeqCst));
                (*item, Outcome::decode(word))
            })
            .collect();
        member.busy_since = None;
        self.current = None;
        Ok(Some(outcomes))
    }
}

/// How this member's pages are to be checked.
fn mode(member: &Member, settings: &Settings) -> u32 {
    match settings.check {
        CheckChoice::Vouch => check_mode::VOUCH,
        CheckChoice::Collapse => check_mode::COLLAPSE,
        CheckChoice::Auto | CheckChoice::Bpf if member.exact_check => check_mode::BPF,
        CheckChoice::Auto => check_mode::COLLAPSE,
        CheckChoice::Bpf => 0,
    }
}

/// Gives the helper descriptors of all segments that the items need; an item whose segment it may not have gets no
/// action.
fn hand_out(
    member: &mut Member,
    partition: &Partition,
    items: &[Item],
    held: &HashSet<Fingerprint>,
) -> Vec<Option<Action>> {
    let mut actions = Vec::with_capacity(items.len());
    for item in items {
        let action = match item.task {
            Task::DropZero => Some(Action::DropZero),
            Task::RetakeZero => Some(Action::RetakeZero),
            Task::Unmerge => Some(Action::Unmerge),
            Task::Merge(place, _) => numbered(member, partition, place, held).map(Action::Merge),
            Task::Retake(place, _) => numbered(member, partition, place, held).map(Action::Retake),
        };
        actions.push(action);
    }
    actions
}

fn numbered(
    member: &mut Member,
    partition: &Partition,
    place: Place,
    held: &HashSet<Fingerprint>,
) -> Option<abi::place::Place> {
    let number = match member.segments.get(&place.segment) {
        Some(number) => *number,
        None => give_segment(member, partition, place.segment, held)?,
    };
    Some(abi::place::Place { segment: number, page: place.page })
}

fn give_segment(
    member: &mut Member,
    partition: &Partition,
    segment: SegmentId,
    held: &HashSet<Fingerprint>,
) -> Option<u32> {
    // The item that asks for the segment is a page of it, found in this member.
    let strict = partition.options().strict;
    let holds = |content| !strict || held.contains(&content);
    let HandOut::File { file, pages } = partition.hand_out(segment, member.uid, holds) else {
        return None;
    };
    if member.segments.len() >= SEGMENTS_MAX {
        // The helper has a descriptor for each. What is mapped stays; the oldest number is free again.
        let (old, number) = member.segments.iter().map(|(id, number)| (*id, *number)).next()?;
        member.segments.remove(&old);
        member.free_numbers.push(number);
        if !member.tell(Message::Retire { index: number }, None) {
            return None;
        }
    }
    let number = member.free_numbers.pop().unwrap_or_else(|| {
        member.next_number += 1;
        member.next_number - 1
    });
    if !member.tell(Message::Segment { index: number, pages }, Some(file)) {
        return None;
    }
    member.segments.insert(segment, number);
    Some(number)
}

/// Looks up every thread's robust list, and returns the thread epoch from before the look.
fn look_at_threads(member: &Member) -> u32 {
    let control = member.control();
    let epoch = control.thread_epoch.load(SeqCst);
    let heads = &control.heads;
    match robust_lists(task::threads(member.pid), task::robust_list) {
        Some(found) if found.len() <= heads.address.len() => {
            for ((address, owner), (thread, head)) in heads.address.iter().zip(&heads.owner).zip(&found) {
                address.store(head.get(), SeqCst);
                owner.store(thread.get().cast_unsigned(), SeqCst);
            }
            heads.count.store(found.len() as u32, SeqCst);
            epoch
        }
        // More than can be told, or not all of them are known: an epoch that is never right keeps the helper from
        // merging.
        _ => epoch.wrapping_sub(1),
    }
}

/// The threads that have not ended, each with its robust list if it has one; `None` if one of these did not come to be
/// known.
pub(crate) fn robust_lists(
    threads: Result<Vec<Pid>, ProcError>,
    list: impl Fn(Pid) -> Result<Option<Vaddr>, ProcError>,
) -> Option<Vec<(Pid, Vaddr)>> {
    let known = |tid: Pid| match list(tid) {
        Err(error) if error.is_gone() => Ok(None),
        looked => Ok(looked?.map(|head| (tid, head))),
    };
    let lists: Result<Vec<_>, ProcError> = threads.ok()?.into_iter().map(known).collect();
    Some(lists.ok()?.into_iter().flatten().collect())
}

/// The helper maps in the program's memory: beyond the program's own limit, every mapping call of the program would fail.
fn follow_limits(member: &Member) {
    if let Ok(limit) = limit(member.pid, Resource::AddressSpace) {
        let _ = set_limit(member.helper, Resource::AddressSpace, limit);
    }
}

/// Permits real-time priority for the length of a plan, under a limit that a hostile helper cannot lift. The helper takes
/// it for each batch and gives it back, so that whoever waited for pages of it comes first. To permit it needs
/// CAP_SYS_RESOURCE; with CAP_SYS_NICE alone the helper is given it, which none of its children gets. Returns the plan's
/// flags for it.
fn raise(member: &Member, settings: &Settings) -> u32 {
    let exactly = |limit| Limit { soft: Some(limit), hard: Some(limit) };
    // By its number, which may be somebody else's once it has ended.
    let may_be_limited = settings.priority
        && !member.helper_ended()
        && set_limit(member.helper, Resource::RtTime, exactly(RT_LIMIT_US)).is_ok();
    let permission = Limit { soft: Some(1), hard: member.rt_hard.map(|hard| hard.max(1)) };
    if may_be_limited && set_limit(member.helper, Resource::RtPriority, permission).is_ok() {
        return plan_flags::RAISE;
    }
    if may_be_limited && set_policy(member.helper, Policy::Fifo { priority: 1 }).is_ok() {
        if !member.helper_ended() {
            return plan_flags::RAISED;
        }
        // Whoever has its number now was not meant.
        let _ = set_policy(member.helper, Policy::Other);
    }
    0
}

/// Takes the priority away, and the permission with it: what the program itself was permitted stays.
pub(crate) fn lower(member: &Member) {
    if !member.helper_ended() {
        let none = Limit { soft: Some(0), hard: member.rt_hard };
        let _ = set_limit(member.helper, Resource::RtPriority, none);
        let _ = set_policy(member.helper, Policy::Other);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// The answers of the kernel about three threads, the second of which is asked about by `second`.
    fn lists(second: impl Fn() -> Result<Option<Vaddr>, ProcError>) -> Option<Vec<(Pid, Vaddr)>> {
        robust_lists(Ok(vec![Pid(1), Pid(2), Pid(3)]), |tid| match tid {
            Pid(1) => Ok(Some(Vaddr(0x1000))),
            Pid(2) => second(),
            _ => Ok(None),
        })
    }

    #[test]
    fn a_thread_whose_robust_list_is_not_known_stops_the_plan() {
        let first = (Pid(1), Vaddr(0x1000));
        assert_eq!(lists(|| Ok(Some(Vaddr(0x2000)))), Some(vec![first, (Pid(2), Vaddr(0x2000))]));
        assert_eq!(lists(|| Ok(None)), Some(vec![first]));
        assert_eq!(lists(|| Err(ProcError::Gone { pid: Pid(2) })), Some(vec![first]), "it has ended");
        assert_eq!(lists(|| Err(ProcError::Denied { pid: Pid(2), file: "robust list" })), None);
        assert_eq!(robust_lists(Err(ProcError::Denied { pid: Pid(1), file: "task" }), |_| Ok(None)), None);
    }
}
