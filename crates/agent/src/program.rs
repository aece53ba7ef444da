//! Whether the agent can be loaded into a program, told from the program's file.
//!
//! All of it is read by the kernel, a small piece at a time and so many at most: anything may stand in a file. What is not
//! understood is taken for a program that can load the agent.

use crate::apart::look_apart;
use crate::spawn::children_stay_here;
use crate::sys::{AT_FDCWD, failed, nr, sys};

const AT_EMPTY_PATH: u64 = 0x1000;
const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;
/// Class and machine that the agent is built for, in an ELF header.
const CLASS_64: u8 = 2;
const X86_64: u16 = 62;
/// Bytes of a file that are looked at first: the line of a script, or an ELF header.
const HEAD: usize = 128;
/// Scripts whose interpreter is a script: the kernel goes no further either.
const SCRIPTS: u32 = 5;

const SEGMENT: usize = 56;
const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const ENTRY: usize = 16;
const DT_NULL: u64 = 0;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
/// Rows of a table that are read together: as many as go into so many bytes, which hold whole rows of either kind.
const PIECE: usize = 4 * SEGMENT;
/// Rows that are looked at. Programs have a dozen segments, and two or three dozen entries.
const ROWS: u64 = 128;
/// The loader of musl has its machine's name behind this.
const MUSL: &[u8] = b"ld-musl-";
/// AddressSanitizer's libraries, of gcc and of clang.
const SANITIZERS: [&[u8]; 2] = [b"libasan.so", b"libclang_rt.asan"];

/// What is seen of a file.
struct Seen {
    head: [u8; HEAD],
    len: usize,
    fits: bool,
}

/// True unless the program, or the interpreter of a script, is one that cannot have the agent.
#[inline(never)]
pub(crate) fn takes_agent(folder: u64, path: u64, flags: u64) -> bool {
    if !children_stay_here() {
        return true;
    }
    let mut seen = Seen { head: [0; HEAD], len: 0, fits: true };
    see(folder, path, flags, &mut seen);
    for _ in 0..SCRIPTS {
        let Some(line) = seen.head[..seen.len].strip_prefix(b"#!") else { return seen.fits };
        // A name that is cut off is another one.
        let Some(end) = line.iter().position(|byte| *byte == b'\n') else { return true };
        let blank = |byte: &u8| matches!(byte, b' ' | b'\t');
        let Some(start) = line[..end].iter().position(|byte| !blank(byte)) else { return true };
        let name = line[start..end].split(blank).next().unwrap_or_default();
        let mut interpreter = [0_u8; HEAD];
        interpreter[..name.len()].copy_from_slice(name);
        let path = interpreter.as_ptr() as u64;
        if !is_regular(AT_FDCWD, path, 0) {
            return true;
        }
        see(AT_FDCWD, path, 0, &mut seen);
    }
    true
}

/// What a device or a pipe does when it is opened is not to happen here.
pub(crate) fn is_regular(folder: u64, path: u64, flags: u64) -> bool {
    let mut stat = [0_u64; 18];
    // SAFETY: the kernel reads the path and writes a struct stat of 144 bytes.
    let known = unsafe { sys!(nr::NEWFSTATAT, folder, path, stat.as_mut_ptr() as u64, flags) } == 0;
    // The mode is the first half of the fourth word.
    known && stat[3] as u32 & S_IFMT == S_IFREG
}

/// Looks at a regular file. Of one that cannot be read, such as a program that may only be executed, nothing is seen.
fn see(folder: u64, path: u64, flags: u64, seen: &mut Seen) {
    (seen.len, seen.fits) = (0, true);
    // Perhaps the program's own descriptor is the file. Then the path is empty; otherwise this is a folder, or nothing.
    if flags & AT_EMPTY_PATH == 0 || failed(look(folder, seen)) {
        look_apart(folder, path, look, seen);
    }
}

/// Also in a process apart. Negative if the file cannot be read.
extern "C" fn look(file: u64, seen: *mut Seen) -> i64 {
    // SAFETY: `see` lends it for this call, and waits.
    let seen = unsafe { &mut *seen };
    let got = read(file, 0, &mut seen.head);
    seen.len = usize::try_from(got).unwrap_or(0);
    seen.fits = fits(file, &seen.head[..seen.len]);
    got
}

