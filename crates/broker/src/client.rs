//! A library caller's end of the connection to a broker.

use std::time::Duration;

use kernel::{Pid, Range, RecvOutcome, SendOutcome, Seqpacket};
use serde::Serialize;

use crate::protocol::{Answer, Greeting, PACKET_MAX, RANGES_MAX, Request, Span, VERSION};
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
        match client.receive(Some(GREETING)).map_err(rejected)? {
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
        match self.receive(None)? {
            Answer::NoMember => Err(ClientError::NoMember),
            Answer::Refused { kind, reason } => Err(ClientError::Refused { kind, reason }),
            Answer::Senseless => Err(ClientError::Senseless),
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

    fn receive(&mut self, within: Option<Duration>) -> Result<Answer, ClientError> {
        loop {
            match self.link.recv_timeout(&mut self.buffer, within.unwrap_or(LOOK_UP))? {
                RecvOutcome::Packet { length, .. } => {
                    return serde_json::from_slice(&self.buffer[..length]).map_err(|_unknown| ClientError::Senseless);
                }
                RecvOutcome::Empty if within.is_none() => {}
                RecvOutcome::Empty | RecvOutcome::Closed => return Err(ClientError::Ended),
            }
        }
    }
}

/// A broker that hangs up at the greeting does not want this caller.
fn rejected(error: ClientError) -> ClientError {
    if matches!(error, ClientError::Ended) { ClientError::Rejected } else { error }
}
