//! process_madvise: advice about several ranges at once.

use crate::calls::{Registers, USER_END, handle};
use crate::state::STATE;
use crate::sys::{self, PAGE, advice, errno, failed, nr};

/// Advice about several ranges, of which those of the program itself can be meant, whatever the advice (6.13). As the kernel
/// does it: all vectors are looked at first, then range after range is advised, up to the first that is refused.
#[inline(never)]
pub(crate) fn process_madvise(call: &Registers) -> i64 {
    const VECTORS_MAX: u64 = 1024;
    /// What one call takes of all vectors together: MAX_RW_COUNT.
    const BYTES_MAX: u64 = 0x7fff_f000;
    // Without a vector it is refused for what it says of the process, and does nothing. Of another process nothing can be
    // advised that matters here; the kernel knows which.
    let own = || (Registers { rdx: 0, r10: advice::DONTNEED, ..*call }).raw() == 0;
    let matters = matches!(
        call.r10 & 0xffff_ffff,
        advice::DONTNEED
            | advice::DONTNEED_LOCKED
            | advice::FREE
            | advice::GUARD_INSTALL
            | advice::MERGEABLE
            | advice::UNMERGEABLE
            | advice::REMOVE
            | advice::WIPEONFORK
            | advice::COLLAPSE
            | advice::DONTFORK
            | advice::DOFORK
            | advice::DONTDUMP
            | advice::DODUMP
    );
    if !matters
        || STATE.manages_nothing()
        || call.rdx > VECTORS_MAX
        || !own()
        || (Registers { rdx: 0, ..*call }).raw() != 0
    {
        return call.raw();
    }
    // Few are read once. More may lie in memory that the call itself throws away: then it ends there.
    let mut few = [0_u8; 16 * 16];
    let is_few = call.rdx <= 16;
    if is_few && !sys::read_own(sys::gettid(), call.rsi, &mut few[..call.rdx as usize * 16]) {
        return -errno::EFAULT;
    }
    let vector = |index: u64| {
        let mut raw = [0_u8; 16];
        if is_few {
            raw.copy_from_slice(&few[index as usize * 16..][..16]);
        } else if !sys::read_own(sys::gettid(), call.rsi.wrapping_add(index * 16), &mut raw) {
            return Err(-errno::EFAULT);
        }
        let (start, len) = raw.split_at(8);
        let value = |bytes: &[u8]| bytes.iter().rev().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
        let (start, len) = (value(start), value(len));
        if len > i64::MAX as u64 {
            return Err(-errno::EINVAL);
        }
        let end = start.checked_add(len).ok_or(-errno::EFAULT)?;
        // Where addresses end the kernel knows.
        if end > USER_END - PAGE {
            let nothing = [end, 0];
            let answer = Registers { rsi: nothing.as_ptr() as u64, rdx: 1, ..*call }.raw();
            if answer == -errno::EFAULT {
                return Err(answer);
            }
        }
        Ok((start, len))
    };
    let mut all = 0_u64;
    for index in 0..call.rdx {
        match vector(index) {
            Ok((_, len)) => all = all.saturating_add(len).min(BYTES_MAX),
            Err(error) => return error,
        }
    }
    let mut advised = 0;
    for index in 0..call.rdx {
        if advised == all {
            break;
        }
        let (start, len) = match vector(index) {
            // An empty one is looked at only where it is the first.
            Ok((_, 0)) if index > 0 => continue,
            Ok((start, len)) => (start, len.min(all - advised)),
            Err(error) => return if advised > 0 { advised as i64 } else { error },
        };
        let result = handle(&Registers { rax: nr::MADVISE, rdi: start, rsi: len, rdx: call.r10, ..*call });
        if failed(result) {
            return if advised > 0 { advised as i64 } else { result };
        }
        advised += len;
    }
    advised as i64
}
