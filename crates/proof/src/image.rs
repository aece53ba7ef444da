//! What the search needs from an ELF file: its executable code, its names.

use std::ops::Range;

use object::elf;
use object::read::ReadRef;
use object::read::elf::{ElfFile64, FileHeader, SectionHeader};
use object::{Endianness, Object, ObjectSection, ObjectSymbol, SymbolKind};

use crate::error::ProofError;
use crate::starts::Starts;

/// One executable section.
pub(crate) struct Code<'a> {
    /// Link-time address of the first byte.
    pub(crate) address: u64,
    /// Offset of the first byte in the file.
    pub(crate) file_offset: u64,
    pub(crate) bytes: &'a [u8],
}

impl Code<'_> {
    /// Link-time address behind the last byte.
    pub(crate) fn end(&self) -> u64 {
        self.address + self.bytes.len() as u64
    }

    /// The bytes from one link-time address to another, if the section holds them all.
    pub(crate) fn slice(&self, from: u64, to: u64) -> Option<&[u8]> {
        let from = usize::try_from(from.checked_sub(self.address)?).ok()?;
        let to = usize::try_from(to.checked_sub(self.address)?).ok()?;
        self.bytes.get(from..to)
    }
}

/// No user address is this high, and below it sums of addresses and lengths never overflow.
const HIGHEST: u64 = 1 << 48;

/// Could a stretch of memory lie at this address?
pub(crate) fn check_extent(address: u64, length: u64) -> Result<(), ProofError> {
    match address.checked_add(length) {
        Some(end) if end <= HIGHEST => Ok(()),
        _ => Err(ProofError::Extent { address, length }),
    }
}

/// An x86-64 ELF file.
pub(crate) struct Image<'a, R: ReadRef<'a> = &'a [u8]> {
    pub(crate) file: ElfFile64<'a, Endianness, R>,
}

impl<'a, R: ReadRef<'a>> Image<'a, R> {
    pub(crate) fn parse(data: R) -> Result<Self, ProofError> {
        let file = ElfFile64::<Endianness, R>::parse(data)?;
        let machine = file.elf_header().e_machine(file.endian());
        if machine != elf::EM_X86_64 {
            return Err(ProofError::Machine { machine });
        }
        Ok(Self { file })
    }

    /// The executable sections that have bytes in the file.
    pub(crate) fn code(&self) -> Result<Vec<Code<'a>>, ProofError> {
        let endian = self.file.endian();
        let mut code = Vec::new();
        for section in self.file.sections() {
            let header = section.elf_section_header();
            let executable = header.sh_flags(endian) & u64::from(elf::SHF_EXECINSTR) != 0;
            if !executable || header.sh_type(endian) == elf::SHT_NOBITS {
                continue;
            }
            let bytes = section.data()?;
            check_extent(section.address(), bytes.len() as u64)?;
            code.push(Code { address: section.address(), file_offset: header.sh_offset(endian), bytes });
        }
        if code.is_empty() { Err(ProofError::NoCode) } else { Ok(code) }
    }

    pub(crate) fn starts(&self, code: &[Code<'_>]) -> Starts {
        Starts::read(&self.file, code)
    }

    /// The extent of an exported function.
    pub(crate) fn function(&self, name: &str) -> Option<Range<u64>> {
        let symbol = self
            .file
            .dynamic_symbols()
            .find(|symbol| symbol.kind() == SymbolKind::Text && symbol.is_definition() && symbol.name() == Ok(name))?;
        Some(symbol.address()..symbol.address().saturating_add(symbol.size()))
    }
}
