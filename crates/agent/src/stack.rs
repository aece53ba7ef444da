//! A thread that discards the unused part of its own stack, as pools of threads do before they wait for long.
//!
//! Right below its stack pointer nothing is in use by its own account, and the call is safe. But that is where the gate's
//! frames are while it makes the call. So what ends there is discarded up to a page or two below only: the bytes in
//! between cannot be relied on by anybody, since a signal handler may overwrite them at any time.

use crate::calls::Registers;
use crate::sys::{PAGE, advice, page_up};

/// What the stubs keep of the caller's stack below its pointer (the red zone), and save above [`Registers`].
const SAVED: u64 = 128 + 2 * 8 + size_of::<Registers>() as u64;
/// More than the gate's frames take: see `a14_calls_take_little_of_the_stack`.
const FRAMES: u64 = 8192;

/// The same call without the gate's own frames. `call` lies in the stub's frame.
pub(crate) fn spare_frames(call: &Registers) -> Registers {
    spared(call, core::ptr::from_ref(call) as u64 + SAVED)
}

/// `top`: the caller's stack pointer.
fn spared(call: &Registers, top: u64) -> Registers {
    let discards = matches!(call.rdx & 0xffff_ffff, advice::DONTNEED | advice::DONTNEED_LOCKED | advice::FREE);
    let end = call.rdi.saturating_add(page_up(call.rsi));
    let keep_from = top.saturating_sub(FRAMES) & !(PAGE - 1);
    if discards && keep_from < end && end <= top {
        return Registers { rsi: keep_from.saturating_sub(call.rdi), ..*call };
    }
    *call
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_ends_right_below_the_stack_pointer_is_spared() {
        let top = 1 << 30 | 0x340;
        let length = |start: u64, len: u64, advice: u64| {
            let call = Registers { rax: 28, rdi: start, rsi: len, rdx: advice, r10: 0, r8: 0, r9: 0 };
            spared(&call, top).rsi
        };
        let stack = (1 << 30) - (1 << 20);
        assert_eq!(length(stack, 1 << 20, advice::DONTNEED), (1 << 20) - FRAMES);
        assert_eq!(length(stack, (1 << 20) - PAGE, advice::FREE), (1 << 20) - FRAMES);
        assert_eq!(length(stack, (1 << 20) - FRAMES, advice::FREE), (1 << 20) - FRAMES);
        assert_eq!(length((1 << 30) - PAGE, PAGE, advice::DONTNEED), 0, "nothing is left of it");
        assert_eq!(length(stack, (1 << 20) + PAGE, advice::DONTNEED), (1 << 20) + PAGE, "its own frames are in it");
        assert_eq!(length(stack, 1 << 20, advice::DONTFORK), 1 << 20);
        assert_eq!(length(1 << 20, 1 << 20, advice::DONTNEED), 1 << 20);
    }
}
