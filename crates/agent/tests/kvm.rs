//! A guest of a few instructions on /dev/kvm, its RAM under management: two virtual CPUs check and write it while it is
//! merged, un-shared and taken again.
//!
//! Guest page tables, mmu notifiers and KVM's get_user_pages stand between the guest and its memory, which no process
//! test exercises. The guest needs no operating system: it runs in flat 32-bit protected mode.
//! `PAGEFOLD_KVM_SECONDS` makes it run for longer than ten seconds.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};
use std::time::{Duration, Instant};

use broker::{AgentFiles, Broker, Settings};

const PAGE: usize = 4096;
/// Guest RAM that is managed, from guest address 1 MiB on.
const RAM: usize = 24 << 20;
const RAM_AT: u64 = 1 << 20;
const CODE_AT: u64 = 0x1000;
/// Four neighbouring pages hold the same value, and values repeat.
const SHIFT: u32 = 14;

std::arch::global_asm!(
    ".code32",
    ".globl pagefold_test_guest",
    ".globl pagefold_test_guest_end",
    "pagefold_test_guest:",
    "2: mov ebp, esi",
    "3: mov ebx, ebp",
    "shr ebx, 14",
    "and ebx, 15",
    "inc ebx",
    "imul ebx, ebx, 0x01010101",
    // Every 32nd word: /dev/kvm may be nested and slow. The host looks at all of them at the end.
    "mov ecx, 32",
    "mov edx, ebp",
    "4: cmp [edx], ebx",
    "jne 6f",
    "add edx, 128",
    "dec ecx",
    "jnz 4b",
    // One page in 32, another one every four passes, is written and put back.
    "mov eax, esp",
    "shr eax, 2",
    "mov edx, ebp",
    "shr edx, 12",
    "add eax, edx",
    "and eax, 31",
    "jnz 5f",
    "not dword ptr [ebp + 128]",
    "not dword ptr [ebp + 128]",
    "5: add ebp, 4096",
    "cmp ebp, edi",
    "jb 3b",
    "inc esp",
    "mov eax, esp",
    "out 0x10, eax",
    "jmp 2b",
    "6: mov eax, edx",
    "out 0x11, eax",
    "hlt",
    "pagefold_test_guest_end:",
    ".code64",
);

unsafe extern "C" {
    static pagefold_test_guest: u8;
    static pagefold_test_guest_end: u8;
}

/// What page `index` of the RAM holds.
fn value(index: usize) -> u32 {
    let address = RAM_AT as u32 + (index * PAGE) as u32;
    ((address >> SHIFT & 15) + 1) * 0x0101_0101
}

#[test]
fn a_kvm_guest_keeps_its_memory() {
    if std::env::var_os("VICTIM").is_some() {
        return victim();
    }
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        println!("skipped: /dev/kvm cannot be opened ({error})");
        return;
    }
    if let Err(missing) = kernel::probe::Features::probe().live_merge() {
        println!("skipped: {}: {}", missing.what, missing.reason);
        return;
    }
    let files = AgentFiles::write().unwrap();
    let broker = Broker::start(Settings { stable: Some(Duration::from_millis(300)), ..Settings::default() }).unwrap();
    let token = broker.token();
    let variable = format!("{}:{:016x}{:016x}:{}", broker.name(), token.0, token.1, files.sites().display());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_kvm_guest_keeps_its_memory", "--nocapture"])
        .env("VICTIM", "kvm")
        .env("LD_PRELOAD", files.image())
        .env("PAGEFOLD_AGENT", variable)
        .stdout(Stdio::inherit())
        .spawn()
        .unwrap();
    let limit = Instant::now() + seconds() + Duration::from_secs(60);
    let mut most = broker.summary().unwrap();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > limit {
            child.kill().unwrap();
            panic!("the guest hangs");
        }
        std::thread::sleep(Duration::from_millis(200));
        let now = broker.summary().unwrap();
        if now.merges + now.retaken >= most.merges + most.retaken {
            most = now;
        }
    };
    println!(
        "merged {}, retaken {}, unshared {}, saved {} bytes at most, refused {:?}",
        most.merges, most.retaken, most.unshared_by_write, most.bytes_saved_peak, most.refused
    );
    assert!(status.success(), "the guest ended with {status}");
    assert!(most.merges > (RAM / PAGE / 2) as u64, "most of the RAM was merged");
    assert!(most.retaken > 0, "pages that the guest wrote were taken again");
}

