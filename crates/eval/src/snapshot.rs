//! One evaluation from beginning to end: find, walk, read, look again, count.

use std::io;
use std::time::{Duration, Instant};

use kernel::{Bytes, Pid, Range, page_size};
use page::Secret;
use page::census::{Census, Groups};

use crate::answer;
use crate::error::EvalError;
use crate::numbers::Numbers;
use crate::read::{Pace, Seen, Wanted, read_all};
use crate::report::{Reading, Report};
use crate::targets::{GroupBy, Process, Selection, Skipped};
use crate::walk::{Lost, Walk};

/// What to evaluate, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whose memory.
    pub selection: Selection,
    /// Only these ranges of each process; whole processes if there are none.
    pub ranges: Vec<Range>,
    /// By what processes are taken together.
    pub group_by: GroupBy,
    /// How fast.
    pub pace: Pace,
    /// Look a second time after so long, to tell what lasts.
    pub watch: Option<Duration>,
    /// Estimate instead of reading or keeping everything.
    pub sample: Option<SampleBy>,
    /// Look for nearly equal pages, and why they differ: pages without an equal are read once more.
    pub near: bool,
    /// Owners and mappings that are reported one by one.
    pub top: usize,
}

/// How to estimate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SampleBy {
    /// Read every page and keep a share of all contents, with all their pages: exact groups, a small index.
    HashSpace(f64),
    /// Read a share of all pages.
    Pages(f64),
}

impl SampleBy {
    /// The share.
    #[must_use]
    pub const fn fraction(self) -> f64 {
        match self {
            Self::HashSpace(share) | Self::Pages(share) => share,
        }
    }
}

/// What goes on, for whoever waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Looks for pages: so many of so many processes.
    Walking {
        /// Processes walked.
        done: usize,
        /// Of so many.
        of: usize,
    },
    /// Reads, the first time or again.
    Reading {
        /// Bytes read or passed over.
        done: Bytes,
        /// Of so many.
        of: Bytes,
        /// The second look.
        again: bool,
    },
    /// Waits for the second look.
    Waiting {
        /// So long still.
        left: Duration,
    },
    /// Sorts and counts.
    Counting,
}

/// Is told what goes on, from any thread.
pub type Tell<'a> = &'a (dyn Fn(Stage) + Sync);

/// A look at processes' memory: what they hold, grouped.
pub struct Snapshot {
    pub(crate) processes: Vec<Process>,
    pub(crate) skipped: Vec<Skipped>,
    pub(crate) walk: Walk,
    pub(crate) groups: Groups,
    pub(crate) index_bytes: u64,
    pub(crate) seen: Seen,
    pub(crate) reading: Duration,
    pub(crate) begun: Instant,
    pub(crate) waited: Option<Duration>,
}

/// Evaluates.
///
/// # Errors
/// [`EvalError`]. Processes that end, or cannot be read, are in the report.
pub fn evaluate(options: &Options, tell: Tell<'_>) -> Result<Report, EvalError> {
    let snapshot = Snapshot::take(options, tell)?;
    tell(Stage::Counting);
    Ok(answer::report(&snapshot, options))
}

