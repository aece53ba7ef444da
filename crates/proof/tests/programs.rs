//! What runs for a command, and whether the agent can get into it.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use pagefold_proof::{Class, ProgramError, Reason, needs_no_agent, resolve_program};
use tempfile::TempDir;

fn script(folder: &TempDir, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    path
}

fn shell() -> Vec<u8> {
    fs::read("/bin/sh").unwrap()
}

#[test]
fn a_dynamic_program_along_path() {
    let program = resolve_program(Path::new("sh")).unwrap();
    assert_eq!(program.class, Class::Gated);
    assert!(program.interpreter_chain.is_empty());
    assert!(program.elf_path.ends_with("sh"));
}

#[test]
fn scripts_are_followed_to_their_interpreter() {
    let folder = TempDir::new().unwrap();
    let inner = script(&folder, "inner", "#! /bin/sh -e\necho\n");
    let outer = script(&folder, "outer", format!("#!{}\n", inner.display()));
    let program = resolve_program(&outer).unwrap();
    assert_eq!(program.interpreter_chain, [outer, inner]);
    assert_eq!(program.elf_path, Path::new("/bin/sh"));
    assert_eq!(program.class, Class::Gated);
}

#[test]
fn text_without_an_interpreter_goes_to_the_shell() {
    let folder = TempDir::new().unwrap();
    let text = script(&folder, "text", "echo hello\n");
    let program = resolve_program(&text).unwrap();
    assert_eq!((program.interpreter_chain, program.elf_path), (vec![text], PathBuf::from("/bin/sh")));
}

#[test]
fn a_script_that_runs_itself_ends() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("ring");
    script(&folder, "ring", format!("#!{}\n", path.display()));
    assert!(matches!(resolve_program(&path), Err(ProgramError::TooManyInterpreters { .. })));
}

#[test]
fn scripts_nest_as_deep_as_the_kernel_lets_them() {
    let folder = TempDir::new().unwrap();
    let mut path = PathBuf::from("/bin/true");
    for level in 1..=7 {
        path = script(&folder, &format!("level{level}"), format!("#!{}\n", path.display()));
        let ran = std::process::Command::new(&path).status();
        assert_eq!(resolve_program(&path).is_ok(), ran.is_ok(), "level {level}: {ran:?}");
    }
}

#[test]
fn missing_and_forbidden_files_are_told_apart() {
    let folder = TempDir::new().unwrap();
    let missing = folder.path().join("none");
    assert!(matches!(resolve_program(&missing), Err(ProgramError::NotFound { .. })));
    assert!(matches!(resolve_program(Path::new("no-such-program-here")), Err(ProgramError::NotFound { .. })));
    let plain = script(&folder, "plain", "");
    fs::set_permissions(&plain, Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(resolve_program(&plain), Err(ProgramError::NotExecutable { .. })));
    let broken = script(&folder, "broken", "#!/no/such/interpreter\n");
    match resolve_program(&broken) {
        Err(ProgramError::NotFound { path }) => assert_eq!(path, Path::new("/no/such/interpreter")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_program_that_changes_its_user_or_group() {
    if !rustix::process::getuid().is_root() {
        println!("skipped: needs root to give files away");
        return;
    }
    let folder = TempDir::new().unwrap();
    for (mode, owner, group, expected) in [
        (0o4755, Some(65534), None, Class::NoAgent(Reason::SetUid)),
        (0o2755, None, Some(65534), Class::NoAgent(Reason::SetGid)),
        (0o4755, Some(0), None, Class::Gated),
        (0o755, Some(65534), Some(65534), Class::Gated),
        // Set-group-ID without execution by the group is a locking mode.
        (0o2745, None, Some(65534), Class::Gated),
    ] {
        let path = script(&folder, &format!("p{mode:o}-{owner:?}-{group:?}"), shell());
        chown(&path, owner, group).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        assert_eq!(resolve_program(&path).unwrap().class, expected, "{mode:o} {owner:?} {group:?}");
    }
}

#[test]
fn foreign_and_broken_files() {
    assert_eq!(needs_no_agent(b"#!/bin/sh\n"), Some(Reason::NotElf));
    assert_eq!(needs_no_agent(b"\x7fELF"), Some(Reason::Malformed));
    let mut image = shell();
    assert_eq!(needs_no_agent(&image), None);
    image[18] = 183;
    assert_eq!(needs_no_agent(&image), Some(Reason::Machine { machine: 183 }));
    // e_ident[EI_CLASS] = ELFCLASS32; the 32-bit header has its machine at the same place.
    image[18] = 3;
    image[4] = 1;
    assert_eq!(needs_no_agent(&image), Some(Reason::ThirtyTwoBit));
}

#[test]
fn a_foreign_loader() {
    let replace = |with: &[u8]| {
        let mut image = shell();
        let old = b"/lib64/ld-linux-x86-64.so.2\0";
        let at = image.windows(old.len()).position(|window| window == old).unwrap();
        image[at..at + old.len()].fill(0);
        image[at..at + with.len()].copy_from_slice(with);
        needs_no_agent(&image)
    };
    assert_eq!(replace(b"/lib/ld-musl-x86_64.so.1"), Some(Reason::Musl));
    assert_eq!(replace(b"/lib/ld.so.1"), Some(Reason::Loader { loader: "/lib/ld.so.1".into() }));
    assert_eq!(replace(b"/nix/ld-linux-x86-64.so.2"), None);
}

#[test]
fn static_programs_and_the_loader_itself() {
    let Ok(busybox) = fs::read("/bin/busybox") else {
        println!("skipped: no busybox-static");
        return;
    };
    assert_eq!(needs_no_agent(&busybox), Some(Reason::Static));
    assert_eq!(needs_no_agent(&fs::read("/lib64/ld-linux-x86-64.so.2").unwrap()), None);
}

#[test]
fn a_go_program_is_known_by_its_note() {
    // The type and owner of a note of this host's own shell, renamed to Go's ("GNU" and "Go\0" have one length).
    let mut image = shell();
    let note = [4_u32.to_le_bytes(), 20_u32.to_le_bytes(), 3_u32.to_le_bytes(), *b"GNU\0"].concat();
    let at = image.windows(note.len()).position(|window| window == note).unwrap();
    image[at + 12..at + 16].copy_from_slice(b"Go\0\0");
    assert_eq!(needs_no_agent(&image), Some(Reason::Go));
}

#[test]
fn every_reason_names_the_way_out() {
    let asan = Reason::AddressSanitizer;
    for reason in [Reason::Static, Reason::Go, Reason::Musl, Reason::ThirtyTwoBit, Reason::SetUid, Reason::NotElf, asan]
    {
        assert!(reason.to_string().contains("--backend ksm"), "{reason}");
    }
}
