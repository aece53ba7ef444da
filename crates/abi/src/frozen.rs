//! Buckets for the time that pages stayed frozen: eight an octave, from 100 ns on.

/// Number of buckets; the last one holds everything longer.
pub const BUCKETS: usize = 256;

/// The bucket for a duration in nanoseconds.
#[must_use]
pub const fn bucket(nanoseconds: u64) -> usize {
    let units = nanoseconds / 100;
    if units == 0 {
        return 0;
    }
    let octave = 63 - units.leading_zeros();
    let fraction = if octave >= 3 { units >> (octave - 3) & 7 } else { (units << (3 - octave)) & 7 };
    let index = octave as usize * 8 + fraction as usize;
    if index < BUCKETS { index } else { BUCKETS - 1 }
}

/// The longest duration in nanoseconds that falls into a bucket.
#[must_use]
pub const fn upper_bound(bucket: usize) -> u64 {
    let octave = (bucket / 8) as u32;
    let fraction = (bucket % 8) as u64;
    if octave >= 3 { ((8 + fraction + 1) << (octave - 3)) * 100 } else { (((8 + fraction + 1) << octave) >> 3) * 100 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_lies_below_its_buckets_bound() {
        for shift in 0..40 {
            for extra in [0, 1, 17, 99] {
                let ns = (1_u64 << shift) + extra;
                let index = bucket(ns);
                assert!(ns < upper_bound(index) + 100 || index == BUCKETS - 1, "{ns} in {index}");
                assert!(index < BUCKETS);
            }
        }
    }
}
