//! What a scenario prints: raw samples, and ratios of us to a peer measured in the same run.

use std::borrow::Cow;

use serde::Serialize;
use serde_json::Value;

/// The document of one scenario.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Its name.
    pub scenario: &'static str,
    /// What it ran on.
    pub machine: Machine,
    /// What was measured, as it came. Sizes in bytes, times in seconds.
    pub samples: Vec<Value>,
    /// Us against others.
    pub ratios: Vec<Ratio>,
}

/// The machine of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Processors that may be used.
    pub cpus: usize,
    /// Memory in bytes.
    pub memory: u64,
    /// Kernel release.
    pub kernel: String,
    /// The first processor's model.
    pub model: String,
    /// Load average of the last minute at the start: what else ran here.
    pub load: f64,
}

impl Machine {
    /// This one. What cannot be found out is empty.
    #[must_use]
    pub fn here() -> Self {
        let text = |path| std::fs::read_to_string(path).unwrap_or_default();
        let model = text("/proc/cpuinfo");
        let model = model.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        Self {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory: kernel::status::meminfo().map_or(0, |info| info.mem_total.get()),
            kernel: text("/proc/sys/kernel/osrelease").trim().to_owned(),
            model: model.map_or_else(String::new, |(_, name)| name.trim().to_owned()),
            load: text("/proc/loadavg").split(' ').next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
        }
    }
}

/// One number of ours beside one of somebody else's.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ratio {
    /// What is compared.
    pub metric: Cow<'static, str>,
    /// Its unit.
    pub unit: &'static str,
    /// Ours.
    pub ours: f64,
    /// Whom we are compared with.
    pub against: &'static str,
    /// Theirs.
    pub theirs: f64,
    /// Above 1 when ours is better.
    pub ratio: f64,
    /// What the ratio is to reach.
    pub goal: f64,
    /// Whether it does.
    pub met: bool,
}

/// Which of two numbers is the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// The smaller, as of bytes and seconds.
    Less,
    /// The larger, as of bytes saved for a second.
    More,
}

impl Ratio {
    /// Compares. A ratio to nothing at all is as good as it can be where ours is better, and 1 where both are nothing.
    #[must_use]
    pub fn new(
        (metric, unit, better): (impl Into<Cow<'static, str>>, &'static str, Better),
        ours: f64,
        (against, theirs): (&'static str, f64),
        goal: f64,
    ) -> Self {
        let (above, below) = match better {
            Better::Less => (theirs, ours),
            Better::More => (ours, theirs),
        };
        let ratio = match (above > 0.0, below > 0.0) {
            (_, true) => above / below,
            // JSON has no infinity.
            (true, false) => f64::MAX,
            (false, false) => 1.0,
        };
        Self { metric: metric.into(), unit, ours, against, theirs, ratio, goal, met: ratio >= goal }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_is_above_one_when_ours_is_better() {
        let memory = ("memory", "bytes", Better::Less);
        let better = Ratio::new(memory, 100.0, ("theirs", 150.0), 1.2);
        assert!((better.ratio - 1.5).abs() < 1e-9 && better.met);
        let worse = Ratio::new(("speed", "bytes/s", Better::More), 100.0, ("theirs", 150.0), 1.0);
        assert!(worse.ratio < 0.7 && !worse.met);
    }

    #[test]
    fn nothing_is_compared_with_nothing() {
        let wrong = ("wrong", "", Better::Less);
        assert!(Ratio::new(wrong, 0.0, ("theirs", 0.0), 1.0).met);
        assert!(Ratio::new(wrong, 0.0, ("theirs", 3.0), 1.0).met);
        assert!(!Ratio::new(wrong, 3.0, ("theirs", 0.0), 1.0).met);
    }
}
