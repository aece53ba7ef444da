//! Settings to be tried, and how they are written down.
use std::time::Duration;

use serde::Serialize;

use crate::advise::Goals;
use crate::knob::Knob;
use crate::set::{self, BadSetting};
use crate::wanted::{Advisor, Rate, Wanted};

/// One way for ksmd to work.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    /// What it is called in reports.
    pub name: String,
    /// What it is.
    pub how: How,
}

/// Who sets the pace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum How {
    /// ksmd is stopped: what the others are measured against.
    Off,
    /// Fixed settings, or the kernel's advisor.
    Fixed(Wanted),
    /// Our own advisor.
    Advised(Goals),
}

/// A setting is not written as it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SettingError {
    /// A word that is no `KEY=VALUE`.
    #[error("{0:?} is not KEY=VALUE")]
    Form(String),
    /// A key that there is not.
    #[error("there is no {0:?}: {KEYS}")]
    Key(String),
    /// What `ksm set` would not take either.
    #[error(transparent)]
    Set(#[from] BadSetting),
    /// A value that the key does not take.
    #[error("{key} cannot be {value:?}: it takes {takes}")]
    Value {
        /// The key.
        key: String,
        /// What was given.
        value: String,
        /// What it takes.
        takes: &'static str,
    },
    /// Keys that do not go together.
    #[error("{0}")]
    Together(&'static str),
    /// Nothing to try.
    #[error("there is no setting in it")]
    Empty,
    /// The same twice.
    #[error("{0:?} is there twice")]
    Twice(String),
    /// More combinations than anybody would wait for.
    #[error("{0} combinations are more than the {MOST} that a sweep takes")]
    Many(usize),
}

/// Most settings of a sweep.
pub const MOST: usize = 200;

const KEYS: &str = "off, pages_to_scan, sleep_millisecs, smart_scan, use_zero_pages, max_page_sharing, \
    merge_across_nodes, advisor_mode, advisor_target_scan_time, advisor_max_cpu, advisor_min_pages_to_scan, \
    advisor_max_pages_to_scan, advise_scan_time, advise_max_cpu, advise_boost";

impl Setting {
    /// Reads `KEY=VALUE` words, separated by spaces or commas, with the files' names of `/sys/kernel/mm/ksm`; the word
    /// `off`; or `advise_scan_time=SECONDS`, `advise_max_cpu=PERCENT` and `advise_boost=PERCENT` for our advisor. `name:`
    /// may stand before it.
    ///
    /// # Errors
    /// [`SettingError`].
    pub fn parse(text: &str) -> Result<Self, SettingError> {
        let (name, words) = match text.split_once(':') {
            Some((name, words)) => (Some(name.trim()), words),
            None => (None, text),
        };
        let words: Vec<&str> = words.split([',', ' ', '\t']).filter(|word| !word.is_empty()).collect();
        let how = match words[..] {
            [] => return Err(SettingError::Empty),
            ["off" | "run=0"] => How::Off,
            _ => Draft::read(&words)?.how()?,
        };
        let name = name.filter(|name| !name.is_empty()).map_or_else(|| words.join(" "), ToOwned::to_owned);
        Ok(Self { name, how })
    }

    /// Reads one setting a line; empty lines and those that begin with `#` are passed over.
    ///
    /// # Errors
    /// [`SettingError`] with the line's number.
    pub fn parse_lines(text: &str) -> Result<Vec<Self>, (usize, SettingError)> {
        let mut all: Vec<Self> = Vec::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let setting = Self::parse(line).map_err(|error| (number + 1, error))?;
            if all.iter().any(|other| other.name == setting.name) {
                return Err((number + 1, SettingError::Twice(setting.name)));
            }
            all.push(setting);
        }
        match all.len() {
            0 => Err((0, SettingError::Empty)),
            many if many > MOST => Err((0, SettingError::Many(many))),
            _ => Ok(all),
        }
    }

    /// All combinations of `KEY=VALUE,VALUE...` axes, and one with ksmd off.
    ///
    /// # Errors
    /// [`SettingError`].
    pub fn grid(axes: &[String]) -> Result<Vec<Self>, SettingError> {
        let mut combinations = vec![String::new()];
        for axis in axes {
            let (key, values) = axis.split_once('=').ok_or_else(|| SettingError::Form(axis.clone()))?;
            let values: Vec<&str> = values.split(',').collect();
            let many = combinations.len() * values.len();
            if many > MOST {
                return Err(SettingError::Many(many));
            }
            combinations = combinations
                .iter()
                .flat_map(|before| values.iter().map(move |value| format!("{before} {key}={value}")))
                .collect();
        }
        let mut all = vec![Self { name: "off".to_owned(), how: How::Off }];
        for text in combinations {
            let setting = Self::parse(&text)?;
            if all.iter().any(|other| other.name == setting.name) {
                return Err(SettingError::Twice(setting.name));
            }
            all.push(setting);
        }
        Ok(all)
    }

    /// Settings to try where nobody names any: off, the kernel's own, batches with and without skipping, the kernel's
    /// advisor and ours with the same goals.
    #[must_use]
    pub fn usual() -> Vec<Self> {
        const USUAL: [&str; 8] = [
            "off",
            "the kernel's default: pages_to_scan=100 sleep_millisecs=20 smart_scan=1",
            "pages_to_scan=1000 sleep_millisecs=20 smart_scan=1",
            "pages_to_scan=1000 sleep_millisecs=20 smart_scan=0",
            "pages_to_scan=4000 sleep_millisecs=20 smart_scan=1",
            "pages_to_scan=4000 sleep_millisecs=20 smart_scan=0",
            "the kernel's advisor: advisor_mode=scan-time advisor_target_scan_time=5 advisor_max_cpu=70",
            "pagefold's advisor: advise_scan_time=5 advise_max_cpu=70",
        ];
        USUAL.iter().map(|text| Self::parse(text).expect("what is written here can be read")).collect()
    }

    /// The files that it names, which a kernel may lack. A fixed rate rules out an advisor that is not there either.
    pub(super) fn named(&self) -> impl Iterator<Item = Knob> {
        let wanted = match self.how {
            How::Fixed(wanted) => wanted,
            How::Off | How::Advised(_) => Wanted::default(),
        };
        [
            (wanted.smart_scan.is_some(), Knob::SmartScan),
            (wanted.use_zero_pages.is_some(), Knob::UseZeroPages),
            (wanted.merge_across_nodes.is_some(), Knob::MergeAcrossNodes),
            (wanted.max_page_sharing.is_some(), Knob::MaxPageSharing),
            (wanted.advisor.is_some(), Knob::AdvisorMode),
        ]
        .into_iter()
        .filter_map(|(named, knob)| named.then_some(knob))
    }

    /// What is asked of ksmd at the start; our advisor asks itself.
    pub(super) fn wanted(&self) -> Wanted {
        match self.how {
            How::Off | How::Advised(_) => Wanted { run: Some(false), governs: true, ..Wanted::default() },
            How::Fixed(wanted) => wanted,
        }
    }
}

