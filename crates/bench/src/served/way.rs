//! The ways to merge.

use std::ffi::OsString;
use std::path::Path;

use clap::ValueEnum;
use ksm::{Advisor, Rate, Wanted};
use serde::Serialize;

/// A way to merge the memory of a group of workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// No merging.
    Plain,
    /// `pagefold run --scope all`.
    Pagefold,
    /// The same with `--layout shared`.
    Shared,
    /// Kernel KSM with the kernel's own settings: 100 pages every 20 ms.
    Ksm,
    /// Kernel KSM without pauses.
    KsmFlatOut,
    /// The same, with the layout that `--layout shared` gives.
    KsmFlatOutShared,
    /// Kernel KSM with the kernel's advisor (`advisor_mode` scan-time).
    KsmAdvisor,
}

impl Way {
    /// The name in reports.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Pagefold => "pagefold",
            Self::Shared => "pagefold, shared layout",
            Self::Ksm => "ksmd default",
            Self::KsmFlatOut => "ksmd flat out",
            Self::KsmFlatOutShared => "ksmd flat out, shared layout",
            Self::KsmAdvisor => "ksmd with the kernel's advisor",
        }
    }

    /// pagefold merges.
    pub(super) const fn is_ours(self) -> bool {
        matches!(self, Self::Pagefold | Self::Shared)
    }

    /// All workers have their memory at the same addresses, whoever merges it.
    pub(super) const fn is_shared_layout(self) -> bool {
        matches!(self, Self::Shared | Self::KsmFlatOutShared)
    }

    /// What is asked of ksmd, where it merges. Everything else stays as the administrator has it. `scan_time` is the
    /// advisor's goal in seconds; its other numbers are the kernel's defaults.
    pub(super) fn wanted(self, scan_time: u32) -> Option<Wanted> {
        let scans = Wanted { run: Some(true), ..Wanted::default() };
        match self {
            Self::Plain | Self::Pagefold | Self::Shared => None,
            Self::Ksm => Some(Wanted { rate: Some(Rate { pages_to_scan: 100, sleep_millisecs: 20 }), ..scans }),
            Self::KsmFlatOut | Self::KsmFlatOutShared => Some(Wanted { rate: Some(Rate::FLAT_OUT), ..scans }),
            Self::KsmAdvisor => Some(Wanted {
                advisor: Some(Advisor {
                    target_scan_time: scan_time,
                    max_cpu: 70,
                    min_pages_to_scan: 500,
                    max_pages_to_scan: 30_000,
                }),
                ..scans
            }),
        }
    }

    /// Words in front of the command, where pagefold merges.
    pub(super) fn prefix(self, pagefold: &Path, options: &[OsString], summary: &Path) -> Vec<OsString> {
        if !self.is_ours() {
            return Vec::new();
        }
        let mut words = vec![pagefold.into(), "run".into(), "--quiet".into(), "--scope".into(), "all".into()];
        if self == Self::Shared {
            words.extend(["--layout".into(), "shared".into()]);
        }
        words.extend(options.iter().cloned());
        words.extend(["--summary".into(), summary.into(), "--".into()]);
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_is_merged_by_one_or_by_nobody() {
        for way in Way::value_variants() {
            let prefix = way.prefix(Path::new("pagefold"), &["--strict".into()], Path::new("summary"));
            assert_eq!(!prefix.is_empty(), way.is_ours());
            let wanted = way.wanted(20);
            assert_eq!(wanted.is_some(), !way.is_ours() && *way != Way::Plain);
            assert!(wanted.is_none_or(|wanted| wanted.run == Some(true) && wanted.smart_scan.is_none()));
        }
        let shared =
            Way::Shared.prefix(Path::new("pagefold"), &["--strict".into()], Path::new("summary")).join(" ".as_ref());
        let words = "pagefold run --quiet --scope all --layout shared --strict --summary summary --";
        assert_eq!(shared, OsString::from(words));
    }
}
