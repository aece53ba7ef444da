//! What a byte pair is where no unwind entry or symbol vouches for the code around it: constants, or hand-written code.

use std::collections::BTreeMap;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};

use crate::image::Code;

/// How many bytes before a pair decoding is tried from. x86 code falls into step within a few instructions.
const VOTERS: usize = 48;
/// How many instructions behind a pair are looked at for one that faults.
const AHEAD: usize = 200;

/// Is the pair at this offset part of another instruction, by the vote of all decodings that start shortly before?
///
/// In code nearly all of them agree. A direct branch to somewhere in the same code around the pair is too unlikely out of
/// step to be chance, so there half of the votes will do.
pub(crate) fn is_inside_another(code: &Code<'_>, at: usize) -> bool {
    let address = code.address + at as u64;
    let mut landed = 0;
    let mut seen: BTreeMap<u64, (usize, Instruction)> = BTreeMap::new();
    for back in 1..=VOTERS.min(at) {
        let end = (at + 16).min(code.bytes.len());
        let Some(window) = code.bytes.get(at - back..end) else { continue };
        let mut decoder = Decoder::with_ip(64, window, address - back as u64, DecoderOptions::NO_INVALID_CHECK);
        let mut last = Instruction::default();
        while decoder.ip() < address && decoder.can_decode() {
            decoder.decode_out(&mut last);
        }
        if decoder.ip() == address {
            landed += 1;
        } else {
            seen.entry(last.ip()).or_insert((0, last)).0 += 1;
        }
    }
    let around = seen.into_values().max_by_key(|(count, _)| *count).map(|(_, instruction)| instruction);
    let branches = around.is_some_and(|instruction| {
        let target = instruction.near_branch_target();
        instruction.len() >= 5 && (code.address..code.end()).contains(&target)
    });
    // Near the start of the code there are fewer voters, and none at all decide nothing.
    around.is_some() && at >= VOTERS && landed <= if branches { VOTERS / 2 } else { VOTERS / 8 }
}

/// Would running on behind the pair at this offset hit an undefined or privileged instruction before any jump away?
///
/// So it is in tables of constants. `hlt`, `ud2` and `int3` do not count: real code puts them behind calls that do not
/// return.
pub(crate) fn faults_behind(code: &Code<'_>, at: usize) -> bool {
    let window = code.bytes.get(at + 2..).unwrap_or_default();
    let mut decoder = Decoder::with_ip(64, window, 0, DecoderOptions::NONE);
    for _ in 0..AHEAD {
        if !decoder.can_decode() {
            return true;
        }
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            return true;
        }
        match instruction.mnemonic() {
            Mnemonic::Hlt | Mnemonic::Ud2 | Mnemonic::Int3 => return false,
            Mnemonic::In
            | Mnemonic::Out
            | Mnemonic::Insb
            | Mnemonic::Insd
            | Mnemonic::Outsb
            | Mnemonic::Outsd
            | Mnemonic::Cli
            | Mnemonic::Sti
            | Mnemonic::Iretd
            | Mnemonic::Iretq
            | Mnemonic::Iret
            | Mnemonic::Retf
            | Mnemonic::Int1 => return true,
            _ => {}
        }
        let leaves = matches!(
            instruction.flow_control(),
            FlowControl::UnconditionalBranch
                | FlowControl::IndirectBranch
                | FlowControl::Return
                | FlowControl::Exception
                | FlowControl::Interrupt
        );
        if leaves {
            return false;
        }
    }
    false
}
