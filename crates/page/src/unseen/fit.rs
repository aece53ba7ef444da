//! The linear programs: sizes of contents that explain a sample, the likeliest, the fewest and the most contents.
//!
//! How badly sizes explain a sample is Pearson's sum, the squares of what each row is off over what is expected of it.
//! It is convex, so that linear programs can handle it by its tangents: each solution that turns out to be worse than
//! believed adds the tangent there. Sizes are plausible if the sum is not larger than the smallest by the square of
//! [`DEVIATIONS`]: what a likelihood ratio allows a single number, here the contents, to be off. Cutting too little
//! makes the range wider, never narrower.

use std::time::Duration;

use microlp::{ComparisonOp, LinearExpr, OptimizationDirection, Problem, Solution, SolutionStatus, Variable};

use super::grid::Column;

/// Standard deviations by which the truth may be off.
pub(super) const DEVIATIONS: f64 = 3.0;
/// Tangents that one of the three answers may ask for.
const TANGENTS: usize = 24;
/// For one program, which takes a few milliseconds: none was seen that needs this.
const TIME: Duration = Duration::from_secs(1);
/// Pearson's sum need not be nearer to its limit than this.
const NEAR: f64 = 0.1;
/// Expectations below this, in standard deviations if all pages had this size, are left out: the solver wants
/// coefficients of similar magnitude.
const NOTHING: f64 = 1e-4;
/// Expectations are taken for no smaller than this, or one row's tangent would be too steep for the solver.
const LEAST_EXPECTED: f64 = 0.02;

/// The light part of a sample, ready to be explained.
#[derive(Debug)]
pub(super) struct Light<'a> {
    /// Sizes that contents may have.
    pub(super) columns: &'a [Column],
    /// Contents seen in each row.
    pub(super) seen: &'a [u64],
    /// Fewest and most pages that all these contents may have together.
    pub(super) pages: (f64, f64),
}

/// Contents, seen or not, that the light part may have.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Fit {
    pub(super) low: f64,
    pub(super) likely: f64,
    pub(super) high: f64,
}

/// What a program is to find.
#[derive(Clone, Copy, PartialEq)]
enum Aim {
    /// The smallest sum of what rows are off, in standard deviations: always there, and where to start from.
    Nearest,
    /// The smallest Pearson's sum, as far as tangents tell.
    Likeliest,
    /// The fewest contents with Pearson's sum below this.
    Fewest(f64),
    /// The most.
    Most(f64),
}

/// A solved program, and what it found: contents, by how many standard deviations more is expected of each row than
/// was seen, and the value that was aimed at.
struct Found {
    solution: Solution,
    variables: Variables,
    contents: f64,
    off: Vec<f64>,
    value: f64,
}

/// The program's handles: the part of the pages that has each size; what each row is off, below and above; Pearson's
/// sum.
struct Variables {
    parts: Vec<Variable>,
    rows: Vec<(Variable, Variable)>,
    pearson: Variable,
}

/// A plane below Pearson's sum: `at_zero + slope * off`.
struct Tangent {
    at_zero: f64,
    slope: Vec<f64>,
}

