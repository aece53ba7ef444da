//! Where a sleeping thread is: /proc/TID/syscall.

use super::call::{Call, CallNumber};
use crate::current_call::{self, CurrentCall};
use crate::procfs;
use crate::units::Pid;

/// A sleeping thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asleep {
    /// The call that it is in, unless it waits for a page.
    pub(super) call: Option<Call>,
    /// Its stack pointer.
    pub(super) stack: u64,
    /// Its next instruction, behind the one that made the call.
    pub(super) instruction: u64,
    /// How often it has been switched away from: two looks that are equal are of one sleep.
    pub(super) switches: u64,
}

impl Asleep {
    /// `None` if it runs.
    pub(super) fn look(tid: Pid) -> Option<Self> {
        let mut buffer = Vec::new();
        procfs::read_into(tid, "status", &mut buffer).ok()?;
        let fields = procfs::lines(&buffer).filter_map(procfs::field);
        let counts = fields.filter(|(key, _)| key.ends_with(b"_ctxt_switches"));
        let switches = counts.filter_map(|(_, value)| procfs::decimal(value)).sum();
        procfs::read_into(tid, "syscall", &mut buffer).ok()?;
        let (call, stack, instruction) = parse(&buffer)?;
        Some(Self { call, stack, instruction, switches })
    }

    /// The call alone.
    pub(super) fn call(tid: Pid) -> Option<Call> {
        let mut buffer = Vec::new();
        procfs::read_into(tid, "syscall", &mut buffer).ok()?;
        parse(&buffer)?.0
    }
}

/// `NUMBER SIX-ARGUMENTS STACK INSTRUCTION`, `-1 STACK INSTRUCTION`, or `running`.
fn parse(line: &[u8]) -> Option<(Option<Call>, u64, u64)> {
    let number = match current_call::parse(line)? {
        CurrentCall::Running => return None,
        CurrentCall::Outside => None,
        CurrentCall::Sleeping(number) => Some(number),
    };
    let words = procfs::words(line).skip(1);
    let rest: Vec<u64> = words.filter_map(|word| procfs::hexadecimal(word.strip_prefix(b"0x")?)).collect();
    let [ref arguments @ .., stack, instruction] = *rest else { return None };
    let arguments = <[u64; 6]>::try_from(arguments).ok();
    let call = number.zip(arguments).map(|(number, arguments)| Call { number: CallNumber(number), arguments });
    Some((call, stack, instruction))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_three_forms() {
        let call = Call { number: CallNumber(202), arguments: [1, 2, 3, 4, 5, 0xff] };
        let line = b"202 0x1 0x2 0x3 0x4 0x5 0xff 0x7ffc 0x7f01\n";
        assert_eq!(parse(line), Some((Some(call), 0x7ffc, 0x7f01)));
        assert_eq!(parse(b"-1 0x7ffc 0x7f01\n"), Some((None, 0x7ffc, 0x7f01)));
        assert_eq!(parse(b"running\n"), None);
        assert_eq!(parse(b""), None);
    }
}
