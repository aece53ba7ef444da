//! The broker's loop: takes members in, ticks, fulfils wishes, buries the dead.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use abi::wire::Message;
use kernel::refcheck::BpfCheck;
use kernel::{Bytes, Pid, Uffd};
use page::{AgePolicy, CandidateIndex, SegmentId, Spans};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use store::{FillBuffer, Options, Partition};

use crate::account::Totals;
use crate::crowd::Crowd;
use crate::cycle::Eyes;
use crate::error::BrokerError;
use crate::guardian::GuardianLink;
use crate::layout::Layout;
use crate::member::Member;
use crate::order::{Item, Queue, lower};
use crate::quiet::Quiet;
use crate::reception::Desk;
use crate::rendezvous::Rendezvous;
use crate::roll::Roll;
use crate::sample::{Sample, SegmentFile};
use crate::settings::{CheckChoice, Scope, Settings};
use crate::wishes::{Asked, RefusedKind};

mod accept;
mod books;
mod choosing;
mod handle;
mod now;
mod ordering;
mod quiescent;
mod reclaim;
mod requests;
mod stopped;
mod tick;

use accept::Introduced;
pub use handle::BrokerHandle;
use stopped::Stopped;

/// Pages that the candidate index has room for: 8 bytes each, taken as they come.
const INDEX_PAGES: u64 = 1 << 27;
/// How often the members' mappings are read for the books.
const SAMPLE_EVERY: Duration = Duration::from_secs(2);
/// The same at least, in a run that has merged since the last time and is not eight seconds old.
const SAMPLE_SOON: Duration = Duration::from_millis(200);
/// One partition, its members, and what is known of their pages.
pub struct Broker {
    settings: Settings,
    rendezvous: Rendezvous,
    partition: Partition,
    eyes: Eyes,
    members: Vec<Member>,
    /// Processes that merge in their own threads.
    quiet: HashMap<Pid, Quiet>,
    queues: HashMap<u32, Queue>,
    next_index: u32,
    totals: Totals,
    /// Inodes of segments, for reading mappings.
    inodes: HashMap<u64, SegmentFile>,
    inode_of: HashMap<SegmentId, u64>,
    device: Option<OwnedFd>,
    /// Counts references, where that can be done.
    check: Option<BpfCheck>,
    members_ever: u64,
    introduced: Receiver<Introduced>,
    introducer: Sender<Introduced>,
    asked: Receiver<Asked>,
    wake: Arc<OwnedFd>,
    desk: Desk,
    guardian: Option<GuardianLink>,
    started: Instant,
    sampled: Instant,
    last_sample: Sample,
    /// Pages merged until then.
    merges_sampled: u64,
    peak: u64,
    policy: AgePolicy,
    interval: Option<Duration>,
    /// Members that keep their ranges merged where the settings do not say so for all: how many of their trackers live.
    trackers: HashMap<Pid, u32>,
    crowd: Crowd,
    roll: Roll,
    max_map_count: u64,
    waiting: Vec<(Instant, Asked)>,
    /// What a member's budget of mappings did not allow, until they are counted again.
    postponed: HashMap<u32, Vec<Item>>,
    /// Dead helpers' members with pages that could not be given back yet.
    unburied: Vec<Member>,
    /// Pages were refused that may only wait in the kernel's batches.
    drain_due: bool,
    /// Why processes were left alone, and how many for each reason.
    reasons: Vec<(String, u64)>,
    /// Who was taken in and has done something that ends merging.
    stopped: Stopped,
    /// Processes whose last helper was not taken in, and why.
    refused: HashMap<Pid, (RefusedKind, String)>,
    /// Processes that have left and whose next helper has not come.
    left: HashSet<Pid>,
}

impl Broker {
    /// Opens a partition and starts to serve it in a thread of its own.
    ///
    /// # Errors
    /// [`BrokerError`] if the partition, the socket or the thread could not be had.
    pub fn start(settings: Settings) -> Result<BrokerHandle, BrokerError> {
        let (broker, asked) = Self::open(settings)?;
        let (name, token, wake) =
            (broker.rendezvous.name().to_owned(), broker.rendezvous.token(), Arc::clone(&broker.wake));
        let run = move || broker.serve();
        let thread =
            std::thread::Builder::new().name("pf-broker".to_owned()).spawn(run).map_err(BrokerError::Thread)?;
        Ok(BrokerHandle { asked, wake, thread: Some(thread), name, token, owner: Pid::this() })
    }

