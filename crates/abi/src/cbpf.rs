//! Classic BPF as far as seccomp takes it (seccomp_check_filter in kernel/seccomp.c): what a filter would say to a call.

/// One instruction (`struct sock_filter`).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    /// What it does.
    pub code: u16,
    /// Instructions that are left out if a comparison holds.
    pub if_true: u8,
    /// The same if it does not.
    pub if_false: u8,
    /// A constant, an offset or a distance.
    pub k: u32,
}

/// Runs a filter. `fetch`: its instruction of that number; `word`: the word at that offset of `struct seccomp_data`. `None`
/// for a program that the kernel would not have taken.
pub fn run(fetch: impl Fn(usize) -> Option<Instruction>, word: impl Fn(u32) -> Option<u32>) -> Option<u32> {
    let (mut accumulator, mut index) = (0_u32, 0_u32);
    let mut scratch = [0_u32; 16];
    let mut at = 0_usize;
    loop {
        let Instruction { code, if_true, if_false, k } = fetch(at)?;
        at += 1;
        let operand = if code & 8 == 0 { k } else { index };
        match (code & 7, code) {
            // Loads: the data by absolute offset, its length, a constant, scratch memory.
            (0, 0x20) => accumulator = word(k)?,
            (0, 0x80) => accumulator = 64,
            (0, 0x00) => accumulator = k,
            (0, 0x60) => accumulator = *scratch.get(k as usize)?,
            (1, 0x81) => index = 64,
            (1, 0x01) => index = k,
            (1, 0x61) => index = *scratch.get(k as usize)?,
            (2, 0x02) => *scratch.get_mut(k as usize)? = accumulator,
            (3, 0x03) => *scratch.get_mut(k as usize)? = index,
            (4, _) => {
                accumulator = match code & 0xf0 {
                    0x00 => accumulator.wrapping_add(operand),
                    0x10 => accumulator.wrapping_sub(operand),
                    0x20 => accumulator.wrapping_mul(operand),
                    // By zero the program ends with 0, which kills.
                    0x30 => match accumulator.checked_div(operand) {
                        Some(quotient) => quotient,
                        None => return Some(0),
                    },
                    0x40 => accumulator | operand,
                    0x50 => accumulator & operand,
                    0x60 => accumulator.wrapping_shl(operand),
                    0x70 => accumulator.wrapping_shr(operand),
                    0x80 => accumulator.wrapping_neg(),
                    0xa0 => accumulator ^ operand,
                    _ => return None,
                }
            }
            (5, 0x05) => at = at.checked_add(k as usize)?,
            (5, _) => {
                let holds = match code & 0xf0 {
                    0x10 => accumulator == operand,
                    0x20 => accumulator > operand,
                    0x30 => accumulator >= operand,
                    0x40 => accumulator & operand != 0,
                    _ => return None,
                };
                at += usize::from(if holds { if_true } else { if_false });
            }
            (6, 0x06) => return Some(k),
            (6, 0x16) => return Some(accumulator),
            (7, 0x07) => index = accumulator,
            (7, 0x87) => accumulator = index,
            _ => return None,
        }
    }
}
