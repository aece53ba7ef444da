//! How many mappings merging into the page store would take.

use page::profit::StoreBooks;

use crate::count::Bits;
use crate::walk::Walk;

/// Mappings that merging may add to a process: what the broker allows itself.
const VMAS_MAX: u64 = 30_000;
/// A run in the middle of a mapping cuts it into three.
const VMAS_A_RUN: u64 = 2;

/// Runs of mergeable pages. That neighbours become neighbours in the store too is taken for granted: it is laid out in
/// the order in which pages are found, and copies of long runs lie alike.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Runs {
    /// Mappings added.
    pub(crate) vmas: u64,
    /// Pages of runs beyond what a process's budget allows, shortest runs first.
    pub(crate) over_budget: u64,
}

impl Runs {
    /// The runs of the pages that are set.
    pub(crate) fn count(walk: &Walk, mergeable: &Bits) -> Self {
        let mut sum = Self::default();
        let mut lengths: Vec<u64> = Vec::new();
        let mut process = None;
        let mut run = 0;
        let mut before: Option<(u32, u64)> = None;
        let end_run = |run: &mut u64, lengths: &mut Vec<u64>| {
            if *run > 0 {
                lengths.push(std::mem::take(run));
            }
        };
        for span in &walk.spans {
            let owner = walk.mappings[span.mapping as usize].process;
            if process != Some(owner) {
                end_run(&mut run, &mut lengths);
                sum.add_process(&mut lengths);
                process = Some(owner);
            }
            if before != Some((span.mapping, span.start.0)) {
                end_run(&mut run, &mut lengths);
            }
            for page in span.first..span.first + span.pages {
                if mergeable.get(page) {
                    run += 1;
                } else {
                    end_run(&mut run, &mut lengths);
                }
            }
            before = Some((span.mapping, span.range().end.0));
        }
        end_run(&mut run, &mut lengths);
        sum.add_process(&mut lengths);
        sum
    }

    fn add_process(&mut self, lengths: &mut Vec<u64>) {
        lengths.sort_unstable_by_key(|length| std::cmp::Reverse(*length));
        let allowed = usize::try_from(VMAS_MAX / VMAS_A_RUN).expect("a small number");
        let paying = StoreBooks::pages_to_pay_a_run(kernel::page_size());
        let taken = lengths.iter().take(allowed).filter(|length| **length >= paying).count();
        self.vmas += taken as u64 * VMAS_A_RUN;
        self.over_budget += lengths[taken..].iter().sum::<u64>();
        lengths.clear();
    }
}
