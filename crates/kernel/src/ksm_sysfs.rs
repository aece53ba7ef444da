//! The kernel's own samepage merging: its files under /sys/kernel/mm/ksm, a process's ksm_stat, and the prctl.
//!
//! A file that a kernel lacks is `None`. The names are the kernel's.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use thiserror::Error;

use crate::procfs::{self, ProcError};
use crate::sys;
use crate::units::Pid;

/// What can go wrong with KSM's files.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum KsmError {
    /// A file could not be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A file could not be written: EACCES without root, EBUSY while pages are shared, EINVAL for a bad value.
    #[error("cannot write {value:?} to {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The value.
        value: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process-wide switch could not be read or set.
    #[error("cannot get or set merging for the whole process")]
    Prctl {
        /// What the kernel said.
        source: io::Error,
    },
}

/// The settings, by file name, in the order in which they can be written back.
pub const KNOBS: [&str; 13] = [
    "max_page_sharing",
    "merge_across_nodes",
    "stable_node_chains_prune_millisecs",
    "use_zero_pages",
    "smart_scan",
    "advisor_max_cpu",
    "advisor_min_pages_to_scan",
    "advisor_max_pages_to_scan",
    "advisor_target_scan_time",
    "advisor_mode",
    "pages_to_scan",
    "sleep_millisecs",
    "run",
];

/// KSM's directory.
#[derive(Clone, Debug)]
pub struct KsmSysfs {
    root: PathBuf,
}

impl KsmSysfs {
    /// The running kernel's.
    #[must_use]
    pub fn host() -> Self {
        Self::at("/sys/kernel/mm/ksm")
    }

    /// Another directory that looks like it.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// True if the kernel has KSM.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.root.join("run").exists()
    }

    /// The content of a file without its line end, `None` if there is no such file.
    ///
    /// # Errors
    /// [`KsmError::Read`].
    pub fn read(&self, name: &str) -> Result<Option<String>, KsmError> {
        let path = self.root.join(name);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text.trim_end().to_owned())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(KsmError::Read { path, source }),
        }
    }

    /// The value of a file that can be written back: of `[none] scan-time` the word in brackets.
    ///
    /// # Errors
    /// [`KsmError::Read`].
    pub fn knob(&self, name: &str) -> Result<Option<String>, KsmError> {
        let text = self.read(name)?;
        Ok(text.map(|text| match text.split_once('[').and_then(|(_, rest)| rest.split_once(']')) {
            Some((chosen, _)) => chosen.to_owned(),
            None => text,
        }))
    }

    /// A number, `None` if there is no such file.
    ///
    /// # Errors
    /// [`KsmError::Read`], also with [`io::ErrorKind::InvalidData`] for what is no number.
    pub fn number(&self, name: &str) -> Result<Option<i64>, KsmError> {
        let Some(text) = self.read(name)? else { return Ok(None) };
        // Some kernels print a counter that is below zero without its sign.
        match text.parse().or_else(|error| text.parse().map(u64::cast_signed).or(Err(error))) {
            Ok(number) => Ok(Some(number)),
            Err(error) => {
                let source = io::Error::new(io::ErrorKind::InvalidData, error);
                Err(KsmError::Read { path: self.root.join(name), source })
            }
        }
    }

    /// Writes a setting. Writing 2 to `run` un-merges everything before it returns.
    ///
    /// # Errors
    /// [`KsmError::Write`].
    pub fn write(&self, name: &str, value: &str) -> Result<(), KsmError> {
        let path = self.root.join(name);
        // Never created: these are files of the kernel, or of a test's tree.
        let file = std::fs::File::options().write(true).truncate(true).open(&path);
        let result = file.and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
        result.map_err(|source| KsmError::Write { path, value: value.to_owned(), source })
    }

    /// All settings that this kernel has, in the order of [`KNOBS`].
    ///
    /// # Errors
    /// [`KsmError::Read`].
    pub fn knobs(&self) -> Result<Vec<(&'static str, String)>, KsmError> {
        let mut out = Vec::new();
        for name in KNOBS {
            if let Some(value) = self.knob(name)? {
                out.push((name, value));
            }
        }
        Ok(out)
    }

    /// All counters. They are read one after the other, so they need not fit together while ksmd runs.
    ///
    /// # Errors
    /// [`KsmError::Read`].
    pub fn counters(&self) -> Result<KsmCounters, KsmError> {
        let count = |name: &str| -> Result<Option<u64>, KsmError> {
            Ok(self.number(name)?.map(|value| u64::try_from(value).unwrap_or(0)))
        };
        let zero_pages = self.number("ksm_zero_pages")?;
        Ok(KsmCounters {
            pages_shared: count("pages_shared")?,
            pages_sharing: count("pages_sharing")?,
            pages_unshared: count("pages_unshared")?,
            pages_volatile: count("pages_volatile")?,
            pages_scanned: count("pages_scanned")?,
            pages_skipped: count("pages_skipped")?,
            full_scans: count("full_scans")?,
            ksm_zero_pages: zero_pages.and_then(|pages| u64::try_from(pages).ok()),
            ksm_zero_pages_drift: zero_pages.filter(|pages| *pages < 0),
            stable_node_chains: count("stable_node_chains")?,
            stable_node_dups: count("stable_node_dups")?,
            general_profit: self.number("general_profit")?,
        })
    }
}

