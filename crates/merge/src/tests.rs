//! What must hold of every batch, whatever others do meanwhile and wherever it is killed.

#![allow(clippy::unwrap_used, reason = "tests")]

mod defects;
mod faults;
mod hostile;
mod outcomes;
mod properties;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use abi::mark::Mark;
use abi::place::{Action, Outcome, Place};

use crate::recording::{Init, Killed, Kind, Oracle, READ_WRITE, Recording, Table};
use crate::{Ended, Entry, Order, RegisterMode, run_plan};

/// A place in segment 0. It holds the number of its page modulo 5.
const fn at(page: u32) -> Place {
    Place { segment: 0, page }
}

/// A range, what is planned for it, and how it is checked.
#[derive(Clone, Debug)]
struct Scene {
    space: Recording,
    plan: Vec<Entry>,
    order: Order,
}

impl Scene {
    /// Every page with what is to be done with it.
    fn new(pages: &[(Init, Option<Action>)]) -> Self {
        Self::with_page_size(4096, pages)
    }

    fn with_page_size(page_size: u64, pages: &[(Init, Option<Action>)]) -> Self {
        let inits: Vec<Init> = pages.iter().map(|(init, _)| *init).collect();
        let space = Recording::new(page_size, &inits);
        let plan = pages.iter().enumerate();
        let plan =
            plan.filter_map(|(index, (_, action))| Some(Entry { address: space.address(index), action: (*action)? }));
        let order = Order {
            keep: READ_WRITE,
            range_start: space.address(0),
            range_end: space.address(pages.len()),
            track: false,
            forked: false,
            exact_check: true,
            vouched: false,
        };
        Self { plan: plan.collect(), order, space }
    }

    fn tracked(mut self) -> Self {
        self.order.track = true;
        self
    }

    fn forked(mut self) -> Self {
        self.order.forked = true;
        self
    }

    fn checked_by(mut self, oracle: Oracle) -> Self {
        self.space.oracle = oracle;
        self.order.exact_check = oracle == Oracle::Exact;
        self
    }

    /// Only the owner's word instead of a check.
    fn vouched(mut self) -> Self {
        self = self.checked_by(Oracle::None);
        self.order.vouched = true;
        self.space.vouched = true;
        self
    }

    /// Runs the plan; whoever is killed is survived. Then everything must be as it should.
    fn run(&self) -> Run {
        let mut space = self.space.clone();
        let (ended, outcomes) = execute(&mut space, &self.order, &self.plan);
        let whole = match ended {
            Some(Ended::Trapped) | None => {
                assert!(space.gate_closed || space.journal.kind.is_none(), "the gate is open and pages are frozen");
                survive(&mut space);
                false
            }
            Some(ended) => {
                assert_eq!(ended, Ended::Whole);
                assert_eq!(outcomes.len(), self.plan.len(), "an entry without an outcome");
                true
            }
        };
        // What others had in mind for later.
        let late: Vec<_> =
            space.schedule.iter().filter(|(when, _)| *when >= space.step).map(|(_, event)| *event).collect();
        space.schedule.clear();
        for event in late {
            space.act(event);
        }
        space.last_words();
        let run = Run { space, outcomes, ended };
        self.verify(&run, whole);
        run
    }

