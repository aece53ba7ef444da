#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

use super::*;

const START: PageNumber = PageNumber(1000);

fn watch(pages: u64, policy: AgePolicy) -> Ages {
    Ages::new(PageRange::from_count(START, pages), policy)
}

#[test]
fn a_page_is_due_exactly_when_it_has_settled_and_sleeps_once_looked_at() {
    let mut ages = watch(4, AgePolicy::default());
    for cycle in 0..3 {
        assert_eq!(ages.due().count(), 0, "cycle {cycle}");
        ages.tick();
    }
    assert_eq!(ages.due().collect::<Vec<_>>(), [PageRange::from_count(START, 4)]);
    ages.looked(START.next());
    ages.written(PageRange::from_count(START.offset(3), 1));
    assert_eq!(
        ages.due().collect::<Vec<_>>(),
        [PageRange::from_count(START, 1), PageRange::from_count(START.offset(2), 1)]
    );
    for _ in 0..2000 {
        ages.tick();
    }
    assert_eq!(ages.age(START.next()).unwrap().cycles, None, "asleep for ever");
    assert_eq!(ages.age(START).unwrap().cycles, Some(512));
    ages.written(PageRange::from_count(START, 4));
    assert_eq!(ages.age(START.next()).unwrap().cycles, Some(0), "until it is written");
}

#[test]
fn refusals_back_off_and_decay() {
    let mut ages = watch(1, AgePolicy { settle: 1, worth: 16, decay: 256 });
    let mut waits = Vec::new();
    let mut since = 0;
    for _ in 0..255 {
        ages.tick();
        since += 1;
        if ages.due().next().is_some() {
            ages.refused(START);
            waits.push(since);
            since = 0;
        }
    }
    assert_eq!(waits[..2], [1, 4]);
    assert!((16..32).contains(&waits[2]), "{waits:?}");
    assert!((64..128).contains(&waits[3]), "{waits:?}");
    assert_eq!(ages.age(START).unwrap().back_off, 3);
    for left in [2, 1, 0, 0] {
        let ticks = if left == 2 { 1 } else { 256 };
        for _ in 0..ticks {
            ages.tick();
        }
        assert_eq!(ages.age(START).unwrap().back_off, left);
    }
}

#[test]
fn a_merge_that_does_not_last_backs_off_and_one_that_lasts_is_forgiven() {
    let mut ages = watch(1, AgePolicy { settle: 1, worth: 4, decay: 0 });
    ages.merged(START);
    ages.tick();
    ages.written(ages.range());
    assert_eq!(ages.age(START), Some(PageAge { kind: Kind::Diverged, cycles: Some(0), back_off: 1 }));
    ages.merged(START);
    for _ in 0..6 {
        ages.tick();
    }
    ages.written(ages.range());
    assert_eq!(ages.age(START).unwrap().back_off, 1, "paid, no more");
    ages.merged(START);
    for _ in 0..70 {
        ages.tick();
    }
    ages.written(ages.range());
    assert_eq!(ages.age(START).unwrap().back_off, 0, "lasted");
}

#[test]
fn excluded_pages_stay_out() {
    let mut ages = watch(3, AgePolicy { settle: 0, ..AgePolicy::default() });
    ages.excluded(START.next());
    ages.written(ages.range());
    ages.refused(START.next());
    ages.looked(START.next());
    assert_eq!(ages.due().count(), 2, "around it");
    assert_eq!(ages.counts(), AgeCounts { plain: 2, excluded: 1, volatile: 2, ..AgeCounts::default() });
    ages.included(START.next());
    assert_eq!(ages.due().collect::<Vec<_>>(), [ages.range()]);
}

#[test]
fn pages_outside_are_ignored() {
    let mut ages = watch(2, AgePolicy::default());
    ages.merged(PageNumber(0));
    ages.merged(START.offset(2));
    ages.written(PageRange::new(PageNumber(0), PageNumber(5)));
    assert_eq!(ages.age(START.offset(2)), None);
    assert_eq!(ages.counts().plain, 2);
}

#[derive(Clone, Debug)]
enum Step {
    Ticks(u32),
    Write(u64, u64),
    Look(u64),
    Merge(u64),
    Unmerge(u64),
    Discard(u64),
    Refuse(u64),
    Exclude(u64),
    Wake(u64),
}

fn step(pages: u64) -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1_u32..40).prop_map(Step::Ticks),
        3 => (0..pages, 0..pages).prop_map(|(from, to)| Step::Write(from.min(to), from.max(to))),
        2 => (0..pages).prop_map(Step::Look),
        2 => (0..pages).prop_map(Step::Merge),
        1 => (0..pages).prop_map(Step::Unmerge),
        1 => (0..pages).prop_map(Step::Discard),
        2 => (0..pages).prop_map(Step::Refuse),
        1 => (0..pages).prop_map(Step::Exclude),
        1 => (0..pages).prop_map(Step::Wake),
    ]
}

/// The same with whole integers and no encoding.
#[derive(Clone)]
struct Model {
    kind: Kind,
    cycles: u32,
    asleep: bool,
    back_off: u8,
}

