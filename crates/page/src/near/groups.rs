//! Groups of pages whose masked contents are equal, and clusters of groups that have most blocks in common.

use super::shifted::Sketch;
use super::signature::{BLOCKS, mix, near};

/// What is kept of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// Hash of the masked page.
    pub(super) masked: u64,
    /// Hash of the page.
    pub(super) content: u64,
    /// The caller's number for it.
    pub(super) id: u64,
    /// Its process.
    pub(super) owner: u32,
    /// What it shares with pages that hold its data at other offsets.
    pub(super) sketch: Sketch,
    /// Signatures of its blocks.
    pub(super) blocks: [u16; BLOCKS],
}
const _: () = assert!(size_of::<Record>() == 80);

/// Brings records with equal masked contents together and keeps one of those that are equal within a process.
pub(super) fn sort(records: &mut Vec<Record>) {
    records.sort_unstable_by_key(|record| (record.masked, record.content, record.owner, record.id));
    records.dedup_by_key(|record| (record.masked, record.content, record.owner));
}

/// Makes the masked contents of equal pages equal: what is an address in one process may be a number in another.
pub(super) fn unite_equal(records: &mut [Record]) {
    records.sort_unstable_by_key(|record| (record.content, record.masked));
    for equal in records.chunk_by_mut(|one, next| one.content == next.content) {
        let first = equal[0];
        equal.iter_mut().for_each(|record| {
            (record.masked, record.sketch, record.blocks) = (first.masked, first.sketch, first.blocks);
        });
    }
}

/// Contents of a group or cluster, and what equal ones would save.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Different contents.
    pub(super) contents: u64,
    /// Owner and number of different contents in it, by owner.
    pub(super) owners: Vec<(u32, u64)>,
}

impl Tally {
    /// Counts sorted records of one masked content.
    pub(super) fn of(records: &[Record]) -> Self {
        let contents = records.chunk_by(|one, next| one.content == next.content).count() as u64;
        let mut owners: Vec<u32> = records.iter().map(|record| record.owner).collect();
        owners.sort_unstable();
        let owners = owners.chunk_by(|one, next| one == next).map(|same| (same[0], same.len() as u64)).collect();
        Self { contents, owners }
    }

    /// Adds what shares no content with it.
    pub(super) fn add(&mut self, other: &Self) {
        self.contents += other.contents;
        self.owners.extend(&other.owners);
        self.owners.sort_unstable();
        self.owners.dedup_by(|next, one| {
            let same = next.0 == one.0;
            one.1 += if same { next.1 } else { 0 };
            same
        });
    }

    /// Pages saved, beyond what equal contents save already, if processes became equal to each other: what is left is as
    /// much as the process with the most contents holds.
    pub(super) fn between_processes(&self) -> u64 {
        self.contents - self.owners.iter().map(|owner| owner.1).max().unwrap_or(0)
    }

    /// Pages saved, beyond what equal contents save already, if all became equal.
    pub(super) fn altogether(&self) -> u64 {
        self.contents - 1
    }
}

/// First and last block of each band: pages that differ in four blocks at most leave one of five bands alone.
const BANDS: [(usize, usize); 5] = [(0, 3), (3, 6), (6, 9), (9, 12), (12, 16)];
/// Centres that a page is compared with for each band: bands of zeros are common.
const CENTRES: usize = 8;

/// For each signature the index of the one that it is near to, itself if it is a centre of its own. What is near is near
/// to its centre, not to something that is near to something.
pub(super) fn cluster(signatures: &[[u16; BLOCKS]]) -> Vec<u32> {
    let count = u32::try_from(signatures.len()).expect("fewer groups than fit in 256 GiB of records");
    let mut centre: Vec<u32> = (0..count).collect();
    let mut has_others = vec![false; signatures.len()];
    let mut keys: Vec<(u64, u32)> = Vec::with_capacity(signatures.len());
    for (from, to) in BANDS {
        keys.clear();
        keys.extend((0..count).map(|at| {
            let band = signatures[at as usize][from..to].iter().fold(0, |key, &block| key << 16 | u64::from(block));
            (mix(band), at)
        }));
        keys.sort_unstable();
        let mut centres: Vec<u32> = Vec::with_capacity(CENTRES);
        for run in keys.chunk_by(|one, next| one.0 == next.0).filter(|run| run.len() > 1) {
            centres.clear();
            for &(_, at) in run {
                if centre[at as usize] != at {
                    continue;
                }
                let signature = &signatures[at as usize];
                let found = centres.iter().copied().find(|&other| near(&signatures[other as usize], signature));
                match found {
                    Some(other) if !has_others[at as usize] => {
                        centre[at as usize] = other;
                        has_others[other as usize] = true;
                    }
                    _ if centres.len() < CENTRES => centres.push(at),
                    _ => {}
                }
            }
        }
    }
    centre
}
