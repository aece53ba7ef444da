//! What becomes of a page that nobody disturbs is known beforehand, for every kind of page and every action.

use super::*;
use crate::recording::Event;

const PAGES: [Init; 27] = [
    Init::Hole,
    Init::Empty,
    Init::Anonymous(0),
    Init::Anonymous(1),
    Init::Anonymous(2),
    Init::WasShared(1),
    Init::Shared(1),
    Init::Held(1),
    Init::Pinned(1),
    Init::Lazy(1),
    Init::SwappedOut(1),
    Init::Excluded(1),
    Init::ReadOnly(1),
    Init::Other,
    Init::Clean(at(1)),
    Init::Mapped(at(1)),
    Init::Diverged(at(1), 1),
    Init::Diverged(at(2), 1),
    Init::Diverged(at(1), 0),
    Init::DivergedShared(at(1), 1),
    Init::DivergedHeld(at(1), 1),
    Init::DivergedSharedHeld(at(1), 1),
    Init::DivergedSwappedHeld(at(1), 1),
    Init::DivergedDontFork(at(2), 1),
    Init::Foreign(at(2), 1),
    Init::Unreadable(at(2), 1),
    Init::HalfMarked(1),
];

pub(super) const ACTIONS: [Action; 5] =
    [Action::Merge(at(1)), Action::DropZero, Action::Retake(at(1)), Action::RetakeZero, Action::Unmerge];

/// The outcome for a page in the middle of a range. `ends` says whether the owner's memory ends behind it.
pub(super) fn expected(init: Init, action: Action, ends: bool, forked: bool) -> Outcome {
    use Init::*;
    let compared = |content: u64| match action {
        Action::Merge(place) if u64::from(place.page % 5) == content => Outcome::Merged,
        Action::Retake(place) if u64::from(place.page % 5) == content => Outcome::Retaken,
        Action::DropZero | Action::RetakeZero if content == 0 => Outcome::Zero,
        _ => Outcome::Changed,
    };
    match action {
        Action::Merge(_) | Action::DropZero => match init {
            Excluded(_) => Outcome::Excluded,
            Empty | Anonymous(_) | WasShared(_) | Shared(_) | Held(_) | Pinned(_) | Lazy(_) | SwappedOut(_) if ends => {
                Outcome::Properties
            }
            Anonymous(content) | Lazy(content) => compared(content),
            WasShared(content) if forked => compared(content),
            WasShared(_) | Pinned(_) => Outcome::Pinned,
            Shared(_) => Outcome::Shared,
            Held(_) => Outcome::Referenced,
            Empty | SwappedOut(_) => Outcome::Absent,
            _ => Outcome::LayoutChanged,
        },
        Action::Retake(_) | Action::RetakeZero => match init {
            Diverged(_, content) | DivergedDontFork(_, content) => compared(content),
            DivergedHeld(..) => Outcome::Referenced,
            DivergedShared(..) | DivergedSharedHeld(..) => Outcome::Shared,
            Clean(_) | Mapped(_) | DivergedSwapped(..) | DivergedSwappedHeld(..) => Outcome::Absent,
            _ => Outcome::LayoutChanged,
        },
        Action::Unmerge => match init {
            DivergedHeld(..) | DivergedSwapped(..) | DivergedSwappedHeld(..) => Outcome::Referenced,
            DivergedShared(..) | DivergedSharedHeld(..) => Outcome::Shared,
            _ => Outcome::Unmerged,
        },
    }
}

#[test]
fn every_kind_of_page_and_every_action() {
    for page_size in [4096, 65536] {
        for init in PAGES {
            for action in ACTIONS {
                let pages =
                    [(Init::Anonymous(3), None), (init, Some(action)), (Init::Empty, None), (Init::Empty, None)];
                let scene = Scene::with_page_size(page_size, &pages);
                assert_eq!(scene.run().outcomes, [expected(init, action, false, false)], "{init:?} {action:?}");
                let run = scene.forked().run();
                assert_eq!(run.outcomes, [expected(init, action, false, true)], "{init:?} {action:?} after a fork");
            }
        }
    }
}

#[test]
fn without_an_exact_check_what_is_diverged_stays() {
    let pages = [
        (Init::Diverged(at(1), 1), Some(Action::Retake(at(1)))),
        (Init::Diverged(at(2), 7), Some(Action::Unmerge)),
        (Init::Clean(at(3)), Some(Action::Unmerge)),
        (Init::Mapped(at(4)), Some(Action::Unmerge)),
        (Init::Empty, None),
    ];
    for oracle in [Oracle::Collapse, Oracle::None] {
        let run = Scene::new(&pages).checked_by(oracle).run();
        assert_eq!(run.outcomes, [Outcome::NoCheck, Outcome::NoCheck, Outcome::Unmerged, Outcome::Unmerged]);
        assert!(!run.space.worked_on.contains(&run.space.address(0)), "nobody waits for a check that there is not");
    }
    let outcomes = Scene::new(&pages).vouched().run().outcomes;
    assert_eq!(outcomes, [Outcome::Retaken, Outcome::Unmerged, Outcome::Unmerged, Outcome::Unmerged]);
}

