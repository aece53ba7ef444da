//! Filling the children of forks that the gate did not see.
//!
//! Such a child lacks the pages that were frozen when it was made: it waits at each of them until the page is copied or
//! its descriptor is closed. A page that is not there by then is read as what the mapping has below it, a zero or the
//! store's page. So nothing is closed before all is filled, whatever is scarce meanwhile.

use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use abi::BATCH_MAX;
use abi::control::{Control, journal};
use kernel::{CopyOutcome, Event, PagemapEntry, Uffd, UffdError, Vaddr, page_size, pidfd};
use rustix::io::Errno;

use crate::attendant::Attended;

/// For how long a child is still tried once nobody needs the reader any more. Before that there is no limit: whoever
/// copies a child's mappings may have been preempted or be short of memory.
const FILL_WITHIN: Duration = Duration::from_secs(2);
/// Pause between two tries.
const PAUSE: Duration = Duration::from_micros(20);
/// Pause while there are no descriptors.
const SCARCE_PAUSE: Duration = Duration::from_millis(1);
/// How long a helper may take to put back what one batch has frozen.
const THAW_WITHIN: Duration = Duration::from_millis(500);

/// As [`Uffd::read_event`], but "none now" also where no descriptor can be had for the child: the kernel leaves the event
/// where it is, and whoever forks waits until it can be read.
fn read_event(uffd: &Uffd) -> Result<Option<Event>, UffdError> {
    match uffd.read_event() {
        Err(UffdError::Read { source }) if scarce(&source) => {
            std::thread::sleep(SCARCE_PAUSE);
            Ok(None)
        }
        read => read,
    }
}

/// True for what passes when somebody else gives something back.
pub(crate) fn scarce(error: &std::io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}

/// Reads every event that waits and fills the children of forks. `false` if the descriptor is of no use any more.
///
/// What a child lacks are the pages that were frozen when it was made, with the content that they had then. From the
/// fork's beginning until its event is read nothing can be frozen by moving it, which the kernel sees to, and until this
/// function is over nothing goes back or is thrown away, which the helper sees to: it waits for the event to be read and
/// for the word that is set here before. So what lies in the scratch area while the event waits is what the child lacks,
/// and perhaps pages frozen since by a remapping, which it has. What the helper was just putting back, having looked a
/// moment before the fork, is in place by the time that it has been waited for here.
///
/// All of that is looked at before the event is read. Reading it lets the parent go on, which may write to its pages at
/// once, and the child, which may throw them away, move them or fork: the less time between that and the copies, the
/// better. Without an event at the first look there is nothing in place that the child lacks, and the scratch area stays
/// as it is for long enough.
pub(crate) fn fill_children(attended: &Attended) -> bool {
    attended.control.filling.store(1, SeqCst);
    wait_for_thaw(&attended.control);
    let alive = loop {
        let before = wait_for_event(&attended.uffd).then(|| frozen_pages(attended, true));
        match read_event(&attended.uffd) {
            Ok(Some(Event::Fork { uffd })) => {
                // What was counted before a fork does not hold once its child is gone.
                attended.control.thread_epoch.fetch_add(1, SeqCst);
                let lacking = before.unwrap_or_else(|| frozen_pages(attended, false));
                fill(uffd, &lacking, &attended.over);
                attended.control.forks.fetch_add(1, SeqCst);
            }
            Ok(Some(_)) => {}
            Ok(None) => break true,
            Err(_) => break false,
        }
    };
    attended.control.filling.store(0, SeqCst);
    alive
}

/// True once the event of a fork that has begun can be read; false if none has. It counts as begun until whoever forked
/// has run again, and meanwhile another one can begin: what is looked at before that one's event waits may be too old.
fn wait_for_event(uffd: &Uffd) -> bool {
    while uffd.event_is_pending() {
        if !matches!(pidfd::poll_in(uffd.as_fd(), Some(PAUSE)), Ok(false)) {
            return true;
        }
    }
    false
}

/// A child, and how many of the pages have been tried.
struct Child {
    uffd: Uffd,
    tried: usize,
}

impl Child {
    /// Copies until it has everything or cannot be copied into now. True if it has.
    fn fill(&mut self, pages: &[(Vaddr, Vec<u8>)]) -> bool {
        while let Some((place, content)) = pages.get(self.tried) {
            match self.uffd.copy(*place, content) {
                Ok(CopyOutcome::Again { .. }) => return false,
                Err(UffdError::Range { source, .. }) if scarce(&source) => return false,
                // There, or nobody is left to read it.
                _ => self.tried += 1,
            }
        }
        true
    }
}

/// Fills a child's holes, and those of the children that it makes meanwhile: nothing can be copied into it before their
/// events are read, and they have the same holes. What it makes of its other memory meanwhile is its own.
fn fill(first: Uffd, pages: &[(Vaddr, Vec<u8>)], over: &AtomicBool) {
    let until = Instant::now() + FILL_WITHIN;
    let mut children = vec![Child { uffd: first, tried: 0 }];
    loop {
        let mut born = Vec::new();
        children.retain_mut(|child| {
            let filled = child.fill(pages);
            while let Ok(Some(event)) = read_event(&child.uffd) {
                if let Event::Fork { uffd } = event {
                    born.push(Child { uffd, tried: 0 });
                }
            }
            !filled
        });
        if born.is_empty() && !children.is_empty() {
            std::thread::sleep(PAUSE);
        }
        children.append(&mut born);
        if children.is_empty() || (over.load(SeqCst) && Instant::now() >= until) {
            return;
        }
    }
}

/// Waits until the helper, which may have looked before it could see that children are being filled, has put back what it
/// holds in its hands. A dead one never has, and one that lies harms its own forks only.
fn wait_for_thaw(control: &Control) {
    let deadline = Instant::now() + THAW_WITHIN;
    while control.thawing.load(SeqCst) != 0 && Instant::now() < deadline {
        std::thread::sleep(PAUSE);
    }
}

/// What the journal says is frozen, with its place; with `in_place` also what was so in this batch and is back.
fn frozen_pages(attended: &Attended, in_place: bool) -> Vec<(Vaddr, Vec<u8>)> {
    let journal = &attended.control.journal;
    let scratch = match journal.state.load(SeqCst) {
        journal::PLAIN => attended.grounds.scratch,
        journal::DIVERGED => attended.grounds.diverged_scratch,
        _ => return Vec::new(),
    };
    let count = (journal.count.load(SeqCst) as usize).min(BATCH_MAX);
    let there = |slot: usize| {
        let mut entries = [PagemapEntry(0); BATCH_MAX];
        let read = attended.pagemap.entries(scratch, &mut entries);
        read.is_ok_and(|read| read == BATCH_MAX) && (entries[slot].present() || entries[slot].swapped())
    };
    let read = |at: Vaddr| {
        let mut content = vec![0; usize::try_from(page_size()).expect("a page is small")];
        let whole = attended.memory.read(at, &mut content).is_ok_and(|read| read.bytes().get() == page_size());
        whole.then_some(content)
    };
    let page = |slot: usize| {
        let place = Vaddr(journal.source[slot].load(SeqCst));
        if place.get() == 0 || !place.is_page_aligned() {
            return None;
        }
        let at = scratch.checked_add(kernel::PageCount(slot as u64).bytes())?;
        // Still there after it was read: else what was read could be anything.
        let frozen = if there(slot) { read(at).filter(|_| there(slot)) } else { None };
        // Back in its place, or replaced by a page with the same bytes.
        let back = || if in_place { read(place) } else { None };
        Some((place, frozen.or_else(back)?))
    };
    (0..count).filter_map(page).collect()
}