proptest! {
    /// Ages are never above the truth, exact up to 7, more than a quarter of it from there on, and pages are due
    /// when the model says so (with the age as told).
    #[test]
    fn bytes_agree_with_whole_integers(
        settle in 0_u32..20, worth in 0_u32..40, decay in 0_u32..60,
        steps in proptest::collection::vec(step(150), 1..60),
    ) {
        let policy = AgePolicy { settle, worth, decay };
        let mut ages = watch(150, policy);
        let mut model = vec![Model { kind: Kind::Plain, cycles: 0, asleep: false, back_off: 0 }; 150];
        let mut cycle = 0_u32;
        for step in steps {
            match step {
                Step::Ticks(ticks) => for _ in 0..ticks {
                    cycle += 1;
                    ages.tick();
                    for page in &mut model {
                        page.cycles += 1;
                        if decay > 0 && cycle.is_multiple_of(decay) && page.kind != Kind::Excluded {
                            page.back_off = page.back_off.saturating_sub(1);
                        }
                    }
                },
                Step::Write(from, to) => {
                    for page in from..to {
                        let told = ages.age(START.offset(page)).unwrap().cycles;
                        let page = &mut model[page as usize];
                        match page.kind {
                            Kind::Excluded => continue,
                            Kind::Merged => {
                                let told = told.unwrap();
                                page.kind = Kind::Diverged;
                                if told < worth { page.back_off = (page.back_off + 1).min(3) }
                                else if told >= worth * 8 { page.back_off = page.back_off.saturating_sub(1) }
                            }
                            _ => {}
                        }
                        page.cycles = 0;
                        page.asleep = false;
                    }
                    ages.written(PageRange::new(START.offset(from), START.offset(to)));
                }
                Step::Look(page) => {
                    ages.looked(START.offset(page));
                    let page = &mut model[page as usize];
                    page.asleep |= matches!(page.kind, Kind::Plain | Kind::Diverged);
                }
                Step::Wake(page) => {
                    ages.wake(START.offset(page));
                    let page = &mut model[page as usize];
                    if page.asleep { page.asleep = false; page.cycles = 0; }
                }
                Step::Merge(page) => {
                    ages.merged(START.offset(page));
                    let page = &mut model[page as usize];
                    let back_off = if page.kind == Kind::Excluded { 0 } else { page.back_off };
                    *page = Model { kind: Kind::Merged, cycles: 0, asleep: false, back_off };
                }
                Step::Unmerge(page) => {
                    ages.unmerged(START.offset(page));
                    let page = &mut model[page as usize];
                    let back_off = if page.kind == Kind::Excluded { 0 } else { page.back_off };
                    *page = Model { kind: Kind::Plain, cycles: 0, asleep: false, back_off };
                }
                Step::Discard(page) => {
                    let told = ages.age(START.offset(page)).unwrap().cycles;
                    ages.discarded(START.offset(page));
                    let page = &mut model[page as usize];
                    let back_off = match page.kind {
                        Kind::Excluded => 0,
                        Kind::Merged if told.unwrap() < worth => (page.back_off + 1).min(3),
                        Kind::Merged if told.unwrap() >= worth * 8 => page.back_off.saturating_sub(1),
                        _ => page.back_off,
                    };
                    *page = Model { kind: Kind::Plain, cycles: 0, asleep: false, back_off };
                }
                Step::Refuse(page) => {
                    ages.refused(START.offset(page));
                    let page = &mut model[page as usize];
                    if matches!(page.kind, Kind::Plain | Kind::Diverged) {
                        page.back_off = (page.back_off + 1).min(3);
                        page.cycles = 0;
                        page.asleep = false;
                    }
                }
                Step::Exclude(page) => {
                    ages.excluded(START.offset(page));
                    model[page as usize].kind = Kind::Excluded;
                }
            }
        }
        let mut due = Vec::new();
        for (at, page) in model.iter().enumerate() {
            let age = ages.age(START.offset(at as u64)).unwrap();
            prop_assert_eq!(age.kind, page.kind);
            if page.kind == Kind::Excluded { continue }
            prop_assert_eq!(age.back_off, page.back_off);
            prop_assert_eq!(age.cycles.is_none(), page.asleep);
            if let Some(told) = age.cycles {
                if page.cycles <= 7 { prop_assert_eq!(told, page.cycles) }
                else { prop_assert!(told <= page.cycles && (told == 512 || page.cycles < told * 4), "{told} for {}", page.cycles) }
                let wait = settle << (2 * page.back_off);
                if page.kind != Kind::Merged && (told >= wait || told == 512) { due.push(START.offset(at as u64)) }
            }
        }
        let told: Vec<_> = ages.due().flat_map(PageRange::iter).collect();
        prop_assert_eq!(told, due);
        let runs: Vec<_> = ages.due().collect();
        prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "runs are whole");
        let counts = ages.counts();
        prop_assert_eq!(counts.plain + counts.diverged + counts.merged + counts.excluded, 150);
    }
}
