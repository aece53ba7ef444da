//! Giving pages back when a helper is dead, for the broker and for the guardian.
//!
//! The journal says which scratch page belongs where. Whatever step the helper died at, this is right:
//!
//! | the page is... | what happens here |
//! |---|---|
//! | still in its place, not yet moved | its scratch page is not there: nothing to do |
//! | frozen | copied into its place with UFFDIO_COPY, which works from outside |
//! | replaced by the store, scratch page not yet dropped | its place is not registered any more: the copy is refused, and the store's page has the same bytes |
//! | moved back already | as the first |
//!
//! Then the window is taken out of the registration, everybody who waits there is woken, and only then the gate opens.
//! A hostile member can make the journal say anything; all of it happens in its own address space.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use abi::BATCH_MAX;
use abi::control::{ask, journal};
use kernel::{CopyOutcome, PagemapEntry, Pid, Range, Uffd, Vaddr, futex_wake, maps, page_size};

use crate::attendant::Attended;

/// What a recovery needs to know of a member; taken when the helper introduced itself, not from the control area.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grounds {
    /// A process that lives in the address space: the program.
    pub(crate) pid: Pid,
    /// Scratch area for plain pages.
    pub(crate) scratch: Vaddr,
    /// Scratch area for pages of store mappings.
    pub(crate) diverged_scratch: Vaddr,
}

/// What a recovery did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Pages copied back.
    pub(crate) pages: usize,
    /// Pages whose place had been filled already.
    pub(crate) in_place: usize,
    /// Pages that could not be read or copied although the process lives.
    pub(crate) lost: usize,
}

/// How often a page is tried that could be neither read nor copied.
const GIVE_BACK_TRIES: u32 = 50;
const GIVE_BACK_PAUSE: Duration = Duration::from_millis(20);

/// Gives back what a dead helper held, and opens its gate. The helper must be known to be dead.
pub(crate) fn recover(attended: &Attended) -> Recovered {
    let mut done = Recovered::default();
    let (control, uffd, grounds) = (&*attended.control, &attended.uffd, attended.grounds);
    let journal = &control.journal;
    let scratch = match journal.state.load(SeqCst) {
        journal::PLAIN => Some(grounds.scratch),
        journal::DIVERGED => Some(grounds.diverged_scratch),
        _ => None,
    };
    if let Some(scratch) = scratch {
        for _ in 0..GIVE_BACK_TRIES {
            done = Recovered::default();
            give_back(attended, scratch, &mut done);
            if done.lost == 0 {
                break;
            }
            std::thread::sleep(GIVE_BACK_PAUSE);
        }
        if done.lost == 0 {
            let window = (journal.window_start.load(SeqCst), journal.window_end.load(SeqCst));
            release(uffd, grounds.pid, Vaddr(window.0), Vaddr(window.1));
            journal.state.store(journal::IDLE, SeqCst);
        } else {
            // Nothing may let a page read as something else than what it held: whoever touches it goes on waiting,
            // for as long as this descriptor is open.
            std::mem::forget(uffd.as_fd().try_clone_to_owned());
        }
    }
    control.filling.store(0, SeqCst);
    control.thawing.store(0, SeqCst);
    control.helper.store(0, SeqCst);
    control.gate.writer.store(0, SeqCst);
    let _ = futex_wake(&control.gate.writer, u32::MAX);
    if control.ask.state.compare_exchange(ask::ASKED, ask::FAILED, SeqCst, SeqCst).is_ok() {
        let _ = futex_wake(&control.ask.state, u32::MAX);
    }
    done
}

fn give_back(attended: &Attended, scratch: Vaddr, done: &mut Recovered) {
    let mut entries = [PagemapEntry(0); BATCH_MAX];
    if !attended.pagemap.entries(scratch, &mut entries).is_ok_and(|read| read == BATCH_MAX) {
        return;
    }
    let mut buffer = vec![0; usize::try_from(page_size()).expect("a page is small")];
    for (slot, entry) in entries.iter().enumerate() {
        let source = Vaddr(attended.control.journal.source[slot].load(SeqCst));
        let offset = kernel::PageCount(slot as u64).bytes();
        if !(entry.present() || entry.swapped()) || source.get() == 0 || !source.is_page_aligned() {
            continue;
        }
        let Some(at) = scratch.checked_add(offset) else { continue };
        if !attended.memory.read(at, &mut buffer).is_ok_and(|read| read.bytes().get() == page_size()) {
            done.lost += 1;
            continue;
        }
        match copy(&attended.uffd, source, &buffer) {
            CopyOutcome::Done => done.pages += 1,
            CopyOutcome::Exists | CopyOutcome::Gone => done.in_place += 1,
            CopyOutcome::Again { .. } => done.lost += 1,
        }
    }
}

/// Copies a page in; the kernel asks for another try while the mappings change under it.
pub(crate) fn copy(uffd: &Uffd, target: Vaddr, page: &[u8]) -> CopyOutcome {
    const TRIES: usize = 1000;
    for _ in 0..TRIES {
        match uffd.copy(target, page) {
            Ok(CopyOutcome::Again { .. }) => std::thread::yield_now(),
            Ok(outcome) => return outcome,
            Err(_) => return CopyOutcome::Gone,
        }
    }
    CopyOutcome::Again { copied: kernel::Bytes(0) }
}

/// Takes a window out of the registration, mapping by mapping where it must be, and wakes who waits in it.
fn release(uffd: &Uffd, pid: Pid, start: Vaddr, end: Vaddr) {
    let Ok(window) = Range::covering(start, end) else { return };
    if window.is_empty() {
        return;
    }
    if uffd.unregister(window).is_err() {
        for vma in maps::read(pid).unwrap_or_default() {
            if let Some(part) = vma.range.intersect(&window) {
                let _ = uffd.unregister(part);
            }
        }
    }
    let _ = uffd.wake(window);
}
