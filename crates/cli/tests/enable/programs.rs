//! Programs as they are used, started without any preparation: enabled, merged by ksmd, disabled, and serving all the time.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use kernel::{KsmSysfs, Pid, smaps};

use crate::stand::{Host, Running, pagefold};

fn installed(program: &str) -> bool {
    let found = Command::new("sh").args(["-c", "command -v \"$1\"", "sh", program]).output().unwrap().status.success();
    if !found {
        println!("skipped: {program}");
    }
    found
}

fn until<T>(what: &str, mut get: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(got) = get() {
            return got;
        }
        assert!(Instant::now() < deadline, "{what} within a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Two of a kind, so that there is something to merge.
fn both<T: Served>(mut servers: [T; 2]) {
    let Some(host) = Host::busy() else { return };
    servers.iter_mut().for_each(Served::serve);
    let numbers = servers.each_ref().map(Served::pid);
    let words = numbers.map(|pid| pid.to_string());
    let said = pagefold(&["enable", "--children", &words[0], &words[1]]);
    assert_eq!(said.status, Some(0), "{said:?}");
    servers.iter_mut().for_each(Served::serve);
    host.passes(5);
    let counters = KsmSysfs::host().counters().unwrap();
    let merged = numbers.map(|pid| kernel::ksm_sysfs::ksm_stat(pid).unwrap().ksm_merging_pages.unwrap());
    println!(
        "{}: merged {merged:?}, shared {:?}, sharing {:?}",
        T::NAME,
        counters.pages_shared,
        counters.pages_sharing
    );
    assert!(merged.iter().all(|pages| *pages > 50), "{}: {merged:?}", T::NAME);
    assert!(counters.pages_shared.unwrap() > 0 && counters.pages_sharing.unwrap() > 0);
    servers.iter_mut().for_each(Served::serve);
    let said = pagefold(&["disable", "--children", &words[0], &words[1]]);
    assert_eq!(said.status, Some(0), "{said:?}");
    for pid in numbers {
        assert_eq!(smaps::rollup(pid).unwrap().ksm.get(), 0, "{}", T::NAME);
        assert!(smaps::read(pid).unwrap().iter().all(|entry| !entry.flags.mergeable()));
        assert_eq!(kernel::ksm_sysfs::ksm_stat(pid).unwrap().ksm_merge_any, Some(false));
    }
    servers.iter_mut().for_each(Served::serve);
}

/// A server, and a question that it must answer.
trait Served {
    const NAME: &str;
    fn pid(&self) -> Pid;
    fn serve(&mut self);
}

struct Redis(Running, UnixStream);

impl Redis {
    fn new(folder: &Path, name: &str) -> Self {
        let socket = folder.join(name);
        let mut command = Command::new("redis-server");
        command.args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket"]).arg(&socket);
        let running = Running::start(command.current_dir(folder).stderr(std::process::Stdio::null()));
        let stream = until("redis", || UnixStream::connect(&socket).ok());
        let mut redis = Self(running, stream);
        // Values that both have.
        for key in 0..500 {
            let value = format!("{key:04}").repeat(2000);
            let set = format!("*3\r\n$3\r\nSET\r\n$4\r\n{key:04}\r\n${}\r\n{value}\r\n", value.len());
            assert_eq!(redis.ask(set.as_bytes(), 5), b"+OK\r\n");
        }
        redis
    }

    fn ask(&mut self, words: &[u8], length: usize) -> Vec<u8> {
        self.1.write_all(words).unwrap();
        let mut answer = vec![0; length];
        self.1.read_exact(&mut answer).unwrap();
        answer
    }
}

impl Served for Redis {
    const NAME: &str = "redis-server";

    fn pid(&self) -> Pid {
        self.0.pid()
    }

    fn serve(&mut self) {
        let answer = self.ask(b"GET 0123\r\n", b"$8000\r\n".len() + 8002);
        assert!(answer.starts_with(b"$8000\r\n01230123"));
        assert_eq!(self.ask(b"SET 0123 x\r\nSET 0123 ", 5), b"+OK\r\n");
        // The rest of the second command.
        let value = "0123".repeat(2000);
        assert_eq!(self.ask(format!("{value}\r\n").as_bytes(), 5), b"+OK\r\n");
    }
}

#[test]
fn redis() {
    if installed("redis-server") {
        let folder = tempfile::tempdir().unwrap();
        both(["one", "two"].map(|name| Redis::new(folder.path(), name)));
    }
}

struct Python(Running, u16);

impl Python {
    fn new(folder: &Path) -> Self {
        std::fs::write(folder.join("answer"), "forty-two").unwrap();
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-u", "-m", "http.server", "--bind", "127.0.0.1", "0"]).current_dir(folder);
        let mut running = Running::start(command.stderr(std::process::Stdio::null()));
        // Serving HTTP on 127.0.0.1 port 43567 (http://127.0.0.1:43567/) ...
        let line = running.line();
        let port = line.split_whitespace().nth(5).unwrap_or_else(|| panic!("{line}")).parse().unwrap();
        Self(running, port)
    }
}

impl Served for Python {
    const NAME: &str = "python3";

    fn pid(&self) -> Pid {
        self.0.pid()
    }

    fn serve(&mut self) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.1)).unwrap();
        stream.write_all(b"GET /answer HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.0 200") && answer.ends_with("forty-two"), "{answer}");
    }
}

