//! Looking at pages and finding their twins.

use std::collections::HashMap;

use kernel::{Category, MemoryFile, Pagemap, Range, ReadOutcome, Region, ScanRequest, page_size};
use page::{
    CandidateIndex, Fingerprint, Kind, Location, PageAge, PageNumber, PageRange, Place, Sighting, Spans, is_zero,
};
use store::{FillBuffer, FillRequest, PageReads, Partition};

use crate::huge::HugeCount;
use crate::order::{Item, Task};
use crate::repeats;
use crate::view::bytes_of;

/// Most bytes read at a time: what fits into a second-level cache, so that a page is hashed where it was just put.
const READ_AT_ONCE: u64 = 1 << 20;
/// Items of a member from which on it is worth while to order them, if they are dense.
const ORDER_FROM: usize = 1024;
/// Items of a member that are ordered in any case.
const ORDER_AT_LATEST: usize = 1 << 16;

/// What was found out about pages, until it is turned into orders.
#[derive(Default)]
pub(crate) struct Findings {
    /// For each member (by index) the pages with what to do.
    pub(crate) items: HashMap<u32, Vec<Item>>,
    /// Contents that two pages have and the store does not.
    fills: Vec<Fill>,
    /// Their bytes, as they were when they were hashed: reading them again would cost more than keeping them.
    staged: Vec<u8>,
    /// Leave out a twin that was written since it was looked at. What is merged on request takes its word for it.
    unwritten_only: bool,
    /// Which fill a content is.
    fill_of: HashMap<Fingerprint, usize>,
    /// Pages that wait for a fill.
    pub(crate) takers: Vec<(Location, usize)>,
    /// Pages that are looked at again: zero pages whose program may be about to use them, and those that could not be
    /// read at this moment.
    pub(crate) once_more: Vec<PageNumber>,
    pub(crate) pages_read: u64,
    pub(crate) zero_pages: u64,
    /// Pages with a twin in huge pages that were left whole.
    pub(crate) spared: u64,
    /// Pages with a twin for which the store had no room.
    pub(crate) no_room: u64,
    /// How many items of a member there must be before it is looked again whether they are dense.
    look_again_at: HashMap<u32, usize>,
}

/// A page, and what the index calls it.
type Seen = (Location, page::PageId);

/// A content to be copied into the store.
struct Fill {
    content: Fingerprint,
    /// The page that it was just seen in.
    here: Seen,
    /// The page that had it before; `None` for a content that the store has and is to have more often.
    there: Option<Seen>,
    /// Which of the staged pages holds its bytes.
    staged: usize,
}

impl Findings {
    /// For pages that were found to have settled: their twins must have been so too.
    pub(crate) fn of_settled() -> Self {
        Self { unwritten_only: true, ..Self::default() }
    }

    /// True if pages of a member lie so close together that ordering them does not spread them over many batches.
    pub(crate) fn is_dense(&mut self, owner: u32) -> bool {
        let Some(items) = self.items.get_mut(&owner) else { return false };
        let due = self.look_again_at.entry(owner).or_insert(ORDER_FROM);
        if items.len() < *due {
            return false;
        }
        items.sort_by_key(|item| item.address);
        let window = abi::BATCH_MAX as u64 * 2 * page_size();
        let windows = items.chunk_by(|before, after| before.address / window == after.address / window).count();
        let dense = items.len() >= ORDER_AT_LATEST || items.len() >= windows * abi::BATCH_MAX / 2;
        if dense {
            self.look_again_at.remove(&owner);
        } else {
            *due = items.len() * 2;
        }
        dense
    }

    /// Contents that wait to be copied into the store.
    pub(crate) fn fills(&self) -> usize {
        self.fills.len()
    }

    /// A content to be copied into the store, which is in no other fill.
    fn add_fill(&mut self, content: Fingerprint, page: &[u8], here: Seen, there: Option<Seen>) -> usize {
        let fill = self.fills.len();
        let staged = self.staged.len() / page.len();
        self.staged.extend_from_slice(page);
        self.fills.push(Fill { content, here, there, staged });
        self.fill_of.insert(content, fill);
        fill
    }
}

