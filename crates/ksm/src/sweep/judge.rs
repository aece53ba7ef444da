//! Which setting is best, and why.
use serde::Serialize;

use super::report::{Spread, Tried};

/// What is wanted most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Aim {
    /// Of the settings that save nine tenths of the most and slow the workload by no more than 5 %, the one for which
    /// ksmd uses the least of a processor.
    #[default]
    Balanced,
    /// The most bytes saved, on average over the run.
    Saved,
    /// The most MiB saved (that average) for a second of ksmd, of the settings that save half of the most.
    Efficiency,
    /// The shortest run, of the settings that save half of the most.
    RunTime,
}

/// Share of the most that a setting must save to be in question.
const MOST_OF_IT: f64 = 0.9;
const HALF_OF_IT: f64 = 0.5;
/// The workload may take so much longer than without ksmd.
const SLOWED: f64 = 1.05;
/// Of two runs of each of two settings, chance alone puts both of one before both of the other once in three times; of
/// three, once in ten.
const ENOUGH: usize = 3;

/// The answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Verdict {
    /// The best setting's place in the list; `None` if none saves anything, or the runs do not tell.
    pub best: Option<usize>,
    /// If they do not, the settings that may be it: too few runs, or figures that differ no more than from run to run.
    pub ties: Vec<usize>,
    /// In words.
    pub why: String,
}

impl Aim {
    /// Judges what was tried. `off` is the place of a setting with ksmd stopped, to compare run times with.
    pub(super) fn judge(self, tried: &[Tried]) -> Verdict {
        let ran: Vec<(usize, &Tried)> = tried.iter().enumerate().filter(|(_, tried)| tried.counts()).collect();
        let most = ran.iter().map(|(_, tried)| tried.bytes_saved_mean.median).fold(0.0, f64::max);
        if ran.is_empty() {
            return Verdict { why: "no run came to an end as it should".to_owned(), ..Verdict::default() };
        }
        if most < 4096.0 {
            return Verdict {
                why: "no setting saved anything: nothing was merged while it ran".to_owned(),
                ..Verdict::default()
            };
        }
        let off = ran.iter().find(|(_, tried)| tried.off).map(|(_, tried)| tried.run_seconds);
        let share = match self {
            Self::Balanced => MOST_OF_IT,
            Self::Saved => 0.0,
            Self::Efficiency | Self::RunTime => HALF_OF_IT,
        };
        let saves =
            |tried: &Tried| tried.bytes_saved_mean.median >= most * share && tried.bytes_saved_mean.median >= 4096.0;
        let slowed = |tried: &Tried| {
            self == Self::Balanced
                && off.is_some_and(|off| {
                    tried.run_seconds.median > off.median * SLOWED && !tried.run_seconds.overlaps(off)
                })
        };
        let enough: Vec<(usize, &Tried)> = ran.iter().copied().filter(|(_, tried)| saves(tried)).collect();
        let fit: Vec<(usize, &Tried)> = enough.iter().copied().filter(|(_, tried)| !slowed(tried)).collect();
        // Where all that save are slow, that is said and they are judged all the same.
        let all_slow = fit.is_empty();
        let pool = if all_slow { enough } else { fit };
        let figure = |tried: &Tried| match self {
            // Smaller is better in the pool's order.
            Self::Balanced => tried.ksmd_cpu_seconds,
            Self::Saved => tried.bytes_saved_mean.negated(),
            Self::Efficiency => tried.mib_per_cpu_second.map_or(Spread::default(), Spread::negated),
            Self::RunTime => tried.run_seconds,
        };
        let Some(&(best, winner)) = pool.iter().min_by(|a, b| figure(a.1).median.total_cmp(&figure(b.1).median)) else {
            return Verdict { why: "no setting saved enough to be judged".to_owned(), ..Verdict::default() };
        };
        let why = self.why(winner, most, off, pool.len(), ran.len(), all_slow);
        let told = |tried: &Tried| tried.good >= ENOUGH && !figure(tried).overlaps(figure(winner));
        let rivals = pool.iter().filter(|(at, tried)| *at != best && !told(tried)).map(|(at, _)| *at);
        let mut ties: Vec<usize> = std::iter::once(best).chain(rivals).collect();
        if winner.good < ENOUGH {
            // Whether others save enough to be in question is not told either.
            let few = "there is no telling from so few runs of a setting: at least three are needed (--repeat 3)";
            return Verdict { best: None, why: few.to_owned(), ties: pool.iter().map(|(at, _)| *at).collect() };
        }
        if ties.len() > 1 {
            ties.sort_unstable();
            let names: Vec<&str> = ties.iter().map(|&at| tried[at].setting.name.as_str()).collect();
            let why = format!(
                "there is no telling, as these differ no more than from run to run: {}. More runs may tell (--repeat {}). \
                 As far as was seen, it is {}: {why}",
                names.join("; "),
                2 * winner.good,
                winner.setting.name
            );
            return Verdict { best: None, ties, why };
        }
        Verdict { best: Some(best), ties: Vec::new(), why }
    }

