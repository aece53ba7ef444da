//! Which pages of a snapshot are equal: one word a page, sorted in place.
//!
//! The candidate index answers "who else has this?" while a scan goes on for ever. A snapshot asks once, after all has
//! been read, so it can do with less and be exact: each page is numbered in the order of the snapshot and has one 64-bit
//! hash and one byte at that place. For grouping, the hash's lower bits make room for the number, and the words are
//! sorted where they are: equal contents become neighbours, and each word still says which page it is. Bits given up are
//! made good by five more in the byte, which are compared for neighbours only. That leaves `69 - log2(pages)` bits, so
//! for 4 million pages (16 GiB) one false pair is expected in 64 snapshots.
//!
//! With a sample of hash space ([`Census::sampled`]) only contents whose hash falls into it are kept, sixteen bytes
//! each: all their pages, so their groups are complete.

mod content;

pub use content::{Content, ContentClass, looks_like_a_pointer};

/// The contents of a snapshot's pages by their numbers, and which of them did not last.
#[derive(Debug)]
pub struct Census {
    pages: usize,
    kept: Kept,
    volatile: Vec<u64>,
}

#[derive(Debug)]
enum Kept {
    /// One word and one byte for each page.
    All { hashes: Vec<u64>, marks: Vec<u8> },
    /// Contents whose hash is below the limit, and one bit for each zero page and each page that was read.
    Sample { below: u64, entries: Vec<Entry>, zeros: Vec<u64>, read: Vec<u64> },
}

/// A page of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    hash: u64,
    page: u32,
    mark: u8,
}

/// What one reader found in pages that follow each other, to be [taken in](Census::take_in).
#[derive(Debug)]
pub struct Findings {
    first: usize,
    contents: Vec<Option<Content>>,
}

impl Findings {
    /// For `pages` pages from number `first` on, none of them read yet.
    pub fn new(first: usize, pages: usize) -> Self {
        Self { first, contents: vec![None; pages] }
    }

    /// The page with this number holds `content`.
    ///
    /// # Panics
    /// If it is not one of these pages.
    pub fn put(&mut self, page: usize, content: Content) {
        self.contents[page - self.first] = Some(content);
    }

    /// Forgets what was read: it was another process's.
    pub fn clear(&mut self) {
        self.contents.fill(None);
    }
}

/// Pages that hold the same.
#[derive(Clone, Copy, Debug)]
pub struct Group<'a> {
    /// What they hold.
    pub class: ContentClass,
    /// Their numbers, ascending.
    pub pages: &'a [u32],
}

impl Census {
    /// For `pages` pages, none of them read yet.
    ///
    /// # Panics
    /// With more than 2^32 pages (16 TiB of 4 KiB pages).
    pub fn new(pages: usize) -> Self {
        assert!(u32::try_from(pages).is_ok(), "pages are numbered with 32 bits");
        let kept = Kept::All { hashes: vec![0; pages], marks: vec![0; pages] };
        Self { pages, kept, volatile: bits(pages) }
    }

    /// The same, but of all contents only a share `fraction` of hash space is kept, zero pages apart.
    ///
    /// # Panics
    /// With more than 2^32 pages, or a fraction outside 0 to 1.
    pub fn sampled(pages: usize, fraction: f64) -> Self {
        assert!(u32::try_from(pages).is_ok(), "pages are numbered with 32 bits");
        assert!((0.0..=1.0).contains(&fraction), "a fraction");
        let below = (fraction * u64::MAX as f64) as u64;
        let kept = Kept::Sample { below, entries: Vec::new(), zeros: bits(pages), read: bits(pages) };
        Self { pages, kept, volatile: bits(pages) }
    }

    /// How many pages there are numbers for.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Memory taken, in bytes.
    pub fn bytes(&self) -> u64 {
        let kept = match &self.kept {
            Kept::All { hashes, marks } => size_of_val::<[u64]>(hashes) + marks.len(),
            Kept::Sample { entries, zeros, read, .. } => {
                entries.capacity() * size_of::<Entry>() + size_of_val::<[u64]>(zeros) + size_of_val::<[u64]>(read)
            }
        };
        (kept + size_of_val::<[u64]>(&self.volatile)) as u64
    }

