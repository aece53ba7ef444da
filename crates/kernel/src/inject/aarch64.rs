//! aarch64: the code of a slot, and the registers.
//!
//! Run once, by hand, in an emulated machine (QEMU without hardware, Linux 6.12 of Debian, no SVE): injectors killed at
//! each step, then a hundred injections into programs in nanosleep, clock_nanosleep, futex, ppoll, epoll_pwait,
//! sigtimedwait and read, which saw nothing wrong. Signals meanwhile, seccomp, several threads and SVE were not tried,
//! nor any real processor. Tests of the encoder run everywhere.
//!
//! What is different from x86-64:
//!
//! * The kernel has already rewound an interrupted call when the thread stops, and forgotten it; so a thread's call is
//!   looked at before it is asked to stop. For a signal that arrives between the last stop and the end of tracing it is
//!   too late to end the call: it is made again behind the handler.
//! * Calls that go on by restart_syscall are known by their number: nanosleep, clock_nanosleep, futex with a time-out.
//! * A jump needs a register, but a branch reaches 128 MiB: threads whose code is further from the vDSO (programs
//!   without shared libraries) are not used.
//! * A call clears what SVE has beyond 128 bits, so where there is SVE only threads that are in a call are used.

use super::slot::CODE;

/// The registers that a system call takes or changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Changed {
    /// x0 to x5.
    pub(super) arguments: [u64; 6],
    /// x8, the number.
    pub(super) number: u64,
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

const SVC: u32 = 0xd400_0001;
const NOP: u32 = 0xd503_201f;
const BRK: u32 = 0xd420_0000;
/// Bytes up to the second call.
const AGAIN: usize = 4 * 8;
/// Bytes up to the constants.
const CONSTANTS: usize = 4 * 12;

/// `ldr xREGISTER, constant` at instruction `at`: the constant is number `constant`.
fn load(register: u32, at: usize, constant: usize) -> u32 {
    let words = (CONSTANTS + 8 * constant - 4 * at) / 4;
    0x5800_0000 | (words as u32) << 5 | register
}

/// `b to` at address `at`, if it reaches.
fn branch(at: u64, to: u64) -> Option<u32> {
    let words = to.wrapping_sub(at).cast_signed() / 4;
    let reaches = to.wrapping_sub(at).is_multiple_of(4) && (-(1 << 25)..1 << 25).contains(&words);
    reaches.then_some(0x1400_0000 | words as u32 & 0x03ff_ffff)
}

/// The code of a slot that begins at `at`. `None` if the way back is too long.
pub(super) fn encode(onward: &Onward, at: u64) -> Option<[u8; CODE]> {
    let mut code = vec![SVC];
    for register in 0..6 {
        code.push(load(register, code.len(), register as usize));
    }
    code.push(load(8, 7, 6));
    let kept = match onward.again {
        Some((argument, value)) => {
            code.extend([SVC, load(argument as u32, 9, 7)]);
            value
        }
        None => {
            code.extend([NOP, NOP]);
            0
        }
    };
    code.push(branch(at + 40, onward.to)?);
    code.push(BRK);
    let mut bytes: Vec<u8> = code.into_iter().flat_map(u32::to_le_bytes).collect();
    let constants = onward.set.arguments.into_iter().chain([onward.set.number, kept, onward.to]);
    bytes.extend(constants.flat_map(u64::to_le_bytes));
    bytes.resize(CODE, 0);
    bytes.try_into().ok()
}

/// Reads back what [`encode`] wrote; `None` for anything else.
pub(super) fn decode(code: &[u8], at: u64) -> Option<Onward> {
    let constant = |index: usize| {
        let start = CONSTANTS + 8 * index;
        Some(u64::from_le_bytes(code.get(start..start + 8)?.try_into().ok()?))
    };
    let instruction = |index: usize| Some(u32::from_le_bytes(code.get(4 * index..4 * index + 4)?.try_into().ok()?));
    let mut arguments = [0; 6];
    for (index, argument) in arguments.iter_mut().enumerate() {
        *argument = constant(index)?;
    }
    let again = if instruction(8)? == SVC {
        let argument = (instruction(9)? & 31) as usize;
        if argument >= arguments.len() {
            return None;
        }
        Some((argument, constant(7)?))
    } else {
        None
    };
    let onward = Onward { set: Changed { arguments, number: constant(6)? }, again, to: constant(8)? };
    (encode(&onward, at)? == code).then_some(onward)
}

#[cfg(target_arch = "aarch64")]
pub(super) use native::Registers;

