//! The order of places, against files in a folder.
#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;

fn loaded(path: &str, rpath: Option<&str>, runpath: Option<&str>, loader: Option<usize>) -> Loaded {
    let needs = Needs { rpath: rpath.map(str::to_owned), runpath: runpath.map(str::to_owned), ..Needs::default() };
    Loaded { path: path.into(), needs, loader }
}

fn library() -> Library {
    Library { cache: LdCache::default(), lib: "lib64" }
}

/// A folder with these files in it.
fn tree(files: &[&str]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in files {
        let path = folder.path().join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "x").unwrap();
    }
    folder
}

fn find(all: &[Loaded], by: usize) -> Place {
    library().find("libpagefold-x.so", all, by, &|path| path.is_file())
}

#[test]
fn tokens_are_replaced_and_longer_words_are_not() {
    let expand = |text| library().expand(text, Path::new("/opt/a/bin/prog")).into_string().unwrap();
    assert_eq!(expand("$ORIGIN/../lib"), "/opt/a/bin/../lib");
    assert_eq!(expand("${ORIGIN}x:$LIB"), "/opt/a/binx:lib64");
    assert_eq!(expand("$ORIGINAL/$X"), "$ORIGINAL/$X");
}

#[test]
fn rpath_is_inherited_and_runpath_is_not() {
    let tree = tree(&["a/libpagefold-x.so", "b/libpagefold-x.so"]);
    let at = |name: &str| tree.path().join(name).to_str().unwrap().to_owned();
    let by_rpath = [loaded("/p", Some(&at("a")), None, None), loaded("/q", None, None, Some(0))];
    assert_eq!(find(&by_rpath, 1), Place::Files(vec![tree.path().join("a/libpagefold-x.so")]));
    let by_runpath = [loaded("/p", None, Some(&at("a")), None), loaded("/q", None, None, Some(0))];
    assert_eq!(find(&by_runpath, 1), Place::Nowhere);
    // Who has a RUNPATH asks nobody else, and its own RPATH is void.
    let both = [loaded("/p", Some(&at("a")), None, None), loaded("/q", Some(&at("a")), Some(&at("b")), Some(0))];
    assert_eq!(find(&both, 1), Place::Files(vec![tree.path().join("b/libpagefold-x.so")]));
}

#[test]
fn variants_for_processors_are_all_meant() {
    let tree = tree(&["a/glibc-hwcaps/x86-64-v3/libpagefold-x.so", "b/libpagefold-x.so", "c/libpagefold-x.so"]);
    let path = ["a", "b", "c"].map(|name| tree.path().join(name).to_str().unwrap().to_owned()).join(":");
    let expected =
        ["a/glibc-hwcaps/x86-64-v3/libpagefold-x.so", "b/libpagefold-x.so"].map(|name| tree.path().join(name));
    assert_eq!(find(&[loaded("/p", None, Some(&path), None)], 0), Place::Files(expected.to_vec()));
}

#[test]
fn what_depends_on_the_current_folder_is_said() {
    assert_eq!(find(&[loaded("/p", None, Some("lib"), None)], 0), Place::CurrentFolder);
    assert_eq!(find(&[loaded("/p", None, Some(""), None)], 0), Place::CurrentFolder);
}
