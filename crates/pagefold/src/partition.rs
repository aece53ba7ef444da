//! Partitions: opening, passing on, merging.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bitflags::bitflags;
use broker::{Broker, BrokerHandle, CheckChoice, Client, ClientError, MergeReport, Settings, StoreRun};
use kernel::{Adoption, Range};

use crate::agent;
use crate::descriptor::Card;
use crate::error::Error;
use crate::memory::{self, Plain, store_mappings, store_pages, whole_pages};
use crate::quiescent::SegmentReader;

/// How often pages are tried again that were left for a reason which passes.
const TRIES: u32 = 4;
/// Reasons that pass by themselves within moments.
const PASSING: [&str; 4] = ["gate_busy", "layout_changed", "threads_changed", "no_check_available"];

bitflags! {
    /// Properties of a partition.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Flags: u32 {
        /// Members do not trust each other: every run of pages lies in a sealed file of its own, so that no member gets
        /// a descriptor of pages that it did not already have.
        const STRICT = 1;
        /// The callers vouch that nobody else holds references to the pages that they merge (no pending direct I/O, no
        /// vhost, no FUSE or NFS requests into them): no reference check is made. Only where none can be had.
        const VOUCH = 2;
    }
}

/// How to open a partition, beyond its name and flags.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Properties.
    pub flags: Flags,
    /// Most bytes that the partition's page store may take.
    pub store_limit: Option<u64>,
    /// A program to start as guardian, with its arguments before the descriptor number: a process that calls
    /// `broker::guardian::run`. It gives frozen pages back if broker and helper are both killed.
    pub guardian: Option<(std::path::PathBuf, Vec<String>)>,
}

/// A partition: a store of pages into which processes merge.
///
/// The process that opens it serves it, in threads of its own, for as long as the value lives. Others join through the
/// descriptor. What is merged stays merged when the partition ends: the pages live as long as somebody maps them.
#[derive(Debug)]
pub struct Partition {
    card: Card,
    descriptor: OwnedFd,
    clients: Mutex<Vec<Client>>,
    broker: Option<BrokerHandle>,
}

impl Partition {
    /// Opens a new partition. `name` is for reports; two partitions of one name are two partitions.
    ///
    /// # Errors
    /// [`Error::Serve`], [`Error::Descriptor`].
    pub fn open(name: &str, flags: Flags) -> Result<Self, Error> {
        Self::open_with(name, &Options { flags, ..Options::default() })
    }

    /// Opens a new partition with more choices.
    ///
    /// # Errors
    /// As [`Partition::open`].
    pub fn open_with(name: &str, options: &Options) -> Result<Self, Error> {
        let settings = Settings {
            label: Some(name.to_owned()),
            strict: options.flags.contains(Flags::STRICT),
            check: if options.flags.contains(Flags::VOUCH) { CheckChoice::Vouch } else { CheckChoice::Auto },
            stable: None,
            store_limit: options.store_limit,
            guardian: options.guardian.clone(),
            ..Settings::default()
        };
        let broker = Broker::start(settings).map_err(Error::Serve)?;
        let card = Card { name: broker.name().to_owned(), token: broker.token() };
        let descriptor = card.write()?;
        Ok(Self { card, descriptor, clients: Mutex::default(), broker: Some(broker) })
    }

    /// Joins the partition whose descriptor this is.
    ///
    /// # Errors
    /// [`Error::NotAPartition`], [`Error::Ended`], [`Error::Rejected`].
    pub fn from_fd(descriptor: OwnedFd) -> Result<Self, Error> {
        let card = Card::read(descriptor.as_fd())?;
        let client = Client::connect(&card.name, card.token)?;
        Ok(Self { card, descriptor, clients: Mutex::new(vec![client]), broker: None })
    }

