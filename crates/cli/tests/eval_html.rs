//! `pagefold eval --html FILE`: the file, as whoever asks for it meets it. What a browser makes of the page is tested
//! where the page is made.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

const PAGEFOLD: &str = env!("CARGO_BIN_EXE_pagefold");

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("pagefold-eval-html-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(fs::canonicalize(path).unwrap())
    }

    fn names(&self) -> Vec<String> {
        let names =
            fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A process to look at, ended when this value goes.
struct Target(Child);

impl Target {
    /// Runs a copy of `sleep` of this name, which says of itself that it is called something else.
    fn start(folder: &Folder, name: &str, calls_itself: &str) -> Self {
        let program = folder.0.join(name);
        // Not by this process: a fork of another thread would hold it open for writing when it is executed.
        assert!(Command::new("cp").arg("/bin/sleep").arg(&program).status().unwrap().success());
        Self(Command::new(&program).arg0(calls_itself).arg("600").spawn().unwrap())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn eval(target: &Target, page: &Path, words: &[&str]) -> Output {
    let pid = target.0.id().to_string();
    Command::new(PAGEFOLD).args(["eval", "--pid", &pid, "--html"]).arg(page).args(words).output().unwrap()
}

/// A program's name is what it likes, with a line break and the end of anything that it could stand in.
#[test]
fn the_page_has_hostile_names_as_words() {
    let folder = Folder::new("names");
    let target = Target::start(&folder, "<b>\"&'\n\u{202e}x", "</title><script>alert(1)</script>");
    let page = folder.0.join("page.html");
    let output = eval(&target, &page, &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("kernel KSM"), "the table is printed all the same");
    let text = fs::read_to_string(&page).unwrap();
    assert!(text.starts_with("<!DOCTYPE html>") && text.trim_end().ends_with("</html>"));
    for word in ["<b>", "<script", "\u{202e}", "&'"] {
        assert!(!text.contains(word), "{word}");
    }
    // The kernel itself writes a line break in a name as two characters.
    assert!(text.contains("&#60;b&#62;&#34;&#38;&#39;\\n\u{fffd}x"), "{text}");
    assert!(text.contains("pagefold eval --pid"), "what was asked");
}

/// An old page stays until the new one is complete: also when the wait between two looks is interrupted.
#[test]
fn nothing_is_left_half_written() {
    let folder = Folder::new("interrupted");
    let target = Target::start(&folder, "target", "target");
    let (page, link) = (folder.0.join("page.html"), folder.0.join("link"));
    fs::write(&page, "old").unwrap();
    symlink("page.html", &link).unwrap();
    let pid = target.0.id().to_string();
    let words = ["eval", "--watch", "600", "--pid", &pid, "--html"];
    let mut waiting = Command::new(PAGEFOLD).args(words).arg(&page).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(1));
    assert!(waiting.try_wait().unwrap().is_none());
    let pid = rustix::process::Pid::from_child(&waiting);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert!(!waiting.wait().unwrap().success());
    assert_eq!(
        (fs::read_to_string(&page).unwrap().as_str(), folder.names()),
        ("old", names(&["link", "page.html", "target"]))
    );
    assert!(eval(&target, &link, &["--json", "--quiet"]).status.success());
    assert!(fs::read_to_string(&page).unwrap().starts_with("<!DOCTYPE html>"), "links are followed");
    assert_eq!(folder.names(), names(&["link", "page.html", "target"]), "nothing else is left");
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// What cannot be written is said before the long work starts.
#[test]
fn a_place_that_cannot_be_written_is_an_error_at_once() {
    let folder = Folder::new("unwritable");
    let target = Target::start(&folder, "target", "target");
    let nowhere = folder.0.join("not/there.html");
    for (page, why) in [
        (nowhere.as_path(), "No such file"),
        (&folder.0, "not a regular file"),
        (Path::new("/dev/null"), "not a regular file"),
        (Path::new("/dev/stdout"), "not a regular file"),
        // A folder where even root makes nothing.
        (Path::new("/proc/page.html"), "No such file"),
    ] {
        let begun = Instant::now();
        let output = eval(&target, page, &["--watch", "60"]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(begun.elapsed() < Duration::from_secs(20), "{}: {said}", page.display());
        assert_eq!(output.status.code(), Some(1), "{}: {said}", page.display());
        assert!(said.contains(&format!("cannot write the page {}", page.display())) && said.contains(why), "{said}");
        assert!(output.stdout.is_empty());
    }
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
}
