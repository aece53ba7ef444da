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
    let mut trampoline = 0_u64.wrapping_sub(DISTANCE);
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use std::collections::BTreeSet;

    /// Where the trampoline of a jump at an address lies, by the jump's bytes.
    fn target(jump: &[u8], from: u64) -> Option<u64> {
        let [0xe9, distance @ ..] = jump else { return None };
        let distance = i32::from_le_bytes(distance.try_into().ok()?);
        Some((from + jump.len() as u64).wrapping_add_signed(distance.into()))
    }

    #[test]
    fn changed_pages_are_the_file_s_but_for_jumps() {
        let objects = crate::image::host_objects().unwrap();
        let table = table_with_pages(&objects).unwrap();
        let plain = proof::encode(objects.iter().map(|(sites, _)| sites));
        assert_eq!(table[..CHANGED_PAGES.start], plain[..CHANGED_PAGES.start]);
        assert_eq!(table[CHANGED_PAGES.end..plain.len()], plain[CHANGED_PAGES.end..]);
        let first = u32::from_le_bytes(table[CHANGED_PAGES].try_into().unwrap()) as usize;
        assert_eq!(first, plain.len().div_ceil(PAGE));
        let mut pages = table.chunks(PAGE).skip(first);
        for (object, file) in &objects {
            let page_of = |address: u64| address - address % PAGE as u64;
            let ends = object.sites.iter().flat_map(|site| [site.vaddr, site.vaddr + 4]);
            let mut now: Vec<(u64, u8)> = Vec::new();
            for start in ends.map(page_of).collect::<BTreeSet<u64>>() {
                let before = proof::page(file, start).unwrap().unwrap();
                let after = pages.next().expect("each page that a site touches is there");
                for (address, (before, after)) in (start..).zip(before.iter().zip(after)) {
                    let inside = object.sites.iter().any(|site| (site.vaddr..site.vaddr + 5).contains(&address));
                    assert!(inside || before == after, "{address:#x}");
                    now.push((address, *after));
                }
            }
            let rooms: Vec<u64> = object
                .sites
                .iter()
                .map(|site| {
                    let at = now.binary_search_by_key(&site.vaddr, |(address, _)| *address).unwrap();
                    let jump: Vec<u8> = now[at..at + 5].iter().map(|(_, byte)| *byte).collect();
                    target(&jump, site.vaddr).unwrap()
                })
                .collect();
            assert_eq!(rooms.first(), Some(&0_u64.wrapping_sub(DISTANCE)));
            assert!(rooms.windows(2).all(|pair| pair[0] < pair[1] && pair[1] - pair[0] <= 144), "{rooms:?}");
        }
        assert!(pages.next().is_none());
    }
}
