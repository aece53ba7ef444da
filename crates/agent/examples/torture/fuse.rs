//! A file system in user space with one file, `content`, whose reads go directly into the reader's pages
//! (linux/fuse.h). It runs in a process of its own: one that holds /dev/fuse is left alone by the broker.

use std::ffi::CString;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;

use crate::arena::{COMMON, PAGE, content};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const BATCH_FORGET: u32 = 42;
const HEADER: usize = 40;
const ROOT: u64 = 1;
const FILE: u64 = 2;
const DIRECT_IO: u32 = 1;

fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

fn attributes(node: u64) -> Vec<u8> {
    let size = if node == ROOT { 0 } else { COMMON * PAGE as u64 };
    let mode = if node == ROOT { 0o040_755 } else { 0o100_644_u32 };
    let mut bytes = words(&[node, size, size / 512, 0, 0, 0]);
    for value in [0, 0, 0, mode, 1, 0, 0, 0, PAGE as u32, 0] {
        bytes.extend(value.to_ne_bytes());
    }
    bytes
}

/// Mounts over a folder and serves until it is unmounted.
pub(crate) fn serve(folder: &str) {
    let mut device = match std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(device) => device,
        Err(error) => return println!("no FUSE: {error}"),
    };
    let options = CString::new(format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd())).unwrap();
    let target = CString::new(folder).unwrap();
    // SAFETY: all strings end with a zero byte.
    let mounted =
        unsafe { libc::mount(c"content".as_ptr(), target.as_ptr(), c"fuse".as_ptr(), 0, options.as_ptr().cast()) };
    if mounted != 0 {
        return println!("no FUSE: {}", std::io::Error::last_os_error());
    }
    println!("mounted");
    let file: Vec<u8> = (0..COMMON).flat_map(content).collect();
    let mut request = vec![0_u8; 1 << 18];
    while let Ok(length) = device.read(&mut request) {
        let short = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap());
        if length < HEADER {
            return;
        }
        let (operation, unique, node) = (short(4), long(8), long(16));
        let answer: Result<Vec<u8>, i32> = match operation {
            INIT => {
                let mut bytes = Vec::new();
                for value in [7_u32, 31, 0, 0, 0, 4096] {
                    bytes.extend(value.to_ne_bytes());
                }
                bytes.resize(64, 0);
                Ok(bytes)
            }
            LOOKUP if node == ROOT && request[HEADER..length].starts_with(b"content\0") => {
                let mut bytes = words(&[FILE, 0, 1 << 20, 1 << 20, 0]);
                bytes.extend(attributes(FILE));
                Ok(bytes)
            }
            LOOKUP => Err(-libc::ENOENT),
            GETATTR => {
                let mut bytes = words(&[1 << 20, 0]);
                bytes.extend(attributes(node));
                Ok(bytes)
            }
            OPEN => {
                let mut bytes = words(&[0]);
                bytes.extend(DIRECT_IO.to_ne_bytes());
                bytes.extend(0_u32.to_ne_bytes());
                Ok(bytes)
            }
            READ => {
                let from = (long(HEADER + 8) as usize).min(file.len());
                let to = (from + short(HEADER + 16) as usize).min(file.len());
                Ok(file[from..to].to_vec())
            }
            RELEASE | FLUSH => Ok(Vec::new()),
            FORGET | BATCH_FORGET => continue,
            _ => Err(-libc::ENOSYS),
        };
        let (error, body) = match answer {
            Ok(body) => (0, body),
            Err(error) => (error, Vec::new()),
        };
        let mut packet = ((16 + body.len()) as u32).to_ne_bytes().to_vec();
        packet.extend(error.to_ne_bytes());
        packet.extend(unique.to_ne_bytes());
        packet.extend(body);
        let _ = device.write(&packet);
    }
}
