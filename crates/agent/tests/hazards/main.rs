//! What must not change for a process whose memory is merged: one test for each way in which it could.
//!
//! Every test starts a broker of its own and *victims*: this same binary, executed anew with the agent inside
//! (`VICTIM=name`). A victim merges some of its memory with equal pages, does the hazardous thing, and checks every
//! byte; the test asserts that it survived and that pages really were merged. A watchdog turns a hang into a failure.
//!
//! The letters and numbers in the tests' docs (D1, H3, D-5...) are those of the project's hazard list: D data loss,
//! C crashes, H hangs, V visible differences, with a dash: defects that an integrated prototype had.

#![allow(clippy::unwrap_used, reason = "tests")]
#![allow(missing_docs, reason = "tests")]

mod adoption;
mod advices;
mod descriptors;
mod fork_calls;
mod forks;
mod forsaken;
mod holders;
mod holes;
mod left_alone;
mod limits;
mod mappings;
mod new_code;
mod outside;
mod own;
mod places;
mod policies;
mod pressure;
mod probes;
mod process;
mod properties;
#[path = "../common/raw_fork.rs"]
mod raw_fork;
mod raw_forks;
mod remap_marks;
mod remaps;
mod restricted;
mod stack;
mod stand;
mod stops;
mod table;
mod threads;
mod victim;
mod whole;
mod writers;

use victim::Victim;

/// Everything that a victim can be.
const VICTIMS: &[&[Victim]] = &[
    adoption::VICTIMS,
    advices::VICTIMS,
    descriptors::VICTIMS,
    fork_calls::VICTIMS,
    forks::VICTIMS,
    forsaken::VICTIMS,
    holders::VICTIMS,
    holes::VICTIMS,
    left_alone::VICTIMS,
    limits::VICTIMS,
    mappings::VICTIMS,
    new_code::VICTIMS,
    outside::VICTIMS,
    own::VICTIMS,
    places::VICTIMS,
    policies::VICTIMS,
    pressure::VICTIMS,
    probes::VICTIMS,
    process::VICTIMS,
    properties::VICTIMS,
    raw_forks::VICTIMS,
    remap_marks::VICTIMS,
    remaps::VICTIMS,
    restricted::VICTIMS,
    stack::VICTIMS,
    stops::VICTIMS,
    table::VICTIMS,
    threads::VICTIMS,
    whole::VICTIMS,
    writers::VICTIMS,
];

/// Runs before `main`, on the main thread: a victim never reaches the test harness.
#[unsafe(link_section = ".init_array")]
#[used]
static BE_A_VICTIM: extern "C" fn() = be_a_victim;

extern "C" fn be_a_victim() {
    let Ok(name) = std::env::var("VICTIM") else { return };
    let Some((_, run)) = VICTIMS.iter().copied().flatten().find(|(victim, _)| *victim == name) else {
        eprintln!("there is no victim {name}");
        // SAFETY: ends the process.
        unsafe { libc::_exit(2) };
    };
    // SAFETY: a second watchdog, for when the test is killed.
    unsafe { libc::alarm(90) };
    victim::end_with(run);
}
