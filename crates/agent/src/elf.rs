//! Finding libc and the loader in memory, and their entries in the table of sites.
//!
//! The table is made beforehand, by decoding the files, and knows each object by its build-id; here only the build-ids
//! of what is mapped are compared. Format, all little endian: `PFSITES1`, u32 number of objects, 4 bytes; then for
//! each object u8 length of its build-id, 32 bytes build-id, 3 bytes, u32 number of sites; then for each site u32
//! link-time address, u32 number of the call (0xffff_ffff: any), the 7 bytes that must be there, 1 byte. The 4 bytes in
//! the header say from which page of the file on the pages with the sites lie as they are when they are changed, in the
//! same order; 0 if the file has none of them.

use abi::jump::JUMP;

use crate::sys::{self, nr, sys};

const MAGIC: &[u8; 8] = b"PFSITES1";
const HEADER: usize = 16;
const OBJECT: usize = 40;
const SITE: usize = 16;
/// Where the header says from which page of the file on the changed pages lie.
const CHANGED_PAGES: usize = 12;

/// A place to patch.
#[derive(Clone, Copy)]
pub(crate) struct Site {
    pub(crate) address: u64,
    pub(crate) number: u32,
    pub(crate) bytes: [u8; 7],
}

/// The sites of one object.
#[derive(Clone, Copy)]
pub(crate) struct Object<'a> {
    build_id: &'a [u8],
    sites: &'a [u8],
    /// The page of the file from which on its changed pages lie, if there are any.
    pub(crate) changed: Option<u64>,
}

impl<'a> Object<'a> {
    /// Its sites in memory, where the object is loaded `bias` bytes above its link-time address.
    pub(crate) fn sites(self, bias: u64) -> impl Iterator<Item = Site> + 'a {
        self.sites.chunks_exact(SITE).map(move |raw| {
            let mut bytes = [0; 7];
            bytes.copy_from_slice(&raw[8..15]);
            Site { address: bias.wrapping_add(u64::from(word(raw, 0))), number: word(raw, 4), bytes }
        })
    }
}

impl Object<'_> {
    /// How many pages its sites lie in.
    pub(crate) fn pages(self) -> u64 {
        let mut behind = 0;
        let mut count = 0;
        for site in self.sites(0) {
            let (first, end) = (sys::page_down(site.address).max(behind), sys::page_up(site.address + JUMP as u64));
            count += end.saturating_sub(first) / sys::PAGE;
            behind = end.max(behind);
        }
        count
    }
}

fn word(raw: &[u8], at: usize) -> u32 {
    raw.get(at..at + 4).map_or(0, |bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// The objects of a table; stops at the first thing that makes no sense.
pub(crate) fn objects(table: &[u8]) -> impl Iterator<Item = Object<'_>> {
    let count = if table.starts_with(MAGIC) { word(table, 8) } else { 0 };
    let mut at = HEADER;
    let mut changed = u64::from(word(table, CHANGED_PAGES));
    (0..count).map_while(move |_| {
        let head = table.get(at..at + OBJECT)?;
        let build_id = head.get(1..1 + usize::from(head[0]).min(32))?;
        let sites = word(head, 36) as usize;
        let start = at + OBJECT;
        let end = start.checked_add(sites.checked_mul(SITE)?)?;
        at = end;
        let mut object = Object { build_id, sites: table.get(start..end)?, changed: None };
        if changed != 0 {
            object.changed = Some(changed);
            changed += object.pages();
        }
        Some(object)
    })
}

/// A mapping of the program, as a line of /proc/self/maps says.
#[derive(Clone, Copy, Default)]
pub(crate) struct Line {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) executable: bool,
    pub(crate) shared: bool,
    pub(crate) offset: u64,
    pub(crate) inode: u64,
}

/// Calls `each` for every line of /proc/self/maps. `false` if it was not read to its end: `each` has seen a part then, or
/// what is none. For the descriptor has a number in the program's table, and another thread may close it there, and get
/// the same number for a file of its own.
pub(crate) fn for_each_mapping(mut each: impl FnMut(Line)) -> bool {
    read_mappings(&mut each)
}