/// What has been read of a setting.
#[derive(Default)]
struct Draft {
    wanted: Wanted,
    pages_to_scan: Option<u32>,
    sleep_millisecs: Option<u32>,
    advisor_on: bool,
    advisor: Option<Advisor>,
    goals: Option<Goals>,
}

const USUAL_ADVISOR: Advisor =
    Advisor { target_scan_time: 200, max_cpu: 70, min_pages_to_scan: 500, max_pages_to_scan: 30_000 };

impl Draft {
    fn read(words: &[&str]) -> Result<Self, SettingError> {
        let mut draft = Self::default();
        let mut keys = Vec::new();
        for word in words {
            let (key, value) = word.split_once('=').ok_or_else(|| SettingError::Form((*word).to_owned()))?;
            if keys.contains(&key) {
                return Err(SettingError::Twice(key.to_owned()));
            }
            keys.push(key);
            match Knob::ALL.into_iter().find(|knob| knob.file_name() == key) {
                Some(_) => {
                    let (knob, value) = set::parse(word)?;
                    draft.set(knob, u32::try_from(value).expect("no file of KSM's takes more"))?;
                }
                None => draft.take(key, value)?,
            }
        }
        Ok(draft)
    }

    /// A file of KSM's, with a value that it takes.
    fn set(&mut self, knob: Knob, value: u32) -> Result<(), SettingError> {
        let on = value == 1;
        match knob {
            Knob::PagesToScan if value == 0 => {
                let takes = "a whole number above 0: without pages nothing is measured, and `off` does that";
                return Err(SettingError::Value { key: knob.to_string(), value: value.to_string(), takes });
            }
            Knob::PagesToScan => self.pages_to_scan = Some(value),
            Knob::SleepMillisecs => self.sleep_millisecs = Some(value),
            Knob::SmartScan => self.wanted.smart_scan = Some(on),
            Knob::UseZeroPages => self.wanted.use_zero_pages = Some(on),
            Knob::MergeAcrossNodes => self.wanted.merge_across_nodes = Some(on),
            Knob::MaxPageSharing => self.wanted.max_page_sharing = Some(value),
            Knob::AdvisorMode => self.advisor_on = on,
            Knob::AdvisorTargetScanTime => self.advisor().target_scan_time = value,
            Knob::AdvisorMaxCpu => self.advisor().max_cpu = value,
            Knob::AdvisorMinPagesToScan => self.advisor().min_pages_to_scan = value,
            Knob::AdvisorMaxPagesToScan => self.advisor().max_pages_to_scan = value,
            Knob::Run | Knob::StableNodeChainsPruneMillisecs => return Err(SettingError::Key(knob.to_string())),
        }
        Ok(())
    }

