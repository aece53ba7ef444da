//! Every instruction of a file that enters the kernel, and the numbers that it is given.
//!
//! Each such instruction contains one of three byte pairs, so a search for them finds too much but never too little.
//! Decoding from the nearest place where an instruction is known to start then sorts the pairs:
//!
//! * An instruction starts there: a site. Its numbers come from following `eax` backwards.
//! * The pair lies inside another instruction, and an unwind entry or a sized symbol vouches for a stream without
//!   invalid instructions: an operand, dropped, unless a branch leads into it at a place from which the pair is reached.
//! * Otherwise the stream is no witness. It is dropped if decodings from all around see another instruction there, or if
//!   running on would fault, as in tables of constants. What is left is *ambiguous*, and spoils the file.
//!
//! What is not seen: jumps through tables or registers into the middle of an instruction, or between the number and the
//! site.

use std::collections::BTreeSet;

use iced_x86::{Instruction, Mnemonic, Register};
use memchr::memmem;

use crate::branches::{Targets, branches_to};
use crate::error::ProofError;
use crate::image::Code;
use crate::number::values_at;
use crate::numbers::{IOCTL, PRCTL};
use crate::run::{Place, Run};
use crate::starts::Starts;
use crate::vote::{faults_behind, is_inside_another};

/// How far back decoding begins where no start is known that near: code without symbols and unwind entries, as of Go.
const WINDOW: u64 = 8 << 10;
/// A start that is further away than this helps no more than one in the middle of nowhere.
const FAR: u64 = 256 << 10;
/// Decoded bytes and votes that a file may cost beside its size. Hostile files end here.
const WORK: u64 = 64 << 20;
/// What a vote, and a step on the way to a number, cost in decoded bytes.
const VOTE: u64 = 48 * 40;
const STEP: u64 = 64;
/// The most sites that are told apart.
pub(crate) const MOST: usize = 1 << 16;

/// By which instruction the kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Entry {
    /// `syscall`.
    Syscall,
    /// `sysenter`: the numbers of another table.
    Sysenter,
    /// `int 0x80`: the same.
    Int80,
}

const PAIRS: [([u8; 2], Entry); 3] =
    [([0x0f, 0x05], Entry::Syscall), ([0x0f, 0x34], Entry::Sysenter), ([0xcd, 0x80], Entry::Int80)];

/// An instruction that enters the kernel, or what may be one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) address: u64,
    pub(crate) file_offset: u64,
    pub(crate) entry: Entry,
    /// All numbers that can be in `eax`; `None` if some path does not tell.
    pub(crate) numbers: Option<BTreeSet<u32>>,
    /// What `ioctl` and `prctl` are asked for, if constants.
    pub(crate) requests: Option<BTreeSet<u32>>,
    /// Decoding does not say whether this is an instruction.
    pub(crate) ambiguous: bool,
}

/// What one byte pair is, before branches are looked at.
enum Settled {
    /// Part of the instruction `within`, if that is known for certain.
    Operand { pair: Found, within: Option<Instruction> },
    /// The instructions on the way from its numbers, and the jumps to these that were followed.
    Site { found: Found, on_the_way: BTreeSet<u64>, followed: BTreeSet<u64> },
}

