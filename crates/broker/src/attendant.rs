//! Threads that wait on each member: one answers its reference checks, one reads the events of its userfaultfd, and where
//! everything is managed one says whether code may come.
//!
//! Each member has its own, since a thread can be held up in one member's mmap_lock and would then miss everybody
//! else's deadline.

use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use abi::BATCH_MAX;
use abi::control::{Control, check, code};
use kernel::refcheck::BpfCheck;
use kernel::sched::{Policy, set_policy};
use kernel::{MemoryFile, Pagemap, Pid, SharedMap, Uffd, Vaddr, futex_wait, futex_wake, pidfd};
use rustix::fs::{Mode, OFlags};

use crate::children::fill_children;
use crate::error::BrokerError;
use crate::recovery::Grounds;
use crate::room::thread;
use crate::scope::Judge;

/// How long an attendant sleeps before it looks whether it is still needed.
const LOOK_UP: Duration = Duration::from_millis(200);
/// How long the end of the threads is waited for.
const END_WITHIN: Duration = Duration::from_secs(1);

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
    /// Code that was refused last, and why.
    pub(crate) refused: Mutex<Option<String>>,
}

/// What a member needs.
pub(crate) struct Service {
    pub(crate) helper: Pid,
    /// `None` where exact counts cannot be had.
    pub(crate) check: Option<BpfCheck>,
    pub(crate) priority: bool,
    /// Fork events were asked for: they must be read, or every fork of the program would hang.
    pub(crate) events: bool,
    /// Where the broker chooses what is managed.
    pub(crate) judge: Option<Arc<dyn Judge>>,
}

/// The threads of one member.
pub(crate) struct Attendants {
    attended: Arc<Attended>,
    threads: Vec<JoinHandle<()>>,
}

impl Attendants {
    /// Starts them.
    pub(crate) fn start(attended: &Arc<Attended>, service: Service) -> Result<Self, BrokerError> {
        let Service { helper, check, priority, events, judge } = service;
        let mut threads = Vec::new();
        let builder = |name: &str| thread().name(name.to_owned());
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
        if let Some(judge) = judge {
            let attended = Arc::clone(attended);
            let run = move || answer_about_code(&attended, &*judge);
            threads.push(builder("pf-code").spawn(run).map_err(BrokerError::Thread)?);
        }
        Ok(Self { attended: Arc::clone(attended), threads })
    }
}

impl Drop for Attendants {
    fn drop(&mut self) {
        self.attended.over.store(true, SeqCst);
        let _ = futex_wake(&self.attended.control.check.state, u32::MAX);
        let _ = futex_wake(&self.attended.control.code.state, u32::MAX);
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

/// The file behind a descriptor of a member's thread, which may have a table of its own, opened anew for reading. To open
/// anything else can wait for ever (a pipe), or do something (a device); code is in neither.
fn regular_file(pid: Pid, thread: u32, fd: u32) -> Option<File> {
    let path = format!("/proc/{pid}/task/{thread}/fd/{fd}");
    let found = File::from(rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?);
    found.metadata().ok().filter(std::fs::Metadata::is_file)?;
    File::open(format!("/proc/self/fd/{}", found.as_raw_fd())).ok()
}

/// Says whether code may come that a member is about to map.
fn answer_about_code(attended: &Attended, judge: &dyn Judge) {
    let question = &attended.control.code;
    let pid = attended.grounds.pid;
    while !attended.over.load(SeqCst) {
        let state = question.state.load(SeqCst);
        if state != code::ASKED {
            let _ = futex_wait(&question.state, state, Some(LOOK_UP));
            continue;
        }
        let fd = question.fd.load(SeqCst);
        let admitted = if fd == code::NO_FILE {
            judge.admits(pid, None)
        } else {
            let file = regular_file(pid, question.owner.load(SeqCst), fd);
            file.ok_or_else(|| "a file that cannot be read".to_owned()).and_then(|file| judge.admits(pid, Some(&file)))
        };
        let answer = if admitted.is_ok() { code::ADMITTED } else { code::REFUSED };
        if let Err(why) = admitted {
            *attended.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
        }
        // Whoever asked may have given up meanwhile, and somebody else ask.
        let _ = question.state.compare_exchange(code::ASKED, answer, SeqCst, SeqCst);
        let _ = futex_wake(&question.state, u32::MAX);
    }
}

/// Reads the events of a member's forks until it is over.
pub(crate) fn read_events(attended: &Attended) {
    while !attended.over.load(SeqCst) {
        match pidfd::poll_in(attended.uffd.as_fd(), Some(LOOK_UP)) {
            Ok(true) => {}
            Ok(false) => continue,
            Err(_) => std::thread::sleep(LOOK_UP),
        }
        // A fork whose event is not read waits for ever, and nothing can be given back meanwhile.
        if !fill_children(attended) {
            std::thread::sleep(LOOK_UP);
        }
    }
}
