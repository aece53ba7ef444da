//! The executable bytes of a file, as the kernel maps them: by segments, and within them by sections.
//!
//! A segment may hold more than code: programs linked without separate code have their constants in it. What a section
//! header calls neither executable nor empty is such data, and is left out. What no section covers (headers, padding,
//! everything in a file without section headers) is looked at as if it were code.

use std::ops::Range;

use object::elf::{self, FileHeader64};
use object::read::ReadRef;
use object::read::elf::{FileHeader, SectionHeader};
use object::{Endianness, Object};

use crate::error::ProofError;
use crate::headers::Headers;
use crate::image::{Code, Image, check_extent};

/// The most executable bytes that are looked at in one file; the largest browsers have half of it.
pub(crate) const LARGEST: u64 = 512 << 20;
/// The largest table that is read beside them.
const TABLE: u64 = 256 << 20;

/// Refuses a file whose tables would take more memory than any real file's, before anything is read.
///
/// `object` believes section headers and reads what they say.
pub(crate) fn check_size<'a, R: ReadRef<'a>>(data: R, headers: &Headers) -> Result<(), ProofError> {
    let code = headers.loads.iter().filter(|load| load.executable).try_fold(0_u64, |sum, load| {
        check_extent(load.address, load.memory_size.max(load.file_size))?;
        Ok::<u64, ProofError>(sum.saturating_add(load.file_size))
    })?;
    if code > LARGEST {
        return Err(ProofError::TooBig { what: "code" });
    }
    let header = FileHeader64::<Endianness>::parse(data)?;
    let endian = header.endian()?;
    // With more than 65279 sections their number stands in the first of them. Only object files have so many.
    if header.e_shoff(endian) != 0 && header.e_shnum(endian) == 0 {
        return Err(ProofError::TooBig { what: "number of sections" });
    }
    let sections = header.sections(endian, data)?;
    let (mut tables, mut unwinder) = (0_u64, 0_u64);
    for section in sections.iter() {
        let size = section.sh_size(endian);
        if matches!(section.sh_type(endian), elf::SHT_SYMTAB | elf::SHT_DYNSYM | elf::SHT_NOTE | elf::SHT_SYMTAB_SHNDX)
        {
            tables = tables.saturating_add(size);
        }
        if sections.section_name(endian, section).is_ok_and(|name| name == b".eh_frame") {
            unwinder = unwinder.saturating_add(size);
        }
    }
    if tables > TABLE {
        return Err(ProofError::TooBig { what: "symbol table" });
    }
    if unwinder > TABLE {
        return Err(ProofError::TooBig { what: "unwind table" });
    }
    Ok(())
}

/// The parts of the executable segments that may hold code, by address within each segment.
pub(crate) fn executable<'a, R: ReadRef<'a>>(
    image: &Image<'a, R>,
    headers: &Headers,
    data: R,
) -> Result<Vec<Code<'a>>, ProofError> {
    let endian = image.file.endian();
    let mut parts = Vec::new();
    for load in headers.loads.iter().filter(|load| load.executable && load.file_size > 0) {
        let bytes = data
            .read_bytes_at(load.file_offset, load.file_size)
            .map_err(|()| ProofError::Outside { what: "executable segment" })?;
        let (mut code, mut constants) = (Vec::new(), Vec::new());
        for section in image.file.sections() {
            let header = section.elf_section_header();
            let flags = header.sh_flags(endian);
            let held = flags & u64::from(elf::SHF_ALLOC) != 0 && header.sh_type(endian) != elf::SHT_NOBITS;
            // A header that disagrees with the segment about where its bytes are does not describe it.
            let shift = header.sh_offset(endian).wrapping_sub(load.file_offset);
            if !held || header.sh_addr(endian).wrapping_sub(load.address) != shift || shift >= load.file_size {
                continue;
            }
            let range = shift..shift.saturating_add(header.sh_size(endian)).min(load.file_size);
            let list = if flags & u64::from(elf::SHF_EXECINSTR) != 0 { &mut code } else { &mut constants };
            list.push(range);
        }
        for range in divide(code, constants, load.file_size) {
            let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
            let Some(bytes) = bytes.get(at(range.start)..at(range.end)) else { continue };
            parts.push(Code {
                address: load.address + range.start,
                file_offset: load.file_offset + range.start,
                bytes,
            });
        }
    }
    Ok(parts)
}

/// Cuts `0..length` at the borders of code, and takes constants out where no code claims them too.
fn divide(mut code: Vec<Range<u64>>, mut constants: Vec<Range<u64>>, length: u64) -> Vec<Range<u64>> {
    for list in [&mut code, &mut constants] {
        list.retain(|range| !range.is_empty());
        list.sort_unstable_by_key(|range| range.start);
    }
    let constants = joined(constants);
    let mut parts = Vec::new();
    let mut at = 0;
    for range in code.iter().cloned().chain(std::iter::once(length..length)) {
        without(at..range.start, &constants, &mut parts);
        let begin = range.start.max(at);
        if begin < range.end {
            parts.push(begin..range.end);
        }
        at = at.max(range.end);
    }
    parts
}

/// The same bytes, with no range over another.
pub(crate) fn joined(sorted: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in sorted {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// What is left of a gap between two pieces of code.
fn without(gap: Range<u64>, constants: &[Range<u64>], parts: &mut Vec<Range<u64>>) {
    if gap.is_empty() {
        return;
    }
    let mut at = gap.start;
    for range in constants.iter().skip(constants.partition_point(|range| range.end <= gap.start)) {
        if range.start >= gap.end {
            break;
        }
        if range.start > at {
            parts.push(at..range.start);
        }
        at = at.max(range.end);
    }
    if at < gap.end {
        parts.push(at..gap.end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Ranges = [(u64, u64)];

    fn divided(code: &Ranges, constants: &Ranges, length: u64) -> Vec<(u64, u64)> {
        let ranges = |list: &Ranges| list.iter().map(|(from, to)| *from..*to).collect();
        divide(ranges(code), ranges(constants), length).into_iter().map(|range| (range.start, range.end)).collect()
    }

    #[test]
    fn constants_are_left_out_and_gaps_are_not() {
        assert_eq!(divided(&[], &[], 9), [(0, 9)]);
        assert_eq!(divided(&[(4, 6)], &[(1, 3)], 9), [(0, 1), (3, 4), (4, 6), (6, 9)]);
        assert_eq!(divided(&[(4, 6), (6, 7)], &[(0, 4)], 7), [(4, 6), (6, 7)]);
        // What is called both is code.
        assert_eq!(divided(&[(2, 4)], &[(0, 9)], 9), [(2, 4)]);
        assert_eq!(divided(&[(2, 8), (3, 5), (4, 9)], &[], 9), [(0, 2), (2, 8), (8, 9)]);
        assert_eq!(divided(&[], &[(0, 2), (1, 5), (3, 4)], 6), [(5, 6)]);
    }
}
