//! Traps for the search, as bytes; and a comparison with a sweep over everything on this machine.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;

use iced_x86::{Decoder, DecoderOptions};
use object::Object as _;
use object::read::ReadCache;

use super::*;
use crate::headers::Headers;
use crate::image::Image;
use crate::run::enters_kernel;
use crate::text::{check_size, executable};

const BASE: u64 = 0x1000;
const RET: u8 = 0xc3;

/// One part with functions one behind the other, all with symbols.
fn find(functions: &[&[u8]]) -> Vec<Found> {
    let lengths: Vec<u64> = functions.iter().map(|function| function.len() as u64).collect();
    find_with(&functions.concat(), &lengths)
}

/// Bytes, and functions of these lengths at their beginning; what is left over has no symbol.
fn find_with(bytes: &[u8], lengths: &[u64]) -> Vec<Found> {
    let mut at = BASE;
    let mut known = Vec::new();
    for length in lengths {
        known.push((at, at + length));
        at += length;
    }
    let parts = [Code { address: BASE, file_offset: 0x400, bytes }];
    scan(&parts, || Starts::of_functions(&known)).unwrap()
}

fn numbers(found: &Found) -> Option<Vec<u32>> {
    found.numbers.as_ref().map(|numbers| numbers.iter().copied().collect())
}

#[test]
fn a_site_has_its_number_and_its_place() {
    let found = find(&[&[0x90, 0xb8, 9, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05, RET]]);
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].address, found[0].file_offset, found[0].ambiguous), (BASE + 8, 0x408, false));
    assert_eq!(numbers(&found[0]), Some(vec![9]));
}

#[test]
fn an_operand_is_dropped_unless_somebody_jumps_into_it() {
    // mov ecx, 0x0000050f; ret
    let operand = [0xb9, 0x0f, 0x05, 0, 0, RET];
    assert!(find(&[&operand]).is_empty());
    for jump in [vec![0xeb, 0xf9], vec![0xe9, 0xf6, 0xff, 0xff, 0xff], vec![0x0f, 0x84, 0xf5, 0xff, 0xff, 0xff]] {
        let found = find(&[&operand, &[jump.clone(), vec![RET]].concat()]);
        assert_eq!(found.len(), 1, "{jump:x?}");
        assert!(found[0].ambiguous && found[0].address == BASE + 1, "{found:?}");
    }
    // To its start, and behind it.
    for displacement in [0xf8, 0xfd] {
        assert!(find(&[&operand, &[0xeb, displacement, RET]]).is_empty());
    }
}

#[test]
fn the_middle_of_a_locked_instruction_is_no_trap() {
    // jmp over the prefix, as libcs have done: lock cmpxchg [rip+0x50f], ecx
    let found = find(&[&[0xeb, 1, 0xf0, 0x0f, 0xb1, 0x0d, 0x0f, 0x05, 0, 0, RET]]);
    assert!(found.is_empty(), "{found:?}");
}

#[test]
fn a_jump_from_elsewhere_past_the_number_makes_it_unknown() {
    // mov eax, 202; xor edi, edi; syscall; ret
    let site = [0xb8, 202, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05, RET];
    assert_eq!(numbers(&find(&[&site])[0]), Some(vec![202]));
    for (displacement, known) in [(0xf9_u8, false), (0xfb, false), (0xf4, true), (0xfd, true)] {
        let found = find(&[&site, &[0xeb, displacement, RET]]);
        assert_eq!(found[0].numbers.is_some(), known, "{displacement:#x}");
    }
    // A function that begins there.
    assert_eq!(numbers(&find(&[&site[..5], &site[5..]])[0]), None);
}

/// Where decoding of the run that the number was found in breaks off, its jumps were not followed.
#[test]
fn a_jump_from_behind_bytes_that_do_not_decode_counts_too() {
    // mov eax, 202; xor edi, edi; syscall; ret; and without symbol: an invalid byte, jmp to the xor
    let mut bytes = vec![0xb8, 202, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05, RET, 0x06, 0xeb, 0xf8, RET];
    assert_eq!(numbers(&find_with(&bytes, &[10])[0]), None);
    bytes[12] = 0;
    assert_eq!(numbers(&find_with(&bytes, &[10])[0]), Some(vec![202]));
}

#[test]
fn what_ioctl_is_asked_for_is_followed_too() {
    // mov esi, 0x5421; mov eax, 16; syscall; ret
    let found = find(&[&[0xbe, 0x21, 0x54, 0, 0, 0xb8, 16, 0, 0, 0, 0x0f, 0x05, RET]]);
    assert_eq!(found[0].requests, Some(BTreeSet::from([0x5421])));
    // mov eax, 16; syscall; ret
    assert_eq!(find(&[&[0xb8, 16, 0, 0, 0, 0x0f, 0x05, RET]])[0].requests, None);
}

