//! Whether so many threads want the machine's CPUs that merging had better rest: whoever runs into a frozen page there waits
//! for its turn afterwards, as after every sleep.

use std::fs;

use kernel::status;

/// The limit, for this machine.
#[derive(Debug)]
pub(crate) struct Crowd {
    most: u64,
}

impl Crowd {
    /// More than `for_each_cpu` threads that want a CPU are a crowd, for each that the machine has online: this process may
    /// be bound to a few of them, but the kernel counts on all.
    pub(crate) fn of_more_than(for_each_cpu: u64) -> Self {
        let here = || std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
        let online = fs::read_to_string("/sys/devices/system/cpu/online").ok().and_then(|list| length(list.trim()));
        Self { most: online.unwrap_or_else(here).saturating_mul(for_each_cpu) }
    }

    /// True if it is crowded now, `own` threads of ours not counted. Not where the kernel does not tell.
    pub(crate) fn is_there(&self, own: u64) -> bool {
        status::run_queue().is_ok_and(|queue| queue.runnable.saturating_sub(own) > self.most)
    }
}

/// How many numbers a list names: `0-3,8,10-11`.
fn length(list: &str) -> Option<u64> {
    list.split(',').try_fold(0, |sum, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        Some(sum + last.checked_sub(first)? + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus() {
        assert_eq!(length("0"), Some(1));
        assert_eq!(length("0-1"), Some(2));
        assert_eq!(length("0-3,8,10-11"), Some(7));
        assert_eq!((length(""), length("3-1"), length("0-x")), (None, None, None));
    }

    #[test]
    fn own_threads_are_no_crowd() {
        assert!(!Crowd { most: 0 }.is_there(u64::MAX));
        // Whoever asks has a CPU.
        assert!(Crowd { most: 0 }.is_there(0));
        assert!(!Crowd::of_more_than(u64::MAX).is_there(0));
    }
}
