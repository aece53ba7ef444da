//! The header is what the source says, and a C program can use it.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Where cargo put the library: beside this test's binary, or one folder up.
fn built() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let folders = test.ancestors().skip(1).take(2);
    folders.map(Path::to_owned).find(|folder| folder.join("libpagefold_c.so").is_file()).expect("cargo built it")
}

#[test]
fn the_header_is_up_to_date() {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap();
    let mut made = Vec::new();
    cbindgen::Builder::new()
        .with_src(root().join("src/lib.rs"))
        .with_config(config)
        .generate()
        .unwrap()
        .write(&mut made);
    // What cbindgen always writes and C89 does not know: a comma behind the last value of an enumeration, and such comments.
    let made = [(",\n} ", "\n} "), ("  // extern \"C\"", ""), ("  // __cplusplus", ""), (" // __cplusplus", "")]
        .iter()
        .fold(String::from_utf8(made).unwrap(), |text, (from, to)| text.replace(from, to));
    let path = root().join("include/pagefold.h");
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let there = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(there, made, "BLESS=1 cargo test -p pagefold-capi rewrites it");
}

/// Compiles a program against the header and the library, and runs it; it must say "done".
fn run(source: &str, standard: &[&str]) {
    if Command::new("cc").arg("--version").output().is_err() {
        println!("skipped: a C compiler");
        return;
    }
    let source = root().join(source);
    let built = built();
    let name = source.file_stem().unwrap().to_string_lossy();
    let program = built.join(format!("c-{name}-{}", std::process::id()));
    let compiled = Command::new("cc")
        .args(standard)
        .args(["-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(root().join("include"))
        .arg(&source)
        .arg("-L")
        .arg(&built)
        .args(["-lpagefold_c", "-o"])
        .arg(&program)
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let ran = Command::new(&program).env("LD_LIBRARY_PATH", &built).output().unwrap();
    std::fs::remove_file(&program).unwrap();
    let said = String::from_utf8_lossy(&ran.stdout);
    let errors = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success() && said.contains("done"), "{}: {said}{errors}", ran.status);
}

#[test]
fn a_c_program_merges() {
    run("examples/c/merge.c", &["-std=c11"]);
}

/// Seen to fail: the first merge said that a limit was met, and leaving did not return. And in the C of 1989: comments and
/// a comma that it does not know.
#[test]
fn wrong_ranges_are_refused() {
    run("tests/ranges.c", &["-std=c89", "-pedantic"]);
}

#[test]
fn every_function_is_in_the_manual() {
    let header = std::fs::read_to_string(root().join("include/pagefold.h")).unwrap();
    let manual = std::fs::read_to_string(root().join("man/pagefold.3")).unwrap();
    let names = header.split(|byte: char| !byte.is_ascii_alphanumeric() && byte != '_');
    let mut seen = 0;
    for name in names.filter(|name| name.starts_with("pagefold_") || name.starts_with("PAGEFOLD_E")) {
        assert!(manual.contains(name), "{name}");
        seen += 1;
    }
    assert!(seen > 15);
}