    /// The address space after a run, or after a recovery if that was not `whole`.
    fn verify(&self, run: &Run, whole: bool) {
        let (before, after) = (&self.space, &run.space);
        assert!(!after.gate_closed, "the gate is closed");
        assert_eq!(after.journal.kind, None, "the journal is not idle");
        assert!(after.waiting.is_empty(), "threads wait for ever: {:x?}", after.waiting);
        for page in after.scratch.iter().flatten().filter(|_| whole) {
            assert!(page.table == Table::Nothing && page.under.is_none(), "the scratch area holds {page:?}");
        }
        for (address, expected) in &after.expected {
            let content = after.content(*address);
            assert!(after.reads_right(*address), "{address:#x} reads {content:?} and not {expected}");
        }
        for (address, page) in &after.pages {
            let registered = page.registered;
            let allowed = registered.is_none() || self.order.track && registered == Some(RegisterMode::Track);
            assert!(allowed, "{address:#x} is still registered for {registered:?}");
        }
        let order = &self.order;
        let size = after.address(1) - after.address(0);
        let planned: BTreeMap<u64, Vec<Action>> = self.plan.iter().fold(BTreeMap::new(), |mut all, entry| {
            all.entry(entry.address).or_insert_with(Vec::new).push(entry.action);
            all
        });
        for (address, page) in &after.pages {
            // Of a plain page nobody but the plan knows them.
            let from_plan = page.keep == order.keep
                && planned.get(address).is_some_and(|all| all.iter().any(|action| matches!(action, Action::Merge(_))));
            let kept = page.keep == before.pages[address].keep;
            assert!(kept || from_plan, "properties of {address:#x} are {:?}", page.keep);
        }
        for address in &after.worked_on {
            assert!(planned.contains_key(address), "{address:#x} was not in the plan");
            assert!(*address >= order.range_start && address + size <= order.range_end, "{address:#x} is outside");
        }
        let mut succeeded: BTreeMap<u64, (Outcome, Action)> = BTreeMap::new();
        for (entry, outcome) in self.plan.iter().zip(&run.outcomes) {
            assert_ne!(*outcome, Outcome::Pending, "{entry:x?}");
            if matches!(outcome, Outcome::Merged | Outcome::Zero | Outcome::Retaken | Outcome::Unmerged) {
                succeeded.insert(entry.address, (*outcome, entry.action));
            }
        }
        for (address, page) in &after.pages {
            self.verify_mark(*address, after, whole, planned.contains_key(address));
            if after.changed_by_program.contains(address) {
                continue;
            }
            let was = before.pages[address].kind;
            let unmerges = planned.get(address).is_some_and(|actions| actions.contains(&Action::Unmerge));
            let last = address + 2 * size > order.range_end;
            let sacred = before.robust.contains(address) || before.thread_data.contains(address) || last && !unmerges;
            if sacred || !planned.contains_key(address) {
                assert_eq!(page.kind, was, "{address:#x} was not to be touched");
            }
            if !whole {
                continue;
            }
            match succeeded.get(address) {
                None => assert_eq!(page.kind, was, "{address:#x} was refused"),
                Some((Outcome::Merged | Outcome::Retaken, action)) => {
                    assert_eq!(page.kind, Kind::Store(action.place().unwrap()), "{address:#x}");
                }
                Some((Outcome::Zero, _)) => {
                    assert_eq!((page.kind, after.marks[address]), (Kind::Anonymous, Mark::PLAIN), "{address:#x}");
                }
                Some((_, _)) => assert_eq!(after.marks[address].keep(), None, "{address:#x} was un-merged"),
            }
        }
    }

    /// Marks say what is mapped. After a death they may take a page for the store's that is not, never the other way
    /// round.
    fn verify_mark(&self, address: u64, after: &Recording, whole: bool, planned: bool) {
        let (was, page) = (self.space.marks[&address], after.pages[&address]);
        let was_anonymous = self.space.pages[&address].kind == Kind::Anonymous;
        let mark = after.marks[&address];
        let right = match page.kind {
            Kind::Other => mark == was,
            Kind::Store(_) if was == Mark::EXCLUDED => mark == was,
            Kind::Store(_) => mark == Mark::merged(page.keep),
            Kind::Anonymous => {
                let kept = mark == was && was_anonymous;
                let plain = mark == Mark::PLAIN && was != Mark::EXCLUDED;
                kept || plain || !whole && planned && mark == Mark::merged(page.keep)
            }
        };
        assert!(right, "{address:#x} is {:?}, marked {mark:?}, before {was:?}", page.kind);
    }

    /// How many steps an undisturbed run takes.
    fn steps(&self) -> usize {
        let mut space = self.space.clone();
        let _ = execute(&mut space, &self.order, &self.plan);
        space.step
    }

    /// The same range as another run left it, with a plan made anew.
    fn after(&self, run: &Run) -> Self {
        let mut next = self.clone();
        next.space = run.space.clone();
        next.space.plan_anew();
        next.space.step = 0;
        next.space.worked_on.clear();
        next.space.changed_by_program.clear();
        next
    }
}

/// What a run left.
struct Run {
    space: Recording,
    outcomes: Vec<Outcome>,
    ended: Option<Ended>,
}

/// Runs a plan; `None` if whoever ran it was killed.
fn execute(space: &mut Recording, order: &Order, plan: &[Entry]) -> (Option<Ended>, Vec<Outcome>) {
    let mut outcomes = Vec::new();
    let report = |index: usize, outcome: Outcome| {
        assert_eq!(index, outcomes.len(), "entries are reported in order");
        outcomes.push(outcome);
    };
    let entry = |index: usize| plan.get(index).copied();
    let run = AssertUnwindSafe(|| run_plan(space, order, entry, plan.len(), report, || true));
    let ended = match catch_unwind(run) {
        Ok(ended) => Some(ended),
        Err(payload) if payload.is::<Killed>() => None,
        Err(payload) => resume_unwind(payload),
    };
    (ended, outcomes)
}

