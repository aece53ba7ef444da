//! Measures what the choices in this crate rest on: how a store segment is best filled from another process, and what
//! an exact reference count costs.
//!
//! `cargo run --release -p pagefold-kernel --example speed`

use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pagefold_kernel::refcheck::BpfCheck;
use pagefold_kernel::{BatchReader, Bytes, PageCount, Pagemap, Pid, Range, Vaddr, maps, memfd, page_size, remote};
use rustix::mm::{MapFlags, ProtFlags};

const SEGMENT: Bytes = Bytes::from_mib(1);
const MEMORY: Bytes = Bytes::from_mib(256);

fn main() -> Result<(), Box<dyn Error>> {
    // A process with memory to read: this program again, which fills some and waits for its standard input to close.
    if std::env::args().nth(1).as_deref() == Some("hold") {
        let memory: Vec<u8> = (0..MEMORY.0).map(|index| (index >> 12) as u8).collect();
        println!("{:x}", memory.as_ptr().addr());
        let mut line = String::new();
        std::io::stdin().read_line(&mut line)?;
        std::hint::black_box(memory);
        return Ok(());
    }
    let mut holder =
        Command::new(std::env::current_exe()?).arg("hold").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(holder.stdout.take().ok_or("no output")?), &mut line)?;
    let pid = Pid(holder.id().cast_signed());
    let address = Vaddr(u64::from_str_radix(line.trim(), 16)?);
    let held = maps::read(pid)?.into_iter().find(|vma| vma.range.contains(address)).ok_or("no memory")?.range;
    let segments: Vec<Range> = held.pieces(SEGMENT).filter(|piece| piece.len() == SEGMENT).collect();
    println!("{} segments of {} bytes", segments.len(), SEGMENT);

    let mut reader = BatchReader::new();
    rate("read only", &segments, |segment| {
        reader.read(pid, &[segment], |_, bytes| {
            std::hint::black_box(bytes);
        })?;
        Ok(())
    })?;
    for kib in [64, 128, 256, 512, 1024] {
        let mut buffer = vec![0; kib * 1024];
        rate(&format!("create, fill through {kib} KiB, seal"), &segments, |segment| {
            let fd = memfd::create("speed", SEGMENT)?;
            memfd::fill_from_remote(fd.as_fd(), 0, pid, &[segment], &mut buffer)?;
            Ok(memfd::seal(fd.as_fd())?)
        })?;
    }
    for (name, flags) in [("", MapFlags::empty()), (", populated", MapFlags::POPULATE)] {
        rate(&format!("create, fill through a shared mapping{name}, seal"), &segments, |segment| {
            let fd = memfd::create("speed", SEGMENT)?;
            fill_mapped(&fd, pid, segment, flags)?;
            Ok(memfd::seal(fd.as_fd())?)
        })?;
    }
    rate("create and seal only", &segments, |_| {
        let fd = memfd::create("speed", SEGMENT)?;
        Ok(memfd::seal(fd.as_fd())?)
    })?;

    match BpfCheck::new() {
        Err(error) => println!("no exact reference counts: {error}"),
        Ok(mut check) => {
            let pagemap = Pagemap::open(pid)?;
            for pages in [1, 16, 64, 256, 512] {
                let mut counts = vec![0; pages];
                let mut pfns = vec![0; pages];
                for (index, pfn) in pfns.iter_mut().enumerate() {
                    let at = held.start() + PageCount(index as u64 + 1);
                    *pfn = pagemap.entry(at)?.pfn().ok_or("no frame")?;
                }
                let start = Instant::now();
                let rounds = 20_000;
                for _ in 0..rounds {
                    check.refs(&pfns, &mut counts)?;
                }
                let bare = micros(start.elapsed()) / f64::from(rounds) / pages as f64;
                let start = Instant::now();
                for _ in 0..rounds {
                    check.refs_at(&pagemap, held.start() + PageCount(1), &mut counts)?;
                }
                let whole = micros(start.elapsed()) / f64::from(rounds) / pages as f64;
                println!("references of {pages} pages: {bare:.3} us/page, with pagemap {whole:.3} us/page");
            }
        }
    }
    drop(holder.stdin.take());
    holder.wait()?;
    Ok(())
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Runs something on each segment, five times over; prints the median.
fn rate(
    name: &str,
    segments: &[Range],
    mut work: impl FnMut(Range) -> Result<(), Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    let mut times = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        for segment in segments {
            work(*segment)?;
        }
        times.push(start.elapsed() / segments.len() as u32);
    }
    times.sort_unstable();
    let pages = SEGMENT.pages().0 as f64;
    println!(
        "{name}: {:.1} us a segment ({:.1} to {:.1}), {:.3} us a page",
        micros(times[2]),
        micros(times[0]),
        micros(times[4]),
        micros(times[2]) / pages
    );
    Ok(())
}

/// The alternative to [`memfd::fill_from_remote`]: read straight into the file's pages.
fn fill_mapped(fd: &OwnedFd, pid: Pid, segment: Range, flags: MapFlags) -> Result<(), Box<dyn Error>> {
    let length = SEGMENT.0 as usize;
    assert_eq!(SEGMENT.0 % page_size(), 0);
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses the address, so no existing memory is touched.
    let pointer = unsafe { rustix::mm::mmap(std::ptr::null_mut(), length, prot, MapFlags::SHARED | flags, fd, 0) }?;
    // SAFETY: the mapping is of this length, and nobody else has the file.
    let bytes = unsafe { std::slice::from_raw_parts_mut(pointer.cast::<u8>(), length) };
    remote::read_ranges(pid, &[segment], bytes)?;
    // SAFETY: the slice is not used any more.
    unsafe { rustix::mm::munmap(pointer, length) }?;
    Ok(())
}
