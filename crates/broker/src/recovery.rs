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

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use abi::BATCH_MAX;
use abi::control::{Control, ask, journal, stop};
use kernel::{CopyOutcome, Mode, PagemapEntry, Pid, Range, Uffd, UffdError, Vaddr, futex_wake, maps, page_size};
use rustix::io::Errno;

use crate::attendant::Attended;
use crate::children::scarce;

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

/// For how long pages are tried that could be neither read nor copied.
const GIVE_BACK_WITHIN: Duration = Duration::from_millis(500);
const GIVE_BACK_PAUSE: Duration = Duration::from_millis(1);
/// How long a child may take to be filled by whoever reads the fork events.
const FILL_WITHIN: Duration = Duration::from_secs(1);

/// Gives back what a dead helper held; then its gate can be opened ([`nobody_lives`]). The helper must be known to be dead,
/// and somebody must read the events of forks meanwhile: nothing can be copied while one waits.
///
/// With `lost` pages nothing is settled, and calling it again is right: whoever touches a page that is not back goes on
/// waiting, for as long as the descriptor is open.
pub(crate) fn recover(attended: &Attended) -> Recovered {
    let mut done = Recovered::default();
    let (control, grounds) = (&*attended.control, attended.grounds);
    // The dead put nothing back. Whoever fills a child would wait for that.
    control.thawing.store(0, SeqCst);
    let journal = &control.journal;
    let scratch = match journal.state.load(SeqCst) {
        journal::PLAIN => Some(grounds.scratch),
        journal::DIVERGED => Some(grounds.diverged_scratch),
        _ => None,
    };
    if let Some(scratch) = scratch {
        let until = Instant::now() + GIVE_BACK_WITHIN;
        loop {
            done = Recovered::default();
            give_back(attended, scratch, &mut done);
            if done.lost == 0 || Instant::now() > until {
                break;
            }
            std::thread::sleep(GIVE_BACK_PAUSE);
        }
        if done.lost > 0 {
            return done;
        }
        // A child that was made before the last page was copied is given what the journal says.
        let until = Instant::now() + FILL_WITHIN;
        while control.filling.load(SeqCst) != 0 && Instant::now() < until {
            std::thread::sleep(GIVE_BACK_PAUSE);
        }
        let window = (journal.window_start.load(SeqCst), journal.window_end.load(SeqCst));
        release(attended, Vaddr(window.0), Vaddr(window.1));
        journal.state.store(journal::IDLE, SeqCst);
    }
    done
}

/// Says in a control area that its helper is gone and everything is back, and opens its gate: whoever waits goes on, and
/// may start another helper at once.
pub(crate) fn nobody_lives(control: &Control) {
    control.helper.store(0, SeqCst);
    control.gate.writer.store(0, SeqCst);
    let _ = futex_wake(&control.gate.writer, u32::MAX);
    for asked in [ask::ASKED, ask::SERVED] {
        if control.ask.state.compare_exchange(asked, ask::FAILED, SeqCst, SeqCst).is_ok() {
            let _ = futex_wake(&control.ask.state, u32::MAX);
        }
    }
}

/// One round. Ends early at a page that cannot be copied now: the others could not either.
fn give_back(attended: &Attended, scratch: Vaddr, done: &mut Recovered) {
    let mut entries = [PagemapEntry(0); BATCH_MAX];
    match attended.pagemap.entries(scratch, &mut entries) {
        Ok(BATCH_MAX) => {}
        // No address space any more.
        Ok(0) => return,
        Ok(_) | Err(_) => {
            done.lost += 1;
            return;
        }
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
        match attended.uffd.copy(source, &buffer) {
            Ok(CopyOutcome::Done) => done.pages += 1,
            Ok(CopyOutcome::Again { .. }) => {
                done.lost += 1;
                return;
            }
            Err(UffdError::Range { source, .. }) if scarce(&source) => {
                done.lost += 1;
                return;
            }
            Ok(CopyOutcome::Exists | CopyOutcome::Gone) | Err(_) => done.in_place += 1,
        }
    }
}

/// Takes a window out of the registration, mapping by mapping where it must be, and wakes who waits in it. What a userfaultfd
/// of the program's own has registered stays with that one.
pub(crate) fn release(attended: &Attended, start: Vaddr, end: Vaddr) {
    let has_its_own = attended.control.stop.load(SeqCst) & stop::USERFAULTFD != 0;
    release_of(&attended.uffd, attended.grounds.pid, (start, end), has_its_own);
}

fn release_of(uffd: &Uffd, pid: Pid, (start, end): (Vaddr, Vaddr), has_its_own: bool) {
    let Ok(window) = Range::covering(start, end) else { return };
    if window.is_empty() {
        return;
    }
    let release = |part: Range| !(has_its_own && is_others(uffd, part)) && uffd.unregister(part).is_ok();
    if !release(window) {
        for vma in maps::read(pid).unwrap_or_default() {
            if let Some(part) = vma.range.intersect(&window) {
                release(part);
            }
        }
    }
    let _ = uffd.wake(window);
}

/// Up to Linux 6.16 memory can be taken out of a registration through any userfaultfd of the process. But none can register
/// what another one has: whose it is shows by trying. Not where it need not be: memory that is registered for a moment is
/// a mapping of its own, and an mremap of the program's that spans it would fail in that moment.
fn is_others(uffd: &Uffd, part: Range) -> bool {
    let busy = |error: &std::io::Error| Errno::from_io_error(error) == Some(Errno::BUSY);
    matches!(uffd.register(part, Mode::WP), Err(UffdError::Range { source, .. }) if busy(&source))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use kernel::{CreateFlags, OwnedMemory, PageCount, UffdFeatures};

    /// Seen to fail on 6.12 (`bench guest run`): it was taken from the other one. From 6.17 on the kernel refuses that.
    #[test]
    fn what_another_userfaultfd_has_is_left_to_it() {
        let make = || -> Option<Uffd> {
            let uffd = Uffd::create(CreateFlags::empty()).ok()?;
            uffd.api(UffdFeatures::empty()).ok()?;
            Some(uffd)
        };
        let (Some(ours), Some(theirs)) = (make(), make()) else {
            println!("skipped: userfaultfd");
            return;
        };
        let memory = OwnedMemory::anonymous(PageCount(8)).unwrap();
        let (start, end) = (memory.range().start(), memory.range().end());
        let half = start.checked_add(PageCount(4).bytes()).unwrap();
        let (first, second) = (Range::new(start, half).unwrap(), Range::new(half, end).unwrap());
        ours.register(first, Mode::MISSING).unwrap();
        theirs.register(second, Mode::MISSING).unwrap();
        release_of(&ours, Pid::this(), (start, end), true);
        // Ours can be had by anybody, and theirs by them alone.
        theirs.register(first, Mode::MISSING).unwrap();
        ours.register(second, Mode::MISSING).unwrap_err();
    }
}
