//! Equal pages of files: the same library in two container images lies in the page cache twice.
//!
//! Neither KSM nor the page store merges pages of files. Sharing the layer or the image does, so it is told apart what
//! that would be worth. Files are candidates when another file of the same name is mapped; of these the pages are read
//! that a process has mapped already, so that nothing comes into memory by being looked at.

use std::collections::{BTreeMap, HashMap, HashSet};

use kernel::{
    Bytes, Category, MemoryFile, Pagemap, PagemapEntry, Pid, Range, ScanRequest, Vaddr, Vma, maps, page_size,
};
use page::{Fingerprint, Secret, is_zero};
use serde::Serialize;

use crate::targets::Process;

/// Files that are named one by one.
const SHOWN: usize = 50;
/// Read at once.
const AT_ONCE: Bytes = Bytes::from_kib(256);

/// Equal pages of different files.
#[derive(Clone, Debug, Default, Serialize)]
pub struct FileDuplicates {
    /// Pages that are equal to one of another file with the same name, beyond the first.
    pub duplicate_pages: u64,
    /// The same in bytes: what sharing these files would save.
    pub bytes_saved: u64,
    /// By name, most first.
    pub names: Vec<FilesOfName>,
}

/// Files of one name.
#[derive(Clone, Debug, Serialize)]
pub struct FilesOfName {
    /// The name, without folders.
    pub name: String,
    /// Equal pages beyond the first.
    pub duplicate_pages: u64,
    /// The files: device, inode, a path and a process that has it mapped.
    pub files: Vec<FileSeen>,
}

/// A file, and who sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FileSeen {
    /// Device, as `major:minor` in hexadecimal.
    pub device: String,
    /// Inode.
    pub inode: u64,
    /// Path as that process sees it.
    pub path: String,
    /// A process that maps it.
    pub pid: i32,
    /// Its pages that were read.
    pub pages: u64,
}

type FileId = (u32, u32, u64);

/// Pages of one file that were read: content, and the page frame where it can be seen.
#[derive(Default)]
struct Pages {
    by_offset: BTreeMap<u64, (Fingerprint, Option<u64>)>,
    path: String,
    pid: i32,
}

/// Looks for files of one name and compares them.
pub(crate) fn files(processes: &[Process], secret: &Secret) -> FileDuplicates {
    let mapped: Vec<(i32, Vec<Vma>)> =
        processes.iter().map(|process| (process.pid, maps::read(Pid(process.pid)).unwrap_or_default())).collect();
    let mut names: HashMap<String, HashSet<FileId>> = HashMap::new();
    for vma in mapped.iter().flat_map(|(_, vmas)| vmas) {
        if let Some((name, id)) = file_of(vma) {
            names.entry(name).or_default().insert(id);
        }
    }
    names.retain(|_, ids| ids.len() > 1);
    let mut found: BTreeMap<&str, BTreeMap<FileId, Pages>> = BTreeMap::new();
    for (pid, vmas) in &mapped {
        let wanted: Vec<(&Vma, &str, FileId)> = vmas
            .iter()
            .filter_map(|vma| {
                let (name, id) = file_of(vma)?;
                let (name, _) = names.get_key_value(&name)?;
                Some((vma, name.as_str(), id))
            })
            .collect();
        if wanted.is_empty() {
            continue;
        }
        let (Ok(memory), Ok(pagemap)) = (MemoryFile::open(Pid(*pid)), Pagemap::open(Pid(*pid))) else { continue };
        for (vma, name, id) in wanted {
            let pages = found.entry(name).or_default().entry(id).or_default();
            if pages.path.is_empty() {
                pages.path = vma.name.to_string_lossy().into_owned();
                pages.pid = *pid;
            }
            read(vma, &memory, &pagemap, secret, pages);
        }
    }
    let mut duplicates = FileDuplicates::default();
    for (name, files) in found {
        let duplicate_pages = equal_pages(&files);
        if duplicate_pages == 0 {
            continue;
        }
        duplicates.duplicate_pages += duplicate_pages;
        let seen = |(id, pages): (FileId, Pages)| FileSeen {
            device: format!("{:x}:{:x}", id.0, id.1),
            inode: id.2,
            path: pages.path,
            pid: pages.pid,
            pages: pages.by_offset.len() as u64,
        };
        duplicates.names.push(FilesOfName {
            name: name.to_owned(),
            duplicate_pages,
            files: files.into_iter().map(seen).collect(),
        });
    }
    duplicates.bytes_saved = duplicates.duplicate_pages * page_size();
    duplicates.names.sort_by_key(|name| std::cmp::Reverse(name.duplicate_pages));
    duplicates.names.truncate(SHOWN);
    duplicates
}