#[test]
fn plain_pages_need_a_check_or_a_word() {
    let pages = [plain(1, Action::Merge(at(1))), plain(0, Action::DropZero), (Init::Empty, None)];
    let both = |one, other| vec![one, other];
    assert_eq!(Scene::new(&pages).checked_by(Oracle::None).run().outcomes, both(Outcome::NoCheck, Outcome::NoCheck));
    assert_eq!(Scene::new(&pages).checked_by(Oracle::Collapse).run().outcomes, both(Outcome::Merged, Outcome::Zero));
    assert_eq!(Scene::new(&pages).vouched().run().outcomes, both(Outcome::Merged, Outcome::Zero));
    // Where the check is exact, the owner's word does not replace it.
    let mut scene = Scene::new(&pages);
    scene.order.vouched = true;
    scene.space.faults.check = Some(0);
    assert_eq!(scene.run().outcomes, both(Outcome::NoCheck, Outcome::NoCheck));
}

#[test]
fn the_collapse_oracle_names_nobody() {
    let scene =
        Scene::new(&[(Init::Held(1), Some(Action::Merge(at(1)))), plain(2, Action::Merge(at(2))), (Init::Empty, None)]);
    assert_eq!(scene.checked_by(Oracle::Collapse).run().outcomes, [Outcome::Referenced; 2]);
}

/// One page for each sequence, and one behind it.
fn one_of_each() -> [Scene; 3] {
    [
        (Init::Anonymous(1), Action::Merge(at(1))),
        (Init::Diverged(at(2), 1), Action::Retake(at(1))),
        (Init::Diverged(at(2), 1), Action::Unmerge),
    ]
    .map(|(init, action)| Scene::new(&[(init, Some(action)), (Init::Empty, None)]))
}

/// A thread that ends while such a page is frozen would not be noticed, even if the page goes back.
#[test]
fn what_holds_thread_data_or_lies_on_a_robust_list_is_not_frozen() {
    for mut scene in one_of_each() {
        let address = scene.space.address(0);
        for what in ["robust", "thread data"] {
            scene.space.robust.clear();
            scene.space.thread_data.clear();
            match what {
                "robust" => scene.space.robust.insert(address),
                _ => scene.space.thread_data.insert(address),
            };
            let run = scene.run();
            assert_eq!(run.outcomes, [Outcome::ThreadData], "{what} {:?}", scene.plan);
            assert!(!run.space.worked_on.contains(&address), "{what} {:?}", scene.plan);
        }
    }
}

/// A mutex that is locked between the look and the freeze sends its page back.
#[test]
fn a_mutex_locked_meanwhile_sends_its_page_back() {
    for mut scene in one_of_each() {
        let address = scene.space.address(0);
        let mut sent_back = 0;
        for step in 0..scene.steps() {
            scene.space.schedule = vec![(step, Event::Lock(0))];
            let run = scene.run();
            let frozen = run.space.worked_on.contains(&address);
            sent_back += usize::from(frozen && run.outcomes == [Outcome::ThreadData]);
        }
        assert!(sent_back > 1, "{sent_back} in {:?}", scene.plan);
    }
}

#[test]
fn runs_of_neighbours_are_mapped_at_once() {
    let mut pages: Vec<_> = (1..61).map(|page| plain(u64::from(page % 5), Action::Merge(at(page)))).collect();
    pages.push((Init::Empty, None));
    let run = Scene::new(&pages).run();
    assert_eq!(kinds(&run.outcomes), [Outcome::Merged as u32].into());
    assert_eq!(run.space.runs, 1);
}

#[test]
fn a_plan_is_longer_than_a_batch() {
    for count in [63, 64, 65, 200] {
        let mut pages = vec![plain(1, Action::Merge(at(1))); count];
        pages.push((Init::Empty, None));
        let run = Scene::new(&pages).run();
        assert_eq!(kinds(&run.outcomes), [Outcome::Merged as u32].into());
        assert_eq!(run.space.runs, count, "the same store page each time: no neighbours");
    }
}

#[test]
fn a_plan_that_is_stopped_is_stopped_between_batches() {
    let mut pages = vec![plain(1, Action::Merge(at(1))); 100];
    pages.push((Init::Empty, None));
    let mut scene = Scene::new(&pages);
    let (mut asked, mut reported) = (0, 0);
    let entry = |index: usize| scene.plan.get(index).copied();
    let carry_on = || {
        asked += 1;
        asked < 2
    };
    let report = |_, _| reported += 1;
    assert_eq!(run_plan(&mut scene.space, &scene.order, entry, 100, report, carry_on), Ended::Early);
    assert_eq!(reported, abi::BATCH_MAX);
    assert!(!scene.space.gate_closed);
}
