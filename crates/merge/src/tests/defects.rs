//! Faults that this state machine had, or that it does something special against: each test fails without that.

use super::*;
use crate::recording::Event;
use crate::{Failure, Unsettled};

/// Killed after the registration and before the journal was begun, the window would stay registered: whoever touches
/// a missing page of it waits for ever.
#[test]
fn the_journal_knows_the_window_before_it_is_registered() {
    let missing = (Init::Empty, None);
    for pages in [
        [plain(1, Action::Merge(at(1))), missing, plain(1, Action::Merge(at(1))), missing],
        [(Init::Clean(at(1)), Some(Action::Unmerge)), missing, plain(1, Action::Merge(at(1))), missing],
    ] {
        let mut scene = Scene::new(&pages);
        for step in 0..scene.steps() {
            scene.space.kills = [step].into();
            for page in 0..2 {
                scene.space.schedule = vec![(step, Event::Write(page, 7)), (usize::MAX, Event::Write(page, 8))];
                scene.run();
            }
        }
    }
}

/// Killed between the two, a page of the store would be unmarked, and DONTNEED would show the store's content.
#[test]
fn a_page_is_marked_before_it_is_the_stores() {
    let mut scene = Scene::new(&[plain(1, Action::Merge(at(1))), plain(2, Action::Merge(at(2))), (Init::Empty, None)]);
    for step in 0..scene.steps() {
        scene.space.kills = [step].into();
        scene.space.schedule = vec![(usize::MAX, Event::DontNeed(0)), (usize::MAX, Event::DontNeed(1))];
        scene.run();
    }
}

/// Pages that mremap took before it failed are in the scratch area like any others.
#[test]
fn a_part_of_a_run_that_moved_comes_back() {
    for moved in 0..3 {
        let mut scene = Scene::new(&[
            (Init::Diverged(at(1), 11), Some(Action::Retake(at(3)))),
            (Init::Diverged(at(2), 12), Some(Action::Retake(at(3)))),
            (Init::Diverged(at(3), 13), Some(Action::Retake(at(3)))),
            (Init::Diverged(at(30), 4), Some(Action::Retake(at(4)))),
            (Init::Empty, None),
        ]);
        scene.space.faults.remap = Some(moved);
        let last = if moved == 0 { Outcome::Budget } else { Outcome::Retaken };
        assert_eq!(scene.run().outcomes[3], last);
        for entry in &mut scene.plan {
            entry.action = Action::Unmerge;
        }
        scene.run();
    }
}

/// A page that is the store's when it is looked at can be diverged and held when it is frozen.
#[test]
fn a_page_that_diverges_after_the_look_is_checked() {
    for init in [Init::Clean(at(1)), Init::Mapped(at(1))] {
        let mut scene = Scene::new(&[(init, Some(Action::Unmerge)), (Init::Empty, None)]);
        let mut refused = 0;
        for step in 0..scene.steps() {
            scene.space.schedule = vec![(step, Event::Hold(0)), (step + 1, Event::HolderWrites(0, 5))];
            refused += usize::from(scene.run().outcomes == [Outcome::Referenced]);
        }
        assert!(refused > 3, "held before the freeze {refused} times");
    }
}

/// Reclaim that could not write a held page out leaves it in the swap cache, and its holder writes on.
#[test]
fn a_swapped_page_is_checked_before_it_is_copied() {
    let pages = [(Init::DivergedSwappedHeld(at(1), 5), Some(Action::Unmerge)), (Init::Empty, None)];
    assert_eq!(Scene::new(&pages).run().outcomes, [Outcome::Referenced]);
    let outcomes = Scene::new(&pages).checked_by(Oracle::Collapse).run().outcomes;
    assert_eq!(outcomes, [Outcome::NoCheck]);
}

/// A reference from before a fork: both processes see what is written through it, until one of them copies.
#[test]
fn a_page_shared_by_a_fork_is_not_copied() {
    let scene = Scene::new(&[
        (Init::DivergedSharedHeld(at(1), 5), Some(Action::Unmerge)),
        (Init::Clean(at(2)), Some(Action::Unmerge)),
        (Init::Empty, None),
    ]);
    assert_eq!(scene.run().outcomes, [Outcome::Shared, Outcome::Unmerged]);
}

/// One page that is held is no reason to leave its neighbours.
#[test]
fn one_held_page_does_not_stop_the_others() {
    let scene = Scene::new(&[
        (Init::Clean(at(1)), Some(Action::Unmerge)),
        (Init::DivergedHeld(at(2), 5), Some(Action::Unmerge)),
        (Init::Clean(at(3)), Some(Action::Unmerge)),
        (Init::Empty, None),
    ]);
    assert_eq!(scene.run().outcomes, [Outcome::Unmerged, Outcome::Referenced, Outcome::Unmerged]);
}

