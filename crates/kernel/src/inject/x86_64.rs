//! x86-64: the code of a slot, and the registers.
//!
//! The encoder is compiled and tested everywhere, the rest only where it can run.

use super::slot::CODE;

/// The registers that a system call takes or changes, in the order in which the code sets them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Changed {
    pub(super) rax: u64,
    /// rdi, rsi, rdx, r10, r8, r9.
    pub(super) arguments: [u64; 6],
    pub(super) rcx: u64,
    pub(super) r11: u64,
}

/// What the code does behind the injected call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Onward {
    /// Sets these,
    pub(super) set: Changed,
    /// makes the call for which they are, if any, and sets this one of its arguments to the value that it had,
    pub(super) again: Option<(usize, u64)>,
    /// and goes there.
    pub(super) to: u64,
}

/// `syscall`, also what the code begins with.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Where the code puts the call that goes on in the slot.
const AGAIN: usize = 2 + 9 * 10;

/// `movabs $value, %register` by the register's number.
fn set(code: &mut Vec<u8>, register: u8, value: u64) {
    code.extend([0x48 | register >> 3, 0xb8 | register & 7]);
    code.extend(value.to_le_bytes());
}

/// Numbers of rdi, rsi, rdx, r10, r8, r9.
const ARGUMENTS: [u8; 6] = [7, 6, 2, 10, 8, 9];
const RAX: u8 = 0;
const RCX: u8 = 1;
const R11: u8 = 11;

/// The code of a slot. It is the same at each address, and reaches everything.
pub(super) fn encode(onward: &Onward, _at: u64) -> Option<[u8; CODE]> {
    let mut code = Vec::with_capacity(CODE);
    code.extend(SYSCALL);
    set(&mut code, RAX, onward.set.rax);
    for (register, value) in ARGUMENTS.into_iter().zip(onward.set.arguments) {
        set(&mut code, register, value);
    }
    set(&mut code, RCX, onward.set.rcx);
    set(&mut code, R11, onward.set.r11);
    debug_assert_eq!(code.len(), AGAIN);
    if let Some((argument, value)) = onward.again {
        code.extend(SYSCALL);
        set(&mut code, ARGUMENTS[argument], value);
        // As a call at the place itself leaves it.
        set(&mut code, RCX, onward.to);
    }
    // jmp *(%rip), to the address that follows.
    code.extend([0xff, 0x25, 0, 0, 0, 0]);
    code.extend(onward.to.to_le_bytes());
    // What is never reached traps.
    code.resize(CODE, 0xcc);
    code.try_into().ok()
}

/// Reads back what [`encode`] wrote; `None` for anything else.
pub(super) fn decode(code: &[u8], at: u64) -> Option<Onward> {
    let value = |at: usize| Some(u64::from_le_bytes(code.get(at..at + 8)?.try_into().ok()?));
    let register = |index: usize| value(2 + 10 * index + 2);
    let mut arguments = [0; 6];
    for (index, argument) in arguments.iter_mut().enumerate() {
        *argument = register(1 + index)?;
    }
    let set = Changed { rax: register(0)?, arguments, rcx: register(7)?, r11: register(8)? };
    let (again, jump) = if code.get(AGAIN..AGAIN + 2)? == SYSCALL {
        let opcode = code.get(AGAIN + 2..AGAIN + 4)?;
        let number = (opcode[0] & 1) << 3 | opcode[1] & 7;
        let argument = ARGUMENTS.iter().position(|register| *register == number)?;
        (Some((argument, value(AGAIN + 4)?)), AGAIN + 22)
    } else {
        (None, AGAIN)
    };
    let onward = Onward { set, again, to: value(jump + 6)? };
    (encode(&onward, at)? == code).then_some(onward)
}

#[cfg(target_arch = "x86_64")]
pub(super) use native::Registers;

#[cfg(target_arch = "x86_64")]
mod native {
    use std::io;

    use super::{AGAIN, Changed, Onward, SYSCALL};
    use crate::inject::asleep::Asleep;
    use crate::inject::call::Call;
    use crate::inject::refusal::Refusal;
    use crate::inject::slot::Slot;
    use crate::ptrace::Tracee;
    use crate::units::Vaddr;

    /// `struct user_regs_struct` as words.
    const WORDS: usize = 27;
    const R11: usize = 6;
    const RAX: usize = 10;
    const RCX: usize = 11;
    const ORIG_RAX: usize = 15;
    const RIP: usize = 16;
    const CS: usize = 17;
    const FLAGS: usize = 18;
    const RSP: usize = 19;
    /// rdi, rsi, rdx, r10, r8, r9.
    const ARGUMENTS: [usize; 6] = [14, 13, 12, 7, 9, 8];
    const _: () = assert!(WORDS * 8 == size_of::<libc::user_regs_struct>());
    const _: () = assert!(8 * RIP == std::mem::offset_of!(libc::user_regs_struct, rip));
    const _: () = assert!(8 * ORIG_RAX == std::mem::offset_of!(libc::user_regs_struct, orig_rax));
    const _: () = assert!(8 * RSP == std::mem::offset_of!(libc::user_regs_struct, rsp));

