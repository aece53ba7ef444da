//! Programs made by a C compiler that enter the kernel in all the ways that people think of.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use pagefold_proof::{Facts, Judgement, Lists, Verdict, judge};
use tempfile::TempDir;

/// `None` (and said so) where there is no compiler.
fn compiled(folder: &TempDir, name: &str, source: &str, words: &[&str]) -> Option<PathBuf> {
    static THERE: OnceLock<bool> = OnceLock::new();
    if !*THERE.get_or_init(|| Command::new("gcc").arg("--version").output().is_ok()) {
        println!("skipped: no gcc");
        return None;
    }
    let path = folder.path().join(name);
    let text = folder.path().join(format!("{name}.c"));
    fs::write(&text, source).unwrap();
    let mut gcc = Command::new("gcc");
    let done =
        gcc.args(["-O1", "-shared", "-fPIC", "-nostdlib", "-o"]).arg(&path).arg(&text).args(words).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    Some(path)
}

fn facts(path: &Path) -> Facts {
    Facts::of(&File::open(path).unwrap())
}

fn judged(path: &Path) -> Judgement {
    judge(&facts(path), path.file_name().unwrap().to_str().unwrap(), "prog", &Lists::default())
}

/// Compiles the body of a function, and judges the library with its symbols and without.
fn of_body(body: &str) -> Option<Judgement> {
    let source = format!("long inner(long a, long b) {{ long r = 0; {body} return r; }}");
    of_source(&source)
}

fn of_source(source: &str) -> Option<Judgement> {
    let folder = TempDir::new().unwrap();
    let path = compiled(&folder, "x.so", source, &[])?;
    let with = judged(&path);
    let done = Command::new("strip").arg(&path).status();
    if done.is_ok_and(|status| status.success()) {
        assert_eq!(judged(&path).verdict, with.verdict, "stripped: {:?}", judged(&path));
    }
    Some(with)
}