/// All sites of these parts, by address.
pub(crate) fn scan(parts: &[Code<'_>], starts: impl FnOnce() -> Starts) -> Result<Vec<Found>, ProofError> {
    let candidates: Vec<(&Code<'_>, Vec<(usize, Entry)>)> =
        parts.iter().map(|part| (part, candidates(part))).filter(|(_, found)| !found.is_empty()).collect();
    // Many files hold no pair at all: symbols and unwind entries are read only for the others.
    if candidates.is_empty() {
        return Ok(Vec::new());
    }
    let starts = starts();
    let size: u64 = parts.iter().map(|part| part.bytes.len() as u64).sum();
    let mut scanner = Scanner { starts: &starts, left: WORK.saturating_add(size.saturating_mul(6)) };
    let mut settled = Vec::new();
    for (code, pairs) in &candidates {
        scanner.part(code, pairs, &mut settled)?;
    }
    enter(parts, &starts, &mut settled);
    let mut found: Vec<Found> = settled
        .into_iter()
        .filter_map(|settled| match settled {
            Settled::Site { found, .. } => Some(found),
            Settled::Operand { .. } => None,
        })
        .collect();
    found.sort_unstable_by_key(|found| found.address);
    Ok(found)
}

/// All byte pairs of a part.
fn candidates(code: &Code<'_>) -> Vec<(usize, Entry)> {
    let of = |(pair, entry): &([u8; 2], Entry)| {
        let entry = *entry;
        memmem::find_iter(code.bytes, pair).map(|at| (at, entry)).collect::<Vec<_>>()
    };
    let mut found: Vec<(usize, Entry)> = PAIRS.iter().flat_map(of).collect();
    found.sort_unstable_by_key(|(at, _)| *at);
    found
}

struct Scanner<'s> {
    starts: &'s Starts,
    /// Bytes that may still be decoded.
    left: u64,
}

/// From where to where to decode.
struct Span {
    start: u64,
    stop: u64,
    /// The start is one, and not merely somewhere before.
    known: bool,
}

impl Span {
    fn of(code: &Code<'_>, address: u64, before: Option<u64>, after: Option<u64>) -> Self {
        let after = after.unwrap_or(u64::MAX).min(code.end());
        match before {
            // A function that goes on for longer is cut: it is no witness then.
            Some(start) if start >= code.address && address - start <= FAR => {
                Self { start, stop: after.min(address + FAR), known: true }
            }
            // Neighbours share these.
            _ => Self {
                start: (address & !(WINDOW - 1)).saturating_sub(WINDOW).max(code.address),
                stop: after.min((address | (WINDOW - 1)) + WINDOW),
                known: false,
            },
        }
    }
}

impl Scanner<'_> {
    fn part(
        &mut self,
        code: &Code<'_>,
        pairs: &[(usize, Entry)],
        settled: &mut Vec<Settled>,
    ) -> Result<(), ProofError> {
        let (mut around, mut before) = (None, None);
        for (at, entry) in pairs {
            if settled.len() == MOST {
                return Err(ProofError::TooBig { what: "number of byte pairs like system calls" });
            }
            let address = code.address + *at as u64;
            let starts = self.starts;
            let span = Span::of(code, address, starts.boundary_at_or_before(address), starts.boundary_after(address));
            self.run(code, &span, address, &mut around)?;
            let Some(run) = &around else { continue };
            let place = run.place(address);
            let trusted = span.known && run.whole && starts.covers(address) && starts.covers(span.start);
            let mut pair = Found {
                address,
                file_offset: code.file_offset + *at as u64,
                entry: *entry,
                numbers: None,
                requests: None,
                ambiguous: !matches!(place, Place::Starts(_)),
            };
            if trusted && place == Place::Inside {
                let index = run.code.partition_point(|here| here.ip() <= address);
                let within = index.checked_sub(1).and_then(|index| run.code.get(index)).copied();
                settled.push(Settled::Operand { pair, within });
                continue;
            }
            let (mut on_the_way, mut followed) = (BTreeSet::new(), BTreeSet::new());
            if !pair.ambiguous {
                let span = Span::of(code, address, starts.at_or_before(address), starts.after(address));
                self.run(code, &span, address, &mut before)?;
                let Some(run) = &before else { continue };
                if self.number(run, trusted && span.known, &mut pair, &mut on_the_way)? {
                    followed = on_the_way.iter().flat_map(|address| run.jumps_to(*address)).collect();
                }
            }
            if !trusted && self.is_none(code, *at, &mut pair)? {
                settled.push(Settled::Operand { pair, within: None });
            } else {
                settled.push(Settled::Site { found: pair, on_the_way, followed });
            }
        }
        Ok(())
    }

    /// Decodes a span, unless the last one that was decoded is the same.
    fn run(&mut self, code: &Code<'_>, span: &Span, address: u64, last: &mut Option<Run>) -> Result<(), ProofError> {
        if last.as_ref().is_some_and(|run| run.entry == span.start && run.reaches(address)) {
            return Ok(());
        }
        self.spend(span.stop.saturating_sub(span.start))?;
        *last = Some(Run::decode_between(code, span.start, span.stop));
        Ok(())
    }

    fn spend(&mut self, bytes: u64) -> Result<(), ProofError> {
        self.left = self.left.checked_sub(bytes).ok_or(ProofError::TooBig { what: "work for byte pairs" })?;
        Ok(())
    }

    /// Finds the numbers of a site, and what it asks for. False if some path does not tell them.
    fn number(
        &mut self,
        run: &Run,
        trusted: bool,
        site: &mut Found,
        on_the_way: &mut BTreeSet<u64>,
    ) -> Result<bool, ProofError> {
        let Place::Starts(index) = run.place(site.address) else { return Ok(false) };
        let mut steps = 0;
        let found = values_at(run, index, Register::RAX, &mut steps)
            .filter(|found| (trusted || is_tight(run, index)) && !self.is_entered(&found.on_the_way, run.entry));
        if let Some(found) = &found
            && let Some(register) = request_register(&found.values)
            && let Some(requests) = values_at(run, index, register, &mut steps)
            && trusted
            && !self.is_entered(&requests.on_the_way, run.entry)
        {
            on_the_way.extend(requests.on_the_way);
            site.requests = Some(requests.values);
        }
        self.spend(steps as u64 * STEP)?;
        let Some(found) = found else { return Ok(false) };
        on_the_way.extend(found.on_the_way);
        site.numbers = Some(found.values);
        Ok(true)
    }

    /// Is a pair that no stream vouches for none after all?
    fn is_none(&mut self, code: &Code<'_>, at: usize, pair: &mut Found) -> Result<bool, ProofError> {
        self.spend(VOTE)?;
        if pair.ambiguous {
            if is_inside_another(code, at) {
                return Ok(true);
            }
            pair.numbers = number_before(code, at).map(|number| BTreeSet::from([number]));
        }
        // A number right before it weighs more: exit and sigreturn never run what follows.
        Ok(pair.numbers.is_none() && number_before(code, at).is_none() && faults_behind(code, at))
    }

    /// Does a known start lie among these instructions, other than the first of the run? Callers come in there.
    fn is_entered(&self, on_the_way: &BTreeSet<u64>, first: u64) -> bool {
        on_the_way.iter().any(|address| *address != first && self.starts.is_known(*address))
    }
}

