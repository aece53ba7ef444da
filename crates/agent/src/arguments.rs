//! Whether a constructor was passed the program's arguments: glibc's loader does so, musl's passes nothing, and then they
//! are what happened to be in the registers.

use crate::sys::is_readable;

/// More words than the kernel takes: it has 6 MiB for arguments and environment together (fs/exec.c).
const MOST: i32 = 1 << 20;

/// True if these are the arguments and the environment as the kernel puts them on the first stack: the environment lies
/// behind the arguments and the null pointer that ends them. Nothing is read before the kernel
/// has been asked whether it is there.
#[must_use]
pub fn are_passed(count: i32, arguments: u64, environment: u64) -> bool {
    if !(1..=MOST).contains(&count) || !arguments.is_multiple_of(8) {
        return false;
    }
    let Some(end) = arguments.checked_add(8 * count as u64) else { return false };
    // SAFETY: a word that is there, and this is the only thread.
    end.checked_add(8) == Some(environment) && is_readable(end) && unsafe { (end as *const u64).read() } == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_as_the_kernel_puts_it_is_not_believed() {
        let words = [1_u64, 2, 0, 3, 0];
        let at = words.as_ptr() as u64;
        assert!(are_passed(2, at, at + 24));
        assert!(!are_passed(1, at, at + 16), "no null pointer");
        assert!(!are_passed(2, at, at + 16) && !are_passed(2, at, 0));
        assert!(!are_passed(0, at + 16, at + 24) && !are_passed(-1, at + 24, at + 24));
        assert!(!are_passed(2, 8, 32) && !are_passed(1, u64::MAX - 15, 0), "nothing is there");
        assert!(!are_passed(MOST + 1, 8, 8 * (MOST as u64 + 3)));
    }
}
