//! The broker's loop: takes members in, ticks, fulfils wishes, buries the dead.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use abi::place::Outcome;
use abi::wire::Message;
use kernel::refcheck::BpfCheck;
use kernel::{Bytes, Pagemap, Range, Uffd, memfd, page_size};
use page::plan::{Limits, Match, Reason, Twin, plan};
use page::{AgePolicy, CandidateIndex, Kind, Location, PageNumber, PageRange, SegmentId, Spans};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use store::{FillBuffer, Options, Partition};

use crate::account::{Books, Sample, Summary, Totals, sample};
use crate::cycle::{Eyes, Findings, Look, Regions, fill, look};
use crate::error::BrokerError;
use crate::fitness::unfit;
use crate::guardian::GuardianLink;
use crate::member::{Host, Member, Refused, introduce};
use crate::order::{Item, Order, Queue, Result1, Task};
use crate::rendezvous::{Rendezvous, Token};
use crate::settings::{CheckChoice, Settings};
use crate::view::numbers;
use crate::wishes::{Asked, MergeReport, Wish, Wished};

/// Pages that the candidate index has room for: 8 bytes each, taken as they come.
const INDEX_PAGES: u64 = 1 << 27;
/// Contents that are copied into the store at one time.
const FILL_AT_ONCE: usize = 256;
/// Pages looked at before what was found is acted upon.
const LOOK_AT_ONCE: u64 = 4096;
/// How often the members' mappings are read for the books.
const SAMPLE_EVERY: Duration = Duration::from_secs(2);
/// For how long a segment must have been without use before it is given back.
const GRACE: Duration = Duration::from_secs(10);
/// How long a wish waits for its member's helper to introduce itself.
const MEMBER_WITHIN: Duration = Duration::from_secs(5);
/// A zero page is dropped after so many times the settling time: its program may be about to use it.
const ZERO_PATIENCE: u32 = 4;
/// Merging rests while more threads are runnable than this for each CPU.
const RUNNABLE_PER_CPU: u64 = 8;

/// A running broker, for other threads.
#[derive(Debug)]
pub struct BrokerHandle {
    asked: Sender<Asked>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    name: String,
    token: Token,
}

impl BrokerHandle {
    /// Asks for something and waits for the answer.
    ///
    /// # Errors
    /// [`BrokerError::Ended`].
    pub fn ask(&self, wish: Wish) -> Result<Wished, BrokerError> {
        let (answer, answered) = channel();
        self.asked.send(Asked { wish, answer }).map_err(|_gone| BrokerError::Ended)?;
        let _ = rustix::io::write(&*self.wake, &1_u64.to_ne_bytes());
        answered.recv().map_err(|_gone| BrokerError::Ended)
    }

    /// The state now.
    ///
    /// # Errors
    /// [`BrokerError::Ended`].
    pub fn summary(&self) -> Result<Summary, BrokerError> {
        match self.ask(Wish::Summary)? {
            Wished::Summary(summary) => Ok(*summary),
            _ => Err(BrokerError::Ended),
        }
    }

    /// The abstract name of the socket that helpers connect to.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The partition's secret.
    #[must_use]
    pub fn token(&self) -> Token {
        self.token
    }
}

