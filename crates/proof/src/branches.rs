//! Direct branches into places where none is expected.
//!
//! The search is over opcode bytes, not over decoded instructions, so no branch can be missed; only what hits a target is
//! decoded, to leave out bytes that are no branch.

use crate::image::Code;
use crate::run::{Run, is_branch_to};
use crate::starts::Starts;

/// How far from its target a branch with one byte of displacement can be.
const NEAR: u64 = 160;
/// Addresses to a bit of the filter.
const GRAIN: u32 = 5;
/// Bits of the filter.
const BITS: u64 = 1 << 19;

/// Ranges of addresses that a branch is looked for to.
#[derive(Default)]
pub(crate) struct Targets {
    /// From, to, whose.
    ranges: Vec<(u64, u64, usize)>,
}

impl Targets {
    pub(crate) fn add(&mut self, from: u64, to: u64, index: usize) {
        if from < to {
            self.ranges.push((from, to, index));
        }
    }
}

/// A branch to one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Branch {
    /// Address of the last byte of the branch.
    pub(crate) from: u64,
    pub(crate) target: u64,
    /// Whose target it is.
    pub(crate) index: usize,
}

/// Tells of all branches to the targets.
pub(crate) fn branches_to(parts: &[Code<'_>], starts: &Starts, targets: Targets, mut tell: impl FnMut(Branch)) {
    let mut ranges = targets.ranges;
    if ranges.is_empty() {
        return;
    }
    ranges.sort_unstable();
    let filter = Filter::of(&ranges);
    let longest = ranges.iter().map(|range| range.1 - range.0).max().unwrap_or(0);
    for code in parts {
        let mut decoded = Decoded::new(code, starts);
        let mut note = |end: u64, target: u64| {
            if !filter.may_hold(target) {
                return;
            }
            let after = ranges.partition_point(|range| range.0 <= target);
            let hit = ranges.iter().take(after).rev().take_while(|range| target - range.0 < longest);
            let mut hit = hit.filter(|range| target < range.1).peekable();
            if hit.peek().is_some() && decoded.branches(end, target) {
                hit.for_each(|range| tell(Branch { from: end - 1, target, index: range.2 }));
            }
        };
        far(code, &mut note);
        let mut done = code.address;
        for (from, to, _) in &ranges {
            let begin = from.saturating_sub(NEAR).max(done);
            let end = to.saturating_add(NEAR).min(code.end());
            if begin < end {
                near(code, begin, end, &mut note);
                // The last byte may begin a branch that the next stretch has the rest of.
                done = end - 1;
            }
        }
    }
}

/// `call`, `jmp`, `jcc` and `xbegin` with four bytes of displacement, which always follow their opcode.
fn far(code: &Code<'_>, note: &mut impl FnMut(u64, u64)) {
    let mut tell = |at: usize| {
        let displacement = code.bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_le_bytes);
        if let Some(displacement) = displacement {
            let end = code.address + at as u64 + 4;
            note(end, end.wrapping_add_signed(i64::from(displacement)));
        }
    };
    for at in memchr::memchr3_iter(0xe8, 0xe9, 0x0f, code.bytes) {
        match code.bytes.get(at..at + 2) {
            Some([0x0f, 0x80..=0x8f]) => tell(at + 2),
            Some([0xe8 | 0xe9, _]) => tell(at + 1),
            _ => {}
        }
    }
    memchr::memmem::find_iter(code.bytes, &[0xc7, 0xf8]).for_each(|at| tell(at + 2));
}

/// `jmp`, `jcc`, `loop` and `jrcxz` with one byte of displacement.
fn near(code: &Code<'_>, begin: u64, end: u64, note: &mut impl FnMut(u64, u64)) {
    let Some(bytes) = code.slice(begin, end) else { return };
    for (at, window) in bytes.windows(2).enumerate() {
        if let [0xeb | 0x70..=0x7f | 0xe0..=0xe3, displacement] = *window {
            let end = begin + at as u64 + 2;
            note(end, end.wrapping_add_signed(i64::from(displacement.cast_signed())));
        }
    }
}

/// Code decoded where branches are asked for: one run is kept, since questions come in the order of addresses.
pub(crate) struct Decoded<'c> {
    code: &'c Code<'c>,
    starts: &'c Starts,
    last: Option<Run>,
}

impl<'c> Decoded<'c> {
    pub(crate) fn new(code: &'c Code<'c>, starts: &'c Starts) -> Self {
        Self { code, starts, last: None }
    }

    /// Is there an instruction that ends at `end` and branches to `target`? Where decoding breaks off, yes.
    pub(crate) fn branches(&mut self, end: u64, target: u64) -> bool {
        let last = end - 1;
        let start = self.starts.at_or_before(last).unwrap_or(0).max(self.code.address);
        let run = match self.last.take() {
            Some(run) if run.entry == start => run,
            _ => Run::decode(self.code, self.starts, start, last),
        };
        let run = self.last.insert(run);
        let index = run.code.partition_point(|instruction| instruction.next_ip() < end);
        match run.code.get(index) {
            Some(instruction) => instruction.next_ip() == end && is_branch_to(instruction, target),
            None => true,
        }
    }
}

/// Which addresses are surely in no range: one look for each byte of code has to be cheap.
struct Filter {
    bits: Vec<u64>,
}

impl Filter {
    fn of(ranges: &[(u64, u64, usize)]) -> Self {
        let mut filter = Self { bits: vec![0; usize::try_from(BITS / 64).unwrap_or(0)] };
        for (from, to, _) in ranges {
            for grain in from >> GRAIN..=(to - 1) >> GRAIN {
                let (word, bit) = Self::place(grain);
                if let Some(word) = filter.bits.get_mut(word) {
                    *word |= bit;
                }
            }
        }
        filter
    }

    fn place(grain: u64) -> (usize, u64) {
        let place = grain % BITS;
        (usize::try_from(place / 64).unwrap_or(usize::MAX), 1 << (place % 64))
    }

    fn may_hold(&self, address: u64) -> bool {
        let (word, bit) = Self::place(address >> GRAIN);
        self.bits.get(word).is_some_and(|word| word & bit != 0)
    }
}
