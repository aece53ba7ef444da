//! Interning against a naive model: a list of contents.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::time::{Duration, Instant};

use kernel::{Bytes, page_size};
use pagefold_store::{FillBuffer, FillRequest, HandOut, Options, Outcome, Partition, Place, Run, SegmentId};
use proptest::prelude::*;

/// A page of one of a few contents; content 0 is zeros.
fn page(content: u8) -> Vec<u8> {
    let mut page = vec![0; page_size() as usize];
    if content > 0 {
        page[usize::from(content) * 64] = content;
    }
    page
}

#[derive(Clone, Debug)]
struct Source {
    seen: u8,
    now: u8,
    readable: bool,
    continues: bool,
}

fn source() -> impl Strategy<Value = Source> {
    (0_u8..14, 0_u8..14, 0_u8..12, any::<bool>()).prop_map(|(seen, other, luck, continues)| Source {
        seen,
        now: if luck == 0 { other } else { seen },
        readable: luck != 1,
        continues,
    })
}

#[derive(Clone, Debug)]
enum Step {
    Fill(Vec<Source>),
    Retire(usize),
    Withdraw(usize),
    Use(usize, u32),
    Reclaim,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        5 => proptest::collection::vec(source(), 0..20).prop_map(Step::Fill),
        1 => any::<usize>().prop_map(Step::Retire),
        1 => any::<usize>().prop_map(Step::Withdraw),
        1 => (any::<usize>(), 0_u32..3).prop_map(|(which, pages)| Step::Use(which, pages)),
        1 => Just(Step::Reclaim),
    ]
}

/// One segment as the model knows it.
#[derive(Clone, Debug)]
struct Known {
    contents: Vec<u8>,
    mapped: u32,
    withdrawn: bool,
}

struct Model {
    partition: Partition,
    buffer: FillBuffer,
    segments: HashMap<SegmentId, Known>,
    room: Option<u64>,
}

impl Model {
    fn open(strict: bool, segment_pages: u32, limit_pages: Option<u64>) -> Self {
        let limit = limit_pages.map(|pages| Bytes(pages * page_size()));
        let partition = Partition::open(Options { strict, segment_pages, limit, ..Options::for_user(7) }).unwrap();
        Self { partition, buffer: FillBuffer::new(), segments: HashMap::new(), room: limit_pages }
    }

    fn fill(&mut self, sources: &[Source]) -> Vec<Outcome> {
        let requests: Vec<_> = sources
            .iter()
            .map(|source| FillRequest {
                fingerprint: self.partition.secret().fingerprint(&page(source.seen)),
                source: source.clone(),
                continues: source.continues,
            })
            .collect();
        let report = self.partition.fill(&mut self.buffer, &requests, |requests, reads| {
            for (slot, request) in requests.iter().enumerate() {
                if request.source.readable {
                    reads.put(slot, &page(request.source.now));
                }
            }
        });
        assert!(report.stopped.is_none(), "{:?}", report.stopped);
        report.outcomes
    }

    fn pages(&self) -> u64 {
        self.segments.values().map(|known| known.contents.len() as u64).sum()
    }

    fn find(&self, content: u8) -> Option<Place> {
        self.segments.iter().filter(|(_, known)| !known.withdrawn).find_map(|(segment, known)| {
            let page = known.contents.iter().position(|there| *there == content)?;
            Some(Place { segment: *segment, page: u32::try_from(page).unwrap() })
        })
    }

    fn enter(&mut self, place: Place, content: u8) {
        let known =
            self.segments.entry(place.segment).or_insert(Known { contents: Vec::new(), mapped: 0, withdrawn: false });
        assert_eq!(known.contents.len(), place.page as usize, "pages of a segment are in the order given");
        known.contents.push(content);
    }

    /// What must become of a page that is not shared, whatever the partition.
    fn refusal(source: &Source) -> Option<Outcome> {
        if !source.readable {
            Some(Outcome::Unread)
        } else if source.seen != source.now {
            Some(Outcome::Changed)
        } else if source.now == 0 {
            Some(Outcome::Zero)
        } else {
            None
        }
    }

    fn check_packed(&mut self, sources: &[Source], outcomes: &[Outcome], segment_pages: usize) {
        for (sources, outcomes) in sources.chunks(segment_pages).zip(outcomes.chunks(segment_pages)) {
            let mut left = self.room.map_or(u64::MAX, |room| room - self.pages());
            let mut round: HashMap<u8, Option<Place>> = HashMap::new();
            let mut segment = None;
            let before: HashMap<u8, Place> =
                (1..14).filter_map(|content| Some((content, self.find(content)?))).collect();
            for (source, outcome) in sources.iter().zip(outcomes) {
                if let Some(refusal) = Self::refusal(source) {
                    assert_eq!(*outcome, refusal);
                } else if let Some(place) = before.get(&source.now) {
                    assert_eq!(*outcome, Outcome::Known(*place));
                } else if let Some(first) = round.get(&source.now) {
                    assert_eq!(*outcome, first.map_or(Outcome::Full, Outcome::Known));
                } else if left == 0 {
                    assert_eq!(*outcome, Outcome::Full);
                    round.insert(source.now, None);
                } else {
                    let Outcome::Placed(place) = *outcome else { panic!("{outcome:?} for {source:?}") };
                    assert_eq!(*segment.get_or_insert(place.segment), place.segment, "one segment for each round");
                    self.enter(place, source.now);
                    round.insert(source.now, Some(place));
                    left -= 1;
                }
            }
        }
    }

