//! What is done at once because somebody asked for it.

use std::collections::HashMap;
use std::time::Instant;

use abi::place::Outcome;
use kernel::{Pagemap, Range, page_size};
use page::{Kind, PageRange};

use super::Broker;
use super::tick::pieces;
use crate::cycle::Findings;
use crate::order::{Item, Result1, Task};
use crate::view::numbers;
use crate::wishes::MergeReport;

impl Broker {
    /// Merges what its owner hands over now: everything that is there, without waiting for it to settle.
    pub(super) fn merge_now(&mut self, owner: u32, ranges: &[Range]) -> MergeReport {
        let begun = Instant::now();
        let cpu = kernel::sched::usage(kernel::sched::Whose::Thread).cpu();
        let mut report = MergeReport::default();
        let mut refused: HashMap<&'static str, u64> = HashMap::new();
        if !self.refresh(owner) {
            return report;
        }
        let Some(member) = self.member(owner) else { return report };
        let Ok(pagemap) = Pagemap::open(member.helper) else { return report };
        if let Some(reason) = member.unfit {
            report.refused.insert(reason.to_owned(), member.view.pages());
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
        let mut note = |who: u32, results: &[Result1]| {
            for (_, outcome) in results {
                match outcome {
                    Outcome::Merged | Outcome::Retaken if who == owner => report.pages_merged += 1,
                    Outcome::Merged | Outcome::Retaken => report.pages_merged_elsewhere += 1,
                    Outcome::Zero if who == owner => report.zero_pages += 1,
                    refusal => {
                        let named = Outcome::REFUSALS.iter().find(|(outcome, _)| outcome == refusal);
                        if let Some((_, word)) = named {
                            *refused.entry(word).or_default() += 1;
                        }
                    }
                }
            }
        };
        for pages in wanted.into_iter().flat_map(pieces) {
            if !self.look_at(owner, pages, &pagemap, 0, false, &mut findings) {
                break;
            }
            self.act_early(&mut findings, &mut note);
        }
        self.act(&mut findings, &mut note);
        self.drive_for(Some(owner), &mut note);
        report.pages_scanned = findings.pages_read;
        report.refused = refused.into_iter().map(|(word, pages)| (word.to_owned(), pages)).collect();
        report.elapsed = begun.elapsed();
        report.cpu = kernel::sched::usage(kernel::sched::Whose::Thread).cpu().saturating_sub(cpu);
        report
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