fn seconds() -> Duration {
    let seconds = std::env::var("PAGEFOLD_KVM_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(seconds.unwrap_or(10))
}

fn map(len: usize) -> *mut u8 {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: the kernel chooses the address, so no existing memory is touched.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
    assert_ne!(address, libc::MAP_FAILED);
    address.cast()
}

/// An ioctl number of KVM: direction (1 write, 2 read), number, size of the argument.
const fn io(direction: u64, number: u64, size: u64) -> u64 {
    direction << 30 | size << 16 | 0xae << 8 | number
}

/// `struct kvm_userspace_memory_region`.
#[repr(C)]
struct MemoryRegion {
    slot: u32,
    flags: u32,
    guest: u64,
    size: u64,
    host: u64,
}

fn ioctl(fd: i32, request: u64, argument: u64) -> i32 {
    // SAFETY: the callers pass what each request takes, alive during the call.
    let result = unsafe { libc::ioctl(fd, request, argument) };
    assert!(result >= 0, "ioctl {request:x}: {}", std::io::Error::last_os_error());
    result
}

/// Size of `struct kvm_sregs`, of one segment in it, and where cr0 lies.
const SREGS: usize = 312;
const SEGMENT: usize = 24;
const CR0: usize = 8 * SEGMENT + 2 * 16;

fn victim() {
    let (code, ram) = (map(PAGE), map(RAM));
    // SAFETY: the guest's code fits into the page made for it, and the words lie in the RAM just mapped.
    unsafe {
        let (start, end) = (&raw const pagefold_test_guest, &raw const pagefold_test_guest_end);
        std::ptr::copy_nonoverlapping(start, code, end.offset_from(start) as usize);
        for index in 0..RAM / PAGE {
            for word in 0..PAGE / 4 {
                ram.add(index * PAGE).cast::<u32>().add(word).write(value(index));
            }
        }
    }
    // SAFETY: the path ends with a zero.
    let kvm = unsafe { libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    let vm = ioctl(kvm, io(0, 0x01, 0), 0);
    for (slot, guest, size, host) in [(0, CODE_AT, PAGE, code), (1, RAM_AT, RAM, ram)] {
        let region = MemoryRegion { slot, flags: 0, guest, size: size as u64, host: host as u64 };
        ioctl(vm, io(1, 0x46, size_of::<MemoryRegion>() as u64), &raw const region as u64);
    }
    let run_size = ioctl(kvm, io(0, 0x04, 0), 0) as usize;
    // SAFETY: the guest's RAM, which keeps its content.
    assert_eq!(unsafe { libc::madvise(ram.cast(), RAM, libc::MADV_MERGEABLE) }, 0);

    let stop = Arc::new(AtomicBool::new(false));
    let passes = Arc::new([AtomicU32::new(0), AtomicU32::new(0)]);
    let threads: Vec<_> = (0..2_usize)
        .map(|index| {
            let (stop, passes) = (Arc::clone(&stop), Arc::clone(&passes));
            let half = RAM as u64 / 2;
            let from = RAM_AT + index as u64 * half;
            std::thread::spawn(move || cpu(vm, run_size, index, (from, from + half), &stop, &passes[index]))
        })
        .collect();
    std::thread::sleep(seconds());
    stop.store(true, SeqCst);
    for thread in threads {
        thread.join().unwrap();
    }
    for index in 0..RAM / PAGE {
        for word in 0..PAGE / 4 {
            // SAFETY: a word of the RAM, and both virtual CPUs have stopped.
            let found = unsafe { ram.add(index * PAGE).cast::<u32>().add(word).read() };
            assert_eq!(found, value(index), "page {index}, word {word}, as the host sees it");
        }
    }
    let passes = [passes[0].load(SeqCst), passes[1].load(SeqCst)];
    println!("guest passes over its memory: {passes:?}");
    assert!(passes.iter().all(|passes| *passes > 2));
}

/// One virtual CPU: runs until it is told to stop, which it sees at the end of each pass.
fn cpu(vm: i32, run_size: usize, index: usize, (from, to): (u64, u64), stop: &AtomicBool, passes: &AtomicU32) {
    const EXIT_IO: u32 = 2;
    const EXIT_INTR: u32 = 10;
    let vcpu = ioctl(vm, io(0, 0x41, 0), index as u64);
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    // SAFETY: the kernel chooses the address, so no existing memory is touched.
    let run = unsafe { libc::mmap(std::ptr::null_mut(), run_size, prot, flags, vcpu, 0) };
    assert_ne!(run, libc::MAP_FAILED);
    let run = run.cast::<u8>();

    let mut sregs = [0_u8; SREGS];
    ioctl(vcpu, io(2, 0x83, SREGS as u64), sregs.as_mut_ptr() as u64);
    // cs, ds, es, fs, gs, ss: base 0, limit 4 GiB, 32 bits. Fields: base 8, limit 4, selector 2, type 1, present 1,
    // dpl 1, db 1, s 1, l 1, g 1, avl 1, unusable 1, padding 1.
    for segment in 0..6 {
        let at = segment * SEGMENT;
        let (kind, selector) = if segment == 0 { (11, 8_u16) } else { (3, 16) };
        sregs[at..at + 8].fill(0);
        sregs[at + 8..at + 12].fill(0xff);
        sregs[at + 12..at + 14].copy_from_slice(&selector.to_le_bytes());
        sregs[at + 14..at + 24].copy_from_slice(&[kind, 1, 0, 1, 1, 0, 1, 0, 0, 0]);
    }
    sregs[CR0] |= 1;
    ioctl(vcpu, io(1, 0x84, SREGS as u64), sregs.as_ptr() as u64);
    // rax rbx rcx rdx rsi rdi rsp rbp r8..r15 rip rflags
    let mut regs = [0_u64; 18];
    (regs[4], regs[5], regs[6], regs[16], regs[17]) = (from, to, 0, CODE_AT, 2);
    ioctl(vcpu, io(1, 0x82, 144), regs.as_ptr() as u64);

    loop {
        // SAFETY: KVM_RUN takes no argument; the guest has no memory but the two regions.
        let result = unsafe { libc::ioctl(vcpu, io(0, 0x80, 0), 0) };
        if result < 0 {
            assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EINTR), "cpu {index}");
            continue;
        }
        // struct kvm_run: exit_reason at 8; for I/O the port at 34 and the data's offset at 40.
        // SAFETY: inside the mapping of struct kvm_run, which the kernel has written.
        match unsafe { run.add(8).cast::<u32>().read_volatile() } {
            EXIT_IO => {
                // SAFETY: as above.
                let port = unsafe { run.add(34).cast::<u16>().read_volatile() };
                // SAFETY: as above.
                let data = unsafe { run.add(40).cast::<u64>().read_volatile() } as usize;
                // SAFETY: the kernel's own offset of the four bytes that the guest has sent.
                let word = unsafe { run.add(data).cast::<u32>().read_volatile() };
                assert_eq!(port, 0x10, "cpu {index}: a wrong word at guest address {word:x}");
                passes.store(word, SeqCst);
                if stop.load(SeqCst) {
                    return;
                }
            }
            EXIT_INTR => {}
            other => panic!("cpu {index}: exit reason {other}"),
        }
    }
}
