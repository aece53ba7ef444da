#![allow(clippy::unwrap_used, reason = "tests")]
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use super::*;

fn tracefs() -> Option<Tracefs> {
    match Tracefs::open() {
        Ok(tracefs) => Some(tracefs),
        Err(error) => {
            println!("skipped: {error} (root needed)");
            None
        }
    }
}

#[test]
fn fields_are_found_with_their_sign() {
    let text = b"name: x\nID: 745\nformat:\n\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\tfield:void * mm;\toffset:8;\tsize:8;\tsigned:0;\n\tfield:char buf[];\toffset:16;\tsize:0;\tsigned:0;\n";
    let format = Format::parse(text).unwrap();
    assert_eq!(format.id, 745);
    let mut record = [0_u8; 16];
    record[4..8].copy_from_slice(&(-14_i32).to_ne_bytes());
    record[8..].copy_from_slice(&u64::MAX.to_ne_bytes());
    assert_eq!(format.field("common_pid").unwrap().signed(&record), Some(-14));
    assert_eq!(format.field("mm").unwrap().unsigned(&record), Some(u64::MAX));
    assert_eq!(format.field("mm").unwrap().unsigned(&record[..9]), None);
    assert_eq!(format.field("buf"), Some(Field { offset: 16, size: 0 }));
    assert_eq!(format.field("none"), None);
}

/// A page as the kernel writes it on a little-endian machine.
#[test]
fn a_page_is_taken_apart() {
    if cfg!(target_endian = "big") {
        return;
    }
    let header = b"\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;\n\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;\n\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;\n";
    let layout = PageLayout::parse(header).unwrap();
    assert_eq!(layout.page_size(), 4096);
    let mut words: Vec<u32> = Vec::new();
    words.extend([2 | 5 << 5, 0x11, 0x12]); // two words, 5 after the page's time
    words.extend([30 | 1 << 5, 1]); // a long time passes
    words.extend([3 << 5, 12, 0x21, 0x22]); // length in a word of its own
    words.extend([29 | 1 << 5, 8, 0, 0][..3].iter()); // given up
    words.extend([1 << 5 | 1, 0x31]);
    words.extend([31 | 7 << 5, 2]); // an absolute time
    words.extend([1, 0x41]);
    let mut page = Vec::new();
    page.extend(1000_u64.to_ne_bytes());
    // Records were lost: bits above the length.
    page.extend(((1_u64 << 31) | (words.len() as u64 * 4)).to_ne_bytes());
    words.iter().for_each(|word| page.extend(word.to_ne_bytes()));
    page.extend([0xff; 64]);
    let found: Vec<(u64, u32)> = ring::records(&page, layout)
        .map(|(time, bytes)| (time, u32::from_ne_bytes(bytes[..4].try_into().unwrap())))
        .collect();
    let later = 1005 + (1 << 27) + 1;
    assert_eq!(found, [(1005, 0x11), (later + 3, 0x21), (later + 4, 0x31), (7 + (2 << 27), 0x41)]);
    // Cut off anywhere it ends, and nothing else happens.
    for length in 0..page.len() {
        let _ = ring::records(&page[..length], layout).count();
    }
}

#[test]
fn marks_come_back_in_their_order_and_the_instance_goes() {
    let Some(tracefs) = tracefs() else { return };
    let instance = Instance::create(tracefs).unwrap();
    let name = instance.name().to_owned();
    instance.write("trace_clock", "mono").unwrap();
    instance.set_buffer(Bytes::from_kib(256)).unwrap();
    let mark = instance.format("ftrace/print").unwrap();
    let mut pipes = instance.pipes().unwrap();
    let mut marker = instance.marker().unwrap();
    for number in 0..1000 {
        marker.write_all(format!("mark {number}").as_bytes()).unwrap();
    }
    let mut records = Vec::new();
    pipes.iter_mut().for_each(|pipe| pipe.drain(&mut records).unwrap());
    records.sort_by_key(|record| record.time);
    let texts: Vec<String> = records
        .iter()
        .filter(|record| record.id() == Some(mark.id))
        .map(|record| {
            String::from_utf8_lossy(&record.bytes[mark.field("buf").unwrap().offset..])
                .trim_end_matches(['\0', '\n'])
                .to_owned()
        })
        .collect();
    assert_eq!(texts.len(), 1000, "{texts:?}");
    assert!(texts.iter().enumerate().all(|(number, text)| *text == format!("mark {number}")), "{texts:?}");
    assert_eq!(instance.lost().unwrap(), 0);
    assert!(instance.format("ksm/no_such_event").unwrap_err().is_missing());
    drop((pipes, marker));
    drop(instance);
    let tracefs = Tracefs::open().unwrap();
    assert!(tracefs.lock(&name).is_err(), "it is gone");
}

/// Seen to fail without the wait: the instance stayed, as it did once in the test above beside others' children.
#[test]
fn an_instance_goes_although_a_child_has_copies_of_its_files_for_a_moment() {
    let Some(tracefs) = tracefs() else { return };
    let instance = Instance::create(tracefs).unwrap();
    let name = instance.name().to_owned();
    let marker = instance.marker().unwrap();
    let mut child = Command::new("true");
    // SAFETY: between fork and exec this only sleeps, which is allowed there.
    unsafe {
        child.pre_exec(|| {
            std::thread::sleep(Duration::from_millis(200));
            Ok(())
        });
    }
    // Spawning returns when the program has been executed, so that another thread waits for it.
    let spawner = std::thread::spawn(move || child.status().unwrap());
    std::thread::sleep(Duration::from_millis(50));
    drop(marker);
    drop(instance);
    assert!(Tracefs::open().unwrap().lock(&name).is_err(), "it is gone");
    assert!(spawner.join().unwrap().success());
}

#[test]
fn one_whose_process_was_killed_is_removed_and_one_that_lives_is_not() {
    let (Some(tracefs), Some(other)) = (tracefs(), tracefs()) else { return };
    let living = Instance::create(other).unwrap();
    // As a kill leaves it: there, and locked by nobody.
    let dead = "pagefold-0-0";
    let _ = rustix::fs::mkdirat(&tracefs.root, Tracefs::path(dead), Mode::RWXU);
    let removed = tracefs.remove_dead().unwrap();
    assert!(removed.iter().any(|name| name == dead), "{removed:?}");
    assert!(!removed.iter().any(|name| name == living.name()));
    assert!(living.read("trace_clock").is_ok());
    assert!(tracefs.lock(dead).is_err());
}