#[test]
fn python_server() {
    if installed("/usr/bin/python3") {
        let folder = tempfile::tempdir().unwrap();
        both([(); 2].map(|()| Python::new(folder.path())));
    }
}

struct Qemu(Running, UnixStream);

impl Qemu {
    fn new(folder: &Path, name: &str) -> Self {
        let socket = folder.join(name);
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-m", "64", "-display", "none", "-nodefaults", "-qmp"]);
        command.arg(format!("unix:{},server=on,wait=off", socket.display()));
        let running = Running::start(&mut command);
        let stream = until("QEMU", || UnixStream::connect(&socket).ok());
        let mut qemu = Self(running, stream);
        assert!(qemu.line().contains("QMP"));
        assert!(qemu.ask("qmp_capabilities").contains("return"));
        qemu
    }

    fn line(&mut self) -> String {
        let mut line = Vec::new();
        let mut byte = [0];
        while byte != *b"\n" {
            self.1.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        String::from_utf8(line).unwrap()
    }

    fn ask(&mut self, command: &str) -> String {
        self.1.write_all(format!("{{\"execute\": \"{command}\"}}\n").as_bytes()).unwrap();
        loop {
            // Events come in between.
            let line = self.line();
            if line.contains("\"return\"") || line.contains("\"error\"") {
                return line;
            }
        }
    }
}

impl Served for Qemu {
    const NAME: &str = "qemu-system-x86_64";

    fn pid(&self) -> Pid {
        self.0.pid()
    }

    fn serve(&mut self) {
        let answer = self.ask("query-status");
        assert!(answer.contains("\"running\": true"), "{answer}");
    }
}

#[test]
fn qemu() {
    if installed("qemu-system-x86_64") {
        let folder = tempfile::tempdir().unwrap();
        both(["one", "two"].map(|name| Qemu::new(folder.path(), name)));
    }
}

/// A class whose `main` is `System.in.transferTo(System.out)`: what a compiler would make of it, so that none is needed.
fn echo_class() -> Vec<u8> {
    let utf8 = |text: &str| [&[1, 0, u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    let two = |tag: u8, first: u8, second: u8| vec![tag, 0, first, 0, second];
    let one = |tag: u8, index: u8| vec![tag, 0, index];
    let pool = [
        utf8("Echo"),                      // 1
        one(7, 1),                         // 2 class Echo
        utf8("java/lang/Object"),          // 3
        one(7, 3),                         // 4
        utf8("java/lang/System"),          // 5
        one(7, 5),                         // 6
        utf8("in"),                        // 7
        utf8("Ljava/io/InputStream;"),     // 8
        two(12, 7, 8),                     // 9
        two(9, 6, 9),                      // 10 System.in
        utf8("out"),                       // 11
        utf8("Ljava/io/PrintStream;"),     // 12
        two(12, 11, 12),                   // 13
        two(9, 6, 13),                     // 14 System.out
        utf8("java/io/InputStream"),       // 15
        one(7, 15),                        // 16
        utf8("transferTo"),                // 17
        utf8("(Ljava/io/OutputStream;)J"), // 18
        two(12, 17, 18),                   // 19
        two(10, 16, 19),                   // 20 InputStream.transferTo
        utf8("main"),                      // 21
        utf8("([Ljava/lang/String;)V"),    // 22
        utf8("Code"),                      // 23
    ];
    // getstatic 10, getstatic 14, invokevirtual 20, pop2, return
    let code = [0xb2, 0, 10, 0xb2, 0, 14, 0xb6, 0, 20, 0x58, 0xb1];
    let mut class = vec![0xca, 0xfe, 0xba, 0xbe, 0, 0, 0, 52, 0, u8::try_from(pool.len()).unwrap() + 1];
    class.extend(pool.concat());
    // Public, class 2 extends 4, no interfaces, no fields, one method: public static, 21, 22, one attribute.
    class.extend([0, 0x21, 0, 2, 0, 4, 0, 0, 0, 0, 0, 1, 0, 9, 0, 21, 0, 22, 0, 1]);
    // Code: length, deepest stack, locals, code, no handlers, no attributes; and none of the class.
    class.extend([0, 23, 0, 0, 0, 12 + 11, 0, 2, 0, 1, 0, 0, 0, 11]);
    class.extend(code);
    class.extend([0, 0, 0, 0, 0, 0]);
    class
}

struct Jvm(Running);

impl Jvm {
    fn new(folder: &Path) -> Self {
        std::fs::write(folder.join("Echo.class"), echo_class()).unwrap();
        let mut command = Command::new("java");
        command.args(["-Xms32m", "-Xmx64m", "-cp"]).arg(folder).arg("Echo");
        let mut jvm = Self(Running::start(&mut command));
        jvm.serve();
        jvm
    }
}

impl Served for Jvm {
    const NAME: &str = "java";

    fn pid(&self) -> Pid {
        self.0.pid()
    }

    fn serve(&mut self) {
        assert_eq!(self.0.ask("forty-two"), "forty-two");
    }
}

#[test]
fn jvm() {
    if installed("java") {
        let folder = tempfile::tempdir().unwrap();
        both([(); 2].map(|()| Jvm::new(folder.path())));
    }
}
