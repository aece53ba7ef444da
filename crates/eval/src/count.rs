//! From groups of equal pages to figures.

use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};

use page::census::{ContentClass, Group, Groups};

use crate::numbers::Numbers;
use crate::tally::Side;
use crate::targets::GroupBy;

/// Contents with the most copies that are kept.
const TOP_CONTENTS: usize = 20;

/// A page of a group, with what is known of its place.
#[derive(Clone, Copy)]
struct Member {
    page: u32,
    mapping: u32,
    process: u32,
    huge: bool,
}

/// A content with many copies: ordered by them, fewest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Top {
    pub(crate) copies: std::cmp::Reverse<u64>,
    pub(crate) page: u32,
    pub(crate) processes: u64,
    pub(crate) class: ContentClass,
}

/// One thread's figures.
struct Part {
    all: Side,
    stable: Option<Side>,
    by_fork: HashMap<u32, u64>,
    top: BinaryHeap<Top>,
    members: Vec<Member>,
    lasting: Vec<Member>,
    groups: Vec<u32>,
}

/// All figures.
#[derive(Debug)]
pub(crate) struct Figures {
    pub(crate) all: Side,
    /// Of pages that lasted, where there was a second look.
    pub(crate) stable: Option<Side>,
    /// Pages told by place and content to be shared after a fork, by process.
    pub(crate) by_fork: HashMap<u32, u64>,
    /// Most copies first.
    pub(crate) top: Vec<Top>,
    /// Pages that have an equal, zero pages too.
    pub(crate) has_equal: Bits,
    /// Pages that the store would merge at once, and those of them outside huge pages that lasted.
    pub(crate) mergeable: Bits,
    pub(crate) mergeable_expected: Bits,
}

/// One bit a page, set by many threads.
#[derive(Debug)]
pub(crate) struct Bits(Vec<AtomicU64>);

