//! What the search needs from an ELF file: executable sections, and addresses where instructions are known to start.

use std::ops::Range;

use gimli::{BaseAddresses, CieOrFde, EhFrame, LittleEndian, UnwindSection};
use object::elf;
use object::read::elf::{Dyn, ElfFile64, FileHeader, SectionHeader};
use object::{Endianness, Object, ObjectSection, ObjectSymbol, SymbolKind};

use crate::error::ProofError;

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

/// Where instructions start, for certain.
#[derive(Default)]
pub(crate) struct Starts {
    /// Sorted, without repeats: function symbols, starts of unwind entries, section starts, the entry point.
    known: Vec<u64>,
    /// Function symbols alone: places that code elsewhere jumps to.
    functions: Vec<u64>,
    /// Ranges that unwind entries or sized symbols declare to be code, sorted.
    covered: Vec<(u64, u64)>,
}

impl Starts {
    /// The last known start at or before an address.
    pub(crate) fn at_or_before(&self, address: u64) -> Option<u64> {
        let after = self.known.partition_point(|start| *start <= address);
        after.checked_sub(1).and_then(|index| self.known.get(index)).copied()
    }

    /// The first known start behind an address.
    pub(crate) fn after(&self, address: u64) -> Option<u64> {
        self.known.get(self.known.partition_point(|start| *start <= address)).copied()
    }

    /// Does a function symbol name an address in `from..to`?
    pub(crate) fn function_within(&self, from: u64, to: u64) -> bool {
        let first = self.functions.partition_point(|start| *start < from);
        self.functions.get(first).is_some_and(|start| *start < to)
    }

    /// Does an unwind entry or a symbol vouch that the byte at this address belongs to code?
    pub(crate) fn covers(&self, address: u64) -> bool {
        let after = self.covered.partition_point(|range| range.0 <= address);
        // Entries nest (a symbol around several frames), so the innermost is not always the one that reaches here.
        self.covered.iter().take(after).rev().take(4).any(|range| address < range.1)
    }

    #[cfg(test)]
    pub(crate) fn of_functions(functions: &[(u64, u64)]) -> Self {
        let mut starts = Self::default();
        for (begin, end) in functions {
            starts.known.push(*begin);
            starts.functions.push(*begin);
            starts.covered.push((*begin, *end));
        }
        starts.finish();
        starts
    }

    fn finish(&mut self) {
        for list in [&mut self.known, &mut self.functions] {
            list.sort_unstable();
            list.dedup();
        }
        self.covered.sort_unstable();
        self.covered.dedup();
    }
}

/// An x86-64 ELF file.
pub(crate) struct Image<'a> {
    file: ElfFile64<'a, Endianness>,
    data: &'a [u8],
}

impl<'a> Image<'a> {
    pub(crate) fn parse(data: &'a [u8]) -> Result<Self, ProofError> {
        let file = ElfFile64::<Endianness>::parse(data)?;
        let machine = file.elf_header().e_machine(file.endian());
        if machine != elf::EM_X86_64 {
            return Err(ProofError::Machine { machine });
        }
        Ok(Self { file, data })
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
            code.push(Code {
                address: section.address(),
                file_offset: header.sh_offset(endian),
                bytes: section.data()?,
            });
        }
        if code.is_empty() { Err(ProofError::NoCode) } else { Ok(code) }
    }

    pub(crate) fn starts(&self, code: &[Code<'_>]) -> Starts {
        let mut starts = Starts::default();
        starts.known.push(self.file.entry());
        starts.known.extend(code.iter().map(|section| section.address));
        for symbol in self.file.symbols().chain(self.file.dynamic_symbols()) {
            if symbol.kind() != SymbolKind::Text || !symbol.is_definition() {
                continue;
            }
            starts.known.push(symbol.address());
            starts.functions.push(symbol.address());
            if symbol.size() > 0 {
                starts.covered.push((symbol.address(), symbol.address() + symbol.size()));
            }
        }
        self.frames(&mut starts);
        starts.finish();
        starts
    }

    /// The extent of an exported function.
    pub(crate) fn function(&self, name: &str) -> Option<Range<u64>> {
        let symbol = self
            .file
            .dynamic_symbols()
            .find(|symbol| symbol.kind() == SymbolKind::Text && symbol.is_definition() && symbol.name() == Ok(name))?;
        Some(symbol.address()..symbol.address() + symbol.size())
    }

    /// Starts and extents of the unwind entries: all that a stripped library tells about its local functions.
    fn frames(&self, starts: &mut Starts) {
        let Some(section) = self.file.section_by_name(".eh_frame") else { return };
        let Ok(bytes) = section.data() else { return };
        let text = self.file.section_by_name(".text").map_or(0, |text| text.address());
        let frame = EhFrame::new(bytes, LittleEndian);
        let bases = BaseAddresses::default().set_eh_frame(section.address()).set_text(text);
        let mut entries = frame.entries(&bases);
        // A damaged table ends the list early: fewer starts make the verdict stricter, never looser.
        while let Ok(Some(entry)) = entries.next() {
            let CieOrFde::Fde(partial) = entry else { continue };
            let Ok(fde) = partial.parse(|_, bases, offset| frame.cie_from_offset(bases, offset)) else {
                continue;
            };
            // The entry of a signal trampoline starts one byte before it, for the unwinder looks up return addresses
            // minus one and nothing called the trampoline.
            let begin = fde.initial_address() + u64::from(fde.is_signal_trampoline());
            starts.known.push(begin);
            starts.covered.push((begin, fde.initial_address() + fde.len()));
        }
    }

    pub(crate) fn build_id(&self) -> Result<Option<&'a [u8]>, ProofError> {
        Ok(self.file.build_id()?)
    }

    /// `DT_SONAME`, the name that others link against.
    pub(crate) fn soname(&self) -> Option<String> {
        let endian = self.file.endian();
        let sections = self.file.elf_section_table();
        let (entries, link) = sections.dynamic(endian, self.data).ok()??;
        let strings = sections.strings(endian, self.data, link).ok()?;
        let entry = entries.iter().find(|entry| entry.tag32(endian) == Some(elf::DT_SONAME))?;
        let name = entry.string(endian, strings).ok()?;
        Some(String::from_utf8_lossy(name).into_owned())
    }
}
