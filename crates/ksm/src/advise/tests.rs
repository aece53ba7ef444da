#![allow(clippy::unwrap_used, reason = "tests")]
//! The law against a model of ksmd, and against looks that no ksmd would give.
use std::time::Duration;

use page::ksmd::{Capture, Content, Model, Settings};
use proptest::prelude::*;

use super::*;
use crate::pace::Phase;
use crate::wanted::Rate;

const STILL: Goals = Goals {
    scan_time: Duration::from_secs(10),
    max_cpu: 0.5,
    boost: None,
    memory_pressure: None,
    cpu_pressure: None,
    rest: false,
    keep_smart_scan: false,
};

/// Pages of which every second one has a twin. What a look holds beyond the first `there` is absent.
fn capture(pages: u64, looks: &[(u64, u64)]) -> Capture {
    let mut builder = Capture::builder();
    let last = looks.last().unwrap().1;
    for &(second, there) in looks.iter().chain([&(1_000_000_000, last)]) {
        let content = |page| if page < there { Content::hashed(page / 2 + 7) } else { Content::ABSENT };
        builder.look(Duration::from_secs(second), (0..pages).map(content)).unwrap();
    }
    builder.build()
}

/// ksmd and an advisor.
struct World<'a> {
    model: Model<'a>,
    law: Law,
    in_force: Option<Rate>,
    counted: bool,
    seen: bool,
    passes: Vec<Pass>,
    paces: Vec<Decision>,
    /// For how long ksmd waits for a processor between two batches.
    waits: Duration,
}

impl<'a> World<'a> {
    fn new(capture: &'a Capture, there: u64, goals: Goals) -> Self {
        Self::with(capture, there, goals, (true, true))
    }

    /// A kernel that counts less.
    fn with(capture: &'a Capture, there: u64, goals: Goals, (counted, seen): (bool, bool)) -> Self {
        let model = Model::new(capture, Settings { smart_scan: goals.keep_smart_scan, ..Settings::default() });
        let first = Look { mergeable_pages: there, ..Self::seen(&model, None, counted, seen) };
        let law = Law::new(goals, first);
        Self { model, law, in_force: None, counted, seen, passes: Vec::new(), paces: Vec::new(), waits: Duration::ZERO }
    }

    fn seen(model: &Model<'_>, in_force: Option<Rate>, counted: bool, seen: bool) -> Look {
        let state = model.state();
        let there = state.rmap_items;
        Look {
            at: state.at,
            full_scans: state.full_scans,
            pages_scanned: counted.then_some(state.pages_scanned),
            pages_skipped: state.pages_skipped,
            rmap_items: there,
            merged: state.pages_shared + state.pages_sharing,
            general_profit: Some(state.general_profit(4096)),
            ksmd_cpu: seen.then_some(state.cpu),
            in_force,
            mergeable_pages: there,
            ..Look::default()
        }
    }

    /// Runs for so long; `look` may change what is seen.
    fn run(&mut self, seconds: u64, look: impl Fn(&mut Look)) {
        let end = self.model.state().at + Duration::from_secs(seconds);
        while self.model.state().at < end {
            let mut now = Self::seen(&self.model, self.in_force, self.counted, self.seen);
            look(&mut now);
            let decision = self.law.look(now);
            self.in_force = decision.rate;
            self.passes.extend(decision.pass);
            let until = now.at + decision.next;
            match decision.rate {
                Some(rate) => {
                    self.model.set_rate(rate.pages_to_scan, rate.sleep_millisecs);
                    if self.waits.is_zero() {
                        self.model.run_until(until);
                    }
                    while self.model.state().at < until {
                        // One batch, and a wait.
                        let next = self.model.state().at;
                        self.model.run_until(next + Duration::from_nanos(1));
                        self.model.stand_until(self.model.state().at + self.waits);
                    }
                }
                None => self.model.stand_until(until),
            }
            self.paces.push(decision);
        }
    }

    /// Every pass but the first `but` took what it should, to one part in five.
    fn assert_held(&self, scan_time: f64, but: usize) {
        let held: Vec<f64> = self.passes.iter().filter(|pass| pass.held).map(|pass| pass.seconds).collect();
        assert!(held.len() > but + 3, "{held:?}");
        for seconds in &held[but..] {
            assert!((seconds / scan_time - 1.0).abs() < 0.2, "{scan_time}: {held:?}");
        }
    }
}

fn at_most(pages: u64) -> impl Fn(&mut Look) {
    move |look| look.mergeable_pages = pages
}

#[test]
fn quick_and_slow_goals_are_held() {
    for pages in [300, 20_000, 200_000] {
        let capture = capture(pages, &[(0, pages)]);
        for (scan_time, seconds) in [(1, 30), (10, 100), (200, 1600), (1800, 14_400)] {
            let goals = Goals { scan_time: Duration::from_secs(scan_time), ..STILL };
            let mut world = World::new(&capture, pages, goals);
            world.run(seconds, at_most(pages));
            if pages > 100_000 && scan_time < 10 {
                continue; // Beyond the ceiling.
            }
            world.assert_held(scan_time as f64, 0);
        }
    }
}