impl Bits {
    fn new(pages: usize) -> Self {
        Self((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn set(&self, page: u32) {
        self.0[page as usize / 64].fetch_or(1 << (page % 64), Ordering::Relaxed);
    }

    pub(crate) fn get(&self, page: u32) -> bool {
        self.0[page as usize / 64].load(Ordering::Relaxed) >> (page % 64) & 1 == 1
    }
}

/// Counts everything. `watched`: there was a second look. `by` are the groups of each process, by [`GroupBy::ALL`].
pub(crate) fn count(
    groups: &Groups,
    numbers: &Numbers<'_>,
    by: &[Vec<u32>; GroupBy::ALL.len()],
    watched: bool,
    threads: usize,
) -> Figures {
    let pages = numbers.pages() as usize;
    let (mergeable, expected, has_equal) = (Bits::new(pages), Bits::new(pages), Bits::new(pages));
    let make = || Part {
        all: Side::new(numbers),
        stable: watched.then(|| Side::new(numbers)),
        by_fork: HashMap::new(),
        top: BinaryHeap::new(),
        members: Vec::new(),
        lasting: Vec::new(),
        groups: Vec::new(),
    };
    let counting = Counting { groups, numbers, by, mergeable: &mergeable, expected: &expected, has_equal: &has_equal };
    let parts = groups.visit(threads, make, |part, group| counting.content(part, group));
    let mut sum = make();
    for part in parts {
        sum.all.add(&part.all);
        if let (Some(sum), Some(part)) = (&mut sum.stable, &part.stable) {
            sum.add(part);
        }
        for (process, pages) in part.by_fork {
            *sum.by_fork.entry(process).or_default() += pages;
        }
        sum.top.extend(part.top);
    }
    counting.zeros(&mut sum);
    let mut top = sum.top.into_vec();
    top.sort_unstable();
    top.truncate(TOP_CONTENTS);
    Figures {
        all: sum.all,
        stable: sum.stable,
        by_fork: sum.by_fork,
        top,
        has_equal,
        mergeable,
        mergeable_expected: expected,
    }
}

struct Counting<'a> {
    groups: &'a Groups,
    numbers: &'a Numbers<'a>,
    by: &'a [Vec<u32>; GroupBy::ALL.len()],
    mergeable: &'a Bits,
    expected: &'a Bits,
    has_equal: &'a Bits,
}

impl Counting<'_> {
    fn content(&self, part: &mut Part, group: Group<'_>) {
        part.members.clear();
        let mut unseen_frames: Option<HashSet<u64>> = None;
        for page in group.pages {
            let span = self.numbers.span(*page);
            let mapping = span.mapping;
            let process = self.numbers.process_of(mapping);
            if span.shared {
                // Equal, with several users, at one address: it is one page, left shared by a fork.
                let at = self.numbers.address(*page, span).0;
                if !unseen_frames.get_or_insert_default().insert(at) {
                    *part.by_fork.entry(process).or_default() += 1;
                    continue;
                }
            }
            part.members.push(Member { page: *page, mapping, process, huge: span.huge });
        }
        let members = &part.members;
        let processes = self.side(&mut part.all, members, group.class, &mut part.groups);
        if members.len() > 1 {
            members.iter().for_each(|member| self.has_equal.set(member.page));
            let top = Top {
                copies: std::cmp::Reverse(members.len() as u64),
                page: members[0].page,
                processes,
                class: group.class,
            };
            if part.top.len() < TOP_CONTENTS {
                part.top.push(top);
            } else if part.top.peek().is_some_and(|least| top < *least) {
                part.top.pop();
                part.top.push(top);
            }
        }
        self.mark(members, self.mergeable, true);
        let lasting = match &mut part.stable {
            None => members,
            Some(stable) => {
                part.lasting.clear();
                part.lasting.extend(members.iter().filter(|member| !self.groups.is_volatile(member.page)));
                self.side(stable, &part.lasting, group.class, &mut part.groups);
                &part.lasting
            }
        };
        self.mark(lasting, self.expected, false);
    }

    /// Marks what the store would merge.
    fn mark(&self, members: &[Member], bits: &Bits, huge_too: bool) {
        let taken = |member: &&Member| self.numbers.store_takes(member.mapping) && (huge_too || !member.huge);
        if members.len() > 1 && members.iter().filter(taken).nth(1).is_some() {
            members.iter().filter(taken).for_each(|member| bits.set(member.page));
        }
    }

    /// Counts one content; how many processes hold it.
    fn side(&self, side: &mut Side, members: &[Member], class: ContentClass, groups: &mut Vec<u32>) -> u64 {
        if members.is_empty() {
            return 0;
        }
        let all = members.len() as u64;
        side.sizes.count(all);
        if let [member] = members {
            side.alone(*member, class, self.numbers);
            return 1;
        }
        let huge = |members: &[Member]| members.iter().filter(|member| member.huge).count() as u64;
        side.total.content(all, all, huge(members));
        for of_one in members.chunk_by(|one, other| one.mapping == other.mapping) {
            side.mappings[of_one[0].mapping as usize].content(of_one.len() as u64, all, huge(of_one));
        }
        let mut processes = 0;
        for of_one in members.chunk_by(|one, other| one.process == other.process) {
            side.processes[of_one[0].process as usize].content(of_one.len() as u64, all, huge(of_one));
            processes += 1;
        }
        let (pages, copies) = &mut side.classes[class as usize - 1];
        *pages += all;
        *copies += all - 1;
        for (scopes, group_of) in side.scopes.iter_mut().zip(self.by) {
            let of = |member: &Member| group_of[member.process as usize];
            let first = of(&members[0]);
            let mut owners = 1;
            if processes > 1 && members.iter().any(|member| of(member) != first) {
                groups.clear();
                groups.extend(members.iter().map(of));
                groups.sort_unstable();
                groups.dedup();
                owners = groups.len() as u64;
            }
            scopes.within_process += all - processes;
            scopes.within_group += processes - owners;
            scopes.between_groups += owners - 1;
        }
        let taken = |takes: &dyn Fn(&Member) -> bool| members.iter().filter(|member| takes(member)).count() as u64;
        side.ksm.content(taken(&|member| self.numbers.ksm_takes(member.mapping)));
        side.store.content(taken(&|member| self.numbers.store_takes(member.mapping)));
        side.store_small.content(taken(&|member| self.numbers.store_takes(member.mapping) && !member.huge));
        processes
    }

    fn zeros(&self, sum: &mut Part) {
        let mut met = HashSet::new();
        for page in self.groups.zeros() {
            self.has_equal.set(*page);
            let span = self.numbers.span(*page);
            let process = self.numbers.process_of(span.mapping);
            if span.shared && !met.insert(self.numbers.address(*page, span).0) {
                *sum.by_fork.entry(process).or_default() += 1;
                continue;
            }
            let lasting = sum.stable.as_mut().filter(|_| !self.groups.is_volatile(*page));
            for side in std::iter::once(&mut sum.all).chain(lasting) {
                side.total.zero(span.huge);
                side.mappings[span.mapping as usize].zero(span.huge);
                side.processes[process as usize].zero(span.huge);
                let (pages, copies) = &mut side.classes[ContentClass::Zero as usize - 1];
                *copies += u64::from(*pages > 0);
                *pages += 1;
                let ksm = u64::from(self.numbers.ksm_takes(span.mapping));
                let store = u64::from(self.numbers.store_takes(span.mapping));
                let small = store * u64::from(!span.huge);
                for (eligible, one) in [(&mut side.ksm, ksm), (&mut side.store, store), (&mut side.store_small, small)]
                {
                    eligible.pages += one;
                    eligible.zero += one;
                    eligible.zero_in_huge += one * u64::from(span.huge);
                }
            }
        }
    }
}

impl Side {
    /// Counts a content of one page: most are.
    fn alone(&mut self, member: Member, class: ContentClass, numbers: &Numbers<'_>) {
        let huge = u64::from(member.huge);
        self.total.content(1, 1, huge);
        self.mappings[member.mapping as usize].content(1, 1, huge);
        self.processes[member.process as usize].content(1, 1, huge);
        self.classes[class as usize - 1].0 += 1;
        let store = numbers.store_takes(member.mapping);
        for (eligible, taken) in [
            (&mut self.ksm, numbers.ksm_takes(member.mapping)),
            (&mut self.store, store),
            (&mut self.store_small, store && !member.huge),
        ] {
            eligible.content(u64::from(taken));
        }
    }
}
