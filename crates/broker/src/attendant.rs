//! Two threads that wait on each member: one answers its reference checks, one reads the events of its userfaultfd.
//!
//! Each member has its own, since a thread can be held up in one member's mmap_lock and would then miss everybody
//! else's deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use abi::BATCH_MAX;
use abi::control::{Control, check, journal};
use kernel::refcheck::BpfCheck;
use kernel::sched::{Policy, set_policy};
use kernel::{
    CopyOutcome, Event, MemoryFile, Pagemap, PagemapEntry, Pid, SharedMap, Uffd, Vaddr, futex_wait, futex_wake,
    page_size, pidfd,
};

use crate::error::BrokerError;
use crate::recovery::Grounds;

/// How long an attendant sleeps before it looks whether it is still needed.
const LOOK_UP: Duration = Duration::from_millis(200);
/// How long the end of the threads is waited for.
const END_WITHIN: Duration = Duration::from_secs(1);

/// How long a helper may take to put back what one batch has frozen.
const THAW_WITHIN: Duration = Duration::from_millis(500);

/// Name of the thread that answers reference checks, which runs with real-time priority.
pub(crate) const CHECKER: &str = "pf-check";

/// What both threads share with the member.
pub(crate) struct Attended {
    pub(crate) control: SharedMap<Control>,
    pub(crate) uffd: Uffd,
    pub(crate) grounds: Grounds,
    /// The address space itself: what the process executes later, or who gets its number, is nothing of it.
    pub(crate) memory: MemoryFile,
    pub(crate) pagemap: Pagemap,
    pub(crate) over: AtomicBool,
}

/// The threads of one member.
pub(crate) struct Attendants {
    attended: Arc<Attended>,
    threads: Vec<JoinHandle<()>>,
}

impl Attendants {
    /// Starts them. `check` is `None` where exact counts cannot be had; `events` says whether fork events were asked
    /// for, which must then be read or every fork of the program would hang.
    pub(crate) fn start(
        attended: &Arc<Attended>,
        helper: Pid,
        check: Option<BpfCheck>,
        priority: bool,
        events: bool,
    ) -> Result<Self, BrokerError> {
        let mut threads = Vec::new();
        let builder = |name: &str| std::thread::Builder::new().name(name.to_owned()).stack_size(256 << 10);
        if let Some(check) = check {
            let attended = Arc::clone(attended);
            let run = move || answer_checks(&attended, helper, check, priority);
            threads.push(builder(CHECKER).spawn(run).map_err(BrokerError::Thread)?);
        }
        if events {
            let attended = Arc::clone(attended);
            // With the longest number 15 bytes, which is what the kernel keeps of a name.
            let builder = builder(&format!("pf-fork {helper}"));
            threads.push(builder.spawn(move || read_events(&attended)).map_err(BrokerError::Thread)?);
        }
        Ok(Self { attended: Arc::clone(attended), threads })
    }
}

impl Drop for Attendants {
    fn drop(&mut self) {
        self.attended.over.store(true, SeqCst);
        let _ = futex_wake(&self.attended.control.check.state, u32::MAX);
        // A thread may be held up in the member's memory for as long as the member likes. It can do nothing more then
        // than to end: what it would have done is not needed any more.
        let deadline = Instant::now() + END_WITHIN;
        for thread in self.threads.drain(..) {
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_micros(200));
            }
            if thread.is_finished() {
                let _ = thread.join();
            }
        }
    }
}