/// One survivor after the other, until one is not killed.
fn survive(space: &mut Recording) {
    while let Err(payload) = catch_unwind(AssertUnwindSafe(|| space.recover())) {
        if !payload.is::<Killed>() {
            resume_unwind(payload);
        }
    }
}

fn plain(content: u64, action: Action) -> (Init, Option<Action>) {
    (Init::Anonymous(content), Some(action))
}

/// One scene for each way through the three sequences.
fn scenes() -> Vec<(&'static str, Scene)> {
    use Action::{DropZero, Merge, Retake, RetakeZero, Unmerge};
    let mixed = [
        plain(1, Merge(at(1))),
        plain(2, Merge(at(2))),
        plain(0, DropZero),
        (Init::Anonymous(4), None),
        plain(3, Merge(at(4))),
        (Init::Empty, None),
        plain(1, Merge(at(6))),
        (Init::Anonymous(9), None),
    ];
    let diverged = [
        (Init::Diverged(at(1), 1), Some(Retake(at(1)))),
        (Init::Diverged(at(2), 3), Some(Retake(at(3)))),
        (Init::Diverged(at(3), 4), Some(Retake(at(4)))),
        (Init::Diverged(at(4), 0), Some(RetakeZero)),
        (Init::Clean(at(5)), None),
        (Init::DivergedDontFork(at(40), 2), Some(Retake(at(2)))),
        (Init::Diverged(at(50), 8), Some(Retake(at(3)))),
        (Init::Anonymous(9), None),
    ];
    let unmerged = [
        (Init::Clean(at(1)), Some(Unmerge)),
        (Init::Mapped(at(2)), Some(Unmerge)),
        (Init::Diverged(at(3), 7), Some(Unmerge)),
        (Init::Anonymous(4), Some(Unmerge)),
        (Init::DivergedDontFork(at(4), 2), Some(Unmerge)),
        (Init::HalfMarked(6), Some(Unmerge)),
    ];
    vec![
        ("one page", Scene::new(&[plain(1, Merge(at(1))), (Init::Empty, None)])),
        ("plain pages", Scene::new(&mixed).tracked()),
        ("plain pages, collapse", Scene::new(&mixed).checked_by(Oracle::Collapse)),
        ("plain pages, vouched", Scene::new(&mixed).vouched()),
        (
            "plain pages after a fork",
            Scene::new(&[
                (Init::WasShared(1), Some(Merge(at(1)))),
                (Init::Shared(2), Some(Merge(at(2)))),
                plain(3, Merge(at(3))),
                (Init::Empty, None),
            ])
            .forked(),
        ),
        (
            "plain pages that are held",
            Scene::new(&[
                (Init::Held(1), Some(Merge(at(1)))),
                plain(2, Merge(at(2))),
                (Init::Pinned(3), Some(Merge(at(3)))),
                (Init::Lazy(4), Some(Merge(at(4)))),
                (Init::Empty, None),
            ]),
        ),
        ("diverged pages", Scene::new(&diverged).tracked()),
        ("diverged pages, vouched", Scene::new(&diverged).vouched()),
        (
            "diverged pages that are held",
            Scene::new(&[
                (Init::DivergedHeld(at(1), 1), Some(Retake(at(1)))),
                (Init::Diverged(at(2), 3), Some(Retake(at(3)))),
                (Init::DivergedShared(at(3), 3), Some(Retake(at(3)))),
                (Init::Clean(at(4)), None),
            ]),
        ),
        ("un-merging", Scene::new(&unmerged).tracked()),
        ("un-merging, vouched", Scene::new(&unmerged).vouched()),
        (
            "un-merging what is held",
            Scene::new(&[
                (Init::DivergedHeld(at(1), 1), Some(Unmerge)),
                (Init::Clean(at(2)), Some(Unmerge)),
                (Init::DivergedShared(at(3), 3), Some(Unmerge)),
                (Init::DivergedSwapped(at(4), 8), Some(Unmerge)),
            ]),
        ),
        (
            "all families",
            Scene::new(&[
                plain(1, Merge(at(1))),
                (Init::Diverged(at(2), 3), Some(Retake(at(3)))),
                (Init::Clean(at(4)), Some(Unmerge)),
                plain(0, DropZero),
                (Init::Empty, None),
            ])
            .tracked(),
        ),
    ]
}

/// Pages that somebody else might want to be at.
fn pages_of(scene: &Scene) -> std::ops::Range<usize> {
    0..scene.space.marks.len()
}

fn kinds(outcomes: &[Outcome]) -> BTreeSet<u32> {
    outcomes.iter().map(|outcome| *outcome as u32).collect()
}
