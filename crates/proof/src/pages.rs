//! The pages of an object's code, as they are in memory once it is loaded.

use object::elf;
use object::read::elf::ProgramHeader as _;

use crate::error::ProofError;
use crate::image::Image;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// A page of code, by its link-time address. `None` if no loaded part of the file has it.
///
/// # Errors
///
/// When the file is no x86-64 ELF file.
pub fn page(file: &[u8], vaddr: u64) -> Result<Option<[u8; PAGE]>, ProofError> {
    let image = Image::parse(file)?;
    let endian = image.file.endian();
    let loaded = |header: &&elf::ProgramHeader64<_>| header.p_type(endian) == elf::PT_LOAD;
    // The page that a part of the file begins in holds what is before it, too.
    let floor = |address: u64| address - address % PAGE as u64;
    let holds = |header: &&elf::ProgramHeader64<_>| {
        let start = header.p_vaddr(endian);
        header.p_flags(endian) & elf::PF_X != 0
            && floor(start) <= vaddr
            && vaddr < start.saturating_add(header.p_filesz(endian))
    };
    let Some(header) = image.file.elf_program_headers().iter().filter(loaded).find(holds) else { return Ok(None) };
    let offset = floor(header.p_offset(endian)).checked_add(vaddr - floor(header.p_vaddr(endian)));
    let bytes = offset.and_then(|offset| usize::try_from(offset).ok()).and_then(|offset| file.get(offset..));
    // What is behind the file's end reads as zeros.
    Ok(bytes.map(|bytes| {
        let mut page = [0; PAGE];
        page.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        page
    }))
}
