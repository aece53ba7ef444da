//! How far estimates from a part of the pages are off, on made-up hosts of two million pages whose duplicates are
//! known: `cargo run --release -p pagefold-page --example unseen`.
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use pagefold_page::unseen::{HashSubset, Sample};

#[path = "../tests/populations/mod.rs"]
mod populations;

use populations::{Dice, Population, populations};

const RUNS: u64 = 5;

fn page_sample(population: &Population, p: f64) {
    let (pages, truth) = (population.pages(), population.duplicates());
    let points = |value: f64| 100.0 * value / pages as f64;
    let (mut naive, mut error, mut width, mut inside) = (0.0, 0.0, 0.0, 0);
    let mut slowest = Duration::ZERO;
    for seed in 0..RUNS {
        let times = population.sample(p, &mut Dice(seed));
        let sample = Sample::of_contents(pages, times).expect("no more than there are");
        let start = Instant::now();
        let found = sample.estimate().duplicates;
        slowest = slowest.max(start.elapsed());
        let seen = (sample.sampled() - sample.contents()) as f64 / sample.sampled() as f64;
        naive += points((seen * pages as f64 - truth as f64).abs()) / RUNS as f64;
        error += points(found.likely.abs_diff(truth) as f64) / RUNS as f64;
        width += points((found.high - found.low) as f64) / 2.0 / RUNS as f64;
        inside += u64::from(found.contains(truth));
    }
    println!(
        "| {} | {:.1} % | {} % | {naive:.2} | {error:.2} | {width:.2} | {inside} of {RUNS} | {} ms |",
        population.name,
        points(truth as f64),
        100.0 * p,
        slowest.as_millis()
    );
}

fn hash_subset(population: &Population, fraction: f64) {
    let (pages, truth) = (population.pages(), population.duplicates() as f64);
    let points = |value: f64| 100.0 * value / pages as f64;
    let (mut error, mut ratio, mut stated, mut stated_ratio) = (0.0, 0.0, 0.0, 0.0);
    for seed in 0..RUNS {
        let mut dice = Dice(seed);
        let mut subset = HashSubset::new(fraction).expect("a fraction");
        for &(size, contents) in &population.contents {
            subset.add(size, (0..contents).filter(|_| dice.lucky(fraction)).count() as u64);
        }
        let (scaled, of) = (subset.duplicates(), subset.duplicates_of(pages));
        error += points((scaled.value - truth).abs()) / RUNS as f64;
        ratio += points((of.value - truth).abs()) / RUNS as f64;
        stated += points(scaled.error) / RUNS as f64;
        stated_ratio += points(of.error) / RUNS as f64;
    }
    println!(
        "| {} | {} % | {error:.2} | {stated:.2} | {ratio:.2} | {stated_ratio:.2} |",
        population.name,
        100.0 * fraction
    );
}

fn main() {
    println!("Percentage points of all pages, mean of {RUNS} samples.\n");
    println!("| pages | duplicates | sample | off if scaled | off | half the range | true value in range | slowest |");
    println!("|---|---|---|---|---|---|---|---|");
    for population in populations() {
        for p in [0.01, 0.02, 0.05, 0.1, 0.15, 0.25, 0.5] {
            page_sample(&population, p);
        }
    }
    println!(
        "\n| pages | part of hash space | off | standard error said | off, by pages known | standard error said |"
    );
    println!("|---|---|---|---|---|---|");
    for population in populations() {
        for fraction in [0.001, 0.01, 0.1] {
            hash_subset(&population, fraction);
        }
    }
}
