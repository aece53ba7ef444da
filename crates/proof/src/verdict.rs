//! Is the list of an object's sites one that the gate can rely on?

use crate::numbers::{IOCTL, name};
use crate::sites::{ObjectSites, SiteKind};

/// `DT_SONAME` of glibc's C library.
pub(crate) const LIBC: &str = "libc.so.6";
/// `DT_SONAME` of glibc's loader for x86-64.
pub(crate) const LOADER: &str = "ld-linux-x86-64.so.2";

/// What a C library cannot do without, and so must be among its sites.
const LIBC_HAS: [u32; 7] = [9, 10, 11, 12, IOCTL, 25, 28];
/// What a loader cannot do without.
const LOADER_HAS: [u32; 3] = [9, 10, 11];

const CLONE: u32 = 56;
const CLONE3: u32 = 435;

/// Says whether every call of this libc or loader that can change mappings passes a site that can be patched.
///
/// A site that cannot be patched, or a call that was expected and not found, means that the search has not understood
/// this build, and then nothing is merged in a process that runs it.
///
/// # Errors
///
/// The reasons, one a line, for people.
pub fn verdict(object: &ObjectSites) -> Result<(), Vec<String>> {
    let mut reasons = Vec::new();
    let count = |number| object.sites.iter().filter(|site| site.kind == SiteKind::Number(number)).count();
    let mut require = |library: &str, wanted: &[u32]| {
        for number in wanted.iter().filter(|number| count(**number) == 0) {
            reasons.push(format!("unknown {library}: no site of {}", name(*number).unwrap_or("a call")));
        }
    };
    match object.soname.as_deref() {
        Some(LIBC) => {
            require("libc", &LIBC_HAS);
            if count(CLONE) < 2 && count(CLONE3) == 0 {
                reasons.push("unknown libc: neither two sites of clone nor one of clone3".to_owned());
            }
            if !object.sites.iter().any(|site| site.kind == SiteKind::Generic) {
                reasons.push("unknown libc: no site of syscall()".to_owned());
            }
        }
        Some(LOADER) => require("loader", &LOADER_HAS),
        Some(other) => reasons.push(format!("{other} is neither glibc nor its loader")),
        None => reasons.push("an object without a name is neither glibc nor its loader".to_owned()),
    }
    reasons
        .extend(object.refused.iter().map(|site| format!("site at {:#x} cannot be patched: {}", site.vaddr, site.why)));
    if reasons.is_empty() { Ok(()) } else { Err(reasons) }
}
