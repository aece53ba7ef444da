//! The sites of one object: where they are, which can be patched, and what stands in the way of the others.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::Range;

use crate::branches::Decoded;
use crate::error::ProofError;
use crate::headers::Headers;
use crate::image::{Code, Image};
use crate::number::numbers_at;
use crate::numbers::{IOCTL, changes_mappings, executes, name, takes_the_gate};
use crate::run::{Place, Run};
use crate::starts::Starts;

/// The longest build-id that a table has room for.
pub(crate) const BUILD_ID: usize = 32;

/// Bytes that a patch replaces: one `jmp rel32`.
const PATCHED: u64 = 5;
/// Bytes of a site: the replaced instruction and the `syscall` behind it, which stays.
const SITE: u64 = 7;

/// `mov 8(%rsp),%r9`, the last step of libc's `syscall()` before it enters the kernel.
const LOAD_SIXTH_ARGUMENT: [u8; 5] = [0x4c, 0x8b, 0x4c, 0x24, 0x08];
/// `mov imm32,%eax`.
const LOAD_NUMBER: u8 = 0xb8;

/// Byte pairs that every instruction which enters the kernel contains: `syscall`, `sysenter`, `int 0x80`.
const PAIRS: [[u8; 2]; 3] = [SYSCALL, [0x0f, 0x34], [0xcd, 0x80]];
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// How far from a site a branch with one byte of displacement can be.
const REACH: u64 = 160;

/// What a site asks of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SiteKind {
    /// `mov eax, NUMBER; syscall`, and every path to the `syscall` sets this number.
    Number(u32),
    /// libc's `syscall()`: any number, known only at the moment of the call.
    Generic,
}

/// One place where the object enters the kernel with a call that can change mappings, or executes a program.
///
/// It is seven bytes long: five that are one instruction, and `0f 05`. It can be patched by a `jmp rel32` over the
/// first five; control returns at `vaddr + 7`. It has been checked that an instruction starts at `vaddr`, that no
/// direct branch and no function symbol leads into the bytes behind it, and that no other number reaches the `syscall`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Link-time virtual address of the first byte of the five-byte instruction.
    pub vaddr: u64,
    /// The call.
    pub kind: SiteKind,
    /// The site's bytes, for whoever patches them to compare with what is loaded.
    pub bytes: [u8; 7],
}

impl Site {
    /// Can the gate do without it?
    fn is_optional(&self) -> bool {
        matches!(self.kind, SiteKind::Number(number) if executes(number))
    }
}

/// Why a site that can change mappings cannot be patched.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Why {
    /// The number is not loaded by the five bytes before the `syscall`.
    NotContiguous {
        /// Numbers that reach the site.
        numbers: Vec<u32>,
    },
    /// A branch or a function symbol leads into the middle of the site.
    Entered {
        /// Link-time address that is entered.
        target: u64,
    },
    /// Decoding does not say whether the bytes are an instruction.
    Ambiguous,
    /// `sysenter` or `int 0x80`: the numbers of another table, with its own calling convention.
    LegacyEntry,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotContiguous { numbers } => {
                f.write_str("number not loaded right before the syscall:")?;
                numbers.iter().try_for_each(|number| match name(*number) {
                    Some(name) => write!(f, " {name}"),
                    None => write!(f, " {number}"),
                })
            }
            Self::Entered { target } => write!(f, "a branch leads into its middle, to {target:#x}"),
            Self::Ambiguous => f.write_str("cannot tell whether this is an instruction"),
            Self::LegacyEntry => f.write_str("sysenter or int 0x80"),
        }
    }
}

/// A site that can change mappings and cannot be patched. With one of these the gate is not complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusedSite {
    /// Offset of the instruction that enters the kernel, in the file.
    pub file_offset: u64,
    /// Its link-time address.
    pub vaddr: u64,
    /// What stands in the way.
    pub why: Why,
}

/// Where a `syscall` lies that is neither patched nor refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// Offset of the instruction in the file.
    pub file_offset: u64,
    /// Its link-time address.
    pub vaddr: u64,
}

/// Everything that decoding found in one object.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ObjectSites {
    /// The linker's build-id note, at most 32 bytes.
    pub build_id: Option<Vec<u8>>,
    /// `DT_SONAME`.
    pub soname: Option<String>,
    /// What can be patched, by address.
    pub sites: Vec<Site>,
    /// What should be patched and cannot.
    pub refused: Vec<RefusedSite>,
    /// Numbers known only at run time that are not `syscall()`: the broadcast of setxid, or the cancellation points of
    /// glibc from 2.41 on. For reports; what such code passes is settled by reading libc.
    pub unknown: Vec<Location>,
    /// Every `ioctl` outside the exported function of that name. Its request is libc's own choice (terminals), never
    /// the program's, so it is left alone. Always empty where the object exports no `ioctl`.
    pub own_ioctls: Vec<Location>,
}

