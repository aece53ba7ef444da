//! Bad neighbours and bad days: callers that stall or talk nonsense, a broker that is killed.
#![allow(clippy::unwrap_used, reason = "tests")]

mod members;

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use kernel::{RecvOutcome, Seqpacket, memfd};
use members::{Memory, child, in_child, live_here};
use pagefold::{Error, Flags, Partition};

/// Name and secret out of a partition's descriptor: what a hostile member has.
fn read_card(partition: &Partition) -> (String, u64, u64) {
    let mut content = vec![0; 200];
    let length = memfd::pread(partition.as_fd(), 0, &mut content).unwrap();
    let word = |at: usize| u64::from_le_bytes(content[at..at + 8].try_into().unwrap());
    (String::from_utf8(content[40..length].to_vec()).unwrap(), word(16), word(24))
}

#[test]
fn hostile_callers_stall_nobody() {
    if !live_here() {
        return;
    }
    in_child("body_hostile_callers_stall_nobody");
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_hostile_callers_stall_nobody() {
    let partition = Partition::open("test", Flags::default()).unwrap();
    let (name, one, two) = read_card(&partition);
    let connect = || Seqpacket::connect_abstract(name.as_bytes()).unwrap();
    let greeting = format!("{{\"version\":1,\"token\":[{one},{two}]}}");
    let mut buffer = vec![0; 64 << 10];
    let mut closed = |link: &Seqpacket| {
        let within = Duration::from_secs(5);
        matches!(link.recv_timeout(&mut buffer, within), Ok(RecvOutcome::Closed))
    };

    let silent: Vec<_> = (0..20).map(|_| connect()).collect();
    let wrong = connect();
    wrong.send(format!("{{\"version\":1,\"token\":[{},{two}]}}", one ^ 1).as_bytes(), &[]).unwrap();
    assert!(closed(&wrong), "a wrong secret");
    let noise = connect();
    noise.send(&[0xff; 300], &[]).unwrap();
    assert!(closed(&noise), "no helper, no caller");
    let long = connect();
    long.send(&vec![b'{'; 4096], &[]).unwrap();
    assert!(closed(&long), "a greeting that is too long");

    let mut callers = Vec::new();
    let huge_time = "{\"Track\":{\"stable\":18446744073709551615}}".to_owned();
    let backwards = "{\"Merge\":{\"ranges\":[[8192,4096]]}}".to_owned();
    let kernel_memory = "{\"Quiescent\":{\"ranges\":[[0,18446744073709547520]],\"from\":null}}".to_owned();
    let nowhere = "{\"Quiescent\":{\"ranges\":[[4096,140737488351232]],\"from\":1}}".to_owned();
    let many = format!("{{\"Merge\":{{\"ranges\":[{}[4096,8192]]}}}}", "[4096,8192],".repeat(2000));
    for request in ["{}".to_owned(), "nonsense".to_owned(), huge_time, backwards, kernel_memory, nowhere, many] {
        let caller = connect();
        caller.send(greeting.as_bytes(), &[]).unwrap();
        // Asked again and again, and no answer is ever read.
        for _ in 0..200 {
            let _ = caller.send(request.as_bytes(), &[]);
        }
        callers.push(caller);
    }

    let (first, second) = (Memory::filled(256, 1), Memory::filled(256, 1));
    let begun = Instant::now();
    let report = partition.merge_all(&[first.range(), second.range()]).unwrap();
    assert!(report.pages_merged > 400, "{report:?}");
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(first.digest(), second.digest());
    drop((silent, callers));
    assert!(partition.merge(first.range()).is_ok());
}

#[test]
fn a_killed_broker_costs_nothing_that_is_there() {
    if !live_here() {
        return;
    }
    in_child("body_a_killed_broker_costs_nothing_that_is_there");
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_a_killed_broker_costs_nothing_that_is_there() {
    // Only to pass a descriptor on; the broker that counts is the child's.
    let own = Partition::open("unused", Flags::default()).unwrap();
    for after in [0, 3, 20, 80] {
        let mut server = child("body_serves_until_killed", &own);
        let mut said = BufReader::new(server.process().stdout.take().unwrap());
        let mut number = String::new();
        while !number.contains("serves ") {
            number.clear();
            assert_ne!(said.read_line(&mut number).unwrap(), 0);
        }
        let number = members::number(&number, "serves ");
        let pidfd = kernel::Pidfd::open(server.pid()).unwrap();
        let fd = pidfd.getfd(i32::try_from(number).unwrap()).unwrap();
        let member = child("body_merges_until_the_broker_is_gone", &Partition::from_fd(fd).unwrap());
        std::thread::sleep(Duration::from_millis(300 + after));
        server.process().kill().unwrap();
        server.process().wait().unwrap();
        let said = member.wait();
        assert!(said.contains("intact"), "{said}");
    }
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_serves_until_killed() {
    if members::inherited().is_none() {
        return;
    }
    let partition = Partition::open("test", Flags::default()).unwrap();
    println!("serves {}", std::os::fd::AsRawFd::as_raw_fd(&partition.as_fd()));
    std::io::stdout().flush().unwrap();
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
#[ignore = "runs in a process of its own, started by the test above"]
fn body_merges_until_the_broker_is_gone() {
    let Some(partition) = members::inherited() else { return };
    let (mut one, two) = (Memory::filled(2048, 1), Memory::filled(2048, 1));
    let digest = one.digest();
    let begun = Instant::now();
    let error = loop {
        assert!(begun.elapsed() < Duration::from_secs(60), "the broker's end is noticed");
        // Written, so that there is something to merge each time.
        one.write_all();
        one.page_mut(0)[0] ^= 1;
        match partition.merge_all(&[one.range(), two.range()]) {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Ended | Error::NoHelper { .. }), "{error}");
    assert_eq!((one.digest(), two.digest()), (digest, digest));
    one.write_all();
    one.page_mut(0)[0] ^= 1;
    assert_eq!((one.digest(), two.digest()), (digest, digest));
    println!("intact");
}
