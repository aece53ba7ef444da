//! `pagefold ksm advise`.

use std::path::PathBuf;

use clap::Args;

/// `pagefold ksm advise`.
#[derive(Args, Debug)]
pub(crate) struct AdviseArgs {
    /// Seconds that one pass over all mergeable pages should take; parts of a second too.
    #[arg(long, value_name = "SECONDS", default_value_t = 200.0, value_parser = scan_time, allow_negative_numbers = true)]
    pub(crate) target_scan_time: f64,
    /// Most that ksmd may use, in per cent of one CPU; goes before every other goal.
    #[arg(long, value_name = "PERCENT", default_value_t = 20.0, value_parser = percent, allow_negative_numbers = true)]
    pub(crate) max_cpu: f64,
    /// Its use while new memory is looked at, in per cent, in place of --max-cpu and never below it; `off` for no boost.
    #[arg(long, value_name = "PERCENT|off", value_parser = boost, allow_negative_numbers = true)]
    pub(crate) boost: Option<Boost>,
    /// Pressure (PSI some avg10, per cent) from which on memory makes ksmd faster and CPU makes it slower; `off` to look
    /// away.
    #[arg(long, value_name = "memory=PERCENT,cpu=PERCENT|off", default_value = "memory=5,cpu=60", value_parser = pressure)]
    pub(crate) pressure: Pressure,
    /// Keep ksmd at work also while passes merge nothing.
    #[arg(long)]
    pub(crate) no_rest: bool,
    /// Leave smart_scan as it is; without, it is switched off while ksmd works, which makes passes even.
    #[arg(long)]
    pub(crate) keep_smart_scan: bool,
    /// End after so many seconds; without, at Ctrl-C or SIGTERM.
    #[arg(long = "for", value_name = "SECONDS", value_parser = super::seconds, allow_negative_numbers = true)]
    pub(crate) duration: Option<f64>,
    /// Append what happens to this file, one JSON document a line.
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// Print the same lines to stdout; the last one is the summary.
    #[arg(long)]
    pub(crate) json: bool,
    /// Nothing on stderr but errors.
    #[arg(long)]
    pub(crate) quiet: bool,
}

/// `--boost`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Boost {
    /// None.
    Off,
    /// Per cent of one CPU.
    Percent(f64),
}

/// `--pressure`; `None` to look away.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Pressure {
    pub(crate) memory: Option<f64>,
    pub(crate) cpu: Option<f64>,
}

fn number(text: &str) -> Result<f64, String> {
    text.parse().map_err(|_error| format!("{text:?} is not a number"))
}

fn scan_time(text: &str) -> Result<f64, String> {
    let seconds = number(text)?;
    if (0.05..=1e7).contains(&seconds) { Ok(seconds) } else { Err("must be between 0.05 and 10000000".to_owned()) }
}

fn percent(text: &str) -> Result<f64, String> {
    let percent = number(text)?;
    if (0.01..=100.0).contains(&percent) { Ok(percent) } else { Err("must be between 0.01 and 100".to_owned()) }
}

fn boost(text: &str) -> Result<Boost, String> {
    if text == "off" { Ok(Boost::Off) } else { percent(text).map(Boost::Percent) }
}

fn pressure(text: &str) -> Result<Pressure, String> {
    let mut found = Pressure::default();
    if text == "off" {
        return Ok(found);
    }
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("memory", _)) if found.memory.is_some() => return Err("names memory twice".to_owned()),
            Some(("cpu", _)) if found.cpu.is_some() => return Err("names cpu twice".to_owned()),
            Some(("memory", value)) => found.memory = Some(percent(value)?),
            Some(("cpu", value)) => found.cpu = Some(percent(value)?),
            _ => return Err("must be `off`, or memory=PERCENT, cpu=PERCENT, or both with a comma".to_owned()),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_numbers_out_of_range() {
        assert_eq!(pressure("off"), Ok(Pressure::default()));
        assert_eq!(pressure("cpu=30"), Ok(Pressure { memory: None, cpu: Some(30.0) }));
        assert_eq!(pressure("memory=0.5,cpu=90"), Ok(Pressure { memory: Some(0.5), cpu: Some(90.0) }));
        for wrong in [
            "",
            "cpu=5,memory=5,cpu=6",
            "memory",
            "memory=",
            "memory=x",
            "io=5",
            "memory=101",
            "memory=5;cpu=6",
            "cpu=NaN",
        ] {
            assert!(pressure(wrong).is_err(), "{wrong}");
        }
        assert_eq!((boost("off"), boost("50")), (Ok(Boost::Off), Ok(Boost::Percent(50.0))));
        assert!(boost("on").is_err() && percent("0").is_err() && scan_time("0").is_err() && scan_time("inf").is_err());
    }
}