    /// Selector of 64-bit code.
    const USER_CS: u64 = 0x33;
    const TRAP_FLAG: u64 = 0x100;

    /// What the kernel keeps in rax while it has not decided yet whether an interrupted call is made again
    /// (include/linux/errno.h); no program ever sees it.
    const ERESTARTSYS: i64 = -512;
    const ERESTARTNOINTR: i64 = -513;
    const ERESTARTNOHAND: i64 = -514;
    const ERESTART_RESTARTBLOCK: i64 = -516;
    const EINTR: i64 = -(libc::EINTR as i64);

    /// The general registers of a stopped thread.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Registers([u64; WORDS]);

    impl Registers {
        /// Reads them; `Err(refusal)` for those of a thread that no code of ours can run in. The call that it was in is in
        /// them.
        pub(crate) fn read(tracee: Tracee, _seen: Option<&Asleep>) -> io::Result<Result<Self, Refusal>> {
            let mut words = [0; WORDS];
            let length = tracee.register_set(libc::NT_PRSTATUS, &mut words)?;
            let registers = Self(words);
            Ok(if length != size_of_val(&words) || words[CS] != USER_CS {
                Err(Refusal::Other32Bit)
            } else if words[FLAGS] & TRAP_FLAG != 0 {
                Err(Refusal::TrapFlag)
            } else {
                Ok(registers)
            })
        }

        pub(crate) fn write(&self, tracee: Tracee) -> io::Result<()> {
            tracee.set_register_set(libc::NT_PRSTATUS, &self.0)
        }

        pub(crate) fn instruction(&self) -> u64 {
            self.0[RIP]
        }

        pub(crate) fn stack(&self) -> u64 {
            self.0[RSP]
        }

        /// What a call returned.
        pub(crate) fn result(&self) -> i64 {
            self.0[RAX].cast_signed()
        }

        /// The call that the thread was stopped in, if any.
        pub(crate) fn call(&self) -> Option<Call> {
            let number = self.0[ORIG_RAX].cast_signed();
            (number >= 0).then(|| Call {
                number: crate::inject::call::CallNumber(number),
                arguments: ARGUMENTS.map(|index| self.0[index]),
            })
        }

        /// True if an interrupted call is waiting for the kernel to decide.
        pub(crate) fn will_restart(&self) -> bool {
            self.call().is_some() && self.result_is_restart()
        }

        /// True if the kernel is going to make the call again as restart_syscall(2).
        pub(crate) fn waits_for_restart_call(&self) -> bool {
            self.call().is_some() && self.result() == ERESTART_RESTARTBLOCK
        }

        /// True if a call returned EINTR.
        pub(crate) fn was_interrupted(&self) -> bool {
            self.call().is_some() && self.result() == EINTR
        }

        /// True if an injected call was broken off by a signal and is to be made again.
        pub(crate) fn result_is_restart(&self) -> bool {
            matches!(self.result(), ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND | ERESTART_RESTARTBLOCK)
        }

        /// The instruction before the next, which made the call: restarting goes back by its length.
        pub(crate) fn made_by(&self) -> Vaddr {
            Vaddr(self.0[RIP].wrapping_sub(SYSCALL.len() as u64))
        }

        /// True if those bytes are the instruction of the 64-bit interface.
        pub(crate) fn is_call_instruction(bytes: &[u8]) -> bool {
            bytes == SYSCALL
        }

        /// The kernel makes the call again when it goes on, unless a handler runs: then it returns EINTR. That is what
        /// those calls do that return EINTR without being told to, were it not for the stop.
        pub(crate) fn set_restart(&mut self) {
            self.0[RAX] = ERESTARTNOHAND.cast_unsigned();
        }

        /// The same, and also behind a handler that runs first.
        pub(crate) fn set_restart_behind_handler(&mut self) {
            if self.will_restart() {
                self.0[RAX] = ERESTARTNOINTR.cast_unsigned();
            }
        }

        pub(crate) fn set_instruction(&mut self, address: u64) {
            self.0[RIP] = address;
        }

        /// The same thread about to make an injected call in a slot.
        pub(crate) fn entering(&self, slot: Slot, call: &Call) -> Self {
            let mut new = *self;
            new.0[RAX] = call.number.0.cast_unsigned();
            for (index, value) in ARGUMENTS.into_iter().zip(call.arguments) {
                new.0[index] = value;
            }
            // Not in a call: the kernel is to restart nothing.
            new.0[ORIG_RAX] = u64::MAX;
            new.0[RIP] = slot.code().0;
            new
        }