/// Finds every system-call site of an x86-64 object whose number can change mappings.
///
/// # Errors
///
/// When the file is no x86-64 ELF file with section headers, or does not fit the table's limits.
pub fn sites(elf: &[u8]) -> Result<ObjectSites, ProofError> {
    let image = Image::parse(elf)?;
    let Headers { build_id, dynamic, .. } = Headers::read(elf)?;
    let code = image.code()?;
    let starts = image.starts(&code);
    if let Some(length) = build_id.as_ref().map(Vec::len).filter(|length| *length > BUILD_ID) {
        return Err(ProofError::BuildId { length });
    }
    let mut found = ObjectSites { build_id, soname: dynamic.soname, ..ObjectSites::default() };
    let ioctl = image.function("ioctl");
    for section in &code {
        search(section, &starts, ioctl.as_ref(), &mut found);
    }
    if let Some(site) = found.sites.iter().find(|site| u32::try_from(site.vaddr).is_err()) {
        return Err(ProofError::Address { vaddr: site.vaddr });
    }
    refuse_entered(&mut found, &code, &starts);
    found.refused.sort_unstable_by_key(|refused| refused.vaddr);
    Ok(found)
}

/// Sorts every byte pair of one section that could enter the kernel into what it is.
fn search(section: &Code<'_>, starts: &Starts, ioctl: Option<&Range<u64>>, found: &mut ObjectSites) {
    let mut last: Option<Run> = None;
    for (at, pair) in section.bytes.windows(2).enumerate().filter(|(_, pair)| PAIRS.iter().any(|known| pair == known)) {
        let address = section.address + at as u64;
        // A start between number and syscall (clone ends its unwind entry there) must not hide the number.
        let start = starts.at_or_before(address.saturating_sub(PATCHED)).unwrap_or(0).max(section.address);
        let run = match last.take() {
            Some(run) if run.entry == start && run.reaches(address) => run,
            _ => Run::decode(section, starts, start, address),
        };
        let trusted = run.whole && (starts.covers(address) || starts.covers(address.saturating_sub(PATCHED)));
        let place = run.place(address);
        let finding = match place {
            Place::Inside if trusted => Finding::Nothing,
            Place::Inside | Place::Broken => Finding::Refused(Why::Ambiguous),
            Place::Starts(_) if pair != SYSCALL => Finding::Refused(Why::LegacyEntry),
            Place::Starts(index) => match settle(section, &run, index, address, ioctl) {
                Finding::Patchable(site) if !trusted && site.is_optional() => Finding::Nothing,
                Finding::Patchable(_) if !trusted => Finding::Refused(Why::Ambiguous),
                settled => settled,
            },
        };
        last = Some(run);
        let file_offset = section.file_offset + at as u64;
        match finding {
            Finding::Nothing => {}
            Finding::Patchable(site) => found.sites.push(site),
            Finding::Refused(why) => found.refused.push(RefusedSite { file_offset, vaddr: address, why }),
            Finding::Unknown => found.unknown.push(Location { file_offset, vaddr: address }),
            Finding::OwnIoctl => found.own_ioctls.push(Location { file_offset, vaddr: address }),
        }
    }
}

/// What one byte pair turned out to be.
enum Finding {
    /// Part of another instruction, or a call that changes no mapping.
    Nothing,
    Patchable(Site),
    Refused(Why),
    Unknown,
    OwnIoctl,
}

/// Judges a `syscall` at `address`, the instruction `index` of its run.
fn settle(section: &Code<'_>, run: &Run, index: usize, address: u64, ioctl: Option<&Range<u64>>) -> Finding {
    let numbers = numbers_at(run, index);
    let none = |wanted: fn(u32) -> bool| numbers.as_ref().is_some_and(|numbers| !numbers.iter().copied().any(wanted));
    if none(takes_the_gate) {
        return Finding::Nothing;
    }
    let optional = none(changes_mappings);
    match settle_known(section, run, numbers, index, address, ioctl) {
        Finding::Refused(_) | Finding::Unknown if optional => Finding::Nothing,
        settled => settled,
    }
}

