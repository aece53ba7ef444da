//! Processes whose code is not all that their files say.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use kernel::Pid;
use pagefold_proof::{Cache, Lists, Object, Prover, Report, Trust, Verdict};
use tempfile::TempDir;

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/processes.c");

/// A folder with the program, and a library that unmaps by itself.
struct Stand {
    folder: TempDir,
}

impl Stand {
    fn new() -> Option<Self> {
        let folder = TempDir::new().unwrap();
        let program = folder.path().join("prog");
        let Ok(output) = Command::new("gcc").args(["-O1", "-o"]).arg(&program).args([SOURCE, "-ldl"]).output() else {
            println!("skipped: no gcc");
            return None;
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let stand = Self { folder };
        stand.library("wild.so", r#"long r; asm volatile("syscall" : "=a"(r) : "a"(11L) : "rcx", "r11"); return r;"#);
        stand.library("tame.so", "return 1;");
        Some(stand)
    }

    fn library(&self, name: &str, body: &str) {
        let text = self.folder.path().join("library.c");
        fs::write(&text, format!("long inner(void) {{ {body} }}")).unwrap();
        let mut gcc = Command::new("gcc");
        let output = gcc.args(["-O1", "-shared", "-fPIC", "-o"]).arg(self.path(name)).arg(&text).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program in a state, and the address that it tells.
    fn run(&self, words: &[&str]) -> Running {
        let mut child = Command::new(self.path("prog")).args(words).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("0x"), "the program could not get into its state: {line:?}");
        Running { child, address: line.trim().to_owned() }
    }
}

struct Running {
    child: Child,
    address: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Running {
    fn judged(&self) -> Report {
        self.judged_with(&Lists::default(), None)
    }

    fn judged_with(&self, lists: &Lists, cache: Option<&Cache>) -> Report {
        let mut silent = |_: pagefold_proof::Progress<'_>| {};
        let pid = Pid(self.child.id().try_into().unwrap());
        Prover::new(lists, cache, &mut silent).judge_process(pid).unwrap()
    }
}

/// The object of this name that spoils a report.
fn spoiler<'r>(report: &'r Report, name: &str) -> &'r Object {
    let object = report
        .objects
        .iter()
        .find(|object| object.path.file_name().is_some_and(|it| it == name) && !object.judgement.verdict.is_proven());
    object.unwrap_or_else(|| panic!("{name} spoils nothing: {report:#?}"))
}

#[test]
fn a_plain_process_is_proven() {
    let Some(stand) = Stand::new() else { return };
    let report = stand.run(&["plain"]).judged();
    assert!(report.verdict.is_proven(), "{report:#?}");
    let names: Vec<_> = report.objects.iter().filter_map(|object| object.path.file_name()?.to_str()).collect();
    for name in ["prog", "libc.so.6", "ld-linux-x86-64.so.2", "[vdso]"] {
        assert!(names.contains(&name), "no {name} in {names:?}");
    }
}

#[test]
fn executable_memory_is_refused_with_its_address_until_its_engine_is_trusted() {
    let Some(stand) = Stand::new() else { return };
    for how in ["anonymous", "memfd"] {
        let running = stand.run(&[how]);
        let report = running.judged();
        let object = spoiler(&report, "[compiled code]");
        assert_eq!((report.verdict, object.judgement.verdict), (Verdict::Unknown, Verdict::Unknown));
        assert!(object.judgement.reasons[0].contains(&running.address), "{object:?} {}", running.address);
        let line = object.judgement.trust_line.clone().unwrap();
        assert!(line.starts_with("jit ") && line.ends_with(" prog"), "{line}");
        let trusting = Lists::with(Trust::parse(&line).unwrap());
        assert!(running.judged_with(&trusting, None).verdict.is_proven());
        // Whose code was reviewed may not compile.
        let code = Lists::with(Trust::parse(&line.replacen("jit", "code", 1)).unwrap());
        assert_eq!(running.judged_with(&code, None).verdict, Verdict::Unknown);
    }
}

/// The program is trusted, but a build of an engine that nobody knows is in it too.
#[test]
fn one_trusted_engine_does_not_vouch_for_another() {
    let Some(stand) = Stand::new() else { return };
    let [tame, engine] = ["tame.so", "opcache.so"].map(|name| stand.path(name));
    fs::copy(&tame, &engine).unwrap();
    for (library, proven) in [(&tame, true), (&engine, false)] {
        let running = stand.run(&["anonymous", library.to_str().unwrap()]);
        let own = running.judged().objects.into_iter().find(|object| object.path.ends_with("prog")).unwrap();
        let line =
            pagefold_proof::trust_line(pagefold_proof::TrustedAs::Engine, &own.build_id.unwrap(), "prog").unwrap();
        let report = running.judged_with(&Lists::with(Trust::parse(&line).unwrap()), None);
        assert_eq!(report.verdict.is_proven(), proven, "{report:#?}");
    }
}

#[test]
fn a_library_that_was_opened_is_judged() {
    let Some(stand) = Stand::new() else { return };
    let wild = stand.path("wild.so");
    let report = stand.run(&["open", wild.to_str().unwrap()]).judged();
    let object = spoiler(&report, "wild.so");
    assert_eq!(report.verdict, Verdict::Dangerous);
    assert!(object.judgement.reasons[0].starts_with("munmap"), "{object:?}");
}

/// What is mapped counts, not what lies at its path now.
#[test]
fn a_replaced_or_deleted_library_is_not_taken_for_another() {
    let Some(stand) = Stand::new() else { return };
    let [wild, moved] = ["wild.so", "moved.so"].map(|name| stand.path(name));
    let as_root = rustix::process::geteuid().is_root();
    for replaced in [true, false] {
        fs::copy(&wild, &moved).unwrap();
        let running = stand.run(&["open", moved.to_str().unwrap()]);
        if replaced {
            fs::rename(copy_of(&stand.path("tame.so")), &moved).unwrap();
        } else {
            fs::remove_file(&moved).unwrap();
        }
        let report = running.judged();
        let expected = if as_root { Verdict::Dangerous } else { Verdict::Unknown };
        assert_eq!(spoiler(&report, "moved.so").judgement.verdict, expected, "{report:#?}");
    }
}

fn copy_of(path: &Path) -> PathBuf {
    let copy = path.with_extension("copy");
    fs::copy(path, &copy).unwrap();
    copy
}

#[test]
fn data_that_is_mapped_as_code_is_refused() {
    let Some(stand) = Stand::new() else { return };
    let tame = stand.path("tame.so");
    let running = stand.run(&["data", tame.to_str().unwrap()]);
    let report = running.judged();
    let object = spoiler(&report, "tame.so");
    assert!(object.judgement.reasons[0].contains(&running.address), "{object:?}");
}

#[test]
fn an_image_for_another_machine_is_no_compiled_code() {
    let Some(stand) = Stand::new() else { return };
    let other = stand.path("other.so");
    let mut bytes = fs::read(stand.path("tame.so")).unwrap();
    bytes[18] = 183;
    fs::write(&other, bytes).unwrap();
    let report = stand.run(&["data", other.to_str().unwrap()]).judged();
    assert_eq!(spoiler(&report, "other.so").judgement.reasons, ["ELF machine 183 is not x86-64"]);
}

#[test]
fn code_that_was_changed_in_memory_is_refused() {
    let Some(stand) = Stand::new() else { return };
    let running = stand.run(&["patch"]);
    let report = running.judged();
    if report.verdict.is_proven() && kernel::Features::probe().live_merge().is_err() {
        println!("skipped: no PAGEMAP_SCAN");
        return;
    }
    assert!(spoiler(&report, "prog").judgement.reasons[0].contains("changed in memory"), "{report:#?}");
}

#[test]
fn a_second_libc_is_refused() {
    let Some(stand) = Stand::new() else { return };
    let report = stand.run(&["again", "libc.so.6"]).judged();
    assert!(spoiler(&report, "libc.so.6").judgement.reasons[0].contains("twice"), "{report:#?}");
}

#[test]
fn what_is_known_from_before_is_not_decoded_again() {
    let Some(stand) = Stand::new() else { return };
    let cache = Cache::below(stand.folder.path()).unwrap();
    let running = stand.run(&["plain"]);
    std::thread::sleep(std::time::Duration::from_millis(120));
    let first = running.judged_with(&Lists::default(), Some(&cache));
    let second = running.judged_with(&Lists::default(), Some(&cache));
    assert!(first.decoded >= 3 && second.decoded == 0, "{} and {}", first.decoded, second.decoded);
    assert_eq!((first.verdict, first.objects), (second.verdict, second.objects));
}

#[test]
fn who_has_ended_or_never_had_code_is_told_apart() {
    let mut silent = |_: pagefold_proof::Progress<'_>| {};
    let lists = Lists::default();
    let mut prover = Prover::new(&lists, None, &mut silent);
    assert!(prover.judge_process(Pid(i32::MAX)).unwrap_err().is_gone());
    // kthreadd, outside containers
    let is_thread = fs::read_to_string("/proc/2/comm").is_ok_and(|name| name.trim() == "kthreadd");
    if is_thread && rustix::process::geteuid().is_root() {
        assert!(prover.judge_process(Pid(2)).unwrap().objects.is_empty());
    }
}
