//! Where instructions start, and what is code for certain: symbols, unwind tables, headers.

use std::collections::HashMap;

use gimli::{BaseAddresses, CieOrFde, CommonInformationEntry, EhFrame, EndianSlice, LittleEndian, UnwindSection};
use object::read::ReadRef;
use object::read::elf::ElfFile64;
use object::{Endianness, Object, ObjectSection, ObjectSymbol, SymbolKind};

use crate::image::Code;

/// Where instructions start, for certain.
#[derive(Default)]
pub(crate) struct Starts {
    /// Sorted, without repeats: function symbols, starts of unwind entries, section starts, the entry point.
    known: Vec<u64>,
    /// All of `known`, and where unwind entries end: what follows there is not part of them.
    boundaries: Vec<u64>,
    /// Function symbols alone: places that code elsewhere jumps to.
    functions: Vec<u64>,
    /// Ranges that unwind entries or sized symbols declare to be code, sorted.
    covered: Vec<(u64, u64)>,
}

impl Starts {
    /// Reads them off a file. Tables that cannot be read are passed over: fewer starts make verdicts stricter.
    pub(crate) fn read<'a, R: ReadRef<'a>>(file: &ElfFile64<'a, Endianness, R>, code: &[Code<'_>]) -> Self {
        let mut starts = Self::default();
        starts.known.push(file.entry());
        starts.known.extend(code.iter().map(|section| section.address));
        for symbol in file.symbols().chain(file.dynamic_symbols()) {
            if symbol.kind() != SymbolKind::Text || !symbol.is_definition() {
                continue;
            }
            starts.known.push(symbol.address());
            starts.functions.push(symbol.address());
            if symbol.size() > 0 {
                starts.covered.push((symbol.address(), symbol.address().saturating_add(symbol.size())));
            }
        }
        starts.frames(file);
        starts.finish();
        starts
    }

    /// Starts and extents of the unwind entries: all that a stripped library tells about its local functions.
    fn frames<'a, R: ReadRef<'a>>(&mut self, file: &ElfFile64<'a, Endianness, R>) {
        let Some(section) = file.section_by_name(".eh_frame") else { return };
        let Ok(bytes) = section.data() else { return };
        let text = file.section_by_name(".text").map_or(0, |text| text.address());
        let frame = EhFrame::new(bytes, LittleEndian);
        let bases = BaseAddresses::default().set_eh_frame(section.address()).set_text(text);
        let mut entries = frame.entries(&bases);
        // One header is shared by many entries, and may be as long as a hostile file likes.
        let mut headers: HashMap<usize, CommonInformationEntry<EndianSlice<'_, LittleEndian>>> = HashMap::new();
        // A damaged table ends the list early: fewer starts make the verdict stricter, never looser.
        while let Ok(Some(entry)) = entries.next() {
            let CieOrFde::Fde(partial) = entry else { continue };
            let parsed = partial.parse(|_, bases, offset| match headers.get(&offset.0) {
                Some(header) => Ok(header.clone()),
                None => {
                    let header = frame.cie_from_offset(bases, offset)?;
                    headers.insert(offset.0, header.clone());
                    Ok(header)
                }
            });
            let Ok(fde) = parsed else { continue };
            // The entry of a signal trampoline starts one byte before it, for the unwinder looks up return addresses
            // minus one and nothing called the trampoline.
            let begin = fde.initial_address().saturating_add(u64::from(fde.is_signal_trampoline()));
            let end = fde.initial_address().saturating_add(fde.len());
            self.known.push(begin);
            self.boundaries.push(end);
            self.covered.push((begin, end));
        }
    }

    /// The last known start at or before an address.
    pub(crate) fn at_or_before(&self, address: u64) -> Option<u64> {
        last_at_or_before(&self.known, address)
    }

    /// The first known start behind an address.
    pub(crate) fn after(&self, address: u64) -> Option<u64> {
        self.known.get(self.known.partition_point(|start| *start <= address)).copied()
    }

    /// The last known start or end of an unwind entry at or before an address.
    pub(crate) fn boundary_at_or_before(&self, address: u64) -> Option<u64> {
        last_at_or_before(&self.boundaries, address)
    }

    /// The first known start or end of an unwind entry behind an address.
    pub(crate) fn boundary_after(&self, address: u64) -> Option<u64> {
        self.boundaries.get(self.boundaries.partition_point(|start| *start <= address)).copied()
    }

    /// Is this the start of something that code elsewhere may call or jump to?
    pub(crate) fn is_known(&self, address: u64) -> bool {
        self.known.binary_search(&address).is_ok()
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
            starts.boundaries.push(*end);
            starts.covered.push((*begin, *end));
        }
        starts.finish();
        starts
    }

    fn finish(&mut self) {
        self.boundaries.extend_from_slice(&self.known);
        for list in [&mut self.known, &mut self.boundaries, &mut self.functions] {
            list.sort_unstable();
            list.dedup();
        }
        self.covered.sort_unstable();
        self.covered.dedup();
    }
}

fn last_at_or_before(list: &[u64], address: u64) -> Option<u64> {
    let after = list.partition_point(|start| *start <= address);
    after.checked_sub(1).and_then(|index| list.get(index)).copied()
}
