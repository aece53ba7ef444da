//! The kernel's own description of its structures, /sys/kernel/btf/vmlinux (Documentation/bpf/btf.rst): just enough of
//! it to find the size of a structure and where its members lie.

use std::io;

use thiserror::Error;

/// Where the running kernel's description is.
pub(super) const VMLINUX: &str = "/sys/kernel/btf/vmlinux";

const MAGIC: u16 = 0xeb9f;
const KIND_INT: u32 = 1;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_VAR: u32 = 14;
const KIND_DATASEC: u32 = 15;
const KIND_DECL_TAG: u32 = 17;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;
const KIND_LAST: u32 = 19;

/// Why the description is of no use.
#[derive(Debug, Error)]
pub(super) enum BtfError {
    #[error("cannot read {VMLINUX}")]
    Read(#[from] io::Error),
    #[error("the kernel's type information is malformed at byte {at}")]
    Malformed { at: usize },
    #[error("the kernel's type information has no {name}")]
    Missing { name: String },
}

/// One description with an index by type number.
pub(super) struct Btf {
    bytes: Vec<u8>,
    strings: std::ops::Range<usize>,
    /// Byte offset of each type; number 0 is void and has none.
    types: Vec<u32>,
}

struct Type {
    at: usize,
    name: u32,
    kind: u32,
    members: usize,
    bitfields: bool,
    /// Size of a structure, or number of the type behind a typedef or qualifier.
    size_or_type: u32,
}

impl Btf {
    pub(super) fn vmlinux() -> Result<Self, BtfError> {
        Self::parse(std::fs::read(VMLINUX)?)
    }

    pub(super) fn parse(bytes: Vec<u8>) -> Result<Self, BtfError> {
        let bad = |at| BtfError::Malformed { at };
        let word = |at: usize| word_at(&bytes, at).ok_or(bad(at));
        let magic = bytes.get(..2).ok_or(bad(0))?;
        if u16::from_ne_bytes([magic[0], magic[1]]) != MAGIC {
            return Err(bad(0));
        }
        let header = word(4)? as usize;
        let section = |at: usize| -> Result<std::ops::Range<usize>, BtfError> {
            let start = header.checked_add(word(at)? as usize).ok_or(bad(at))?;
            let end = start.checked_add(word(at + 4)? as usize).ok_or(bad(at))?;
            if end > bytes.len() { Err(bad(at)) } else { Ok(start..end) }
        };
        let (all, strings) = (section(8)?, section(16)?);
        let mut types = vec![0];
        let mut at = all.start;
        while at < all.end {
            types.push(u32::try_from(at).map_err(|_too_large| bad(at))?);
            let info = word(at + 4)?;
            at += 12 + tail(info >> 24 & 0x1f, (info & 0xffff) as usize).ok_or(bad(at))?;
        }
        if at != all.end {
            return Err(bad(at));
        }
        Ok(Self { bytes, strings, types })
    }

    /// Size of a structure in bytes.
    pub(super) fn size_of(&self, name: &str) -> Result<u64, BtfError> {
        Ok(self.structure(name)?.size_or_type.into())
    }

    /// Byte offset of a member, also one inside nameless structures and unions.
    pub(super) fn offset_of(&self, name: &str, member: &str) -> Result<u64, BtfError> {
        let structure = self.structure(name)?;
        let bits = self.member(&structure, member, 0).ok_or_else(|| missing(&format!("{name}.{member}")))?;
        if bits % 8 != 0 { Err(missing(&format!("{name}.{member} at a byte"))) } else { Ok(u64::from(bits / 8)) }
    }

    fn structure(&self, name: &str) -> Result<Type, BtfError> {
        (1..self.types.len())
            .filter_map(|number| self.get(number as u32))
            .find(|found| found.kind == KIND_STRUCT && found.members > 0 && self.name(found.name) == name.as_bytes())
            .ok_or_else(|| missing(name))
    }

    fn get(&self, number: u32) -> Option<Type> {
        let at = *self.types.get(number as usize)? as usize;
        if at == 0 {
            return None;
        }
        let info = word_at(&self.bytes, at + 4)?;
        Some(Type {
            at,
            name: word_at(&self.bytes, at)?,
            kind: info >> 24 & 0x1f,
            members: (info & 0xffff) as usize,
            bitfields: info >> 31 != 0,
            size_or_type: word_at(&self.bytes, at + 8)?,
        })
    }