#[test]
fn a_slow_goal_costs_less_than_the_kernels_floor() {
    let capture = capture(20_000, &[(0, 20_000)]);
    let goals = Goals { scan_time: Duration::from_secs(200), max_cpu: 0.01, ..STILL };
    let mut world = World::new(&capture, 20_000, goals);
    world.run(2000, at_most(20_000));
    world.assert_held(200.0, 0);
    assert!(world.model.state().cpu_share() < 0.001, "{}", world.model.state().cpu_share());
}

#[test]
fn the_ceiling_wins_and_is_said() {
    let capture = capture(200_000, &[(0, 200_000)]);
    for max_cpu in [0.01, 0.1, 0.5] {
        let goals = Goals { scan_time: Duration::from_millis(20), max_cpu, ..STILL };
        let mut world = World::new(&capture, 200_000, goals);
        world.run(60, at_most(200_000));
        let share = world.model.state().cpu_share();
        assert!(share <= max_cpu && share > max_cpu * 0.8, "{share} of {max_cpu}");
        assert!(matches!(world.paces.last().unwrap().pace, Pace::Ceiling { needed } if needed > max_cpu));
    }
}

#[test]
fn a_machine_that_gets_busy_and_idle_again_is_followed() {
    let capture = capture(130_000, &[(0, 130_000)]);
    let goals = Goals { scan_time: Duration::from_secs(1), ..STILL };
    let mut world = World::new(&capture, 130_000, goals);
    for round in 0..6 {
        // Every other ten seconds ksmd waits for a processor, long and at each turn.
        world.waits = Duration::from_millis(if round % 2 == 0 { 0 } else { 70 });
        let before = world.passes.len();
        world.run(10, at_most(130_000));
        let seconds: Vec<f64> = world.passes[before..].iter().map(|pass| pass.seconds).collect();
        let off = seconds.iter().filter(|seconds| !(0.8..1.2).contains(*seconds)).count();
        assert!(off <= 2 && seconds.len() >= 8, "round {round}: {seconds:?}");
    }
}

#[test]
fn a_kernel_that_counts_little_is_driven_by_its_passes() {
    let capture = capture(20_000, &[(0, 20_000)]);
    for scan_time in [10, 200] {
        let goals = Goals { scan_time: Duration::from_secs(scan_time), ..STILL };
        for seen in [true, false] {
            let mut world = World::with(&capture, 20_000, goals, (false, seen));
            world.run(scan_time * 12, at_most(20_000));
            world.assert_held(scan_time as f64, 4);
        }
    }
}

#[test]
fn passes_with_skips_are_held_on_the_whole() {
    let capture = capture(40_000, &[(0, 40_000)]);
    let mut world = World::new(&capture, 40_000, Goals { keep_smart_scan: true, ..STILL });
    world.run(600, at_most(40_000));
    let passes: u64 = world.passes.iter().map(|pass| pass.passes).sum();
    assert!((48..=72).contains(&passes), "{passes} in 600 s: {:?}", world.passes);
}

#[test]
fn growth_in_a_pass_is_caught_up_with() {
    let capture = capture(40_000, &[(0, 10_000), (105, 40_000)]);
    let mut world = World::new(&capture, 10_000, STILL);
    world.run(100, at_most(10_000));
    let before = world.passes.len();
    world.run(200, |look| (look.mergeable_pages, look.appeared_pages) = (40_000, 30_000));
    let seconds: Vec<f64> = world.passes[before..].iter().map(|pass| pass.seconds).collect();
    // The pass that was surprised is late, the next ones are not.
    assert!(seconds[2..].iter().all(|seconds| (8.0..12.0).contains(seconds)), "{seconds:?}");
}

#[test]
fn rests_when_nothing_comes_and_wakes_for_what_appears() {
    let capture = capture(40_000, &[(0, 20_000), (600, 40_000)]);
    let goals = Goals { boost: Some(0.5), rest: true, ..STILL };
    let mut world = World::new(&capture, 20_000, goals);
    world.run(5, at_most(20_000));
    assert_eq!(world.paces[0].phase, Phase::Boost);
    let turns = |world: &World<'_>| world.paces.iter().filter_map(|decision| decision.turn).collect::<Vec<_>>();
    world.run(595, at_most(20_000));
    assert_eq!(world.paces.last().unwrap().phase, Phase::Idle, "{:?}", turns(&world));
    let rests = turns(&world)
        .iter()
        .filter_map(|turn| match turn {
            Turn::LookAgain { after_seconds } => Some(*after_seconds),
            _ => None,
        })
        .collect::<Vec<_>>();
    assert!(rests.len() >= 2 && rests.windows(2).all(|pair| pair[1] > pair[0]), "{rests:?}: ever longer");
    let saved = world.model.state().pages_saved();
    assert_eq!(saved, 10_000);
    world.run(30, |look| (look.mergeable_pages, look.appeared_pages) = (40_000, 20_000));
    assert!(turns(&world).contains(&Turn::Grown { pages: 20_000 }), "{:?}", turns(&world));
    assert_eq!(world.model.state().pages_saved(), 20_000, "{:?}", turns(&world));
}

