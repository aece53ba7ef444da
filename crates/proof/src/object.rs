//! What decoding one file has shown, before anybody says what it means.
//!
//! These facts depend on the file alone, so they can be kept ([`Cache`](crate::Cache)); what is allowed is decided when
//! they are read, by lists that may have changed since.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};

use object::elf;
use object::read::{ReadCache, ReadRef};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, SymbolKind};
use serde::{Deserialize, Serialize};

use crate::error::ProofError;
use crate::headers::{Headers, Load};
use crate::image::Image;
use crate::scan::{Entry, Found, scan};
use crate::sites::sites;
use crate::text::{check_size, executable, joined};
use crate::verdict::{LIBC, LOADER, verdict};

/// Raised with every change of what the facts hold or how they are found.
pub(crate) const VERSION: u32 = 1;

/// The most sites that are kept of one file, those first that spoil it.
const KEPT: usize = 512;
/// No C library is longer than this.
const LONGEST_LIBC: u64 = 64 << 20;
/// No file is longer than this: the largest libraries have some 3 GiB, nearly all of them data.
const LONGEST: u64 = 16 << 30;

/// An instruction of a file that enters the kernel, or may be one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallSite {
    /// Link-time address.
    pub address: u64,
    /// Offset in the file.
    pub offset: u64,
    /// The function or the section that it lies in.
    pub place: String,
    /// The instruction.
    pub entry: Entry,
    /// All numbers that it can be given; none if some path to it does not tell.
    pub numbers: Vec<u32>,
    /// What `ioctl` or `prctl` is asked for there, if that is known.
    pub requests: Vec<u32>,
    /// Decoding does not say whether this is an instruction.
    pub ambiguous: bool,
}

/// What has been found in one file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// The linker's build-id note, in hexadecimal.
    pub build_id: Option<String>,
    /// `DT_SONAME`.
    pub soname: Option<String>,
    /// It is an ELF file for this machine.
    pub is_image: bool,
    /// What it calls code, in whole pages: from and to, in bytes of the file.
    pub mapped: Vec<(u64, u64)>,
    /// Bytes of code that were looked at.
    pub code_bytes: u64,
    /// Ways into the kernel. Of the C library and the loader there are none here: see `gate`.
    pub sites: Vec<CallSite>,
    /// Sites beyond those that are kept.
    pub more_sites: u64,
    /// The C library or its loader, and why the gate cannot be patched into it; nothing if it can.
    pub gate: Option<Vec<String>>,
    /// What spoils the file beside its sites, or keeps it from being judged.
    pub spoilt: Vec<String>,
}

/// What a file is and needs to run, beside its facts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    pub(crate) interpreter: Option<String>,
    pub(crate) needed: Vec<String>,
    pub(crate) rpath: Option<String>,
    pub(crate) runpath: Option<String>,
    pub(crate) no_default: bool,
    pub(crate) broken: bool,
    pub(crate) soname: Option<String>,
    /// It is a program, also if it has no loader.
    pub(crate) is_program: bool,
}

impl Facts {
    /// Decodes a file. What is wrong with it is part of the answer.
    #[must_use]
    pub fn of(file: &File) -> Self {
        let mut facts = Self::default();
        if let Err(error) = facts.read(file) {
            facts.spoilt.push(chain(&error));
        }
        facts
    }

    fn read(&mut self, file: &File) -> Result<(), ProofError> {
        check_file(file)?;
        let cache = ReadCache::new(file);
        let headers = Headers::read(&cache)?;
        self.build_id = headers.build_id.as_deref().map(hexadecimal);
        self.soname.clone_from(&headers.dynamic.soname);
        if !matches!(headers.kind, elf::ET_EXEC | elf::ET_DYN) {
            return Err(ProofError::NotLoadable);
        }
        self.is_image = true;
        self.mapped = pages(&headers.loads);
        check_size(&cache, &headers)?;
        if matches!(headers.dynamic.soname.as_deref(), Some(LIBC | LOADER)) {
            return self.judge_gate(file);
        }
        if headers.executable_stack {
            self.spoilt.push("asks for an executable stack, where anything may be run".to_owned());
        }
        if headers.loads.iter().any(|load| load.executable && load.writable) {
            self.spoilt.push("has code that it may write to".to_owned());
        }
        if headers.dynamic.text_relocations {
            self.spoilt.push("has relocations that change its code when it is loaded".to_owned());
        }
        let image = Image::parse(&cache)?;
        let parts = executable(&image, &headers, &cache)?;
        self.code_bytes = parts.iter().map(|part| part.bytes.len() as u64).sum();
        let mut found = scan(&parts, || image.starts(&parts))?;
        found.sort_by_key(|found| (!spoils(found), found.address));
        self.more_sites = found.len().saturating_sub(KEPT) as u64;
        found.truncate(KEPT);
        self.sites = named(&image, found);
        Ok(())
    }