    fn name(&self, offset: u32) -> &[u8] {
        let strings = &self.bytes[self.strings.clone()];
        let rest = strings.get(offset as usize..).unwrap_or_default();
        rest.split(|byte| *byte == 0).next().unwrap_or_default()
    }

    /// Bit offset of a member. `depth` bounds what a malformed description could make us do.
    fn member(&self, within: &Type, wanted: &str, depth: u32) -> Option<u32> {
        if depth > 8 {
            return None;
        }
        (0..within.members).find_map(|index| {
            let at = within.at + 12 + index * 12;
            let name = word_at(&self.bytes, at)?;
            let raw = word_at(&self.bytes, at + 8)?;
            let offset = if within.bitfields { raw & 0xff_ffff } else { raw };
            if self.name(name) == wanted.as_bytes() {
                return Some(offset);
            }
            if !self.name(name).is_empty() {
                return None;
            }
            let inner = self.resolve(word_at(&self.bytes, at + 4)?)?;
            if !matches!(inner.kind, KIND_STRUCT | KIND_UNION) {
                return None;
            }
            offset.checked_add(self.member(&inner, wanted, depth + 1)?)
        })
    }

    /// The type behind typedefs and qualifiers.
    fn resolve(&self, mut number: u32) -> Option<Type> {
        for _ in 0..16 {
            let found = self.get(number)?;
            match found.kind {
                KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG => {
                    number = found.size_or_type;
                }
                _ => return Some(found),
            }
        }
        None
    }
}

fn missing(name: &str) -> BtfError {
    BtfError::Missing { name: name.to_owned() }
}

fn word_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(word.try_into().ok()?))
}

/// Bytes that follow the three words of a type; `None` for a kind that this build does not know.
fn tail(kind: u32, count: usize) -> Option<usize> {
    Some(match kind {
        KIND_INT | KIND_VAR | KIND_DECL_TAG => 4,
        KIND_ARRAY => 12,
        KIND_STRUCT | KIND_UNION | KIND_DATASEC | KIND_ENUM64 => count * 12,
        KIND_ENUM | KIND_FUNC_PROTO => count * 8,
        1..=KIND_LAST => 0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    /// `struct page { unsigned long flags; union { int _refcount; }; }`, the way the kernel writes it.
    fn small() -> Vec<u8> {
        let strings = b"\0page\0flags\0_refcount\0int\0";
        let types: Vec<u32> = vec![
            22,
            KIND_INT << 24,
            4,
            32, // 1: int
            0,
            KIND_UNION << 24 | 1,
            4,
            12,
            1,
            0, // 2: union { int _refcount; }
            1,
            KIND_STRUCT << 24 | 2,
            16,
            6,
            1,
            0,
            0,
            2,
            64, // 3: struct page
        ];
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut out = MAGIC.to_ne_bytes().to_vec();
        out.extend([1, 0]);
        for word in [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32] {
            out.extend(word.to_ne_bytes());
        }
        out.extend(types);
        out.extend(strings);
        out
    }

    #[test]
    fn a_member_inside_a_nameless_union() {
        let btf = Btf::parse(small()).unwrap();
        assert_eq!(btf.size_of("page").unwrap(), 16);
        assert_eq!(btf.offset_of("page", "_refcount").unwrap(), 8);
        assert!(matches!(btf.offset_of("page", "nothing"), Err(BtfError::Missing { .. })));
        assert!(matches!(btf.size_of("int"), Err(BtfError::Missing { .. })));
    }

    #[test]
    fn damaged_descriptions_are_refused_and_never_panic() {
        let good = small();
        for cut in 0..good.len() {
            let _ = Btf::parse(good[..cut].to_vec()).map(|btf| btf.offset_of("page", "_refcount"));
        }
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = Btf::parse(bad).map(|btf| btf.offset_of("page", "_refcount"));
            }
        }
        assert!(matches!(Btf::parse(vec![0; 64]), Err(BtfError::Malformed { at: 0 })));
    }

    #[test]
    fn the_running_kernels_page() {
        let Ok(btf) = Btf::vmlinux() else {
            println!("skipped: {VMLINUX}");
            return;
        };
        let size = btf.size_of("page").unwrap();
        let offset = btf.offset_of("page", "_refcount").unwrap();
        assert!(size.is_multiple_of(8) && offset + 4 <= size, "{offset} of {size}");
    }
}
