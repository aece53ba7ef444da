//! What is done at once because somebody asked for it.

use std::collections::HashMap;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use abi::place::Outcome;
use kernel::{Pagemap, Range, page_size};
use page::{Kind, PageRange};

use super::Broker;
use super::tick::pieces;
use crate::cycle::Findings;
use crate::order::{Item, Result1, Task, is_soon_over};
use crate::view::numbers;
use crate::wishes::MergeReport;

/// How often pages are ordered again that could not be merged because of what is soon over.
const TRIES: u32 = 2;

/// What became of the pages of one request.
#[derive(Default)]
struct Notes {
    owner: u32,
    report: MergeReport,
    refused: HashMap<&'static str, u64>,
    /// Pages to be ordered again.
    again: HashMap<u32, Vec<Item>>,
    tries: u32,
}

impl Notes {
    fn note(&mut self, who: u32, results: &[Result1]) {
        for (item, outcome) in results {
            match outcome {
                Outcome::Merged | Outcome::Retaken if who == self.owner => self.report.pages_merged += 1,
                Outcome::Merged | Outcome::Retaken => self.report.pages_merged_elsewhere += 1,
                Outcome::Zero if who == self.owner => self.report.zero_pages += 1,
                refusal if self.tries < TRIES && is_soon_over(*refusal) => {
                    self.again.entry(who).or_default().push(*item);
                }
                refusal => {
                    if let Some((_, word)) = Outcome::REFUSALS.iter().find(|(outcome, _)| outcome == refusal) {
                        *self.refused.entry(word).or_default() += 1;
                    }
                }
            }
        }
    }
}

impl Broker {
    /// Merges what its owner hands over now: everything that is there, without waiting for it to settle.
    pub(super) fn merge_now(&mut self, owner: u32, ranges: &[Range]) -> MergeReport {
        let begun = Instant::now();
        let cpu = kernel::sched::usage(kernel::sched::Whose::Thread).cpu();
        let helpers = self.helpers_cpu();
        let mut report = MergeReport::default();
        if !self.refresh(owner) {
            return report;
        }
        let Some(member) = self.member(owner) else { return report };
        let Ok(pagemap) = Pagemap::open(member.helper) else { return report };
        member.look_whether_fit();
        if let Some(reason) = member.unfit {
            let pages = member.view.pages();
            report.refused.insert(reason.to_owned(), pages);
            self.totals.refused.add(reason, pages);
            return report;
        }
        let wanted: Vec<PageRange> = member
            .view
            .areas
            .iter()
            .flat_map(|area| {
                let whole = [area.range];
                let ranges = if ranges.is_empty() { &whole[..] } else { ranges };
                ranges.iter().filter_map(|range| range.intersect(&area.range)).collect::<Vec<_>>()
            })
            .map(numbers)
            .collect();
        let mut findings = Findings::default();
        let mut notes = Notes { owner, ..Notes::default() };
        for pages in wanted.into_iter().flat_map(pieces) {
            if !self.look_at(owner, pages, &pagemap, 0, false, &mut findings) {
                break;
            }
            self.act_early(&mut findings, &mut |who, results| notes.note(who, results));
        }
        self.act(&mut findings, &mut |who, results| notes.note(who, results));
        self.drive_for(Some(owner), &mut |who, results| notes.note(who, results));
        // What stood in the way of these pages is over by now. Whoever asked waits for all that can be merged.
        while notes.tries < TRIES && !notes.again.is_empty() {
            notes.tries += 1;
            self.drain_batches();
            for (whose, items) in std::mem::take(&mut notes.again) {
                self.refresh(whose);
                self.order(whose, items);
            }
            self.drive_for(Some(owner), &mut |who, results| notes.note(who, results));
        }
        let Notes { mut report, mut refused, .. } = notes;
        if findings.no_room > 0 {
            *refused.entry("budget").or_default() += findings.no_room;
        }
        report.pages_scanned = findings.pages_read;
        report.refused = refused.into_iter().map(|(word, pages)| (word.to_owned(), pages)).collect();
        report.elapsed = begun.elapsed();
        report.cpu = kernel::sched::usage(kernel::sched::Whose::Thread).cpu().saturating_sub(cpu);
        report.cpu += self.helpers_cpu().saturating_sub(helpers);
        report
    }

    /// CPU time of all helpers so far, by their own account.
    fn helpers_cpu(&self) -> Duration {
        let times = self.members.iter().map(|member| member.control().counters.helper_cpu_ns.load(SeqCst));
        Duration::from_nanos(times.fold(0, u64::saturating_add))
    }

    /// Gives a member's merged pages their own copies back.
    pub(super) fn unmerge_now(&mut self, owner: u32, ranges: &[Range]) -> MergeReport {
        let begun = Instant::now();
        let mut report = MergeReport::default();
        if !self.refresh(owner) {
            return report;
        }
        let Some(member) = self.member(owner) else { return report };
        let mut items = Vec::new();
        for area in &member.view.areas {
            for page in area.ages.range().iter() {
                let address = page.address(page_size());
                let wanted = ranges.is_empty() || ranges.iter().any(|range| range.contains(kernel::Vaddr(address)));
                let merged = area.ages.age(page).is_some_and(|age| matches!(age.kind, Kind::Merged | Kind::Diverged));
                if wanted && merged {
                    items.push(Item { address, task: Task::Unmerge });
                }
            }
        }
        self.order(owner, items);
        let mut given_back = 0;
        let mut refused: HashMap<&'static str, u64> = HashMap::new();
        self.drive_for(Some(owner), &mut |who, results| {
            for (_, outcome) in results.iter().filter(|_| who == owner) {
                if *outcome == Outcome::Unmerged {
                    given_back += 1;
                } else if let Some((_, word)) = Outcome::REFUSALS.iter().find(|(refusal, _)| refusal == outcome) {
                    *refused.entry(word).or_default() += 1;
                }
            }
        });
        report.pages_unmerged = given_back;
        report.refused = refused.into_iter().map(|(word, pages)| (word.to_owned(), pages)).collect();
        report.elapsed = begun.elapsed();
        report
    }
}
