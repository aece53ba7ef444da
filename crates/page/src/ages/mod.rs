//! One byte a page: for how long it has been unwritten, what it is, and how reluctant we are to try it again.
//!
//! ```text
//! bit   7 6     5 4        3 2 1 0
//!      kind   back-off       age
//! ```
//!
//! The age counts cycles since the last write (or refusal, or merge). It is exact up to 7 and then goes in powers of
//! two: codes 8 to 14 stand for "at least 8, 16, ... 512 cycles". They need no further state because the step to 2^k
//! is taken only in cycles whose number is a multiple of 2^k: never too early, and at 2^(k+1) - 1 cycles at the latest.
//! Code 15 means asleep: looked at, nothing found, not worth a look until it is written.
//!
//! The back-off multiplies the time that a page must have been stable: 1, 4, 16, 64. It rises when a merge is refused
//! and when a merged page is written before its merge has paid, falls when a merged page lasts, and decays by one
//! level every [`AgePolicy::decay`] cycles, for a back-off that never decays starves pages whose reason is long gone.
//!
//! Ageing and looking for due pages are passes over bytes that the compiler vectorises: a cycle over memory that
//! nobody writes costs a fraction of a nanosecond a page.

use crate::{PageNumber, PageRange};

const AGE: u8 = 0x0f;
const ASLEEP: u8 = 0x0f;
const OLDEST: u8 = 0x0e;
const BACK_OFF: u8 = 0x30;
const BACK_OFF_ONE: u8 = 0x10;
const KIND: u8 = 0xc0;
const PLAIN: u8 = 0x00;
const DIVERGED: u8 = 0x40;
const MERGED: u8 = 0x80;
const EXCLUDED: u8 = 0xc0;

/// Pages tested at once for being due.
const STRIDE: usize = 64;

/// What a page is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A private page as the program made it.
    Plain,
    /// Written after it was merged: a private page inside a mapping of the store.
    Diverged,
    /// A mapping of a store page, as far as we know.
    Merged,
    /// Never to be merged, whatever it holds.
    Excluded,
}

/// What is known of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageAge {
    /// What it is.
    pub kind: Kind,
    /// Cycles since it was written, merged or refused, at least: exact up to 7, from there on a power of two that is
    /// more than a quarter of the truth, 512 at most. `None` where the page sleeps.
    pub cycles: Option<u32>,
    /// 0 to 3: it must be stable for 4^back_off times as long as others.
    pub back_off: u8,
}

/// When pages are due, and when merging them was a mistake. In cycles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AgePolicy {
    /// For how long a page must have been unwritten before it is worth a look. Exact up to 7; from there on rounded up
    /// to a power of two (512 at most), and noticed before twice that.
    pub settle: u32,
    /// A merged page that is written sooner than this raises its back-off; one that lasts eight times as long lowers
    /// it.
    pub worth: u32,
    /// Every page's back-off falls by one level each time so many cycles have passed; 0 means never.
    pub decay: u32,
}

impl Default for AgePolicy {
    /// Three cycles to settle, 16 to be worth a merge, decay every 256.
    fn default() -> Self {
        Self { settle: 3, worth: 16, decay: 256 }
    }
}

/// How many pages of a range are in which state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AgeCounts {
    /// Plain pages, sleeping ones included.
    pub plain: u64,
    /// Diverged pages, sleeping ones included.
    pub diverged: u64,
    /// Merged pages.
    pub merged: u64,
    /// Excluded pages.
    pub excluded: u64,
    /// Plain and diverged pages that were looked at since their last write.
    pub asleep: u64,
    /// Plain and diverged pages written in the current cycle.
    pub volatile: u64,
    /// Plain and diverged pages that are held back.
    pub backing_off: u64,
}

/// The ages of the pages of one range.
#[derive(Clone, Debug)]
pub struct Ages {
    range: PageRange,
    policy: AgePolicy,
    cycle: u32,
    bytes: Vec<u8>,
    /// The age code at which a page of each back-off is due.
    due_at: [u8; 4],
}

impl Ages {
    /// Starts to watch `range`: all pages plain, just written.
    ///
    /// # Panics
    /// If the range has more pages than the machine can address bytes.
    pub fn new(range: PageRange, policy: AgePolicy) -> Self {
        let pages = usize::try_from(range.pages()).expect("a byte for each page fits into memory");
        let due_at = [0, 1, 2, 3].map(|level| code_for(policy.settle.saturating_mul(1 << (2 * level))));
        Self { range, policy, cycle: 0, bytes: vec![PLAIN; pages], due_at }
    }

