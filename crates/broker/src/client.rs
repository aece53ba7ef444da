//! A library caller's end of the connection to a broker.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use kernel::{Pid, Range, RecvOutcome, SendOutcome, Seqpacket, Vaddr};
use serde::Serialize;

use crate::protocol::{Answer, Greeting, PACKET_MAX, RANGES_MAX, Request, Run, Span, VERSION};
use crate::rendezvous::Token;
use crate::wishes::{MergeReport, RefusedKind};

/// How long the broker may take to say welcome: it is busy with other members' requests at most.
const GREETING: Duration = Duration::from_secs(10);
/// How often a caller that waits looks whether the broker is still there; its end wakes the caller at once.
const LOOK_UP: Duration = Duration::from_secs(60);

/// What can go wrong between a caller and its broker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens: the broker has ended, or lives in another network namespace.
    #[error("there is no broker for this partition")]
    NoBroker(#[source] kernel::SocketError),
    /// The broker has ended while it was asked.
    #[error("the broker of this partition has ended")]
    Ended,
    /// It does not accept the secret, or this user.
    #[error("the broker did not let this process in")]
    Rejected,
    /// It says what this build does not understand.
    #[error("the broker's answer makes no sense")]
    Senseless,
    /// The socket failed.
    #[error("the connection to the broker failed")]
    Socket(#[from] kernel::SocketError),
    /// The process has no helper at the broker.
    #[error("this process has no helper at the broker")]
    NoMember,
    /// The helper was not taken in.
    #[error("{reason}")]
    Refused {
        /// Which reason.
        kind: RefusedKind,
        /// In words.
        reason: String,
    },
}

/// Pages of this process that equal pages of a segment, one behind the other.
#[derive(Clone, Copy, Debug)]
pub struct StoreRun<'a> {
    /// The pages.
    pub pages: Range,
    /// Protection and properties of their mapping, bits of `abi::mark::Keep`.
    pub keep: u8,
    /// The segment and its page that the first page equals; `None` if the pages hold zeros.
    pub segment: Option<(BorrowedFd<'a>, u32)>,
}

/// What became of a run, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// Mapped, or given back for zeros.
    pub done: u64,
    /// Left, because they are not equal.
    pub changed: u64,
    /// Left, because they could not be mapped.
    pub failed: u64,
}

/// A connection. It belongs to the process that made it: a forked child makes its own.
#[derive(Debug)]
pub struct Client {
    link: Seqpacket,
    owner: Pid,
    buffer: Vec<u8>,
}

