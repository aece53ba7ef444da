//! Quiescent merges: looking for those who map themselves.

use std::collections::{HashMap, HashSet};

use kernel::{MemoryFile, Pagemap, Pid, Pidfd, Range, Vaddr, page_size};
use page::plan::{Limits, Match, Reason, Twin, plan};
use page::{Fingerprint, Kind, Location, PageAge, PageNumber, PageRange, SegmentId};
use store::HandOut;

use super::Broker;
use crate::cycle::{Findings, Look, fill, look};
use crate::layout::Layout;
use crate::order::{Item, Task};
use crate::quiet::{PlacedRun, Quiet, QuietPlan};
use crate::view::{View, numbers};
use crate::wishes::{RefusedKind, Wished};

/// Pages looked at for one plan.
const LOOK_AT_ONCE: u64 = 4096;

impl Broker {
    /// Looks at the next part of what a process names, and says what it is to map.
    pub(super) fn quiescent(&mut self, pid: Pid, uid: u32, ranges: &[Range], from: Option<u64>) -> Wished {
        let cpu = kernel::sched::usage(kernel::sched::Whose::Thread).cpu();
        match self.plan_quiescent(pid, uid, ranges, from) {
            Some(mut plan) => {
                plan.cpu = kernel::sched::usage(kernel::sched::Whose::Thread).cpu().saturating_sub(cpu);
                Wished::Quiescent(Box::new(plan))
            }
            None => Wished::Refused {
                kind: RefusedKind::Unreadable,
                reason: format!(
                    "the broker may not read process {pid}: it must be of the same user and dumpable, and with \
                     kernel.yama.ptrace_scope=1 a descendant of the broker's process"
                ),
            },
        }
    }

    fn plan_quiescent(&mut self, pid: Pid, uid: u32, ranges: &[Range], from: Option<u64>) -> Option<QuietPlan> {
        let mut quiet = self.take_quiet(pid, uid)?;
        if from.is_none() {
            // It may have executed another program since.
            quiet.memory = MemoryFile::open(pid).ok()?;
            quiet.name(ranges);
            let all = quiet.ranges.clone();
            if !quiet.view.refresh(Layout::from_outside(pid), 0, &all, self.policy, quiet.index, &mut self.eyes.spans) {
                quiet.view.clear(&mut self.eyes.spans);
                return None;
            }
        }
        let result = self.look_for(pid, &mut quiet, ranges, from);
        self.quiet.insert(pid, quiet);
        result
    }

    /// The process's entry, taken out for the time of a look.
    fn take_quiet(&mut self, pid: Pid, uid: u32) -> Option<Quiet> {
        if let Some(mut quiet) = self.quiet.remove(&pid) {
            if !quiet.pidfd.exited().unwrap_or(true) {
                return Some(quiet);
            }
            // Another process of this number.
            quiet.view.clear(&mut self.eyes.spans);
        }
        let pidfd = Pidfd::open(pid).ok()?;
        let memory = MemoryFile::open(pid).ok()?;
        let index = self.next_index;
        self.next_index += 1;
        Some(Quiet { pidfd, memory, index, uid, ranges: Vec::new(), view: View::default() })
    }