    /// The C library and the loader are patched: every site must be one that the gate can take.
    fn judge_gate(&mut self, mut file: &File) -> Result<(), ProofError> {
        let length = file.metadata().map_err(ProofError::Read)?.len();
        if length > LONGEST_LIBC {
            return Err(ProofError::TooBig { what: "C library" });
        }
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0)).map_err(ProofError::Read)?;
        file.take(LONGEST_LIBC).read_to_end(&mut bytes).map_err(ProofError::Read)?;
        self.gate = Some(verdict(&sites(&bytes)?).err().unwrap_or_default());
        Ok(())
    }
}

impl Needs {
    /// Reads what a file needs.
    pub(crate) fn of(file: &File) -> Result<Self, ProofError> {
        check_file(file)?;
        let Headers { interpreter, dynamic, kind, entry, .. } = Headers::read(&ReadCache::new(file))?;
        let alone = dynamic.needed.is_empty() && dynamic.soname.is_none() && entry != 0;
        Ok(Self {
            is_program: interpreter.is_some() || kind == elf::ET_EXEC || alone,
            interpreter,
            needed: dynamic.needed,
            rpath: dynamic.rpath,
            runpath: dynamic.runpath,
            no_default: dynamic.no_default,
            broken: dynamic.broken,
            soname: dynamic.soname,
        })
    }
}

/// The pages of the file that the kernel maps for executable segments; of neighbours it makes one mapping.
fn pages(loads: &[Load]) -> Vec<(u64, u64)> {
    let page = rustix::param::page_size() as u64;
    let of_load = |load: &Load| {
        let end = load.file_offset.saturating_add(load.file_size);
        load.file_offset / page * page..end.checked_next_multiple_of(page).unwrap_or(end)
    };
    let mut ranges: Vec<_> = loads.iter().filter(|load| load.executable).map(of_load).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    joined(ranges).into_iter().map(|range| (range.start, range.end)).collect()
}

/// Only files that end: a FIFO or a device may have no end or wait for ever.
fn check_file(file: &File) -> Result<(), ProofError> {
    let about = file.metadata().map_err(ProofError::Read)?;
    if !about.is_file() {
        return Err(ProofError::Read(io::Error::other("it is no regular file")));
    }
    if about.len() > LONGEST {
        return Err(ProofError::TooBig { what: "length of the file" });
    }
    Ok(())
}

/// Does a site keep a file from being clean or benign? Those are listed first.
fn spoils(found: &Found) -> bool {
    let numbers = found.numbers.as_ref();
    found.ambiguous
        || found.entry != Entry::Syscall
        || !numbers.is_some_and(|numbers| numbers.iter().all(|number| crate::why_harmless(*number).is_some()))
}

/// Says of each site in which function it lies, else in which section.
fn named<'a, R: ReadRef<'a>>(image: &Image<'a, R>, found: Vec<Found>) -> Vec<CallSite> {
    let mut places = vec![None; found.len()];
    let mut order: Vec<(u64, usize)> = found.iter().map(|found| found.address).zip(0..).collect();
    order.sort_unstable();
    // One walk over the symbols, of which there may be a million.
    for symbol in image.file.symbols().chain(image.file.dynamic_symbols()) {
        if symbol.kind() != SymbolKind::Text || !symbol.is_definition() || order.is_empty() {
            continue;
        }
        let (begin, end) = (symbol.address(), symbol.address().saturating_add(symbol.size().max(1)));
        let first = order.partition_point(|(address, _)| *address < begin);
        for (_, index) in order.iter().skip(first).take_while(|(address, _)| *address < end) {
            let Some(place) = places.get_mut(*index) else { continue };
            // The innermost symbol is the one that starts last.
            if place.as_ref().is_none_or(|(other, _)| *other < begin) {
                *place = Some((begin, symbol));
            }
        }
    }
    let function = |address: u64, (begin, symbol): (u64, object::read::elf::ElfSymbol64<'a, '_, _, R>)| {
        let name = symbol.name_bytes().map(String::from_utf8_lossy).unwrap_or_default();
        format!("{}+{:#x}", shortened(&name), address - begin)
    };
    let section = |address: u64| {
        let holds = |section: &object::read::elf::ElfSection64<'a, '_, object::Endianness, R>| {
            section.address() <= address && address - section.address() < section.size()
        };
        let name = image.file.sections().find(holds).and_then(|section| section.name().ok().map(str::to_owned));
        name.map_or_else(|| "no section".to_owned(), |name| shortened(&name))
    };
    let sites = found.into_iter().zip(places).map(|(found, place)| CallSite {
        address: found.address,
        offset: found.file_offset,
        place: place.map_or_else(|| section(found.address), |place| function(found.address, place)),
        entry: found.entry,
        numbers: found.numbers.unwrap_or_default().into_iter().collect(),
        requests: found.requests.unwrap_or_default().into_iter().collect(),
        ambiguous: found.ambiguous,
    });
    sites.collect()
}

/// Names in hostile files, and mangled ones, may be of any length, and hold what a terminal takes for orders.
fn shortened(name: &str) -> String {
    name.chars().take(80).map(|letter| if letter.is_control() { '?' } else { letter }).collect()
}

pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    let digit = |half: u8| char::from_digit(half.into(), 16).unwrap_or('?');
    bytes.iter().take(64).flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