#[test]
fn every_way_in_is_found_with_prefixes() {
    for (bytes, entry) in [
        (&[0x0f_u8, 0x05][..], Entry::Syscall),
        (&[0x48, 0x0f, 0x05], Entry::Syscall),
        (&[0x0f, 0x34], Entry::Sysenter),
        (&[0xcd, 0x80], Entry::Int80),
    ] {
        let found = find(&[&[bytes, &[RET]].concat()]);
        assert_eq!((found.len(), found[0].entry, found[0].ambiguous), (1, entry, false), "{bytes:x?}");
    }
}

#[test]
fn code_that_nobody_vouches_for_is_believed_only_as_a_plain_pair() {
    // mov edi, edi; mov eax, 39; syscall; ret: without symbol
    let plain = [0x89, 0xff, 0xb8, 39, 0, 0, 0, 0x0f, 0x05, RET];
    let found = find_with(&plain, &[]);
    assert_eq!(numbers(&found[0]), Some(vec![39]));
    let apart = [0xb8, 39, 0, 0, 0, 0x89, 0xff, 0x0f, 0x05, RET];
    assert_eq!(numbers(&find_with(&apart, &[])[0]), None);
}

#[test]
fn hostile_amounts_of_pairs_end_soon() {
    let begun = std::time::Instant::now();
    let mut refused = 0;
    for pattern in
        [&[0x0f_u8, 0x05][..], &[0xcd, 0x80], &[0x0f, 0x0f, 0x05], &[0xe9, 0x0f, 0x05, 0, 0, 0x0f, 0x05], &[0x90; 64]]
    {
        let mut bytes = pattern.repeat((4 << 20) / pattern.len());
        bytes.extend([0x0f, 0x05]);
        let parts = [Code { address: BASE, file_offset: 0, bytes: &bytes }];
        for starts in [vec![], vec![(BASE, BASE + (4 << 20))]] {
            refused += u32::from(scan(&parts, || Starts::of_functions(&starts)).is_err());
        }
    }
    assert!(refused >= 6, "{refused}");
    assert!(begun.elapsed().as_secs() < 60, "{:?}", begun.elapsed());
}

/// Decodes everything from each known start to the next, and notes what enters the kernel.
fn sweep(parts: &[Code<'_>], starts: &Starts) -> Vec<u64> {
    let mut sites = Vec::new();
    for code in parts {
        let mut at = code.address;
        while at < code.end() {
            let stop = starts.after(at).unwrap_or(u64::MAX).min(code.end());
            let Some(window) = code.slice(at, stop) else { break };
            let mut decoder = Decoder::with_ip(64, window, at, DecoderOptions::NONE);
            while decoder.can_decode() {
                let instruction = decoder.decode();
                if !instruction.is_invalid() && enters_kernel(&instruction) {
                    sites.push(instruction.next_ip() - 2);
                }
            }
            at = stop;
        }
    }
    sites
}

/// What a complete sweep finds in code that an unwind entry or a symbol vouches for, the search finds too.
#[test]
fn nothing_that_a_sweep_finds_is_missed_on_this_machine() {
    let (mut bytes, mut files, mut swept, mut tables) = (0, 0, 0, 0);
    for folder in ["/usr/lib/x86_64-linux-gnu", "/usr/bin", "/usr/sbin", "/usr/lib/gcc/x86_64-linux-gnu/12"] {
        let mut paths: Vec<PathBuf> =
            std::fs::read_dir(folder).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.sort();
        for path in paths.iter().filter(|path| path.is_file() && !path.is_symlink()) {
            let Ok(file) = std::fs::File::open(path) else { continue };
            if bytes > 96 << 20 || file.metadata().unwrap().len() > 24 << 20 {
                continue;
            }
            let cache = ReadCache::new(&file);
            let Ok(headers) = Headers::read(&cache) else { continue };
            if check_size(&cache, &headers).is_err() {
                continue;
            }
            let Ok(image) = Image::parse(&cache) else { continue };
            let parts = executable(&image, &headers, &cache).unwrap();
            let starts = image.starts(&parts);
            let found: BTreeSet<u64> =
                scan(&parts, || image.starts(&parts)).unwrap().iter().map(|found| found.address).collect();
            for address in sweep(&parts, &starts) {
                swept += 1;
                if !found.contains(&address) {
                    assert!(!starts.covers(address), "{} {address:#x} {}", path.display(), image.file.is_64());
                    tables += 1;
                }
            }
            files += 1;
            bytes += parts.iter().map(|part| part.bytes.len()).sum::<usize>();
        }
    }
    println!("{files} files, {bytes} bytes of code, {swept} sites swept, {tables} of them in constants");
    assert!(files == 0 || tables * 10 <= swept, "{tables} of {swept} swept sites were taken for constants");
}
