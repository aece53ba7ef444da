//! What each setting means, and what the kernel takes.

use crate::knob::Knob;

/// What is to be known of a setting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct About {
    /// In what it is counted; empty for words and switches.
    pub unit: &'static str,
    /// What is taken.
    pub takes: Takes,
    /// What it does, in one line.
    pub meaning: &'static str,
}

/// What a setting takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    /// A number.
    Number {
        /// The smallest.
        least: u64,
        /// The largest.
        most: u64,
    },
    /// 0 or 1, or `off` or `on`.
    Switch,
    /// One of these words, which stand for 0, 1...
    Word(&'static [&'static str]),
}

const U32: u64 = u32::MAX as u64;
const INT: u64 = i32::MAX as u64;

impl Knob {
    /// What is to be known of it.
    #[must_use]
    pub fn about(self) -> About {
        let number = |least, most, unit, meaning| About { unit, takes: Takes::Number { least, most }, meaning };
        let switch = |meaning| About { unit: "", takes: Takes::Switch, meaning };
        match self {
            Self::Run => {
                number(0, 2, "", "0: ksmd stands still; 1: it merges; 2: everything is unmerged, then it stands still")
            }
            Self::PagesToScan => number(0, U32, "pages", "pages that ksmd compares before it sleeps"),
            Self::SleepMillisecs => number(0, U32, "ms", "for how long it sleeps then"),
            Self::SmartScan => switch("pages that did not merge before are passed over for some passes"),
            Self::UseZeroPages => switch("pages of zeros become the kernel's zero page, from now on"),
            Self::MaxPageSharing => number(2, INT, "mappings", "users of one merged page before a second copy is made"),
            Self::MergeAcrossNodes => switch("equal pages of different memory nodes are merged"),
            Self::StableNodeChainsPruneMillisecs => {
                number(0, U32, "ms", "between two full walks of the copies of one content")
            }
            Self::AdvisorMode => About {
                unit: "",
                takes: Takes::Word(&["none", "scan-time"]),
                meaning: "scan-time: the kernel sets pages_to_scan itself after each pass",
            },
            Self::AdvisorMaxCpu => number(1, 100, "% of a CPU", "the advisor lets ksmd use no more"),
            Self::AdvisorMinPagesToScan => number(1, U32, "pages", "where the advisor begins; it may go below"),
            Self::AdvisorMaxPagesToScan => number(1, U32, "pages", "the advisor goes no higher"),
            Self::AdvisorTargetScanTime => number(1, U32, "s", "the time of a pass that the advisor aims at"),
        }
    }
}