/// What is no ELF file fails by itself, or is something that only the kernel knows.
fn fits(file: u64, head: &[u8]) -> bool {
    if !head.starts_with(b"\x7fELF") {
        return true;
    }
    head.get(4) == Some(&CLASS_64) && half(head, 18) == X86_64 && has_room(file, head) != Some(false)
}

/// False for programs of musl, whose calls do not go through the gate, and for those with AddressSanitizer, which do not
/// start unless its library is the first one. So it is the first that they need.
fn has_room(file: u64, head: &[u8]) -> Option<bool> {
    let (segments, count) = (long(head, 32), u64::from(half(head, 56)));
    if usize::from(half(head, 54)) != SEGMENT {
        return None;
    }
    let mut loader = None;
    let mut dynamic = None;
    for_rows::<SEGMENT>(file, segments, count, |row| {
        match word(row, 0) {
            PT_INTERP => loader = Some(long(row, 8)),
            PT_DYNAMIC => dynamic = Some((long(row, 8), long(row, 32))),
            _ => {}
        }
        true
    })?;
    if is_musl(file, loader?) {
        return Some(false);
    }
    let (entries, bytes) = dynamic?;
    let mut needed = None;
    let mut strings = None;
    for_rows::<ENTRY>(file, entries, bytes / ENTRY as u64, |row| {
        match long(row, 0) {
            DT_NEEDED if needed.is_none() => needed = Some(long(row, 8)),
            DT_STRTAB => strings = Some(long(row, 8)),
            _ => {}
        }
        long(row, 0) != DT_NULL
    })?;
    let (needed, strings) = (needed?, strings?);
    // The table is named by its address.
    let mut place = None;
    for_rows::<SEGMENT>(file, segments, count, |row| {
        let inside = strings.checked_sub(long(row, 16)).filter(|inside| *inside < long(row, 32));
        if let (PT_LOAD, Some(inside)) = (word(row, 0), inside) {
            place = long(row, 8).checked_add(inside);
        }
        place.is_none()
    })?;
    let mut name = [0_u8; 16];
    read(file, place?.checked_add(needed)?, &mut name);
    Some(!SANITIZERS.iter().any(|sanitizer| name.starts_with(sanitizer)))
}

fn is_musl(file: u64, at: u64) -> bool {
    let mut path = [0_u8; HEAD];
    read(file, at, &mut path);
    let Some(end) = path.iter().position(|byte| *byte == 0) else { return false };
    path[..end].rsplit(|byte| *byte == b'/').next().is_some_and(|name| name.starts_with(MUSL))
}

/// Calls `each` for the rows of a table until it says no. `None` if they cannot be read, or are too many.
fn for_rows<const SIZE: usize>(file: u64, at: u64, count: u64, mut each: impl FnMut(&[u8]) -> bool) -> Option<()> {
    let mut done = 0;
    while done < count {
        let mut piece = [0_u8; PIECE];
        let rows = (count - done).min((PIECE / SIZE) as u64);
        let bytes = rows as usize * SIZE;
        if done >= ROWS || read(file, at.checked_add(done * SIZE as u64)?, piece.get_mut(..bytes)?) != bytes as i64 {
            return None;
        }
        if !piece.get(..bytes)?.chunks_exact(SIZE).all(&mut each) {
            break;
        }
        done += rows;
    }
    Some(())
}

/// What the kernel says: the number of bytes, or a negative error number.
fn read(file: u64, at: u64, into: &mut [u8]) -> i64 {
    // SAFETY: the kernel writes into the buffer.
    unsafe { sys!(nr::PREAD64, file, into.as_mut_ptr() as u64, into.len() as u64, at) }
}

fn bytes<const N: usize>(raw: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    if let Some(found) = raw.get(at..at + N) {
        bytes.copy_from_slice(found);
    }
    bytes
}

fn half(raw: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes(raw, at))
}

fn word(raw: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes(raw, at))
}

