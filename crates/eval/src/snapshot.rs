//! One evaluation from beginning to end: find, walk, read, look again, count.

use std::io;
use std::time::{Duration, Instant};

use kernel::{Bytes, Pid, Range, page_size};
use page::Secret;
use page::census::{Census, Findings, Groups};

use crate::answer;
use crate::error::EvalError;
use crate::files::files;
use crate::numbers::Numbers;
use crate::read::{Pace, Seen, Wanted, read_all};
use crate::record::Record;
use crate::report::{FileDuplicates, Reading, Report};
use crate::targets::{self, GroupBy, Process, Selection, Skipped};
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
    /// Look again after so long, to tell what lasts.
    pub watch: Option<Duration>,
    /// How often to look, where [`Options::watch`] asks for it: 2 or more.
    pub looks: usize,
    /// Keep what all pages held at each look, for a capture or for the model of ksmd: eight bytes a page and look.
    pub record: bool,
    /// Estimate instead of reading or keeping everything.
    pub sample: Option<SampleBy>,
    /// Look for nearly equal pages, and why they differ: pages without an equal are read once more.
    pub near: bool,
    /// Mappings that are reported one by one.
    pub top: usize,
}

impl Default for Options {
    /// One look at nobody in particular, by one thread.
    fn default() -> Self {
        Self {
            selection: Selection::default(),
            ranges: Vec::new(),
            group_by: GroupBy::default(),
            pace: Pace { threads: 1, limit: None },
            watch: None,
            looks: 2,
            record: false,
            sample: None,
            near: false,
            top: 100,
        }
    }
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
    /// Time between the looks in which nothing was done.
    pub(crate) slept: Duration,
    /// From the beginning of the first look to that of the last.
    pub(crate) waited: Option<Duration>,
    pub(crate) frames_seen: bool,
    pub(crate) record: Option<Record>,
    pub(crate) files: Option<FileDuplicates>,
    /// The processes can be read still.
    pub(crate) live: bool,
}

/// Evaluates.
///
/// # Errors
/// [`EvalError`]. Processes that end, or cannot be read, are in the report.
pub fn evaluate(options: &Options, tell: Tell<'_>) -> Result<Report, EvalError> {
    Ok(Snapshot::take(options, tell)?.report(options))
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
        if !kernel::procfs::shows_this_process().unwrap_or(false) {
            return Err(EvalError::ForeignProc);
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
                        Lost::Gone => targets::ENDED.to_owned(),
                        Lost::Denied => targets::NOT_PERMITTED.to_owned(),
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
        let mut record = (options.record && options.sample.is_none()).then(Record::default);
        let started = Instant::now();
        let (mut seen, mut reading, mut slept, mut waited) = (Seen::default(), Duration::ZERO, Duration::ZERO, None);
        let looks = options.watch.map_or(1, |_| options.looks.max(2));
        for look in 0..looks {
            let again = look > 0;
            if let Some(time) = options.watch.filter(|_| again) {
                let due = started + time * u32::try_from(look).unwrap_or(u32::MAX);
                slept += wait_until(due, tell);
                waited = Some(started.elapsed());
            }
            let at = Instant::now();
            if let Some(record) = &mut record {
                record.begin(started.elapsed(), pages);
            }
            let progress = |done, of| tell(Stage::Reading { done, of, again });
            let keep = |findings: &Findings| {
                if again {
                    census.look_again(findings);
                } else {
                    census.take_in(findings);
                }
                if let Some(record) = &mut record {
                    record.add(findings);
                }
            };
            let read = read_all(&walk, &processes, &secret, wanted, options.pace, &progress, keep);
            reading += at.elapsed();
            seen.cpu += read.cpu;
            for place in read.gone.into_iter().filter(|place| !seen.gone.contains(place)).collect::<Vec<_>>() {
                let process = &processes[place as usize];
                targets.skip(process.pid, &process.comm, "ended, or could not be read any more, while it was read");
                seen.gone.push(place);
            }
            if again {
                seen.read_again += read.pages;
            } else {
                (seen.pages, seen.lost) = (read.pages, read.lost);
            }
        }
        tell(Stage::Counting);
        let index_bytes = census.bytes();
        let groups = census.group(options.pace.threads);
        let skipped = targets.skipped;
        let frames_seen = frames_seen();
        let files = options.ranges.is_empty().then(|| files(&processes, &secret));
        Ok(Self {
            processes,
            skipped,
            walk,
            groups,
            index_bytes,
            seen,
            reading,
            begun,
            slept,
            waited,
            frames_seen,
            record,
            files,
            live: true,
        })
    }

    /// What it says. Of the options only those count that are about the answer.
    #[must_use]
    pub fn report(&self, options: &Options) -> Report {
        answer::report(self, options)
    }

    /// How it was read.
    pub(crate) fn reading(&self, numbers: &Numbers<'_>) -> Reading {
        let bytes = (self.seen.pages + self.seen.read_again) * page_size();
        let elapsed = self.begun.elapsed();
        Reading {
            elapsed_seconds: elapsed.saturating_sub(self.slept).as_secs_f64(),
            bytes_per_second: bytes as f64 / self.reading.as_secs_f64().max(1e-9),
            cpu_seconds: self.seen.cpu.as_secs_f64(),
            watched_seconds: self.waited.map(|time| time.as_secs_f64()),
            lost_pages: self.seen.lost,
            index_bytes: self.index_bytes + numbers.bytes(),
            frames_seen: self.frames_seen,
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

/// Waits, and says for how long.
fn wait_until(until: Instant, tell: Tell<'_>) -> Duration {
    let begun = Instant::now();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return begun.elapsed();
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
