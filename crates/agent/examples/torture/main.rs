//! A program that treats managed memory as badly as it can and knows at any time what every byte of it must be.
//!
//! Every location has one writer: a thread of this program, another process that writes from outside, or the kernel on
//! behalf of the one thread that asked. Whoever writes also checks, all the time and at the end. The soak test
//! (`bench soak`) runs it under `pagefold run` and kills helpers, broker and guardian meanwhile.
//!
//! `torture --seconds N --seed N --folder DIR --report FILE [--processes N]`

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr, reason = "a test program")]

mod arena;
mod fuse;
mod outside;
mod program;
mod ring;
mod work;

use std::path::PathBuf;

pub(crate) use program::{COUNTS, Dice, OVER, fail};

fn main() {
    let given = program::Arguments::of_process();
    if given.get("--poke").is_some() {
        outside::poke(given.number("--poke", 0), given.number("--address", 0), given.seed());
        return;
    }
    if let Some(folder) = given.get("--fuse") {
        fuse::serve(folder);
        return;
    }
    let folder: PathBuf = given.get("--folder").map_or_else(std::env::temp_dir, PathBuf::from);
    std::fs::create_dir_all(&folder).unwrap();
    let file = work::content_file(&folder.join(format!("content.{}", std::process::id())));
    let (content, mount) = (file.clone(), given.get("--mount").cloned());
    program::run(
        &given,
        move |seed, beat| work::run(seed, beat, &content, mount.as_deref()),
        || outside::start(given.seed()),
        |pokers| {
            let right = pokers.into_iter().fold(true, |right, mut poker| right & poker.finish());
            let _ = std::fs::remove_file(&file);
            right
        },
    )
}
