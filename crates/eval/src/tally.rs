//! From groups of equal pages to figures: totals, owners, scopes.

use std::collections::{BinaryHeap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};

use page::census::{ContentClass, Group, Groups};

use crate::numbers::Numbers;
use crate::report::{Counters, ScopePages};
use crate::targets::GroupBy;

/// Contents with the most copies that are kept.
const TOP_CONTENTS: usize = 20;
/// Binary digits behind the point of a share.
const SHARE_SHIFT: u32 = 20;

/// What a page's owner gets of a saving, with [`SHARE_SHIFT`] binary digits behind the point: sums of them are exact,
/// in whatever order threads add.
fn share(copies: u64, of: u64) -> u64 {
    u64::try_from(((u128::from(copies) * u128::from(of - 1)) << SHARE_SHIFT) / u128::from(of)).expect("a few pages")
}

/// Figures of one owner, or of all.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) counters: Counters,
    pub(crate) shared_content: u64,
    pub(crate) huge: u64,
    pub(crate) shared_content_in_huge: u64,
    share: u64,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.counters.add(&other.counters);
        self.shared_content += other.shared_content;
        self.huge += other.huge;
        self.shared_content_in_huge += other.shared_content_in_huge;
        self.share += other.share;
    }

    /// Pages saved, as its part of the whole.
    pub(crate) fn share_bytes(&self, page_size: u64) -> u64 {
        u64::try_from((u128::from(self.share) * u128::from(page_size)) >> SHARE_SHIFT).unwrap_or(u64::MAX)
    }

    /// `copies` pages of one content that `all` pages hold, `huge` of the copies in huge pages.
    fn content(&mut self, copies: u64, all: u64, huge: u64) {
        self.counters.pages_scanned += copies;
        self.counters.distinct_pages += 1;
        self.counters.unique_pages += u64::from(all == 1);
        self.counters.duplicate_pages += copies - 1;
        self.huge += huge;
        if all > 1 {
            self.shared_content += copies;
            self.shared_content_in_huge += huge;
            self.share += share(copies, all);
        }
    }

    /// Reckons a part up to the whole.
    fn scale(&mut self, by: &Factors) {
        let zeros = self.counters.zero_pages;
        let data = by.data(self.counters.pages_scanned - zeros);
        let zero_share = zeros << SHARE_SHIFT;
        self.share = by.zero(zeros).saturating_mul(1 << SHARE_SHIFT) + by.duplicate(self.share - zero_share);
        let unique = self.counters.unique_pages as f64 / self.counters.distinct_pages.max(1) as f64;
        let counters = &mut self.counters;
        counters.zero_pages = by.zero(zeros);
        counters.zero_pages_in_huge = by.zero(counters.zero_pages_in_huge);
        counters.duplicate_pages = by.duplicate(counters.duplicate_pages).min(data);
        counters.distinct_pages = data - counters.duplicate_pages;
        counters.unique_pages = (unique * counters.distinct_pages as f64).round() as u64;
        counters.pages_scanned = data + counters.zero_pages;
        self.shared_content = by.duplicate(self.shared_content).min(data);
        self.huge = by.data(self.huge);
        self.shared_content_in_huge = by.duplicate(self.shared_content_in_huge).min(self.huge);
    }

    fn zero(&mut self, huge: bool) {
        self.counters.pages_scanned += 1;
        self.counters.zero_pages += 1;
        self.counters.zero_pages_in_huge += u64::from(huge);
        self.huge += u64::from(huge);
        self.share += 1 << SHARE_SHIFT;
    }
}

/// What one backend would find.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Eligible {
    pub(crate) pages: u64,
    pub(crate) zero: u64,
    /// Of these, inside huge pages.
    pub(crate) zero_in_huge: u64,
    pub(crate) duplicates: u64,
    /// Contents with duplicates.
    pub(crate) shared: u64,
    pub(crate) unique: u64,
}

impl Eligible {
    fn add(&mut self, other: &Self) {
        self.pages += other.pages;
        self.zero += other.zero;
        self.zero_in_huge += other.zero_in_huge;
        self.duplicates += other.duplicates;
        self.shared += other.shared;
        self.unique += other.unique;
    }

    fn scale(&mut self, by: &Factors) {
        let data = by.data(self.pages - self.zero);
        self.zero = by.zero(self.zero);
        self.zero_in_huge = by.zero(self.zero_in_huge);
        self.pages = data + self.zero;
        self.duplicates = by.duplicate(self.duplicates).min(data);
        self.shared = by.duplicate(self.shared);
        self.unique = by.data(self.unique);
    }

    fn content(&mut self, copies: u64) {
        self.pages += copies;
        self.duplicates += copies.saturating_sub(1);
        self.shared += u64::from(copies > 1);
        self.unique += u64::from(copies == 1);
    }
}

/// Figures of all pages of one point of view: as first seen, or of those that lasted.
#[derive(Clone, Debug)]
pub(crate) struct Side {
    pub(crate) total: Tally,
    pub(crate) mappings: Vec<Tally>,
    pub(crate) processes: Vec<Tally>,
    /// By [`GroupBy::ALL`].
    pub(crate) scopes: [ScopePages; 3],
    /// Pages and copies beyond the first, by class.
    pub(crate) classes: [(u64, u64); ContentClass::ALL.len()],
    pub(crate) ksm: Eligible,
    pub(crate) store: Eligible,
    /// The same without pages of huge pages.
    pub(crate) store_small: Eligible,
    /// How many contents have so many pages.
    pub(crate) sizes: Sizes,
}