/// Apart, so that its buffer is not in the frame of everybody who might call it: the program's stack may be small.
#[inline(never)]
fn read_mappings(each: &mut dyn FnMut(Line)) -> bool {
    let Some(fd) = crate::link::open(c"/proc/self/maps") else { return false };
    let opened = identity(fd);
    let mut buffer = [0_u8; 256];
    let mut line = Line::default();
    let mut field = 0;
    let mut position = 0;
    let read = loop {
        // SAFETY: the kernel writes into the buffer.
        let got = unsafe { sys!(nr::PREAD64, fd as u64, buffer.as_mut_ptr() as u64, buffer.len() as u64, position) };
        if got < 0 {
            break false;
        }
        if got == 0 {
            break field == 0;
        }
        position += got as u64;
        for byte in &buffer[..got as usize] {
            match (field, byte) {
                (_, b'\n') => {
                    each(line);
                    line = Line::default();
                    field = 0;
                }
                (0, b'-') => field = 1,
                (1..=5, b' ') => field += 1,
                (0, digit) => line.start = line.start << 4 | hex(*digit),
                (1, digit) => line.end = line.end << 4 | hex(*digit),
                (2, b'r') => line.readable = true,
                (2, b'w') => line.writable = true,
                (2, b'x') => line.executable = true,
                (2, b's') => line.shared = true,
                (3, digit) => line.offset = line.offset << 4 | hex(*digit),
                (5, digit) => line.inode = line.inode.wrapping_mul(10).wrapping_add(hex(*digit)),
                _ => {}
            }
        }
    };
    let ours = opened.is_some() && identity(fd) == opened;
    if ours {
        crate::link::close(fd);
    }
    read && ours
}

/// Device and inode of what a descriptor stands for.
fn identity(fd: i32) -> Option<[u64; 2]> {
    // struct stat: the first two words.
    let mut stat = [0_u64; 18];
    // SAFETY: the kernel writes a struct stat of 144 bytes.
    let known = unsafe { sys!(nr::FSTAT, fd as u64, stat.as_mut_ptr() as u64) } == 0;
    known.then_some([stat[0], stat[1]])
}

const fn hex(digit: u8) -> u64 {
    match digit {
        b'0'..=b'9' => (digit - b'0') as u64,
        b'a'..=b'f' => (digit - b'a') as u64 + 10,
        _ => 0,
    }
}

/// An ELF image mapped at `line`: its entry in the table, if it has one, and its bias.
pub(crate) fn known<'a>(line: &Line, table: &'a [u8]) -> Option<(Object<'a>, u64)> {
    if line.offset != 0 || line.inode == 0 || !line.readable || line.end - line.start < 4096 {
        return None;
    }
    // A file may have become shorter than its mapping.
    if !sys::is_readable(line.start) {
        return None;
    }
    // SAFETY: the first page of a readable file mapping of this process, which the loader does not change.
    let head = unsafe { core::slice::from_raw_parts(line.start as *const u8, 4096) };
    if !head.starts_with(b"\x7fELF\x02\x01") {
        return None;
    }
    let long = |at: usize| {
        head.get(at..at + 8).map_or(0, |b| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
    };
    let (table_at, entry, count) =
        (long(32) as usize, (word(head, 54) & 0xffff) as usize, (word(head, 56) & 0xffff) as usize);
    let mut bias = None;
    let mut found = None;
    for index in 0..count {
        let at = table_at.checked_add(index.checked_mul(entry)?)?;
        let (kind, offset, vaddr, size) = (word(head, at), long(at + 8), long(at + 16), long(at + 32));
        if kind == 1 && bias.is_none() {
            bias = Some(line.start.wrapping_sub(vaddr.wrapping_sub(offset)));
        }
        if kind == 4 && size >= 16 {
            let notes = head.get(offset as usize..(offset as usize).checked_add(size as usize)?).unwrap_or_default();
            if let Some(id) = build_id(notes) {
                found = objects(table).find(|object| object.build_id == id);
            }
        }
    }
    Some((found?, bias?))
}

/// The build-id among notes.
fn build_id(notes: &[u8]) -> Option<&[u8]> {
    let mut at = 0;
    while at + 12 <= notes.len() {
        let (name, size, kind) = (word(notes, at) as usize, word(notes, at + 4) as usize, word(notes, at + 8));
        let data = at + 12 + name.next_multiple_of(4);
        if kind == 3 && notes.get(at + 12..at + 16) == Some(b"GNU\0") {
            return notes.get(data..data.checked_add(size)?);
        }
        at = data.checked_add(size)?.next_multiple_of(4);
    }
    None
}

const _: () = assert!(sys::PAGE == 4096);
