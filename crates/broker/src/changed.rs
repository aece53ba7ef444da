//! The pages of libc and the loader as they are when their sites lead to the gate, behind the table of these sites: made
//! once, for all processes that have their trampolines at [`DISTANCE`]. See [`abi::jump`].

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use abi::jump::{DISTANCE, jump, room};
use proof::table::{ANY_NUMBER, CHANGED_PAGES};
use proof::{ObjectSites, PAGE, ProofError, SiteKind};

/// An object, and the bytes of its file.
pub(crate) type Read = (ObjectSites, Vec<u8>);

/// The table of sites, and the changed pages behind it.
///
/// # Errors
/// If a file is none that can be loaded.
pub(crate) fn table_with_pages(objects: &[Read]) -> Result<Vec<u8>, ProofError> {
    let mut table = proof::encode(objects.iter().map(|(sites, _)| sites));
    table.resize(table.len().next_multiple_of(PAGE), 0);
    let first = u32::try_from(table.len() / PAGE).expect("a table has a few hundred sites");
    table[CHANGED_PAGES].copy_from_slice(&first.to_le_bytes());
    for (sites, file) in objects {
        match changed_pages(sites, file)? {
            Some(pages) => table.extend(pages.into_values().flatten()),
            // Then there are none for anybody: which are whose could not be told.
            None => {
                table[CHANGED_PAGES].fill(0);
                break;
            }
        }
    }
    Ok(table)
}

/// The pages that an object's sites lie in, by their address. `None` if a trampoline is out of reach.
fn changed_pages(object: &ObjectSites, file: &[u8]) -> Result<Option<BTreeMap<u64, [u8; PAGE]>>, ProofError> {
    let mut pages = BTreeMap::new();
    let mut trampoline = DISTANCE;
    for site in &object.sites {
        let Some(bytes) = jump(site.vaddr, trampoline) else { return Ok(None) };
        trampoline += match site.kind {
            SiteKind::Number(number) => room(number),
            SiteKind::Generic => room(ANY_NUMBER),
        };
        for (address, byte) in (site.vaddr..).zip(bytes) {
            let inside = address % PAGE as u64;
            let start = address - inside;
            let page = match pages.entry(start) {
                Entry::Occupied(there) => there.into_mut(),
                Entry::Vacant(none) => match proof::page(file, start)? {
                    Some(page) => none.insert(page),
                    None => return Ok(None),
                },
            };
            page[inside as usize] = byte;
        }
    }
    Ok(Some(pages))
}