impl Light<'_> {
    /// Solves the programs. `None` if the solver gave up.
    pub(super) fn fit(&self) -> Option<Fit> {
        let free = vec![(f64::INFINITY, f64::INFINITY); self.seen.len()];
        let nearest = self.solve(Aim::Nearest, &free, &[])?;
        let bounds: Vec<_> = self.seen.iter().zip(&nearest.off).map(|(&seen, &off)| bounds(seen, off)).collect();
        let mut tangents = vec![self.tangent(&nearest.off)];
        let mut likely = (self.pearson(&nearest.off), nearest.contents);
        let mut found = self.solve(Aim::Likeliest, &bounds, &tangents);
        for _ in 0..TANGENTS {
            let Some(now) = found else { break };
            let sum = self.pearson(&now.off);
            if sum < likely.0 {
                likely = (sum, now.contents);
            }
            if likely.0 - now.value < NEAR {
                break;
            }
            let tangent = self.tangent(&now.off);
            found = self.cut(now, &tangent);
            tangents.push(tangent);
        }
        let limit = likely.0 + DEVIATIONS * DEVIATIONS;
        let low = self.farthest(Aim::Fewest(limit), limit, &bounds, &tangents)?;
        let high = self.farthest(Aim::Most(limit), limit, &bounds, &tangents)?;
        Some(Fit { low, likely: likely.1, high })
    }

    /// The fewest or the most contents with Pearson's sum up to `limit`, or a little farther.
    fn farthest(&self, aim: Aim, limit: f64, bounds: &[(f64, f64)], tangents: &[Tangent]) -> Option<f64> {
        let mut found = self.solve(aim, bounds, tangents)?;
        for _ in 0..TANGENTS {
            if self.pearson(&found.off) - limit < NEAR {
                break;
            }
            let (contents, tangent) = (found.contents, self.tangent(&found.off));
            match self.cut(found, &tangent) {
                Some(nearer) => found = nearer,
                None => return Some(contents),
            }
        }
        Some(found.contents)
    }

    fn expected(&self, off: &[f64]) -> impl Iterator<Item = (f64, f64)> {
        let rows = self.seen.iter().zip(off);
        rows.map(|(&seen, off)| (seen as f64, (seen as f64 + off * deviation(seen)).max(LEAST_EXPECTED)))
    }

    fn pearson(&self, off: &[f64]) -> f64 {
        self.expected(off).map(|(seen, expected)| (seen - expected) * (seen - expected) / expected).sum()
    }

    fn tangent(&self, off: &[f64]) -> Tangent {
        let slope = |(&seen, expected): (&u64, (f64, f64))| {
            let ratio = expected.0 / expected.1;
            (1.0 - ratio * ratio) * deviation(seen)
        };
        let slope: Vec<f64> = self.seen.iter().zip(self.expected(off)).map(slope).collect();
        let at_zero = self.pearson(off) - slope.iter().zip(off).map(|(slope, off)| slope * off).sum::<f64>();
        Tangent { at_zero, slope }
    }

    /// Solves one program: `bounds` are how far each row may be off below and above, in its standard deviations.
    fn solve(&self, aim: Aim, bounds: &[(f64, f64)], tangents: &[Tangent]) -> Option<Found> {
        // Variables are parts of the pages, not counts of contents, which differ by more than a solver likes.
        let scale = self.pages.1;
        let mut problem = Problem::new(match aim {
            Aim::Most(_) => OptimizationDirection::Maximize,
            _ => OptimizationDirection::Minimize,
        });
        problem.set_time_limit(TIME);
        let when = |yes: bool| if yes { 1.0 } else { 0.0 };
        let of_contents = when(matches!(aim, Aim::Fewest(_) | Aim::Most(_)));
        let of_rows = when(aim == Aim::Nearest);
        let parts: Vec<_> = self
            .columns
            .iter()
            .map(|column| problem.add_var(of_contents / column.size as f64, (0.0, f64::INFINITY)))
            .collect();
        let pearson = problem.add_var(
            when(aim == Aim::Likeliest),
            match aim {
                Aim::Fewest(limit) | Aim::Most(limit) => (0.0, limit),
                Aim::Nearest | Aim::Likeliest => (0.0, f64::INFINITY),
            },
        );
        let mut all = LinearExpr::empty();
        parts.iter().for_each(|&part| {
            all.add(part, 1.0);
        });
        problem.add_constraint(all.clone(), ComparisonOp::Le, 1.0);
        problem.add_constraint(all, ComparisonOp::Ge, self.pages.0 / scale);
        let mut rows = Vec::new();
        for (at, (&seen, &(below, above))) in self.seen.iter().zip(bounds).enumerate() {
            let deviation = deviation(seen);
            let (under, over) = (problem.add_var(of_rows, (0.0, below)), problem.add_var(of_rows, (0.0, above)));
            let mut row = LinearExpr::empty();
            for (column, &part) in self.columns.iter().zip(&parts) {
                let expected = scale / column.size as f64 * column.shows[at] / deviation;
                if expected > NOTHING {
                    row.add(part, expected);
                }
            }
            row.add(under, 1.0);
            row.add(over, -1.0);
            problem.add_constraint(row, ComparisonOp::Eq, seen as f64 / deviation);
            rows.push((under, over));
        }
        let variables = Variables { parts, rows, pearson };
        for tangent in tangents {
            problem.add_constraint(variables.below(tangent), ComparisonOp::Le, -tangent.at_zero);
        }
        self.found(problem.solve().ok()?.into_solution().ok()?, variables)
    }

    /// Solves a program again, from where it was, with one more tangent.
    fn cut(&self, found: Found, tangent: &Tangent) -> Option<Found> {
        let Found { solution, variables, .. } = found;
        let nearer = solution.add_constraint(variables.below(tangent), ComparisonOp::Le, -tangent.at_zero);
        self.found(nearer.ok()?.into_solution().ok()?, variables)
    }

    fn found(&self, solution: Solution, variables: Variables) -> Option<Found> {
        let value = |variable| solution.var_value(variable);
        let contents = self.columns.iter().zip(&variables.parts);
        let contents = contents.map(|(column, &part)| value(part) * self.pages.1 / column.size as f64).sum();
        let off = variables.rows.iter().map(|&(under, over)| value(over) - value(under)).collect();
        // What ran out of time is no bound.
        (solution.status() == SolutionStatus::Optimal).then(|| Found {
            contents,
            off,
            value: solution.objective(),
            solution,
            variables,
        })
    }
}

impl Variables {
    /// That Pearson's sum is not below a tangent: this is at most its value at zero, negated.
    fn below(&self, tangent: &Tangent) -> LinearExpr {
        let mut below = LinearExpr::empty();
        for (&(under, over), &slope) in self.rows.iter().zip(&tangent.slope) {
            if slope.abs() > NOTHING {
                below.add(over, slope);
                below.add(under, -slope);
            }
        }
        below.add(self.pearson, -1.0);
        below
    }
}

/// Of a count that is a sum of many rare events, about.
fn deviation(seen: u64) -> f64 {
    (seen as f64 + 1.0).sqrt()
}

/// How far below and above what was `seen` the mean may be, in its standard deviations, that has it within
/// [`DEVIATIONS`] of its own; and not less than a fit that is `off`, for the grid is not the truth.
fn bounds(seen: u64, off: f64) -> (f64, f64) {
    let (count, half) = (seen as f64, DEVIATIONS * DEVIATIONS / 2.0);
    let spread = DEVIATIONS * (count + half / 2.0).sqrt();
    let least = off.abs() + 0.5;
    (((spread - half) / deviation(seen)).max(least), ((spread + half) / deviation(seen)).max(least))
}
