//! What pages hold.
//!
//! Everything is read through /proc/PID/mem. process_vm_readv is faster and pins what it reads, which would give the
//! process a copy of its own of each page that a fork or KSM has left shared; ksmd, which follows, is a hundred times
//! slower than either.
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

use kernel::{Range, page_size};
use page::Secret;

use super::walk::{Target, Walk};

/// A page and what it holds: 64 bits of its fingerprint, [`ZEROS`] for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Seen {
    pub(crate) hash: u64,
    pub(crate) page: u32,
}

/// The hash of a page of zeros.
pub(crate) const ZEROS: u64 = 0;

/// Pages read at once: 1 MiB, so that what is hashed is still in the cache.
const JOB: u32 = 256;

/// What is kept of a page's content.
pub(crate) fn hash(page: &[u8], secret: &Secret) -> u64 {
    // No other page is taken for zeros.
    if page::is_zero(page) { ZEROS } else { secret.fingerprint(page).high().max(1) }
}

/// A secret for one request.
pub(crate) fn secret() -> std::io::Result<Secret> {
    let mut bytes = [0; Secret::BYTES];
    let mut done = 0;
    while done < bytes.len() {
        done += rustix::rand::getrandom(&mut bytes[done..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(Secret::new(bytes))
}

/// Neighbouring pages of one process.
struct Job {
    target: u32,
    first: u32,
    range: Range,
}

/// Reads pages, in any order, with as many threads as there are processors. `tell` hears how many are done and can end
/// it; `None` then. Pages that are not there any more are left out.
pub(crate) fn read(
    walk: &Walk,
    targets: &[&Target],
    pages: &[(u32, u32)],
    secret: &Secret,
    mut tell: impl FnMut(u64) -> bool,
) -> Option<Vec<Seen>> {
    let jobs: Vec<Job> = pages.iter().flat_map(|run| cut(walk, *run)).collect();
    let (next, done) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let all = Mutex::new(Vec::new());
    let work = |tell: &mut dyn FnMut(u64) -> bool| {
        let mut buffer = vec![0; JOB as usize * page_size() as usize];
        let mut seen = Vec::new();
        while let Some(job) = jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
            targets[job.target as usize].memory.read_each(&[job.range], &mut buffer, |range, bytes| {
                let skipped = (range.start() - job.range.start()).pages().get();
                let first = job.first + u32::try_from(skipped).expect("no more than a job's pages");
                let pages = bytes.chunks_exact(page_size() as usize);
                seen.extend((first..).zip(pages).map(|(page, bytes)| Seen { hash: hash(bytes, secret), page }));
            });
            let pages = job.range.pages().get() as usize;
            if !tell((done.fetch_add(pages, Ordering::Relaxed) + pages) as u64) {
                // The others find nothing more to do.
                next.store(jobs.len(), Ordering::Relaxed);
                break;
            }
        }
        all.lock().unwrap_or_else(PoisonError::into_inner).append(&mut seen);
    };
    let mut told_to_go_on = true;
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len() / 16);
        for _ in 1..threads {
            // With fewer of them it takes longer.
            let _ = std::thread::Builder::new().spawn_scoped(scope, || work(&mut |_| true));
        }
        work(&mut |pages| {
            told_to_go_on = told_to_go_on && tell(pages);
            told_to_go_on
        });
    });
    let all = all.into_inner().unwrap_or_else(PoisonError::into_inner);
    told_to_go_on.then_some(all)
}

/// Cuts pages `run.0` up to, not including, `run.1` into jobs, each of one span.
fn cut(walk: &Walk, run: (u32, u32)) -> impl Iterator<Item = Job> + '_ {
    let (mut at, end) = run;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let span = walk.span_of(at);
        let last = end.min(span.first + span.pages).min(at + JOB);
        let pages = kernel::PageCount((last - at).into());
        let range = Range::from_pages(walk.address_of(at), pages).expect("a part of a span");
        let job = Job { target: span.target, first: at, range };
        at = last;
        Some(job)
    })
}

/// Ascending page numbers as runs of neighbours.
pub(crate) fn runs(pages: impl IntoIterator<Item = u32>) -> Vec<(u32, u32)> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for page in pages {
        match runs.last_mut() {
            Some(run) if run.1 == page => run.1 += 1,
            _ => runs.push((page, page + 1)),
        }
    }
    runs
}
