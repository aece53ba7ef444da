//! Predicted savings over time: one line for each setting.

use super::Series;
use super::words::{self, Px, bytes, seconds};

/// Size of the drawing, and where the lines lie in it.
const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 90.0;
const RIGHT: f64 = 980.0;
const TOP: f64 = 15.0;
const BOTTOM: f64 = 300.0;
/// Points of a line, more than anybody sees.
const POINTS: usize = 500;
/// Lines that can be told apart by colour and dashes.
const LINES: usize = 6;
/// Steps between marks of time, in seconds.
const TIMES: [f64; 18] = [
    1.0, 2.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0, 14_400.0, 21_600.0,
    43_200.0, 86_400.0,
];

/// The drawing.
pub(super) struct Chart {
    pub(super) width: f64,
    pub(super) height: f64,
    pub(super) left: f64,
    pub(super) right: f64,
    pub(super) bottom: f64,
    /// Where the marks of the time axis end, and where their words stand.
    pub(super) tick: f64,
    pub(super) below: f64,
    /// Where the words of the other axis end.
    pub(super) beside: f64,
    pub(super) across: Vec<Mark>,
    pub(super) up: Vec<Mark>,
    pub(super) lines: Vec<Line>,
}

/// A mark on an axis.
pub(super) struct Mark {
    pub(super) at: Px,
    /// Where the foot of letters is that stand in the middle of it.
    pub(super) foot: Px,
    pub(super) text: String,
}

/// One line.
pub(super) struct Line {
    pub(super) name: String,
    /// Which colour and dashes.
    pub(super) style: usize,
    /// As `<polyline points>` takes them.
    pub(super) points: String,
    /// What it reaches.
    pub(super) end: String,
    /// When it has nine tenths of that.
    pub(super) nearly: String,
}

/// Draws them; `None` where there is no point.
pub(super) fn chart(series: &[Series]) -> Option<Chart> {
    let kept: Vec<Curve<'_>> = series.iter().map(Curve::of).filter(|curve| !curve.points.is_empty()).collect();
    let points = || kept.iter().flat_map(|curve| &curve.points);
    let longest = points().map(|(time, _)| *time).fold(0.0, f64::max);
    let most = points().map(|(_, bytes)| *bytes).max()?;
    let longest = if longest > 0.0 { longest } else { 1.0 };
    let up_step = (most / 5).max(1024).next_power_of_two();
    let highest = most.max(1).div_ceil(up_step) * up_step;
    let x = |time: f64| Px(LEFT + (RIGHT - LEFT) * time / longest);
    let y = |bytes: u64| Px(BOTTOM - (BOTTOM - TOP) * bytes as f64 / highest as f64);
    let whole_days = (longest / 8.0 / 86_400.0).ceil() * 86_400.0;
    let across_step = TIMES.into_iter().find(|step| longest / step <= 10.0).unwrap_or(whole_days);
    let mark = |at: Px, text| Mark { at, foot: Px(at.0 + 4.0), text };
    let marks = (longest / across_step) as usize;
    let across = (0..=marks).map(|at| at as f64 * across_step).map(|time| mark(x(time), seconds(time, longest)));
    let up = (0..=highest / up_step).map(|at| at * up_step).map(|size| mark(y(size), bytes(size)));
    let line = |(at, Curve { name, points }): (usize, &Curve<'_>)| {
        let end = points.last().map_or(0, |(_, bytes)| *bytes);
        let nearly = points.iter().find(|(_, bytes)| *bytes as f64 >= end as f64 * 0.9).map_or(0.0, |(time, _)| *time);
        let coordinates: Vec<String> =
            points.iter().map(|(time, bytes)| format!("{},{}", x(*time), y(*bytes))).collect();
        Line {
            name: words::name(name),
            style: at % LINES,
            points: coordinates.join(" "),
            end: bytes(end),
            nearly: format!("{nearly:.1} s"),
        }
    };
    Some(Chart {
        width: WIDTH,
        height: HEIGHT,
        left: LEFT,
        right: RIGHT,
        bottom: BOTTOM,
        tick: BOTTOM + 5.0,
        below: BOTTOM + 20.0,
        beside: LEFT - 8.0,
        across: across.collect(),
        up: up.collect(),
        lines: kept.iter().enumerate().map(line).collect(),
    })
}

/// What of a series is drawn.
struct Curve<'a> {
    name: &'a str,
    points: Vec<(f64, u64)>,
}

impl<'a> Curve<'a> {
    /// The points that have a place on the page, in the order of time, no more than can be seen.
    fn of(series: &'a Series) -> Self {
        let usable = |(time, _): &(f64, u64)| time.is_finite() && *time >= 0.0;
        let mut points: Vec<_> = series.points.iter().copied().filter(usable).collect();
        points.sort_by(|one, other| one.0.total_cmp(&other.0));
        let every = points.len().div_ceil(POINTS).max(1);
        let last = points.len().saturating_sub(1);
        let seen = points.into_iter().enumerate().filter(|(at, _)| at % every == 0 || *at == last);
        Self { name: &series.name, points: seen.map(|(_, point)| point).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(points: Vec<(f64, u64)>) -> Series {
        Series { name: "a".to_owned(), points }
    }

    #[test]
    fn lines_and_marks_lie_inside_the_drawing() {
        for (longest, most) in
            [(0.0, 0), (0.5, 1), (3.0, 4096), (61.0, 5 << 20), (7000.0, 3 << 30), (4e6, u64::MAX >> 8)]
        {
            let found = chart(&[series(vec![(0.0, 0), (longest, most)])]).expect("there are points");
            assert!((1..=11).contains(&found.across.len()), "{longest} s: {} marks", found.across.len());
            assert!((2..=7).contains(&found.up.len()), "{most} bytes: {} marks", found.up.len());
            assert!(found.across.iter().all(|mark| (LEFT..=RIGHT).contains(&mark.at.0)), "{longest} s");
            assert!(found.up.iter().all(|mark| (TOP..=BOTTOM).contains(&mark.at.0)), "{most} bytes");
            let ends = found.lines[0].points.split_once(' ').expect("two points");
            assert_eq!(ends.0, format!("{LEFT},{BOTTOM}"));
        }
    }

    #[test]
    fn points_without_a_place_are_left_out_and_long_lines_thinned() {
        let mut points: Vec<(f64, u64)> = (0..10_000_u32).map(|at| (f64::from(at), u64::from(at) * 4096)).collect();
        points.extend([(f64::NAN, 1), (f64::INFINITY, 1), (-1.0, 1)]);
        let found = chart(&[series(points), series(vec![])]).expect("there are points");
        assert_eq!(found.lines.len(), 1, "nothing to draw, no line");
        let line = &found.lines[0];
        assert!(line.points.split(' ').count() <= POINTS + 1);
        assert!(line.points.starts_with("90,300 "), "{}", &line.points[..40]);
        assert_eq!((line.end.as_str(), line.nearly.as_str()), ("39.1 MiB", "9000.0 s"));
        assert!(chart(&[]).is_none());
        assert!(chart(&[series(vec![(f64::NAN, 7)])]).is_none());
    }
}
