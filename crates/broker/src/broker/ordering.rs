//! What is ordered of a member, within the number of mappings that it may have.

use kernel::{maps, page_size};
use page::PageNumber;
use page::plan::{Limits, Match, Reason, Twin, plan};

use super::Broker;
use crate::order::{Item, Order, Queue, Task};
use crate::view::numbers;

impl Broker {
    /// Plans a member's items, area by area: long runs first, within its budget of mappings. What the budget does not
    /// allow waits until the member's mappings have been counted again.
    pub(super) fn order(&mut self, owner: u32, items: Vec<Item>) {
        let left = self.order_within_budget(owner, items);
        if !left.is_empty() {
            self.postponed.entry(owner).or_default().extend(left);
        }
    }

    /// Orders what was postponed, for members whose helpers are done with everything else. What a run adds is known
    /// only from its neighbours in the same plan, and nothing tells that mappings have become fewer: so the sum of what
    /// was planned is the most that there can be, and their number is looked up when that is too much.
    pub(super) fn order_postponed(&mut self) {
        for owner in self.ready_postponed() {
            let items = self.postponed.remove(&owner).unwrap_or_default();
            let Some(member) = self.member(owner) else { continue };
            let Ok(vmas) = maps::count(member.helper) else { continue };
            member.view.vmas = vmas;
            let wanted = items.len();
            let left = self.order_within_budget(owner, items);
            if !left.is_empty() && left.len() < wanted {
                // A page between two that are merged by then adds no mapping.
                self.postponed.insert(owner, left);
                continue;
            }
            let Some(member) = self.member(owner) else { continue };
            for item in &left {
                let page = PageNumber(item.address / page_size());
                if let Some(area) = member.view.area_of(page) {
                    area.refused(page, false);
                }
            }
            self.totals.refused.add("budget", left.len() as u64);
        }
    }

    /// Members for whom something was postponed and whose helpers have nothing to do.
    pub(super) fn ready_postponed(&self) -> Vec<u32> {
        let idle = |owner: &u32| self.queues.get(owner).is_none_or(Queue::is_idle);
        self.postponed.keys().copied().filter(idle).collect()
    }

    /// Returns what is left.
    fn order_within_budget(&mut self, owner: u32, mut items: Vec<Item>) -> Vec<Item> {
        items.sort_by_key(|item| item.address);
        items.dedup_by_key(|item| item.address);
        let size = page_size();
        let cap = self.settings.vmas.min(self.max_map_count * 3 / 4);
        let Some(position) = self.members.iter().position(|member| member.index == owner) else { return Vec::new() };
        let member = &mut self.members[position];
        let strict = self.partition.options().strict;
        let mut budget = cap.saturating_sub(member.view.vmas);
        let mut orders = Vec::new();
        let mut planned_vmas = 0;
        let mut left_out = Vec::new();
        for area in &member.view.areas {
            let from = items.partition_point(|item| item.address < area.range.start().get());
            let to = items.partition_point(|item| item.address < area.range.end().get());
            let here = &items[from..to];
            if here.is_empty() {
                continue;
            }
            let (mut diverged, mut matches) = (Vec::new(), Vec::new());
            for item in here {
                let page = PageNumber(item.address / size);
                match item.task {
                    Task::Merge(place, _) => matches.push(Match { page, twin: Twin::Store(place) }),
                    Task::DropZero => matches.push(Match { page, twin: Twin::Zero }),
                    Task::Retake(..) | Task::RetakeZero | Task::Unmerge => diverged.push(*item),
                }
            }
            let mut limits = Limits::new(size, budget);
            limits.batch_pages = abi::BATCH_MAX as u64;
            let planned = plan(&[numbers(area.range)], &matches, &limits);
            budget = budget.saturating_sub(planned.vmas_added);
            planned_vmas += planned.vmas_added;
            for left in planned.left_out.iter().filter(|left| left.reason == Reason::Budget) {
                let first = here.partition_point(|item| item.address < left.pages.start.address(size));
                let behind = here.partition_point(|item| item.address < left.pages.end.address(size));
                left_out.extend_from_slice(&here[first..behind]);
            }
            let mut plain = Vec::new();
            for run in planned.batches.iter().flat_map(|batch| &batch.runs) {
                for (offset, page) in run.pages.iter().enumerate() {
                    let task = match run.twin {
                        Twin::Zero => Task::DropZero,
                        Twin::Store(place) => {
                            let offset = u32::try_from(offset).expect("a run is shorter than a segment");
                            let place = page::Place { segment: place.segment, page: place.page + offset };
                            let contents = self.partition.fingerprints(place.segment);
                            let Some(content) = contents.and_then(|all| all.get(place.page as usize)) else { continue };
                            Task::Merge(place, *content)
                        }
                    };
                    plain.push(Item { address: page.address(size), task });
                }
            }
            for items in [plain, diverged] {
                if !items.is_empty() {
                    orders.push(Order::new(area.range, items, strict));
                }
            }
        }
        member.view.vmas += planned_vmas;
        let queue = self.queues.entry(owner).or_default();
        orders.into_iter().for_each(|order| queue.push(order));
        left_out
    }
}
