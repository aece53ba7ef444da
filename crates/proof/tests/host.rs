//! The libc and the loader of the machine that runs the tests.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use pagefold_proof::{ObjectSites, SiteKind, encode, name, sites, takes_the_gate, verdict};

const LIBC: &str = "/lib/x86_64-linux-gnu/libc.so.6";
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";

fn object(path: &str) -> Option<ObjectSites> {
    match std::fs::read(path) {
        Ok(elf) => Some(sites(&elf).unwrap()),
        Err(error) => {
            println!("skipped: {path}: {error}");
            None
        }
    }
}

fn counts(object: &ObjectSites) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for site in &object.sites {
        let name = match site.kind {
            SiteKind::Number(number) => name(number).unwrap().to_owned(),
            SiteKind::Generic => "any".to_owned(),
        };
        *counts.entry(name).or_default() += 1;
    }
    counts
}

/// Is this the build that the expected numbers were taken from by hand?
fn is_glibc_2_36(elf: &str) -> bool {
    std::fs::read(elf).is_ok_and(|bytes| String::from_utf8_lossy(&bytes).contains("(Debian GLIBC 2.36-"))
}

#[test]
fn libc_is_understood() {
    let Some(libc) = object(LIBC) else { return };
    assert_eq!(libc.soname.as_deref(), Some("libc.so.6"));
    assert!(libc.build_id.is_some());
    verdict(&libc).unwrap();
    if !is_glibc_2_36(LIBC) {
        println!("skipped: the exact list is known for glibc 2.36 only");
        return;
    }
    let expected = [
        ("any", 1),
        ("brk", 1),
        ("ioctl", 1),
        ("clone", 2),
        ("clone3", 1),
        ("execve", 1),
        ("execveat", 2),
        ("madvise", 2),
        ("mlock", 2),
        ("mlock2", 1),
        ("mlockall", 1),
        ("mmap", 1),
        ("mprotect", 1),
        ("mremap", 1),
        ("munlock", 1),
        ("munlockall", 1),
        ("munmap", 1),
        ("pkey_mprotect", 1),
        ("prctl", 1),
        ("process_madvise", 1),
        ("remap_file_pages", 1),
        ("shmat", 1),
        ("shmdt", 1),
    ];
    let found = counts(&libc);
    assert_eq!(found, expected.into_iter().map(|(name, sites)| (name.to_owned(), sites)).collect());
}

#[test]
fn the_loader_is_understood() {
    let Some(loader) = object(LOADER) else { return };
    verdict(&loader).unwrap();
    if is_glibc_2_36(LIBC) {
        let expected = ["brk", "execve", "mmap", "mprotect", "munmap"].map(|name| (name.to_owned(), 1));
        assert_eq!(counts(&loader), expected.into_iter().collect());
    }
}

/// `objdump` decodes the whole file in another way; every `syscall` of the wanted numbers that it shows right behind a
/// constant must be a site, and every site must be such a pair.
#[test]
fn objdump_agrees() {
    for path in [LIBC, LOADER] {
        let Some(object) = object(path) else { continue };
        let Ok(output) = Command::new("objdump").args(["-d", "--no-show-raw-insn", path]).output() else {
            println!("skipped: no objdump");
            return;
        };
        let text = String::from_utf8_lossy(&output.stdout);
        let mut shown = BTreeMap::new();
        let mut before: Option<(u64, &str)> = None;
        for line in text.lines() {
            let Some((address, instruction)) = line.split_once(":\t") else { continue };
            let Ok(address) = u64::from_str_radix(address.trim(), 16) else { continue };
            if instruction.trim() == "syscall"
                && let Some((from, load)) = before
                && from + 5 == address
            {
                let number = load.strip_prefix("mov").map(str::trim).and_then(|operands| {
                    u32::from_str_radix(operands.strip_prefix("$0x")?.strip_suffix(",%eax")?, 16).ok()
                });
                if let Some(number) = number.filter(|number| takes_the_gate(*number)) {
                    shown.insert(from, SiteKind::Number(number));
                }
                if load.contains("0x8(%rsp),%r9") {
                    shown.insert(from, SiteKind::Generic);
                }
            }
            before = Some((address, instruction));
        }
        let found: BTreeMap<_, _> = object.sites.iter().map(|site| (site.vaddr, site.kind)).collect();
        assert!(!found.is_empty());
        // objdump shows the function of each too, but the search goes by extents: compare what is left to it.
        shown.retain(|vaddr, _| !object.own_ioctls.iter().any(|own| own.vaddr == vaddr + 5));
        assert_eq!(found, shown, "{path}");
    }
}

