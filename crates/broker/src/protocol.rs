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
/// Most descriptors in a packet: they count against the caller's limit while it maps.
pub(crate) const SEGMENTS_AT_ONCE: usize = 32;
/// Most runs in a packet.
pub(crate) const RUNS_AT_ONCE: usize = 800;
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
    /// Keep merged what members have handed over; the settling time in milliseconds.
    Track { stable: u64 },
    /// The end of one `Track`.
    Untrack,
    /// The helper is to go.
    Leave,
    /// Look at ranges, from an address on, for the caller to merge them itself.
    Quiescent { ranges: Vec<Span>, from: Option<u64> },
    /// The state of the partition.
    Summary,
}

/// A run of pages that the caller is to compare and map: first byte, byte behind, protection and properties, and the
/// segment (an index into the descriptors that came with the packet) with its page, or nothing for zeros.
pub(crate) type Run = (u64, u64, u8, Option<(usize, u32)>);

/// What the broker answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// The greeting was right.
    Welcome,
    /// What was done.
    Report(MergeReport),
    /// The state, as [`crate::Summary`] is written.
    Summary(serde_json::Value),
    /// What the caller is to map; the segments' descriptors come with it.
    Place { runs: Vec<Run> },
    /// The end of a look: what it found out, and where to go on.
    Looked { report: MergeReport, next: Option<u64> },
    /// The caller has no helper here.
    NoMember,
    /// Its helper was not taken in.
    Refused { kind: RefusedKind, reason: String },
    /// The request made no sense.
    Senseless,
}
