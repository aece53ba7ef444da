//! Random address spaces, plans, other parties, faults and deaths.

use proptest::prelude::*;

use super::*;
use crate::Failure;
use crate::recording::Event;

pub(super) fn init() -> impl Strategy<Value = Init> {
    let place = || (0_u32..12).prop_map(at);
    let content = || 0_u64..5;
    prop_oneof![
        1 => Just(Init::Hole),
        2 => Just(Init::Empty),
        8 => content().prop_map(Init::Anonymous),
        1 => content().prop_map(Init::WasShared),
        1 => content().prop_map(Init::Shared),
        1 => content().prop_map(Init::Held),
        1 => content().prop_map(Init::Pinned),
        1 => content().prop_map(Init::Lazy),
        1 => content().prop_map(Init::SwappedOut),
        1 => content().prop_map(Init::Excluded),
        1 => content().prop_map(Init::ReadOnly),
        1 => Just(Init::Other),
        2 => place().prop_map(Init::Clean),
        1 => place().prop_map(Init::Mapped),
        4 => (place(), content()).prop_map(|(place, content)| Init::Diverged(place, content)),
        1 => (place(), content()).prop_map(|(place, content)| Init::DivergedShared(place, content)),
        1 => (place(), content()).prop_map(|(place, content)| Init::DivergedHeld(place, content)),
        1 => (place(), content()).prop_map(|(place, content)| Init::DivergedSharedHeld(place, content)),
        1 => (place(), content()).prop_map(|(place, content)| Init::DivergedSwapped(place, content)),
        1 => (place(), content()).prop_map(|(place, content)| Init::DivergedSwappedHeld(place, content)),
        1 => (place(), content()).prop_map(|(place, content)| Init::DivergedDontFork(place, content)),
        1 => (place(), content()).prop_map(|(place, content)| Init::Foreign(place, content)),
        1 => (place(), content()).prop_map(|(place, content)| Init::Unreadable(place, content)),
        1 => content().prop_map(Init::HalfMarked),
    ]
}

/// An action that makes sense for a page more often than not.
fn action(init: Init, wish: (u8, u32)) -> Option<Action> {
    let content = match init {
        Init::Anonymous(content) | Init::Lazy(content) | Init::WasShared(content) | Init::Diverged(_, content) => {
            content
        }
        _ => u64::from(wish.1 % 5),
    };
    let place = at(content as u32 + wish.1 / 5 * 5);
    match (wish.0, init) {
        (0..2, _) => None,
        (2, _) => Some(Action::Unmerge),
        (3, _) => Some(Action::DropZero),
        (4, _) => Some(Action::RetakeZero),
        (5, _) => Some(Action::Merge(at(wish.1))),
        (6, _) => Some(Action::Retake(at(wish.1))),
        (_, Init::Diverged(..)) => Some(Action::Retake(place)),
        (_, Init::Clean(_) | Init::Mapped(_)) => Some(Action::Unmerge),
        _ => Some(Action::Merge(place)),
    }
}

fn event() -> impl Strategy<Value = Event> {
    let page = || 0_usize..28;
    prop_oneof![
        4 => (page(), 0_u64..9).prop_map(|(page, value)| Event::Write(page, value)),
        1 => page().prop_map(Event::Read),
        3 => page().prop_map(Event::Hold),
        1 => page().prop_map(Event::Pin),
        2 => (page(), 10_u64..19).prop_map(|(page, value)| Event::HolderWrites(page, value)),
        1 => page().prop_map(Event::LetGo),
        2 => (page(), 20_u64..29).prop_map(|(page, value)| Event::WriteUnderLock(page, value)),
        1 => page().prop_map(Event::Fork),
        1 => page().prop_map(Event::ChildEnds),
        1 => page().prop_map(Event::SwapOut),
        1 => page().prop_map(Event::Reclaim),
        2 => page().prop_map(Event::DontNeed),
        1 => page().prop_map(Event::Unmap),
    ]
}

fn pages() -> impl Strategy<Value = Vec<(Init, Option<Action>)>> {
    prop::collection::vec((init(), (0_u8..16, 0_u32..60)), 1..28)
        .prop_map(|pages| pages.into_iter().map(|(init, wish)| (init, action(init, wish))).collect())
}

