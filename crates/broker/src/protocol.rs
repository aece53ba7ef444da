//! What library callers and the broker say to each other: JSON packets on the socket that helpers use too.
//!
//! A caller's first packet is a [`Greeting`] (a helper's is 64 bytes that begin with a number, never with a brace).
//! Then each [`Request`] gets one or more packets of [`Answer`]. A caller speaks for the process that the socket's
//! credentials name, and for no other.

use serde::{Deserialize, Serialize};

use crate::wishes::{MergeReport, RefusedKind};

/// Most bytes of a packet.
pub(crate) const PACKET_MAX: usize = 64 << 10;
/// Most ranges in a request; more go into several.
pub(crate) const RANGES_MAX: usize = 512;
/// Version of this protocol.
pub(crate) const VERSION: u32 = 1;

/// A range of addresses: first byte, byte behind.
pub(crate) type Span = (u64, u64);

/// A caller's first packet.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Greeting {
    pub(crate) version: u32,
    pub(crate) token: (u64, u64),
}

/// What a caller asks for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Merge ranges that it has handed over; empty for all.
    Merge { ranges: Vec<Span> },
    /// Give ranges their own pages back.
    Unmerge { ranges: Vec<Span> },
    /// The state of the partition.
    Summary,
}

/// What the broker answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The greeting was right.
    Welcome,
    /// What was done.
    Report(MergeReport),
    /// The state, as [`crate::Summary`] is written.
    Summary(serde_json::Value),
    /// The caller has no helper here.
    NoMember,
    /// Its helper was not taken in.
    Refused { kind: RefusedKind, reason: String },
    /// The request made no sense.
    Senseless,
}