impl Side {
    fn new(numbers: &Numbers<'_>) -> Self {
        Self {
            total: Tally::default(),
            mappings: vec![Tally::default(); numbers.mappings()],
            processes: vec![Tally::default(); numbers.processes()],
            scopes: [ScopePages::default(); 3],
            classes: Default::default(),
            ksm: Eligible::default(),
            store: Eligible::default(),
            store_small: Eligible::default(),
            sizes: Sizes::default(),
        }
    }

    fn add(&mut self, other: &Self) {
        self.total.add(&other.total);
        for (mine, theirs) in self.mappings.iter_mut().zip(&other.mappings) {
            mine.add(theirs);
        }
        for (mine, theirs) in self.processes.iter_mut().zip(&other.processes) {
            mine.add(theirs);
        }
        for (mine, theirs) in self.scopes.iter_mut().zip(&other.scopes) {
            mine.within_process += theirs.within_process;
            mine.within_group += theirs.within_group;
            mine.between_groups += theirs.between_groups;
        }
        for (mine, theirs) in self.classes.iter_mut().zip(&other.classes) {
            mine.0 += theirs.0;
            mine.1 += theirs.1;
        }
        self.ksm.add(&other.ksm);
        self.store.add(&other.store);
        self.store_small.add(&other.store_small);
        self.sizes.add(&other.sizes);
    }
}

/// By what a part's figures are to be multiplied, to be those of the whole.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Factors {
    pub(crate) zero: f64,
    pub(crate) data: f64,
    pub(crate) duplicate: f64,
}

impl Factors {
    fn zero(&self, pages: u64) -> u64 {
        (pages as f64 * self.zero).round() as u64
    }

    fn data(&self, pages: u64) -> u64 {
        (pages as f64 * self.data).round() as u64
    }

    fn duplicate(&self, pages: u64) -> u64 {
        (pages as f64 * self.duplicate).round() as u64
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

    /// Reckons a part up to the whole. Figures of owners are rounded one by one.
    pub(crate) fn scale(&mut self, by: &Factors) {
        self.total.scale(by);
        self.mappings.iter_mut().chain(&mut self.processes).for_each(|tally| tally.scale(by));
        for scopes in &mut self.scopes {
            scopes.within_process = by.duplicate(scopes.within_process);
            scopes.within_group = by.duplicate(scopes.within_group);
            // The three are to add up.
            let others = scopes.within_process + scopes.within_group;
            scopes.between_groups = self.total.counters.duplicate_pages.saturating_sub(others);
        }
        for (class, (pages, copies)) in self.classes.iter_mut().enumerate() {
            let zero = class == ContentClass::Zero as usize - 1;
            (*pages, *copies) =
                if zero { (by.zero(*pages), by.zero(*copies)) } else { (by.data(*pages), by.duplicate(*copies)) };
        }
        for eligible in [&mut self.ksm, &mut self.store, &mut self.store_small] {
            eligible.scale(by);
        }
    }
}

/// How many contents have how many pages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sizes {
    /// By the number of pages, as most contents have few.
    few: [u64; 32],
    many: HashMap<u64, u64>,
}

impl Sizes {
    fn count(&mut self, pages: u64) {
        match usize::try_from(pages).ok().and_then(|pages| self.few.get_mut(pages)) {
            Some(contents) => *contents += 1,
            None => *self.many.entry(pages).or_default() += 1,
        }
    }

    fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.few.iter_mut().zip(&other.few) {
            *mine += theirs;
        }
        for (pages, contents) in &other.many {
            *self.many.entry(*pages).or_default() += contents;
        }
    }

    /// Pages, and how many contents have so many.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let few = (0..).zip(self.few).filter(|(_, contents)| *contents > 0);
        few.chain(self.many.iter().map(|(pages, contents)| (*pages, *contents)))
    }
}

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
        if all > 1 {
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

/// Who shares with whom, for up to 32 owners: `of` gives the owner's place among them, of a process. Off the diagonal
/// contents that both hold; on it, copies within one process, or, with `groups`, contents of several processes of one.
pub(crate) fn matrix(
    groups: &Groups,
    numbers: &Numbers<'_>,
    owners: usize,
    of: impl Fn(u32) -> Option<usize> + Sync,
    by_process: bool,
    threads: usize,
) -> Vec<Vec<u64>> {
    struct Seen {
        /// By the sets of owners, and of those with several.
        sets: HashMap<(u32, u32), u64>,
        within: Vec<u64>,
    }
    let make = || Seen { sets: HashMap::new(), within: vec![0; owners] };
    let parts = groups.visit(threads, make, |seen, group| {
        if group.pages.len() < 2 {
            return;
        }
        let (mut holders, mut several) = (0_u32, 0_u32);
        let mut last = None;
        for page in group.pages {
            let process = numbers.process_of(numbers.span(*page).mapping);
            let Some(owner) = of(process) else { continue };
            let bit = 1 << owner;
            if by_process {
                seen.within[owner] += u64::from(holders & bit != 0);
            } else if holders & bit != 0 && last != Some(process) {
                several |= bit;
            }
            last = Some(process);
            holders |= bit;
        }
        if holders.count_ones() > 1 || several != 0 {
            *seen.sets.entry((holders, several)).or_default() += 1;
        }
    });
    let mut pages = vec![vec![0; owners]; owners];
    for part in parts {
        for (owner, within) in part.within.iter().enumerate() {
            pages[owner][owner] += within;
        }
        for ((holders, several), contents) in part.sets {
            for one in (0..owners).filter(|owner| holders >> owner & 1 == 1) {
                for other in (0..owners).filter(|other| *other != one && holders >> other & 1 == 1) {
                    pages[one][other] += contents;
                }
                if several >> one & 1 == 1 {
                    pages[one][one] += contents;
                }
            }
        }
    }
    pages
}
