//! Reading pages and keeping what they hold, on all cores.
//!
//! **Reading must not change anything.** process_vm_readv is the fast way, but it pins what it reads, and pinning a page
//! that a fork or KSM has left shared gives the process a copy of its own first (FAULT_FLAG_UNSHARE, mm/gup.c): reading
//! eight forked workers that way would un-share all they have in common. So right before a job is read its pagemap
//! words are, and pages with several users go through /proc/PID/mem, which takes references and no pins. So do pages in
//! ranges with a userfaultfd, where process_vm_readv could wait for ever, and pages of mappings with KSM pages. Pages
//! that are not there any more are not read: that would map the zero page, or swap in. What is left is a fork in the
//! microseconds between the words and the read, for the 512 KiB that are read at that moment.
//!
//! The words tell how many map a page, not whether the kernel takes it for one process's own: that is over with a fork,
//! though the child be gone, until the page is written. A small page is given back then by the pin, in place. A part of a
//! large folio that is not mapped as a whole is copied. So in mappings that may have large folios only pages of whole
//! huge pages are read the fast way.
//!
//! Reading marks pages as used (mark_page_accessed), as any access does.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kernel::{BatchReader, Bytes, MemoryFile, Pagemap, PagemapEntry, Pid, Range, RemoteError, Vaddr, page_size};
use ksm::ProcessId;
use page::census::{Content, Findings};
use page::{PageNumber, Secret};

use crate::count::Bits;
use crate::targets::Process;
use crate::walk::{Span, Walk};

/// Pages of one job: 4 MiB of small pages, a millisecond of work.
const JOB_PAGES: u32 = 1024;
/// Pages whose words are read at once, right before themselves: what a fork in between can cost.
const WINDOW: u64 = 128;
/// Read at once, so that what is hashed is still in the cache.
const AT_ONCE: Bytes = Bytes::from_kib(256);
/// Pages without interest whose words are read along rather than with a call of their own.
const GAP: u64 = 32;

/// How to read.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Threads.
    pub threads: usize,
    /// Bytes a second, at most.
    pub limit: Option<u64>,
}

/// Is told how much has been done: bytes of all, at any thread.
pub(crate) type Progress<'a> = &'a (dyn Fn(Bytes, Bytes) + Sync);

/// What a pass over all pages saw.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// Pages read.
    pub(crate) pages: u64,
    /// Pages that were there at the walk and could not be read: gone since, or held back.
    pub(crate) lost: u64,
    /// CPU time of the readers.
    pub(crate) cpu: Duration,
    /// Pages read at a second look.
    pub(crate) read_again: u64,
    /// Places of processes that ended, or became others, while they were read.
    pub(crate) gone: Vec<u32>,
}

/// Pages of one process whose numbers follow each other.
struct Job {
    process: u32,
    spans: Vec<Span>,
}

impl Job {
    fn first(&self) -> usize {
        self.spans[0].first as usize
    }

    fn pages(&self) -> usize {
        self.spans.iter().map(|span| span.pages as usize).sum()
    }
}

/// Which pages are wanted: all, or a part of them.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wanted<'a> {
    All,
    /// Those whose number's hash is below this share of all hashes.
    Share(f64),
    /// Those that are not set.
    Without(&'a Bits),
}