fn answer_checks(attended: &Attended, helper: Pid, mut bpf: BpfCheck, priority: bool) {
    // Frame numbers through the helper: those of the program vanish when its main thread ends.
    let Ok(pagemap) = Pagemap::open(helper) else { return };
    if priority {
        // Above the helper: it waits for this answer with pages frozen.
        let _ = set_policy(Pid(0), Policy::Fifo { priority: 2 });
    }
    let question = &attended.control.check;
    let areas = [attended.grounds.scratch, attended.grounds.diverged_scratch];
    while !attended.over.load(SeqCst) {
        if question.state.compare_exchange(check::ASKED, check::SERVING, SeqCst, SeqCst).is_ok() {
            let count = (question.count.load(SeqCst) as usize).min(BATCH_MAX);
            let address = Vaddr(question.address.load(SeqCst));
            let mut refs = [0; BATCH_MAX];
            let refs = &mut refs[..count];
            // Only the scratch areas are ever asked about; anything else is answered with "unknown".
            if !areas.contains(&address) || bpf.refs_at(&pagemap, address, refs).is_err() {
                refs.fill(0);
            }
            for (slot, count) in question.refs.iter().zip(refs.iter()) {
                slot.store(*count, SeqCst);
            }
            if question.state.compare_exchange(check::SERVING, check::ANSWERED, SeqCst, SeqCst).is_ok() {
                let _ = futex_wake(&question.state, 1);
            }
        } else {
            // Never in a loop until the next question comes: with this priority that would take a whole CPU from those
            // who find the next pages, for the length of every plan.
            let state = question.state.load(SeqCst);
            if state != check::ASKED {
                let _ = futex_wait(&question.state, state, Some(LOOK_UP));
            }
        }
    }
}

/// Reads the events of a member's forks until it is over.
pub(crate) fn read_events(attended: &Attended) {
    use std::os::fd::AsFd;
    while !attended.over.load(SeqCst) {
        match pidfd::poll_in(attended.uffd.as_fd(), Some(LOOK_UP)) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(_) => return,
        }
        if !fill_children(attended) {
            return;
        }
    }
}

/// Generations of children that are followed while they fork faster than they can be filled.
const GENERATIONS: usize = 8;
/// For how long pages are still tried while a child forks, once nobody needs the reader any more. Before that there is no
/// limit: whoever copies the child's mappings may have been preempted or be short of memory, and a page that is not
/// filled is read as what the mapping has below it, a zero or the store's page.
const FILL_WITHIN: Duration = Duration::from_secs(2);
/// Pause between two tries.
const FILL_PAUSE: Duration = Duration::from_micros(20);

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
fn fill_children(attended: &Attended) -> bool {
    attended.control.filling.store(1, SeqCst);
    wait_for_thaw(&attended.control);
    let alive = loop {
        let before = attended.uffd.event_is_pending().then(|| frozen_pages(attended, true));
        match attended.uffd.read_event() {
            Ok(Some(Event::Fork { uffd })) => {
                // What was counted before a fork does not hold once its child is gone.
                attended.control.thread_epoch.fetch_add(1, SeqCst);
                let lacking = before.unwrap_or_else(|| frozen_pages(attended, false));
                fill(&uffd, &lacking, GENERATIONS, &attended.over);
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

/// Fills a child's holes. It waits at them until its descriptor is closed; what it makes of its other memory meanwhile is
/// its own. If it forks, nothing can be copied before that event is read, and its child has the same holes.
fn fill(child: &Uffd, pages: &[(Vaddr, Vec<u8>)], generations: usize, over: &AtomicBool) {
    let until = Instant::now() + FILL_WITHIN;
    for (place, content) in pages {
        while matches!(child.copy(*place, content), Ok(CopyOutcome::Again { .. }))
            && (!over.load(SeqCst) || Instant::now() < until)
        {
            fill_its_children(child, pages, generations, over);
            std::thread::sleep(FILL_PAUSE);
        }
    }
    fill_its_children(child, pages, generations, over);
}

fn fill_its_children(child: &Uffd, pages: &[(Vaddr, Vec<u8>)], generations: usize, over: &AtomicBool) {
    while let Ok(Some(event)) = child.read_event() {
        if let Event::Fork { uffd } = event
            && let Some(generations) = generations.checked_sub(1)
        {
            fill(&uffd, pages, generations, over);
        }
    }
}

/// Waits until the helper, which may have looked before it could see that children are being filled, has put back what it
/// holds in its hands. A dead one never has, and one that lies harms its own forks only.
fn wait_for_thaw(control: &Control) {
    let deadline = Instant::now() + THAW_WITHIN;
    while control.thawing.load(SeqCst) != 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(20));
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