    /// A goal of our advisor.
    fn take(&mut self, key: &str, value: &str) -> Result<(), SettingError> {
        let wrong = |takes| SettingError::Value { key: key.to_owned(), value: value.to_owned(), takes };
        let real = |least: f64, most: f64, takes| {
            value.parse().ok().filter(|number| (least..=most).contains(number)).ok_or_else(|| wrong(takes))
        };
        match key {
            "advise_scan_time" => {
                self.goals().scan_time = Duration::from_secs_f64(real(0.05, 1e7, "seconds from 0.05")?);
            }
            "advise_max_cpu" => self.goals().max_cpu = real(0.01, 100.0, "per cent from 0.01 to 100")? / 100.0,
            "advise_boost" => self.goals().boost = Some(real(0.01, 100.0, "per cent from 0.01 to 100")? / 100.0),
            _ => return Err(SettingError::Key(key.to_owned())),
        }
        Ok(())
    }

    fn advisor(&mut self) -> &mut Advisor {
        self.advisor.get_or_insert(USUAL_ADVISOR)
    }

    fn goals(&mut self) -> &mut Goals {
        self.goals.get_or_insert_with(Goals::default)
    }

    fn how(self) -> Result<How, SettingError> {
        let fixed = self.pages_to_scan.is_some() || self.sleep_millisecs.is_some();
        if let Some(goals) = self.goals {
            if fixed || self.advisor_on || self.advisor.is_some() || self.wanted != Wanted::default() {
                return Err(SettingError::Together("advise_scan_time and the like go with no file of KSM's"));
            }
            // A boost that is not said is what the ceiling allows.
            let said = goals.boost.filter(|&boost| Some(boost) != Goals::default().boost);
            return Ok(How::Advised(Goals { boost: said.or(Some(goals.max_cpu)), ..goals }));
        }
        if self.advisor_on && self.pages_to_scan.is_some() {
            return Err(SettingError::Together(
                "pages_to_scan is the advisor's to set while advisor_mode is scan-time",
            ));
        }
        if self.advisor.is_some() && !self.advisor_on {
            return Err(SettingError::Together("advisor numbers mean nothing without advisor_mode=scan-time"));
        }
        let rate = (!self.advisor_on).then_some(Rate {
            pages_to_scan: self.pages_to_scan.unwrap_or(100),
            sleep_millisecs: self.sleep_millisecs.unwrap_or(20),
        });
        let advisor = self.advisor_on.then(|| self.advisor.unwrap_or(USUAL_ADVISOR));
        if self.advisor_on && self.sleep_millisecs.is_some() {
            return Err(SettingError::Together("sleep_millisecs beside an advisor cannot be asked for here"));
        }
        Ok(How::Fixed(Wanted { run: Some(true), governs: true, rate, advisor, ..self.wanted }))
    }
}

