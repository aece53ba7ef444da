//! The process that owns the store: it takes members in, decides what to merge, and orders it.
//!
//! * [`Rendezvous`] is where helpers and library callers find the broker, with the partition's secret.
//! * [`Broker`] holds one partition and its members. [`Broker::start`] runs it in a thread of its own; a
//!   [`BrokerHandle`] asks it things from other threads, a [`Client`] from other processes.
//! * Each member has an attendant thread that answers its reference checks within a millisecond and one that reads the
//!   events of its userfaultfd.
//! * [`guardian`] is the small process beside the broker that gives pages back when broker and helper both die.
//!
//! The broker believes nothing that a member writes. The control area belongs to a program that may be hostile: counts
//! are clamped, addresses are used on that member's own address space only, and what is reported as saved is read from
//! the kernel.

#![forbid(unsafe_code)]

mod account;
mod attendant;
mod broker;
mod changed;
mod children;
mod client;
mod crowd;
mod cycle;
mod error;
mod fitness;
pub mod guardian;
mod heat;
mod huge;
mod image;
mod layout;
mod left_alone;
mod member;
mod order;
mod protocol;
mod quiet;
mod reception;
mod recovery;
mod rendezvous;
mod repeats;
mod roll;
mod room;
mod sample;
mod scope;
mod settings;
mod view;
mod wishes;

pub use account::{FrozenSeconds, Refusals, Summary};
pub use broker::{Broker, BrokerHandle};
pub use client::{Client, ClientError, Placed, StoreRun};
pub use error::BrokerError;
pub use image::{AGENT, AgentFiles, host_sites, image_bytes};
pub use left_alone::LeftAlone;
pub use rendezvous::{Rendezvous, Token};
pub use roll::Managed;
pub use room::enough_for_a_broker;
pub use scope::Judge;
pub use settings::{CheckChoice, Scope, Settings};
pub use wishes::{MergeReport, RefusedKind, Wish, Wished};
