//! A host on which nothing is merged, and what the cases ask of it.

use std::collections::BTreeSet;
use std::fs::File;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kernel::{Pagemap, PagemapEntry, Pid, Range, pagemap};
use pagefold_ksm::set::unmerge_host_at;
use pagefold_ksm::status::{Request, Status};
use pagefold_ksm::{Counters, Knob, KsmSysfs, Lease, Rate, StatePath, Wanted, check_writable, host_lock};

/// The whole host's KSM, put back whatever happens.
pub(crate) struct Host {
    pub(crate) sysfs: KsmSysfs,
    before: Vec<(Knob, String)>,
    temp: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

/// The host's lock, taken once for all cases: beside others who want it too, each case would wait for all of them.
static LOCK: OnceLock<File> = OnceLock::new();
/// One case at a time.
static TURN: Mutex<()> = Mutex::new(());

/// As long as a case may wait for ksmd on a machine that has much else to do.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

impl Host {
    /// Waits for the host, with nothing merged.
    pub(crate) fn lock() -> Option<Self> {
        let sysfs = KsmSysfs::host();
        if let Err(missing) = check_writable(&sysfs) {
            println!("skipped: {missing}");
            return None;
        }
        if Command::new("python3").arg("--version").output().is_err() {
            println!("skipped: no python3 for the processes to merge");
            return None;
        }
        // A case that failed has put the host back as any other.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let others = || !others(&sysfs).is_empty();
        LOCK.get_or_init(|| {
            let deadline = Instant::now() + 5 * PATIENCE;
            loop {
                let lock = host_lock().unwrap();
                if !others() || Instant::now() > deadline {
                    return lock;
                }
                // They may wait for the lock to come to their end.
                drop(lock);
                std::thread::sleep(Duration::from_secs(1));
            }
        });
        let before =
            Knob::ALL.into_iter().filter_map(|knob| Some((knob, sysfs.knob(knob.file_name()).unwrap()?))).collect();
        let host = Self { sysfs, before, temp: tempfile::tempdir().unwrap(), _turn: turn };
        host.unmerge();
        Some(host)
    }

    /// The same without anybody else, for cases that look at the host's counters.
    pub(crate) fn lock_alone() -> Option<Self> {
        let host = Self::lock()?;
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let others = others(&host.sysfs);
            if others.is_empty() {
                return Some(host);
            }
            assert!(Instant::now() < deadline, "others are merged here, and would be counted: {others:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn state(&self) -> StatePath {
        StatePath::at(self.temp.path().join("ksm-lease.json"))
    }

    /// Unmerges the whole host, as cases begin and end.
    pub(crate) fn unmerge(&self) {
        unmerge_host_at(&self.state(), &self.sysfs, false).unwrap();
        // What had to wait until nothing is merged, as max_page_sharing.
        Lease::repair_at(&self.state(), &self.sysfs).unwrap();
    }

    /// Sets ksmd to work: flat out, without smart scan, which passes over pages as it likes.
    pub(crate) fn merge(&self, more: Wanted) -> Lease {
        let wanted = Wanted {
            run: Some(true),
            rate: Some(Rate::FLAT_OUT),
            smart_scan: more.smart_scan.or(Some(false)),
            use_zero_pages: more.use_zero_pages.or(Some(false)),
            ..more
        };
        let (lease, repaired) = Lease::acquire_at(&self.state(), &self.sysfs, wanted).unwrap();
        assert!(repaired.refused.is_empty() && repaired.foreign.is_empty(), "{repaired}");
        lease
    }

    /// `ksm_zero_pages` with its sign: it can be wrong by a few from what was before.
    pub(crate) fn zero_pages(&self) -> i64 {
        self.sysfs.number("ksm_zero_pages").unwrap().unwrap()
    }

    pub(crate) fn counters(&self) -> Counters {
        Counters::read(&self.sysfs).unwrap()
    }

    /// Waits for so many whole passes.
    pub(crate) fn scans(&self, more: u64) {
        // The one that is under way saw an unknown part.
        let (first, deadline) = (self.counters().full_scans, Instant::now() + PATIENCE);
        while self.counters().full_scans < first + more + 1 {
            assert!(Instant::now() < deadline, "{} of {more} passes", self.counters().full_scans - first);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The counters with ksmd standing still: (shared, sharing).
    pub(crate) fn settled(&self, lease: Lease) -> (u64, u64) {
        lease.release().unwrap();
        let counters = self.counters();
        (counters.pages_shared, counters.pages_sharing)
    }
}

/// Whom ksmd scans: number and name.
fn others(sysfs: &KsmSysfs) -> Vec<(i32, String)> {
    let nowhere = StatePath::at("/nonexistent/state");
    let found = Status::look(sysfs, &nowhere, &Request::default(), None).unwrap().processes;
    found.into_iter().map(|process| (process.pid, process.comm)).collect()
}

impl Drop for Host {
    fn drop(&mut self) {
        // Some settings can only be written while nothing is merged.
        let _ = self.sysfs.write("run", "2");
        let _ = self.sysfs.write("advisor_mode", "none");
        for (knob, value) in &self.before {
            let _ = self.sysfs.write(knob.file_name(), value);
        }
    }
}

/// (shared, sharing) of equal pages when so many may share one.
pub(crate) fn expected(pages: u64, limit: u64) -> (u64, u64) {
    match (pages / limit, pages % limit) {
        (full, 0 | 1) => (full, full * (limit - 1)),
        (full, _) => (full + 1, pages - full - 1),
    }
}

fn entries(pid: Pid, range: Range) -> Vec<PagemapEntry> {
    let mut entries = vec![PagemapEntry::default(); pagemap::entries_len(range)];
    let read = Pagemap::open(pid).unwrap().entries(range.start(), &mut entries).unwrap();
    entries.truncate(read);
    entries
}

/// Whether two pages of a range are one in memory. Zero pages count: all are one.
pub(crate) fn has_duplicate_frames(pid: Pid, range: Range) -> bool {
    let mut seen = BTreeSet::new();
    let frames: Vec<u64> = entries(pid, range).into_iter().filter_map(PagemapEntry::pfn).collect();
    assert!(!frames.is_empty(), "no frame numbers (CAP_SYS_ADMIN)");
    !frames.into_iter().all(|frame| seen.insert(frame))
}

#[test]
fn the_formula_of_equal_pages() {
    let of = |pages| expected(pages, 256);
    assert_eq!([of(2), of(10), of(256), of(257)], [(1, 1), (1, 9), (1, 255), (1, 255)]);
    assert_eq!([of(258), of(512), of(520)], [(2, 256), (2, 510), (3, 517)]);
}
