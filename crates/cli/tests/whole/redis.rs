//! redis-server, twice with the same data, with snapshots by forked children going on.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::{can_run, number, run, summary, until};

const KEYS: u32 = 20_000;

/// A connection.
struct Client(BufReader<UnixStream>);

impl Client {
    fn connect(socket: &Path) -> Self {
        Self(BufReader::new(until("redis answers", || UnixStream::connect(socket).ok())))
    }

    /// What a command is answered with: a line, or a value.
    fn ask(&mut self, words: &[&str]) -> Option<String> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request += &format!("${}\r\n{word}\r\n", word.len());
        }
        self.0.get_mut().write_all(request.as_bytes()).unwrap();
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        let line = line.trim_end();
        let Some(length) = line.strip_prefix('$') else { return Some(line.to_owned()) };
        let length: usize = length.parse().ok()?;
        let mut value = vec![0; length + 2];
        self.0.read_exact(&mut value).unwrap();
        value.truncate(length);
        Some(String::from_utf8(value).unwrap())
    }
}

/// What a key has after so many changes.
fn value(key: u32, changes: u32) -> String {
    format!("{key:06}.{changes:04}.").repeat(30)
}

fn server(command: &mut Command, folder: &Path, name: &str) -> (Child, PathBuf) {
    let socket = folder.join(name);
    command.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]).arg(&socket);
    command.arg("--dbfilename").arg(format!("{name}.rdb")).arg("--dir").arg(folder);
    (command.stdout(Stdio::null()).spawn().unwrap(), socket)
}

fn check(client: &mut Client, changes: &HashMap<u32, u32>, when: &str) {
    for key in 0..KEYS {
        let expected = value(key, changes.get(&key).copied().unwrap_or(0));
        let found = client.ask(&["GET", &key.to_string()]);
        assert_eq!(found, Some(expected), "key {key} {when}");
    }
}

#[test]
fn every_key_is_right_live_and_in_the_snapshot() {
    if !can_run("redis-server") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("summary");
    let seconds: u64 = std::env::var("REDIS_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(12);
    let mut servers = Vec::new();
    let mut both = run(&file);
    both.args(["--layout", "shared", "--", "sh", "-c"]);
    let one = |name: &str| {
        let socket = folder.path().join(name);
        servers.push((name.to_owned(), socket.clone()));
        format!(
            "redis-server --port 0 --save '' --appendonly no --unixsocket {} --dbfilename {name}.rdb --dir {} >/dev/null &",
            socket.display(),
            folder.path().display()
        )
    };
    let script: String = ["one", "two"].into_iter().map(one).collect();
    let mut running = both.arg(format!("{script} wait")).spawn().unwrap();
    let mut clients: Vec<Client> = servers.iter().map(|(_, socket)| Client::connect(socket)).collect();
    for client in &mut clients {
        for key in 0..KEYS {
            assert_eq!(client.ask(&["SET", &key.to_string(), &value(key, 0)]).as_deref(), Some("+OK"));
        }
    }
    let mut changes: HashMap<u32, u32> = HashMap::new();
    let until = Instant::now() + Duration::from_secs(seconds);
    let (mut turn, mut snapshots) = (0_u32, 0);
    while Instant::now() < until {
        for _ in 0..200 {
            turn = turn.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // A tenth of the keys is written, the others are read.
            let key = (turn >> 8) % KEYS;
            if key < KEYS / 10 {
                let count = changes.entry(key).or_default();
                *count += 1;
                for client in &mut clients {
                    assert_eq!(client.ask(&["SET", &key.to_string(), &value(key, *count)]).as_deref(), Some("+OK"));
                }
            } else {
                for client in &mut clients {
                    assert_eq!(client.ask(&["GET", &key.to_string()]), Some(value(key, 0)));
                }
            }
        }
        for client in &mut clients {
            // An error while the last one is going on.
            let answer = client.ask(&["BGSAVE"]).unwrap();
            snapshots += u32::from(answer.starts_with("+Background"));
        }
        std::thread::sleep(Duration::from_millis(40));
    }
    assert!(snapshots > 4, "{snapshots} snapshots");
    for client in &mut clients {
        check(client, &changes, "live");
        crate::until("the last snapshot", || {
            let about = client.ask(&["INFO", "persistence"]).unwrap();
            assert!(!about.contains("rdb_last_bgsave_status:err"), "{about}");
            about.contains("rdb_bgsave_in_progress:0").then_some(())
        });
        let answer = client.ask(&["BGSAVE"]).unwrap();
        assert!(answer.starts_with("+Background"), "{answer}");
        crate::until("a snapshot of the end", || {
            let about = client.ask(&["INFO", "persistence"]).unwrap();
            (about.contains("rdb_bgsave_in_progress:0") && about.contains("rdb_last_bgsave_status:ok")).then_some(())
        });
        client.0.get_mut().write_all(b"SHUTDOWN NOSAVE\r\n").unwrap();
    }
    assert!(running.wait().unwrap().success());
    let summary = summary(&file);
    println!("{snapshots} snapshots; {} pages merged", number(&summary, "merges"));
    assert!(number(&summary, "processes_ever") >= 2, "{summary:#}");
    assert!(number(&summary, "merges") > 500, "{summary:#}");
    // What a child of fork wrote is what its parent had.
    for (name, _) in &servers {
        std::fs::rename(folder.path().join(format!("{name}.rdb")), folder.path().join(format!("{name}.plain.rdb")))
            .unwrap();
        let (mut plain, socket) = server(&mut Command::new("redis-server"), folder.path(), &format!("{name}.plain"));
        let mut client = Client::connect(&socket);
        crate::until("the snapshot is loaded", || {
            (client.ask(&["DBSIZE"]).as_deref() == Some(&format!(":{KEYS}"))).then_some(())
        });
        check(&mut client, &changes, "in the snapshot");
        plain.kill().unwrap();
        plain.wait().unwrap();
    }
}
