//! A thread that discards the unused part of its own stack, as pools of threads do before they wait for long.
//!
//! Right below its stack pointer nothing is in use by its own account, and the call is safe. But that is where the gate's
//! frames are while it makes the call. So what ends there is discarded up to the page in which they end, and what lies below
//! them in that page is cleared by hand. In the frames themselves nobody else has anything: that is the thread's own stack.

use core::arch::asm;

use crate::calls::Registers;
use crate::sys::{PAGE, advice, failed, page_up};

/// What the stubs keep of the caller's stack below its pointer (the red zone), and save above [`Registers`].
const SAVED: u64 = 128 + 2 * 8 + size_of::<Registers>() as u64;
/// More than the gate's frames take from here on: see `a14_calls_take_little_of_the_stack`.
const FRAMES: u64 = 2048;

/// Makes the call by `handle` without the gate's own frames. `call` lies in the stub's frame.
#[inline(never)]
pub(crate) fn spare_frames(call: &Registers, handle: impl FnOnce(&Registers) -> i64) -> i64 {
    let here: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rsp", out(reg) here, options(nomem, nostack, preserves_flags)) };
    let top = core::ptr::from_ref(call) as u64 + SAVED;
    let Some(spared) = Spared::of(call, here.saturating_sub(FRAMES), top) else { return handle(call) };
    let result = handle(&Registers { rsi: spared.length, ..*call });
    if !failed(result) && call.rdx & 0xffff_ffff != advice::FREE {
        for byte in spared.clear.0..spared.clear.1 {
            // SAFETY: unused stack of this thread, by its own account, in a page that the gate's frames reach or may reach;
            // below all that is in use now.
            unsafe { (byte as *mut u8).write_volatile(0) };
        }
    }
    result
}

/// How a call is made that would hit the gate's frames.
#[derive(Debug, PartialEq, Eq)]
struct Spared {
    /// Bytes from its beginning on that the kernel discards.
    length: u64,
    /// What is cleared by hand.
    clear: (u64, u64),
}

impl Spared {
    /// `live`: the lowest byte that frames may use; `top`: the caller's stack pointer. `None` for every other call.
    fn of(call: &Registers, live: u64, top: u64) -> Option<Self> {
        let discards = matches!(call.rdx & 0xffff_ffff, advice::DONTNEED | advice::DONTNEED_LOCKED | advice::FREE);
        let end = call.rdi.saturating_add(page_up(call.rsi));
        if !discards || end <= live || end > top || !call.rdi.is_multiple_of(PAGE) {
            return None;
        }
        let keep_from = (live & !(PAGE - 1)).max(call.rdi);
        Some(Self { length: keep_from - call.rdi, clear: (keep_from, live.max(keep_from)) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_ends_in_the_frames_is_spared() {
        let top = 1 << 30 | 0x340;
        let live = (1 << 30) - 0x900;
        let of = |start: u64, len: u64, advice: u64| {
            let call = Registers { rax: 28, rdi: start, rsi: len, rdx: advice, r10: 0, r8: 0, r9: 0 };
            Spared::of(&call, live, top)
        };
        let stack = (1 << 30) - (1 << 20);
        let kept = (1 << 30) - PAGE;
        let spared = Some(Spared { length: (1 << 20) - PAGE, clear: (kept, live) });
        assert_eq!(of(stack, 1 << 20, advice::DONTNEED), spared);
        assert_eq!(of(stack, 1 << 20, advice::FREE), spared);
        assert_eq!(of(kept, PAGE, advice::DONTNEED), Some(Spared { length: 0, clear: (kept, live) }));
        assert_eq!(of(stack, (1 << 20) - PAGE, advice::DONTNEED), None, "it ends below them");
        assert_eq!(of(stack, (1 << 20) + PAGE, advice::DONTNEED), None, "its own frames are in it");
        assert_eq!(of(stack, 1 << 20, advice::DONTFORK), None);
        assert_eq!(of(stack + 1, 1 << 20, advice::DONTNEED), None, "the kernel refuses it");
    }
}