    fn why(self, winner: &Tried, most: f64, off: Option<Spread>, pool: usize, ran: usize, all_slow: bool) -> String {
        let saved = winner.bytes_saved_mean.median;
        let mib = saved / f64::from(1 << 20);
        let share = saved / most * 100.0;
        let cpu = winner.ksmd_cpu_seconds.median;
        let time = winner.run_seconds.median;
        let slower = off.map_or_else(String::new, |off| {
            format!(", {:+.1} % against ksmd off", (time / off.median.max(1e-9) - 1.0) * 100.0)
        });
        let facts = format!(
            "{mib:.1} MiB saved on average, {share:.0} % of the most, for {cpu:.2} s of ksmd; the workload took {time:.2} s{slower}"
        );
        let reason = match self {
            Self::Balanced if all_slow => {
                "every setting that saves nine tenths of the most slows the workload by more than 5 %; of these ksmd \
                 used the least of a processor with it"
                    .to_owned()
            }
            Self::Balanced => format!(
                "of {pool} of {ran} settings that save nine tenths of the most and do not slow the workload by more than \
                 5 %, ksmd used the least of a processor with it"
            ),
            Self::Saved => "it saved the most, on average over the run".to_owned(),
            Self::Efficiency => format!(
                "of {pool} of {ran} settings that save half of the most, it saved the most for a second of ksmd ({} MiB)",
                winner.mib_per_cpu_second.map_or(0.0, |spread| spread.median).round()
            ),
            Self::RunTime => {
                format!("of {pool} of {ran} settings that save half of the most, the workload ended soonest with it")
            }
        };
        format!("{reason}: {facts}")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::super::setting::Setting;
    use super::*;

    fn tried(name: &str, saved: f64, cpu: f64, time: f64) -> Tried {
        let spread = |value: f64| Spread::of([value * 0.99, value, value * 1.01]);
        Tried {
            off: name == "off",
            run_seconds: spread(time),
            ksmd_cpu_seconds: spread(cpu),
            bytes_saved_mean: spread(saved * f64::from(1 << 20)),
            mib_per_cpu_second: (cpu > 0.0).then(|| spread(saved / cpu)),
            good: 3,
            ..Tried::of(Setting { name: name.to_owned(), ..Setting::parse("off").unwrap() }, Vec::new())
        }
    }

    #[test]
    fn each_aim_has_its_own_best() {
        let all = [
            tried("off", 0.0, 0.0, 10.0),
            tried("slow", 40.0, 0.1, 10.0),
            tried("middle", 95.0, 1.0, 10.2),
            tried("fast", 100.0, 5.0, 10.45),
            tried("hurts", 96.0, 0.5, 15.0),
        ];
        let best = |aim: Aim| all[aim.judge(&all).best.unwrap()].setting.name.clone();
        assert_eq!(best(Aim::Balanced), "middle");
        assert_eq!(best(Aim::Saved), "fast");
        assert_eq!(best(Aim::Efficiency), "hurts");
        assert_eq!(best(Aim::RunTime), "middle");
        let why = Aim::Balanced.judge(&all).why;
        assert!(why.contains("95.0 MiB") && why.contains("+2.0 %") && why.contains("2 of 5"), "{why}");
    }

    #[test]
    fn what_overlaps_is_not_told_and_nothing_is_said_of_nothing() {
        let all = [tried("off", 0.0, 0.0, 10.0), tried("one", 95.0, 1.0, 10.0), tried("two", 96.0, 1.005, 10.0)];
        let verdict = Aim::Balanced.judge(&all);
        assert_eq!((verdict.best, verdict.ties.as_slice()), (None, &[1, 2][..]));
        assert!(verdict.why.contains("one; two. More runs may tell (--repeat 6)"), "{}", verdict.why);
        // One is apart from the rest, of which one ran once only.
        let once = Tried { good: 1, ..tried("two", 96.0, 5.0, 10.0) };
        let verdict = Aim::Balanced.judge(&[all[0].clone(), all[1].clone(), once]);
        assert_eq!((verdict.best, verdict.ties.as_slice()), (None, &[1, 2][..]));
        assert_eq!(Aim::Balanced.judge(&all[..1]).best, None);
        assert_eq!(Aim::Saved.judge(&[]).best, None);
        // All that save are slow: said, and one of them is named.
        let slow = [tried("off", 0.0, 0.0, 10.0), tried("one", 95.0, 1.0, 20.0)];
        let verdict = Aim::Balanced.judge(&slow);
        assert!(verdict.best == Some(1) && verdict.why.contains("every setting"), "{verdict:?}");
    }

    /// Seen to fail: of one run each, the one that happened to come first was called the best.
    #[test]
    fn few_runs_tell_nothing() {
        for good in [1, 2] {
            let few = |name: &str, saved, cpu| Tried { good, ..tried(name, saved, cpu, 10.0) };
            let verdict = Aim::Balanced.judge(&[few("one", 95.0, 1.0), few("two", 96.0, 2.0)]);
            assert_eq!((verdict.best, verdict.ties.as_slice()), (None, &[0, 1][..]));
            assert!(verdict.why.contains("no telling") && verdict.why.contains("--repeat 3"), "{}", verdict.why);
        }
    }
}
