//! What the loader reads of an ELF file, by segments alone: section headers are not needed to run and may say anything.

use object::Endianness;
use object::elf::{self, FileHeader64, ProgramHeader64};
use object::read::ReadRef;
use object::read::elf::{Dyn, FileHeader, ProgramHeader};

use crate::error::ProofError;

/// More entries of the dynamic section, more bytes of a note, more program headers than any program has.
const DYNAMIC: u64 = 1 << 20;
const NOTE: u64 = 1 << 16;
const SEGMENTS: usize = 1 << 10;
/// As many libraries as one object may name.
const NEEDED: usize = 1 << 10;

/// One `PT_LOAD`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) address: u64,
    pub(crate) file_offset: u64,
    pub(crate) file_size: u64,
    pub(crate) memory_size: u64,
    pub(crate) executable: bool,
    pub(crate) writable: bool,
}

/// The program headers, and the dynamic section.
#[derive(Debug, Default)]
pub(crate) struct Headers {
    /// `e_type`: `ET_EXEC` or `ET_DYN` for what can be loaded.
    pub(crate) kind: u16,
    /// `e_entry`.
    pub(crate) entry: u64,
    pub(crate) loads: Vec<Load>,
    /// `PT_INTERP`.
    pub(crate) interpreter: Option<String>,
    pub(crate) build_id: Option<Vec<u8>>,
    /// `PT_GNU_STACK` asks for an executable stack. An object without that header gets one as well, from the loader.
    pub(crate) executable_stack: bool,
    pub(crate) dynamic: Dynamic,
}

/// The dynamic section.
#[derive(Debug, Default)]
pub(crate) struct Dynamic {
    /// `DT_SONAME`.
    pub(crate) soname: Option<String>,
    /// `DT_NEEDED`, filters and auditors: what the loader brings in for it.
    pub(crate) needed: Vec<String>,
    /// `DT_RPATH`, which counts only without a `DT_RUNPATH`.
    pub(crate) rpath: Option<String>,
    /// `DT_RUNPATH`.
    pub(crate) runpath: Option<String>,
    /// `DF_1_NODEFLIB`: neither the cache's default folders nor these themselves are searched.
    pub(crate) no_default: bool,
    /// Relocations change code while it is loaded.
    pub(crate) text_relocations: bool,
    /// A name that cannot be read.
    pub(crate) broken: bool,
}

impl Headers {
    /// Reads them off a file for x86-64.
    pub(crate) fn read<'a, R: ReadRef<'a>>(data: R) -> Result<Self, ProofError> {
        let header = FileHeader64::<Endianness>::parse(data)?;
        let endian = header.endian()?;
        if header.e_machine(endian) != elf::EM_X86_64 {
            return Err(ProofError::Machine { machine: header.e_machine(endian) });
        }
        // PN_XNUM: the number stands in a section. No loader reads that.
        if usize::from(header.e_phnum(endian)) > SEGMENTS {
            return Err(ProofError::TooBig { what: "number of segments" });
        }
        let segments = header.program_headers(endian, data)?;
        let mut headers = Self {
            kind: header.e_type(endian),
            entry: header.e_entry(endian),
            executable_stack: true,
            ..Self::default()
        };
        for segment in segments {
            headers.segment(segment, endian, data)?;
        }
        if let Some(segment) = segments.iter().find(|segment| segment.p_type(endian) == elf::PT_DYNAMIC) {
            headers.dynamic = headers.entries(segment, endian, data)?;
        }
        Ok(headers)
    }

    fn segment<'a, R: ReadRef<'a>>(
        &mut self,
        segment: &ProgramHeader64<Endianness>,
        endian: Endianness,
        data: R,
    ) -> Result<(), ProofError> {
        let flags = segment.p_flags(endian);
        let (file_offset, file_size) = segment.file_range(endian);
        match segment.p_type(endian) {
            elf::PT_LOAD => self.loads.push(Load {
                address: segment.p_vaddr(endian),
                file_offset,
                file_size,
                memory_size: segment.p_memsz(endian),
                executable: flags & elf::PF_X != 0,
                writable: flags & elf::PF_W != 0,
            }),
            elf::PT_GNU_STACK => self.executable_stack = flags & elf::PF_X != 0,
            elf::PT_INTERP if file_size <= NOTE => {
                self.interpreter = segment.interpreter(endian, data)?.map(text);
            }
            elf::PT_NOTE if file_size <= NOTE && self.build_id.is_none() => {
                let Some(mut notes) = segment.notes(endian, data)? else { return Ok(()) };
                while let Ok(Some(note)) = notes.next() {
                    if note.name() == elf::ELF_NOTE_GNU && note.n_type(endian) == elf::NT_GNU_BUILD_ID {
                        self.build_id = Some(note.desc().to_vec());
                        break;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn entries<'a, R: ReadRef<'a>>(
        &self,
        segment: &ProgramHeader64<Endianness>,
        endian: Endianness,
        data: R,
    ) -> Result<Dynamic, ProofError> {
        if segment.file_range(endian).1 > DYNAMIC {
            return Err(ProofError::TooBig { what: "dynamic section" });
        }
        let entries = segment.dynamic(endian, data)?.unwrap_or_default();
        let ends = |tag: u64| tag == u64::from(elf::DT_NULL);
        let entries = || entries.iter().map(|entry| (entry.d_tag(endian), entry.d_val(endian)));
        let entries = || entries().take_while(move |(tag, _)| !ends(*tag));
        let of = |wanted: u32| entries().find(|(tag, _)| *tag == u64::from(wanted)).map(|(_, value)| value);
        let mut dynamic = Dynamic::default();
        let table = of(elf::DT_STRTAB).and_then(|address| self.file_offset(address));
        let length = of(elf::DT_STRSZ).unwrap_or(0);
        let mut broken = false;
        let mut name = |value: u64| {
            let name = table.and_then(|table| {
                let from = table.checked_add(value).filter(|_| value < length)?;
                data.read_bytes_at_until(from..table.checked_add(length)?, 0).ok()
            });
            broken |= name.is_none();
            name.map(text)
        };
        for (tag, value) in entries() {
            let Ok(tag) = u32::try_from(tag) else { continue };
            match tag {
                elf::DT_NEEDED | elf::DT_FILTER | elf::DT_AUXILIARY | elf::DT_AUDIT | elf::DT_DEPAUDIT => {
                    if dynamic.needed.len() == NEEDED {
                        return Err(ProofError::TooBig { what: "number of needed libraries" });
                    }
                    dynamic.needed.extend(name(value));
                }
                elf::DT_SONAME => dynamic.soname = name(value),
                elf::DT_RPATH => dynamic.rpath = name(value),
                elf::DT_RUNPATH => dynamic.runpath = name(value),
                elf::DT_TEXTREL => dynamic.text_relocations = true,
                elf::DT_FLAGS => dynamic.text_relocations |= value & u64::from(elf::DF_TEXTREL) != 0,
                elf::DT_FLAGS_1 => dynamic.no_default = value & u64::from(elf::DF_1_NODEFLIB) != 0,
                _ => {}
            }
        }
        dynamic.broken = broken;
        Ok(dynamic)
    }

    /// Where the byte at a link-time address lies in the file.
    fn file_offset(&self, address: u64) -> Option<u64> {
        let load = self.loads.iter().find(|load| load.address <= address && address - load.address < load.file_size)?;
        load.file_offset.checked_add(address - load.address)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
