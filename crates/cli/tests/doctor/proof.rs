//! `pagefold doctor --proof`: what it prints, and how it ends.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Output};

use serde_json::Value;
use tempfile::TempDir;

use crate::stand::PAGEFOLD;

/// The command, with a cache in a folder of its own: root's is at a fixed place, and does no harm.
fn proof(folder: &TempDir, words: &[&str]) -> Command {
    let mut command = Command::new(PAGEFOLD);
    command.args(["doctor", "--proof"]).args(words).env("XDG_CACHE_HOME", folder.path());
    command
}

fn said(folder: &TempDir, words: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = proof(folder, words).output().unwrap();
    (status.code(), String::from_utf8_lossy(&stdout).into_owned(), String::from_utf8_lossy(&stderr).into_owned())
}

fn document(folder: &TempDir, words: &[&str]) -> Value {
    let (status, out, errors) = said(folder, &[words, &["--json"]].concat());
    assert_eq!((status, errors.as_str()), (Some(0), ""), "{out}");
    serde_json::from_str(&out).unwrap()
}

struct Sleeper(Child);

impl Sleeper {
    fn new() -> Self {
        Self(Command::new("sleep").arg("60").spawn().unwrap())
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// This test's own program, made into one that cannot be proven: its stack is executable.
fn spoilt(folder: &TempDir) -> String {
    let path = folder.path().join("spoilt");
    let mut bytes = fs::read("/bin/true").unwrap();
    let mut headers = (0..16).map(|index| 64 + 56 * index);
    // PT_GNU_STACK
    let stack = headers.find(|at| bytes[*at..*at + 4] == [0x51, 0xe5, 0x74, 0x64]).unwrap();
    bytes[stack + 4] |= 1;
    fs::write(&path, bytes).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_program_is_found_along_path_and_its_libraries_are_judged() {
    let folder = TempDir::new().unwrap();
    let (status, out, errors) = said(&folder, &["sleep"]);
    assert_eq!((status, errors.as_str()), (Some(0), ""));
    assert!(out.starts_with("clean ") && out.contains("libc.so.6\n") && out.contains("takes the gate"), "{out}");
    assert!(out.contains("  -> a gate can be complete"), "{out}");
    // The interpreter of a script.
    let script = folder.path().join("script");
    fs::write(&script, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(document(&folder, &[script.to_str().unwrap()])["file"], "/bin/sh");
}

#[test]
fn a_process_has_one_document_with_all_its_objects() {
    let folder = TempDir::new().unwrap();
    let sleeper = Sleeper::new();
    let said = document(&folder, &[&sleeper.pid()]);
    assert_eq!((said["pid"].to_string(), said["proven"].as_bool()), (sleeper.pid(), Some(true)), "{said:#}");
    let objects = said["objects"].as_array().unwrap();
    assert!(objects.iter().any(|object| object["path"].as_str().unwrap().ends_with("/sleep")), "{said:#}");
    // The second time nothing is decoded.
    assert_eq!(document(&folder, &[&sleeper.pid()])["decoded"], 0);
}

#[test]
fn what_is_refused_says_why_and_which_line_would_allow_it() {
    let folder = TempDir::new().unwrap();
    let spoilt = spoilt(&folder);
    let (status, out, _) = said(&folder, &[&spoilt]);
    assert_eq!(status, Some(0));
    assert!(out.starts_with("unknown ") && out.contains("asks for an executable stack"), "{out}");
    assert!(out.contains("--scope marked") && out.contains("--backend ksm"), "{out}");
    let line = out.lines().map(str::trim).find(|line| line.starts_with("code ")).unwrap();
    assert_eq!(document(&folder, &[&spoilt])["trust_lines"][0], line);
    let trust = folder.path().join("trust");
    fs::write(&trust, line).unwrap();
    let trusted = document(&folder, &[&spoilt, "--trust", trust.to_str().unwrap()]);
    assert_eq!((trusted["verdict"].as_str(), trusted["proven"].as_bool()), (Some("known"), Some(true)), "{trusted:#}");
}

#[test]
fn a_trust_file_that_others_can_write_to_is_not_used() {
    let folder = TempDir::new().unwrap();
    let trust = folder.path().join("trust");
    fs::write(&trust, "").unwrap();
    fs::set_permissions(&trust, fs::Permissions::from_mode(0o666)).unwrap();
    let (status, out, errors) = said(&folder, &["sleep", "--trust", trust.to_str().unwrap()]);
    assert_eq!((status, out.as_str()), (Some(1), ""));
    assert!(errors.contains("can be written by others"), "{errors}");
}

#[test]
fn the_status_tells_what_failed() {
    let folder = TempDir::new().unwrap();
    for (words, status, what) in [
        (&["/nonexistent"][..], 1, "was not found"),
        (&["2147483647"], 1, "is gone"),
        (&["sleep", "--pid", "1"], 2, "cannot be used with"),
    ] {
        let (ended, _, errors) = said(&folder, words);
        assert!(ended == Some(status) && errors.contains(what), "{ended:?} {errors}");
    }
}

#[test]
fn somebody_elses_process_is_not_permitted() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can become somebody else");
        return;
    }
    let folder = TempDir::new().unwrap();
    let sleeper = Sleeper::new();
    let output = proof(&folder, &[&sleeper.pid()]).uid(65534).gid(65534).output().unwrap();
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
    // A file that anybody may read is judged, though there is no place for a cache.
    let output = proof(&folder, &["sleep"]).uid(65534).gid(65534).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nothing is kept"), "nobody owns that folder");
}

/// Who has no right to the kernel's own links to mapped files must not judge what was mounted over one.
#[test]
fn a_file_that_hides_the_mapped_one_is_not_taken_for_it() {
    let folder = TempDir::new().unwrap();
    for (copy, of) in [("mapped.so", "libm.so.6"), ("hides.so", "libdl.so.2")] {
        fs::copy(Path::new("/lib/x86_64-linux-gnu").join(of), folder.path().join(copy)).unwrap();
    }
    let script = r#"cd "$1" || exit 9
        mount --bind hides.so hides.so || exit 9
        LD_PRELOAD=$1/mapped.so sleep 60 & pid=$!
        until grep -q mapped.so /proc/$pid/maps; do sleep 0.01; done
        mount --bind hides.so mapped.so
        "$0" doctor --proof $pid --json
        kill $pid"#;
    let mut command = Command::new("unshare");
    command.args(["-Urm", "sh", "-c", script, PAGEFOLD]).arg(folder.path()).env("XDG_CACHE_HOME", folder.path());
    let output = command.output().unwrap();
    let Ok(said) = serde_json::from_slice::<Value>(&output.stdout) else {
        println!("skipped: no user namespaces: {}", String::from_utf8_lossy(&output.stderr));
        return;
    };
    let objects = said["objects"].as_array().unwrap();
    let mapped = objects.iter().find(|object| object["path"].as_str().unwrap().ends_with("/mapped.so")).unwrap();
    assert_eq!(mapped["verdict"], "unknown", "{said:#}");
    assert!(mapped["reasons"][0].as_str().unwrap().contains("not the one that is mapped"), "{mapped:#}");
}

/// A member has the agent in it, which maps and unmaps: it is the gate.
#[test]
fn a_member_is_proven_with_its_agent() {
    let folder = TempDir::new().unwrap();
    let pid = folder.path().join("pid");
    let script = format!("echo $$ > {}; exec sleep 60", pid.display());
    let mut run = Command::new(PAGEFOLD).args(["run", "--quiet", "--", "sh", "-c", &script]).spawn().unwrap();
    let begun = std::time::Instant::now();
    let member = loop {
        let text = fs::read_to_string(&pid).unwrap_or_default();
        let is_asleep = |pid: &str| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n");
        if text.ends_with('\n') && is_asleep(text.trim()) {
            break text.trim().to_owned();
        }
        assert!(begun.elapsed().as_secs() < 30, "the member does not start");
        std::thread::sleep(std::time::Duration::from_millis(20));
    };
    let said = document(&folder, &[&member]);
    let is_member = fs::read_to_string(format!("/proc/{member}/maps")).unwrap().contains("/agent.so");
    Command::new("kill").arg(&member).status().unwrap();
    run.wait().unwrap();
    if is_member {
        assert_eq!(said["proven"], true, "{said:#}");
    } else {
        println!("skipped: this kernel or user cannot merge live");
    }
}