        /// What the code of a slot does to come back to here without us.
        pub(crate) fn onward(&self) -> Onward {
            let words = &self.0;
            let mut rax = words[RAX];
            let mut to = words[RIP];
            if self.will_restart() {
                to = self.made_by().0;
                rax = match self.result() {
                    ERESTART_RESTARTBLOCK => libc::SYS_restart_syscall.cast_unsigned(),
                    _ => words[ORIG_RAX],
                };
            }
            let arguments = ARGUMENTS.map(|index| words[index]);
            Onward { set: Changed { rax, arguments, rcx: words[RCX], r11: words[R11] }, again: None, to }
        }

        /// The same, where the call goes on in the slot with one argument changed.
        pub(crate) fn onward_with(&self, argument: usize, value: u64) -> Onward {
            let words = &self.0;
            let mut arguments = ARGUMENTS.map(|index| words[index]);
            arguments[argument] = value;
            let set = Changed { rax: words[ORIG_RAX], arguments, rcx: words[RCX], r11: words[R11] };
            Onward { set, again: Some((argument, words[ARGUMENTS[argument]])), to: words[RIP] }
        }

        /// The thread as if it had been interrupted in the call that goes on in the slot.
        pub(crate) fn inside(&self, slot: Slot, onward: &Onward) -> Self {
            let mut new = *self;
            new.0[RIP] = slot.code().0 + (AGAIN + SYSCALL.len()) as u64;
            for (index, value) in ARGUMENTS.into_iter().zip(onward.set.arguments) {
                new.0[index] = value;
            }
            new.0[ORIG_RAX] = onward.set.rax;
            new.set_restart();
            new
        }

        /// The thread as if it had been interrupted in the original call, if it was in the one that goes on in the slot.
        pub(crate) fn outside(&self, slot: Slot, onward: &Onward) -> Option<Self> {
            let (argument, value) = onward.again?;
            if self.0[RIP] != slot.code().0 + (AGAIN + SYSCALL.len()) as u64 || self.call().is_none() {
                return None;
            }
            let mut new = *self;
            new.0[ARGUMENTS[argument]] = value;
            new.0[RCX] = onward.to;
            new.0[RIP] = onward.to;
            Some(new)
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn sample(again: Option<(usize, u64)>) -> Onward {
        let set = Changed {
            rax: 0x1122_3344_5566_7788,
            arguments: [1, u64::MAX, 3, 4 << 40, 5, 6],
            rcx: 0x7f00_0000_1234,
            r11: 0x246,
        };
        Onward { set, again, to: 0x5555_dead_beef }
    }

    #[test]
    fn code_is_read_back_as_it_was_written() {
        for again in [None, Some((3, 77)), Some((0, 0)), Some((4, u64::MAX))] {
            let onward = sample(again);
            assert_eq!(decode(&encode(&onward, 0).unwrap(), 0), Some(onward));
        }
        assert_eq!(decode(&[0; CODE], 0), None);
        let mut other = encode(&sample(None), 0).unwrap();
        other[0] ^= 1;
        assert_eq!(decode(&other, 0), None);
    }

    #[test]
    fn an_independent_decoder_reads_the_same() {
        use iced_x86::{Code, Decoder, DecoderOptions, Mnemonic, OpKind, Register};
        for again in [None, Some((3, 77))] {
            let onward = sample(again);
            let code = encode(&onward, 0).unwrap();
            let instructions: Vec<_> = Decoder::with_ip(64, &code, 0x1000, DecoderOptions::NONE).into_iter().collect();
            let sets = |index: usize| {
                let set: &iced_x86::Instruction = &instructions[index];
                assert_eq!((set.code(), set.op1_kind()), (Code::Mov_r64_imm64, OpKind::Immediate64));
                (set.op0_register(), set.immediate64())
            };
            assert_eq!(instructions[0].mnemonic(), Mnemonic::Syscall);
            let registers = [
                Register::RAX,
                Register::RDI,
                Register::RSI,
                Register::RDX,
                Register::R10,
                Register::R8,
                Register::R9,
                Register::RCX,
                Register::R11,
            ];
            let Changed { rax, arguments: [a, b, c, d, e, f], rcx, r11 } = onward.set;
            for (index, expected) in registers.into_iter().zip([rax, a, b, c, d, e, f, rcx, r11]).enumerate() {
                assert_eq!(sets(1 + index), expected);
            }
            let mut next = 10;
            if again.is_some() {
                assert_eq!(instructions[10].mnemonic(), Mnemonic::Syscall);
                assert_eq!(sets(11), (Register::R10, 77));
                assert_eq!(sets(12), (Register::RCX, onward.to));
                next = 13;
            }
            let jump = &instructions[next];
            assert_eq!(jump.code(), Code::Jmp_rm64);
            let place = (jump.ip_rel_memory_address() - 0x1000) as usize;
            assert_eq!(u64::from_le_bytes(code[place..place + 8].try_into().unwrap()), onward.to);
        }
    }
}
