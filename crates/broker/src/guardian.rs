//! The small process beside the broker: it holds a second duplicate of everything that is needed to give pages back.
//!
//! While the broker lives the guardian sleeps. When the broker's socket ends without a farewell, the broker was killed:
//! for each member the guardian then reads the userfaultfd's events (a fork would hang otherwise), waits until the
//! helper has ended (it leaves by itself when its broker is gone, after the batch in hand), gives back what a helper
//! that was killed as well left frozen, opens the gate, and ends.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use abi::control::Control;
use kernel::{MemoryFile, Pagemap, Pid, Pidfd, RecvOutcome, SendOutcome, Seqpacket, SharedMap, Uffd, Vaddr};

use crate::attendant::{Attended, read_events};
use crate::member::Member;
use crate::recovery::{Grounds, nobody_lives, recover};
use crate::room::thread;

const WORDS: usize = 5;
const ADD: u64 = 1;
const REMOVE: u64 = 2;
const FAREWELL: u64 = 3;

/// How long the guardian may take to end once it has been told to.
const END_WITHIN: Duration = Duration::from_secs(2);
/// How long a guardian must have been there to be replaced.
const LIFE: Duration = Duration::from_secs(1);
const END_PAUSE: Duration = Duration::from_millis(1);

/// The broker's end.
#[derive(Debug)]
pub(crate) struct GuardianLink {
    link: Seqpacket,
    child: Child,
    started: Instant,
}

impl GuardianLink {
    /// Starts the guardian: a program that calls [`run`] with the descriptor whose number is its last argument. Without
    /// one the broker works as well, with one survivor less.
    pub(crate) fn start((program, arguments): &(PathBuf, Vec<String>)) -> Option<Self> {
        let (ours, theirs) = Seqpacket::pair().ok()?;
        let mut launch = kernel::Launch::new(Command::new(program));
        let number = launch.inherit(theirs.into_owned_fd());
        launch.command().args(arguments).arg(number.to_string()).stdin(std::process::Stdio::null());
        let launched = launch.spawn().ok()?;
        Some(Self { link: ours, child: launched.child, started: Instant::now() })
    }

    /// True if another one should take its place. One that ends as soon as it is started would do so again.
    pub(crate) fn has_died(&mut self) -> bool {
        // This process may take the status of all of its children elsewhere: then it is gone as well.
        self.started.elapsed() > LIFE && !matches!(self.child.try_wait(), Ok(None))
    }

    pub(crate) fn add(&mut self, member: &Member) {
        let (grounds, fds) = member.for_guardian();
        let words =
            [ADD, grounds.pid.get() as u64, grounds.scratch.get(), grounds.diverged_scratch.get(), member.index.into()];
        let _ = send(&self.link, words, &fds);
    }

    pub(crate) fn remove(&mut self, member: &Member) {
        let _ = send(&self.link, [REMOVE, 0, 0, 0, member.index.into()], &[]);
    }

    /// The broker ends in order.
    pub(crate) fn dismiss(mut self) {
        let _ = send(&self.link, [FAREWELL, 0, 0, 0, 0], &[]);
        drop(self.link);
        // Nobody is left to be guarded. One that is stopped or frozen must not keep the broker from ending.
        let until = Instant::now() + END_WITHIN;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > until {
                let _ = self.child.kill();
                std::thread::sleep(END_PAUSE);
                let _ = self.child.try_wait();
                return;
            }
            std::thread::sleep(END_PAUSE);
        }
    }
}

