//! Mappings of segments, and which mappings a segment may take the place of.

use kernel::{Vma, VmaUse};

/// The name of every segment's memory file.
pub(crate) const FILE_NAME: &str = "pagefold";

/// A private mapping of a segment: memory files of this name that only brokers make. A program that names its own so is
/// refused by the gate's marks.
#[must_use]
pub fn is_segment(vma: &Vma) -> bool {
    let file = vma.name.as_encoded_bytes().strip_prefix(b"/memfd:");
    !vma.shared && vma.inode != 0 && file.is_some_and(|name| name.starts_with(FILE_NAME.as_bytes()))
}

/// Why a mapping must be left alone, or `None`: what it has that a private mapping of a segment in its place could not
/// keep. The word is one that reports use.
#[must_use]
pub fn refuses(vma: &VmaUse) -> Option<&'static str> {
    let flags = &vma.flags;
    match () {
        () if flags.hugetlb() => Some("hugetlb"),
        () if vma.vma.shared => Some("shared"),
        () if vma.vma.is_special() || flags.io() || flags.pfnmap() || flags.mixedmap() => Some("device"),
        () if vma.vma.inode != 0 && !is_segment(&vma.vma) => Some("file"),
        () if flags.growsdown() => Some("stack"),
        () if !vma.vma.read || !vma.vma.write => Some("protection"),
        () if flags.locked() => Some("locked"),
        () if flags.wipeonfork() => Some("wipe_on_fork"),
        () if flags.sealed() => Some("sealed"),
        () if flags.shadow_stack() => Some("special"),
        () if flags.tagged() => Some("tagged"),
        () if flags.contains(*b"dp") => Some("droppable"),
        // Whatever is mapped anew has none, and what the key forbids could be done there.
        () if vma.protection_key != 0 => Some("protection_key"),
        () => None,
    }
}