    /// The pages watched.
    pub fn range(&self) -> PageRange {
        self.range
    }

    /// Bytes kept: one for each page.
    pub fn bytes(&self) -> usize {
        self.bytes.capacity()
    }

    /// One cycle has passed. Apply what was written in it afterwards, with [`written`](Self::written).
    pub fn tick(&mut self) {
        self.cycle = self.cycle.wrapping_add(1);
        // Codes up to 7 step in every cycle, code 8 and up in cycles that are multiples of 8, 16, ...
        let doublings = self.cycle.trailing_zeros().saturating_sub(2);
        let limit = u8::try_from(7 + doublings).unwrap_or(OLDEST).min(OLDEST);
        let decays = self.policy.decay != 0 && self.cycle.is_multiple_of(self.policy.decay);
        if decays {
            for byte in &mut self.bytes {
                *byte -= if *byte & BACK_OFF == 0 { 0 } else { BACK_OFF_ONE };
            }
        }
        for byte in &mut self.bytes {
            *byte += u8::from(*byte & AGE < limit);
        }
    }

    /// The pages of `region` have been written. Merged ones among them have diverged. What lies outside the range is
    /// left alone.
    pub fn written(&mut self, region: PageRange) {
        let worth = self.policy.worth;
        for byte in self.slice(region) {
            *byte = match *byte & KIND {
                EXCLUDED => *byte,
                MERGED => DIVERGED | after_merge(*byte, worth),
                _ => *byte & !AGE,
            };
        }
    }

    /// Runs of neighbouring pages that have been stable for long enough and are worth a look, in ascending order.
    /// Merged, sleeping and excluded pages never are.
    pub fn due(&self) -> impl Iterator<Item = PageRange> + '_ {
        Due { ages: self, at: 0 }
    }

    /// `page` was looked at and nothing was found: it sleeps until it is written.
    pub fn looked(&mut self, page: PageNumber) {
        self.update(page, |byte| if byte & MERGED == 0 { byte | ASLEEP } else { byte });
    }

    /// A page that sleeps, plain or diverged, is to be looked at again as if just written.
    pub fn wake(&mut self, page: PageNumber) {
        self.update(page, |byte| if byte & MERGED == 0 && byte & AGE == ASLEEP { byte & !AGE } else { byte });
    }

    /// `page` is now a mapping of the store.
    pub fn merged(&mut self, page: PageNumber) {
        self.update(page, |byte| MERGED | byte & BACK_OFF);
    }

    /// `page` is a private page again, without having been written.
    pub fn unmerged(&mut self, page: PageNumber) {
        self.update(page, |byte| PLAIN | byte & BACK_OFF);
    }

    /// The merged `page` is not there any more: its program has discarded it, or mapped something else. Allocators do that
    /// to the same places again and again.
    pub fn discarded(&mut self, page: PageNumber) {
        let worth = self.policy.worth;
        self.update(page, |byte| {
            PLAIN | if byte & KIND == MERGED { after_merge(byte, worth) } else { byte & BACK_OFF }
        });
    }

    /// A merge of `page` was refused: it is tried again after four times as long as before.
    pub fn refused(&mut self, page: PageNumber) {
        self.update(page, |byte| if byte & MERGED == 0 { byte & KIND | raised(byte) } else { byte });
    }

    /// `page` is never to be merged.
    pub fn excluded(&mut self, page: PageNumber) {
        self.update(page, |_| EXCLUDED);
    }

    /// An excluded page may be merged again.
    pub fn included(&mut self, page: PageNumber) {
        self.update(page, |byte| if byte & KIND == EXCLUDED { PLAIN } else { byte });
    }

    /// What is known of `page`; `None` outside the range.
    pub fn age(&self, page: PageNumber) -> Option<PageAge> {
        let byte = self.bytes[self.position(page)?];
        let kind = match byte & KIND {
            PLAIN => Kind::Plain,
            DIVERGED => Kind::Diverged,
            MERGED => Kind::Merged,
            _ => Kind::Excluded,
        };
        let asleep = byte & MERGED == 0 && byte & AGE == ASLEEP;
        Some(PageAge { kind, cycles: (!asleep).then(|| floor(byte & AGE)), back_off: (byte & BACK_OFF) / BACK_OFF_ONE })
    }

    /// Counts the pages by state: one pass over the bytes.
    pub fn counts(&self) -> AgeCounts {
        let mut by_byte = [0_u64; 256];
        for byte in &self.bytes {
            by_byte[usize::from(*byte)] += 1;
        }
        let mut counts = AgeCounts::default();
        for (byte, pages) in (0..=u8::MAX).zip(by_byte) {
            *match byte & KIND {
                PLAIN => &mut counts.plain,
                DIVERGED => &mut counts.diverged,
                MERGED => &mut counts.merged,
                _ => &mut counts.excluded,
            } += pages;
            if byte & MERGED == 0 {
                counts.asleep += if byte & AGE == ASLEEP { pages } else { 0 };
                counts.volatile += if byte & AGE == 0 { pages } else { 0 };
                counts.backing_off += if byte & BACK_OFF != 0 { pages } else { 0 };
            }
        }
        counts
    }

    fn position(&self, page: PageNumber) -> Option<usize> {
        if !self.range.contains(page) {
            return None;
        }
        usize::try_from(page.0 - self.range.start.0).ok()
    }

    fn slice(&mut self, region: PageRange) -> &mut [u8] {
        let inside = region.intersection(self.range);
        if inside.is_empty() {
            return &mut [];
        }
        let start = self.position(inside.start).expect("the intersection lies in the range");
        let pages = usize::try_from(inside.pages()).expect("no longer than the range");
        &mut self.bytes[start..start + pages]
    }

    /// Pages outside the range are ignored: a range may have shrunk since the caller decided.
    fn update(&mut self, page: PageNumber, change: impl FnOnce(u8) -> u8) {
        if let Some(at) = self.position(page) {
            self.bytes[at] = change(self.bytes[at]);
        }
    }

    fn is_due(&self, byte: u8) -> bool {
        is_due(byte, &self.due_at)
    }
}

