//! What cannot be done, and is said so: too many ranges, and a process that leaves while others merge.
#![allow(clippy::unwrap_used, reason = "tests")]

mod members;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use members::{Memory, in_child, live_here};
use pagefold::{Error, Flags, Partition};

#[test]
fn the_number_of_ranges_has_its_own_error() {
    if !live_here() {
        return;
    }
    in_child("body_the_number_of_ranges_has_its_own_error");
}

/// Seen to fail: it said that the helper could not be started.
#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_the_number_of_ranges_has_its_own_error() {
    let partition = Partition::open("test", Flags::default()).unwrap();
    let memory = Memory::filled(300, 1);
    let page = |index: u64| {
        let start = pagefold::Vaddr(memory.range().start().get() + 2 * index * pagefold::page_size());
        pagefold::Range::new(start, pagefold::Vaddr(start.get() + pagefold::page_size())).unwrap()
    };
    let held: Vec<_> = (0..128).map(page).collect();
    partition.merge_all(&held).unwrap();
    let error = partition.merge(page(128)).unwrap_err();
    assert!(matches!(error, Error::TooManyRanges { range } if range == page(128)), "{error}");
    // One that is held already needs no room, and one that is given back makes some.
    partition.merge(page(7)).unwrap();
    partition.unmerge(page(7)).unwrap();
    partition.merge(page(128)).unwrap();
    partition.leave().unwrap();
}

#[test]
fn others_merge_while_one_leaves() {
    if !live_here() {
        return;
    }
    in_child("body_others_merge_while_one_leaves");
}

/// Seen to fail: whoever had asked when the helper left was told that the broker refused it, after 5 s.
#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_others_merge_while_one_leaves() {
    let partition = Partition::open("test", Flags::default()).unwrap();
    let all: Vec<Memory> = (0..8).map(|_| Memory::filled(64, 1)).collect();
    let digest = all[0].digest();
    let over = AtomicBool::new(false);
    let longest = std::thread::scope(|scope| {
        let merges = |memory: &Memory| {
            let mut longest = Duration::ZERO;
            while !over.load(SeqCst) {
                let begun = Instant::now();
                match partition.merge(memory.range()) {
                    // Somebody left twice.
                    Ok(_) | Err(Error::HelperGone) => {}
                    Err(error) => panic!("{error}"),
                }
                longest = longest.max(begun.elapsed());
            }
            longest
        };
        let threads: Vec<_> = all.iter().map(|memory| scope.spawn(move || merges(memory))).collect();
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(300));
            partition.leave().unwrap();
        }
        over.store(true, SeqCst);
        threads.into_iter().map(|thread| thread.join().unwrap()).max().unwrap()
    });
    assert!(longest < Duration::from_secs(4), "{longest:?}");
    assert!(all.iter().all(|memory| memory.digest() == digest));
    partition.leave().unwrap();
    assert!(all.iter().all(|memory| memory.pages_in_store() == 0));
}
