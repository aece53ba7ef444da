#![allow(clippy::unwrap_used, reason = "tests")]
use super::*;
use std::io::{Read, Write};

fn packet(outcome: RecvOutcome) -> (usize, Vec<OwnedFd>) {
    match outcome {
        RecvOutcome::Packet { length, fds } => (length, fds),
        other => panic!("{other:?}"),
    }
}

#[test]
fn packets_and_descriptors_arrive_whole() {
    let (one, other) = Seqpacket::pair().unwrap();
    let (mut reader, writer) = io::pipe().unwrap();
    let mut buffer = [0; 64];
    assert!(matches!(other.recv(&mut buffer).unwrap(), RecvOutcome::Empty));
    assert_eq!(one.send(b"first", &[writer.as_fd(), writer.as_fd()]).unwrap(), SendOutcome::Sent);
    assert_eq!(one.send(b"second!", &[]).unwrap(), SendOutcome::Sent);
    drop(writer);
    let (length, fds) = packet(other.recv(&mut buffer).unwrap());
    assert_eq!((&buffer[..length], fds.len()), (&b"first"[..], 2));
    for fd in fds {
        assert!(rustix::io::fcntl_getfd(&fd).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        std::fs::File::from(fd).write_all(b"x").unwrap();
    }
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "xx");
    let (length, fds) = packet(other.recv_timeout(&mut buffer, Duration::from_secs(1)).unwrap());
    assert_eq!((&buffer[..length], fds.len()), (&b"second!"[..], 0));
    drop(one);
    assert!(matches!(other.recv(&mut buffer).unwrap(), RecvOutcome::Closed));
    assert_eq!(other.send(b"x", &[]).unwrap(), SendOutcome::Closed);
}

#[test]
fn what_does_not_fit_is_refused_and_its_descriptors_closed() {
    let (one, other) = Seqpacket::pair().unwrap();
    let (mut reader, writer) = io::pipe().unwrap();
    one.send(&[1; 100], &[writer.as_fd()]).unwrap();
    drop(writer);
    assert!(matches!(other.recv(&mut [0; 64]), Err(SocketError::Truncated { room: 64 })));
    assert_eq!(reader.read(&mut [0]).unwrap(), 0, "nobody holds the writing end");
    assert!(matches!(one.send(b"", &[]), Err(SocketError::Send { .. })));
    let many = vec![reader.as_fd(); FDS_MAX];
    one.send(b"x", &many).unwrap();
    assert_eq!(packet(other.recv(&mut [0; 8]).unwrap()).1.len(), FDS_MAX);
    assert!(matches!(one.send(b"x", &vec![reader.as_fd(); FDS_MAX + 1]), Err(SocketError::Send { .. })));
}

#[test]
fn a_full_queue_is_an_outcome() {
    let (one, other) = Seqpacket::pair().unwrap();
    let mut sent = 0;
    while one.send(&[0; 1000], &[]).unwrap() == SendOutcome::Sent {
        sent += 1;
    }
    assert!(sent > 10);
    let soon = Duration::from_millis(5);
    assert_eq!(one.send_timeout(&[0; 1000], &[], soon).unwrap(), SendOutcome::Full);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..sent {
                packet(other.recv(&mut [0; 1000]).unwrap());
            }
        });
        let outcome = one.send_timeout(&[0; 1000], &[], Duration::from_secs(5)).unwrap();
        assert_eq!(outcome, SendOutcome::Sent);
    });
}

#[test]
fn listeners_on_names_and_paths_know_who_connects() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let name = format!("pagefold-test-{}", Pid::this());
    let by_path = SeqpacketListener::bind_path(&path).unwrap();
    let by_name = SeqpacketListener::bind_abstract(name.as_bytes()).unwrap();
    assert!(matches!(SeqpacketListener::bind_abstract(name.as_bytes()), Err(SocketError::Listen { .. })));
    assert!(by_name.accept().unwrap().is_none());
    let clients = [Seqpacket::connect_path(&path).unwrap(), Seqpacket::connect_abstract(name.as_bytes()).unwrap()];
    for (listener, client) in [by_path, by_name].iter().zip(&clients) {
        let server = listener.accept_timeout(Duration::from_secs(5)).unwrap().unwrap();
        let peer = server.peer_credentials().unwrap();
        assert_eq!((peer.pid, peer.uid), (Pid::this(), rustix::process::geteuid().as_raw()));
        if let Some(pidfd) = server.peer_pidfd().unwrap() {
            assert!(!pidfd.exited().unwrap());
        }
        client.send(b"hello", &[]).unwrap();
        assert_eq!(packet(server.recv_timeout(&mut [0; 8], Duration::from_secs(5)).unwrap()).0, 5);
    }
    assert!(matches!(Seqpacket::connect_abstract(b"pagefold-nobody"), Err(SocketError::Connect { .. })));
}