/// KSM's counters; pages unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KsmCounters {
    /// Pages that are shared, each counted once.
    pub pages_shared: Option<u64>,
    /// Further users of them: pages saved.
    pub pages_sharing: Option<u64>,
    /// Pages looked at that have no equal.
    pub pages_unshared: Option<u64>,
    /// Pages that change too fast, were passed over or are new.
    pub pages_volatile: Option<u64>,
    /// Pages looked at since boot.
    pub pages_scanned: Option<u64>,
    /// Pages passed over by smart scan since boot.
    pub pages_skipped: Option<u64>,
    /// Passes; set to 0 when 2 is written to `run`.
    pub full_scans: Option<u64>,
    /// Pages replaced by the zero page; `None` also where that is not known, as the counter has drifted.
    pub ksm_zero_pages: Option<u64>,
    /// What the kernel has for it if that is below zero: it has taken off pages that it had not put on. The drift is in
    /// `general_profit` too.
    pub ksm_zero_pages_drift: Option<i64>,
    /// Contents with more users than `max_page_sharing`.
    pub stable_node_chains: Option<u64>,
    /// Their copies.
    pub stable_node_dups: Option<u64>,
    /// Bytes saved less bytes of bookkeeping.
    pub general_profit: Option<i64>,
}

/// /proc/PID/ksm_stat.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KsmStat {
    /// Pages that ksmd keeps a record of.
    pub ksm_rmap_items: Option<u64>,
    /// Pages replaced by the zero page.
    pub ksm_zero_pages: Option<u64>,
    /// Pages that are merged, the first of each content too.
    pub ksm_merging_pages: Option<u64>,
    /// Bytes saved less bytes of bookkeeping.
    pub ksm_process_profit: Option<i64>,
    /// The process-wide switch is on (Linux 6.16).
    pub ksm_merge_any: Option<bool>,
    /// Some mapping is mergeable (Linux 6.16).
    pub ksm_mergeable: Option<bool>,
}

/// What KSM does for a process.
///
/// # Errors
/// [`ProcError`]; [`ProcError::Gone`] also where the kernel has no such file.
pub fn ksm_stat(pid: Pid) -> Result<KsmStat, ProcError> {
    let mut buffer = Vec::new();
    procfs::read_into(pid, "ksm_stat", &mut buffer)?;
    Ok(parse_stat(&buffer))
}

fn parse_stat(bytes: &[u8]) -> KsmStat {
    let mut stat = KsmStat::default();
    for line in procfs::lines(bytes) {
        // Numbers follow a space, yes and no a colon and a space.
        let mut words = procfs::words(line);
        let (Some(key), Some(value)) = (words.next(), words.next()) else { continue };
        let yes = Some(value == b"yes");
        match key {
            b"ksm_rmap_items" => stat.ksm_rmap_items = procfs::decimal(value),
            b"ksm_zero_pages" => stat.ksm_zero_pages = procfs::decimal(value),
            b"ksm_merging_pages" => stat.ksm_merging_pages = procfs::decimal(value),
            b"ksm_process_profit" => {
                stat.ksm_process_profit = std::str::from_utf8(value).ok().and_then(|text| text.parse().ok());
            }
            b"ksm_merge_any:" => stat.ksm_merge_any = yes,
            b"ksm_mergeable:" => stat.ksm_mergeable = yes,
            _ => {}
        }
    }
    stat
}