    fn check_strict(&mut self, mut sources: &[Source], mut outcomes: &[Outcome], segment_pages: usize) {
        while !sources.is_empty() {
            // A round is cut where a run begins, if it can be.
            let whole = sources.len().min(segment_pages);
            let starts = (1..=whole).rev().find(|at| sources.get(*at).is_none_or(|source| !source.continues));
            let (round, behind) = sources.split_at(starts.unwrap_or(whole));
            let (told, rest) = outcomes.split_at(round.len());
            self.check_strict_round(round, told);
            (sources, outcomes) = (behind, rest);
        }
    }

    fn check_strict_round(&mut self, sources: &[Source], outcomes: &[Outcome]) {
        let mut at = 0;
        while at < sources.len() {
            if let Some(refusal) = Self::refusal(&sources[at]) {
                assert_eq!(outcomes[at], refusal);
                at += 1;
                continue;
            }
            let more =
                sources[at + 1..].iter().take_while(|source| Self::refusal(source).is_none() && source.continues);
            let run = at..at + 1 + more.count();
            let contents: Vec<_> = sources[run.clone()].iter().map(|source| source.now).collect();
            let exact = self.segments.iter().find(|(_, known)| !known.withdrawn && known.contents == contents);
            let left = self.room.map_or(u64::MAX, |room| room - self.pages());
            if let Some(segment) = exact.map(|(segment, _)| *segment) {
                let expected: Vec<_> =
                    (0..run.len() as u32).map(|page| Outcome::Known(Place { segment, page })).collect();
                assert_eq!(outcomes[run.clone()], expected);
            } else if left < run.len() as u64 {
                assert_eq!(outcomes[run.clone()], vec![Outcome::Full; run.len()]);
            } else {
                let Outcome::Placed(Place { segment, .. }) = outcomes[at] else { panic!("{:?}", outcomes[at]) };
                assert!(!self.segments.contains_key(&segment), "a segment for each run");
                for (page, (outcome, content)) in (0..).zip(outcomes[run.clone()].iter().zip(contents)) {
                    let place = Place { segment, page };
                    assert_eq!(*outcome, Outcome::Placed(place));
                    self.enter(place, content);
                }
            }
            at = run.end;
        }
    }

    /// What must hold whatever was done.
    fn check_all(&self) {
        let strict = self.partition.options().strict;
        let mut buffer = vec![0; page_size() as usize];
        for (segment, known) in &self.segments {
            for (number, content) in (0..).zip(&known.contents) {
                let place = Place { segment: *segment, page: number };
                assert!(self.partition.read_page(place, &mut buffer).unwrap());
                assert_eq!(buffer, page(*content));
            }
            assert!(
                !self
                    .partition
                    .read_page(Place { segment: *segment, page: known.contents.len() as u32 }, &mut buffer)
                    .unwrap()
            );

            // Handed out only to the partition's user, and only to who holds all (strict) or some of it.
            let held = |contents: &[u8]| {
                let prints: Vec<_> =
                    contents.iter().map(|content| self.partition.secret().fingerprint(&page(*content))).collect();
                self.partition.hand_out(*segment, 7, |fingerprint| prints.contains(&fingerprint))
            };
            let file =
                matches!(held(&known.contents), HandOut::File { pages, .. } if pages as usize == known.contents.len());
            assert!(file);
            assert!(matches!(held(&[]), HandOut::NotHeld));
            assert!(matches!(self.partition.hand_out(*segment, 8, |_| true), HandOut::OtherUser));
            let mut distinct = known.contents.clone();
            distinct.sort_unstable();
            distinct.dedup();
            for missing in &distinct {
                let others: Vec<_> = distinct.iter().copied().filter(|content| content != missing).collect();
                let handed = matches!(held(&others), HandOut::File { .. });
                assert_eq!(handed, !strict && !others.is_empty(), "without {missing} of {distinct:?}");
            }
        }
        for content in 0..14 {
            let found = self.partition.lookup(self.partition.secret().fingerprint(&page(content)));
            assert_eq!(found.is_some(), self.find(content).is_some());
            if let Some(place) = found {
                assert_eq!(self.segments[&place.segment].contents[place.page as usize], content);
                assert!(!self.segments[&place.segment].withdrawn);
            }
        }
        let counters = self.partition.counters();
        assert_eq!(counters.pages_shared, self.pages());
        assert_eq!(counters.segments, self.segments.len() as u64);
        assert_eq!(counters.bytes, Bytes(self.pages() * page_size()));
        assert_eq!(counters.filled, counters.pages_shared + counters.pages_retired);
        assert_eq!(counters.collisions, 0);
        assert!(self.room.is_none_or(|room| self.pages() <= room));
        if !strict {
            let mut all: Vec<_> = self
                .segments
                .values()
                .filter(|known| !known.withdrawn)
                .flat_map(|known| known.contents.clone())
                .collect();
            all.sort_unstable();
            assert!(all.windows(2).all(|pair| pair[0] != pair[1]), "a content is there once");
        }
    }

