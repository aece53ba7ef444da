//! The instructions from one known start up to the next.

use std::collections::BTreeMap;

use iced_x86::{Code as Encoding, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};

use crate::image::Code;
use crate::starts::Starts;

/// Decoding never runs longer than this from one start; the longest function of a libc has some 20 KiB.
const LONGEST: u64 = 1 << 20;

/// What a decoded run says about one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The instruction with this index starts there.
    Starts(usize),
    /// Some instruction holds the byte in its middle.
    Inside,
    /// The run broke off before, at bytes that are no instruction.
    Broken,
}

/// A stretch of code in the order in which the processor would decode it.
pub(crate) struct Run {
    pub(crate) code: Vec<Instruction>,
    /// Address of the first instruction.
    pub(crate) entry: u64,
    /// Address behind the last instruction.
    end: u64,
    /// Where decoding was to end: a known start, or the end of the section.
    stop: u64,
    /// Direct jumps of this run: target, indices of the jumps.
    jumps: BTreeMap<u64, Vec<usize>>,
    /// Nothing invalid was met up to the next known start, and the run ends exactly there.
    pub(crate) whole: bool,
}

impl Run {
    /// Decodes from `start` to the first known start behind `past`.
    pub(crate) fn decode(code: &Code<'_>, starts: &Starts, start: u64, past: u64) -> Self {
        Self::decode_between(code, start, starts.after(past).unwrap_or(u64::MAX))
    }

    /// Decodes from `start` to `stop`, or to the end of the section.
    pub(crate) fn decode_between(code: &Code<'_>, start: u64, stop: u64) -> Self {
        let stop = stop.min(code.end()).min(start + LONGEST);
        let window = code.slice(start, stop).unwrap_or_default();
        let mut run = Self { code: Vec::new(), entry: start, end: start, stop, jumps: BTreeMap::new(), whole: true };
        let mut decoder = Decoder::with_ip(64, window, start, DecoderOptions::NONE);
        while decoder.can_decode() {
            let instruction = decoder.decode();
            if instruction.is_invalid() {
                run.whole = false;
                break;
            }
            if is_direct_jump(&instruction) {
                run.jumps.entry(instruction.near_branch_target()).or_default().push(run.code.len());
            }
            run.end = instruction.next_ip();
            run.code.push(instruction);
        }
        run
    }

    /// Has decoding gone as far as this address, or would have but for a broken instruction?
    pub(crate) fn reaches(&self, address: u64) -> bool {
        address < self.stop
    }

    pub(crate) fn place(&self, address: u64) -> Place {
        if address >= self.end {
            return Place::Broken;
        }
        match self.code.binary_search_by_key(&address, Instruction::ip) {
            Ok(index) => Place::Starts(index),
            // A prefix makes the instruction start before the two bytes that were searched for.
            Err(after) => match after.checked_sub(1).and_then(|index| Some((index, self.code.get(index)?))) {
                Some((index, instruction)) if enters_kernel(instruction) => Place::Starts(index),
                _ => Place::Inside,
            },
        }
    }

    /// Addresses of the last bytes of the direct jumps of this run to an address.
    pub(crate) fn jumps_to(&self, address: u64) -> impl Iterator<Item = u64> {
        let jumps = self.jumps.get(&address).map_or(&[][..], Vec::as_slice);
        jumps.iter().filter_map(|index| self.code.get(*index)).map(|jump| jump.next_ip() - 1)
    }

    /// The instructions that control can come from, or `None` where it comes from outside this run.
    pub(crate) fn predecessors(&self, index: usize) -> Option<Vec<usize>> {
        let here = self.code.get(index)?;
        if here.ip() == self.entry {
            return None;
        }
        let mut before = self.jumps.get(&here.ip()).cloned().unwrap_or_default();
        let previous = index.checked_sub(1)?;
        if self.code.get(previous).is_some_and(falls_through) {
            before.push(previous);
        }
        // Nothing jumps or falls here: reached through a table, or from another run.
        (!before.is_empty()).then_some(before)
    }
}

/// A direct jump or call to this address.
pub(crate) fn is_branch_to(instruction: &Instruction, target: u64) -> bool {
    let direct = is_direct_jump(instruction)
        || (instruction.flow_control() == FlowControl::Call && !enters_kernel(instruction))
        || instruction.flow_control() == FlowControl::XbeginXabortXend;
    direct && instruction.near_branch_target() == target
}

/// `jmp`, `jcc`, `loop` and the like with the target in the instruction.
fn is_direct_jump(instruction: &Instruction) -> bool {
    matches!(instruction.flow_control(), FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch)
}

/// `syscall`, `sysenter` or `int 0x80`. Asked before anything else, since iced counts `syscall` among the calls.
pub(crate) fn enters_kernel(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Syscall | Mnemonic::Sysenter)
        || (instruction.code() == Encoding::Int_imm8 && instruction.immediate8() == 0x80)
}

fn falls_through(instruction: &Instruction) -> bool {
    !matches!(
        instruction.flow_control(),
        FlowControl::UnconditionalBranch | FlowControl::IndirectBranch | FlowControl::Return
    )
}