impl Snapshot {
    /// Looks, twice where [`Options::watch`] asks for it.
    ///
    /// # Errors
    /// [`EvalError`].
    pub fn take(options: &Options, tell: Tell<'_>) -> Result<Self, EvalError> {
        if let Some(sample) = options.sample {
            let given = sample.fraction();
            if !(given > 0.0 && given <= 1.0) {
                return Err(EvalError::BadFraction { given });
            }
        }
        let begun = Instant::now();
        let mut targets = options.selection.resolve()?;
        let mut walk = Walk::new(&disjoint(&options.ranges));
        let mut processes = Vec::new();
        let of = targets.processes.len();
        for (done, process) in std::mem::take(&mut targets.processes).into_iter().enumerate() {
            tell(Stage::Walking { done, of });
            let place = u32::try_from(processes.len()).expect("fewer processes than pids");
            match walk.add(&process, place) {
                Ok(()) => processes.push(process),
                Err(lost) => {
                    let reason = match lost {
                        Lost::Gone => "ended meanwhile".to_owned(),
                        Lost::Denied => "not permitted (CAP_SYS_PTRACE)".to_owned(),
                        Lost::Failed(why) => why,
                    };
                    targets.skip(process.pid, &process.comm, &reason);
                }
            }
        }
        walk.finish();
        if u32::try_from(walk.pages).is_err() {
            return Err(EvalError::TooMany { pages: walk.pages });
        }
        let pages = walk.pages as usize;
        let (mut census, wanted) = match options.sample {
            None => (Census::new(pages), Wanted::All),
            Some(SampleBy::HashSpace(share)) => (Census::sampled(pages, share), Wanted::All),
            Some(SampleBy::Pages(share)) => (Census::new(pages), Wanted::Share(share)),
        };
        let secret = secret()?;
        let started = Instant::now();
        let progress = |done, of| tell(Stage::Reading { done, of, again: false });
        let keep = |findings: &_| census.take_in(findings);
        let mut seen = read_all(&walk, &processes, &secret, wanted, options.pace, &progress, keep);
        let mut reading = started.elapsed();
        let waited = options.watch.map(|time| wait(time.saturating_sub(started.elapsed()), tell, started));
        if waited.is_some() {
            let again = Instant::now();
            let progress = |done, of| tell(Stage::Reading { done, of, again: true });
            let keep = |findings: &_| census.look_again(findings);
            let second = read_all(&walk, &processes, &secret, wanted, options.pace, &progress, keep);
            reading += again.elapsed();
            seen.cpu += second.cpu;
            seen.read_again = second.pages;
        }
        tell(Stage::Counting);
        let index_bytes = census.bytes();
        let groups = census.group(options.pace.threads);
        let skipped = targets.skipped;
        Ok(Self { processes, skipped, walk, groups, index_bytes, seen, reading, begun, waited })
    }

    /// How it was read.
    pub(crate) fn reading(&self, numbers: &Numbers<'_>) -> Reading {
        let bytes = (self.seen.pages + self.seen.read_again) * page_size();
        let waited = self.waited.unwrap_or_default();
        let elapsed = self.begun.elapsed();
        Reading {
            elapsed_seconds: elapsed.saturating_sub(waited).as_secs_f64(),
            bytes_per_second: bytes as f64 / self.reading.as_secs_f64().max(1e-9),
            cpu_seconds: self.seen.cpu.as_secs_f64(),
            watched_seconds: self.waited.map(|time| time.as_secs_f64()),
            lost_pages: self.seen.lost,
            index_bytes: self.index_bytes + numbers.bytes(),
            frames_seen: frames_seen(),
        }
    }
}

/// The same ranges in order, each page once.
fn disjoint(ranges: &[Range]) -> Vec<Range> {
    let mut sorted = ranges.to_vec();
    sorted.sort_by_key(Range::start);
    let mut disjoint: Vec<Range> = Vec::new();
    for range in sorted {
        match disjoint.last_mut().filter(|last| range.start() <= last.end()) {
            Some(last) => *last = Range::covering(last.start(), last.end().max(range.end())).unwrap_or(*last),
            None => disjoint.push(range),
        }
    }
    disjoint
}

/// Waits so long, and tells from the beginning of the first look to that of the second how long it was.
fn wait(left: Duration, tell: Tell<'_>, started: Instant) -> Duration {
    let until = Instant::now() + left;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return started.elapsed();
        }
        tell(Stage::Waiting { left });
        std::thread::sleep(left.min(Duration::from_millis(200)));
    }
}

/// Whether page frame numbers can be seen: our own stack's, say.
fn frames_seen() -> bool {
    let own = 0_u8;
    let address = kernel::Vaddr((&raw const own).addr() as u64);
    let entry = kernel::Pagemap::open(Pid::this()).and_then(|pagemap| pagemap.entry(address));
    entry.is_ok_and(|entry| entry.pfn().is_some())
}

fn secret() -> Result<Secret, EvalError> {
    let mut bytes = [0; Secret::BYTES];
    let mut done = 0;
    while done < bytes.len() {
        let flags = rustix::rand::GetRandomFlags::empty();
        let got = rustix::rand::getrandom(&mut bytes[done..], flags);
        done += got.map_err(|error| EvalError::Random(io::Error::from(error)))?;
    }
    Ok(Secret::new(bytes))
}
