//! Two processes with the same memory in one partition, and what the second one saves.
//!
//! `cargo run --release -p pagefold --example merge_two`

use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;

use kernel::{Launch, Pid, Pidfd};
use pagefold::{Error, Flags, Partition, whole_pages};

/// Memory that both fill alike: a megabyte of numbers, again and again with other beginnings.
fn fill() -> Vec<u64> {
    (0..4_u64 << 20).map(|index| index.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect()
}

/// Live where that is possible, else in this thread.
fn merge(partition: &Partition, memory: &mut [u64]) -> Result<u64, Error> {
    let Some(range) = whole_pages(memory) else { return Ok(0) };
    match partition.merge(range) {
        Err(Error::NoUserfault | Error::NoMove) => partition.merge_exclusive(memory),
        report => report,
    }
    .map(|report| report.bytes_merged())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if let Some(number) = std::env::args().nth(1) {
        // The second process: the descriptor came with it.
        let descriptor: OwnedFd = Pidfd::open(Pid::this())?.getfd(number.parse()?)?;
        let partition = Partition::from_fd(descriptor)?;
        let mut memory = fill();
        let merged = merge(&partition, &mut memory)?;
        println!("second process: {} of {} MiB merged", merged >> 20, size_of_val(&memory[..]) >> 20);
        println!("both together: {} bytes saved", partition.summary()?["bytes_saved"]);
        assert_eq!(memory, fill(), "merging changes nothing");
        return Ok(());
    }
    let partition = Partition::open("example", Flags::default())?;
    let mut memory = fill();
    merge(&partition, &mut memory)?;
    let descriptor = partition.try_clone_fd()?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(descriptor.as_raw_fd().to_string());
    let mut launch = Launch::new(command);
    launch.inherit(descriptor);
    let status = launch.spawn()?.child.wait()?;
    assert!(status.success());
    let again = merge(&partition, &mut memory)?;
    // Live, the second process's call has merged the first one's pages with its own.
    println!("first process: {} MiB more merged at its next call", again >> 20);
    assert_eq!(memory, fill());
    Ok(())
}