#[test]
fn the_table_holds_every_site() {
    let (Some(libc), Some(loader)) = (object(LIBC), object(LOADER)) else { return };
    let total = libc.sites.len() + loader.sites.len();
    assert_eq!(encode([&libc, &loader]).len(), 16 + 2 * 40 + 16 * total);
}

#[test]
fn a_library_that_is_not_libc_is_no_libc() {
    let Some(libm) = object("/lib/x86_64-linux-gnu/libm.so.6") else { return };
    assert!(libm.sites.is_empty() && libm.refused.is_empty());
    assert_eq!(verdict(&libm).unwrap_err(), ["libm.so.6 is neither glibc nor its loader"]);
}

#[test]
fn a_libc_with_a_missing_or_refused_site_is_unknown() {
    let Some(libc) = object(LIBC) else { return };
    let mut without = libc.clone();
    without.sites.retain(|site| site.kind != SiteKind::Number(25));
    assert_eq!(verdict(&without).unwrap_err(), ["unknown libc: no site of mremap"]);
    let mut without = libc.clone();
    without.sites.retain(|site| site.kind != SiteKind::Generic);
    assert_eq!(verdict(&without).unwrap_err(), ["unknown libc: no site of syscall()"]);
    let mut refused = libc;
    refused.refused.push(pagefold_proof::RefusedSite {
        file_offset: 1,
        vaddr: 0x10,
        why: pagefold_proof::Why::NotContiguous { numbers: vec![9] },
    });
    assert_eq!(
        verdict(&refused).unwrap_err(),
        ["site at 0x10 cannot be patched: number not loaded right before the syscall: mmap"]
    );
}

#[test]
fn a_jump_into_a_site_spoils_a_real_libc() {
    let Some(libc) = object(LIBC) else { return };
    let mut elf = std::fs::read(LIBC).unwrap();
    let at = |number| libc.sites.iter().find(|site| site.kind == SiteKind::Number(number)).unwrap().vaddr;
    // Over the number of shmdt: a jump to the syscall of mprotect.
    let (from, target) = (at(67), at(10) + 5);
    let jump = i32::try_from(target.cast_signed() - (from + 5).cast_signed()).unwrap();
    let shift = libc.unknown[0].vaddr - libc.unknown[0].file_offset;
    let offset = usize::try_from(from - shift).unwrap();
    assert_eq!(elf[offset..offset + 5], [0xb8, 67, 0, 0, 0]);
    elf[offset] = 0xe9;
    elf[offset + 1..offset + 5].copy_from_slice(&jump.to_le_bytes());
    let spoilt = sites(&elf).unwrap();
    assert_eq!(spoilt.refused.len(), 1, "{:?}", spoilt.refused);
    assert_eq!((spoilt.refused[0].vaddr, &spoilt.refused[0].why), (target, &pagefold_proof::Why::Entered { target }));
    let reasons = verdict(&spoilt).unwrap_err();
    assert!(reasons.iter().any(|reason| reason == "unknown libc: no site of mprotect"), "{reasons:?}");
}

/// Other builds, put by hand into a folder: `PAGEFOLD_LIBCS=DIR`, one `libc.so.6` or `ld-linux-x86-64.so.2` a folder.
#[test]
fn other_builds() {
    let Some(folder) = std::env::var_os("PAGEFOLD_LIBCS").map(PathBuf::from) else {
        println!("skipped: PAGEFOLD_LIBCS is not set");
        return;
    };
    visit(&folder);
}

fn visit(folder: &Path) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            visit(&path);
        } else if path.is_file()
            && path.file_name().is_some_and(|name| name == "libc.so.6" || name == "ld-linux-x86-64.so.2")
        {
            let object = sites(&std::fs::read(&path).unwrap()).unwrap();
            println!("{}: {:?}", path.display(), counts(&object));
            for refused in &object.refused {
                println!("  refused {:#x}: {}", refused.vaddr, refused.why);
            }
            println!("  unknown {:x?}", object.unknown.iter().map(|site| site.vaddr).collect::<Vec<_>>());
            println!("  verdict {:?}", verdict(&object));
            assert!(object.refused.iter().all(|site| site.why != pagefold_proof::Why::Ambiguous));
        }
    }
}
