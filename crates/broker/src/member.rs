//! A member: a process whose helper has introduced itself.

use std::cell::Cell;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use abi::control::{self, Control, RANGES_MAX};
use abi::wire::{Message, PACKET, Token};
use kernel::refcheck::{BpfCheck, OwnCounts, own_counts};
use kernel::sched::{Resource, limit};
use kernel::{
    Credentials, MemfdError, MemoryFile, Pagemap, Pid, Pidfd, PidfdError, ProcError, Range, RecvOutcome, SendOutcome,
    Seqpacket, SharedMap, Uffd, UffdFeatures, Vaddr, futex_wake, maps, memfd, status, task,
};
use page::SegmentId;

use crate::attendant::{Attendants, Attended, Service};
use crate::fitness::{unfit, unfit_whole};
use crate::recovery::{Grounds, Recovered, nobody_lives, recover, release};
use crate::scope::{Judge, own_code};
use crate::view::View;
use crate::wishes::RefusedKind;

/// How long a helper may take for each step of its introduction. It is alive and has nothing else to do.
const INTRODUCTION: Duration = Duration::from_secs(2);

/// How long one that has broken off may take to end.
const ENDING: Duration = Duration::from_millis(100);

/// How long a helper that was killed may take to end.
const BURIAL: Duration = Duration::from_secs(10);

/// How long a message to a helper may wait for room. It reads what it is told before anything else.
const LISTENING: Duration = Duration::from_millis(500);

/// Room for a connection's first packet.
const FIRST_PACKET_MAX: usize = 512;

/// Why a helper is not taken in. Told to nobody but the operator.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error("it does not know the partition's secret")]
    Token,
    #[error("it belongs to user {uid}")]
    OtherUser { uid: u32 },
    #[error("its control area has version {version}")]
    Version { version: u32 },
    #[error("it does not have its control area mapped where it says")]
    NotInMember,
    #[error("it lives in a process namespace that cannot be seen from here")]
    OtherNamespace,
    #[error(
        "its helper would become a child of a program that waits for every child: a child subreaper (itself, with children or threads, or a program above it), or the first process of a process namespace"
    )]
    Noticed,
    #[error("it broke off or sent something else")]
    Broken,
    #[error("its helper was killed before it was taken in")]
    Ended,
    #[error("the memory that its helper came for is gone")]
    MemoryGone,
    #[error(
        "userfaultfd is not to be had there (error {errno}): grant access to /dev/userfaultfd or set vm.unprivileged_userfaultfd=1"
    )]
    NoUserfault { errno: u32 },
    #[error("this kernel's userfaultfd lacks MOVE, so live merging is not possible (Linux 6.8 has it)")]
    NoMove,
    #[error("hardly any address space is left to this run (RLIMIT_AS); raise ulimit -v")]
    AddressSpace,
    #[error("{0}")]
    NotProven(String),
    #[error("{0}")]
    Kernel(String),
}

impl Refused {
    pub(crate) fn kind(&self) -> RefusedKind {
        match self {
            Self::NoUserfault { .. } => RefusedKind::NoUserfault,
            Self::NoMove => RefusedKind::NoMove,
            _ => RefusedKind::Other,
        }
    }

    /// What the kernel said, to the bottom, and what helps where that is known. Without the process's number: the same
    /// is the same for every process, and is told once.
    fn kernel(error: impl std::error::Error + 'static) -> Self {
        let mut text = error.to_string();
        let mut next = error.source();
        while let Some(inner) = next {
            text.push_str(&format!(": {inner}"));
            let number = inner.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error);
            if number == Some(rustix::io::Errno::MFILE.raw_os_error()) {
                text.push_str("; raise ulimit -n");
            }
            next = inner.source();
        }
        let mut pieces = text.split("process ");
        let first = pieces.next().unwrap_or_default().to_owned();
        Self::Kernel(pieces.fold(first, |text, piece| {
            let rest = piece.trim_start_matches(|letter: char| letter.is_ascii_digit());
            if rest.len() < piece.len() { text + "that process" + rest } else { text + "process " + piece }
        }))
    }
}