impl Drop for BrokerHandle {
    fn drop(&mut self) {
        let _ = self.ask(Wish::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One partition, its members, and what is known of their pages.
pub struct Broker {
    settings: Settings,
    rendezvous: Rendezvous,
    partition: Partition,
    eyes: Eyes,
    members: Vec<Member>,
    queues: HashMap<u32, Queue>,
    next_index: u32,
    totals: Totals,
    /// Inodes of segments, for reading mappings.
    inodes: HashMap<u64, SegmentId>,
    inode_of: HashMap<SegmentId, u64>,
    device: Option<OwnedFd>,
    exact: bool,
    introduced: Receiver<Result<Member, Refused>>,
    introducer: Sender<Result<Member, Refused>>,
    asked: Receiver<Asked>,
    wake: Arc<OwnedFd>,
    guardian: Option<GuardianLink>,
    started: Instant,
    sampled: Instant,
    last_sample: Sample,
    peak: u64,
    policy: AgePolicy,
    interval: Option<Duration>,
    cpus: u64,
    max_map_count: u64,
    waiting: Vec<(Instant, Asked)>,
    reasons: Vec<String>,
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
        Ok(BrokerHandle { asked, wake, thread: Some(thread), name, token })
    }

    fn open(settings: Settings) -> Result<(Self, Sender<Asked>), BrokerError> {
        let rendezvous = Rendezvous::open()?;
        let options = Options {
            strict: settings.strict,
            limit: settings.store_limit.map(Bytes),
            ..Options::for_user(settings.uid)
        };
        let partition = Partition::open(options)?;
        let exact = matches!(settings.check, CheckChoice::Auto | CheckChoice::Bpf) && BpfCheck::new().is_ok();
        let wake = Arc::new(
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|errno| BrokerError::Poll(errno.into()))?,
        );
        let (introducer, introduced) = channel();
        let (asker, asked) = channel();
        let interval =
            settings.stable.map(|stable| (stable / 4).clamp(Duration::from_millis(50), Duration::from_millis(500)));
        let settle = match (settings.stable, interval) {
            (Some(stable), Some(interval)) => {
                let cycles = stable.as_secs_f64() / interval.as_secs_f64();
                (cycles.ceil() as u32).max(1)
            }
            _ => 1,
        };
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
            queues: HashMap::new(),
            next_index: 0,
            totals: Totals::default(),
            inodes: HashMap::new(),
            inode_of: HashMap::new(),
            device: Uffd::open_device().ok(),
            exact,
            introduced,
            introducer,
            asked,
            wake,
            guardian,
            started: now,
            sampled: now,
            last_sample: Sample::default(),
            peak: 0,
            policy: AgePolicy { settle, worth: settle * 8, decay: 240 },
            interval,
            cpus: std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64),
            max_map_count: max_map_count(),
            waiting: Vec::new(),
            reasons: Vec::new(),
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
            self.bury_the_dead();
            if self.fulfil_wishes() {
                break;
            }
            if let Some(interval) = self.interval
                && Instant::now() >= next_tick
            {
                self.tick();
                next_tick = Instant::now() + interval;
            }
            if self.sampled.elapsed() >= SAMPLE_EVERY && !self.members.is_empty() {
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

    /// Helpers introduce themselves in threads of their own: one that stalls holds nobody up.
    fn accept(&mut self) {
        while let Ok(Some(link)) = self.rendezvous.listener.accept() {
            let (token, uid, index) = (self.rendezvous.token(), self.settings.uid, self.next_index);
            self.next_index += 1;
            let device = self.device.as_ref().and_then(|device| device.try_clone().ok());
            let (exact, priority) = (self.exact, self.settings.priority);
            let (introducer, wake) = (self.introducer.clone(), Arc::clone(&self.wake));
            let run = move || {
                let check = if exact { BpfCheck::new().ok() } else { None };
                let host = Host { token, uid, device: device.as_ref(), check, priority, index };
                let _ = introducer.send(introduce(link, host));
                let _ = rustix::io::write(&*wake, &1_u64.to_ne_bytes());
            };
            let _ = std::thread::Builder::new().name("pf-introduce".to_owned()).spawn(run);
        }
        while let Ok(introduced) = self.introduced.try_recv() {
            match introduced {
                Ok(member) => {
                    if let Some(guardian) = &mut self.guardian {
                        guardian.add(&member);
                    }
                    self.queues.insert(member.index, Queue::default());
                    self.members.push(member);
                }
                Err(refused) => self.reasons.push(refused.to_string()),
            }
        }
    }

    fn bury_the_dead(&mut self) {
        let mut index = 0;
        while index < self.members.len() {
            let member = &mut self.members[index];
            let program_ended = member.pidfd.exited().unwrap_or(true);
            if program_ended {
                member.tell(Message::Leave, None);
            }
            if !program_ended && !member.helper_ended() {
                index += 1;
                continue;
            }
            self.remove(index);
        }
    }

    fn remove(&mut self, index: usize) {
        let mut member = self.members.swap_remove(index);
        member.bury();
        self.totals.keep(member.control());
        if let Some(mut queue) = self.queues.remove(&member.index) {
            queue.abandon();
        }
        if let Some(guardian) = &mut self.guardian {
            guardian.remove(&member);
        }
        member.view.clear(&mut self.eyes.spans);
    }

    /// Returns true if the broker is to end.
    fn fulfil_wishes(&mut self) -> bool {
        let now = Instant::now();
        let mut asked: Vec<(Instant, Asked)> = std::mem::take(&mut self.waiting);
        asked.extend(std::iter::from_fn(|| self.asked.try_recv().ok()).map(|asked| (now, asked)));
        for (since, asked) in asked {
            let pid = match &asked.wish {
                Wish::Stop => {
                    let _ = asked.answer.send(Wished::Summary(Box::new(self.summary_now())));
                    return true;
                }
                Wish::Summary => {
                    let _ = asked.answer.send(Wished::Summary(Box::new(self.summary_now())));
                    continue;
                }
                Wish::Merge { pid, .. } | Wish::Unmerge { pid, .. } => *pid,
            };
            let Some(index) = self.members.iter().position(|member| member.pid == pid) else {
                if since.elapsed() > MEMBER_WITHIN {
                    let _ = asked.answer.send(Wished::NoMember);
                } else {
                    self.waiting.push((since, asked));
                }
                continue;
            };
            let owner = self.members[index].index;
            let report = match &asked.wish {
                Wish::Merge { ranges, .. } => self.merge_now(owner, ranges),
                Wish::Unmerge { ranges, .. } => self.unmerge_now(owner, ranges),
                Wish::Summary | Wish::Stop => continue,
            };
            let _ = asked.answer.send(Wished::Report(report));
        }
        false
    }

    fn member(&mut self, owner: u32) -> Option<&mut Member> {
        self.members.iter_mut().find(|member| member.index == owner)
    }

    /// Brings a member's view up to date. `false` if there is nothing to be seen.
    fn refresh(&mut self, owner: u32) -> bool {
        let policy = self.policy;
        let Some(position) = self.members.iter().position(|member| member.index == owner) else { return false };
        let member = &mut self.members[position];
        let epoch = member.control().layout_epoch.load(SeqCst);
        if member.view.epoch == Some(epoch) {
            return true;
        }
        let ranges = member.ranges();
        let reader = member.helper;
        member.view.refresh(reader, epoch, &ranges, policy, owner, &mut self.eyes.spans)
    }

    /// One cycle of user-space scanning: watch writes, look at what has settled, merge what has a twin.
    fn tick(&mut self) {
        let mut findings = Findings::default();
        let mut regions = Regions::new();
        let rest = runnable().is_some_and(|runnable| runnable > self.cpus * RUNNABLE_PER_CPU);
        if rest {
            self.totals.held_back += self.interval.unwrap_or_default();
        }
        let owners: Vec<u32> = self.members.iter().map(|member| member.index).collect();
        for owner in owners {
            if !self.refresh(owner) {
                continue;
            }
            let Some(position) = self.members.iter().position(|member| member.index == owner) else { continue };
            let Ok(pagemap) = Pagemap::open(self.members[position].helper) else { continue };
            let mut due: Vec<PageRange> = Vec::new();
            for index in 0..self.members[position].view.areas.len() {
                let (uffd, view) = self.members[position].watched();
                let area = &mut view.areas[index];
                let before = area.ages.counts();
                area.watch(uffd, &pagemap, &mut regions);
                let after = area.ages.counts();
                self.totals.unshared += before.merged.saturating_sub(after.merged);
                if !rest {
                    due.extend(area.ages.due());
                }
            }
            if let Some(reason) = self.members[position].unfit {
                self.totals.refused.add(reason, due.iter().map(|pages| pages.pages()).sum());
                continue;
            }
            for pages in due {
                if !self.look_at(owner, pages, &pagemap, ZERO_PATIENCE * self.policy.settle, true, &mut findings) {
                    break;
                }
            }
            if findings.fills() >= FILL_AT_ONCE {
                self.act(&mut findings, &mut |_, _| {});
            }
        }
        self.act(&mut findings, &mut |_, _| {});
        self.drive(&mut |_, _| {});
        self.eyes.index.grow_older();
    }

    fn look_at(
        &mut self,
        owner: u32,
        pages: PageRange,
        pagemap: &Pagemap,
        zero_patience: u32,
        spare_huge: bool,
        findings: &mut Findings,
    ) -> bool {
        let Some(member) = self.members.iter_mut().find(|member| member.index == owner) else { return false };
        let reader = member.helper;
        let Some(area) = member.view.area_of(pages.start) else { return true };
        let first = (area.first, area.ages.range().start);
        let this = Look { owner, reader, pagemap, first, ages: &area.ages, zero_patience, spare_huge };
        let seen = look(&this, pages, &mut self.eyes, &self.partition, findings);
        // Whatever turned out not to be there is not worth another look until it is written.
        let mut waiting = findings.zero_waiting.drain(..).peekable();
        for page in pages.iter() {
            if waiting.next_if_eq(&page).is_none() {
                area.ages.looked(page);
            }
        }
        drop(waiting);
        seen
    }

    /// Fills the store with what was found and orders the merges.
    fn act(&mut self, findings: &mut Findings, report: &mut dyn FnMut(u32, &[Result1])) {
        if findings.is_empty() {
            return;
        }
        let members = &mut self.members;
        let kind_of = |location: Location| {
            let member = members.iter_mut().find(|member| member.index == location.owner)?;
            Some(member.view.area_of(location.page)?.ages.age(location.page)?.kind)
        };
        fill(&mut self.eyes, &mut self.partition, findings, kind_of);
        let owners: Vec<u32> = findings.items.keys().copied().collect();
        for owner in owners {
            let items = findings.items.remove(&owner).unwrap_or_default();
            self.note_segments(&items);
            self.order(owner, items);
        }
        self.pump(report);
    }

    fn note_segments(&mut self, items: &[Item]) {
        for item in items {
            let (Task::Merge(place, _) | Task::Retake(place, _)) = item.task else { continue };
            if self.inode_of.contains_key(&place.segment) {
                continue;
            }
            if let store::HandOut::File { file, .. } =
                self.partition.hand_out(place.segment, self.settings.uid, |_| true)
                && let Ok((_, inode)) = memfd::identity(file)
            {
                self.inodes.insert(inode, place.segment);
                self.inode_of.insert(place.segment, inode);
            }
        }
    }

    /// Plans a member's items, area by area: long runs first, within its budget of mappings.
    fn order(&mut self, owner: u32, mut items: Vec<Item>) {
        items.sort_by_key(|item| item.address);
        items.dedup_by_key(|item| item.address);
        let size = page_size();
        let cap = self.settings.vmas.min(self.max_map_count * 3 / 4);
        let Some(position) = self.members.iter().position(|member| member.index == owner) else { return };
        let member = &mut self.members[position];
        let mut budget = cap.saturating_sub(member.view.vmas);
        let mut orders = Vec::new();
        let mut refused = 0;
        for area in &mut member.view.areas {
            let from = items.partition_point(|item| item.address < area.range.start().get());
            let to = items.partition_point(|item| item.address < area.range.end().get());
            let here = &items[from..to];
            if here.is_empty() {
                continue;
            }
            let (mut diverged, mut matches, mut contents) = (Vec::new(), Vec::new(), HashMap::new());
            for item in here {
                let page = PageNumber(item.address / size);
                match item.task {
                    Task::Merge(place, content) => {
                        contents.insert(page, content);
                        matches.push(Match { page, twin: Twin::Store(place) });
                    }
                    Task::DropZero => matches.push(Match { page, twin: Twin::Zero }),
                    Task::Retake(..) | Task::RetakeZero | Task::Unmerge => diverged.push(*item),
                }
            }
            let mut limits = Limits::new(size, budget);
            limits.batch_pages = abi::BATCH_MAX as u64;
            let planned = plan(&[numbers(area.range)], &matches, &limits);
            budget = budget.saturating_sub(planned.vmas_added);
            member.view.vmas += planned.vmas_added;
            refused += planned.pages_left_out(Reason::Budget);
            for left in planned.left_out.iter().filter(|left| left.reason == Reason::Budget) {
                left.pages.iter().for_each(|page| area.ages.refused(page));
            }
            let mut plain = Vec::new();
            for run in planned.batches.iter().flat_map(|batch| &batch.runs) {
                for (offset, page) in run.pages.iter().enumerate() {
                    let task = match run.twin {
                        Twin::Zero => Task::DropZero,
                        Twin::Store(place) => {
                            let offset = u32::try_from(offset).expect("a run is shorter than a segment");
                            let place = page::Place { segment: place.segment, page: place.page + offset };
                            let Some(content) = contents.get(&page) else { continue };
                            Task::Merge(place, *content)
                        }
                    };
                    plain.push(Item { address: page.address(size), task });
                }
            }
            for items in [plain, diverged] {
                if !items.is_empty() {
                    orders.push(Order { area: area.range, items });
                }
            }
        }
        self.totals.refused.add("budget", refused);
        let queue = self.queues.entry(owner).or_default();
        orders.into_iter().for_each(|order| queue.push(order));
    }

    /// Starts and finishes what can be, without waiting.
    fn pump(&mut self, report: &mut dyn FnMut(u32, &[Result1])) {
        let mut dead = Vec::new();
        let mut results = Vec::new();
        for member in &mut self.members {
            let Some(queue) = self.queues.get_mut(&member.index) else { continue };
            let finished = queue.finish(member);
            let started = finished.is_ok() && queue.start_next(member, &self.partition, &self.settings);
            match finished {
                Ok(Some(done)) => results.push((member.index, done)),
                Ok(None) => {}
                Err(()) => dead.push(member.index),
            }
            if !started && !dead.contains(&member.index) {
                dead.push(member.index);
            }
        }
        for (owner, done) in results {
            self.apply(owner, &done);
            report(owner, &done);
        }
        for owner in dead {
            if let Some(index) = self.members.iter().position(|member| member.index == owner) {
                self.remove(index);
            }
        }
    }

    /// Until every helper has finished what it was ordered.
    fn drive(&mut self, report: &mut dyn FnMut(u32, &[Result1])) {
        loop {
            self.pump(report);
            if self.queues.values().all(Queue::is_idle) {
                return;
            }
            let mut fds: Vec<PollFd<'_>> = self
                .members
                .iter()
                .filter(|member| member.busy_since.is_some())
                .map(|member| PollFd::from_borrowed_fd(member.link.as_fd(), PollFlags::IN))
                .collect();
            let limit = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            let _ = poll(&mut fds, Some(&limit));
        }
    }

    /// Writes down what became of a member's pages.
    fn apply(&mut self, owner: u32, results: &[Result1]) {
        let Some(position) = self.members.iter().position(|member| member.index == owner) else { return };
        let member = &mut self.members[position];
        let size = page_size();
        let mut stale = false;
        for (item, outcome) in results {
            let number = PageNumber(item.address / size);
            let Some(area) = member.view.area_of(number) else { continue };
            let offset = number.0 - area.ages.range().start.0;
            match outcome {
                Outcome::Merged | Outcome::Retaken => {
                    area.ages.merged(number);
                    if *outcome == Outcome::Merged {
                        self.totals.merges += 1;
                    } else {
                        self.totals.retaken += 1;
                    }
                    if let Task::Merge(_, content) | Task::Retake(_, content) = item.task {
                        self.eyes.index.forget(content, area.first.offset(offset));
                    }
                }
                Outcome::Zero => {
                    self.totals.zero += 1;
                    area.ages.unmerged(number);
                    area.ages.looked(number);
                    area.dropped.set(offset, true);
                }
                Outcome::Unmerged => area.ages.unmerged(number),
                Outcome::Pending => {}
                refusal => {
                    stale |= *refusal == Outcome::LayoutChanged;
                    area.ages.refused(number);
                    self.totals.refused.count(*refusal);
                }
            }
        }
        if stale {
            member.view.epoch = None;
        }
    }

    /// Merges what its owner hands over now: everything that is there, without waiting for it to settle.
    fn merge_now(&mut self, owner: u32, ranges: &[Range]) -> MergeReport {
        let begun = Instant::now();
        let cpu = kernel::sched::usage(kernel::sched::Whose::Thread).cpu();
        let mut report = MergeReport::default();
        let mut refused: HashMap<&'static str, u64> = HashMap::new();
        if !self.refresh(owner) {
            return report;
        }
        let Some(member) = self.member(owner) else { return report };
        let Ok(pagemap) = Pagemap::open(member.helper) else { return report };
        if let Some(reason) = member.unfit {
            report.refused.insert(reason.to_owned(), member.view.pages());
            return report;
        }
        let wanted: Vec<PageRange> = member
            .view
            .areas
            .iter()
            .flat_map(|area| {
                let whole = [area.range];
                let ranges = if ranges.is_empty() { &whole[..] } else { ranges };
                ranges.iter().filter_map(|range| range.intersect(&area.range)).collect::<Vec<_>>()
            })
            .map(numbers)
            .collect();
        let mut findings = Findings::default();
        let mut note = |who: u32, results: &[Result1]| {
            for (_, outcome) in results {
                match outcome {
                    Outcome::Merged | Outcome::Retaken if who == owner => report.pages_merged += 1,
                    Outcome::Merged | Outcome::Retaken => report.pages_merged_elsewhere += 1,
                    Outcome::Zero if who == owner => report.zero_pages += 1,
                    refusal => {
                        let named = Outcome::REFUSALS.iter().find(|(outcome, _)| outcome == refusal);
                        if let Some((_, word)) = named {
                            *refused.entry(word).or_default() += 1;
                        }
                    }
                }
            }
        };
        for pages in wanted {
            let mut start = pages.start;
            while start < pages.end {
                let end = PageNumber((start.0 + LOOK_AT_ONCE).min(pages.end.0));
                if !self.look_at(owner, PageRange::new(start, end), &pagemap, 0, false, &mut findings) {
                    break;
                }
                start = end;
                if findings.fills() >= FILL_AT_ONCE || !findings.items.is_empty() {
                    self.act(&mut findings, &mut note);
                }
            }
        }
        self.act(&mut findings, &mut note);
        self.drive(&mut note);
        report.pages_scanned = findings.pages_read;
        report.refused = refused.into_iter().map(|(word, pages)| (word.to_owned(), pages)).collect();
        report.elapsed = begun.elapsed();
        report.cpu = kernel::sched::usage(kernel::sched::Whose::Thread).cpu().saturating_sub(cpu);
        report
    }

    /// Gives a member's merged pages their own copies back.
    fn unmerge_now(&mut self, owner: u32, ranges: &[Range]) -> MergeReport {
        let begun = Instant::now();
        let mut report = MergeReport::default();
        if !self.refresh(owner) {
            return report;
        }
        let Some(member) = self.member(owner) else { return report };
        let mut items = Vec::new();
        for area in &member.view.areas {
            for page in area.ages.range().iter() {
                let address = page.address(page_size());
                let wanted = ranges.is_empty() || ranges.iter().any(|range| range.contains(kernel::Vaddr(address)));
                let merged = area.ages.age(page).is_some_and(|age| matches!(age.kind, Kind::Merged | Kind::Diverged));
                if wanted && merged {
                    items.push(Item { address, task: Task::Unmerge });
                }
            }
        }
        self.order(owner, items);
        let mut given_back = 0;
        let mut refused: HashMap<&'static str, u64> = HashMap::new();
        self.drive(&mut |who, results| {
            for (_, outcome) in results.iter().filter(|_| who == owner) {
                if *outcome == Outcome::Unmerged {
                    given_back += 1;
                } else if let Some((_, word)) = Outcome::REFUSALS.iter().find(|(refusal, _)| refusal == outcome) {
                    *refused.entry(word).or_default() += 1;
                }
            }
        });
        report.pages_unmerged = given_back;
        report.refused = refused.into_iter().map(|(word, pages)| (word.to_owned(), pages)).collect();
        report.elapsed = begun.elapsed();
        report
    }

    fn take_sample(&mut self) {
        self.last_sample = sample(&mut self.members, &self.inodes);
        self.sampled = Instant::now();
        for member in &mut self.members {
            member.unfit = unfit(member.pid);
        }
        let now = Instant::now();
        let segments: Vec<SegmentId> = self.inode_of.keys().copied().collect();
        for segment in segments {
            let used = self.last_sample.used.get(&segment).copied().unwrap_or(0);
            self.partition.report_use(segment, used, now);
        }
        if self.partition.reclaim(now, GRACE).segments > 0 {
            let gone: Vec<SegmentId> = self
                .inode_of
                .keys()
                .copied()
                .filter(|segment| self.partition.fingerprints(*segment).is_none())
                .collect();
            for segment in gone {
                if let Some(inode) = self.inode_of.remove(&segment) {
                    self.inodes.remove(&inode);
                }
                for member in &mut self.members {
                    if let Some(number) = member.segments.remove(&segment) {
                        member.tell(Message::Retire { index: number }, None);
                        member.free_numbers.push(number);
                    }
                }
            }
        }
        let summary = self.summary(&self.last_sample);
        self.peak = self.peak.max(summary.bytes_saved);
    }

    fn summary_now(&mut self) -> Summary {
        if !self.members.is_empty() {
            self.take_sample();
        }
        let mut summary = self.summary(&self.last_sample);
        for reason in &self.reasons {
            *summary.refused.0.entry("helper_refused").or_default() += 1;
            summary.helper_refused.push(reason.clone());
        }
        summary
    }

    fn summary(&self, sample: &Sample) -> Summary {
        let check = match self.settings.check {
            CheckChoice::Vouch => "vouch",
            CheckChoice::Collapse => "collapse",
            CheckChoice::Auto | CheckChoice::Bpf if self.exact => "bpf",
            CheckChoice::Bpf => "none",
            CheckChoice::Auto => "collapse",
        };
        let books = Books {
            label: self.settings.label.clone(),
            check,
            totals: &self.totals,
            members: &self.members,
            members_ever: u64::from(self.next_index) - self.reasons.len() as u64,
            partition: &self.partition,
            index_entries: self.eyes.index.counts().entries,
            started: self.started,
            peak: self.peak,
        };
        books.summary(sample)
    }

    /// Lets every helper go, between two batches. What is merged stays merged.
    fn leave(mut self) {
        for member in &self.members {
            member.tell(Message::Leave, None);
        }
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline && !self.members.iter().all(Member::helper_ended) {
            std::thread::sleep(Duration::from_millis(2));
        }
        while !self.members.is_empty() {
            self.remove(0);
        }
        if let Some(guardian) = self.guardian.take() {
            guardian.dismiss();
        }
    }
}

/// Threads that want a CPU, of the whole machine.
fn runnable() -> Option<u64> {
    let load = std::fs::read_to_string("/proc/loadavg").ok()?;
    load.split(' ').nth(3)?.split('/').next()?.parse().ok()
}

fn max_map_count() -> u64 {
    std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(65_530)
}