/// The tools of a look.
pub(crate) struct Eyes {
    pub(crate) index: CandidateIndex,
    pub(crate) spans: Spans,
    pub(crate) buffer: Vec<u8>,
    pub(crate) fill_buffer: FillBuffer,
}

/// Pages of one member that are to be looked at.
pub(crate) struct Look<'a> {
    pub(crate) owner: u32,
    /// The member's memory. Never read in a way that could wait: a page may be frozen, by a helper that is dead or by
    /// a program that means no good.
    pub(crate) memory: &'a MemoryFile,
    pub(crate) pagemap: &'a Pagemap,
    /// Id of the area's first page, and its number.
    pub(crate) first: (page::PageId, PageNumber),
    /// What the area knows of each page.
    pub(crate) ages: &'a page::Ages,
    /// How long zero pages must have been left alone beyond other pages, in cycles; 0: not at all.
    pub(crate) zero_patience: u32,
    /// Leave huge pages whole unless enough of their subpages have twins.
    pub(crate) spare_huge: bool,
}

impl Look<'_> {
    fn was_merged(&self, page: PageNumber) -> bool {
        self.ages.age(page).is_some_and(|age| matches!(age.kind, Kind::Diverged | Kind::Merged))
    }

    fn task(&self, page: PageNumber, place: Place, content: Fingerprint) -> Task {
        if self.was_merged(page) { Task::Retake(place, content) } else { Task::Merge(place, content) }
    }

    fn id(&self, page: PageNumber) -> page::PageId {
        self.first.0.offset(page.0 - self.first.1.0)
    }
}

/// Looks at `pages` of a member: reads what is there, and finds twins in the store or among pages seen before.
/// `false` if the member is gone.
pub(crate) fn look(
    look: &Look<'_>,
    pages: PageRange,
    eyes: &mut Eyes,
    partition: &Partition,
    findings: &mut Findings,
) -> bool {
    let Some(range) = bytes_of(pages) else { return true };
    let mut present = Vec::new();
    if look.pagemap.scan_all(range, &ScanRequest::own_pages(), &mut present).is_err() {
        return false;
    }
    let mut huge = HugeCount::default();
    let before = findings.items.get(&look.owner).map_or(0, Vec::len);
    for region in &present {
        for piece in region.range.pieces(kernel::Bytes(READ_AT_ONCE)) {
            if !look_at(look, piece, region.categories.contains(Category::HUGE), &mut huge, eyes, partition, findings) {
                return false;
            }
        }
    }
    if look.spare_huge {
        huge.spare(look.owner, before, findings);
    }
    true
}

