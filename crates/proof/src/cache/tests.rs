//! Who may write entries, and which are believed.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::time::Duration;

use tempfile::TempDir;

use super::*;

/// A folder with a copy of a small program that has been at rest for a while, and a cache.
fn stand() -> (TempDir, PathBuf, Cache) {
    let folder = TempDir::new().unwrap();
    let program = folder.path().join("true");
    fs::copy("/bin/true", &program).unwrap();
    rest();
    let cache = Cache::below(folder.path()).unwrap();
    (folder, program, cache)
}

fn rest() {
    std::thread::sleep(Duration::from_millis(120));
}

fn entry(folder: &TempDir, program: &Path) -> PathBuf {
    let about = fs::metadata(program).unwrap();
    folder.path().join("pagefold/proof").join(entry_name(about.dev(), about.ino()))
}

#[test]
fn what_was_decoded_is_kept_until_the_file_changes() {
    let (folder, program, cache) = stand();
    let file = File::open(&program).unwrap();
    assert_eq!(cache.get(&file), None);
    let facts = cache.decode(&file);
    assert!(facts.is_image && facts.build_id.is_some(), "{facts:?}");
    assert_eq!(cache.get(&file), Some(facts.clone()));
    // A byte of it is written, its length and time of modification put back.
    let before = fs::metadata(&program).unwrap();
    fs::OpenOptions::new().write(true).open(&program).unwrap().write_all_at(b"x", before.len() - 1).unwrap();
    File::options().write(true).open(&program).unwrap().set_modified(before.modified().unwrap()).unwrap();
    assert_eq!(cache.get(&file), None);
    drop(folder);
}

#[test]
fn a_file_that_has_just_been_written_is_not_kept() {
    let (folder, program, cache) = stand();
    fs::write(&program, fs::read("/bin/false").unwrap()).unwrap();
    let file = File::open(&program).unwrap();
    let _ = cache.decode(&file);
    assert!(!entry(&folder, &program).exists());
}

#[test]
fn a_corrupt_entry_is_ignored_and_rewritten() {
    let (folder, program, cache) = stand();
    let file = File::open(&program).unwrap();
    let facts = cache.decode(&file);
    let path = entry(&folder, &program);
    let good = fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&path, &bad).unwrap();
        // The sum is read in either case of its letters, and nothing else is taken for it.
        assert!(cache.get(&file).is_none_or(|kept| kept == facts), "byte {at}");
        assert!(at < 17 || cache.get(&file).is_none(), "byte {at}");
        fs::write(&path, &good[..at]).unwrap();
        assert_eq!(cache.get(&file), None);
    }
    assert_eq!(cache.decode(&file), facts);
    assert_eq!(fs::read(&path).unwrap(), good);
}

#[test]
fn an_entry_of_other_rules_is_void() {
    let (folder, program, cache) = stand();
    let file = File::open(&program).unwrap();
    let facts = cache.decode(&file);
    let identity = Identity { version: VERSION + 1, ..Identity::of(&file).unwrap() };
    fs::write(entry(&folder, &program), pack(&Entry { identity, facts }).unwrap()).unwrap();
    assert_eq!(cache.get(&file), None);
}

#[test]
fn what_others_can_write_to_is_not_believed() {
    let (folder, program, cache) = stand();
    let file = File::open(&program).unwrap();
    let _ = cache.decode(&file);
    let path = entry(&folder, &program);
    fs::set_permissions(&path, Permissions::from_mode(0o620)).unwrap();
    assert_eq!(cache.get(&file), None);
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    assert!(cache.get(&file).is_some());
    // A second name by which it could be written to, and a link to elsewhere.
    fs::hard_link(&path, folder.path().join("second")).unwrap();
    assert_eq!(cache.get(&file), None);
    fs::rename(&path, folder.path().join("elsewhere")).unwrap();
    fs::remove_file(folder.path().join("second")).unwrap();
    symlink(folder.path().join("elsewhere"), &path).unwrap();
    assert_eq!(cache.get(&file), None);
}

#[test]
fn a_folder_of_somebody_else_is_refused() {
    let folder = TempDir::new().unwrap();
    let ours = folder.path().join("pagefold");
    fs::create_dir(&ours).unwrap();
    fs::set_permissions(&ours, Permissions::from_mode(0o770)).unwrap();
    assert!(matches!(Cache::below(folder.path()), Err(CacheError::Foreign { .. })));
    fs::remove_dir(&ours).unwrap();
    fs::create_dir(folder.path().join("other")).unwrap();
    symlink(folder.path().join("other"), &ours).unwrap();
    assert!(matches!(Cache::below(folder.path()), Err(CacheError::Folder { .. })));
    fs::remove_file(&ours).unwrap();
    fs::create_dir(&ours).unwrap();
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&ours, Some(65534), None).unwrap();
        assert!(matches!(Cache::below(folder.path()), Err(CacheError::Foreign { .. })));
    } else {
        println!("skipped: only root can give a folder away");
    }
}
