//! How fast the page logic is on this machine: `cargo run --release -p pagefold-page --example rates`.
#![forbid(unsafe_code)]

use std::hint::black_box;
use std::time::Instant;

use pagefold_page::{
    AgePolicy, Ages, CandidateIndex, Fingerprint, PageClass, PageId, PageNumber, PageRange, Secret, is_zero,
};

const PAGE: usize = 4096;

/// Best of five, in seconds.
fn best(mut run: impl FnMut()) -> f64 {
    (0..5)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn mix(seed: u64) -> u64 {
    let z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn bytes_per_second(name: &str, size: usize) {
    let secret = Secret::new(std::array::from_fn(|at| mix(at as u64).to_ne_bytes()[0]));
    let data: Vec<u8> = (0..size as u64 / 8).flat_map(|word| mix(word).to_ne_bytes()).collect();
    // Written, or all of it would be the one zero page of the kernel.
    let mut zeros = vec![1_u8; size];
    black_box(&mut zeros).fill(0);
    // Small buffers are gone over until as much has been read as of the large one.
    let rounds = (1 << 28) / size;
    let rate = |seconds: f64| (rounds * size) as f64 / seconds / 1e9;
    let hash = best(|| {
        for _ in 0..rounds {
            for fingerprint in secret.fingerprints(black_box(&data), PAGE) {
                black_box(fingerprint);
            }
        }
    });
    let class = best(|| {
        for _ in 0..rounds {
            black_box(&data).chunks_exact(PAGE).for_each(|page| {
                black_box(PageClass::of(page));
            });
        }
    });
    let zero = best(|| {
        for _ in 0..rounds {
            black_box(black_box(&zeros).chunks_exact(PAGE).all(is_zero));
        }
    });
    let sum = best(|| {
        for _ in 0..rounds {
            let (words, _) = black_box(&data).as_chunks::<8>();
            black_box(words.iter().fold(0_u64, |sum, word| sum.wrapping_add(u64::from_ne_bytes(*word))));
        }
    });
    let mut copy = vec![0_u8; size];
    let copied = best(|| {
        for _ in 0..rounds {
            copy.copy_from_slice(black_box(&data));
            black_box(&copy);
        }
    });
    println!(
        "{name:>6}  fingerprint {:6.1} GB/s   zero pages {:6.1}   class of data {:7.1}   (reading {:6.1}, copying {:6.1})",
        rate(hash),
        rate(zero),
        rate(class),
        rate(sum),
        rate(copied)
    );
}

fn index(pages: u64) {
    let mut index = CandidateIndex::new(pages + pages / 8);
    let fingerprint =
        |page: u64| Fingerprint::from_u128(u128::from(mix(2 * page)) << 64 | u128::from(mix(2 * page + 1)));
    let id = |page: u64| PageId::new(page + 1).expect("few pages");
    let per_page = |start: Instant| start.elapsed().as_secs_f64() / pages as f64 * 1e9;
    let start = Instant::now();
    for page in 0..pages {
        black_box(index.observe(fingerprint(page), id(page)));
    }
    let first = per_page(start);
    let start = Instant::now();
    for page in 0..pages {
        black_box(index.observe(fingerprint(page), id(page)));
    }
    let again = per_page(start);
    let batch: Vec<_> = (0..pages.min(1_000_000)).map(|page| (fingerprint(page), id(page))).collect();
    let mut sightings = Vec::with_capacity(batch.len());
    let start = Instant::now();
    index.observe_all(&batch, &mut sightings);
    let all = start.elapsed().as_secs_f64() / batch.len() as f64 * 1e9;
    let start = Instant::now();
    index.grow_older();
    let older = per_page(start);
    println!(
        "index, {pages:>9} pages: first {first:5.0} ns, again {again:5.0} ns, in batches {all:5.0} ns, ageing {older:.2} ns; {:.2} bytes a page",
        index.bytes() as f64 / index.counts().entries as f64
    );
}

fn ages(pages: u64) {
    let range = PageRange::from_count(PageNumber(0), pages);
    let mut ages = Ages::new(range, AgePolicy::default());
    let per_page = |seconds: f64| seconds / pages as f64 * 1e9;
    let tick = best(|| ages.tick());
    range.iter().for_each(|page| ages.looked(page));
    let due = best(|| {
        black_box(ages.due().count());
    });
    println!("ages, {pages} pages: a cycle {:.3} ns a page, nothing due {:.3} ns", per_page(tick), per_page(due));
}

fn main() {
    bytes_per_second("L2", 512 << 10);
    bytes_per_second("DRAM", 1 << 28);
    index(100_000);
    index(1_000_000);
    index(16_000_000);
    ages(16 << 20);
}
