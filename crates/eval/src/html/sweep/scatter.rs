//! What is saved against what ksmd costs: a point for each setting, with its range.

use ksm::sweep::Report;

use crate::html::words::{self, Px};

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 90.0;
const RIGHT: f64 = 960.0;
const TOP: f64 = 20.0;
const BOTTOM: f64 = 290.0;
/// Marks of an axis.
const MARKS: u32 = 5;

/// The drawing.
pub(super) struct Scatter {
    pub(super) width: f64,
    pub(super) height: f64,
    pub(super) left: f64,
    pub(super) right: f64,
    pub(super) bottom: f64,
    pub(super) tick: f64,
    pub(super) below: f64,
    pub(super) beside: f64,
    pub(super) middle: f64,
    pub(super) legend: f64,
    pub(super) across: Vec<Mark>,
    pub(super) up: Vec<Mark>,
    pub(super) points: Vec<Point>,
}

pub(super) struct Mark {
    pub(super) at: Px,
    pub(super) foot: Px,
    pub(super) text: String,
}

/// A setting.
pub(super) struct Point {
    pub(super) title: String,
    /// Its number in the table.
    pub(super) number: usize,
    pub(super) best: bool,
    pub(super) x: Px,
    pub(super) y: Px,
    pub(super) left: Px,
    pub(super) right: Px,
    pub(super) top: Px,
    pub(super) bottom: Px,
    pub(super) label: Px,
    pub(super) foot: Px,
}

/// Draws it; `None` where no setting has a run to show.
pub(super) fn scatter(report: &Report) -> Option<Scatter> {
    let shown: Vec<_> = report.settings.iter().enumerate().filter(|(_, tried)| tried.good > 0).collect();
    if shown.is_empty() {
        return None;
    }
    let most = |values: Vec<f64>, least: f64| round_up(values.into_iter().fold(least, f64::max));
    let cpu = most(shown.iter().map(|(_, tried)| tried.ksmd_cpu_seconds.max).collect(), 0.01);
    let mib = f64::from(1 << 20);
    let saved = most(shown.iter().map(|(_, tried)| tried.bytes_saved_mean.max / mib).collect(), 0.1);
    let x = |seconds: f64| Px(LEFT + (RIGHT - LEFT) * (seconds / cpu).clamp(0.0, 1.0));
    let y = |bytes: f64| Px(BOTTOM - (BOTTOM - TOP) * (bytes / mib / saved).clamp(0.0, 1.0));
    let steps = || (0..=MARKS).map(|at| f64::from(at) / f64::from(MARKS));
    let across = steps().map(|part| mark(x(part * cpu), format!("{} s", short(part * cpu))));
    let up = steps().map(|part| mark(y(part * saved * mib), format!("{} MiB", short(part * saved))));
    let points = shown.iter().map(|(at, tried)| {
        let (cpu, saved) = (tried.ksmd_cpu_seconds, tried.bytes_saved_mean);
        let here = (x(cpu.median), y(saved.median));
        Point {
            title: format!("{}: {}", at + 1, words::name(&tried.setting.name)),
            number: at + 1,
            best: report.best.as_ref() == Some(&tried.setting.name),
            x: here.0,
            y: here.1,
            left: x(cpu.min),
            right: x(cpu.max),
            top: y(saved.max),
            bottom: y(saved.min),
            label: Px(here.0.0 + 9.0),
            foot: Px(here.1.0 - 7.0),
        }
    });
    Some(Scatter {
        width: WIDTH,
        height: HEIGHT,
        left: LEFT,
        right: RIGHT,
        bottom: BOTTOM,
        tick: BOTTOM + 5.0,
        below: BOTTOM + 20.0,
        beside: LEFT - 8.0,
        middle: (LEFT + RIGHT) / 2.0,
        legend: BOTTOM + 40.0,
        across: across.collect(),
        up: up.collect(),
        points: points.collect(),
    })
}

fn mark(at: Px, text: String) -> Mark {
    Mark { at, foot: Px(at.0 + 4.0), text }
}

/// The next of 1, 2, 5, 10 and so on.
fn round_up(value: f64) -> f64 {
    let power = 10_f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|step| step * power).find(|&step| step >= value).unwrap_or(value)
}

/// Three digits at most behind the point, none that say nothing.
fn short(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers() {
        for (value, end) in [(0.011, 0.02), (0.9, 1.0), (1.0, 1.0), (3.0, 5.0), (51.0, 100.0), (730.0, 1000.0)] {
            assert!((round_up(value) - end).abs() < 1e-9, "{value}: {}", round_up(value));
        }
        assert_eq!((short(0.4), short(1200.0), short(0.0)), ("0.4".into(), "1200".into(), "0".into()));
    }
}