#[cfg(target_arch = "aarch64")]
mod native {
    use std::io;

    use super::{AGAIN, Changed, Onward, SVC};
    use crate::inject::asleep::Asleep;
    use crate::inject::call::{Call, CallNumber};
    use crate::inject::refusal::Refusal;
    use crate::inject::slot::Slot;
    use crate::ptrace::Tracee;
    use crate::units::Vaddr;

    /// `struct user_pt_regs` as words: x0 to x30, sp, pc, pstate.
    const WORDS: usize = 34;
    const SP: usize = 31;
    const PC: usize = 32;
    const PSTATE: usize = 33;
    /// In pstate: 32-bit code.
    const AARCH32: u64 = 0x10;
    const EINTR: i64 = -(libc::EINTR as i64);

    /// The general registers of a stopped thread, and the call that it was in.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Registers {
        words: [u64; WORDS],
        call: Option<Call>,
        /// The kernel has rewound the call: the next instruction makes it.
        rewound: bool,
    }

    impl Registers {
        /// Reads them; `Err(refusal)` for those of a thread that no code of ours can run in. `seen`: where it was before
        /// it was asked to stop.
        pub(crate) fn read(tracee: Tracee, seen: Option<&Asleep>) -> io::Result<Result<Self, Refusal>> {
            let mut words = [0; WORDS];
            let length = tracee.register_set(libc::NT_PRSTATUS, &mut words)?;
            if length != size_of_val(&words) || words[PSTATE] & AARCH32 != 0 {
                return Ok(Err(Refusal::Other32Bit));
            }
            let mut new = Self { words, call: None, rewound: false };
            if let Some(Asleep { stack, instruction, call: Some(call), .. }) = seen
                && *stack == words[SP]
                && call.number.0.cast_unsigned() == words[8]
                && call.arguments[1..] == words[1..6]
            {
                new.rewound = *instruction == words[PC] + 4 && call.arguments[0] == words[0];
                new.call = (new.rewound || *instruction == words[PC]).then_some(*call);
            }
            if new.call.is_none() && has_sve() {
                return Ok(Err(Refusal::WideRegisters));
            }
            if new.rewound && goes_on_by_itself(call_of(&new)) {
                new.words[8] = libc::SYS_restart_syscall.cast_unsigned();
            }
            Ok(Ok(new))
        }

        pub(crate) fn write(&self, tracee: Tracee) -> io::Result<()> {
            tracee.set_register_set(libc::NT_PRSTATUS, &self.words)
        }

        pub(crate) fn instruction(&self) -> u64 {
            self.words[PC]
        }

        pub(crate) fn stack(&self) -> u64 {
            self.words[SP]
        }

        pub(crate) fn result(&self) -> i64 {
            self.words[0].cast_signed()
        }

        pub(crate) fn call(&self) -> Option<Call> {
            self.call
        }

        pub(crate) fn will_restart(&self) -> bool {
            self.rewound
        }

        /// Never: the kernel had rewound the call before the stop, as itself.
        pub(crate) fn waits_for_restart_call(&self) -> bool {
            false
        }

        pub(crate) fn was_interrupted(&self) -> bool {
            self.call.is_some() && !self.rewound && self.result() == EINTR
        }

        pub(crate) fn result_is_restart(&self) -> bool {
            matches!(self.result(), -516 | -514..=-512)
        }

        pub(crate) fn made_by(&self) -> Vaddr {
            Vaddr(if self.rewound { self.words[PC] } else { self.words[PC].wrapping_sub(4) })
        }

        pub(crate) fn is_call_instruction(bytes: &[u8]) -> bool {
            bytes == SVC.to_le_bytes()
        }

        /// Rewinds the call, as the kernel does where a call is made again.
        pub(crate) fn set_restart(&mut self) {
            if let Some(call) = self.call
                && !self.rewound
            {
                self.words[0] = call.arguments[0];
                self.words[PC] = self.words[PC].wrapping_sub(4);
                self.rewound = true;
            }
        }

        /// Nothing to be done: the kernel had rewound the call before the stop, and leaves that so at a later one.
        pub(crate) fn set_restart_behind_handler(&mut self) {}

        pub(crate) fn set_instruction(&mut self, address: u64) {
            self.words[PC] = address;
        }

        pub(crate) fn entering(&self, slot: Slot, call: &Call) -> Self {
            let mut new = *self;
            new.words[..6].copy_from_slice(&call.arguments);
            new.words[8] = call.number.0.cast_unsigned();
            new.words[PC] = slot.code().0;
            new
        }

        pub(crate) fn onward(&self) -> Onward {
            Onward { set: self.changed(), again: None, to: self.words[PC] }
        }

        pub(crate) fn onward_with(&self, argument: usize, value: u64) -> Onward {
            let mut set = self.changed();
            let call = call_of(self);
            set.arguments = call.arguments;
            set.arguments[argument] = value;
            let behind = if self.rewound { self.words[PC] + 4 } else { self.words[PC] };
            Onward { set, again: Some((argument, call.arguments[argument])), to: behind }
        }

        pub(crate) fn inside(&self, slot: Slot, onward: &Onward) -> Self {
            let mut new = *self;
            new.words[..6].copy_from_slice(&onward.set.arguments);
            new.words[8] = onward.set.number;
            new.words[PC] = slot.code().0 + AGAIN as u64;
            new.rewound = true;
            new
        }

        pub(crate) fn outside(&self, slot: Slot, onward: &Onward) -> Option<Self> {
            let (argument, value) = onward.again?;
            let here = slot.code().0 + AGAIN as u64 + if self.rewound { 0 } else { 4 };
            let mut call = self.call.filter(|_| self.words[PC] == here)?;
            call.arguments[argument] = value;
            let mut new = Self { call: Some(call), ..*self };
            if argument > 0 || self.rewound {
                new.words[argument] = value;
            }
            new.words[PC] = if self.rewound { onward.to - 4 } else { onward.to };
            Some(new)
        }

        fn changed(&self) -> Changed {
            let mut arguments = [0; 6];
            arguments.copy_from_slice(&self.words[..6]);
            Changed { arguments, number: self.words[8] }
        }
    }

    fn call_of(registers: &Registers) -> Call {
        registers.call.unwrap_or(Call { number: CallNumber(-1), arguments: [0; 6] })
    }

    /// True for calls that the kernel restarts by restart_syscall, with the rest of their time.
    fn goes_on_by_itself(call: Call) -> bool {
        const FUTEX_WAIT: u64 = 0;
        const FUTEX_WAIT_BITSET: u64 = 9;
        const TIMER_ABSTIME: u64 = 1;
        match call.number.0 {
            libc::SYS_nanosleep | libc::SYS_restart_syscall => true,
            libc::SYS_clock_nanosleep => call.arguments[1] & TIMER_ABSTIME == 0,
            libc::SYS_futex => {
                matches!(call.arguments[1] & 0x7f, FUTEX_WAIT | FUTEX_WAIT_BITSET) && call.arguments[3] != 0
            }
            _ => false,
        }
    }

    fn has_sve() -> bool {
        const HWCAP_SVE: u64 = 1 << 22;
        // SAFETY: reads a number that the kernel passed to this process.
        let capabilities = unsafe { libc::getauxval(libc::AT_HWCAP) };
        capabilities & HWCAP_SVE != 0
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn instructions_as_the_architecture_manual_has_them() {
        // ldr x0, .+44 and ldr x8, .+68, as an assembler writes them.
        assert_eq!(load(0, 1, 0), 0x5800_0160);
        assert_eq!(load(8, 7, 6), 0x5800_0228);
        assert_eq!(branch(0x1000, 0x1008), Some(0x1400_0002));
        assert_eq!(branch(0x1008, 0x1000), Some(0x17ff_fffe));
        assert_eq!(branch(0, (1 << 27) - 4), Some(0x15ff_ffff));
        assert_eq!(branch(1 << 27, 0), Some(0x1600_0000));
        assert_eq!(branch(0, 1 << 27), None);
        assert_eq!(branch(0, 6), None);
    }

    #[test]
    fn code_is_read_back_as_it_was_written() {
        let at = 0xffff_8000_0000;
        for again in [None, Some((3, 77)), Some((0, u64::MAX))] {
            let set = Changed { arguments: [1, u64::MAX, 3, 4 << 40, 5, 6], number: 22 };
            let onward = Onward { set, again, to: at - 0x10_0000 };
            let code = encode(&onward, at).unwrap();
            assert_eq!(decode(&code, at), Some(onward));
            assert_eq!(u32::from_le_bytes(code[..4].try_into().unwrap()), SVC);
            assert_eq!(code[AGAIN..AGAIN + 4] == SVC.to_le_bytes(), again.is_some());
            assert_eq!(decode(&code, at + 8), None, "another place has another branch");
        }
        let onward = Onward { set: Changed::default(), again: None, to: 4 };
        assert_eq!(encode(&onward, at), None);
        assert_eq!(decode(&[0; CODE], at), None);
    }
}