    /// Keeps what a reader found.
    pub fn take_in(&mut self, findings: &Findings) {
        for (page, content) in findings.known() {
            match &mut self.kept {
                Kept::All { hashes, marks } => {
                    hashes[page] = content.hash;
                    marks[page] = content.mark;
                }
                Kept::Sample { below, entries, zeros, read } => {
                    set(read, page);
                    if content == Content::ZERO {
                        set(zeros, page);
                    } else if content.hash < *below {
                        let number = u32::try_from(page).expect("numbers have 32 bits");
                        entries.push(Entry { hash: content.hash, page: number, mark: content.mark });
                    }
                }
            }
        }
    }

    /// Has a second look at the same pages: what has changed, or is not there any more, is volatile.
    pub fn look_again(&mut self, findings: &Findings) {
        let first = findings.first;
        if let Kept::Sample { entries, .. } = &mut self.kept
            && !entries.is_sorted_by_key(|entry| entry.page)
        {
            entries.sort_unstable_by_key(|entry| entry.page);
        }
        for (offset, now) in findings.contents.iter().enumerate() {
            let page = first + offset;
            let changed = match &self.kept {
                Kept::All { hashes, marks } => {
                    marks[page] != 0 && *now != Some(Content { hash: hashes[page], mark: marks[page] })
                }
                Kept::Sample { below, entries, zeros, read } => {
                    let number = u32::try_from(page).expect("numbers have 32 bits");
                    let before = entries.binary_search_by_key(&number, |entry| entry.page).ok().map(|at| &entries[at]);
                    match (before, now) {
                        _ if !get(read, page) => false,
                        (_, None) => true,
                        _ if get(zeros, page) => *now != Some(Content::ZERO),
                        (Some(before), Some(now)) => before.hash != now.hash,
                        // What it held is not known, only that it was outside the sample; so it should be still.
                        (None, Some(now)) => *now == Content::ZERO || now.hash < *below,
                    }
                }
            };
            if changed {
                set(&mut self.volatile, page);
            }
        }
    }

    /// Sorts the contents: after this only groups can be asked for. `threads` of them share the work.
    pub fn group(self, threads: usize) -> Groups {
        let mut zeros = Vec::new();
        let (order, read) = match self.kept {
            Kept::All { mut hashes, marks } => {
                let shift = 64 - page_bits(self.pages);
                let mut kept = 0;
                let mut read = 0;
                for page in 0..self.pages {
                    let number = u32::try_from(page).expect("numbers have 32 bits");
                    match ContentClass::of_mark(marks[page]) {
                        None => continue,
                        Some(ContentClass::Zero) => zeros.push(number),
                        Some(_) => {
                            hashes[kept] = low_bits_replaced(hashes[page], u64::from(number), shift);
                            kept += 1;
                        }
                    }
                    read += 1;
                }
                hashes.truncate(kept);
                sort(&mut hashes, threads);
                (Order::Words { words: hashes, marks, shift }, read)
            }
            Kept::Sample { mut entries, zeros: zero_bits, read, .. } => {
                zeros.extend((0..self.pages).filter(|page| get(&zero_bits, *page)).map(|page| page as u32));
                sort(&mut entries, threads);
                let read = read.iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
                (Order::Entries(entries), usize::try_from(read).expect("no more than pages"))
            }
        };
        Groups { order, zeros, read, volatile: self.volatile }
    }
}

impl Findings {
    /// The pages that were read, by number.
    pub fn known(&self) -> impl Iterator<Item = (usize, Content)> + '_ {
        let numbered = self.contents.iter().enumerate();
        numbered.filter_map(|(offset, content)| content.map(|content| (self.first + offset, content)))
    }
}

/// The contents of a snapshot, equal ones together.
#[derive(Debug)]
pub struct Groups {
    order: Order,
    zeros: Vec<u32>,
    read: usize,
    volatile: Vec<u64>,
}

#[derive(Debug)]
enum Order {
    /// A word has the hash's upper bits and the page's number below them.
    Words {
        words: Vec<u64>,
        marks: Vec<u8>,
        shift: u32,
    },
    Entries(Vec<Entry>),
}

impl Groups {
    /// Pages that were read.
    pub fn read(&self) -> usize {
        self.read
    }

    /// Pages of zeros, by number.
    pub fn zeros(&self) -> &[u32] {
        &self.zeros
    }

    /// Whether the page did not last until the second look.
    pub fn is_volatile(&self, page: u32) -> bool {
        get(&self.volatile, page as usize)
    }