impl Client {
    /// Connects to the broker at an abstract socket name.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn connect(name: &str, token: Token) -> Result<Self, ClientError> {
        let link = Seqpacket::connect_abstract(name.as_bytes()).map_err(ClientError::NoBroker)?;
        let mut client = Self { link, owner: Pid::this(), buffer: vec![0; PACKET_MAX] };
        client.send(&Greeting { version: VERSION, token: (token.0, token.1) }).map_err(rejected)?;
        match client.receive(Some(GREETING)).map_err(rejected)?.0 {
            Answer::Welcome => Ok(client),
            _ => Err(ClientError::Senseless),
        }
    }

    /// True if this process made the connection.
    #[must_use]
    pub fn is_own(&self) -> bool {
        self.owner == Pid::this()
    }

    /// Merges ranges that this process has handed over.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn merge(&mut self, ranges: &[Range]) -> Result<MergeReport, ClientError> {
        self.report(ranges, |ranges| Request::Merge { ranges })
    }

    /// Gives ranges their own pages back.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn unmerge(&mut self, ranges: &[Range]) -> Result<MergeReport, ClientError> {
        self.report(ranges, |ranges| Request::Unmerge { ranges })
    }

    /// Has the broker watch what members have handed over and merge what has stayed unwritten for `stable`, until
    /// [`Client::untrack`] was called as often.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn track(&mut self, stable: Duration) -> Result<(), ClientError> {
        let stable = u64::try_from(stable.as_millis()).unwrap_or(u64::MAX);
        self.ask(&Request::Track { stable }).map(drop)
    }

    /// The end of one [`Client::track`].
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn untrack(&mut self) -> Result<(), ClientError> {
        self.ask(&Request::Untrack).map(drop)
    }

    /// Has this process's helper leave, between two batches. Done when it is gone.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn leave(&mut self) -> Result<(), ClientError> {
        self.ask(&Request::Leave).map(drop)
    }

    /// Has the broker look at ranges of this process and calls `place` for every run of pages that equals pages of a
    /// segment, or zeros: it is to compare and map them, or not, and returns what it did.
    ///
    /// # Errors
    /// [`ClientError`]. What was placed before is placed.
    pub fn merge_quiescent(
        &mut self,
        ranges: &[Range],
        mut place: impl FnMut(&StoreRun<'_>) -> Placed,
    ) -> Result<MergeReport, ClientError> {
        let mut total = MergeReport::default();
        for ranges in ranges.chunks(RANGES_MAX) {
            let spans: Vec<Span> = ranges.iter().map(|range| (range.start().get(), range.end().get())).collect();
            let mut from = None;
            loop {
                self.send(&Request::Quiescent { ranges: spans.clone(), from })?;
                let next = loop {
                    let (answer, fds) = self.receive(None)?;
                    match answer {
                        Answer::Place { runs } => place_all(&runs, &fds, ranges, &mut place, &mut total)?,
                        Answer::Looked { report, next } => {
                            total.add(&report);
                            break next;
                        }
                        other => return Err(failed(other)),
                    }
                };
                if next.is_none() {
                    break;
                }
                from = next;
            }
        }
        Ok(total)
    }

    /// The state of the partition, as [`crate::Summary`] is written in JSON.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn summary(&mut self) -> Result<serde_json::Value, ClientError> {
        match self.ask(&Request::Summary)? {
            Answer::Summary(summary) => Ok(summary),
            _ => Err(ClientError::Senseless),
        }
    }

    fn report(&mut self, ranges: &[Range], request: impl Fn(Vec<Span>) -> Request) -> Result<MergeReport, ClientError> {
        let mut total = MergeReport::default();
        for ranges in ranges.chunks(RANGES_MAX) {
            let spans = ranges.iter().map(|range| (range.start().get(), range.end().get())).collect();
            match self.ask(&request(spans))? {
                Answer::Report(report) => total.add(&report),
                _ => return Err(ClientError::Senseless),
            }
        }
        Ok(total)
    }

    fn ask(&mut self, request: &Request) -> Result<Answer, ClientError> {
        self.send(request)?;
        match self.receive(None)?.0 {
            failure @ (Answer::NoMember | Answer::Refused { .. } | Answer::Senseless) => Err(failed(failure)),
            answer => Ok(answer),
        }
    }

    fn send(&self, message: &impl Serialize) -> Result<(), ClientError> {
        let packet = serde_json::to_vec(message).map_err(|_impossible| ClientError::Senseless)?;
        match self.link.send_timeout(&packet, &[], GREETING)? {
            SendOutcome::Sent => Ok(()),
            SendOutcome::Full | SendOutcome::Closed => Err(ClientError::Ended),
        }
    }

    fn receive(&mut self, within: Option<Duration>) -> Result<(Answer, Vec<OwnedFd>), ClientError> {
        loop {
            match self.link.recv_timeout(&mut self.buffer, within.unwrap_or(LOOK_UP))? {
                RecvOutcome::Packet { length, fds } => {
                    let answer = serde_json::from_slice(&self.buffer[..length]);
                    return Ok((answer.map_err(|_unknown| ClientError::Senseless)?, fds));
                }
                RecvOutcome::Empty if within.is_none() => {}
                RecvOutcome::Empty | RecvOutcome::Closed => return Err(ClientError::Ended),
            }
        }
    }
}

/// Passes on the runs that lie in what was named.
fn place_all(
    runs: &[Run],
    fds: &[OwnedFd],
    ranges: &[Range],
    place: &mut impl FnMut(&StoreRun<'_>) -> Placed,
    total: &mut MergeReport,
) -> Result<(), ClientError> {
    for (start, end, keep, at) in runs {
        let pages = Range::new(Vaddr(*start), Vaddr(*end)).map_err(|_no_range| ClientError::Senseless)?;
        let segment = match at {
            Some((index, page)) => Some((fds.get(*index).ok_or(ClientError::Senseless)?.as_fd(), *page)),
            None => None,
        };
        if !ranges.iter().any(|range| range.contains_range(&pages)) {
            return Err(ClientError::Senseless);
        }
        let placed = place(&StoreRun { pages, keep: *keep, segment });
        if segment.is_some() {
            total.pages_merged += placed.done;
        } else {
            total.zero_pages += placed.done;
        }
        for (word, pages) in [("changed", placed.changed), ("properties", placed.failed)] {
            if pages > 0 {
                *total.refused.entry(word.to_owned()).or_default() += pages;
            }
        }
    }
    Ok(())
}

fn failed(answer: Answer) -> ClientError {
    match answer {
        Answer::NoMember => ClientError::NoMember,
        Answer::Refused { kind, reason } => ClientError::Refused { kind, reason },
        _ => ClientError::Senseless,
    }
}

/// A broker that hangs up at the greeting does not want this caller.
fn rejected(error: ClientError) -> ClientError {
    if matches!(error, ClientError::Ended) { ClientError::Rejected } else { error }
}
