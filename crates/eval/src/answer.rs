//! From figures to the report.

use kernel::page_size;
use page::census::ContentClass;
use page::profit::{KsmBooks, StoreBooks};

use crate::count::{Bits, Figures, Top, count};
use crate::estimate::estimate;
use crate::matrix::matrix;
use crate::near::near;
use crate::numbers::Numbers;
use crate::report::{
    ClassReport, ContentReport, Earning, GroupMatrix, KindReport, Matrix, Owned, ProcessReport, Report, Savings,
    Scopes, Totals, VmaReport,
};
use crate::runs::Runs;
use crate::snapshot::{Options, Snapshot};
use crate::tally::{Eligible, Side, Tally};
use crate::targets::GroupBy;
use crate::vma::VmaKind;
use crate::walk::Known;

/// Owners of a matrix: one bit of a word each.
const MATRIX: usize = 24;
/// Part of a process's share that its earning mappings give.
const EARNING: f64 = 0.9;
/// Pages of a segment, to reckon with: they are made to measure.
const SEGMENT_PAGES: u64 = 512;

pub(crate) fn report(snapshot: &Snapshot, options: &Options) -> Report {
    let numbers = Numbers::new(&snapshot.walk, snapshot.processes.len());
    let threads = options.pace.threads;
    let assigned = GroupBy::ALL.map(|by| by.assign(&snapshot.processes));
    let by = assigned.clone().map(|(_, of)| of);
    let watched = snapshot.waited.is_some();
    let mut figures = count(&snapshot.groups, &numbers, &by, watched, threads);
    let sample = options.sample.map(|sample| {
        let read = snapshot.groups.read() as u64;
        estimate(&mut figures, sample, numbers.pages(), read)
    });
    let near =
        (options.near && snapshot.live).then(|| near(snapshot, &numbers, &figures.has_equal, options.pace.limit));
    let known = known(snapshot, &figures);
    let report = Reporter { snapshot, numbers: &numbers, figures: &figures, known: &known };
    let processes = report.processes();
    let chosen = GroupBy::ALL.iter().position(|by| *by == options.group_by).expect("it is one of them");
    let mut answer = Report {
        page_size: page_size(),
        vmas_total: snapshot.walk.mappings.len() as u64,
        totals: report.totals(),
        savings: report.savings(),
        duplicates: report.scopes(&assigned),
        classes: report.classes(),
        kinds: report.kinds(),
        sharing: report.matrix(&processes, threads),
        groups: report.group_matrix(options.group_by, &assigned[chosen], threads),
        vmas: report.vmas(),
        processes,
        top_contents: report.top_contents(),
        skipped: snapshot.skipped.clone(),
        reading: snapshot.reading(&numbers),
        sample,
        files: snapshot.files.clone(),
        near,
    };
    answer.vmas.truncate(options.top);
    answer
}

/// Pages that needed no look, by process, with those told by place and content.
fn known(snapshot: &Snapshot, figures: &Figures) -> Vec<Known> {
    let mut known = snapshot.walk.known.clone();
    for (process, pages) in &figures.by_fork {
        known[*process as usize].by_fork += pages;
    }
    known
}

struct Reporter<'a> {
    snapshot: &'a Snapshot,
    numbers: &'a Numbers<'a>,
    figures: &'a Figures,
    known: &'a [Known],
}