/// Name and identity of a mapped file; `None` for memory files and devices.
fn file_of(vma: &Vma) -> Option<(String, FileId)> {
    let path = vma.name.to_string_lossy();
    let ordinary = vma.inode != 0 && vma.read && path.starts_with('/');
    let memory = ["/memfd:", "/dev/", "/SYSV", "/anon_hugepage"].iter().any(|start| path.starts_with(start));
    if !ordinary || memory {
        return None;
    }
    let name = path.trim_end_matches(" (deleted)").rsplit('/').next()?.to_owned();
    Some((name, (vma.dev_major, vma.dev_minor, vma.inode)))
}

/// Reads the file's pages that are mapped there, and that no other process has shown yet.
fn read(vma: &Vma, memory: &MemoryFile, pagemap: &Pagemap, secret: &Secret, pages: &mut Pages) {
    let both = Category::PRESENT | Category::FILE;
    let request = ScanRequest { mask: both, ..ScanRequest::default() };
    let mut regions = Vec::new();
    if pagemap.scan_all(vma.range, &request, &mut regions).is_err() {
        return;
    }
    let size = page_size();
    let mut buffer = vec![0; AT_ONCE.get() as usize];
    let mut entries = vec![PagemapEntry(0); (AT_ONCE.get() / size) as usize];
    for piece in regions.iter().flat_map(|region| region.range.pieces(AT_ONCE)) {
        let offset = |at: Vaddr| vma.offset + (at.get() - vma.range.start().get());
        if piece.page_addresses().all(|at| pages.by_offset.contains_key(&offset(at))) {
            continue;
        }
        let count = piece.pages().get() as usize;
        let known = pagemap.entries(piece.start(), &mut entries[..count]).unwrap_or(0);
        let Some(bytes) = read_piece(memory, piece, &mut buffer) else { continue };
        for ((at, page), entry) in piece.page_addresses().zip(bytes.chunks_exact(size as usize)).zip(&entries[..known])
        {
            if !is_zero(page) && entry.present() {
                pages.by_offset.entry(offset(at)).or_insert_with(|| (secret.fingerprint(page), entry.pfn()));
            }
        }
    }
}

fn read_piece<'a>(memory: &MemoryFile, piece: Range, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
    let buffer = &mut buffer[..piece.len().get() as usize];
    let read = memory.read(piece.start(), buffer).ok()?.bytes().get() as usize;
    Some(&buffer[..read])
}

/// Pages that another of these files has too, each content beyond its first page. One page frame is one page, under
/// however many inodes: layers that are shared already show each file system an inode of its own.
fn equal_pages(files: &BTreeMap<FileId, Pages>) -> u64 {
    // By content: files that have it, and frames that hold it.
    let mut by_content: HashMap<Fingerprint, (HashSet<FileId>, HashSet<u64>, bool)> = HashMap::new();
    for (id, pages) in files {
        for (content, frame) in pages.by_offset.values() {
            let (ids, frames, unseen) = by_content.entry(*content).or_default();
            ids.insert(*id);
            match frame {
                Some(frame) => {
                    frames.insert(*frame);
                }
                None => *unseen = true,
            }
        }
    }
    let copies = |(ids, frames, unseen): &(HashSet<FileId>, HashSet<u64>, bool)| {
        let files = ids.len() as u64 - 1;
        if *unseen { files } else { files.min(frames.len() as u64 - 1) }
    };
    by_content.values().map(copies).sum()
}