/// A member under management.
pub(crate) struct Member {
    pub(crate) pid: Pid,
    pub(crate) pidfd: Pidfd,
    pub(crate) helper: Pid,
    helper_pidfd: Arc<Pidfd>,
    pub(crate) link: Seqpacket,
    attended: Arc<Attended>,
    attendants: Option<Attendants>,
    /// Descriptors for the guardian.
    control_fd: Arc<OwnedFd>,
    pub(crate) uid: u32,
    /// Real-time priority that the program itself permits its processes.
    pub(crate) rt_hard: Option<u64>,
    pub(crate) exact_check: bool,
    pub(crate) view: View,
    /// Number in the helper's table of each segment that it was given.
    pub(crate) segments: HashMap<SegmentId, u32>,
    pub(crate) free_numbers: Vec<u32>,
    pub(crate) next_number: u32,
    /// A plan is with the helper.
    pub(crate) busy_since: Option<Instant>,
    /// A message could not be delivered.
    deaf: Cell<bool>,
    pub(crate) index: u32,
    /// All of its memory is managed, not what it handed over.
    whole: bool,
    /// Why the process is left alone for now.
    pub(crate) unfit: Option<&'static str>,
    /// What has ended merging in it, as far as that was noted.
    pub(crate) stops_seen: u32,
    fitness_seen: Instant,
    space_seen: Instant,
}

/// How long a look at a process's fitness counts.
const FITNESS_LASTS: Duration = Duration::from_millis(100);
/// How often it is looked whether a process still has the address space that its helper has.
const SPACE_LASTS: Duration = Duration::from_millis(100);

impl Member {
    pub(crate) fn control(&self) -> &Control {
        &self.attended.control
    }