impl Serialize for Setting {
    /// Its name and what makes it.
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeMap as _;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", &self.name)?;
        match &self.how {
            How::Off => map.serialize_entry("kind", "off")?,
            How::Fixed(wanted) => {
                map.serialize_entry("kind", "fixed")?;
                map.serialize_entry("wanted", wanted)?;
            }
            How::Advised(goals) => {
                map.serialize_entry("kind", "advised")?;
                map.serialize_entry("target_scan_time_seconds", &goals.scan_time.as_secs_f64())?;
                map.serialize_entry("max_cpu_percent", &(goals.max_cpu * 100.0))?;
                map.serialize_entry("boost_percent", &goals.boost.map(|boost| boost * 100.0))?;
            }
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn what_can_be_written_down() {
        let setting = Setting::parse("quick: pages_to_scan=1000,sleep_millisecs=0 smart_scan=0").unwrap();
        assert_eq!(setting.name, "quick");
        let How::Fixed(wanted) = setting.how else { panic!("{setting:?}") };
        assert_eq!(wanted.rate, Some(Rate { pages_to_scan: 1000, sleep_millisecs: 0 }));
        assert_eq!((wanted.smart_scan, wanted.run, wanted.governs), (Some(false), Some(true), true));
        assert_eq!(Setting::parse("off").unwrap().how, How::Off);
        let units = Setting::parse("sleep_millisecs=20ms smart_scan=on use_zero_pages=1").unwrap();
        assert_eq!(units.named().collect::<Vec<_>>(), [Knob::SmartScan, Knob::UseZeroPages]);
        let How::Advised(goals) = Setting::parse("advise_scan_time=2.5 advise_max_cpu=1").unwrap().how else {
            panic!()
        };
        assert_eq!((goals.scan_time.as_secs_f64(), goals.max_cpu, goals.boost), (2.5, 0.01, Some(0.01)));
        assert_eq!(Setting::usual().len(), 8);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("", "no setting"),
            ("pages_to_scan", "KEY=VALUE"),
            ("pages_to_scan=0", "above 0"),
            ("pages_to_scan=x", "takes 0 to"),
            ("max_page_sharing=1", "takes 2 to"),
            ("speed=5", "there is no"),
            ("run=1", "there is no"),
            ("smart_scan=yes", "0 or 1"),
            // What `ksm set` does not take was taken here.
            ("pages_to_scan=+5", "takes 0 to"),
            ("max_page_sharing=4294967295", "takes 2 to"),
            ("advisor_mode=scan-time advisor_max_cpu=101", "takes 1 to 100"),
            ("pages_to_scan=5 pages_to_scan=6", "twice"),
            ("advise_max_cpu=5 advise_max_cpu=6", "twice"),
            ("advisor_mode=fast", "scan-time"),
            ("advisor_mode=scan-time pages_to_scan=5", "advisor's to set"),
            ("advisor_max_cpu=5", "without advisor_mode"),
            ("advise_max_cpu=200", "to 100"),
            ("advise_max_cpu=2 pages_to_scan=5", "no file"),
        ] {
            let error = Setting::parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{text:?}: {error}");
        }
        let lines = "# settings\n\na: off\nb: pages_to_scan=5\na: pages_to_scan=6\n";
        assert_eq!(Setting::parse_lines(lines).unwrap_err(), (5, SettingError::Twice("a".to_owned())));
        assert_eq!(Setting::parse_lines("# nothing\n").unwrap_err().1, SettingError::Empty);
    }

    #[test]
    fn a_grid_is_every_combination_and_off() {
        let axes = ["pages_to_scan=100,1000".to_owned(), "smart_scan=0,1".to_owned()];
        let names: Vec<String> = Setting::grid(&axes).unwrap().into_iter().map(|setting| setting.name).collect();
        assert_eq!(names[0], "off");
        assert_eq!(names[1..3], ["pages_to_scan=100 smart_scan=0", "pages_to_scan=100 smart_scan=1"]);
        assert_eq!(names.len(), 5);
        assert!(Setting::grid(&["pages_to_scan=5,5".to_owned()]).is_err());
        assert!(Setting::grid(&["pages_to_scan=".to_owned()]).is_err());
        assert!(Setting::grid(&["pages_to_scan=5,,6".to_owned()]).is_err());
        assert!(Setting::grid(&["pages_to_scan=5".to_owned(), "pages_to_scan=6".to_owned()]).is_err());
        let many: Vec<String> = (1..=300).map(|number| number.to_string()).collect();
        let many = format!("pages_to_scan={}", many.join(","));
        assert!(matches!(Setting::grid(&[many]), Err(SettingError::Many(300))));
    }
}
