//! What members, and others, can do to a segment: nothing.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;

use crate::member::{Member, NOBODY};
use kernel::{SharedMap, memfd, page_size};
use pagefold_store::{FillBuffer, FillRequest, HandOut, Options, Partition, SegmentId};
use rustix::fs::{OFlags, SealFlags};

const PAGES: u32 = 5;

fn page(number: u32) -> Vec<u8> {
    vec![0x5a ^ u8::try_from(number).unwrap(); page_size() as usize]
}

fn filled(uid: u32) -> (Partition, SegmentId) {
    let mut partition = Partition::open(Options::for_user(uid)).unwrap();
    let requests: Vec<_> = (0..PAGES)
        .map(|source| FillRequest {
            fingerprint: partition.secret().fingerprint(&page(source)),
            source,
            continues: true,
        })
        .collect();
    let report = partition.fill(&mut FillBuffer::new(), &requests, |requests, reads| {
        for (slot, request) in requests.iter().enumerate() {
            reads.put(slot, &page(request.source));
        }
    });
    assert!(report.stopped.is_none());
    let segment = report.outcomes[0].place().unwrap().segment;
    (partition, segment)
}

fn file(partition: &Partition, segment: SegmentId) -> BorrowedFd<'_> {
    match partition.hand_out(segment, partition.options().uid, |_| true) {
        HandOut::File { file, .. } => file,
        other => panic!("{other:?}"),
    }
}

/// The segment is what it was when it was sealed, to the byte and block.
fn assert_intact(partition: &Partition, segment: SegmentId, mode: u32) {
    let mut buffer = vec![0; page_size() as usize];
    for number in 0..PAGES {
        assert!(partition.read_page(pagefold_store::Place { segment, page: number }, &mut buffer).unwrap());
        assert_eq!(buffer, page(number), "page {number}");
    }
    let stat = rustix::fs::fstat(file(partition, segment)).unwrap();
    assert_eq!(stat.st_mode & 0o7777, mode);
    assert_eq!(stat.st_size as u64, u64::from(PAGES) * page_size());
    assert_eq!(stat.st_blocks as u64 * 512, u64::from(PAGES) * page_size(), "exactly sized, without holes");
}

