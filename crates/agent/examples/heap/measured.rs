//! Programs of which `bench start` wants to know what they pay.

use std::time::{Duration, Instant};

/// Maps MiB and says how many nanoseconds that took, or holds MiB until it is killed.
pub(crate) fn run(map: u64, hold: u64) {
    let len = (map.max(hold) << 20) as usize;
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let begun = Instant::now();
    // SAFETY: a place of the kernel's choice.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
    let taken = begun.elapsed();
    assert_ne!(memory, libc::MAP_FAILED);
    if map > 0 {
        println!("{}", taken.as_nanos());
        return;
    }
    for page in 0..len / 4096 {
        // SAFETY: inside the mapping made above. Every page differs from every other.
        unsafe { memory.cast::<u8>().add(page * 4096).cast::<u64>().write(page as u64 + 1) };
    }
    std::thread::sleep(Duration::from_secs(60));
}