/// As [`settle`], of a call that the gate looks at.
fn settle_known(
    section: &Code<'_>,
    run: &Run,
    numbers: Option<BTreeSet<u32>>,
    index: usize,
    address: u64,
    ioctl: Option<&Range<u64>>,
) -> Finding {
    let only_ioctl = numbers.as_ref().is_some_and(|numbers| numbers.iter().all(|number| *number == IOCTL));
    if only_ioctl && ioctl.is_some_and(|function| !function.contains(&address)) {
        return Finding::OwnIoctl;
    }
    let vaddr = address.saturating_sub(PATCHED);
    let bytes: Option<[u8; SITE as usize]> = section.slice(vaddr, vaddr + SITE).and_then(|bytes| bytes.try_into().ok());
    // The five bytes must be one instruction, not the tail of a longer one that ends alike.
    let before = index.checked_sub(1).and_then(|before| run.code.get(before));
    let one_instruction = before.is_some_and(|before| before.ip() == vaddr && before.next_ip() == address);
    if let Some(bytes) = bytes.filter(|_| one_instruction) {
        if let [LOAD_NUMBER, a, b, c, d, ..] = bytes {
            let number = u32::from_le_bytes([a, b, c, d]);
            let alone = numbers.as_ref().is_some_and(|numbers| *numbers == BTreeSet::from([number]));
            if alone && takes_the_gate(number) {
                return Finding::Patchable(Site { vaddr, kind: SiteKind::Number(number), bytes });
            }
            if changes_mappings(number) {
                // Another number comes here by a jump over the constant.
                return Finding::Refused(Why::Entered { target: address });
            }
        } else if bytes.starts_with(&LOAD_SIXTH_ARGUMENT) {
            return Finding::Patchable(Site { vaddr, kind: SiteKind::Generic, bytes });
        }
    }
    numbers.map_or(Finding::Unknown, |numbers| {
        Finding::Refused(Why::NotContiguous { numbers: numbers.into_iter().collect() })
    })
}

/// Moves every site that a direct branch or a function symbol enters behind its first byte to the refused ones.
///
/// The search is over displacement bytes, not over decoded instructions, so no branch can be missed; only what it hits
/// is decoded, to leave out bytes that are no branch.
fn refuse_entered(found: &mut ObjectSites, code: &[Code<'_>], starts: &Starts) {
    found.sites.sort_unstable_by_key(|site| site.vaddr);
    let entries: Vec<u64> = found.sites.iter().map(|site| site.vaddr).collect();
    let first = entries.first().copied().unwrap_or(u64::MAX);
    // The address of the site that a target lies in, behind the first byte.
    let inside = |target: u64| {
        let index = entries.partition_point(|entry| *entry < target).checked_sub(1)?;
        entries.get(index).copied().filter(|entry| target < entry + SITE)
    };
    let mut entered: BTreeMap<u64, u64> = BTreeMap::new();
    for entry in entries.iter().filter(|entry| starts.function_within(*entry + 1, *entry + SITE)) {
        entered.insert(*entry, *entry + 1);
    }
    for section in code {
        let mut decoded = Decoded::new(section, starts);
        let mut note = |end: u64, target: u64| {
            if target > first
                && let Some(entry) = inside(target)
                && decoded.branches(end, target)
            {
                entered.insert(entry, target);
            }
        };
        // A displacement counts from the end of the instruction, and ends it: four bytes, or one that reaches 128.
        for (end, window) in (section.address + 4..).zip(section.bytes.windows(4)) {
            if let Ok(displacement) = window.try_into().map(i32::from_le_bytes) {
                note(end, end.wrapping_add_signed(i64::from(displacement)));
            }
        }
        for entry in entries.iter().filter(|entry| section.address <= **entry && **entry < section.end()) {
            let from = entry.saturating_sub(REACH).max(section.address);
            let near = section.slice(from, (entry + REACH).min(section.end())).unwrap_or_default();
            for (end, displacement) in (from + 1..).zip(near) {
                note(end, end.wrapping_add_signed(i64::from(displacement.cast_signed())));
            }
        }
    }
    for (entry, target) in entered {
        let Some(section) = code.iter().find(|section| section.address <= entry && entry < section.end()) else {
            continue;
        };
        let vaddr = entry + PATCHED;
        let file_offset = section.file_offset + (vaddr - section.address);
        if !found.sites.iter().any(|site| site.vaddr == entry && site.is_optional()) {
            found.refused.push(RefusedSite { file_offset, vaddr, why: Why::Entered { target } });
        }
        found.sites.retain(|site| site.vaddr != entry);
    }
}

#[cfg(test)]
#[path = "sites/tests.rs"]
mod tests;