#[test]
fn what_is_handed_out_is_sealed_and_can_only_be_read() {
    let (partition, segment) = filled(1);
    let file = file(&partition, segment);
    let seals = rustix::fs::fcntl_get_seals(file).unwrap();
    assert!(seals.contains(SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
    assert!(memfd::is_sealed(file).unwrap());
    assert_eq!(rustix::fs::fcntl_getfl(file).unwrap() & OFlags::ACCMODE, OFlags::RDONLY);
    assert!(rustix::io::fcntl_getfd(file).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    assert!(SharedMap::<[std::sync::atomic::AtomicU8; 16]>::map(file).is_err(), "no shared writable mapping");
    assert_intact(&partition, segment, 0o400);
}

#[test]
fn no_descriptor_that_could_write_is_left_in_the_broker() {
    let (partition, segment) = filled(1);
    let ours = memfd::identity(file(&partition, segment)).unwrap();
    let mut found = 0;
    for entry in std::fs::read_dir("/proc/self/fdinfo").unwrap() {
        let name = entry.unwrap().file_name();
        let path = std::path::Path::new("/proc/self/fd").join(&name);
        // Tests run side by side in this process: descriptors come and go.
        if !std::fs::read_link(&path).is_ok_and(|target| target.as_os_str().as_encoded_bytes().starts_with(b"/memfd:"))
        {
            continue;
        }
        let Ok(open) = std::fs::File::open(path) else { continue };
        if memfd::identity(open.as_fd()).is_ok_and(|identity| identity == ours) {
            let Ok(info) = std::fs::read_to_string(std::path::Path::new("/proc/self/fdinfo").join(name)) else {
                continue;
            };
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim().to_owned();
            let access = u32::from_str_radix(&flags, 8).unwrap() & 3;
            assert_eq!(access, 0, "{info}");
            found += 1;
        }
    }
    assert!(found >= 1);
}

#[test]
fn a_member_of_another_user_can_read_and_nothing_else() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: not root, so there can be no member of another user");
        return;
    }
    let (partition, segment) = filled(NOBODY);
    let Some(member) = Member::start(NOBODY, "attack", file(&partition, segment)) else { return };
    let said = member.finish();
    println!("{said:#?}");
    let expected = [
        ("open anew for writing", "EACCES"),
        ("open anew for reading", "EACCES"),
        ("write", "EBADF"),
        ("append", "EBADF"),
        ("map shared and writable", "EACCES"),
        ("map shared, then mprotect", "EACCES"),
        ("truncate", "EINVAL"),
        ("extend", "EINVAL"),
        ("punch a hole", "EBADF"),
        ("allocate behind the end", "EBADF"),
        ("add a seal", "EPERM"),
        ("change the mode", "EPERM"),
        ("change the owner", "EPERM"),
        ("set an attribute", "EACCES"),
        ("cachestat", "EPERM"),
        ("write own copies", "works"),
    ];
    for (attack, result) in expected {
        assert_eq!(said[attack], result, "{attack}");
    }
    assert_eq!(said.len(), expected.len(), "nothing tried went unjudged");
    assert_intact(&partition, segment, 0o400);
}

#[test]
fn who_is_no_member_gets_nothing_unless_of_the_same_user() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: not root, so there can be no other users");
        return;
    }
    let (partition, segment) = filled(NOBODY);
    let Some(mut holder) = Member::start(NOBODY, "hold", file(&partition, segment)) else { return };
    let sum: u64 = (0..PAGES).map(|number| u64::from(page(number)[0])).sum();
    assert_eq!(holder.answer(), Some(("touched".to_owned(), sum.to_string())), "a private mapping is all it needs");
    let (_, address) = holder.answer().unwrap();

    let peek = format!("peek:{}:0:{address}", holder.pid());
    let nothing = std::fs::File::open("/dev/null").unwrap();
    let stranger = Member::start(12345, &peek, nothing.as_fd()).unwrap().finish();
    println!("another user: {stranger:#?}");
    assert!(stranger.values().all(|result| ["EACCES", "EPERM"].contains(&result.as_str())), "{stranger:?}");

    // The stated limit: processes of one user can take each other's descriptors. Mode 0400 keeps them from opening
    // the file anew; taking the descriptor itself is ptrace's right.
    let same = Member::start(NOBODY, &peek, nothing.as_fd()).unwrap().finish();
    println!("the same user: {same:#?}");
    assert_eq!(same["open a member's descriptor"], "EACCES");
    assert_eq!(same["open a member's mapping"], "EPERM");
    assert!(["works", "EPERM"].contains(&same["take a member's descriptor"].as_str()), "depends on ptrace_scope");
    holder.go_on();
    holder.go_on();
    assert_eq!(holder.finish()["held"], sum.to_string());
    assert_intact(&partition, segment, 0o400);
}

#[test]
fn a_broker_of_the_members_own_user_still_has_the_seals() {
    if rustix::process::geteuid().is_root() {
        // Run this very test again as nobody.
        let this = std::env::current_exe().unwrap();
        let name = "isolation::a_broker_of_the_members_own_user_still_has_the_seals";
        let run =
            std::process::Command::new(&this).args(["--exact", name, "--nocapture"]).uid(NOBODY).gid(NOBODY).output();
        match run {
            Ok(output) => {
                print!("{}", String::from_utf8_lossy(&output.stdout));
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "the test was found");
            }
            Err(error) => println!("skipped: user nobody cannot run {}: {error}", this.display()),
        }
        return;
    }
    let uid = rustix::process::geteuid().as_raw();
    let (partition, segment) = filled(uid);
    let Some(member) = Member::start(uid, "own", file(&partition, segment)) else { return };
    let said = member.finish();
    println!("{said:#?}");
    let expected = [
        ("change the mode", "works"),
        ("open anew for writing", "works"),
        ("opened anew: write", "EPERM"),
        ("opened anew: append", "EPERM"),
        ("opened anew: map shared and writable", "EPERM"),
        ("opened anew: map shared, then mprotect", "EACCES"),
        ("opened anew: truncate", "EPERM"),
        ("opened anew: extend", "EPERM"),
        ("opened anew: punch a hole", "EPERM"),
        ("opened anew: allocate behind the end", "EPERM"),
        ("opened anew: add a seal", "EPERM"),
    ];
    for (attack, result) in expected {
        assert_eq!(said[attack], result, "{attack}");
    }
    assert_eq!(said.len(), expected.len());
    assert_intact(&partition, segment, 0o600);
}
