//! The sites of several objects as one flat table, for the agent to read without allocating.
//!
//! Everything is little-endian and every record a multiple of eight bytes long, so that all of them are aligned when
//! the table is. There are no gaps but the named padding, which is zero.
//!
//! ```text
//! header, 16 bytes
//!    0  [u8; 8]  magic, "PFSITES1"
//!    8  u32      number of objects
//!   12  u32      page of the file from which on its changed pages lie; 0: it has none
//! then for each object
//!   header, 40 bytes
//!      0  u8       length of the build-id in bytes; 0: the object has none
//!      1  [u8; 32] build-id, padded with zeroes
//!     33  [u8; 3]  padding
//!     36  u32      number of sites
//!   then for each site, by ascending address, 16 bytes
//!      0  u32      link-time address of the first byte of the five-byte instruction
//!      4  u32      system-call number; 0xffff_ffff: any, `syscall()`
//!      8  [u8; 7]  the bytes of the site as they are in the file
//!     15  u8       padding
//! ```
//!
//! The changed pages are those that the sites lie in, with a jump in the place of the first five bytes of each: object by
//! object, by ascending address.

use std::ops::Range;

use crate::sites::{BUILD_ID, ObjectSites, SiteKind};

/// The first eight bytes of a table.
pub const MAGIC: [u8; 8] = *b"PFSITES1";
/// What a file with a table is called that lies beside the agent's image.
pub const FILE_NAME: &str = "sites";
/// Where the header says from which page of the file on the changed pages lie.
pub const CHANGED_PAGES: Range<usize> = 12..16;
/// Bytes before the first object.
pub const HEADER_SIZE: usize = 16;
/// Bytes of an object before its first site.
pub const OBJECT_SIZE: usize = 40;
/// Bytes of a site.
pub const SITE_SIZE: usize = 16;
/// The number of a site that takes any: [`SiteKind::Generic`].
pub const ANY_NUMBER: u32 = 0xffff_ffff;

/// Packs the sites of objects into one table, in the order given. Refused and unknown sites are not in it.
///
/// The argument must come from [`sites`](crate::sites()), which refuses what does not fit here: a build-id is cut to 32
/// bytes, an address to 32 bits.
#[must_use]
pub fn encode<'o>(objects: impl IntoIterator<Item = &'o ObjectSites>) -> Vec<u8> {
    let objects: Vec<&ObjectSites> = objects.into_iter().collect();
    let sites: usize = objects.iter().map(|object| object.sites.len()).sum();
    let mut table = Vec::with_capacity(HEADER_SIZE + OBJECT_SIZE * objects.len() + SITE_SIZE * sites);
    table.extend(MAGIC);
    table.extend(count(objects.len()));
    table.extend([0; 4]);
    for object in objects {
        let id = object.build_id.as_deref().unwrap_or_default();
        let length = id.len().min(BUILD_ID);
        let mut padded = [0; BUILD_ID];
        padded.iter_mut().zip(id).for_each(|(to, from)| *to = *from);
        table.extend(u8::try_from(length).expect("a build-id has at most 32 bytes").to_le_bytes());
        table.extend(padded);
        table.extend([0; 3]);
        table.extend(count(object.sites.len()));
        for site in &object.sites {
            let number = match site.kind {
                SiteKind::Number(number) => number,
                SiteKind::Generic => ANY_NUMBER,
            };
            table.extend(u32::try_from(site.vaddr & 0xffff_ffff).expect("masked to 32 bits").to_le_bytes());
            table.extend(number.to_le_bytes());
            table.extend(site.bytes);
            table.push(0);
        }
    }
    table
}

fn count(of: usize) -> [u8; 4] {
    u32::try_from(of).expect("an object of 4 GiB has fewer than 2^32 sites").to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sites::Site;

    #[test]
    fn every_field_lies_where_the_format_says() {
        let site = |vaddr, kind| Site { vaddr, kind, bytes: [1, 2, 3, 4, 5, 6, 7] };
        let objects = [
            ObjectSites {
                build_id: Some(vec![0xab; 20]),
                sites: vec![site(0x1000, SiteKind::Number(9)), site(0x2000, SiteKind::Generic)],
                ..ObjectSites::default()
            },
            ObjectSites { sites: vec![site(0x3000, SiteKind::Number(11))], ..ObjectSites::default() },
        ];
        let mut expected = b"PFSITES1\x02\0\0\0\0\0\0\0".to_vec();
        expected.push(20);
        expected.extend([0xab; 20]);
        expected.extend([0; 12 + 3]);
        expected.extend([2, 0, 0, 0]);
        expected.extend([0, 0x10, 0, 0, 9, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0]);
        expected.extend([0, 0x20, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4, 5, 6, 7, 0]);
        expected.extend([0; 36]);
        expected.extend([1, 0, 0, 0]);
        expected.extend([0, 0x30, 0, 0, 11, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 0]);
        assert_eq!(encode(&objects), expected);
        assert_eq!(expected.len(), HEADER_SIZE + 2 * OBJECT_SIZE + 3 * SITE_SIZE);
    }
}
