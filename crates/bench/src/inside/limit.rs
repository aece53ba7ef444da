//! A memory limit that is nearly reached, in a cgroup of version 2: the helper would be put to sleep with pages in its
//! hands, so the process is left alone until there is room.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use pagefold::{Flags, MergeReport, Partition, Range};
use serde::Serialize;

use super::pages::{Pages, fill, size, wrong};

/// Pages of each of two areas that hold the same.
const PAGES: usize = 2048;
/// Pages that are like no others.
const PROBE: usize = 64;
/// Pages written each time that the limit is near: half a megabyte, for which the kernel makes nobody wait long.
const WRITTEN: usize = 128;
/// Times that the limit comes near and is raised.
const ROUNDS: u64 = 3;
/// The reason for leaving a process alone.
const REASON: &str = "memory_limit_near";
/// The broker looks at its members' limits every two seconds.
const NOTICED_WITHIN: Duration = Duration::from_secs(60);

/// What was seen.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Pages refused while the limit was near, by reason.
    pub refused: BTreeMap<String, u64>,
    /// Pages that were merged all the same.
    pub merged_near: u64,
    /// Pages merged while there was room, over all rounds.
    pub merged: u64,
    /// Rounds in which something was merged once there was room.
    pub rounds: u64,
    /// Times that the kernel found the cgroup above `memory.high`.
    pub times_above: u64,
    /// The longest that a request for merging took, in seconds.
    pub longest: f64,
    /// Pages that ever held a wrong byte.
    pub wrong: u64,
}

/// Does it.
///
/// # Errors
/// Without a memory controller of version 2, or when the limit is not noticed.
pub fn run() -> Result<Report> {
    let group = Group::join()?;
    let partition = Partition::open("limit", Flags::default())?;
    let mut report = Report::default();
    let (mut one, two) = (Pages::filled(PAGES, 1)?, Pages::filled(PAGES, 1)?);
    // Asked for alone it costs no memory, whatever the limit: there is no page like it.
    let alone = Pages::filled(PROBE, 2)?;
    let probe = [alone.range()?];
    let both = [one.range()?, two.range()?];
    let mut ask = Asking { partition: &partition, longest: Duration::ZERO };
    // Becoming a member needs memory as well: that is over before the limit comes near.
    ask.once(&probe)?;
    for _ in 0..ROUNDS {
        group.tighten()?;
        ask.until(&probe, |merged| merged.refused.contains_key(REASON))?;
        // Writing to merged pages needs memory. Afterwards there is something to merge.
        let written = &mut one.bytes_mut()[..WRITTEN * size()];
        fill(written, 3, 0);
        report.wrong += wrong(written, 3, 0);
        fill(written, 1, 0);
        let near = ask.once(&both)?;
        report.merged_near += near.pages_merged;
        for (reason, pages) in near.refused {
            *report.refused.entry(reason).or_default() += pages;
        }
        report.wrong += wrong(one.bytes(), 1, 0) + wrong(two.bytes(), 1, 0);
        group.relax()?;
        report.merged += ask.until(&both, |merged| merged.pages_merged > 0)?.pages_merged;
        report.rounds += 1;
        report.wrong += wrong(one.bytes(), 1, 0) + wrong(two.bytes(), 1, 0);
    }
    report.longest = ask.longest.as_secs_f64();
    report.times_above = group.times_above()?;
    Ok(report)
}

/// Requests for merging.
struct Asking<'a> {
    partition: &'a Partition,
    longest: Duration,
}

impl Asking<'_> {
    fn once(&mut self, ranges: &[Range]) -> Result<MergeReport> {
        let begun = Instant::now();
        let report = self.partition.merge_all(ranges)?;
        self.longest = self.longest.max(begun.elapsed());
        Ok(report)
    }

    /// Asks again and again; returns the report that was waited for.
    fn until(&mut self, ranges: &[Range], wanted: impl Fn(&MergeReport) -> bool) -> Result<MergeReport> {
        let begun = Instant::now();
        loop {
            let report = self.once(ranges)?;
            if wanted(&report) {
                return Ok(report);
            }
            if begun.elapsed() > NOTICED_WITHIN {
                bail!("the memory limit makes no difference: {report:?}");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// A cgroup of version 2 with this process in it. It stays: its process is in it to the end.
struct Group {
    folder: PathBuf,
}

impl Group {
    fn join() -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        write(&root.join("cgroup.subtree_control"), "+memory")?;
        let folder = root.join("pagefold-inside");
        fs::create_dir(&folder).with_context(|| format!("create {}", folder.display()))?;
        write(&folder.join("cgroup.procs"), "0")?;
        Ok(Self { folder })
    }

    /// Leaves one percent of what is used as room, a fifth of what pagefold wants to see.
    fn tighten(&self) -> Result<()> {
        let file = self.folder.join("memory.current");
        let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let used: u64 = text.trim().parse().with_context(|| format!("{} is no number", file.display()))?;
        write(&self.folder.join("memory.high"), &(used + used / 100).to_string())
    }

    fn relax(&self) -> Result<()> {
        write(&self.folder.join("memory.high"), "max")
    }

    fn times_above(&self) -> Result<u64> {
        let text = fs::read_to_string(self.folder.join("memory.events")).context("read memory.events")?;
        let high =
            text.lines().find_map(|line| line.strip_prefix("high ")).context("memory.events has no line high")?;
        high.parse().context("memory.events counts")
    }
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("write {text} to {}", file.display()))
}