    /// The descriptor, to be kept apart from this value. If this process serves the partition it goes on to serve it
    /// until it ends.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        std::mem::forget(self.broker);
        self.descriptor
    }

    /// Another descriptor of the partition, closed on exec: for a child or another process.
    ///
    /// # Errors
    /// EMFILE.
    pub fn try_clone_fd(&self) -> io::Result<OwnedFd> {
        self.descriptor.try_clone()
    }

    /// True if this process serves the partition.
    #[must_use]
    pub fn is_served_here(&self) -> bool {
        self.broker.as_ref().is_some_and(BrokerHandle::is_own)
    }

    /// Merges a range of this process now: pages equal to pages that the partition has seen become one. Other threads
    /// may use the range meanwhile. Done when it returns. The range's last page is never merged.
    ///
    /// The range stays handed over: the same range can be merged again, and pages of other members that turn out equal
    /// to its pages later are merged with them.
    ///
    /// # Errors
    /// [`Error`]; nothing has changed then, or only part of the range is merged. [`Error::NotMergeable`] if anything in
    /// the range is not private memory of this process.
    pub fn merge(&self, range: Range) -> Result<MergeReport, Error> {
        self.merge_all(&[range])
    }

    /// Merges several ranges in one request.
    ///
    /// # Errors
    /// As [`Partition::merge`].
    pub fn merge_all(&self, ranges: &[Range]) -> Result<MergeReport, Error> {
        let mut total = self.ask_for(ranges, |client| client.merge(ranges))?;
        for tried in 1..TRIES {
            if !PASSING.iter().any(|reason| total.refused.contains_key(*reason)) {
                break;
            }
            // On a busy machine whoever was late needs more than a moment.
            std::thread::sleep(Duration::from_millis(1 << (2 * tried)));
            let again = self.ask_for(ranges, |client| client.merge(ranges))?;
            // What was refused before was looked at again.
            total.refused.clear();
            total.add(&again);
        }
        Ok(total)
    }

    /// Merges a range of this process in the calling thread: compares its pages with equal ones that the partition has
    /// and maps those. Needs no userfaultfd and no privilege; Linux 6.1 has all that it takes.
    ///
    /// The first process with a page only makes it known; the second one's is merged with a copy that the partition
    /// takes of it; the first one's is merged at its next call. So members of one kind call it twice, or once more when
    /// all have loaded what they share. The range's last page is never merged.
    ///
    /// Where live merging is not possible, a merged range cannot be moved or grown by mremap (realloc of a large block)
    /// until it is unmapped: the call fails with ENOMEM.
    ///
    /// # Errors
    /// [`Error`]; part of the range may be merged then.
    ///
    /// # Safety
    /// Until this returns nothing writes the range: no other thread, no system call that was started before, no device.
    /// No other thread changes its mapping or forks. Reading it is allowed.
    #[allow(unsafe_code, reason = "the caller vouches for what the type system cannot see")]
    pub unsafe fn merge_quiescent(&self, range: Range) -> Result<MergeReport, Error> {
        let begun = Instant::now();
        let cpu = kernel::sched::usage(kernel::sched::Whose::Thread).cpu();
        memory::check(&[range])?;
        let agent = agent::for_partition(&self.card)?;
        if !agent.manage(range) {
            return Err(Error::TooManyRanges { range });
        }
        agent::handed_over(&self.card, range);
        let mut reader = SegmentReader::default();
        let place = |run: &StoreRun<'_>| {
            // SAFETY: the pages lie in the range, are readable, and nothing writes them, for which the caller vouches.
            let own = unsafe {
                let start = std::ptr::with_exposed_provenance::<u8>(run.pages.start().get() as usize);
                std::slice::from_raw_parts(start, run.pages.len().get() as usize)
            };
            reader.compare_and_place(run, own, |pages, first| {
                let segment = run.segment.map(|(segment, _)| segment);
                // SAFETY: these pages were just seen to hold what the sealed segment holds, and nothing writes them.
                unsafe { agent.place(pages, run.keep, segment, first) }
            })
        };
        let mut report = self.ask(|client| client.merge_quiescent(&[range], place))?;
        report.elapsed = begun.elapsed();
        report.cpu += kernel::sched::usage(kernel::sched::Whose::Thread).cpu().saturating_sub(cpu);
        Ok(report)
    }

    /// [`Partition::merge_quiescent`] of memory that the caller has borrowed for itself alone: then there is nothing to
    /// vouch for.
    ///
    /// # Errors
    /// As [`Partition::merge_quiescent`].
    #[allow(unsafe_code, reason = "the borrow is the proof that the function below wants")]
    pub fn merge_exclusive<T: Plain>(&self, memory: &mut [T]) -> Result<MergeReport, Error> {
        let Some(range) = whole_pages(memory) else { return Ok(MergeReport::default()) };
        // SAFETY: nobody else can use the memory while it is mutably borrowed, and all its bytes have values.
        unsafe { self.merge_quiescent(range) }
    }

    /// Gives a range its own pages back and takes it out of the partition. Other threads may use it meanwhile.
    ///
    /// Pages that no helper can give back (it needs userfaultfd, and the partition's broker) are copied in place: they
    /// are this process's own then, but their mapping shows in /proc as the store's until it is unmapped.
    ///
    /// # Errors
    /// [`Error::NotGivenBack`]. That the broker is gone is no obstacle.
    pub fn unmerge(&self, range: Range) -> Result<MergeReport, Error> {
        let begun = Instant::now();
        let mut report = MergeReport::default();
        let Some((agent, _)) = agent::present(&self.card) else { return Ok(report) };
        let before = store_pages(range);
        if agent.disown(range) {
            agent::taken_back(range);
        } else {
            for part in store_mappings(range) {
                agent.copy_in_place(part).map_err(|source| Error::NotGivenBack { range: part, source })?;
            }
        }
        report.pages_unmerged = before.saturating_sub(store_pages(range));
        report.elapsed = begun.elapsed();
        Ok(report)
    }

    /// Takes this process out of the partition: everything that it handed over gets its own pages back, and its helper
    /// goes. After that it may merge in another partition.
    ///
    /// # Errors
    /// As [`Partition::unmerge`].
    pub fn leave(&self) -> Result<MergeReport, Error> {
        let mut report = MergeReport::default();
        let Some((_, ranges)) = agent::present(&self.card) else { return Ok(report) };
        for range in ranges {
            report.add(&self.unmerge(range)?);
        }
        match self.ask(Client::leave) {
            // Without a broker the helper has left by itself.
            Ok(()) | Err(Error::Ended) => Ok(report),
            Err(error) => Err(error),
        }
    }

    /// Keeps ranges of this process merged: what has stayed unwritten for `stable` is merged, again after it was
    /// written too, until the tracker is dropped. While a partition has a tracker, everything that its members have
    /// handed over is watched, with the shortest time that was asked for.
    ///
    /// # Errors
    /// As [`Partition::merge`].
    pub fn track(&self, ranges: &[Range], stable: Duration) -> Result<Tracker<'_>, Error> {
        self.ask_for(ranges, |client| client.track(stable))?;
        Ok(Tracker { partition: self })
    }

    /// Asks the broker for something that it does to what is handed over.
    fn ask_for<T>(
        &self,
        ranges: &[Range],
        request: impl Fn(&mut Client) -> Result<T, ClientError>,
    ) -> Result<T, Error> {
        self.hand_over(ranges)?;
        match self.ask(&request) {
            // Another thread has taken the process out since, and the helper with it. This call comes after that one.
            Err(Error::HelperGone) => {
                self.hand_over(ranges)?;
                self.ask(&request)
            }
            answer => answer,
        }
    }

    fn hand_over(&self, ranges: &[Range]) -> Result<(), Error> {
        memory::check(ranges)?;
        let agent = agent::for_partition(&self.card)?;
        for range in ranges.iter().filter(|range| !range.is_empty()) {
            let adopted = agent.adopt(*range);
            if adopted != Adoption::NoHelper {
                // A part may be managed in any case.
                agent::handed_over(&self.card, *range);
            }
            match adopted {
                Adoption::Whole => {}
                Adoption::NoHelper => return Err(Error::NoHelper { range: *range }),
                Adoption::Full => return Err(Error::TooManyRanges { range: *range }),
                // Another thread has unmapped something a moment ago.
                Adoption::Holes => {
                    memory::check(&[*range])?;
                    return Err(Error::NotMergeable {
                        range: *range,
                        address: range.start(),
                        what: "a moving mapping",
                    });
                }
            }
        }
        Ok(())
    }

    /// The state of the partition as a JSON document.
    ///
    /// # Errors
    /// [`Error::Ended`], [`Error::Rejected`], [`Error::Connection`].
    pub fn summary(&self) -> Result<serde_json::Value, Error> {
        self.ask(Client::summary)
    }

    /// Asks the broker over a connection of this very process and thread.
    fn ask<T>(&self, request: impl FnOnce(&mut Client) -> Result<T, ClientError>) -> Result<T, Error> {
        let idle = {
            let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
            // After a fork these are the parent's: the broker would take the child for its parent.
            clients.retain(Client::is_own);
            clients.pop()
        };
        let mut client = match idle {
            Some(client) => client,
            None => Client::connect(&self.card.name, self.card.token)?,
        };
        let answer = request(&mut client);
        if matches!(answer, Ok(_) | Err(ClientError::NoMember | ClientError::Refused { .. })) {
            self.clients.lock().unwrap_or_else(PoisonError::into_inner).push(client);
        }
        Ok(answer?)
    }
}

impl AsFd for Partition {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

/// Keeps ranges merged as long as it lives; see [`Partition::track`].
#[derive(Debug)]
pub struct Tracker<'a> {
    partition: &'a Partition,
}

impl Drop for Tracker<'_> {
    fn drop(&mut self) {
        // A broker that has ended watches nothing any more.
        let _ = self.partition.ask(Client::untrack);
    }
}
