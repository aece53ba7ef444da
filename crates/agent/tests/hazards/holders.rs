//! D2: others hold references to a page and write or read through them: pipes, devices, io_uring, a file system in user
//! space. They get what the program has, and the program what they write.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use broker::CheckChoice;

use crate::stand::Stand;
use crate::victim::{
    Random, Region, Victim, fork, merge_densely, merge_now, page, pagemap, pattern, pid, reap, tell, wait_until,
};

pub(crate) const VICTIMS: &[Victim] = &[
    ("spliced", || spliced(PAGES)),
    ("spliced_wide", || spliced(4 * 64)),
    ("spliced_forked", spliced_forked),
    ("direct_reads", direct_reads),
    ("registered", registered),
    ("file_system", file_system),
];

const PAGES: usize = 24;

/// Puts pages into a pipe, which holds them until they are read from its end.
fn splice(held: Region) -> i32 {
    let mut pipe = [0; 2];
    // SAFETY: makes two descriptors.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    let vector = libc::iovec { iov_base: held.pointer(0), iov_len: held.len() };
    // SAFETY: the kernel takes references to pages of the victim's.
    assert_eq!(unsafe { libc::vmsplice(pipe[1], &raw const vector, 1, 0) }, held.len() as isize);
    pipe[0]
}

/// What the pipe has.
fn drain(pipe: i32, len: usize) -> Vec<u64> {
    let mut got = vec![0_u64; len / 8];
    // SAFETY: the kernel writes into `got`.
    assert_eq!(unsafe { libc::read(pipe, got.as_mut_ptr().cast(), len) }, len as isize);
    got
}

