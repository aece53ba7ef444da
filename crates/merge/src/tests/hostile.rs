//! Plans that nobody sane would write.

use proptest::prelude::*;

use super::*;
use crate::recording::BASE;

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0_u64..24).prop_map(|page| BASE + page * 4096),
        1 => (0_u64..24 * 4096).prop_map(|byte| BASE + byte),
        1 => (0_u64..600).prop_map(|page| u64::MAX - 4095 - page * 4096),
        1 => (0_u64..3).prop_map(|page| page * 4096),
        1 => any::<u64>(),
        1 => any::<u64>().prop_map(|address| address & !4095),
    ]
}

fn bound() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0_u64..20).prop_map(|page| BASE + page * 4096),
        1 => any::<u64>(),
        1 => Just(0),
        1 => Just(u64::MAX),
        1 => Just(u64::MAX - 4095),
        1 => (0_u64..20 * 4096).prop_map(|byte| BASE + byte),
    ]
}

fn action() -> impl Strategy<Value = Action> {
    let place = prop_oneof![
        3 => (0_u32..6).prop_map(at),
        1 => (any::<u32>(), any::<u32>()).prop_map(|(segment, page)| Place { segment, page }),
        1 => prop_oneof![Just(0), Just(u32::MAX)].prop_map(|page| Place { segment: 7, page }),
    ];
    (0..5, place).prop_map(|(kind, place)| match kind {
        0 => Action::Merge(place),
        1 => Action::DropZero,
        2 => Action::Retake(place),
        3 => Action::RetakeZero,
        _ => Action::Unmerge,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn a_hostile_plan_touches_nothing_outside(
        plan in prop::collection::vec((address(), action()), 0..90),
        ascending in any::<bool>(),
        (range_start, range_end) in (bound(), bound()),
        keep in any::<u8>(),
        flags in any::<[bool; 4]>(),
        oracle in prop_oneof![Just(Oracle::Exact), Just(Oracle::Collapse), Just(Oracle::None)],
        pages in prop::collection::vec(properties::init(), 1..20),
        marks in prop::collection::vec((any::<u64>(), any::<u8>()), 0..6),
    ) {
        let pages: Vec<_> = pages.into_iter().map(|init| (init, None)).collect();
        let mut scene = Scene::new(&pages);
        scene.space.oracle = oracle;
        scene.order.range_start = range_start;
        scene.order.range_end = range_end;
        if keep > 128 {
            scene.order.keep = abi::mark::Keep::from_bits(keep);
        }
        [scene.order.track, scene.order.forked, scene.order.exact_check, scene.order.vouched] = flags;
        scene.space.vouched = scene.order.vouched;
        // Marks of pages that do not exist: the program writes what it likes.
        for (address, mark) in marks {
            scene.space.marks.insert(address | 1 << 63, Mark::from_byte(mark));
        }
        scene.plan = plan.into_iter().map(|(address, action)| Entry { address, action }).collect();
        if ascending {
            scene.plan.sort_by_key(|entry| entry.address);
        }
        if !breaks_its_word(&scene) {
            let before = scene.space.clone();
            let run = scene.run();
            for (address, mark) in before.marks.range(1 << 63..) {
                prop_assert_eq!(run.space.marks[address], *mark);
            }
        }
    }
}

/// An owner who vouches though pages are held harms only itself.
fn breaks_its_word(scene: &Scene) -> bool {
    scene.order.vouched && scene.space.frames.iter().any(|frame| frame.refs + frame.pins > 0)
}

#[test]
fn pages_at_the_end_of_the_address_space() {
    let last = u64::MAX - 4095;
    for action in outcomes::ACTIONS {
        for (range_start, range_end) in [(0, u64::MAX), (last, u64::MAX), (last - 4096, u64::MAX), (u64::MAX, 0)] {
            let mut scene = Scene::new(&[(Init::Empty, None)]);
            scene.order.range_start = range_start;
            scene.order.range_end = range_end;
            scene.plan = [0, 1, 2, 3].map(|page| Entry { address: last - (3 - page) * 4096, action }).into();
            for address in [last, last - 4096, last - 8192] {
                scene.space.marks.insert(address, Mark::merged(READ_WRITE));
            }
            let mut space = scene.space.clone();
            let (ended, outcomes) = execute(&mut space, &scene.order, &scene.plan);
            assert_eq!(ended, Some(Ended::Whole));
            assert_eq!(outcomes[3], Outcome::Invalid, "no whole page fits there");
            assert!(space.worked_on.is_empty());
        }
    }
}

#[test]
fn a_plan_without_entries_is_refused_entry_by_entry() {
    let mut scene = Scene::new(&[(Init::Empty, None)]);
    let (mut asked, mut reported) = (0, Vec::new());
    let carry_on = || {
        asked += 1;
        asked <= 1000
    };
    let report = |index, outcome| reported.push((index, outcome));
    let ended = run_plan(&mut scene.space, &scene.order, |_| None, usize::MAX, report, carry_on);
    assert_eq!(ended, Ended::Early);
    assert_eq!(reported.len(), 1000);
    assert!(reported.iter().enumerate().all(|(at, entry)| *entry == (at, Outcome::Invalid)));
    assert_eq!(scene.space.step, 0, "not even the gate is closed for that");
}

/// A plan that changes while it is read: each entry is looked at once for each batch.
#[test]
fn a_plan_that_changes_while_it_is_read() {
    let pages: Vec<_> = (0..30).map(|page| (Init::Anonymous(page % 5), None)).collect();
    let scene = Scene::new(&pages);
    for seed in 0..200_u64 {
        let mut space = scene.space.clone();
        let state = std::cell::Cell::new(seed);
        let entry = |_| {
            let next = state.get().wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.set(next);
            let page = next >> 33;
            let action = Action::Merge(at((page % 5) as u32));
            (page % 11 != 0).then_some(Entry { address: BASE + page % 32 * 4096, action })
        };
        let mut reported = 0;
        let ended = run_plan(&mut space, &scene.order, entry, 500, |_, _| reported += 1, || true);
        assert_eq!((ended, reported), (Ended::Whole, 500));
        for address in space.expected.keys() {
            assert!(space.reads_right(*address));
        }
        assert!(space.pages[&space.address(29)].kind == Kind::Anonymous, "the last page");
    }
}

/// Address 0 stands for "none" in the journal.
#[test]
fn nothing_is_done_at_address_0() {
    for action in outcomes::ACTIONS {
        let mut scene = Scene::new(&[(Init::Empty, None)]);
        scene.order.range_start = 0;
        scene.plan = vec![Entry { address: 0, action }];
        assert_eq!(scene.run().outcomes, [Outcome::Invalid]);
    }
}

#[test]
fn an_address_inside_a_page_is_no_page() {
    for action in outcomes::ACTIONS {
        let mut scene =
            Scene::new(&[(Init::Anonymous(1), None), (Init::Diverged(at(2), 1), None), (Init::Empty, None)]);
        scene.plan = [BASE + 8, BASE + 4096 + 2048, BASE + 8191].map(|address| Entry { address, action }).into();
        assert_eq!(scene.run().outcomes, [Outcome::Invalid; 3]);
    }
}

/// The page table is looked at for one window at a time.
#[test]
fn entries_may_lie_far_apart() {
    for (init, action, outcome) in [
        (Init::Anonymous(1), Action::Merge(at(1)), Outcome::Merged),
        (Init::Diverged(at(2), 1), Action::Retake(at(1)), Outcome::Retaken),
    ] {
        let mut pages = vec![(init, None); 1600];
        for index in [0, 510, 511, 1022, 1023, 1535] {
            pages[index].1 = Some(action);
        }
        let run = Scene::new(&pages).run();
        assert_eq!(kinds(&run.outcomes), [outcome as u32].into());
    }
}
