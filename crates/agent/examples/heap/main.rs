//! A program that treats its allocator as badly as it can and knows at any time what every byte of its memory must be, with
//! everything going on that programs do: for `--scope all`, which is to let it notice nothing.
//!
//! `heap --seconds N --seed N --report FILE [--processes N]`

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, reason = "a test program")]

mod deeds;
mod heap;
mod measured;
#[path = "../torture/program.rs"]
#[allow(dead_code, reason = "the other program counts more")]
mod program;

pub(crate) use program::{COUNTS, Dice, OVER, fail};

fn main() {
    let given = program::Arguments::of_process();
    if given.get("--nothing").is_some() {
        return;
    }
    if given.get("--map").is_some() || given.get("--hold").is_some() {
        measured::run(given.number("--map", 0), given.number("--hold", 0));
        return;
    }
    if given.get("--for").is_some() {
        heap::brief(given.seed(), given.number("--for", 0));
        return;
    }
    program::run(&given, heap::run, deeds::alarm, |()| true)
}