/// A page in a pipe is held by a plain reference; the pipe delivers what the page holds when it is read.
fn spliced(pages: usize) {
    let (one, two) = (Region::map(pages), Region::map(pages));
    one.fill_from(3000);
    two.fill_from(3000);
    let held = one.part(4, 7);
    let pipe = splice(held);
    one.mergeable();
    two.mergeable();
    let vouched = std::env::var_os("VOUCHED").is_some();
    for _ in 0..20 {
        merge_now();
        if two.merged() + 1 >= two.pages && (!vouched || held.merged() == 3) {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(one.merged() >= pages / 2, "{} merged", one.merged());
    held.fill(1, 44);
    let got = drain(pipe, held.len());
    let words = page() / 8;
    tell(&format!("held {} pipe {}", held.merged(), if got[words..2 * words] == pattern(44) { "new" } else { "old" }));
    two.check_from(3000);
    // Nobody holds them any more.
    held.fill(1, 3005);
    if !vouched {
        for _ in 0..50 {
            merge_now();
            if held.merged() == 3 {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(held.merged(), 3, "pages stay refused after their reference has gone");
    }
    one.check_from(3000);
}

/// D2, V10: a vmspliced page is refused while the pipe holds it, and taken afterwards.
#[test]
fn d2_spliced_pages_are_refused_by_exact_counts() {
    let stand = Stand::checked_by(CheckChoice::Bpf);
    if stand.summary().check != "bpf" {
        println!("skipped: BPF");
        return;
    }
    let output = stand.run("spliced");
    assert!(output.contains("held 0 pipe new"), "{output}");
    assert!(stand.summary().refused.0.contains_key("referenced"));
}

/// D2: the collapse oracle refuses the whole batch, so that only other batches are merged.
#[test]
fn d2_spliced_pages_are_refused_by_the_collapse_oracle() {
    let stand = Stand::checked_by(CheckChoice::Collapse);
    let mut running = stand.start("spliced_wide");
    let (status, output) = running.finish();
    assert!(status.success(), "{output}");
    assert!(output.contains("held 0 pipe new"), "{output}");
    assert!(stand.summary().refused.0.contains_key("referenced"));
}

/// The control: on the owner's word such pages are merged, and the pipe delivers the old bytes.
#[test]
fn d2_spliced_pages_are_merged_on_the_owners_word() {
    let stand = Stand::checked_by(CheckChoice::Vouch);
    let mut command = stand.command("spliced");
    command.env("VOUCHED", "1");
    let output = stand.start_command(command).succeed();
    assert!(output.contains("pipe old"), "{output}");
}

/// Pages in a pipe, in a process that has forked since: they are mapped here alone and not marked so, and whatever makes
/// them exclusive copies them while the pipe holds them.
fn spliced_forked() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(3000);
    two.fill_from(3000);
    let held = one.part(4, 7);
    let pipe = splice(held);
    reap(fork(|| {}));
    let counted = std::env::var_os("COUNTED").is_some();
    if !counted {
        // Nothing tells who holds what the fork has left: only what was written since is merged.
        one.part(0, 4).fill_from(3000);
        one.part(7, PAGES).fill_from(3007);
        two.fill_from(3000);
    }
    let frames = || [0, 1, 2].map(|index| pagemap(held.address(index)) & ((1 << 55) - 1));
    let before = frames();
    assert!(before.iter().all(|frame| *frame != 0), "frames are not shown");
    one.mergeable();
    two.mergeable();
    for _ in 0..20 {
        merge_now();
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(frames(), before, "the pipe holds other pages than the program");
    assert_eq!(held.stored().len(), 0, "held pages were merged");
    assert!(one.merged() >= PAGES / 2, "{} merged", one.merged());
    drain(pipe, held.len());
    // Nobody holds them any more.
    if counted {
        wait_until("they are merged", || {
            merge_now();
            held.merged() == held.pages
        });
    }
    one.check_from(3000);
    two.check_from(3000);
}

/// D2: what somebody holds is not made exclusive after a fork, which would copy it.
#[test]
fn d2_what_is_held_is_not_copied_after_a_fork() {
    let stand = Stand::checked_by(CheckChoice::Bpf);
    if stand.summary().check != "bpf" {
        println!("skipped: BPF");
        return;
    }
    let mut command = stand.command("spliced_forked");
    command.env("COUNTED", "1");
    stand.start_command(command).succeed();
    assert!(stand.summary().refused.0.contains_key("referenced"));
    stand.assert_merged(PAGES as u64);
}

/// D2: nor where references cannot be counted before.
#[test]
fn d2_nothing_is_copied_after_a_fork_where_nothing_is_counted() {
    let stand = Stand::checked_by(CheckChoice::Collapse);
    stand.run("spliced_forked");
    assert!(stand.summary().refused.0.contains_key("pinned"));
}

/// Reads with O_DIRECT into pages that are being merged.
fn direct_reads() {
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let name = format!("/var/tmp/pagefold-hazards-{}", pid());
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_DIRECT)
        .open(&name);
    let Ok(file) = file else {
        println!("skipped: no O_DIRECT on /var/tmp");
        return;
    };
    let _ = std::fs::remove_file(&name);
    let region = Region::map(2 * PAGES);
    region.fill_from(4000);
    // SAFETY: the kernel reads aligned memory of the victim's.
    let written = unsafe { libc::pwrite(file.as_raw_fd(), region.pointer(0), PAGES * page(), 0) };
    if written != (PAGES * page()) as isize {
        println!("skipped: no O_DIRECT on /var/tmp");
        return;
    }
    // The second half holds what the first is overwritten with and what it was.
    (0..PAGES).for_each(|index| region.fill(index, 0));
    let other = Region::map(2 * PAGES);
    other.fill_from(4000);
    region.mergeable();
    other.mergeable();
    merge_densely();
    let until = Instant::now() + Duration::from_secs(3);
    let mut reads = 0;
    while Instant::now() < until {
        for index in (0..PAGES).step_by(4) {
            let part = region.part(index, index + 4);
            // SAFETY: the kernel writes into the victim's memory.
            let got = unsafe { libc::pread(file.as_raw_fd(), part.pointer(0), part.len(), (index * page()) as i64) };
            assert_eq!(got, part.len() as isize, "{}", std::io::Error::last_os_error());
            part.check_from(4000 + index as u64);
            reads += 1;
        }
        (0..PAGES).for_each(|index| region.fill(index, if reads % 2 == 0 { 0 } else { 4000 + PAGES as u64 }));
    }
    tell(&format!("{reads} reads"));
    other.check_from(4000);
}

/// D2, section 6: O_DIRECT reads in flight and into merged pages.
#[test]
fn d2_direct_reads() {
    let stand = Stand::on_request();
    stand.run("direct_reads");
    stand.assert_merged(PAGES as u64);
}

/// io_uring's registered buffers are pinned: over plain pages they keep them from being merged, over merged pages they
/// get copies.
fn registered() {
    let (one, two) = (Region::map(PAGES), Region::map(PAGES));
    one.fill_from(5000);
    two.fill_from(5000);
    let mut parameters = [0_u32; 30];
    // SAFETY: the kernel reads and writes a struct io_uring_params of 120 bytes.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 4, parameters.as_mut_ptr()) };
    if ring < 0 {
        println!("skipped: io_uring");
        return;
    }
    let register = |region: Region| {
        let vector = libc::iovec { iov_base: region.pointer(0), iov_len: region.len() };
        // SAFETY: the kernel pins pages of the victim's.
        unsafe { libc::syscall(libc::SYS_io_uring_register, ring, 0, &raw const vector, 1) }
    };
    assert_eq!(register(one.part(2, 5)), 0, "{}", std::io::Error::last_os_error());
    one.mergeable();
    two.mergeable();
    for _ in 0..10 {
        merge_now();
    }
    if one.merged() == 0 {
        println!("skipped: processes with an io_uring are not managed");
        return;
    }
    assert_eq!(one.part(2, 5).merged(), 0, "pinned pages were merged");
    assert!(one.merged() >= PAGES - 4);
    // SAFETY: lets the buffers go (IORING_UNREGISTER_BUFFERS).
    assert_eq!(unsafe { libc::syscall(libc::SYS_io_uring_register, ring, 1, 0, 0) }, 0);
    assert_eq!(register(two.part(6, 9)), 0, "{}", std::io::Error::last_os_error());
    for _ in 0..10 {
        merge_now();
    }
    assert_eq!(two.part(6, 9).merged(), 0, "pinned pages were taken again");
    one.check_from(5000);
    two.check_from(5000);
}

/// D2, section 6: registered buffers of io_uring.
#[test]
fn d2_registered_buffers() {
    let stand = Stand::on_request();
    stand.run("registered");
}

/// A file system in user space, whose requests the kernel writes to this memory by plain references, without the mmap
/// lock. An equal zero page lies there before each of them.
fn file_system() {
    use std::os::fd::AsRawFd as _;
    let folder = std::path::PathBuf::from(std::env::var_os("FOLDER").expect("the test names a folder"));
    let device = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse");
    let Ok(device) = device else {
        println!("skipped: /dev/fuse");
        return;
    };
    let path = std::ffi::CString::new(folder.to_str().expect("a path of ours")).expect("a path of ours");
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let options = std::ffi::CString::new(options).expect("digits");
    // SAFETY: the kernel reads the strings.
    let mounted =
        unsafe { libc::mount(c"hazards".as_ptr(), path.as_ptr(), c"fuse".as_ptr(), 0, options.as_ptr().cast()) };
    if mounted != 0 {
        println!("skipped: mounting a file system in user space");
        return;
    }
    let region = Region::map(PAGES);
    let buffer = region.part(4, 8);
    let twin = Region::map(PAGES);
    (0..PAGES).for_each(|index| twin.fill(index, 77));
    region.mergeable();
    twin.mergeable();
    let read = || {
        // SAFETY: the kernel writes into the buffer.
        unsafe { libc::read(device.as_raw_fd(), buffer.pointer(0), buffer.len()) }
    };
    let reply = |words: &[u32]| {
        // SAFETY: the kernel reads the words.
        unsafe { libc::write(device.as_raw_fd(), words.as_ptr().cast(), words.len() * 4) }
    };
    // struct fuse_in_header: length, operation, then the number of the request.
    let header = || {
        let words = buffer.read(0);
        (words[0] as u32, (words[0] >> 32) as u32, words[1])
    };
    assert!(read() > 0);
    let (_, operation, unique) = header();
    assert_eq!(operation, 26, "FUSE_INIT");
    let mut init = [0_u32; 4 + 16];
    init[0] = 4 * init.len() as u32;
    (init[2], init[3], init[4], init[5], init[9]) = (unique as u32, (unique >> 32) as u32, 7, 31, 4096);
    assert!(reply(&init) > 0, "{}", std::io::Error::last_os_error());
    static OVER: AtomicBool = AtomicBool::new(false);
    let asker = std::thread::spawn(move || {
        for number in 0_u64.. {
            let there = std::fs::exists(folder.join(format!("{number:0200}"))).unwrap_or_default();
            if OVER.load(SeqCst) {
                return;
            }
            assert!(!there, "there are no files");
        }
    });
    merge_densely();
    let until = Instant::now() + Duration::from_secs(3);
    let (mut requests, mut random) = (0, Random(5));
    while Instant::now() < until {
        // Zeros again: dropped by a merge before, while or after the request is written.
        (0..buffer.pages).for_each(|index| buffer.fill(index, 0));
        for _ in 0..random.below(40_000) {
            std::hint::spin_loop();
        }
        let got = read();
        assert!(got > 40, "{}", std::io::Error::last_os_error());
        let (length, _, unique) = header();
        assert!(length as isize == got && unique != 0, "{got} bytes were read, the buffer says {length}");
        const FORGET: u32 = 2;
        if header().1 != FORGET {
            reply(&[16, (-libc::ENOENT) as u32, unique as u32, (unique >> 32) as u32]);
        }
        requests += 1;
    }
    OVER.store(true, SeqCst);
    // SAFETY: takes the file system away, which ends what waits for it.
    unsafe { libc::umount2(path.as_ptr(), libc::MNT_FORCE | libc::MNT_DETACH) };
    drop(device);
    let _ = asker.join();
    tell(&format!("{requests} requests"));
    assert!(requests > 100, "{requests} requests");
}

/// D2, H4: a FUSE daemon's requests are whole. The broker leaves such daemons alone altogether, since a thread that
/// waits for one of their pages could be the one that they wait for.
#[test]
fn d2_requests_of_a_file_system_in_user_space() {
    struct Mounted(std::path::PathBuf);
    impl Drop for Mounted {
        fn drop(&mut self) {
            use std::os::unix::ffi::OsStrExt as _;
            if let Ok(path) = std::ffi::CString::new(self.0.as_os_str().as_bytes()) {
                // SAFETY: takes away what a victim that panicked has left mounted here.
                unsafe { libc::umount2(path.as_ptr(), libc::MNT_FORCE | libc::MNT_DETACH) };
            }
            let _ = std::fs::remove_dir(&self.0);
        }
    }
    let folder = std::env::temp_dir().join(format!("pagefold-hazards-fuse-{}", pid()));
    std::fs::create_dir(&folder).expect("a folder can be made");
    let folder = Mounted(folder);
    let stand = Stand::on_request();
    let mut command = stand.command("file_system");
    command.env("FOLDER", &folder.0);
    let output = stand.start_command(command).succeed();
    if !output.contains("skipped:") {
        assert_eq!(stand.summary().merges, 0, "pages of a storage daemon were merged");
    }
}