    fn open(settings: Settings) -> Result<(Self, Sender<Asked>), BrokerError> {
        let rendezvous = Rendezvous::open()?;
        let options = Options {
            strict: settings.strict,
            limit: settings.store_limit.map(Bytes),
            ..Options::for_user(settings.uid)
        };
        let partition = Partition::open(options)?;
        let counted = matches!(settings.check, CheckChoice::Auto | CheckChoice::Bpf);
        let check = if counted { BpfCheck::new().ok() } else { None };
        let wake = Arc::new(
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|errno| BrokerError::Poll(errno.into()))?,
        );
        let over = Arc::new(
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|errno| BrokerError::Poll(errno.into()))?,
        );
        let (introducer, introduced) = channel();
        let (asker, asked) = channel();
        let desk = Desk {
            token: rendezvous.token(),
            uid: settings.uid,
            asker: asker.clone(),
            wake: Arc::clone(&wake),
            over,
            visitors: Arc::default(),
        };
        let (interval, policy) = pace(settings.stable);
        let guardian = settings.guardian.as_ref().and_then(GuardianLink::start);
        let now = Instant::now();
        let broker = Self {
            rendezvous,
            partition,
            eyes: Eyes {
                index: CandidateIndex::new(INDEX_PAGES),
                spans: Spans::new(),
                buffer: Vec::new(),
                fill_buffer: FillBuffer::new(),
            },
            members: Vec::new(),
            quiet: HashMap::new(),
            queues: HashMap::new(),
            next_index: 0,
            totals: Totals::default(),
            inodes: HashMap::new(),
            inode_of: HashMap::new(),
            device: Uffd::open_device().ok(),
            check,
            members_ever: 0,
            introduced,
            introducer,
            asked,
            wake,
            desk,
            guardian,
            started: now,
            sampled: now,
            last_sample: Sample::default(),
            merges_sampled: 0,
            peak: 0,
            policy,
            trackers: HashMap::new(),
            interval,
            crowd: Crowd::of_more_than(settings.runnable_per_cpu),
            roll: Roll::default(),
            max_map_count: kernel::maps::max_map_count(),
            waiting: Vec::new(),
            postponed: HashMap::new(),
            unburied: Vec::new(),
            drain_due: false,
            reasons: Vec::new(),
            stopped: Stopped::default(),
            refused: HashMap::new(),
            left: HashSet::new(),
            settings,
        };
        Ok((broker, asker))
    }

    fn serve(mut self) {
        let mut next_tick = Instant::now();
        loop {
            let now = Instant::now();
            let mut until = match self.interval {
                Some(_) if !self.members.is_empty() => next_tick.saturating_duration_since(now),
                _ => Duration::from_millis(500),
            };
            if !self.waiting.is_empty() {
                until = until.min(Duration::from_millis(5));
            }
            self.wait(until);
            let mut drained = [0; 8];
            let _ = rustix::io::read(&*self.wake, &mut drained);
            self.accept();
            // Of members that were not waited for.
            self.pump(&mut |_, _| {});
            self.bury_the_dead();
            self.keep_guarded();
            self.forget_quiet();
            if self.fulfil_wishes() {
                break;
            }
            if let Some(interval) = self.interval
                && Instant::now() >= next_tick
            {
                self.tick();
                next_tick = Instant::now() + interval;
            }
            // What a short run saves is gone with it: a young one looks more often at what it has merged.
            let unseen = self.totals.merges > self.merges_sampled;
            let sample_every =
                if unseen { (self.started.elapsed() / 4).clamp(SAMPLE_SOON, SAMPLE_EVERY) } else { SAMPLE_EVERY };
            if self.sampled.elapsed() >= sample_every && !(self.members.is_empty() && self.quiet.is_empty()) {
                self.take_sample();
            }
        }
        self.leave();
    }

    fn wait(&self, until: Duration) {
        let mut fds =
            vec![PollFd::new(&self.rendezvous.listener, PollFlags::IN), PollFd::new(&*self.wake, PollFlags::IN)];
        for member in &self.members {
            fds.push(PollFd::new(&member.link, PollFlags::IN));
            fds.push(PollFd::new(&member.pidfd, PollFlags::IN));
        }
        let limit = Timespec { tv_sec: until.as_secs().cast_signed(), tv_nsec: until.subsec_nanos().into() };
        let _ = poll(&mut fds, Some(&limit));
    }

    fn bury_the_dead(&mut self) {
        let mut index = 0;
        while index < self.members.len() {
            let member = &mut self.members[index];
            let program_ended = member.pidfd.exited().unwrap_or(true);
            if program_ended {
                member.tell(Message::Leave, None);
            } else {
                member.look_whether_left_behind();
            }
            if !program_ended && !member.helper_ended() && !member.misbehaves() {
                index += 1;
                continue;
            }
            self.remove(index);
        }
        for member in std::mem::take(&mut self.unburied) {
            self.bury(member);
        }
    }

    /// A guardian that was killed is replaced, and told of all members.
    fn keep_guarded(&mut self) {
        if !self.guardian.as_mut().is_some_and(GuardianLink::has_died) {
            return;
        }
        self.guardian = self.settings.guardian.as_ref().and_then(GuardianLink::start);
        if let Some(guardian) = &mut self.guardian {
            self.members.iter().chain(&self.unburied).for_each(|member| guardian.add(member));
        }
    }

    fn bury(&mut self, mut member: Member) {
        if member.bury().lost > 0 && !member.pidfd.exited().unwrap_or(true) {
            self.unburied.push(member);
            return;
        }
        member.view.clear(&mut self.eyes.spans);
        if let Some(guardian) = &mut self.guardian {
            guardian.remove(&member);
        }
    }

    pub(super) fn remove(&mut self, index: usize) {
        let mut member = self.members.swap_remove(index);
        self.note_last(&mut member);
        self.forget_trackers(member.pid);
        self.totals.keep(member.control());
        self.roll.let_go(member.index);
        self.postponed.remove(&member.index);
        if let Some(mut queue) = self.queues.remove(&member.index) {
            self.totals.busy += queue.busy;
            queue.abandon();
        }
        self.bury(member);
    }

    pub(super) fn member(&mut self, owner: u32) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.index == owner)
    }

    /// Brings a member's view up to date. `false` if there is nothing to be seen.
    pub(super) fn refresh(&mut self, owner: u32) -> bool {
        let policy = self.policy;
        let Some(position) = self.members.iter().position(|member| member.index == owner) else { return false };
        let member = &mut self.members[position];
        let epoch = member.control().layout_epoch.load(SeqCst);
        if member.view.epoch == Some(epoch) {
            return true;
        }
        let ranges = member.ranges();
        let mut layout = Layout::at(member);
        layout.whole = matches!(self.settings.scope, Scope::All(_));
        member.view.refresh(layout, epoch, &ranges, policy, owner, &mut self.eyes.spans)
    }

    /// Lets every helper go, between two batches. What is merged stays merged. Of programs that are managed whole and go on,
    /// helpers stay to give back what is asked for.
    fn leave(mut self) {
        // Callers in mid-request and between requests hear it at once.
        let _ = rustix::io::write(&*self.desk.over, &1_u64.to_ne_bytes());
        self.waiting.clear();
        for member in &self.members {
            // It may have a plan, whose end nobody waits for, and stay.
            lower(member);
            member.tell(if member.needs_helper_on() { Message::Stay } else { Message::Leave }, None);
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline && !self.members.is_empty() {
            let stays = self.members.iter().position(|member| matches!(member.hear(), Ok(Some(Message::Stay))));
            if let Some(index) = stays {
                let member = self.members.swap_remove(index);
                if let Some(guardian) = &mut self.guardian {
                    guardian.remove(&member);
                }
            } else if let Some(index) = self.members.iter().position(Member::helper_ended) {
                self.remove(index);
            } else {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        while !self.members.is_empty() {
            self.remove(0);
        }
        match self.guardian.take() {
            // Without a farewell: it goes on with what is left.
            Some(guardian) if !self.unburied.is_empty() => drop(guardian),
            Some(guardian) => guardian.dismiss(),
            None => self.unburied.iter().for_each(Member::keep_frozen),
        }
    }
}

/// How often to look and when a page has settled, for a settling time.
fn pace(stable: Option<Duration>) -> (Option<Duration>, AgePolicy) {
    let interval = stable.map(|stable| (stable / 4).clamp(Duration::from_millis(50), Duration::from_millis(500)));
    let settle = match (stable, interval) {
        (Some(stable), Some(interval)) => ((stable.as_secs_f64() / interval.as_secs_f64()).ceil() as u32).max(1),
        _ => 1,
    };
    // A merge costs a few microseconds: a page that stays merged for as long as it took to settle has paid for it. Twice
    // that held back what guests write every five seconds or so, and which is equal to the store's again in between: three
    // of them settled at 496 MiB, with this at 468.
    (interval, AgePolicy { settle, worth: settle, decay: 60 })
}
