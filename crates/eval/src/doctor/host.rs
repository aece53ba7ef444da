//! What there is to know about KSM on this host.

use std::fs::OpenOptions;
use std::io;
use std::time::{Duration, Instant};

use kernel::{Bytes, KsmCounters, KsmError, KsmSysfs, PageCount, ksm_sysfs};

use super::marked::Fleet;

/// Whether the settings can be changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Writable {
    /// They can, or there are none.
    #[default]
    Yes,
    /// They are on a file system that is mounted read-only.
    ReadOnly,
    /// Not by this user.
    NotPermitted,
}

/// KSM's settings; `None` where this kernel has none of that name. Names and units are the kernel's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// 0 stopped, 1 merging, 2 un-merged and stopped.
    pub run: Option<u64>,
    /// Pages in a batch.
    pub pages_to_scan: Option<u64>,
    /// Milliseconds between batches.
    pub sleep_millisecs: Option<u64>,
    /// Most users of one merged page.
    pub max_page_sharing: Option<u64>,
    /// Pages that found no equal are passed over for some passes.
    pub smart_scan: Option<u64>,
    /// 0: pages of different memory nodes are kept apart.
    pub merge_across_nodes: Option<u64>,
    /// `none` or `scan-time`.
    pub advisor_mode: Option<String>,
    /// Seconds that the advisor wants a pass to take.
    pub advisor_target_scan_time: Option<u64>,
    /// Most pages in a batch that the advisor sets.
    pub advisor_max_pages_to_scan: Option<u64>,
}

impl Settings {
    fn read(sysfs: &KsmSysfs) -> Result<Self, KsmError> {
        // A number that is negative is none of the kernel's.
        let number = |name| Ok::<_, KsmError>(sysfs.number(name)?.and_then(|value| u64::try_from(value).ok()));
        Ok(Self {
            run: number("run")?,
            pages_to_scan: number("pages_to_scan")?,
            sleep_millisecs: number("sleep_millisecs")?,
            max_page_sharing: number("max_page_sharing")?,
            smart_scan: number("smart_scan")?,
            merge_across_nodes: number("merge_across_nodes")?,
            advisor_mode: sysfs.knob("advisor_mode")?,
            advisor_target_scan_time: number("advisor_target_scan_time")?,
            advisor_max_pages_to_scan: number("advisor_max_pages_to_scan")?,
        })
    }

    /// The most pages that ksmd looks at in a second; `None` if nothing but the processor limits it.
    #[must_use]
    pub fn most_pages_per_second(&self) -> Option<f64> {
        let sleep = self.sleep_millisecs.filter(|sleep| *sleep > 0)?;
        Some(self.pages_to_scan? as f64 * 1000.0 / sleep as f64)
    }

    /// True if the advisor sets `pages_to_scan`.
    #[must_use]
    pub fn is_advised(&self) -> bool {
        self.advisor_mode.as_deref().is_some_and(|mode| mode != "none")
    }
}

/// What ksmd did while we watched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Look {
    /// How long that was.
    pub time: Duration,
    /// Pages that it compared.
    pub scanned: u64,
    /// Pages that smart scan passed over.
    pub skipped: u64,
}

/// All that is known about the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HostFacts {
    /// There is a KSM.
    pub present: bool,
    /// The kernel knows the prctl of KSM, so it has one even if its files are not to be seen.
    pub prctl: bool,
    /// Whether the settings can be changed.
    pub writable: Writable,
    /// The settings.
    pub settings: Settings,
    /// The counters, at the end of the look.
    pub counters: KsmCounters,
    /// What ksmd did meanwhile; `None` if it does not run.
    pub look: Option<Look>,
    /// Processes with mergeable memory.
    pub fleet: Fleet,
    /// Memory nodes.
    pub nodes: u64,
}

