//! Marked pages, and what has become of each.
use std::collections::{HashMap, HashSet};

use kernel::pagemap::{SCAN_WINDOW, entries_len};
use kernel::procfs::ProcError;
use kernel::{
    Category, FrameFlags, FrameFlagsFile, PageCount, Pagemap, PagemapEntry, Pid, Range, ScanRequest, Vaddr, page_size,
    smaps,
};
use page::Secret;

use super::look::{ZEROS, hash};
use super::partners::Anchors;
use super::report::{ProcessReport, Refusal};
use super::walk::Target;

/// One page that is to be merged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Page {
    pub(crate) address: Vaddr,
    pub(crate) hash: u64,
    /// Its frame, if several mapped it.
    pub(crate) frame: Option<u64>,
    pub(crate) state: State,
}

/// What has become of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Nothing yet.
    Waiting,
    /// KSM shares it, in this frame.
    Merged(u64),
    /// It is the zero page.
    Zero,
}

/// A process with its pages, ascending.
#[derive(Debug)]
pub(crate) struct Work {
    pub(crate) target: Target,
    pub(crate) pages: Vec<Page>,
    pub(crate) report: ProcessReport,
    pub(crate) gone: bool,
}

/// Words of a pagemap read along rather than with a call of their own.
const GAP: u64 = 64;
/// The most words read with one call.
const AT_ONCE: u64 = 4096;

impl Work {
    /// Looks which pages are merged: those that wait, or all of them.
    pub(crate) fn look(&mut self, all: bool, flags: &mut FrameFlagsFile) -> Result<(), ProcError> {
        if self.gone || !self.target.is_there() {
            self.gone = true;
            return Ok(());
        }
        let mut frames: Vec<(u64, usize)> = Vec::new();
        self.entries(all, |at, entry| frames.extend(entry.pfn().map(|frame| (frame, at))));
        frames.sort_unstable();
        let mut distinct: Vec<u64> = frames.iter().map(|(frame, _)| *frame).collect();
        distinct.dedup();
        let mut known = HashMap::new();
        flags.visit(&distinct, |frame, flags| {
            if flags.intersects(FrameFlags::KSM | FrameFlags::ZERO_PAGE) {
                known.insert(frame, flags);
            }
        })?;
        for page in self.pages.iter_mut().filter(|_| all) {
            page.state = State::Waiting;
        }
        for (frame, at) in frames {
            self.pages[at].state = match known.get(&frame) {
                Some(flags) if flags.contains(FrameFlags::KSM) => State::Merged(frame),
                Some(_) => State::Zero,
                None => State::Waiting,
            };
        }
        Ok(())
    }

    /// Shows `visit` the pagemap's words of pages that wait, or of all.
    fn entries(&self, all: bool, mut visit: impl FnMut(usize, PagemapEntry)) {
        let wanted: Vec<usize> =
            (0..self.pages.len()).filter(|at| all || self.pages[*at].state == State::Waiting).collect();
        let number = |at: usize| self.pages[at].address.page_index();
        let mut words = Vec::new();
        let mut rest = &wanted[..];
        while let Some(&first) = rest.first() {
            let near =
                |pair: &[usize]| number(pair[1]) - number(pair[0]) <= GAP && number(pair[1]) - number(first) < AT_ONCE;
            let count = 1 + rest.windows(2).take_while(|pair| near(pair)).count();
            let (now, later) = rest.split_at(count);
            let pages = number(now[count - 1]) - number(first) + 1;
            words.resize(usize::try_from(pages).expect("no more than AT_ONCE"), PagemapEntry(0));
            let read = self.target.pagemap.entries(self.pages[first].address, &mut words).unwrap_or(0);
            for &at in now {
                let offset = usize::try_from(number(at) - number(first)).expect("no more than AT_ONCE");
                if let Some(word) = words[..read].get(offset) {
                    visit(at, *word);
                }
            }
            rest = later;
        }
    }

    /// Runs of neighbouring pages of which `wanted` holds.
    pub(crate) fn ranges(&self, wanted: impl Fn(&Page) -> bool) -> Vec<Range> {
        let mut ranges: Vec<Range> = Vec::new();
        for page in self.pages.iter().filter(|page| wanted(page)) {
            match ranges.last_mut() {
                Some(last) if last.end() == page.address => {
                    *last = Range::new(last.start(), page.address + PageCount(1)).expect("it grows at its end");
                }
                _ => ranges.push(Range::from_pages(page.address, PageCount(1)).expect("a page of a mapping")),
            }
        }
        ranges
    }

    /// Keeps the pages that lie in mergeable mappings now: the others will never be visited.
    pub(crate) fn keep_marked(&mut self) {
        if !self.pages.is_empty() {
            let marked = self.marked();
            self.pages.retain(|page| contains(&marked, page.address));
        }
        self.report.pages_marked = self.pages.len() as u64;
    }

    pub(crate) fn waiting(&self) -> u64 {
        self.pages.iter().filter(|page| page.state == State::Waiting).count() as u64
    }