    /// Shows every group of equal pages that are not zero to `visit`, those of one page too, in no particular order.
    /// `threads` threads have one `T` each.
    pub fn visit<T: Send>(
        &self,
        threads: usize,
        make: impl Fn() -> T + Sync,
        visit: impl Fn(&mut T, Group<'_>) + Sync,
    ) -> Vec<T> {
        let total = self.order.len();
        let threads = threads.clamp(1, total.div_ceil(1024).max(1));
        let mut cuts: Vec<usize> =
            (0..=threads).map(|part| self.order.begin_of_group(total * part / threads)).collect();
        cuts.dedup();
        std::thread::scope(|scope| {
            let part = |from: usize, to: usize| {
                let (make, visit) = (&make, &visit);
                move || {
                    let mut state = make();
                    self.order.groups(from, to, |group| visit(&mut state, group));
                    state
                }
            };
            let running: Vec<_> = cuts.windows(2).map(|cut| scope.spawn(part(cut[0], cut[1]))).collect();
            running.into_iter().map(|thread| thread.join().expect("a visitor does not panic")).collect()
        })
    }
}

impl Order {
    fn len(&self) -> usize {
        match self {
            Self::Words { words, .. } => words.len(),
            Self::Entries(entries) => entries.len(),
        }
    }

    /// The hash's bits at a place, which neighbours of one group share.
    fn key(&self, at: usize) -> u64 {
        match self {
            Self::Words { words, shift, .. } => words[at].checked_shr(64 - shift).unwrap_or(0),
            Self::Entries(entries) => entries[at].hash,
        }
    }

    fn page(&self, at: usize) -> (u32, u8) {
        match self {
            Self::Words { words, marks, shift } => {
                let number = words[at] & low_mask(*shift);
                (u32::try_from(number).expect("numbers have 32 bits"), marks[number as usize])
            }
            Self::Entries(entries) => (entries[at].page, entries[at].mark),
        }
    }

    /// The first place at or before `at` that does not belong to the group before it.
    fn begin_of_group(&self, mut at: usize) -> usize {
        while at > 0 && at < self.len() && self.key(at - 1) == self.key(at) {
            at -= 1;
        }
        at
    }

    fn groups(&self, from: usize, to: usize, mut show: impl FnMut(Group<'_>)) {
        let mut same: Vec<(u8, u32)> = Vec::new();
        let mut pages = Vec::new();
        let mut at = from;
        while at < to {
            let key = self.key(at);
            same.clear();
            while at < to && self.key(at) == key {
                let (page, mark) = self.page(at);
                same.push((mark, page));
                at += 1;
            }
            // Nearly always one mark: what a word has lost of its hash is in the mark.
            same.sort_unstable();
            for group in same.chunk_by(|one, other| one.0 == other.0) {
                pages.clear();
                pages.extend(group.iter().map(|(_, page)| *page));
                let class = ContentClass::of_mark(group[0].0).expect("only pages that were read are sorted");
                show(Group { class, pages: &pages });
            }
        }
    }
}

/// Bits that number `pages` pages.
fn page_bits(pages: usize) -> u32 {
    usize::BITS - pages.saturating_sub(1).leading_zeros()
}

fn low_mask(shift: u32) -> u64 {
    u64::MAX.checked_shr(shift).unwrap_or(0)
}

/// The upper `shift` bits of `hash`, `number` below them.
fn low_bits_replaced(hash: u64, number: u64, shift: u32) -> u64 {
    hash & !low_mask(shift) | number
}

/// Sorts in place, each thread one part of the order.
fn sort<T: Ord + Copy + Send>(items: &mut [T], threads: usize) {
    if threads < 2 || items.len() < 1 << 16 {
        items.sort_unstable();
        return;
    }
    let (left_threads, middle) = (threads / 2, items.len() / threads * (threads / 2));
    let (left, _, right) = items.select_nth_unstable(middle);
    std::thread::scope(|scope| {
        scope.spawn(|| sort(left, left_threads));
        sort(right, threads - left_threads);
    });
}

fn bits(count: usize) -> Vec<u64> {
    vec![0; count.div_ceil(64)]
}

fn set(bits: &mut [u64], at: usize) {
    bits[at / 64] |= 1 << (at % 64);
}

fn get(bits: &[u64], at: usize) -> bool {
    bits[at / 64] >> (at % 64) & 1 == 1
}

#[cfg(test)]
mod tests;
