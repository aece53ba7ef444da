//! Made-up hosts whose duplicates are known, and samples of them.

/// A sequence of 64-bit numbers that look random (splitmix64), the same for the same seed.
#[derive(Debug)]
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    /// The next number.
    pub(crate) fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// True with probability `p`.
    pub(crate) fn lucky(&mut self, p: f64) -> bool {
        ((self.roll() >> 11) as f64) < p * (1_u64 << 53) as f64
    }
}

/// Contents of a host: so many of each size in pages.
#[derive(Debug)]
pub(crate) struct Population {
    /// What it is like.
    pub(crate) name: &'static str,
    /// Pages of a content, and how many contents have so many.
    pub(crate) contents: Vec<(u64, u64)>,
}

impl Population {
    /// Pages of all contents.
    pub(crate) fn pages(&self) -> u64 {
        self.contents.iter().map(|(size, contents)| size * contents).sum()
    }

    /// Distinct contents.
    pub(crate) fn distinct(&self) -> u64 {
        self.contents.iter().map(|(_, contents)| contents).sum()
    }

    /// Copies beyond the first.
    pub(crate) fn duplicates(&self) -> u64 {
        self.pages() - self.distinct()
    }

    /// How often each content that is in a sample was seen, when each page is in it with probability `p`.
    pub(crate) fn sample(&self, p: f64, dice: &mut Dice) -> Vec<u64> {
        let sizes = self.contents.iter().flat_map(|&(size, contents)| std::iter::repeat_n(size, contents as usize));
        sizes.map(|size| (0..size).filter(|_| dice.lucky(p)).count() as u64).filter(|&times| times > 0).collect()
    }
}

/// Two million pages each: what hosts look like that have much, and little, to merge.
pub(crate) fn populations() -> Vec<Population> {
    let mut workers = vec![(1, 1_330_000), (36, 17_500), (400, 12), (3_000, 2)];
    // Pages that some workers have changed: the others still share them.
    workers.extend((2..36).map(|size| (size, 20)));
    let mut desktop = vec![(1, 1_580_000), (2, 160_000), (3, 8_000), (4, 5_000)];
    // The tail of a power law.
    desktop.extend((5_u64..200).map(|size| (size, 120_000 / size.pow(3))));
    desktop.push((5_000, 2));
    vec![
        Population { name: "36 forked workers", contents: workers },
        Population {
            name: "8 clones of a guest",
            contents: vec![(1, 690_000), (2, 20_000), (5, 4_000), (8, 145_000), (16, 1_000), (50, 300), (900, 60)],
        },
        Population { name: "desktop, many pairs", contents: desktop },
        Population { name: "two clones", contents: vec![(1, 740_000), (2, 600_000), (4, 10_000), (30, 667)] },
    ]
}