    /// What the pages hold that wait, by address, and of these the ones that are part of huge pages.
    fn contents(&self, secret: &Secret) -> (HashMap<Vaddr, u64>, HashSet<u64>) {
        let ranges = self.ranges(|page| page.state == State::Waiting);
        let mut contents = HashMap::new();
        let mut buffer = vec![0; 64 * page_size() as usize];
        self.target.memory.read_each(&ranges, &mut buffer, |range, bytes| {
            let pages = bytes.chunks_exact(page_size() as usize);
            contents.extend(range.page_addresses().zip(pages.map(|page| hash(page, secret))));
        });
        let mut huge = HashSet::new();
        let (mut regions, request) = (Vec::new(), ScanRequest::own_pages());
        for range in ranges {
            // What cannot be seen is not called huge.
            if self.target.pagemap.scan_all(range, &request, &mut regions).is_ok() {
                let parts = regions.iter().filter(|region| region.categories.contains(Category::HUGE));
                huge.extend(parts.flat_map(|region| region.range.page_addresses()).map(Vaddr::get));
            }
        }
        (contents, huge)
    }

    /// The mappings that are mergeable.
    fn marked(&self) -> Vec<Range> {
        let vmas = smaps::read(self.target.pid()).unwrap_or_default();
        vmas.iter().filter(|vma| vma.flags.mergeable()).map(|vma| vma.vma.range).collect()
    }
}

/// Whether one of `ranges` (ascending) has the address.
fn contains(ranges: &[Range], address: Vaddr) -> bool {
    let at = ranges.partition_point(|range| range.end() <= address);
    ranges.get(at).is_some_and(|range| range.contains(address))
}

/// Why pages that still wait are not merged, for each process's report. `visited`: ksmd has seen each often enough.
pub(crate) fn judge(works: &mut [Work], anchors: &Anchors, secret: &Secret, visited: bool) {
    let found: Vec<_> = works.iter().map(|work| work.contents(secret)).collect();
    // How many pages hold what now, merged ones too.
    let mut holders: HashMap<u64, u64> = HashMap::new();
    for (work, (contents, _)) in works.iter().zip(&found).filter(|(work, _)| !work.gone) {
        for page in &work.pages {
            if page.state != State::Waiting || contents.get(&page.address) == Some(&page.hash) {
                *holders.entry(page.hash).or_default() += 1;
            }
        }
    }
    for (work, (contents, huge)) in works.iter_mut().zip(&found) {
        let marked = if work.gone { Vec::new() } else { work.marked() };
        for page in work.pages.iter().filter(|page| page.state == State::Waiting) {
            let partner = holders.get(&page.hash).is_some_and(|holders| *holders > 1)
                || anchors.shared.contains(&page.hash)
                || page.hash == ZEROS && anchors.zeros;
            let refusal = match contents.get(&page.address) {
                _ if work.gone => Refusal::Gone,
                None => Refusal::Absent,
                Some(now) if *now != page.hash => Refusal::Changed,
                _ if !contains(&marked, page.address) => Refusal::NotMarked,
                _ if !partner => Refusal::NoPartner,
                _ if !visited => Refusal::NotVisited,
                _ if huge.contains(&page.address.get()) => Refusal::Huge,
                _ => Refusal::Held,
            };
            *work.report.refused.entry(refusal.word()).or_default() += 1;
        }
    }
}

/// Opens the flags of frames, if it can be seen which frames there are: without CAP_SYS_ADMIN a pagemap hides their
/// numbers, also from a root who may open the flags.
pub(crate) fn frames() -> Result<FrameFlagsFile, ProcError> {
    let flags = FrameFlagsFile::open()?;
    // On the heap and just written, so it is there.
    let own = Box::new(std::process::id());
    let address = Vaddr(std::ptr::from_ref(&*own).addr() as u64);
    let entry = Pagemap::open(Pid::this()).and_then(|pagemap| pagemap.entry(address));
    match entry.is_ok_and(|entry| entry.pfn().is_some()) {
        true => Ok(flags),
        false => Err(ProcError::Denied { pid: Pid::this(), file: "pagemap" }),
    }
}

/// How many pages of a range KSM shares, with each other or with the zero page.
pub(crate) fn merged_in(pagemap: &Pagemap, range: Range, flags: &mut FrameFlagsFile) -> Result<PageCount, ProcError> {
    let mut merged = 0;
    let mut words = Vec::new();
    for piece in range.pieces(SCAN_WINDOW) {
        words.resize(entries_len(piece), PagemapEntry(0));
        // An address space that is gone has none.
        let read = pagemap.entries(piece.start(), &mut words).unwrap_or(0);
        let mut frames: Vec<u64> = words[..read].iter().filter_map(|word| word.pfn()).collect();
        frames.sort_unstable();
        flags.visit(&frames, |_, flags| {
            merged += u64::from(flags.intersects(FrameFlags::KSM | FrameFlags::ZERO_PAGE));
        })?;
    }
    Ok(PageCount(merged))
}

/// Frames that became free, and pages that became the zero page. `shared`: frames that KSM shared before.
pub(crate) fn saved(works: &[Work], shared: &HashSet<u64>) -> (u64, u64) {
    let (mut freed, mut zeros) = (0, 0);
    let (mut forked, mut new) = (HashSet::new(), HashSet::new());
    for page in works.iter().flat_map(|work| &work.pages) {
        match page.state {
            State::Waiting => continue,
            State::Merged(frame) if shared.contains(&frame) => {}
            State::Merged(frame) => _ = new.insert(frame),
            State::Zero => zeros += 1,
        }
        match page.frame {
            None => freed += 1,
            Some(frame) => freed += u64::from(forked.insert(frame)),
        }
    }
    (freed - new.len().min(freed as usize) as u64, zeros)
}