/// The oracle stops at the first hole. One that reclaim makes in the scratch area hides a holder behind it.
#[test]
fn a_page_that_vanishes_in_the_scratch_area_hides_nobody() {
    for gone in [Event::Reclaim(0), Event::SwapOut(0)] {
        for (held, init) in [(true, Init::Held(2)), (false, Init::Anonymous(2))] {
            let mut scene = Scene::new(&[
                (Init::Lazy(1), Some(Action::Merge(at(1)))),
                (init, Some(Action::Merge(at(2)))),
                (Init::Empty, None),
            ])
            .checked_by(Oracle::Collapse);
            let mut outcomes = BTreeSet::new();
            for step in 0..scene.steps() {
                scene.space.schedule = vec![(step, gone)];
                outcomes.extend(kinds(&scene.run().outcomes));
            }
            assert_eq!(held, !outcomes.contains(&(Outcome::Merged as u32)));
        }
    }
}

/// A mapping keeps properties that only the gate knows of.
#[test]
fn a_retaken_page_keeps_its_own_properties() {
    for action in [Action::Retake(at(1)), Action::RetakeZero] {
        let content = action.place().map_or(0, |place| u64::from(place.page));
        let scene = Scene::new(&[
            (Init::DivergedDontFork(at(2), content), Some(action)),
            (Init::Diverged(at(3), content), Some(action)),
            (Init::Empty, None),
        ]);
        assert!(scene.run().outcomes.iter().all(|outcome| (*outcome as u32) < 16));
    }
}

/// Merged pages lie in between: the rest of the plan is for another mapping, and not out of date for that.
#[test]
fn a_plan_reaches_across_mappings() {
    let scene = Scene::new(&[
        plain(1, Action::Merge(at(1))),
        (Init::Clean(at(30)), None),
        plain(2, Action::Merge(at(2))),
        (Init::Hole, Some(Action::Merge(at(2)))),
        (Init::ReadOnly(3), Some(Action::Merge(at(3)))),
        plain(4, Action::Merge(at(4))),
        plain(0, Action::DropZero),
        (Init::Empty, None),
    ]);
    use Outcome::{LayoutChanged, Merged, Properties, Zero};
    // The third is the last one before a hole.
    assert_eq!(scene.run().outcomes, [Merged, Properties, LayoutChanged, LayoutChanged, Merged, Zero]);
}

/// More pieces than one batch takes: the next one goes on.
#[test]
fn many_scattered_pages_are_all_retaken() {
    let pages: Vec<_> = (0..41)
        .map(|index| match index % 2 {
            0 => (Init::Diverged(at(index), 1), Some(Action::Retake(at(1)))),
            _ => (Init::Clean(at(index)), None),
        })
        .chain([(Init::Empty, None)])
        .collect();
    assert_eq!(kinds(&Scene::new(&pages).run().outcomes), [Outcome::Retaken as u32].into());
}

/// The program gave the end of its range away; what is left ends earlier.
#[test]
fn the_last_page_of_what_is_left_is_not_merged() {
    for behind in [Init::Hole, Init::Other] {
        let scene = Scene::new(&[
            plain(1, Action::Merge(at(1))),
            plain(2, Action::Merge(at(2))),
            (behind, None),
            (Init::Anonymous(3), None),
        ]);
        assert_eq!(scene.run().outcomes, [Outcome::Merged, Outcome::Properties]);
    }
    for behind in [Init::Clean(at(3)), Init::ReadOnly(3)] {
        let scene = Scene::new(&[plain(2, Action::Merge(at(2))), (behind, None), (Init::Anonymous(3), None)]);
        assert_eq!(scene.run().outcomes, [Outcome::Merged]);
    }
}

/// A range that ends inside a page: its last whole page is the last.
#[test]
fn an_end_inside_a_page_protects_the_page_before() {
    for cut in [0, 1, 100, 4095] {
        let mut scene =
            Scene::new(&[plain(1, Action::Merge(at(1))), plain(2, Action::Merge(at(2))), (Init::Empty, None)]);
        scene.order.range_end -= 4096 - cut;
        assert_eq!(scene.run().outcomes, [Outcome::Merged, Outcome::Properties]);
    }
}

