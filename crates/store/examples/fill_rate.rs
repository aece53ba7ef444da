//! How fast pages of another process come into the store: `cargo run --release -p pagefold-store --example fill_rate`.
#![forbid(unsafe_code)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Instant;

use kernel::remote::read_ranges;
use kernel::{Bytes, Pid, Range, Vaddr, page_size};
use page::PageNumber;
use pagefold_store::{FillBuffer, FillRequest, Options, Partition, ProcessPage, read_processes};

const MIB: u64 = 256;

fn hold() {
    let mut seed = 1_u64;
    let memory: Vec<u8> = (0..MIB << 17)
        .flat_map(|_| {
            seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            seed.to_ne_bytes()
        })
        .collect();
    println!("{}", (memory.as_ptr() as u64).div_ceil(page_size()));
    std::io::stdin().read_line(&mut String::new()).ok();
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if std::env::args().nth(1).as_deref() == Some("hold") {
        hold();
        return Ok(());
    }
    let mut child =
        Command::new(std::env::current_exe()?).arg("hold").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut line)?;
    let first = PageNumber(line.trim().parse()?);
    let pid = Pid(i32::try_from(child.id())?);
    let pages = (MIB << 20) / page_size() - 1;

    for round in 0..3 {
        for (strict, run) in [(false, 256), (true, 64), (true, 16), (true, 4), (true, 1)] {
            let mut partition = Partition::open(Options { strict, ..Options::for_user(0) })?;
            // Lone pages need a descriptor each.
            let pages = pages.min(256 * run).min(if run == 1 { 500 } else { u64::MAX });
            let mut requests = Vec::new();
            let mut buffer = vec![0; 1 << 20];
            let range = Range::new(Vaddr(first.address(page_size())), Vaddr(first.offset(pages).address(page_size())))?;
            let mut at = first;
            let seeing = Instant::now();
            for piece in range.pieces(Bytes(1 << 20)) {
                let piece_bytes = usize::try_from(piece.len().0)?;
                read_ranges(pid, &[piece], &mut buffer[..piece_bytes])?;
                for fingerprint in
                    partition.secret().fingerprints(&buffer[..piece_bytes], usize::try_from(page_size())?)
                {
                    let continues = !(at.0 - first.0).is_multiple_of(run);
                    requests.push(FillRequest { fingerprint, source: ProcessPage { pid, page: at }, continues });
                    at = at.next();
                }
            }
            let seen = seeing.elapsed();
            let mut buffer = FillBuffer::new();
            let start = Instant::now();
            let report = partition.fill(&mut buffer, &requests, read_processes);
            let took = start.elapsed();
            if let Some(error) = report.stopped {
                return Err(error.into());
            }
            let counters = partition.counters();
            if round > 0 {
                println!(
                    "{} of {run:>3}: {:.2} us a page ({} pages in {} segments; reading and hashing alone {:.2})",
                    if strict { "strict runs" } else { "segments   " },
                    took.as_secs_f64() * 1e6 / pages as f64,
                    counters.filled,
                    counters.segments,
                    seen.as_secs_f64() * 1e6 / pages as f64,
                );
            }
        }
    }
    child.stdin.take().ok_or("no input")?.write_all(b"\n")?;
    child.wait()?;
    Ok(())
}