fn long(raw: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes(raw, at))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    extern crate std;

    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::FileExt as _;
    use std::vec::Vec;

    use super::*;

    fn nothing() -> Seen {
        Seen { head: [0; HEAD], len: 0, fits: true }
    }

    #[test]
    fn a_file_is_read_by_another_process() {
        let mut seen = nothing();
        let mut len_of = |path: &core::ffi::CStr| {
            see(AT_FDCWD, path.as_ptr() as u64, 0, &mut seen);
            (seen.len, seen.head.starts_with(b"\x7fELF\x02"))
        };
        assert_eq!(len_of(c"/proc/self/exe"), (HEAD, true));
        assert_eq!(len_of(c"/no/such/file").0, 0);
        assert_eq!(len_of(c"/dev").0, 0);
        // Nobody is left of this thread's children: WNOHANG, __WALL, __WNOTHREAD. Other tests have theirs.
        // SAFETY: no status is asked for.
        assert_eq!(unsafe { sys!(nr::WAIT4, u64::MAX, 0, 0x6000_0001_u64, 0) }, -crate::sys::errno::ECHILD);
    }

    #[test]
    fn headers_of_other_machines_do_not_fit() {
        let mut head = [0_u8; 64];
        head[..5].copy_from_slice(b"\x7fELF\x02");
        head[18] = 62;
        let fits = |head: &[u8]| fits(u64::MAX, head);
        assert!(fits(&head) && fits(b"") && fits(b"text"));
        head[4] = 1;
        assert!(!fits(&head));
        head[4] = 2;
        head[18] = 183;
        assert!(!fits(&head) && !fits(&head[..10]));
    }

    /// A program with three segments, whose strings are 0x1000 higher in memory than in the file.
    fn program(loader: &[u8], library: &[u8]) -> Vec<u8> {
        let mut image = std::vec![0_u8; 1200];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(18, &[62]);
        put(32, &64_u64.to_le_bytes());
        put(54, &[56, 0, 3]);
        for (row, kind, file, memory) in [(0, PT_INTERP, 300, 0), (1, PT_DYNAMIC, 400, 0), (2, PT_LOAD, 0, 0x1000)] {
            let at = 64 + row * SEGMENT;
            put(at, &u32::to_le_bytes(kind));
            put(at + 8, &u64::to_le_bytes(file));
            put(at + 16, &u64::to_le_bytes(memory));
            put(at + 32, &u64::to_le_bytes(1200));
        }
        put(300, loader);
        for row in 0..30 {
            let (tag, value) = match row {
                3 => (DT_NEEDED, 1),
                4 => (DT_NEEDED, 100),
                20 => (DT_STRTAB, 0x1000 + 1000),
                29 => (DT_NULL, 0),
                _ => (30, 0),
            };
            put(400 + row * ENTRY, &u64::to_le_bytes(tag));
            put(400 + row * ENTRY + 8, &u64::to_le_bytes(value));
        }
        put(1001, library);
        put(1100, b"libasan.so.8");
        image
    }

    fn fits_with(image: &[u8]) -> bool {
        static NUMBER: core::sync::atomic::AtomicU32 = core::sync::atomic::AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, core::sync::atomic::Ordering::SeqCst);
        let path = std::env::temp_dir().join(std::format!("pagefold-program-{}-{number}", std::process::id()));
        let file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        file.write_all_at(image, 0).unwrap();
        let mut seen = nothing();
        assert_eq!(look(file.as_raw_fd() as u64, &mut seen), HEAD.min(image.len()) as i64);
        seen.fits
    }

    const GLIBC: &[u8] = b"/lib64/ld-linux-x86-64.so.2";

    #[test]
    fn programs_of_musl_and_with_sanitizers_do_not_fit() {
        assert!(fits_with(&program(GLIBC, b"libc.so.6")), "AddressSanitizer is not the first");
        assert!(!fits_with(&program(GLIBC, b"libasan.so.8")));
        assert!(!fits_with(&program(GLIBC, b"libclang_rt.asan-x86_64.so")));
        assert!(!fits_with(&program(b"/lib/ld-musl-x86_64.so.1", b"libc.so")));
        assert!(fits_with(&program(b"/ld-musl-x86_64/ld-linux-x86-64.so.2", b"libc.so.6")));
    }

    /// Every byte says something else once, and every length is a file's.
    #[test]
    fn damaged_programs_are_looked_at_without_harm() {
        let image = program(GLIBC, b"libc.so.6");
        for at in 0..image.len() {
            let mut damaged = image.clone();
            damaged[at] = 0xff;
            fits_with(&damaged);
            assert!(at < 20 || fits_with(&image[..at]), "{at} bytes are not understood");
        }
        let mut many = image;
        many[56..58].fill(0xff);
        many.resize(64 + 65535 * SEGMENT, 0);
        assert!(fits_with(&many));
    }
}
