//! Where library callers are received: a thread for each connection, which passes requests on to the broker's loop.
//!
//! A caller that stalls, sends nonsense or dies ends its own thread and nothing else. It is let in only with the
//! partition's secret and as the partition's user, and what it asks for concerns its own process alone: the one that
//! the kernel says was at the other end when the connection was made.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use kernel::{Pid, Pidfd, Range, RecvOutcome, SendOutcome, Seqpacket, Vaddr};
use rustix::event::{PollFd, PollFlags, poll};

use crate::protocol::{
    Answer, Greeting, PACKET_MAX, RANGES_MAX, RUNS_AT_ONCE, Request, Run, SEGMENTS_AT_ONCE, Span, VERSION,
};
use crate::quiet::QuietPlan;
use crate::rendezvous::Token;
use crate::wishes::{Asked, MergeReport, Wish, Wished};

/// How long a caller may take to read an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// Connections at one time, callers' and helpers' introductions together.
const VISITORS_MAX: usize = 1024;

/// What a caller's thread needs of the broker.
#[derive(Clone)]
pub(crate) struct Desk {
    pub(crate) token: Token,
    pub(crate) uid: u32,
    pub(crate) asker: Sender<Asked>,
    pub(crate) wake: Arc<OwnedFd>,
    /// Readable once the broker ends.
    pub(crate) over: Arc<OwnedFd>,
    pub(crate) visitors: Arc<AtomicUsize>,
}

/// A connection that is being served; counts as long as it lives.
pub(crate) struct Visit(Arc<AtomicUsize>);