/// Page 2^32 of a segment is not page 0.
#[test]
fn a_run_does_not_wrap_around_in_the_store() {
    let place = |page| Place { segment: 7, page };
    for (first, second) in
        [(Init::Anonymous(1), Init::Anonymous(1)), (Init::Diverged(at(9), 1), Init::Diverged(at(8), 1))]
    {
        let action = |place| match first {
            Init::Anonymous(_) => Action::Merge(place),
            _ => Action::Retake(place),
        };
        let pages = [(first, Some(action(place(u32::MAX)))), (second, Some(action(place(0)))), (Init::Empty, None)];
        let run = Scene::new(&pages).run();
        assert_eq!(run.space.runs, 2);
    }
}

/// Tracking is taken up again for what was refused too.
#[test]
fn what_was_registered_is_tracked_again() {
    for (init, action) in [
        (Init::Anonymous(1), Action::Merge(at(2))),
        (Init::Diverged(at(1), 1), Action::Retake(at(2))),
        (Init::DivergedHeld(at(1), 1), Action::Unmerge),
    ] {
        for fault in [None, Some(0)] {
            let mut scene = Scene::new(&[(init, Some(action)), (Init::Empty, None)]).tracked();
            scene.space.faults.remap = fault;
            let run = scene.run();
            assert_eq!(run.space.pages[&run.space.address(0)].registered, Some(RegisterMode::Track), "{action:?}");
        }
    }
}

/// A registration that fails half-way leaves nobody waiting.
#[test]
fn half_a_registration_is_taken_back() {
    for (init, action) in [
        (Init::Anonymous(1), Action::Merge(at(1))),
        (Init::Diverged(at(1), 1), Action::Retake(at(1))),
        (Init::Diverged(at(1), 1), Action::Unmerge),
    ] {
        let mut scene = Scene::new(&[(init, Some(action)), (Init::Empty, None)]);
        scene.space.faults.register = Some((0, Failure::Limit));
        assert_eq!(scene.run().outcomes, [Outcome::Budget], "{action:?}");
    }
}

/// On some kernels nobody who is outside can give back what cannot be read in the scratch area.
#[test]
fn what_no_survivor_could_read_is_not_frozen() {
    let mut scene = Scene::new(&[(Init::Unreadable(at(1), 5), Some(Action::Unmerge)), (Init::Empty, None)]);
    scene.space.strict = true;
    for step in 0..scene.steps() {
        scene.space.kills = [step].into();
        scene.run();
    }
    scene.space.kills.clear();
    assert_eq!(scene.run().outcomes, [Outcome::Properties]);
}

/// Stop reasons end merging, not un-merging; changed threads or layouts end both.
#[test]
fn unmerging_goes_on_in_a_process_that_is_left_alone() {
    for (reason, outcome) in [
        (Unsettled::Stopped, Outcome::Unmerged),
        (Unsettled::Threads, Outcome::ThreadsChanged),
        (Unsettled::Layout, Outcome::LayoutChanged),
    ] {
        let mut scene = Scene::new(&[(Init::Clean(at(1)), Some(Action::Unmerge)), (Init::Empty, None)]);
        scene.space.faults.settled = Some((0, reason));
        assert_eq!(scene.run().outcomes, [outcome]);
    }
}

/// The protection has changed past the mark: what is mapped counts.
#[test]
fn a_mapping_whose_mark_is_out_of_date_is_left() {
    let mut scene = Scene::new(&[(Init::Diverged(at(2), 1), Some(Action::Retake(at(1)))), (Init::Empty, None)]);
    let address = scene.space.address(0);
    for prot in [0, 1, 7] {
        let keep = READ_WRITE.with(prot, 7);
        scene.space.pages.get_mut(&address).unwrap().keep = keep;
        let mut space = scene.space.clone();
        assert_eq!(execute(&mut space, &scene.order, &scene.plan).1, [Outcome::LayoutChanged]);
        assert_eq!(space.pages[&address].keep, keep);
    }
}

/// Each page gets memory with the properties that its own mark has.
#[test]
fn an_unmerged_page_has_the_properties_of_its_mark() {
    let mut scene = Scene::new(&[
        (Init::Clean(at(1)), Some(Action::Unmerge)),
        (Init::Clean(at(2)), Some(Action::Unmerge)),
        (Init::Clean(at(3)), Some(Action::Unmerge)),
        (Init::Empty, None),
    ]);
    let own = READ_WRITE.with(abi::mark::Keep::NORESERVE, 0);
    let addresses = [0, 1, 2].map(|index| scene.space.address(index));
    scene.space.marks.insert(addresses[1], Mark::merged(own));
    assert_eq!(execute(&mut scene.space, &scene.order, &scene.plan).1, [Outcome::Unmerged; 3]);
    assert_eq!(addresses.map(|address| scene.space.pages[&address].keep), [READ_WRITE, own, READ_WRITE]);
}
