//! Reads pages of a group again, finds the cause and credits it with what its remedy is worth.

use std::collections::BTreeMap;

use twox_hash::XxHash3_64;

use super::NearIndex;
use super::cause::{self, Cause};
use super::compare::Difference;
use super::groups::{Record, Tally};
use super::report::{NearCause, NearExample};
use super::shifted::{self, Sightings};
use super::words::WordKind;

/// Differing words of an example.
const SHOWN: usize = 4;
/// Pages that the first page of a group is compared with.
const COMPARED: usize = 3;

/// The first page of a group with others of it: of other processes, and of its own.
fn pairs_of_group(group: &[Record]) -> Vec<(Record, Record)> {
    let first = group[0];
    let others = || group.iter().filter(|other| other.content != first.content);
    let elsewhere = others().filter(|other| other.owner != first.owner).take(COMPARED - 1);
    let here = others().filter(|other| other.owner == first.owner).take(1);
    elsewhere.chain(here).map(|&other| (first, other)).collect()
}

/// The first page of the centre with pages of its neighbours, of other processes where there are any.
fn pairs_of_cluster(groups: &[&[Record]]) -> Vec<(Record, Record)> {
    let first = groups[0][0];
    let other = |group: &[Record]| group.iter().find(|other| other.owner != first.owner).copied().unwrap_or(group[0]);
    groups[1..].iter().take(COMPARED).map(|group| (first, other(group))).collect()
}

/// Compares pages and collects the causes.
pub(super) struct Judge<'a, R> {
    index: &'a mut NearIndex,
    read: R,
    page_size: usize,
    pub(super) causes: BTreeMap<Cause, NearCause>,
}

impl<'a, R: FnMut(u64, &mut [u8]) -> bool> Judge<'a, R> {
    pub(super) fn new(index: &'a mut NearIndex, page_size: usize, read: R) -> Self {
        Self { index, read, page_size, causes: BTreeMap::new() }
    }

    /// Judges pages whose masked contents are equal.
    pub(super) fn group(&mut self, group: &[Record], tally: &Tally) {
        self.judge(&pairs_of_group(group), tally, (0, 0));
    }

    /// Judges groups with most blocks in common, that of the centre first. `credited` is what they were credited with.
    pub(super) fn cluster(&mut self, groups: &[&[Record]], tally: &Tally, credited: (u64, u64)) {
        self.judge(&pairs_of_cluster(groups), tally, credited);
    }

    /// Finds the cause of a group and credits it with what its remedy would save beyond `credited`: between processes,
    /// and altogether.
    fn judge(&mut self, pairs: &[(Record, Record)], tally: &Tally, credited: (u64, u64)) {
        let between = tally.between_processes() - credited.0;
        let altogether = tally.altogether() - credited.1;
        let mut compared = Vec::new();
        for &(one, other) in pairs {
            if let Some(difference) = self.compare(one, other) {
                compared.push((one, other, difference));
            }
        }
        let Some((one, other, shown)) = compared.first() else { return };
        let across: Vec<Difference> = compared
            .iter()
            .filter(|(one, other, _)| one.owner != other.owner)
            .map(|(_, _, difference)| difference.clone())
            .collect();
        let all: Vec<Difference> = compared.iter().map(|(_, _, difference)| difference.clone()).collect();
        let size = self.page_size as u32;
        let by_place = cause::by_place(&all, size).filter(|_| altogether > 0);
        let by_process = cause::between_processes(&across).filter(|_| between > 0);
        let (cause, worth) = match (by_process, by_place) {
            // Addresses in a header, say: the layout is the easier remedy unless it does far less.
            (Some(cause), place) if place.is_none() || altogether <= 2 * between => (cause, between),
            (_, Some(cause)) => (cause, altogether),
            _ if between > 0 => (Cause::Mixed, between),
            _ => return,
        };
        let with_layout = all.iter().any(|difference| difference.count(WordKind::Pointer) > 0);
        self.credit(cause, tally.contents, worth, with_layout, (one, other, shown));
    }

    /// Judges clusters, given by a page and a tally each, whose data other processes may hold at other offsets.
    pub(super) fn shifted(&mut self, sightings: &Sightings<'_>, clusters: &[(&Record, Tally)]) {
        // Fractions of pages: each of the processes that hold a page's data saves its part.
        let (mut sum, mut pages, mut found) = (0.0, 0, 0);
        let mut example = None;
        for (first, tally) in clusters {
            let Some((holders, other)) = sightings.holders(first) else { continue };
            let (left, worth) = shifted::worth(tally, holders);
            if worth > 0.0 {
                sum += worth;
                pages += left;
                found += 1;
                example = example.or_else(|| Some((**first, *other, self.compare(**first, *other)?)));
            }
        }
        if let (Some((one, other, shown)), 0.999..) = (example, sum) {
            let with_layout = shown.count(WordKind::Pointer) > 0;
            self.credit(Cause::Shifted, pages, (sum + 1e-6) as u64, with_layout, (&one, &other, &shown));
            self.causes.entry(Cause::Shifted).and_modify(|cause| cause.groups = found);
        }
    }

    /// Adds a group to its cause.
    fn credit(
        &mut self,
        cause: Cause,
        contents: u64,
        worth: u64,
        with_layout: bool,
        (one, other, shown): (&Record, &Record, &Difference),
    ) {
        let example = NearExample {
            ids: (one.id, other.id),
            owners: (one.owner, other.owner),
            differing: shown.words.len() as u32,
            first: shown.words.iter().copied().take(SHOWN).collect(),
            worth,
        };
        let entry = self.causes.entry(cause.clone()).or_insert_with(|| NearCause {
            cause,
            groups: 0,
            pages: 0,
            worth: 0,
            worth_with_layout: 0,
            example: NearExample::default(),
        });
        entry.groups += 1;
        entry.pages += contents;
        entry.worth += worth;
        entry.worth_with_layout += if with_layout { worth } else { 0 };
        if example.worth > entry.example.worth {
            entry.example = example;
        }
    }

    /// How two pages differ; nothing if one of them has gone or changed.
    fn compare(&mut self, one: Record, other: Record) -> Option<Difference> {
        let left = self.page(one)?;
        let right = self.page(other)?;
        let pointers = (self.index.pointers(one.owner), self.index.pointers(other.owner));
        Some(Difference::between((&left, pointers.0), (&right, pointers.1)))
    }

    fn page(&mut self, record: Record) -> Option<Vec<u8>> {
        let mut page = vec![0; self.page_size];
        self.index.counts.compared += 1;
        let same = (self.read)(record.id, &mut page) && XxHash3_64::oneshot(&page) == record.content;
        self.index.counts.changed += u64::from(!same);
        same.then_some(page)
    }
}