fn look_at(
    look: &Look<'_>,
    piece: Range,
    is_huge: bool,
    huge: &mut HugeCount,
    eyes: &mut Eyes,
    partition: &Partition,
    findings: &mut Findings,
) -> bool {
    let size = usize::try_from(page_size()).expect("a page is small");
    let len = usize::try_from(piece.len().get()).expect("a piece is small");
    if eyes.buffer.len() < len {
        eyes.buffer.resize(len, 0);
    }
    let read = match look.memory.read(piece.start(), &mut eyes.buffer[..len]) {
        Ok(ReadOutcome::Gone) => return false,
        Ok(outcome) => outcome.bytes().get() as usize / size,
        Err(_) => return false,
    };
    findings.pages_read += read as u64;
    let first_page = PageNumber(piece.start().page_index());
    let contents: Vec<Option<Fingerprint>> = eyes.buffer[..read * size]
        .chunks_exact(size)
        .map(|page| (!is_zero(page)).then(|| partition.secret().fingerprint(page)))
        .collect();
    let strict = partition.options().strict;
    let mut at = 0;
    while at < contents.len() {
        let number = first_page.offset(at as u64);
        if is_huge {
            huge.seen(number);
        }
        let Some(content) = contents[at] else {
            findings.zero_pages += 1;
            let diverged = look.was_merged(number);
            let waited = look.ages.age(number).and_then(|age| age.cycles).is_some_and(|age| age >= look.zero_patience);
            if look.zero_patience == 0 || waited || diverged {
                let task = if diverged { Task::RetakeZero } else { Task::DropZero };
                push(findings, look.owner, number, task);
            } else {
                findings.once_more.push(number);
            }
            at += 1;
            continue;
        };
        let page = &eyes.buffer[at * size..(at + 1) * size];
        let there = partition.copies(content);
        if let Some(copies) = there.filter(|_| !strict) {
            let alike = contents[at..].iter().take_while(|other| **other == Some(content)).count();
            let pages = (0..alike as u64).map(|offset| number.offset(offset));
            if repeats::is_run(alike) && copies.pages < partition.most_copies() {
                // How long the run is altogether is not known yet: it may deserve more copies.
                let here = (Location { owner: look.owner, page: number }, look.id(number));
                let known = findings.fill_of.get(&content).copied();
                let fill = known.unwrap_or_else(|| findings.add_fill(content, page, here, None));
                findings.takers.extend(pages.map(|page| (Location { owner: look.owner, page }, fill)));
                at += alike;
                continue;
            }
            if copies.pages > 1 {
                pages
                    .for_each(|page| push(findings, look.owner, page, look.task(page, copies.copy_for(page), content)));
                at += alike;
                continue;
            }
        }
        // A run of neighbours that lie side by side in the store is worth more than the first page that fits.
        if strict || there.is_some() {
            let run: Vec<Fingerprint> = contents[at..].iter().map_while(|content| *content).collect();
            if let Some(found) = partition.lookup_run(&run) {
                for offset in 0..found.pages {
                    let place = Place { segment: found.place.segment, page: found.place.page + offset };
                    let number = number.offset(offset.into());
                    push(findings, look.owner, number, look.task(number, place, run[offset as usize]));
                }
                at += found.pages as usize;
                continue;
            }
        }
        seek((look, number), (content, page), &mut eyes.index, &eyes.spans, findings);
        at += 1;
    }
    if read * size == len {
        return true;
    }
    // A page that is gone, or frozen: what lies behind it can be read.
    findings.once_more.push(first_page.offset(read as u64));
    let behind = piece.start().checked_add(kernel::PageCount(read as u64 + 1).bytes());
    match behind.and_then(|start| Range::new(start, piece.end()).ok()).filter(|rest| !rest.is_empty()) {
        Some(rest) => look_at(look, rest, is_huge, huge, eyes, partition, findings),
        None => true,
    }
}

fn push(findings: &mut Findings, owner: u32, page: PageNumber, task: Task) {
    findings.items.entry(owner).or_default().push(Item { address: page.address(page_size()), task });
}