/// A scene in which nobody acts yet.
fn scene() -> impl Strategy<Value = Scene> {
    let page_size = prop_oneof![Just(4096_u64), Just(16384), Just(65536)];
    let places = prop::collection::vec(0_usize..28, 0..3);
    (pages(), page_size, any::<[bool; 3]>(), 0..4, places.clone(), places, prop::collection::vec(0_usize..28, 0..4))
        .prop_map(|(pages, page_size, [track, forked, vouch], oracle, robust, thread_data, islands)| {
            let mut scene = Scene::with_page_size(page_size, &pages);
            scene = match oracle {
                0 => scene.checked_by(Oracle::Collapse),
                1 if vouch => scene.vouched(),
                _ => scene,
            };
            scene.order.track = track;
            scene.order.forked = forked;
            scene.space.robust = robust.into_iter().map(|page| scene.space.address(page)).collect();
            scene.space.thread_data = thread_data.into_iter().map(|page| scene.space.address(page)).collect();
            for island in islands {
                let from = scene.space.address(island);
                for page in scene.space.pages.range_mut(from..) {
                    page.1.island += 1;
                }
            }
            scene
        })
}

/// An owner who vouches has nobody who holds pages.
fn honest(scene: &Scene) -> bool {
    !scene.order.vouched || scene.space.frames.iter().all(|frame| frame.refs + frame.pins == 0)
}

fn failure() -> impl Strategy<Value = Failure> {
    prop_oneof![Just(Failure::Busy), Just(Failure::Absent), Just(Failure::Properties), Just(Failure::Limit)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6000, ..ProptestConfig::default() })]

    #[test]
    fn an_undisturbed_plan_has_the_outcomes_that_it_should(
        pages in pages(), track in any::<bool>(), forked in any::<bool>(),
    ) {
        let mut scene = Scene::new(&pages);
        scene.order.track = track;
        scene.order.forked = forked;
        let expected: Vec<Outcome> = pages
            .iter()
            .enumerate()
            .filter_map(|(index, (init, action))| {
                let action = (*action)?;
                let next = pages.get(index + 1).map(|(init, _)| *init);
                let ends = matches!(next, Some(Init::Hole | Init::Other));
                Some(match next {
                    None if action != Action::Unmerge => Outcome::Properties,
                    _ => outcomes::expected(*init, action, ends, forked),
                })
            })
            .collect();
        prop_assert_eq!(scene.run().outcomes, expected);
    }

    #[test]
    fn whatever_others_do_nothing_is_lost(
        scene in scene().prop_filter("honest", honest),
        events in prop::collection::vec((0_usize..160, event()), 0..12),
        twice in any::<bool>(),
    ) {
        let mut scene = scene;
        scene.space.schedule = events;
        scene.space.schedule.sort_by_key(|(when, _)| *when);
        let run = scene.run();
        if twice {
            scene.after(&run).run();
        }
    }

    #[test]
    fn whatever_fails_and_whoever_dies_nothing_is_lost(
        scene in scene().prop_filter("honest", honest),
        events in prop::collection::vec((0_usize..160, event()), 0..8),
        kills in prop::collection::btree_set(0_usize..200, 0..3),
        map in prop::option::of((0_usize..4, failure())),
        register in prop::option::of((0_usize..4, failure())),
        (remap, check, thaw_copies, thaw_fails) in (
            prop::option::of(0_usize..4),
            prop::option::of(0_usize..3),
            prop::option::of(0_usize..4),
            prop::option::weighted(0.2, 0_usize..4),
        ),
    ) {
        let mut scene = scene;
        scene.space.schedule = events;
        scene.space.schedule.sort_by_key(|(when, _)| *when);
        scene.space.kills = kills;
        let faults = &mut scene.space.faults;
        (faults.map, faults.register, faults.remap, faults.check) = (map, register, remap, check);
        (faults.thaw_copies, faults.thaw_fails) = (thaw_copies, thaw_fails);
        let run = scene.run();
        scene.after(&run).run();
    }
}