#[test]
fn nobody_there_and_no_profit_are_no_work() {
    let goals = Goals { rest: true, ..STILL };
    let nothing = capture(10, &[(0, 0)]);
    let mut world = World::new(&nothing, 0, goals);
    world.run(100, at_most(0));
    assert!(world.paces.iter().all(|decision| decision.rate.is_none()));
    // A few twins among many pages that have none.
    let mut builder = Capture::builder();
    for second in [0, 1_000_000_000] {
        builder.look(Duration::from_secs(second), (0..20_000_u64).map(|page| Content::hashed(page.max(50)))).unwrap();
    }
    let unique = builder.build();
    let mut world = World::new(&unique, 20_000, goals);
    world.run(45, at_most(20_000));
    assert!(world.paces.iter().any(|decision| matches!(decision.turn, Some(Turn::Unprofitable { .. }))));
    assert_eq!(world.paces.last().unwrap().phase, Phase::Idle);
}

#[test]
fn pressure_changes_the_pace_and_says_so() {
    let capture = capture(20_000, &[(0, 20_000)]);
    let goals = Goals { memory_pressure: Some(5.0), cpu_pressure: Some(50.0), ..STILL };
    let pace = |memory: f64, cpu: f64| {
        let mut world = World::new(&capture, 20_000, goals);
        world.run(60, |look| {
            look.mergeable_pages = 20_000;
            (look.memory_pressure, look.cpu_pressure) = (Some(memory), Some(cpu));
        });
        (world.paces.last().unwrap().pace, world.model.state().full_scans)
    };
    let (calm, passes) = pace(1.0, 10.0);
    assert_eq!(calm, Pace::ScanTime);
    let (short, more) = pace(15.0, 90.0);
    assert_eq!(short, Pace::MemoryPressure { some_avg10: 15.0 });
    let (busy, fewer) = pace(1.0, 90.0);
    assert_eq!(busy, Pace::CpuPressure { some_avg10: 90.0 });
    assert!(more > passes * 2 && fewer < passes, "{fewer} {passes} {more}");
}

#[test]
fn another_rate_in_force_is_noticed() {
    let mut law = Law::new(STILL, Look { mergeable_pages: 1000, ..Look::default() });
    let first = law.look(Look { at: Duration::from_secs(1), mergeable_pages: 1000, ..Look::default() });
    assert!(first.rate.is_some() && first.pace == Pace::ScanTime);
    let theirs = Some(Rate { pages_to_scan: 7, sleep_millisecs: 7 });
    let look = Look { at: Duration::from_secs(2), in_force: theirs, mergeable_pages: 1000, ..Look::default() };
    assert_eq!(law.look(look).pace, Pace::Overruled { in_force: theirs });
}

proptest! {
    /// Counters that jump, fall and lie lead to settings that the kernel takes and to no work beyond the ceiling as far
    /// as costs are known.
    #[test]
    fn no_look_leads_astray(
        looks in proptest::collection::vec(
            (0..100_000_u64, 0..50_u64, any::<Option<u32>>(), any::<u32>(), 0..1_000_000_u64, any::<Option<i64>>(), 0..40_000_u64, -10.0..200.0),
            1..60,
        ),
        scan_time in 1..1_000_000_u64,
        max_cpu in 0.001..1.0,
        rest in any::<bool>(),
    ) {
        let goals = Goals { scan_time: Duration::from_millis(scan_time), max_cpu, rest, boost: rest.then_some(max_cpu), ..Goals::default() };
        let mut law = Law::new(goals, Look::default());
        let (mut at, mut in_force, mut cpu) = (0, None, 0);
        for (step, full_scans, scanned, skipped, items, profit, used, pressure) in looks {
            at += step;
            cpu += used;
            let decision = law.look(Look {
                at: Duration::from_millis(at),
                full_scans,
                pages_scanned: scanned.map(u64::from),
                pages_skipped: u64::from(skipped),
                rmap_items: items,
                merged: items / 3,
                saved: items / 6,
                cow: items / 2,
                general_profit: profit,
                ksmd_cpu: Some(Duration::from_micros(cpu)),
                in_force,
                mergeable_pages: items * 2,
                appeared_pages: at,
                memory_pressure: Some(pressure),
                cpu_pressure: Some(pressure),
            });
            in_force = decision.rate;
            prop_assert!(decision.pages_per_second.is_finite());
            prop_assert!(decision.next >= Duration::from_millis(50) && decision.next <= Duration::from_secs(1));
            if let Some(rate) = decision.rate {
                prop_assert!((1..=1_000_000_000).contains(&rate.pages_to_scan) && rate.sleep_millisecs <= 3_600_000);
                prop_assert!(rate.sleep_millisecs > 0 || max_cpu > 0.9, "flat out at {max_cpu}");
            }
        }
    }
}