impl Reporter<'_> {
    /// What lasted, or all where nobody looked twice.
    fn expected(&self) -> &Side {
        self.figures.stable.as_ref().unwrap_or(&self.figures.all)
    }

    fn totals(&self) -> Totals {
        let all = &self.figures.all;
        let stable = self.figures.stable.as_ref().map(|side| side.total.counters);
        let mut known = Known::default();
        self.known.iter().for_each(|process| known.add(process));
        let with_pages = self.snapshot.walk.mappings.iter().zip(&all.mappings);
        let mergeable = with_pages.filter(|(mapping, _)| mapping.mergeable);
        Totals {
            counters: all.total.counters,
            volatile_pages: stable.map_or(0, |stable| all.total.counters.pages_scanned - stable.pages_scanned),
            stable,
            volatile: stable.map(|stable| all.total.counters.without(&stable)),
            huge_pages: all.total.huge,
            duplicate_pages_in_huge: all.total.shared_content_in_huge,
            already_shared_pages: known.already_shared(),
            already_shared_by_fork: known.by_fork,
            already_shared_by_ksm: known.by_ksm,
            already_shared_by_partition: known.by_partition,
            swapped_pages: known.swapped,
            shared_memory_pages: known.shared_memory,
            ksm_pages: all.ksm.pages,
            mergeable_pages: mergeable.map(|(_, tally)| tally.counters.pages_scanned).sum(),
            store_pages: all.store.pages,
        }
    }

    fn savings(&self) -> Savings {
        let (all, expected) = (&self.figures.all, self.expected());
        let ksm = |side: &Side| {
            // The first zero page stays, as the copy that the others become.
            let zeros = side.ksm.zero.saturating_sub(1);
            let books = KsmBooks { pages: side.ksm.duplicates + zeros, zero_pages: 0, rmap_items: all.ksm.pages };
            books.profit(page_size())
        };
        let shared_already: u64 = self.known.iter().map(|known| known.by_fork + known.by_ksm).sum();
        // A huge page is split at its first match, and its zero pages become the kernel's zero page then: they are
        // saved, and not counted in pages_sharing.
        let zeros = expected.ksm.zero.saturating_sub(expected.ksm.zero_in_huge);
        let sharing = expected.ksm.duplicates + zeros.saturating_sub(1);
        let upper = self.runs(&self.figures.mergeable);
        let runs = self.runs(&self.figures.mergeable_expected);
        Savings {
            bytes_saved_ksm: ksm(expected),
            bytes_saved_ksm_upper: ksm(all),
            pages_sharing_predicted: sharing + shared_already,
            bytes_saved_store: store(&expected.store_small, &all.store, &runs),
            bytes_saved_store_upper: store(&all.store, &all.store, &upper),
            store_vmas: runs.vmas,
            store_over_budget_pages: runs.over_budget,
        }
    }

    fn runs(&self, bits: &Bits) -> Runs {
        Runs::count(&self.snapshot.walk, bits)
    }

    fn scopes(&self, assigned: &[(Vec<String>, Vec<u32>)]) -> Vec<Scopes> {
        let stable = self.figures.stable.as_ref();
        let with_names = GroupBy::ALL.iter().zip(assigned).enumerate();
        with_names
            .map(|(at, (by, (names, _)))| {
                let pages = self.figures.all.scopes[at];
                Scopes {
                    by: *by,
                    groups: names.len() as u64,
                    within_process: pages.within_process,
                    within_group: pages.within_group,
                    between_groups: pages.between_groups,
                    stable: stable.map(|side| side.scopes[at]),
                }
            })
            .collect()
    }

    fn classes(&self) -> Vec<ClassReport> {
        let stable = self.figures.stable.as_ref();
        let of = |class: ContentClass| {
            let at = class as usize - 1;
            let (pages, duplicate_pages) = self.figures.all.classes[at];
            let lasting = stable.map_or(duplicate_pages, |side| side.classes[at].1);
            ClassReport {
                class: class.text(),
                pages,
                duplicate_pages,
                volatile_duplicate_pages: duplicate_pages - lasting,
            }
        };
        ContentClass::ALL.into_iter().map(of).collect()
    }

    fn owned(&self, all: &Tally, stable: Option<&Tally>) -> Owned {
        Owned {
            counters: all.counters,
            shared_content_pages: all.shared_content,
            volatile_pages: stable.map_or(0, |stable| all.counters.pages_scanned - stable.counters.pages_scanned),
            bytes_saved_share: all.share_bytes(page_size()),
            bytes_saved_share_stable: stable.map(|stable| stable.share_bytes(page_size())),
        }
    }

    fn mapping_owned(&self, at: usize) -> Owned {
        let stable = self.figures.stable.as_ref().map(|side| &side.mappings[at]);
        self.owned(&self.figures.all.mappings[at], stable)
    }

    fn kinds(&self) -> Vec<KindReport> {
        let mut kinds: Vec<KindReport> = Vec::new();
        for (at, mapping) in self.snapshot.walk.mappings.iter().enumerate() {
            let owned = self.mapping_owned(at);
            let known = kinds.iter_mut().find(|kind| kind.kind == mapping.kind);
            match known {
                Some(kind) => {
                    kind.vmas += 1;
                    add(&mut kind.owned, &owned);
                }
                None => kinds.push(KindReport { kind: mapping.kind, vmas: 1, owned }),
            }
        }
        kinds.sort_by_key(|kind| std::cmp::Reverse(best(&kind.owned)));
        kinds
    }

    fn vmas(&self) -> Vec<VmaReport> {
        let mappings = self.snapshot.walk.mappings.iter().enumerate();
        let mut vmas: Vec<VmaReport> = mappings
            .map(|(at, mapping)| VmaReport {
                pid: self.snapshot.processes[mapping.process as usize].pid,
                start: hex(mapping.range.start().get()),
                end: hex(mapping.range.end().get()),
                permissions: String::from_utf8_lossy(&mapping.permissions).into_owned(),
                name: mapping.name.clone(),
                kind: mapping.kind,
                mergeable: mapping.mergeable,
                ksm_refuses: mapping.ksm_refuses,
                store_refuses: mapping.store_refuses,
                owned: self.mapping_owned(at),
            })
            .collect();
        vmas.sort_by_key(|vma| std::cmp::Reverse(best(&vma.owned)));
        vmas
    }

    fn processes(&self) -> Vec<ProcessReport> {
        let mut earning: Vec<Vec<Earning>> = vec![Vec::new(); self.snapshot.processes.len()];
        for (at, mapping) in self.snapshot.walk.mappings.iter().enumerate() {
            let bytes_saved_share = best(&self.mapping_owned(at));
            if bytes_saved_share == 0 {
                continue;
            }
            let name = if mapping.name.is_empty() { kind_name(mapping.kind) } else { mapping.name.clone() };
            earning[mapping.process as usize].push(Earning {
                start: hex(mapping.range.start().get()),
                end: hex(mapping.range.end().get()),
                name,
                bytes_saved_share,
            });
        }
        let with_earning = self.snapshot.processes.iter().zip(earning).enumerate();
        let mut processes: Vec<ProcessReport> = with_earning
            .map(|(at, (process, earning))| {
                let stable = self.figures.stable.as_ref().map(|side| &side.processes[at]);
                ProcessReport {
                    process: process.clone(),
                    owned: self.owned(&self.figures.all.processes[at], stable),
                    already_shared_pages: self.known[at].already_shared(),
                    earning_vmas: few(earning),
                }
            })
            .collect();
        processes.sort_by_key(|process| std::cmp::Reverse(best(&process.owned)));
        processes
    }

    fn matrix(&self, processes: &[ProcessReport], threads: usize) -> Matrix {
        let pids: Vec<i32> = processes.iter().take(MATRIX).map(|process| process.process.pid).collect();
        let places: Vec<Option<usize>> =
            self.snapshot.processes.iter().map(|process| pids.iter().position(|pid| *pid == process.pid)).collect();
        let of = |process: u32| places[process as usize];
        let pages = matrix(&self.snapshot.groups, self.numbers, pids.len(), of, true, threads);
        Matrix { pids, pages }
    }

    fn group_matrix(&self, by: GroupBy, (names, of): &(Vec<String>, Vec<u32>), threads: usize) -> GroupMatrix {
        let mut share = vec![0; names.len()];
        for (process, group) in of.iter().enumerate() {
            share[*group as usize] += self.expected().processes[process].share_bytes(page_size());
        }
        let mut order: Vec<usize> = (0..names.len()).collect();
        order.sort_by_key(|group| std::cmp::Reverse(share[*group]));
        order.truncate(MATRIX);
        let place = |process: u32| order.iter().position(|group| *group == of[process as usize] as usize);
        let pages = matrix(&self.snapshot.groups, self.numbers, order.len(), place, false, threads);
        GroupMatrix { by, names: order.iter().map(|group| names[*group].clone()).collect(), pages }
    }

    fn top_contents(&self) -> Vec<ContentReport> {
        let of = |top: &Top| {
            let span = self.numbers.span(top.page);
            let process = self.numbers.process_of(span.mapping);
            ContentReport {
                class: top.class.text(),
                copies: top.copies.0,
                processes: top.processes,
                pid: self.snapshot.processes[process as usize].pid,
                address: hex(self.numbers.address(top.page, span).address(page_size())),
            }
        };
        self.figures.top.iter().map(of).collect()
    }
}