/// The register that says what a call is about, if all numbers are of one that has many faces.
fn request_register(numbers: &BTreeSet<u32>) -> Option<Register> {
    match (numbers.contains(&IOCTL), numbers.contains(&PRCTL)) {
        (true, false) => Some(Register::RSI),
        (false, true) => Some(Register::RDI),
        _ => None,
    }
}

/// Is the instruction before this one `mov eax, imm32`? Code that nobody vouches for must be as plain as that.
fn is_tight(run: &Run, index: usize) -> bool {
    let before = index.checked_sub(1).and_then(|before| run.code.get(before));
    before.is_some_and(|before| {
        before.mnemonic() == Mnemonic::Mov && before.op0_register() == Register::EAX && before.len() == 5
    })
}

/// The number that the bytes before a pair load.
fn number_before(code: &Code<'_>, at: usize) -> Option<u32> {
    let before = at.checked_sub(5).and_then(|from| code.bytes.get(from..at));
    match before {
        Some([0xb8, number, more, 0, 0]) if *more < 4 => Some(u32::from_le_bytes([*number, *more, 0, 0])),
        _ => None,
    }
}

/// Looks for branches into dropped operands, and into the way from a number to its site.
fn enter(parts: &[Code<'_>], starts: &Starts, settled: &mut [Settled]) {
    let mut targets = Targets::default();
    for (index, settled) in settled.iter().enumerate() {
        match settled {
            Settled::Operand { within: Some(within), .. } => targets.add(within.ip() + 1, within.next_ip(), index),
            Settled::Operand { within: None, .. } => {}
            Settled::Site { on_the_way, .. } => {
                on_the_way.iter().for_each(|address| targets.add(*address, address + 1, index));
            }
        }
    }
    branches_to(parts, starts, targets, |branch| {
        let Some(settled) = settled.get_mut(branch.index) else { return };
        match settled {
            Settled::Site { found, followed, .. } => {
                if !followed.contains(&branch.from) {
                    found.numbers = None;
                    found.requests = None;
                }
            }
            Settled::Operand { pair, within: Some(_) } => {
                let part = parts.iter().find(|part| part.address <= pair.address && pair.address < part.end());
                if part.is_some_and(|part| is_reached(part, pair.address, branch.target)) {
                    let found = Found { ambiguous: true, ..pair.clone() };
                    *settled = Settled::Site { found, on_the_way: BTreeSet::new(), followed: BTreeSet::new() };
                }
            }
            Settled::Operand { within: None, .. } => {}
        }
    });
}

/// Does decoding from `target` on come to an instruction at `address`?
fn is_reached(code: &Code<'_>, address: u64, target: u64) -> bool {
    let run = Run::decode_between(code, target, address + 16);
    matches!(run.place(address), Place::Starts(_))
}

#[cfg(test)]
#[path = "scan/tests.rs"]
mod tests;
