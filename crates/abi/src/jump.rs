//! How the changed code of libc and the loader leads to the gate.
//!
//! Each site becomes a jump to a trampoline of its own, and all trampolines of an object lie in one room. Where that room
//! is at the same distance from the object in every process, and each trampoline at the same place in the room, the
//! changed pages are equal in all of them: whoever launches programs makes these pages once, in a file, and the agent maps
//! them. An agent whose room is elsewhere, since something else is there, changes copies of its own.

/// How far below an object's link-time zero its trampolines lie. There the kernel maps nothing before a program has mapped
/// so much, and where it maps from below, nothing at all. Above it would be the stack that lost room to grow.
pub const DISTANCE: u64 = 1 << 30;

/// Bytes of a site that a jump replaces.
pub const JUMP: usize = 5;

/// The number that stands for `syscall()`, which makes any call.
pub const ANY: u32 = u32::MAX;

/// Bytes of the room that the trampoline of a site has, by the number of its call.
#[must_use]
pub const fn room(number: u32) -> u64 {
    const IOCTL: u32 = 16;
    const CLONE: u32 = 56;
    const FORK: u32 = 57;
    const CLONE3: u32 = 435;
    match number {
        ANY => 144,
        CLONE | FORK | CLONE3 => 80,
        IOCTL => 64,
        _ => 32,
    }
}

/// The jump from one address to another. `None` if it does not reach that far.
#[must_use]
pub fn jump(from: u64, to: u64) -> Option<[u8; JUMP]> {
    let distance = to.wrapping_sub(from.wrapping_add(JUMP as u64)).cast_signed();
    let [a, b, c, d] = i32::try_from(distance).ok()?.to_le_bytes();
    Some([0xe9, a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_counts_from_its_own_end() {
        assert_eq!(jump(0x1000, 0x1005), Some([0xe9, 0, 0, 0, 0]));
        assert_eq!(jump(0x1000, 0x1000), Some([0xe9, 0xfb, 0xff, 0xff, 0xff]));
        assert_eq!(jump(0, 0x8000_0004), Some([0xe9, 0xff, 0xff, 0xff, 0x7f]));
        assert_eq!((jump(0, 0x8000_0005), jump(1 << 46, 0)), (None, None));
    }
}