    /// The longest run, by trying all.
    fn check_run(&self, contents: &[u8]) {
        let strict = self.partition.options().strict;
        let prints: Vec<_> =
            contents.iter().map(|content| self.partition.secret().fingerprint(&page(*content))).collect();
        let expected = self
            .segments
            .values()
            .filter(|known| !known.withdrawn)
            .flat_map(|known| (0..known.contents.len()).map(move |from| (from, &known.contents[from..])))
            .filter_map(|(from, there)| {
                let equal = there.iter().zip(contents).take_while(|(there, wanted)| there == wanted).count();
                (equal > 0 && (!strict || (from == 0 && equal == there.len()))).then_some(equal)
            })
            .max();
        let found = self.partition.lookup_run(&prints);
        assert_eq!(found.map(|run| run.pages as usize), expected);
        if let Some(Run { place, pages }) = found {
            let there = &self.segments[&place.segment].contents[place.page as usize..][..pages as usize];
            assert_eq!(there, &contents[..pages as usize]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn interning_is_a_list_of_contents(
        strict in any::<bool>(),
        segment_pages in 1_u32..9,
        limit_pages in proptest::option::of(0_u64..30),
        steps in proptest::collection::vec(step(), 1..12),
        wanted in proptest::collection::vec(1_u8..14, 1..6),
    ) {
        let mut model = Model::open(strict, segment_pages, limit_pages);
        for step in steps {
            let which = |at: usize| {
                let mut ids: Vec<_> = model.segments.keys().copied().collect();
                ids.sort_unstable();
                (!ids.is_empty()).then(|| ids[at % ids.len()])
            };
            match step {
                Step::Fill(sources) => {
                    let outcomes = model.fill(&sources);
                    prop_assert_eq!(outcomes.len(), sources.len());
                    if strict { model.check_strict(&sources, &outcomes, segment_pages as usize) }
                    else { model.check_packed(&sources, &outcomes, segment_pages as usize) }
                }
                Step::Retire(at) => if let Some(segment) = which(at) {
                    prop_assert!(model.partition.retire(segment));
                    prop_assert!(!model.partition.retire(segment));
                    let gone = matches!(model.partition.hand_out(segment, 7, |_| true), HandOut::Gone);
                    prop_assert!(gone);
                    model.segments.remove(&segment);
                },
                Step::Withdraw(at) => if let Some(segment) = which(at) {
                    prop_assert!(model.partition.withdraw(segment));
                    model.segments.get_mut(&segment).unwrap().withdrawn = true;
                },
                Step::Use(at, pages) => if let Some(segment) = which(at) {
                    prop_assert!(model.partition.report_use(segment, pages, Instant::now()));
                    model.segments.get_mut(&segment).unwrap().mapped = pages;
                },
                Step::Reclaim => {
                    let reclaimed = model.partition.reclaim(Instant::now(), Duration::ZERO);
                    let before = model.segments.len() as u64;
                    model.segments.retain(|_, known| known.mapped > 0);
                    prop_assert_eq!(reclaimed.segments, before - model.segments.len() as u64);
                }
            }
            model.check_all();
            model.check_run(&wanted);
        }
    }
}

#[test]
fn a_strict_run_is_not_cut_by_the_size_of_a_round() {
    let mut model = Model::open(true, 4, None);
    let run = |contents: &[u8]| {
        contents
            .iter()
            .enumerate()
            .map(|(at, content)| Source { seen: *content, now: *content, readable: true, continues: at > 0 })
            .collect::<Vec<_>>()
    };
    let sources = [run(&[1, 2, 3]), run(&[4, 5, 6]), run(&[7, 8, 9, 10, 11, 12])].concat();
    let outcomes = model.fill(&sources);
    let pages: Vec<_> = outcomes.iter().map(|outcome| outcome.place().unwrap().page).collect();
    assert_eq!(pages, [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 0, 1]);
    assert_eq!(model.partition.counters().segments, 4);
}
