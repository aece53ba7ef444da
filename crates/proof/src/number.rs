//! The numbers that the code before a site puts into `eax`, found by following every path backwards.

use std::collections::BTreeSet;

use iced_x86::{FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use crate::run::{Run, enters_kernel};

/// The most steps that one value is followed for: it is set within a few, in code that compilers or people write.
const STEPS: usize = 4096;

/// What can be in a register, and where the search for it went.
pub(crate) struct Values {
    pub(crate) values: BTreeSet<u32>,
    /// Addresses of the instructions between those that set the register and the one that was asked about, that one
    /// included: control that comes to one of these from elsewhere brings another value.
    pub(crate) on_the_way: BTreeSet<u64>,
}

/// The numbers that can be in `eax` when the instruction with this index runs, or `None` when some path does not tell.
///
/// Only direct jumps, constants, copies between registers and `push imm; pop` are understood: everything else makes
/// the number unknown, which is the safe side.
pub(crate) fn numbers_at(run: &Run, site: usize) -> Option<BTreeSet<u32>> {
    values_at(run, site, Register::RAX, &mut 0).map(|found| found.values)
}

/// The same for the low half of any register, with the way; `steps` grows by what it took.
pub(crate) fn values_at(run: &Run, site: usize, register: Register, steps: &mut usize) -> Option<Values> {
    let mut values = BTreeSet::new();
    let mut on_the_way = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut work = vec![(site, register)];
    let mut factory = InstructionInfoFactory::new();
    while let Some((index, register)) = work.pop() {
        let here = run.code.get(index)?;
        on_the_way.insert(here.ip());
        let Some(before) = run.predecessors(index) else {
            // Padding between functions falls into what follows only on paper.
            if here.mnemonic() == Mnemonic::Nop && index > 0 {
                continue;
            }
            return None;
        };
        for previous in before {
            if !seen.insert((previous, register)) {
                continue;
            }
            *steps += 1;
            if seen.len() > STEPS {
                return None;
            }
            match effect(run, previous, register, &mut factory) {
                Effect::Kept => work.push((previous, register)),
                Effect::Copied(from) => work.push((previous, from)),
                Effect::Set(value) => {
                    values.insert(value);
                }
                Effect::Lost => return None,
            }
        }
    }
    (!values.is_empty()).then_some(Values { values, on_the_way })
}

enum Effect {
    Kept,
    Set(u32),
    Copied(Register),
    Lost,
}

/// What calls leave alone under the System V convention.
const PRESERVED: [Register; 6] =
    [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];

/// What one instruction does to a 64-bit register.
fn effect(run: &Run, index: usize, register: Register, factory: &mut InstructionInfoFactory) -> Effect {
    let Some(instruction) = run.code.get(index) else { return Effect::Lost };
    if enters_kernel(instruction) {
        let clobbered = matches!(register, Register::RAX | Register::RCX | Register::R11);
        return if clobbered { Effect::Lost } else { Effect::Kept };
    }
    if matches!(instruction.flow_control(), FlowControl::Call | FlowControl::IndirectCall) {
        return if PRESERVED.contains(&register) { Effect::Kept } else { Effect::Lost };
    }
    let first = instruction.op0_register();
    // A 32-bit write clears the upper half; a narrower one keeps bits of what was there.
    if instruction.op0_kind() == OpKind::Register && first.full_register() == register && first.size() >= 4 {
        match instruction.mnemonic() {
            Mnemonic::Mov if is_immediate(instruction.op1_kind()) => return Effect::Set(low_half(instruction, 1)),
            Mnemonic::Mov if instruction.op1_register().is_gpr() => {
                return Effect::Copied(instruction.op1_register().full_register());
            }
            Mnemonic::Xor | Mnemonic::Sub if instruction.op1_register() == first => return Effect::Set(0),
            Mnemonic::Pop => {
                return match index.checked_sub(1).and_then(|before| run.code.get(before)) {
                    Some(push) if push.mnemonic() == Mnemonic::Push && is_immediate(push.op0_kind()) => {
                        Effect::Set(low_half(push, 0))
                    }
                    _ => Effect::Lost,
                };
            }
            _ => {}
        }
    }
    let written = factory.info(instruction).used_registers().iter().any(|used| {
        used.register().full_register() == register
            && matches!(
                used.access(),
                OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite
            )
    });
    if written { Effect::Lost } else { Effect::Kept }
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// The kernel looks at `eax` alone.
#[expect(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
fn low_half(instruction: &Instruction, operand: u32) -> u32 {
    instruction.immediate(operand) as u32
}