    /// Which code was refused last, and why.
    pub(crate) fn refused_code(&self) -> Option<String> {
        self.attended.refused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Which frames its pages are in.
    pub(crate) fn pagemap(&self) -> &Pagemap {
        &self.attended.pagemap
    }

    /// The memory and what is known of it.
    pub(crate) fn read(&mut self) -> (&MemoryFile, &mut View) {
        (&self.attended.memory, &mut self.view)
    }

    /// The ranges that the program has handed over, as far as they make sense.
    pub(crate) fn ranges(&self) -> Vec<Range> {
        use std::sync::atomic::Ordering::SeqCst;
        let slots = &self.control().ranges[..RANGES_MAX];
        let mut ranges: Vec<Range> = slots
            .iter()
            .filter_map(|slot| {
                let end = slot.end.load(SeqCst);
                let start = slot.start.load(SeqCst);
                (end != 0 && end <= 1 << 47).then(|| Range::new(Vaddr(start), Vaddr(end)).ok()).flatten()
            })
            .filter(|range| !range.is_empty())
            .collect();
        ranges.sort_by_key(Range::start);
        // The gate never lets them overlap; a hostile member might.
        let mut apart: Vec<Range> = Vec::with_capacity(ranges.len());
        for range in ranges {
            if apart.last().is_none_or(|before| before.end() <= range.start()) {
                apart.push(range);
            }
        }
        apart
    }

    /// Brings `unfit` up to date. A limit comes near, and a thread becomes a real-time one, from one moment to the next.
    pub(crate) fn look_whether_fit(&mut self) {
        if self.fitness_seen.elapsed() > FITNESS_LASTS {
            let whole = || if self.whole { unfit_whole(self.pid, self.uid) } else { None };
            self.unfit = unfit(self.pid).or_else(whole);
            self.fitness_seen = Instant::now();
        }
    }

    /// Sends the helper away if the process has another address space than it by now: it has executed another program, or
    /// its first thread has ended. What the helper keeps alive is nobody's then. It leaves in its own time, since it may
    /// have something to wake up.
    pub(crate) fn look_whether_left_behind(&mut self) {
        if self.space_seen.elapsed() < SPACE_LASTS {
            return;
        }
        self.space_seen = Instant::now();
        if matches!(task::kcmp_vm(self.pid, self.helper), Ok(Ordering::Less | Ordering::Greater)) {
            self.tell(Message::Leave, None);
        }
    }

    /// True if its program goes on, and does not know what of it is merged: it may ask for it to be given back.
    pub(crate) fn needs_helper_on(&self) -> bool {
        self.whole && !self.pidfd.exited().unwrap_or(true)
    }

    /// True if nothing may be merged in the process any more.
    pub(crate) fn is_stopped(&self) -> bool {
        self.control().stop.load(std::sync::atomic::Ordering::SeqCst) != 0
    }

    /// Sends a message and rings the helper's bell. `false` if the helper is gone, or did not listen once: nobody
    /// waits for it again.
    pub(crate) fn tell(&self, message: Message, fd: Option<BorrowedFd<'_>>) -> bool {
        use std::sync::atomic::Ordering::SeqCst;
        if self.deaf.get() {
            return false;
        }
        let fds: Vec<_> = fd.into_iter().collect();
        let sent = self.link.send_timeout(&message.encode(), &fds, LISTENING);
        self.deaf.set(!matches!(sent, Ok(SendOutcome::Sent)));
        self.control().bell.fetch_add(1, SeqCst);
        let _ = futex_wake(&self.control().bell, u32::MAX);
        !self.deaf.get()
    }

    /// True if the helper hung up, speaks without being asked, or does not listen.
    pub(crate) fn misbehaves(&self) -> bool {
        self.deaf.get() || self.busy_since.is_none() && !matches!(self.hear(), Ok(None))
    }

    /// What the helper has sent, if anything; `Err` if it is gone or makes no sense.
    pub(crate) fn hear(&self) -> Result<Option<Message>, ()> {
        let mut packet = [0; PACKET];
        match self.link.recv(&mut packet) {
            Ok(RecvOutcome::Packet { length, .. }) => Message::decode(&packet[..length]).map(Some).ok_or(()),
            Ok(RecvOutcome::Empty) => Ok(None),
            Ok(RecvOutcome::Closed) | Err(_) => Err(()),
        }
    }

    /// True once the helper's process has ended.
    pub(crate) fn helper_ended(&self) -> bool {
        self.helper_pidfd.exited().unwrap_or(true)
    }

    /// Ends a helper that does not answer, gives back what it held, and takes everything out of the registration: the
    /// program may have handed the userfaultfd on to a child, and then a fork would wait for somebody who reads it.
    /// With `lost` pages it has to be called again: nothing may let a page read as something else than what it held, so
    /// whoever touches it goes on waiting.
    pub(crate) fn bury(&mut self) -> Recovered {
        if !self.helper_ended() {
            let _ = self.helper_pidfd.send_signal(kernel::Signal::KILL);
            let _ = self.helper_pidfd.wait_exited(BURIAL);
        }
        self.busy_since = None;
        let recovered = if self.helper_ended() {
            recover(&self.attended)
        } else {
            // Stuck in the kernel, in the middle of a step that it will still finish. Nothing may move beside it.
            Recovered { lost: 1, ..Recovered::default() }
        };
        if recovered.lost == 0 {
            self.let_go();
            nobody_lives(self.control());
            self.attendants = None;
        }
        recovered
    }

    /// Takes out of the registration what may be in it: what is managed, also what has become unfit for merging since it was
    /// registered, and the scratch areas. Nothing else, which may be registered with a userfaultfd of the program's: up to
    /// Linux 6.16 it would be taken from that one. What is left goes when the last descriptor is closed.
    fn let_go(&self) {
        let grounds = &self.attended.grounds;
        let scratch =
            [(grounds.scratch, abi::SCRATCH), (grounds.diverged_scratch, kernel::page_size() * abi::BATCH_MAX as u64)];
        let scratch = scratch.map(|(start, len)| (start, Vaddr(start.get().saturating_add(len))));
        let managed = self.ranges().into_iter().map(|range| (range.start(), range.end()));
        for (start, end) in managed.chain(scratch) {
            release(&self.attended, start, end);
        }
    }

    /// Keeps what could not be given back frozen for as long as this process lives.
    pub(crate) fn keep_frozen(&self) {
        std::mem::forget(self.attended.uffd.as_fd().try_clone_to_owned());
    }

    /// What a guardian needs.
    pub(crate) fn for_guardian(&self) -> (Grounds, [BorrowedFd<'_>; 4]) {
        let fds = [
            self.control_fd.as_fd(),
            self.attended.uffd.as_fd(),
            self.helper_pidfd.as_fd(),
            self.attended.memory.as_fd(),
        ];
        (self.attended.grounds, fds)
    }
}

/// What the broker brings to an introduction.
pub(crate) struct Host<'a> {
    pub(crate) token: Token,
    pub(crate) uid: u32,
    /// /dev/userfaultfd, where the broker may open it.
    pub(crate) device: Option<&'a OwnedFd>,
    /// Exact reference counts can be had.
    pub(crate) exact: bool,
    pub(crate) priority: bool,
    /// Who says that a program's gate is complete, where everything is managed.
    pub(crate) judge: Option<Arc<dyn Judge>>,
    pub(crate) index: u32,
}

/// Takes a helper in, or says why not. Nothing that it says is believed before it is seen to be so.
/// `first` is its first packet.
pub(crate) fn introduce(link: Seqpacket, first: Packet, host: Host<'_>) -> Result<Member, Refused> {
    let peer = link.peer_credentials().map_err(Refused::kernel)?;
    let Packet { bytes, mut fds } = first;
    let hello = Message::decode(&bytes).ok_or(Refused::Broken)?;
    if matches!(hello, Message::Declined { token, .. } if token == host.token) {
        return Err(Refused::Noticed);
    }
    let Message::Hello { version, member, control, scratch, diverged_scratch, token } = hello else {
        return Err(Refused::Broken);
    };
    if token != host.token {
        return Err(Refused::Token);
    }
    if peer.uid != host.uid && peer.uid != 0 {
        return Err(Refused::OtherUser { uid: peer.uid });
    }
    if version != control::VERSION {
        return Err(Refused::Version { version });
    }
    let control_fd = Arc::new(fds.pop().ok_or(Refused::Broken)?);
    let (area, same) = (map_control(&control_fd)?, map_control(&control_fd)?);
    let claims = Claims { member, control, scratch, diverged_scratch };
    if peer.pid.get() <= 0 {
        // From a process namespace that is not ours: 0 would mean this very process wherever it is used.
        return Err(Refused::OtherNamespace);
    }
    let helper = match link.peer_pidfd() {
        Ok(Some(pidfd)) => Ok(pidfd),
        _ => Pidfd::open(peer.pid),
    };
    let (introduced, ended) = match helper.map(Arc::new) {
        Ok(helper) => {
            let introduced = take_in(link, peer, Arc::clone(&helper), &claims, (Arc::clone(&control_fd), area), host);
            let broke_off = matches!(introduced, Err(Refused::Broken | Refused::NotInMember | Refused::Kernel(_)));
            // Its socket goes before it counts as ended.
            (introduced, broke_off && helper.wait_exited(ENDING).unwrap_or(false))
        }
        Err(PidfdError::Gone) => (Err(Refused::Ended), true),
        Err(error) => (Err(Refused::kernel(error)), false),
    };
    if ended {
        // Killed in the middle of it. Whoever asks it for something, or would start another one, is to know.
        nobody_lives(&same);
    }
    let has_control = |pid: Pid| maps_here(pid, Vaddr(claims.control), &control_fd).unwrap_or(true);
    match introduced {
        // Its number is nobody's here.
        Err(Refused::OtherNamespace) => Err(Refused::OtherNamespace),
        // Whoever talks is no helper.
        Err(Refused::NotInMember) if !ended && !has_control(peer.pid) => Err(Refused::NotInMember),
        // It has ended, or executed something since its helper came: what failed says nothing about it. Seen to fail: the
        // first steps of the next program were judged, and called code that nobody vouches for.
        Err(_) if !has_control(Pid(member.cast_signed())) => Err(Refused::MemoryGone),
        _ if ended => Err(Refused::Ended),
        introduced => introduced,
    }
}

fn map_control(fd: &OwnedFd) -> Result<SharedMap<Control>, Refused> {
    SharedMap::map(fd.as_fd()).map_err(Refused::kernel)
}

/// What a helper says of itself and its program.
struct Claims {
    member: u32,
    control: u64,
    scratch: u64,
    diverged_scratch: u64,
}

fn take_in(
    link: Seqpacket,
    peer: Credentials,
    helper: Arc<Pidfd>,
    claims: &Claims,
    (control_fd, area): (Arc<OwnedFd>, SharedMap<Control>),
    host: Host<'_>,
) -> Result<Member, Refused> {
    let &Claims { member, control, scratch, diverged_scratch } = claims;
    // It says a number of its own namespace, which here is nobody's or somebody else's.
    if status::namespaces_below(peer.pid).map_err(Refused::kernel)? > 0 {
        return Err(Refused::OtherNamespace);
    }
    let pid = Pid(i32::try_from(member).map_err(|_too_large| Refused::Broken)?);
    let pidfd = Pidfd::open(pid).map_err(Refused::kernel)?;
    let owner = status::read(pid).map_err(Refused::kernel)?;
    if owner.uid.effective != peer.uid {
        return Err(Refused::OtherUser { uid: owner.uid.effective });
    }
    if !maps_here(pid, Vaddr(control), &control_fd).map_err(Refused::kernel)? {
        return Err(Refused::NotInMember);
    }
    // Opened first: whatever the helper executes later, these stay with the memory that is compared here.
    let memory = MemoryFile::open(peer.pid).map_err(Refused::kernel)?;
    let pagemap = Pagemap::open(peer.pid).map_err(Refused::kernel)?;
    match task::kcmp_vm(pid, peer.pid) {
        Ok(Ordering::Equal) => {}
        // A kernel without kcmp: then the helper has it mapped there as well.
        Err(ProcError::NotSupported { .. })
            if maps_here(peer.pid, Vaddr(control), &control_fd).map_err(Refused::kernel)? => {}
        _ => return Err(Refused::NotInMember),
    }

    if let Some(judge) = &host.judge
        && let Err(why) = judge.program(pid, &own_code(&area))
    {
        // Or each of its children would come, and be judged and refused for the same code.
        let _ = send(&link, Message::Unwanted, &[]);
        return Err(Refused::NotProven(why));
    }
    let welcome = Message::Welcome { device: u32::from(host.device.is_some()) };
    let device: Vec<_> = host.device.into_iter().map(AsFd::as_fd).collect();
    send(&link, welcome, &device)?;
    let (answer, mut fds) = receive(&link)?;
    let uffd = match (answer, fds.pop()) {
        (Message::Userfault { errno: 0 }, Some(fd)) => Uffd::from_owned_fd(fd).map_err(Refused::kernel)?,
        (Message::Userfault { errno }, _) => return Err(Refused::NoUserfault { errno }),
        _ => return Err(Refused::Broken),
    };
    let (features, events) = handshake(&uffd)?;
    if !features.contains(UffdFeatures::MOVE) {
        return Err(Refused::NoMove);
    }
    let minor = features.contains(UffdFeatures::MINOR_SHMEM);
    // Not before: to load it costs more than everything else here together, and anybody may knock.
    let check = if host.exact { BpfCheck::new().ok() } else { None };
    let counts = check.as_ref().and_then(|check| own_counts(check, [scratch, diverged_scratch]));
    let counts: Vec<_> = counts.iter().map(AsFd::as_fd).collect();
    send(&link, Message::Ready { move_pages: true, minor }, &counts)?;

    let grounds = Grounds { pid, scratch: Vaddr(scratch), diverged_scratch: Vaddr(diverged_scratch) };
    let attended = Arc::new(Attended {
        control: area,
        uffd,
        grounds,
        memory,
        pagemap,
        over: AtomicBool::new(false),
        refused: Mutex::default(),
    });
    let exact_check = check.is_some();
    let whole = host.judge.is_some();
    let service = Service { helper: peer.pid, check, priority: host.priority, events, judge: host.judge };
    let attendants = Attendants::start(&attended, service).map_err(Refused::kernel)?;
    Ok(Member {
        pid,
        pidfd,
        helper: peer.pid,
        helper_pidfd: helper,
        link,
        attended,
        attendants: Some(attendants),
        control_fd,
        uid: peer.uid,
        rt_hard: limit(peer.pid, Resource::RtPriority).map_or(Some(0), |limit| limit.hard),
        exact_check,
        view: View::default(),
        segments: HashMap::new(),
        free_numbers: Vec::new(),
        next_number: 0,
        busy_since: None,
        deaf: Cell::new(false),
        index: host.index,
        whole,
        stops_seen: 0,
        unfit: unfit(pid).or_else(|| if whole { unfit_whole(pid, peer.uid) } else { None }),
        fitness_seen: Instant::now(),
        space_seen: Instant::now(),
    })
}

/// A program with which the helper can count the references to its own frozen pages. Where it says that its scratch areas
/// are is where the program looks, in the helper's own memory and nowhere else.
fn own_counts(check: &BpfCheck, areas: [u64; 2]) -> Option<OwnCounts> {
    const _: () = assert!(abi::BATCH_MAX == own_counts::COUNTS);
    OwnCounts::load(check, areas.map(Vaddr)).ok()
}

/// The UFFDIO_API handshake, with fork events where the broker may ask for them. It is the broker that makes it, since
/// the member itself is not permitted to.
fn handshake(uffd: &Uffd) -> Result<(UffdFeatures, bool), Refused> {
    let plain = UffdFeatures::MOVE | UffdFeatures::MINOR_SHMEM | UffdFeatures::WP_ASYNC;
    if let Ok(features) = uffd.api(plain | UffdFeatures::EVENT_FORK) {
        return Ok((features, true));
    }
    match uffd.api(plain) {
        Ok(features) => Ok((features, false)),
        Err(_) => Err(Refused::NoMove),
    }
}

/// A packet as it came.
pub(crate) struct Packet {
    pub(crate) bytes: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

/// A connection's first packet, from whomever it comes.
pub(crate) fn first_packet(link: &Seqpacket) -> Result<Packet, Refused> {
    let mut bytes = vec![0; FIRST_PACKET_MAX];
    match link.recv_timeout(&mut bytes, INTRODUCTION) {
        Ok(RecvOutcome::Packet { length, fds }) => {
            bytes.truncate(length);
            Ok(Packet { bytes, fds })
        }
        _ => Err(Refused::Broken),
    }
}

fn receive(link: &Seqpacket) -> Result<(Message, Vec<OwnedFd>), Refused> {
    let mut packet = [0; PACKET];
    match link.recv_timeout(&mut packet, INTRODUCTION) {
        Ok(RecvOutcome::Packet { length, fds }) => {
            Ok((Message::decode(&packet[..length]).ok_or(Refused::Broken)?, fds))
        }
        _ => Err(Refused::Broken),
    }
}

fn send(link: &Seqpacket, message: Message, fds: &[BorrowedFd<'_>]) -> Result<(), Refused> {
    match link.send_timeout(&message.encode(), fds, INTRODUCTION) {
        Ok(SendOutcome::Sent) => Ok(()),
        _ => Err(Refused::Broken),
    }
}

/// True if a process has this memory file mapped at an address: then the helper lives in that process's memory.
fn maps_here(pid: Pid, address: Vaddr, file: &OwnedFd) -> Result<bool, MemfdError> {
    let (_, inode) = memfd::identity(file)?;
    let maps = maps::read(pid).unwrap_or_default();
    Ok(maps.iter().any(|vma| vma.range.start() == address && vma.inode == inode && vma.shared))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_says_what_the_kernel_said_and_no_number() {
        let source = std::io::Error::from(rustix::io::Errno::MFILE);
        let refused = Refused::kernel(PidfdError::Open { pid: Pid(4711), source });
        assert_eq!(
            refused.to_string(),
            "cannot open a descriptor of that process: Too many open files (os error 24); raise ulimit -n"
        );
        let denied = Refused::kernel(ProcError::NotSupported { interface: "process descriptors" });
        assert_eq!(denied.to_string(), "the kernel has no process descriptors");
    }
}