    fn look_for(&mut self, pid: Pid, quiet: &mut Quiet, ranges: &[Range], from: Option<u64>) -> Option<QuietPlan> {
        let pagemap = Pagemap::open(pid).ok()?;
        let mut result = QuietPlan::default();
        let mut findings = Findings::default();
        let from = from.unwrap_or(0);
        let mut left = LOOK_AT_ONCE;
        'areas: for area in &quiet.view.areas {
            for part in ranges.iter().filter_map(|range| range.intersect(&area.range)) {
                let mut pages = numbers(part);
                pages.start = pages.start.max(PageNumber(from / page_size()));
                if pages.start >= pages.end {
                    continue;
                }
                if left == 0 {
                    result.next = Some(pages.start.address(page_size()));
                    break 'areas;
                }
                let end = PageNumber(pages.end.0.min(pages.start.0 + left));
                left -= end.0 - pages.start.0;
                let first = (area.first, area.ages.range().start);
                let this = Look {
                    owner: quiet.index,
                    memory: &quiet.memory,
                    pagemap: &pagemap,
                    first,
                    ages: &area.ages,
                    zero_patience: 0,
                    spare_huge: false,
                };
                let pages_now = PageRange::new(pages.start, end);
                if !look(&this, pages_now, &mut self.eyes, &self.partition, &mut findings) {
                    return None;
                }
                if end < pages.end {
                    result.next = Some(end.address(page_size()));
                    break 'areas;
                }
            }
        }
        self.fill_for(quiet, ranges, &mut findings);
        if findings.no_room > 0 {
            self.totals.refused.add("budget", findings.no_room);
            result.refused.push(("budget".to_owned(), findings.no_room));
        }
        let own = findings.items.remove(&quiet.index).unwrap_or_default();
        self.place(quiet, own, &mut result);
        let mut elsewhere = 0;
        self.act(&mut findings, &mut |_, results| elsewhere += merged(results));
        self.drive(&mut |_, results| elsewhere += merged(results));
        result.pages_merged_elsewhere = elsewhere;
        result.pages_scanned = findings.pages_read;
        Some(result)
    }

    /// Fills the store with what was found. Pages of the caller are taken if it names them in this call; pages of
    /// other quiescent processes wait for their own next call.
    fn fill_for(&mut self, quiet: &mut Quiet, ranges: &[Range], findings: &mut Findings) {
        let members = &mut self.members;
        let Quiet { index, view, .. } = quiet;
        let index = *index;
        let age_of = |location: Location| {
            if location.owner == index {
                let at = Vaddr(location.page.address(page_size()));
                let named = ranges.iter().any(|range| range.contains(at));
                let plain = PageAge { kind: Kind::Plain, cycles: None, back_off: 0 };
                return (named && view.area_of(location.page).is_some()).then_some(plain);
            }
            let member = members.iter_mut().find(|member| member.index == location.owner)?;
            member.view.area_of(location.page)?.ages.age(location.page)
        };
        fill(&mut self.eyes, &mut self.partition, findings, age_of);
    }

    /// Turns a caller's items into runs, within its budget of mappings, with the segments that it needs.
    fn place(&mut self, quiet: &mut Quiet, mut items: Vec<Item>, result: &mut QuietPlan) {
        items.sort_by_key(|item| item.address);
        items.dedup_by_key(|item| item.address);
        self.note_segments(&items);
        let size = page_size();
        let mut contents: HashMap<PageNumber, Fingerprint> = HashMap::new();
        let matches: Vec<Match> = items
            .iter()
            .map(|item| {
                let page = PageNumber(item.address / size);
                let twin = match item.task {
                    Task::Merge(place, content) | Task::Retake(place, content) => {
                        contents.insert(page, content);
                        Twin::Store(place)
                    }
                    Task::DropZero | Task::RetakeZero | Task::Unmerge => Twin::Zero,
                };
                Match { page, twin }
            })
            .collect();
        let held: HashSet<Fingerprint> = contents.values().copied().collect();
        let cap = self.settings.vmas.min(self.max_map_count * 3 / 4);
        let mut budget = cap.saturating_sub(quiet.view.vmas);
        let mut numbers_of: HashMap<SegmentId, Option<usize>> = HashMap::new();
        let mut left_out = 0;
        for area in &quiet.view.areas {
            let here = numbers(area.range);
            let from = matches.partition_point(|found| found.page < here.start);
            let to = matches.partition_point(|found| found.page < here.end);
            let planned = plan(&[here], &matches[from..to], &Limits::new(size, budget));
            budget = budget.saturating_sub(planned.vmas_added);
            quiet.view.vmas += planned.vmas_added;
            left_out += planned.pages_left_out(Reason::Budget);
            for run in planned.batches.iter().flat_map(|batch| &batch.runs) {
                let place = match run.twin {
                    Twin::Zero => None,
                    Twin::Store(place) => {
                        let number = numbers_of.entry(place.segment).or_insert_with(|| {
                            let handed =
                                self.partition.hand_out(place.segment, quiet.uid, |content| held.contains(&content));
                            let HandOut::File { file, .. } = handed else { return None };
                            result.segments.push(file.try_clone_to_owned().ok()?);
                            Some(result.segments.len() - 1)
                        });
                        let Some(number) = *number else { continue };
                        Some((number, place.page))
                    }
                };
                let start = Vaddr(run.pages.start.address(size));
                let Ok(pages) = Range::new(start, Vaddr(run.pages.end.address(size))) else { continue };
                result.runs.push(PlacedRun { pages, keep: area.keep.bits(), place });
                if place.is_none() {
                    self.totals.zero += run.pages.pages();
                    continue;
                }
                self.totals.merges += run.pages.pages();
                for page in run.pages.iter() {
                    if let Some(content) = contents.get(&page) {
                        self.eyes.index.forget(*content, area.first.offset(page.0 - here.start.0));
                    }
                }
            }
        }
        result.runs.sort_by_key(|run| (run.place, run.pages.start()));
        if left_out > 0 {
            self.totals.refused.add("budget", left_out);
            result.refused.push(("budget".to_owned(), left_out));
        }
    }

    /// Forgets quiescent processes that have ended.
    pub(super) fn forget_quiet(&mut self) {
        let spans = &mut self.eyes.spans;
        self.quiet.retain(|_, quiet| {
            let lives = !quiet.pidfd.exited().unwrap_or(true);
            if !lives {
                quiet.view.clear(spans);
            }
            lives
        });
    }
}

fn merged(results: &[crate::order::Result1]) -> u64 {
    use abi::place::Outcome;
    results.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Merged | Outcome::Retaken)).count() as u64
}