/// What the store saves of `pages` after bookkeeping for all that it manages.
fn store(pages: &Eligible, managed: &Eligible, runs: &Runs) -> i64 {
    let books = StoreBooks {
        pages_saved: pages.duplicates.saturating_sub(runs.over_budget),
        zero_pages: pages.zero,
        vmas_added: runs.vmas,
        managed_pages: managed.pages,
        index_entries: managed.unique + managed.shared,
        pages_shared: pages.shared,
        segments: pages.shared.div_ceil(SEGMENT_PAGES),
    };
    books.profit(page_size())
}

/// The share that decides the order: what lasts, where that is known.
fn best(owned: &Owned) -> u64 {
    owned.bytes_saved_share_stable.unwrap_or(owned.bytes_saved_share)
}

fn add(sum: &mut Owned, other: &Owned) {
    sum.counters.add(&other.counters);
    sum.shared_content_pages += other.shared_content_pages;
    sum.volatile_pages += other.volatile_pages;
    sum.bytes_saved_share += other.bytes_saved_share;
    sum.bytes_saved_share_stable = sum.bytes_saved_share_stable.zip(other.bytes_saved_share_stable).map(|(a, b)| a + b);
}

/// The fewest that give nearly all.
fn few(mut earning: Vec<Earning>) -> Vec<Earning> {
    earning.sort_by_key(|vma| std::cmp::Reverse(vma.bytes_saved_share));
    let all: u64 = earning.iter().map(|vma| vma.bytes_saved_share).sum();
    let mut sum = 0;
    let enough = earning.iter().position(|vma| {
        sum += vma.bytes_saved_share;
        sum as f64 >= all as f64 * EARNING
    });
    earning.truncate(enough.map_or(0, |at| at + 1));
    earning
}

fn kind_name(kind: VmaKind) -> String {
    format!("({})", kind.text())
}

fn hex(address: u64) -> String {
    format!("{address:#x}")
}
