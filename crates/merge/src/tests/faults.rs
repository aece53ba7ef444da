//! Somebody acts, a step fails, or the batch is killed: at every step of every scene.

use super::*;
use crate::recording::Event;
use crate::{Failure, Unsettled};

fn events(page: usize) -> [Event; 13] {
    [
        Event::Write(page, 77),
        Event::Write(page, 0),
        Event::Write(page, 1),
        Event::Read(page),
        Event::Hold(page),
        Event::Pin(page),
        Event::HolderWrites(page, 88),
        Event::WriteUnderLock(page, 99),
        Event::Fork(page),
        Event::SwapOut(page),
        Event::Reclaim(page),
        Event::DontNeed(page),
        Event::Unmap(page),
    ]
}

/// Runs `scene`, and if it fails says where it did.
fn try_scene(what: impl std::fmt::Debug, scene: &Scene) -> Run {
    catch_unwind(AssertUnwindSafe(|| scene.run())).unwrap_or_else(|payload| {
        eprintln!("in {what:?}");
        resume_unwind(payload)
    })
}

#[test]
fn an_undisturbed_batch_does_what_was_planned() {
    for (name, scene) in scenes() {
        let run = try_scene(name, &scene);
        assert!(run.outcomes.iter().any(|outcome| (*outcome as u32) < 16), "{name}: {:?}", run.outcomes);
    }
}

#[test]
fn killed_at_every_step_nothing_is_lost_and_life_goes_on() {
    for (name, mut scene) in scenes() {
        for step in 0..scene.steps() {
            scene.space.kills = [step].into();
            let run = try_scene((name, step), &scene);
            assert_eq!(run.ended, None, "{name} was not killed at {step}");
            // Whoever comes next can do the rest, and give everything back.
            let mut next = scene.after(&run);
            next.order.track = true;
            let run = try_scene((name, step, "again"), &next);
            let mut last = next.after(&run);
            for entry in &mut last.plan {
                entry.action = Action::Unmerge;
            }
            let run = try_scene((name, step, "un-merged"), &last);
            let marked = last.plan.iter().filter(|entry| run.space.marks[&entry.address].keep().is_some()).count();
            let refused = run.outcomes.iter().filter(|outcome| **outcome != Outcome::Unmerged).count();
            assert_eq!(marked, refused, "{name} at {step}: {:?}", run.outcomes);
        }
    }
}

#[test]
fn survivors_can_be_killed_as_well() {
    for (name, mut scene) in scenes() {
        let steps = scene.steps();
        for step in 0..steps {
            for second in (step + 1)..(step + 40) {
                scene.space.kills = [step, second, second + 3].into();
                try_scene((name, step, second), &scene);
            }
        }
    }
}

#[test]
fn another_party_acts_before_any_step() {
    for (name, mut scene) in scenes() {
        for step in 0..scene.steps() {
            for event in pages_of(&scene).flat_map(events) {
                scene.space.schedule = vec![(step, event)];
                try_scene((name, step, event), &scene);
            }
        }
    }
}

#[test]
fn a_holder_writes_before_any_step_and_later() {
    for (name, mut scene) in scenes() {
        for step in 0..scene.steps() {
            for page in pages_of(&scene) {
                for taken in [Event::Hold(page), Event::Pin(page)] {
                    scene.space.schedule = vec![(step / 2, taken), (step, Event::HolderWrites(page, 88))];
                    try_scene((name, step, taken), &scene);
                    scene.space.schedule.push((step + 2, Event::LetGo(page)));
                    try_scene((name, step, taken, "lets go"), &scene);
                }
            }
        }
    }
}

#[test]
fn others_act_and_then_it_is_killed() {
    for (name, mut scene) in scenes() {
        let steps = scene.steps();
        for killed in 0..steps {
            scene.space.kills = [killed].into();
            for step in [killed / 3, killed.saturating_sub(4), killed.saturating_sub(1), killed, killed + 2] {
                for event in pages_of(&scene).flat_map(events) {
                    scene.space.schedule = vec![(step, event), (killed + 4, event)];
                    try_scene((name, step, event, killed), &scene);
                }
            }
        }
    }
}

#[test]
fn every_step_that_can_fail_fails_once() {
    for (name, scene) in scenes() {
        for call in 0..12 {
            for failure in [Failure::Busy, Failure::Absent, Failure::Properties, Failure::Limit] {
                let mut failing = scene.clone();
                failing.space.faults.map = Some((call, failure));
                try_scene((name, call, failure, "map"), &failing);
                let mut failing = scene.clone();
                failing.space.faults.register = Some((call, failure));
                try_scene((name, call, failure, "register"), &failing);
            }
            for reason in [Unsettled::Layout, Unsettled::Threads, Unsettled::Stopped] {
                let mut failing = scene.clone();
                failing.space.faults.settled = Some((call, reason));
                try_scene((name, call, reason), &failing);
            }
            let mut failing = scene.clone();
            failing.space.faults.check = Some(call);
            try_scene((name, call, "check"), &failing);
            let mut failing = scene.clone();
            failing.space.faults.remap = Some(call);
            try_scene((name, call, "remap"), &failing);
        }
        for busy in [1, 19, 20, 21, 60] {
            let mut failing = scene.clone();
            failing.space.faults.busy = busy;
            try_scene((name, busy, "busy"), &failing);
        }
        let mut failing = scene.clone();
        failing.space.faults.no_states = true;
        try_scene((name, "page table"), &failing);
    }
}

/// Faults that make pages go back, combined with those of going back, and with death.
#[test]
fn going_back_fails_and_falls_back() {
    for (name, mut scene) in scenes() {
        scene.space.faults.map = Some((0, Failure::Limit));
        for refused in [false, true] {
            if refused {
                scene.space.faults.check = Some(0);
            }
            for call in 0..8 {
                let mut copying = scene.clone();
                copying.space.faults.thaw_copies = Some(call);
                let run = try_scene((name, call, "copy"), &copying);
                assert_eq!(run.ended, Some(Ended::Whole));
                for step in 0..copying.steps() {
                    copying.space.kills = [step].into();
                    for page in pages_of(&scene) {
                        copying.space.schedule = vec![(step, Event::Write(page, 5)), (step + 1, Event::DontNeed(page))];
                        try_scene((name, call, step, page, "copy, killed"), &copying);
                    }
                }
                let mut trapped = scene.clone();
                trapped.space.faults.thaw_fails = Some(call);
                let run = try_scene((name, call, "trapped"), &trapped);
                let thawed = run.ended == Some(Ended::Trapped);
                assert!(
                    thawed || call > 0 || !refused || scene.order.vouched || run.outcomes.contains(&Outcome::Unmerged)
                );
            }
        }
    }
}

#[test]
fn a_page_that_cannot_be_given_back_traps_the_batch() {
    let mut scene = Scene::new(&[plain(1, Action::Merge(at(2))), plain(1, Action::Merge(at(1))), (Init::Empty, None)]);
    scene.space.faults.thaw_fails = Some(0);
    let mut space = scene.space.clone();
    let (ended, outcomes) = execute(&mut space, &scene.order, &scene.plan);
    assert_eq!((ended, outcomes), (Some(Ended::Trapped), vec![Outcome::Changed, Outcome::Merged]));
    assert!(space.gate_closed && space.journal.kind.is_some(), "a survivor has to know");
    assert!(space.pages[&space.address(0)].registered == Some(RegisterMode::Missing), "nobody may see it empty");
    survive(&mut space);
    assert!(!space.gate_closed && space.reads_right(space.address(0)));
}