impl Wanted<'_> {
    pub(crate) fn includes(self, page: u32) -> bool {
        match self {
            Self::All => true,
            Self::Without(bits) => !bits.get(page),
            // Fibonacci hashing: neighbours are thrown far apart, and the same pages are chosen at a second look.
            Self::Share(share) => {
                let mut hash = (u64::from(page) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                hash = (hash ^ (hash >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
                hash ^= hash >> 32;
                ((hash >> 11) as f64) < share * (1_u64 << 53) as f64
            }
        }
    }
}

/// Reads the pages of a walk and shows what each job found to `keep`, one at a time.
pub(crate) fn read_all(
    walk: &Walk,
    processes: &[Process],
    secret: &Secret,
    wanted: Wanted<'_>,
    pace: Pace,
    progress: Progress<'_>,
    keep: impl FnMut(&Findings) + Send,
) -> Seen {
    let jobs = cut(walk);
    let next = AtomicUsize::new(0);
    let (pages, lost) = (AtomicU64::new(0), AtomicU64::new(0));
    let keep = Mutex::new(keep);
    let limiter = Limiter::new(pace.limit);
    let gone: Vec<AtomicBool> = processes.iter().map(|_| AtomicBool::new(false)).collect();
    let total = Bytes(walk.pages * page_size());
    let done = AtomicU64::new(0);
    let cpu = Mutex::new(Duration::ZERO);
    std::thread::scope(|scope| {
        for _ in 0..pace.threads.clamp(1, jobs.len().max(1)) {
            scope.spawn(|| {
                let mut reader = Reader::new(wanted);
                while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let process = &processes[job.process as usize];
                    let mut findings = Findings::new(job.first(), job.pages());
                    if !gone[job.process as usize].load(Ordering::Relaxed) {
                        limiter.wait_for(job.pages() as u64 * page_size());
                        let read = reader.read(job, process, |page, bytes| {
                            findings.put(page, Content::of(bytes, secret));
                        });
                        limiter.give_back((job.pages() as u64).saturating_sub(read.pages) * page_size());
                        if read.gone && read.pages == 0 {
                            findings.clear();
                        }
                        if read.gone {
                            gone[job.process as usize].store(true, Ordering::Relaxed);
                        }
                        pages.fetch_add(read.pages, Ordering::Relaxed);
                        lost.fetch_add(read.wanted.saturating_sub(read.pages), Ordering::Relaxed);
                    } else {
                        lost.fetch_add(job.pages() as u64, Ordering::Relaxed);
                    }
                    // A reader that panicked has left nothing half done.
                    (keep.lock().unwrap_or_else(std::sync::PoisonError::into_inner))(&findings);
                    let bytes = job.pages() as u64 * page_size();
                    progress(Bytes(done.fetch_add(bytes, Ordering::Relaxed) + bytes), total);
                }
                let used = kernel::sched::usage(kernel::sched::Whose::Thread).cpu();
                *cpu.lock().unwrap_or_else(std::sync::PoisonError::into_inner) += used;
            });
        }
    });
    let gone = (0_u32..).zip(&gone).filter(|(_, gone)| gone.load(Ordering::Relaxed)).map(|(place, _)| place).collect();
    let cpu = *cpu.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    Seen { pages: pages.into_inner(), lost: lost.into_inner(), cpu, read_again: 0, gone }
}

/// Reads pages one after the other, in this thread, and shows `visit` each with its process and number.
pub(crate) fn read_each(
    walk: &Walk,
    processes: &[Process],
    wanted: Wanted<'_>,
    limit: Option<u64>,
    mut visit: impl FnMut(u32, usize, &[u8]),
) {
    let mut reader = Reader::new(wanted);
    let limiter = Limiter::new(limit);
    for job in cut(walk) {
        limiter.wait_for(job.pages() as u64 * page_size());
        let read = reader.read(&job, &processes[job.process as usize], |page, bytes| visit(job.process, page, bytes));
        limiter.give_back((job.pages() as u64).saturating_sub(read.pages) * page_size());
    }
}

/// Cuts spans into jobs.
fn cut(walk: &Walk) -> Vec<Job> {
    let mut jobs: Vec<Job> = Vec::new();
    let mut room = 0;
    for span in &walk.spans {
        let process = walk.mappings[span.mapping as usize].process;
        let mut rest = *span;
        while rest.pages > 0 {
            if room == 0 || jobs.last().is_none_or(|job| job.process != process) {
                jobs.push(Job { process, spans: Vec::new() });
                room = JOB_PAGES;
            }
            let pages = rest.pages.min(room);
            let job = jobs.last_mut().expect("there is one now");
            job.spans.push(Span { pages, ..rest });
            room -= pages;
            rest = Span {
                first: rest.first + pages,
                pages: rest.pages - pages,
                start: rest.start.offset(u64::from(pages)),
                ..rest
            };
        }
    }
    jobs
}

/// What a job came to.
#[derive(Clone, Copy, Debug, Default)]
struct Read {
    wanted: u64,
    pages: u64,
    gone: bool,
}

/// One thread's buffers.
struct Reader<'a> {
    wanted: Wanted<'a>,
    batch: BatchReader,
    buffer: Vec<u8>,
    words: Vec<PagemapEntry>,
    fast: Vec<Range>,
    gently: Vec<Range>,
}

impl<'a> Reader<'a> {
    fn new(wanted: Wanted<'a>) -> Self {
        Self {
            wanted,
            batch: BatchReader::with_capacity(AT_ONCE),
            buffer: vec![0; AT_ONCE.get() as usize],
            words: Vec::new(),
            fast: Vec::new(),
            gently: Vec::new(),
        }
    }