fn call(number: u32) -> String {
    format!(r#"asm volatile("syscall" : "=a"(r) : "a"({number}L), "D"(a), "S"(b) : "rcx", "r11", "memory");"#)
}

#[test]
fn a_library_without_calls_is_clean() {
    let Some(judged) = of_body("r = a * 1295;") else { return };
    assert_eq!(judged.verdict, Verdict::Clean, "{judged:?}");
}

#[test]
fn inline_calls_are_judged_by_their_number() {
    for (number, verdict, word) in [
        (9, Verdict::Dangerous, "mmap"),
        (56, Verdict::Dangerous, "clone"),
        (58, Verdict::Dangerous, "vfork"),
        (39, Verdict::Benign, "getpid"),
        (202, Verdict::Benign, "futex"),
        (101, Verdict::Unknown, "ptrace"),
        (0x4000_0027, Verdict::Dangerous, "call 1073741863"),
    ] {
        let Some(judged) = of_body(&call(number)) else { return };
        assert_eq!(judged.verdict, verdict, "{judged:?}");
        assert!(judged.reasons[0].contains(word), "{judged:?}");
        assert!(verdict == Verdict::Benign || judged.reasons[0].contains("in inner+0x"), "{judged:?}");
    }
}

#[test]
fn a_number_from_elsewhere_is_unknown() {
    let Some(judged) = of_body(r#"asm volatile("syscall" : "=a"(r) : "a"(a) : "rcx", "r11", "memory");"#) else {
        return;
    };
    assert_eq!(judged.verdict, Verdict::Unknown, "{judged:?}");
}

#[test]
fn two_numbers_that_meet_at_one_site_both_count() {
    let both = |one: u32, other: u32| {
        of_body(&format!(
            "long n = a ? {one} : {other}; asm volatile(\"syscall\" : \"=a\"(r) : \"a\"(n) : \"rcx\", \"r11\", \"memory\");"
        ))
    };
    let Some(judged) = both(39, 10) else { return };
    assert!(!judged.verdict.is_proven(), "{judged:?}");
}

#[test]
fn old_ways_in_are_never_trusted() {
    for way in ["int $0x80", "sysenter"] {
        let Some(judged) = of_body(&format!(r#"asm volatile("{way}" : "=a"(r) : "a"(20L) : "memory");"#)) else {
            return;
        };
        assert_eq!(judged.verdict, Verdict::Unknown, "{judged:?}");
    }
}

#[test]
fn a_jump_into_an_operand_is_seen() {
    let hidden = |jump: &str| {
        format!(
            r#"asm volatile("{jump}\n.byte 0xb9\n1: .byte 0x0f, 0x05, 0, 0" : "=a"(r) : "a"(9L) : "rcx", "r11", "memory");"#
        )
    };
    let Some(plain) = of_body(&hidden("nop")) else { return };
    assert_eq!(plain.verdict, Verdict::Clean, "{plain:?}");
    let jumped = of_body(&hidden("jmp 1f")).unwrap();
    assert_eq!(jumped.verdict, Verdict::Unknown, "{jumped:?}");
}

#[test]
fn what_ioctl_asks_for_decides() {
    for (request, verdict) in [(0x5421_u64, Verdict::Benign), (0xc018_aa3f, Verdict::Unknown)] {
        let body = format!(
            r#"asm volatile("syscall" : "=a"(r) : "a"(16L), "D"(a), "S"({request}L) : "rcx", "r11", "memory");"#
        );
        let Some(judged) = of_body(&body) else { return };
        assert_eq!(judged.verdict, verdict, "{judged:?}");
    }
}

#[test]
fn constants_beside_code_are_no_calls() {
    let source = "const unsigned char table[] __attribute__((section(\".text.t,\\\"ax\\\",@progbits#\"))) = \
                  {0x06,0x0f,0x05,0x06,0x0f,0x34,0x06,0xcd,0x80,0x06,0x06,0x06,0x06,0x06,0x06,0x06}; \
                  long inner(long a) { return table[a]; }";
    let Some(judged) = of_source(source) else { return };
    assert_eq!(judged.verdict, Verdict::Clean, "{judged:?}");
}

#[test]
fn memory_that_is_written_and_run_spoils_a_file() {
    let folder = TempDir::new().unwrap();
    for (name, words, what) in
        [("s.so", &["-z", "execstack"][..], "executable stack"), ("w.so", &["-Wl,-N"], "may write to")]
    {
        let Some(path) = compiled(&folder, name, "long inner(long a) { return a; }", words) else { return };
        let judged = judged(&path);
        assert_eq!(judged.verdict, Verdict::Unknown, "{name}: {judged:?}");
        assert!(judged.reasons.iter().any(|reason| reason.contains(what)), "{judged:?}");
    }
}

#[test]
fn without_section_headers_everything_is_looked_at() {
    let folder = TempDir::new().unwrap();
    let source = format!("long inner(long a, long b) {{ long r; {} return r; }}", call(9));
    let Some(path) = compiled(&folder, "x.so", &source, &[]) else { return };
    let mut bytes = fs::read(&path).unwrap();
    // e_shoff, e_shnum, e_shstrndx
    bytes[40..48].fill(0);
    bytes[60..64].fill(0);
    fs::write(&path, &bytes).unwrap();
    assert_eq!(judged(&path).verdict, Verdict::Dangerous, "{:?}", judged(&path));
}

#[test]
fn other_machines_and_other_files_are_refused_with_the_reason() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("other");
    let mut bytes = fs::read("/bin/true").unwrap();
    bytes[18] = 183;
    fs::write(&path, &bytes).unwrap();
    assert_eq!(judged(&path).reasons, ["ELF machine 183 is not x86-64"]);
    fs::write(&path, "text").unwrap();
    assert_eq!(judged(&path).verdict, Verdict::Unknown);
    assert!(!facts(&path).is_image);
    assert_eq!(judge(&facts(Path::new("/dev/null")), "null", "prog", &Lists::default()).verdict, Verdict::Unknown);
}

/// Every byte of the headers, of the dynamic section and of all tables behind them is turned over, and the file is cut
/// off everywhere: it takes no long time, and nothing panics.
#[test]
fn damaged_files_are_survived() {
    let folder = TempDir::new().unwrap();
    let source = format!("long inner(long a, long b) {{ long r; {} return r; }}", call(9));
    let Some(path) = compiled(&folder, "x.so", &source, &["-Wl,-z,noseparate-code", "-s"]) else { return };
    let good = fs::read(&path).unwrap();
    let damaged = File::options().read(true).write(true).create_new(true).open(folder.path().join("damaged")).unwrap();
    let look = |bytes: &[u8]| {
        // Not by a truncation to nothing, which file systems write back at once.
        damaged.set_len(bytes.len() as u64).unwrap();
        damaged.write_all_at(bytes, 0).unwrap();
        let facts = Facts::of(&damaged);
        assert!(facts.sites.len() < 100, "{facts:?}");
    };
    for at in 0..good.len() {
        for change in [0xff, 0x80, 0x01] {
            let mut bytes = good.clone();
            bytes[at] ^= change;
            look(&bytes);
        }
    }
    for length in 0..good.len() {
        look(&good[..length]);
    }
}

/// A file without end, and tables that say they are longer than memory.
#[test]
fn sizes_that_no_file_has_are_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("long");
    fs::copy("/bin/true", &path).unwrap();
    let file = File::options().read(true).write(true).open(&path).unwrap();
    file.set_len(40 << 30).unwrap();
    assert!(judged(&path).reasons[0].contains("beyond all bounds"), "{:?}", judged(&path));
    file.set_len(12 << 30).unwrap();
    let mut bytes = vec![0; 4096];
    file.read_exact_at(&mut bytes, 0).unwrap();
    // p_filesz and p_memsz of the first executable segment
    let headers = (0..12).map(|index| 64 + 56 * index);
    let executable = headers.into_iter().find(|at| bytes[*at] == 1 && bytes[at + 4] & 1 != 0).unwrap();
    for field in [32, 40] {
        bytes[executable + field..executable + field + 8].copy_from_slice(&(11_u64 << 30).to_le_bytes());
    }
    file.write_all_at(&bytes, 0).unwrap();
    assert!(judged(&path).reasons[0].contains("code beyond all bounds"), "{:?}", judged(&path));
}