impl HostFacts {
    /// Looks at the host. Takes as long as `look` if ksmd runs; changes nothing.
    ///
    /// # Errors
    /// [`KsmError::Read`].
    pub fn observe(sysfs: &KsmSysfs, look: Duration) -> Result<Self, KsmError> {
        let present = sysfs.exists();
        let mut facts = Self { present, prctl: ksm_sysfs::memory_merge().is_ok(), nodes: nodes(), ..Self::default() };
        if !present {
            return Ok(facts);
        }
        facts.writable = writable(sysfs)?;
        facts.settings = Settings::read(sysfs)?;
        let before = sysfs.counters()?;
        let begin = Instant::now();
        facts.fleet = Fleet::observe();
        facts.counters = before;
        if facts.settings.run == Some(1) && !look.is_zero() {
            std::thread::sleep(look.saturating_sub(begin.elapsed()));
            facts.counters = sysfs.counters()?;
            let time = begin.elapsed();
            let grown = |after: Option<u64>, before: Option<u64>| Some(after?.saturating_sub(before?));
            // Without this counter (Linux 6.6) nothing was seen.
            facts.look = grown(facts.counters.pages_scanned, before.pages_scanned).map(|scanned| Look {
                time,
                scanned,
                skipped: grown(facts.counters.pages_skipped, before.pages_skipped).unwrap_or(0),
            });
        }
        Ok(facts)
    }

    /// Pages that ksmd keeps records of.
    #[must_use]
    pub fn records(&self) -> u64 {
        let counters = &self.counters;
        [counters.pages_shared, counters.pages_sharing, counters.pages_unshared, counters.pages_volatile]
            .iter()
            .map(|count| count.unwrap_or(0))
            .sum()
    }

    /// What a pass goes over: what ksmd has records of; before its first pass at most what processes with mergeable
    /// memory hold.
    #[must_use]
    pub fn pass(&self) -> PageCount {
        let held = self.fleet.anonymous().pages();
        if self.counters.full_scans.unwrap_or(0) > 0 { PageCount(self.records()) } else { held }
    }

    /// How fast ksmd goes, in pages a second, those counted that smart scan passes over: as seen, or else as the settings
    /// allow at most. `None` if nothing is known.
    #[must_use]
    pub fn pages_per_second(&self) -> Option<f64> {
        match self.look {
            Some(look) if look.scanned > 0 => {
                Some((look.scanned + look.skipped) as f64 / look.time.as_secs_f64().max(1e-3))
            }
            _ => self.settings.most_pages_per_second(),
        }
    }

    /// How long a pass takes about; `None` if that is not known or there is nothing to pass over.
    #[must_use]
    pub fn pass_time(&self) -> Option<Duration> {
        let rate = self.pages_per_second().filter(|rate| *rate > 0.0)?;
        let pages = self.pass().get();
        // A pass that never ends is as long as can be said.
        (pages > 0).then(|| Duration::try_from_secs_f64(pages as f64 / rate).unwrap_or(Duration::MAX))
    }

    /// The memory that ksmd looks at in a second by its settings at most, or what it did.
    #[must_use]
    pub fn bytes_per_second(&self) -> Option<Bytes> {
        self.pages_per_second().map(|pages| PageCount(pages as u64).bytes())
    }
}

/// Opens a setting as for writing, and does not write.
fn writable(sysfs: &KsmSysfs) -> Result<Writable, KsmError> {
    let path = sysfs.root().join("run");
    match OpenOptions::new().write(true).open(&path) {
        Ok(_) => Ok(Writable::Yes),
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => Ok(Writable::ReadOnly),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(Writable::NotPermitted),
        Err(source) => Err(KsmError::Read { path, source }),
    }
}

/// Memory nodes, 1 where the kernel does not show them.
fn nodes() -> u64 {
    let Ok(entries) = std::fs::read_dir("/sys/devices/system/node") else { return 1 };
    let names = entries.flatten().map(|entry| entry.file_name());
    let numbered = |name: &str| name.strip_prefix("node").is_some_and(|rest| rest.parse::<u32>().is_ok());
    (names.filter(|name| name.to_str().is_some_and(numbered)).count() as u64).max(1)
}