    /// Shows `visit` each wanted page with its number. [`Read::gone`] without pages: what was shown was another
    /// process's.
    fn read(&mut self, job: &Job, process: &Process, mut visit: impl FnMut(usize, &[u8])) -> Read {
        let pid = Pid(process.pid);
        let mut read = Read::default();
        let Ok(pagemap) = Pagemap::open(pid) else {
            return Read { wanted: job.pages() as u64, pages: 0, gone: true };
        };
        let mut rest: &[Span] = &job.spans;
        let mut inside = 0;
        while let Some(window) = Window::next(&mut rest, &mut inside) {
            read.wanted += self.sort(&window, &pagemap);
            let mut put = |range: Range, bytes: &[u8]| {
                let first = range.start().page_index();
                let pages = bytes.chunks_exact(page_size() as usize);
                for (at, page) in (first..).zip(pages) {
                    visit(number_of(job, at), page);
                    read.pages += 1;
                }
            };
            match self.batch.read(pid, &self.fast, &mut put) {
                Ok(totals) => read.gone = totals.gone,
                // Rights that were lost since, as by an exec of a setuid program: it is as good as gone.
                Err(RemoteError::Denied { .. }) => read.gone = true,
                Err(_) => {}
            }
            if !self.gently.is_empty() && !read.gone {
                read.gone = MemoryFile::open(pid)
                    .map_or(true, |memory| !memory.read_each(&self.gently, &mut self.buffer, &mut put));
            }
            if read.gone {
                break;
            }
        }
        // The number may have been given to another process in the meantime.
        let same = ProcessId::of(process.pid).is_some_and(|now| now.start_time == process.start_time);
        if !same {
            read = Read { wanted: job.pages() as u64, pages: 0, gone: true };
        }
        read
    }

    /// Looks which pages are still there and how each is to be read. How many are wanted.
    fn sort(&mut self, window: &Window, pagemap: &Pagemap) -> u64 {
        self.fast.clear();
        self.gently.clear();
        self.words.clear();
        self.words.resize(usize::try_from(window.pages()).expect("a window's pages and gaps"), PagemapEntry(0));
        let known = pagemap.entries(Vaddr(window.first.address(page_size())), &mut self.words).unwrap_or(0);
        let mut wanted = 0;
        for span in &window.spans {
            for (number, page) in (span.first..).zip(span.range().iter()) {
                if !self.wanted.includes(number) {
                    continue;
                }
                wanted += 1;
                let word = self.words[..known].get((page.0 - window.first.0) as usize).copied();
                let Some(word) = word.filter(|word| word.present() && !word.file_or_shared()) else { continue };
                let list = if span.gently || !word.exclusive() { &mut self.gently } else { &mut self.fast };
                add(list, Vaddr(page.address(page_size())));
            }
        }
        wanted
    }
}

/// Spans, or parts of them, that lie near each other: no more than [`WINDOW`] pages from end to end.
struct Window {
    first: PageNumber,
    spans: Vec<Span>,
}

impl Window {
    /// Takes the next one off `rest`, of whose first span `inside` pages are taken already.
    fn next(rest: &mut &[Span], inside: &mut u32) -> Option<Self> {
        let first = rest.first()?.start.offset(u64::from(*inside));
        let mut window = Self { first, spans: Vec::new() };
        while let Some(span) = rest.first() {
            let start = span.start.offset(u64::from(*inside));
            let used = start.0 - first.0;
            let near = window.spans.last().is_none_or(|last| start.0 - last.range().end.0 <= GAP);
            if used >= WINDOW || !near {
                break;
            }
            let left = span.pages - *inside;
            let pages = left.min(u32::try_from(WINDOW - used).expect("no more than a window"));
            window.spans.push(Span { first: span.first + *inside, pages, start, ..*span });
            if pages < left {
                *inside += pages;
                break;
            }
            *inside = 0;
            *rest = &rest[1..];
        }
        Some(window)
    }

    /// From end to end.
    fn pages(&self) -> u64 {
        self.spans.last().map_or(0, |last| last.range().end.0 - self.first.0)
    }
}

/// The number of a page of a job.
fn number_of(job: &Job, page: u64) -> usize {
    let at = job.spans.partition_point(|span| span.start.0 <= page) - 1;
    let span = &job.spans[at];
    span.first as usize + (page - span.start.0) as usize
}

/// Adds a page to the last range of a list, or begins another.
fn add(list: &mut Vec<Range>, at: Vaddr) {
    let end = Vaddr(at.get() + page_size());
    if let Some(last) = list.last_mut()
        && last.end() == at
    {
        *last = Range::new(last.start(), end).expect("a range that grows at its end");
    } else {
        list.push(Range::new(at, end).expect("one page"));
    }
}

/// Holds readers to a rate, all of them together.
struct Limiter {
    limit: Option<u64>,
    begun: Instant,
    spent: AtomicU64,
}

impl Limiter {
    fn new(limit: Option<u64>) -> Self {
        Self { limit, begun: Instant::now(), spent: AtomicU64::new(0) }
    }

    /// So many bytes were waited for and not read: a sample, or pages that went.
    fn give_back(&self, bytes: u64) {
        self.spent.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Waits until so many bytes more may be read.
    fn wait_for(&self, bytes: u64) {
        let Some(limit) = self.limit else { return };
        let spent = self.spent.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let due = Duration::from_secs_f64(spent as f64 / limit.max(1) as f64);
        if let Some(early) = due.checked_sub(self.begun.elapsed()) {
            std::thread::sleep(early);
        }
    }
}