fn send(link: &Seqpacket, words: [u64; WORDS], fds: &[std::os::fd::BorrowedFd<'_>]) -> bool {
    let mut packet = [0; WORDS * 8];
    let (chunks, _) = packet.as_chunks_mut::<8>();
    for (chunk, word) in chunks.iter_mut().zip(words) {
        *chunk = word.to_le_bytes();
    }
    matches!(link.send_timeout(&packet, fds, Duration::from_secs(1)), Ok(SendOutcome::Sent))
}

/// What the guardian is called: a name in which the others' does not occur.
pub const NAME: &CStr = c"pf-guardian";

struct Ward {
    index: u64,
    attended: Arc<Attended>,
    helper: Pidfd,
    program: Pidfd,
}

/// The guardian's whole life. `link` is the descriptor that the broker passed. Returns the number of members that had
/// to be looked after.
pub fn run(link: OwnedFd) -> usize {
    // Neither the terminal nor a service manager's stop reaches the guardian before it has done its work.
    let _ = rustix::process::setsid();
    // Whoever kills everything that is called pagefold (pkill -9 pagefold) gets broker and helpers at one stroke. One who
    // asks for command lines (pkill -f) gets broker and guardian: a helper has that of its program.
    let _ = rustix::thread::set_name(NAME);
    let Ok(link) = Seqpacket::from_owned_fd(link) else { return 0 };
    let mut wards: Vec<Ward> = Vec::new();
    let mut packet = [0; WORDS * 8];
    loop {
        match link.recv_timeout(&mut packet, Duration::from_secs(3600)) {
            Ok(RecvOutcome::Packet { length, fds }) if length == packet.len() => {
                let (chunks, _) = packet.as_chunks::<8>();
                let word = |index: usize| u64::from_le_bytes(chunks[index]);
                match word(0) {
                    ADD => wards.extend(ward(word(4), word(1), word(2), word(3), fds)),
                    REMOVE => wards.retain(|ward| ward.index != word(4)),
                    FAREWELL => return 0,
                    _ => {}
                }
            }
            Ok(RecvOutcome::Empty) => {}
            Ok(RecvOutcome::Packet { .. } | RecvOutcome::Closed) | Err(_) => break,
        }
    }
    let (mut threads, mut left) = (Vec::new(), Vec::new());
    for ward in wards.into_iter().map(Arc::new) {
        let this = Arc::clone(&ward);
        match thread().spawn(move || look_after(&this)) {
            Ok(thread) => threads.push(thread),
            Err(_) => left.push(ward),
        }
    }
    // One after the other where no more threads are to be had.
    left.iter().for_each(|ward| look_after(ward));
    left.len() + threads.into_iter().filter_map(|thread| thread.join().ok()).count()
}

fn ward(index: u64, pid: u64, scratch: u64, diverged_scratch: u64, mut fds: Vec<OwnedFd>) -> Option<Ward> {
    let (memory, helper, uffd, control) = (fds.pop()?, fds.pop()?, fds.pop()?, fds.pop()?);
    let control = SharedMap::<Control>::map(control.as_fd()).ok()?;
    let pid = Pid(i32::try_from(pid).ok()?);
    let grounds = Grounds { pid, scratch: Vaddr(scratch), diverged_scratch: Vaddr(diverged_scratch) };
    let attended = Attended {
        control,
        uffd: Uffd::from_owned_fd(uffd).ok()?,
        grounds,
        memory: MemoryFile::from_owned_fd(memory, pid),
        pagemap: Pagemap::open(pid).ok()?,
        over: AtomicBool::new(false),
        refused: Mutex::default(),
    };
    let program = Pidfd::open(pid).ok()?;
    Some(Ward { index, attended: Arc::new(attended), helper: Pidfd::from_owned_fd(helper), program })
}

fn look_after(ward: &Ward) {
    // Whoever read them has died, perhaps in the middle of it.
    ward.attended.control.filling.store(0, SeqCst);
    let attended = Arc::clone(&ward.attended);
    let reader = thread().spawn(move || read_events(&attended));
    while !ward.helper.wait_exited(Duration::from_secs(1)).unwrap_or(true) {}
    // Nobody else is left who could give anything back: for as long as the program lives.
    while recover(&ward.attended).lost > 0 && !ward.program.exited().unwrap_or(true) {
        std::thread::sleep(Duration::from_millis(50));
    }
    nobody_lives(&ward.attended.control);
    ward.attended.over.store(true, SeqCst);
    let _ = reader.map(std::thread::JoinHandle::join);
}