fn is_due(byte: u8, due_at: &[u8; 4]) -> bool {
    let back_off = usize::from((byte & BACK_OFF) / BACK_OFF_ONE);
    byte & MERGED == 0 && byte & AGE != ASLEEP && byte & AGE >= due_at[back_off]
}

/// Whether any page of the stride is due: the same test in byte arithmetic, which the compiler does for 16 pages and
/// more at a time.
fn any_due(stride: &[u8; STRIDE], due_at: &[u8; 4]) -> bool {
    // A due byte of each back-off lies between two values, its kind apart.
    let spans: [(u8, u8); 4] = std::array::from_fn(|level| {
        let age = due_at[level];
        ((level as u8) * BACK_OFF_ONE + age, OLDEST - age)
    });
    let mut due = [0; STRIDE];
    for (due, byte) in due.iter_mut().zip(stride) {
        let value = byte & !DIVERGED;
        for (first, width) in spans {
            *due |= u8::from(value.wrapping_sub(first) <= width);
        }
    }
    due != [0; STRIDE]
}

struct Due<'a> {
    ages: &'a Ages,
    at: usize,
}

impl Iterator for Due<'_> {
    type Item = PageRange;

    fn next(&mut self) -> Option<PageRange> {
        let bytes = &self.ages.bytes[self.at..];
        let (strides, _) = bytes.as_chunks::<STRIDE>();
        let idle = strides.iter().take_while(|stride| !any_due(stride, &self.ages.due_at)).count() * STRIDE;
        let from = idle + bytes[idle..].iter().position(|byte| self.ages.is_due(*byte))?;
        let pages = bytes[from..].iter().take_while(|byte| self.ages.is_due(**byte)).count();
        let start = self.ages.range.start.offset((self.at + from) as u64);
        self.at += from + pages;
        Some(PageRange::from_count(start, pages as u64))
    }
}

/// Fewest cycles that an age code stands for.
fn floor(code: u8) -> u32 {
    match code {
        0..=7 => u32::from(code),
        _ => 1 << (code.min(OLDEST) - 5),
    }
}

/// The smallest code that stands for at least `cycles`.
fn code_for(cycles: u32) -> u8 {
    (0..OLDEST).find(|code| floor(*code) >= cycles).unwrap_or(OLDEST)
}

/// How long a merged page that has ended is to wait for the next time: longer if it was not worth it.
fn after_merge(byte: u8, worth: u32) -> u8 {
    match floor(byte & AGE) {
        cycles if cycles < worth => raised(byte),
        cycles if cycles >= worth.saturating_mul(8) => lowered(byte),
        _ => byte & BACK_OFF,
    }
}

fn raised(byte: u8) -> u8 {
    (byte & BACK_OFF).saturating_add(BACK_OFF_ONE).min(BACK_OFF)
}

fn lowered(byte: u8) -> u8 {
    (byte & BACK_OFF).saturating_sub(BACK_OFF_ONE)
}

#[cfg(test)]
mod tests;