impl Desk {
    /// Counts a connection. `None` if there are too many.
    pub(crate) fn admit(&self) -> Option<Visit> {
        let visit = Visit(Arc::clone(&self.visitors));
        (self.visitors.fetch_add(1, SeqCst) < VISITORS_MAX).then_some(visit)
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// True if a connection's first packet is a caller's.
pub(crate) fn is_greeting(packet: &[u8]) -> bool {
    packet.first() == Some(&b'{')
}

/// Serves a caller until it hangs up or the broker ends.
pub(crate) fn receive_caller(link: &Seqpacket, greeting: &[u8], desk: &Desk) {
    let Ok(greeting) = serde_json::from_slice::<Greeting>(greeting) else { return };
    let Ok(peer) = link.peer_credentials() else { return };
    let known = greeting.token == (desk.token.0, desk.token.1) && greeting.version == VERSION;
    if !known || peer.uid != desk.uid && peer.uid != 0 || peer.pid.get() <= 0 {
        return;
    }
    // The process itself, and not whoever gets its number later.
    let pidfd = match link.peer_pidfd() {
        Ok(Some(pidfd)) => pidfd,
        _ => match Pidfd::open(peer.pid) {
            Ok(pidfd) => pidfd,
            Err(_) => return,
        },
    };
    if !say(link, &Answer::Welcome) {
        return;
    }
    let mut buffer = vec![0; PACKET_MAX];
    while let Some(length) = next(link, desk, &mut buffer) {
        let answer = match serde_json::from_slice::<Request>(&buffer[..length]) {
            Ok(_) if pidfd.exited().unwrap_or(true) => return,
            Ok(request) => match fulfil(request, peer.pid, link, desk) {
                Some(answer) => answer,
                None => return,
            },
            Err(_) => Answer::Senseless,
        };
        if !say(link, &answer) {
            return;
        }
    }
}

/// Waits for the next packet; `None` if there will be none.
fn next(link: &Seqpacket, desk: &Desk, buffer: &mut [u8]) -> Option<usize> {
    loop {
        let mut fds = [PollFd::new(link, PollFlags::IN), PollFd::from_borrowed_fd(desk.over.as_fd(), PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(kernel::Errno::INTR) => {}
            Err(_) => return None,
        }
        if !fds[1].revents().is_empty() {
            return None;
        }
        match link.recv(buffer) {
            Ok(RecvOutcome::Packet { length, .. }) => return Some(length),
            Ok(RecvOutcome::Empty) => {}
            Ok(RecvOutcome::Closed) | Err(_) => return None,
        }
    }
}

fn say(link: &Seqpacket, answer: &Answer) -> bool {
    say_with(link, answer, &[])
}

fn say_with(link: &Seqpacket, answer: &Answer, fds: &[BorrowedFd<'_>]) -> bool {
    let Ok(packet) = serde_json::to_vec(answer) else { return false };
    matches!(link.send_timeout(&packet, fds, ANSWER_WITHIN), Ok(SendOutcome::Sent))
}

/// Sends a plan in packets that stay small; the last one is the answer.
fn say_plan(link: &Seqpacket, plan: &QuietPlan) -> Option<Answer> {
    let mut runs = plan.runs.as_slice();
    while !runs.is_empty() {
        let mut fds: Vec<BorrowedFd<'_>> = Vec::new();
        let mut last = None;
        let mut part: Vec<Run> = Vec::new();
        for run in &runs[..runs.len().min(RUNS_AT_ONCE)] {
            let place = match run.place {
                Some((segment, page)) => {
                    if last != Some(segment) {
                        if fds.len() == SEGMENTS_AT_ONCE {
                            break;
                        }
                        last = Some(segment);
                        fds.push(plan.segments.get(segment)?.as_fd());
                    }
                    Some((fds.len() - 1, page))
                }
                None => None,
            };
            part.push((run.pages.start().get(), run.pages.end().get(), run.keep, place));
        }
        runs = &runs[part.len()..];
        if !say_with(link, &Answer::Place { runs: part }, &fds) {
            return None;
        }
    }
    let report = MergeReport {
        pages_scanned: plan.pages_scanned,
        pages_merged_elsewhere: plan.pages_merged_elsewhere,
        refused: plan.refused.iter().cloned().collect(),
        cpu: plan.cpu,
        ..MergeReport::default()
    };
    Some(Answer::Looked { report, next: plan.next })
}

/// Asks the broker's loop; `None` if it has ended.
fn fulfil(request: Request, pid: Pid, link: &Seqpacket, desk: &Desk) -> Option<Answer> {
    let wish = match request {
        Request::Merge { ranges } => ranges_of(&ranges).map(|ranges| Wish::Merge { pid, ranges }),
        Request::Unmerge { ranges } => ranges_of(&ranges).map(|ranges| Wish::Unmerge { pid, ranges }),
        Request::Track { stable } => Some(Wish::Track { pid, stable: Duration::from_millis(stable) }),
        Request::Untrack => Some(Wish::Untrack { pid }),
        Request::Leave => Some(Wish::Leave { pid }),
        Request::Quiescent { ranges, from } => {
            let wish = |ranges| Wish::Quiescent { pid, uid: desk.uid, ranges, from };
            ranges_of(&ranges).map(wish)
        }
        Request::Summary => Some(Wish::Summary),
    };
    let Some(wish) = wish else { return Some(Answer::Senseless) };
    Some(match ask(wish, desk)? {
        Wished::Report(report) => Answer::Report(report),
        Wished::Summary(summary) => Answer::Summary(serde_json::to_value(&*summary).unwrap_or_default()),
        Wished::Quiescent(plan) => say_plan(link, &plan)?,
        Wished::NoMember => Answer::NoMember,
        Wished::Refused { kind, reason } => Answer::Refused { kind, reason },
    })
}

fn ask(wish: Wish, desk: &Desk) -> Option<Wished> {
    let (answer, answered) = channel();
    desk.asker.send(Asked { wish, answer }).ok()?;
    let _ = rustix::io::write(&*desk.wake, &1_u64.to_ne_bytes());
    answered.recv().ok()
}

/// The ranges that a caller named, if they are some.
fn ranges_of(spans: &[Span]) -> Option<Vec<Range>> {
    const USER_END: u64 = 1 << 47;
    if spans.len() > RANGES_MAX {
        return None;
    }
    let range = |(start, end): &Span| {
        Range::new(Vaddr(*start), Vaddr(*end)).ok().filter(|range| !range.is_empty() && *end <= USER_END)
    };
    spans.iter().map(range).collect()
}
