//! `NAME=VALUE`.

use crate::about::Takes;
use crate::knob::{AdvisorMode, Knob};

/// Words that are no setting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadSetting {
    /// No equals sign.
    #[error("{text:?} is not NAME=VALUE, as in sleep_millisecs=20")]
    NoEquals {
        /// As it was given.
        text: String,
    },
    /// A file that can only be read, or none.
    #[error("{name:?} is no setting of KSM that can be written; they are {}", names())]
    Unknown {
        /// As it was given.
        name: String,
    },
    /// A value that the kernel would refuse, or take for something else.
    #[error("{knob} takes {takes}, not {value:?}")]
    Value {
        /// The setting.
        knob: Knob,
        /// As it was given.
        value: String,
        /// What it takes.
        takes: String,
    },
}

fn names() -> String {
    Knob::ALL.map(Knob::file_name).join(", ")
}

/// Reads one `NAME=VALUE`, with the kernel's name.
///
/// A number may have its unit (`20ms`, `200s`, `50%`, `100pages`), as long as it is the setting's own: the kernel knows no
/// other. A switch is `0` or `1`, `off` or `on`.
///
/// # Errors
/// [`BadSetting`].
pub fn parse(text: &str) -> Result<(Knob, u64), BadSetting> {
    let (name, value) = text.split_once('=').ok_or_else(|| BadSetting::NoEquals { text: text.to_owned() })?;
    let knob = Knob::ALL.into_iter().find(|knob| knob.file_name() == name);
    let knob = knob.ok_or_else(|| BadSetting::Unknown { name: name.to_owned() })?;
    let bad = || BadSetting::Value { knob, value: value.to_owned(), takes: takes(knob) };
    let number = match knob.about().takes {
        Takes::Number { least, most } => {
            let digits = value.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(value.len());
            let (digits, unit) = value.split_at(digits);
            let number = digits.parse().ok().filter(|number| (least..=most).contains(number));
            number.filter(|_| unit.is_empty() || is_unit(knob, unit)).ok_or_else(bad)?
        }
        Takes::Switch => match value {
            "0" | "off" => 0,
            "1" | "on" => 1,
            _ => return Err(bad()),
        },
        Takes::Word(words) => words.iter().zip(0..).find(|(word, _)| **word == value).ok_or_else(bad)?.1,
    };
    Ok((knob, number))
}

fn is_unit(knob: Knob, unit: &str) -> bool {
    let short = knob.about().unit.split(' ').next().unwrap_or_default();
    !short.is_empty() && unit == short
}

/// What a setting takes, for people.
fn takes(knob: Knob) -> String {
    let about = knob.about();
    match about.takes {
        Takes::Number { least, most } if about.unit.is_empty() => format!("{least} to {most}"),
        Takes::Number { least, most } => format!("{least} to {most} {}", about.unit),
        Takes::Switch => "0 or 1 (off or on)".to_owned(),
        Takes::Word(words) => words.join(" or "),
    }
}

/// A value as the kernel writes it: a word where it has words.
#[must_use]
pub fn word(knob: Knob, value: u64) -> String {
    match knob {
        Knob::AdvisorMode if value == u64::from(AdvisorMode::ScanTime) => AdvisorMode::ScanTime.word().to_owned(),
        Knob::AdvisorMode => AdvisorMode::None.word().to_owned(),
        _ => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_names_and_each_settings_own_unit() {
        for (text, knob, value) in [
            ("sleep_millisecs=20", Knob::SleepMillisecs, 20),
            ("sleep_millisecs=20ms", Knob::SleepMillisecs, 20),
            ("advisor_target_scan_time=200s", Knob::AdvisorTargetScanTime, 200),
            ("advisor_max_cpu=50%", Knob::AdvisorMaxCpu, 50),
            ("smart_scan=off", Knob::SmartScan, 0),
            ("advisor_mode=scan-time", Knob::AdvisorMode, 1),
            ("run=2", Knob::Run, 2),
            ("max_page_sharing=2147483647", Knob::MaxPageSharing, 2_147_483_647),
        ] {
            assert_eq!(parse(text), Ok((knob, value)), "{text}");
        }
    }

    #[test]
    fn what_the_kernel_would_refuse_or_misread_is_refused_with_what_it_takes() {
        for text in [
            "sleep_millisecs=20s",
            "sleep_millisecs=-1",
            "sleep_millisecs=",
            "sleep_millisecs= 20",
            "pages_to_scan=4294967296",
            "pages_to_scan=1e3",
            "max_page_sharing=1",
            "max_page_sharing=2147483648",
            "advisor_target_scan_time=0",
            "advisor_mode=scan_time",
            "smart_scan=2",
            "run=3",
        ] {
            assert!(matches!(parse(text), Err(BadSetting::Value { .. })), "{text}");
        }
        let message = parse("max_page_sharing=1").map_err(|error| error.to_string());
        assert_eq!(message, Err("max_page_sharing takes 2 to 2147483647 mappings, not \"1\"".to_owned()));
        assert!(matches!(parse("run"), Err(BadSetting::NoEquals { .. })));
        assert!(matches!(parse("full_scans=0"), Err(BadSetting::Unknown { .. })));
    }

    #[test]
    fn what_is_shown_can_be_given_back() {
        for knob in Knob::ALL {
            let least = match knob.about().takes {
                Takes::Number { least, .. } => least,
                Takes::Switch | Takes::Word(_) => 1,
            };
            assert_eq!(parse(&format!("{knob}={}", word(knob, least))), Ok((knob, least)));
        }
    }
}