const PR_SET_MEMORY_MERGE: i32 = 67;
const PR_GET_MEMORY_MERGE: i32 = 68;

/// Makes all memory of this process mergeable by ksmd, or un-merges it (PR_SET_MEMORY_MERGE, Linux 6.4). Children
/// inherit it, over exec too.
///
/// # Errors
/// [`KsmError::Prctl`]: EINVAL on older kernels, EPERM without CAP_SYS_RESOURCE.
pub fn set_memory_merge(on: bool) -> Result<(), KsmError> {
    prctl_memory_merge(on).map_err(|source| KsmError::Prctl { source })
}

/// As [`set_memory_merge`], one system call and no allocation, for use between fork and exec.
pub(crate) fn prctl_memory_merge(on: bool) -> io::Result<()> {
    let on = libc::c_ulong::from(on);
    // SAFETY: the call takes integers only.
    let result = unsafe { libc::prctl(PR_SET_MEMORY_MERGE, on, 0, 0, 0) };
    sys::check(result.into()).map(|_| ())
}

/// The switch of this process.
///
/// # Errors
/// [`KsmError::Prctl`].
pub fn memory_merge() -> Result<bool, KsmError> {
    // SAFETY: the call takes integers only.
    let result = unsafe { libc::prctl(PR_GET_MEMORY_MERGE, 0, 0, 0, 0) };
    sys::check(result.into()).map(|on| on == 1).map_err(|source| KsmError::Prctl { source })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn a_tree_with_few_files() {
        let tree = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("run", "0\n"),
            ("advisor_mode", "none [scan-time]\n"),
            ("pages_shared", "12\n"),
            ("general_profit", "-640\n"),
        ] {
            std::fs::write(tree.path().join(name), text).unwrap();
        }
        let ksm = KsmSysfs::at(tree.path());
        assert!(ksm.exists());
        assert_eq!(ksm.knobs().unwrap(), [("advisor_mode", "scan-time".to_owned()), ("run", "0".to_owned())]);
        let counters = ksm.counters().unwrap();
        assert_eq!((counters.pages_shared, counters.general_profit), (Some(12), Some(-640)));
        assert_eq!(counters.pages_sharing, None);
        ksm.write("run", "1").unwrap();
        assert_eq!(ksm.read("run").unwrap().unwrap(), "1");
        assert!(matches!(ksm.write("smart_scan", "1"), Err(KsmError::Write { .. })), "creates no file");
        assert!(matches!(ksm.number("advisor_mode"), Err(KsmError::Read { .. })));
        // Seen to fail: shown as 0, or not understood where it has no sign.
        for below_zero in ["-5\n", "18446744073709551611\n"] {
            std::fs::write(tree.path().join("ksm_zero_pages"), below_zero).unwrap();
            let counters = ksm.counters().unwrap();
            assert_eq!((counters.ksm_zero_pages, counters.ksm_zero_pages_drift), (None, Some(-5)));
        }
    }

    #[test]
    fn the_running_kernels_tree() {
        let ksm = KsmSysfs::host();
        if !ksm.exists() {
            println!("skipped: KSM");
            return;
        }
        assert!(ksm.knobs().unwrap().iter().any(|(name, _)| *name == "run"));
        assert!(ksm.counters().unwrap().pages_shared.is_some());
        let stat = ksm_stat(Pid::this()).unwrap();
        assert!(stat.ksm_merging_pages.is_some() && stat.ksm_rmap_items.is_some());
    }

    #[test]
    fn both_kinds_of_lines_of_a_stat() {
        let stat = parse_stat(b"ksm_rmap_items 3\nksm_process_profit -192\nksm_merge_any: no\nksm_mergeable: yes\n");
        assert_eq!((stat.ksm_rmap_items, stat.ksm_process_profit), (Some(3), Some(-192)));
        assert_eq!((stat.ksm_merge_any, stat.ksm_mergeable), (Some(false), Some(true)));
        assert_eq!(stat.ksm_zero_pages, None);
    }
}