/// Looks for another page with this content.
fn seek(
    (look, number): (&Look<'_>, PageNumber),
    (content, page): (Fingerprint, &[u8]),
    index: &mut CandidateIndex,
    spans: &Spans,
    findings: &mut Findings,
) {
    let here = Location { owner: look.owner, page: number };
    if let Some(fill) = findings.fill_of.get(&content) {
        findings.takers.push((here, *fill));
        return;
    }
    let id = look.id(number);
    match index.observe(content, id) {
        Sighting::First | Sighting::Again => {}
        Sighting::Candidate(other) => match spans.locate(other) {
            Some(there) if there != here => {
                let fill = findings.add_fill(content, page, (here, id), Some((there, other)));
                findings.takers.push((here, fill));
            }
            _ => {
                // The other page is gone: this one takes its place.
                index.supersede(content, other, id);
            }
        },
    }
}

/// Copies into the store what has twins, and turns those who wait for it into items. `age_of` tells what a page is,
/// `None` if it is not managed any more.
///
/// What is copied are the bytes that were hashed. Whether a page still holds them is decided where it is replaced.
pub(crate) fn fill(
    eyes: &mut Eyes,
    partition: &mut Partition,
    findings: &mut Findings,
    mut age_of: impl FnMut(Location) -> Option<PageAge>,
) -> bool {
    let size = page_size();
    choose(eyes, findings, &mut age_of);
    let bytes = usize::try_from(size).expect("a page is small");
    let (fills, staged) = (&findings.fills, &findings.staged);
    let content_of = |fill: usize| {
        let Fill { content, staged: source, .. } = &fills[fill];
        (*content, &staged[source * bytes..(source + 1) * bytes])
    };
    repeats::widen(partition, &mut findings.takers, content_of);
    let mut before: Option<Location> = None;
    let requests: Vec<FillRequest<usize>> = findings
        .fills
        .drain(..)
        .map(|Fill { content: fingerprint, here: (seen, _), staged: source, .. }| {
            let continues = before.is_some_and(|before| before.owner == seen.owner && before.page.next() == seen.page);
            before = Some(seen);
            FillRequest { fingerprint, source, continues }
        })
        .collect();
    findings.fill_of.clear();
    let staged = &findings.staged;
    let read = |requests: &[FillRequest<usize>], reads: &mut PageReads<'_>| {
        for (slot, request) in requests.iter().enumerate() {
            reads.put(slot, &staged[request.source * bytes..(request.source + 1) * bytes]);
        }
    };
    let report = partition.fill(&mut eyes.fill_buffer, &requests, read);
    findings.staged.clear();
    for (taker, fill) in findings.takers.drain(..) {
        let outcome = report.outcomes.get(fill);
        findings.no_room += u64::from(outcome == Some(&store::Outcome::Full));
        let Some(place) = outcome.and_then(store::Outcome::place) else { continue };
        let place = partition.copies_from(place).copy_for(taker.page);
        let content = requests[fill].fingerprint;
        let task = match age_of(taker).map(|age| age.kind) {
            Some(Kind::Plain) => Task::Merge(place, content),
            Some(Kind::Diverged | Kind::Merged) => Task::Retake(place, content),
            Some(Kind::Excluded) | None => continue,
        };
        let item = Item { address: taker.page.address(size), task };
        findings.items.entry(taker.owner).or_default().push(item);
    }
    report.stopped.is_none()
}

/// Adds the pages that had the contents before, and drops the fills that only one page is left for: the store would hold
/// a page that nobody shares. A page that sleeps has not been written since it was looked at; one that was written is
/// not what the index knows, and its successor there is the page just seen.
fn choose(eyes: &mut Eyes, findings: &mut Findings, age_of: &mut impl FnMut(Location) -> Option<PageAge>) {
    for (index, fill) in findings.fills.iter().enumerate() {
        let Some((there, id)) = fill.there else { continue };
        let same = |age: PageAge| matches!(age.kind, Kind::Plain | Kind::Diverged) && age.cycles.is_none();
        if !findings.unwritten_only || age_of(there).is_some_and(same) {
            findings.takers.push((there, index));
        } else {
            eyes.index.supersede(fill.content, id, fill.here.1);
        }
    }
    let mut users = vec![0_u32; findings.fills.len()];
    findings.takers.iter().for_each(|(_, fill)| users[*fill] += 1);
    let mut kept = 0;
    let places: Vec<Option<usize>> = users
        .iter()
        .map(|users| {
            kept += usize::from(*users > 1);
            (*users > 1).then(|| kept - 1)
        })
        .collect();
    let mut next = places.iter();
    findings.fills.retain(|_| next.next().is_some_and(Option::is_some));
    let moved = findings.takers.drain(..).filter_map(|(taker, fill)| Some((taker, places[fill]?)));
    findings.takers = moved.collect();
}

/// A buffer for regions, kept between scans.
pub(crate) type Regions = Vec<Region>;

#[cfg(test)]
mod tests;
