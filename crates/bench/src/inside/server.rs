//! A server of NFS version 3 in this process, for one client: one file, and answers as late as one wants.
//!
//! The kernel's own server cannot be told when to answer, and wants to be set up by three daemons. What a client on this
//! machine needs of the protocol (RFC 1813) is little: the file's attributes, READ and WRITE.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use super::pages::{Content, size};

/// When the server answers READ and WRITE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answers {
    /// After so many microseconds at most, sooner or later.
    Within(u64),
    /// Not before somebody says so.
    Held,
}

/// What the connections share.
struct State {
    answers: Answers,
    /// Bytes of reads and writes that wait for their answer.
    waiting: u64,
    /// READ and WRITE requests so far.
    requests: u64,
    /// What was written, by page.
    written: HashMap<u64, Vec<u8>>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Which content the file has.
    kind: u64,
    /// Length of the file in bytes.
    length: u64,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server. It serves for as long as the process lives, so that nobody waits for it in vain.
pub(super) struct Server {
    shared: Arc<Shared>,
    port: u16,
}

impl Server {
    /// Serves a file of so many pages with a content of this kind.
    pub(super) fn start(kind: u64, pages: u64) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("listen for a client of NFS")?;
        let port = listener.local_addr().context("the port of a listener")?.port();
        let state = State { answers: Answers::Within(0), waiting: 0, requests: 0, written: HashMap::new() };
        let length = pages * size() as u64;
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), kind, length });
        let served = Arc::clone(&shared);
        std::thread::Builder::new().name("nfs-listener".to_owned()).spawn(move || {
            for stream in listener.incoming().filter_map(io::Result::ok) {
                let served = Arc::clone(&served);
                // Whoever cannot be served sees a closed connection.
                let _ = std::thread::Builder::new().name("nfs-server".to_owned()).spawn(move || serve(&served, stream));
            }
        })?;
        Ok(Self { shared, port })
    }

    /// Where it listens.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Says when it is to answer. Whoever waits for an answer that was held gets it.
    pub(super) fn answer(&self, answers: Answers) {
        self.shared.state().answers = answers;
        self.shared.changed.notify_all();
    }

    /// Waits until requests for so many bytes wait for their answer.
    pub(super) fn wait_for(&self, bytes: u64, timeout: Duration) -> Result<()> {
        let state = self.shared.state();
        let waits = |state: &mut State| state.waiting < bytes;
        let waited = self.shared.changed.wait_timeout_while(state, timeout, waits);
        let (state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            bail!("requests for {} bytes have arrived instead of {bytes}", state.waiting);
        }
        Ok(())
    }

    /// READ and WRITE requests so far.
    pub(super) fn requests(&self) -> u64 {
        self.shared.state().requests
    }

    /// Takes what was written: pages by their number in the file.
    pub(super) fn take_written(&self) -> HashMap<u64, Vec<u8>> {
        std::mem::take(&mut self.shared.state().written)
    }
}

/// Serves one connection until the client closes it.
fn serve(shared: &Arc<Shared>, mut stream: TcpStream) {
    let Ok(writer) = stream.try_clone() else { return };
    let writer = Arc::new(Mutex::new(writer));
    while let Ok(record) = read_record(&mut stream) {
        let (shared, writer) = (Arc::clone(shared), Arc::clone(&writer));
        // Requests wait for their answers side by side.
        let answer = move || {
            let Some(reply) = answer(&shared, &record) else { return };
            let mark = (reply.len() as u32 | LAST).to_be_bytes();
            let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
            // A client that has gone wants no answer.
            let _ = writer.write_all(&[&mark[..], &reply].concat());
        };
        if std::thread::Builder::new().name("nfs-answer".to_owned()).spawn(answer).is_err() {
            return;
        }
    }
}

/// Marks the last fragment of a record (RFC 5531, section 11).
const LAST: u32 = 1 << 31;

fn read_record(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut record = Vec::new();
    loop {
        let mut mark = [0; 4];
        stream.read_exact(&mut mark)?;
        let mark = u32::from_be_bytes(mark);
        let before = record.len();
        record.resize(before + (mark & !LAST) as usize, 0);
        stream.read_exact(&mut record[before..])?;
        if mark & LAST != 0 {
            return Ok(record);
        }
    }
}

/// The words of a request, read one after the other.
struct Words<'a>(&'a [u8]);

impl<'a> Words<'a> {
    fn take(&mut self, bytes: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(bytes)?;
        self.0 = rest;
        Some(taken)
    }

    fn word(&mut self) -> Option<u32> {
        Some(u32::from_be_bytes(self.take(4)?.try_into().ok()?))
    }

    fn long(&mut self) -> Option<u64> {
        Some(u64::from_be_bytes(self.take(8)?.try_into().ok()?))
    }

    /// Bytes behind their length, with what fills them up to a word.
    fn opaque(&mut self) -> Option<&'a [u8]> {
        let length = self.word()? as usize;
        let bytes = self.take(length.next_multiple_of(4))?;
        Some(&bytes[..length])
    }
}

/// An answer in the making.
#[derive(Default)]
struct Reply(Vec<u8>);

impl Reply {
    fn words(&mut self, words: &[u32]) -> &mut Self {
        words.iter().for_each(|word| self.0.extend(word.to_be_bytes()));
        self
    }

    fn long(&mut self, long: u64) -> &mut Self {
        self.0.extend(long.to_be_bytes());
        self
    }

    fn opaque(&mut self, bytes: &[u8]) -> &mut Self {
        self.words(&[bytes.len() as u32]);
        self.0.extend(bytes);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// `post_op_attr`: attributes follow, and here they are.
    fn attributes(&mut self, shared: &Shared, handle: &[u8]) -> &mut Self {
        self.words(&[1]).plain_attributes(shared, handle)
    }

    /// `fattr3` of the folder or of the file.
    fn plain_attributes(&mut self, shared: &Shared, handle: &[u8]) -> &mut Self {
        const FOLDER: [u32; 2] = [2, 0o755];
        const FILE: [u32; 2] = [1, 0o644];
        let (what, number) = if handle == FOLDER_HANDLE { (FOLDER, 1) } else { (FILE, 2) };
        // Links, owner and group; then size, use, device, file system, number and three times.
        self.words(&what).words(&[1, 0, 0]).long(shared.length).long(shared.length).words(&[0, 0]);
        self.long(1).long(number).words(&[1, 0, 1, 0, 1, 0])
    }
}

const FOLDER_HANDLE: &[u8] = b"folder--";
const FILE_HANDLE: &[u8] = b"the-file";
/// The file's name in the folder.
pub(super) const FILE_NAME: &str = "file";

/// The answer to a call; `None` if it is none.
fn answer(shared: &Shared, record: &[u8]) -> Option<Vec<u8>> {
    const MOUNT: u32 = 100_005;
    const NFS: u32 = 100_003;
    const PROGRAM_UNAVAILABLE: u32 = 1;
    const PROCEDURE_UNAVAILABLE: u32 = 3;

    let mut call = Words(record);
    let (number, kind) = (call.word()?, call.word()?);
    let (_rpc, program, _version, procedure) = (call.word()?, call.word()?, call.word()?, call.word()?);
    for _credentials_and_verifier in 0..2 {
        call.word()?;
        call.opaque()?;
    }
    if kind != 0 {
        return None;
    }
    let mut results = Reply::default();
    let accepted = match program {
        MOUNT => mount(procedure, &mut results).map_or(PROCEDURE_UNAVAILABLE, |()| 0),
        NFS => nfs(shared, procedure, &mut call, &mut results).map_or(PROCEDURE_UNAVAILABLE, |()| 0),
        _ => PROGRAM_UNAVAILABLE,
    };
    let mut reply = Reply::default();
    // A reply, accepted, without a verifier.
    reply.words(&[number, 1, 0, 0, 0, accepted]);
    if accepted == 0 {
        reply.0.extend(results.0);
    }
    Some(reply.0)
}

/// The program that hands out the folder.
fn mount(procedure: u32, results: &mut Reply) -> Option<()> {
    match procedure {
        // NULL and UMNT.
        0 | 3 => {}
        // MNT: the handle, and that numbers of users are believed.
        1 => {
            results.words(&[0]).opaque(FOLDER_HANDLE).words(&[1, 1]);
        }
        _ => return None,
    }
    Some(())
}

fn nfs(shared: &Shared, procedure: u32, call: &mut Words<'_>, results: &mut Reply) -> Option<()> {
    const NO_SUCH_ENTRY: u32 = 2;
    const MOST: u32 = 1 << 20;

    if procedure == 0 {
        return Some(());
    }
    let handle = call.opaque()?;
    match procedure {
        // GETATTR
        1 => {
            results.words(&[0]).plain_attributes(shared, handle);
        }
        // SETATTR, COMMIT: nothing changes.
        2 | 21 => {
            results.words(&[0, 0]).attributes(shared, handle);
            if procedure == 21 {
                results.long(1);
            }
        }
        // LOOKUP
        3 if call.opaque()? == FILE_NAME.as_bytes() => {
            results.words(&[0]).opaque(FILE_HANDLE).attributes(shared, FILE_HANDLE).attributes(shared, handle);
        }
        3 => {
            results.words(&[NO_SUCH_ENTRY]).attributes(shared, handle);
        }
        // ACCESS: whatever is asked for.
        4 => {
            results.words(&[0]).attributes(shared, handle).words(&[call.word()?]);
        }
        6 => read(shared, call, results)?,
        7 => write(shared, call, results)?,
        // FSSTAT
        18 => {
            results.words(&[0]).attributes(shared, handle);
            (0..6).for_each(|_| _ = results.long(1 << 30));
            results.words(&[0]);
        }
        // FSINFO: sizes of reads, writes and listings; largest file, precision of times, and that attributes can be set.
        19 => {
            results.words(&[0]).attributes(shared, handle);
            results.words(&[MOST, MOST, 4096, MOST, MOST, 4096, 4096]).long(1 << 40).words(&[0, 1, 0x18]);
        }
        // PATHCONF
        20 => {
            results.words(&[0]).attributes(shared, handle).words(&[1, 255, 1, 1, 0, 1]);
        }
        _ => return None,
    }
    Some(())
}

/// READ: whole pages of the file, after a while.
fn read(shared: &Shared, call: &mut Words<'_>, results: &mut Reply) -> Option<()> {
    let (offset, count) = (call.long()?, u64::from(call.word()?));
    let end = (offset + count).min(shared.length);
    hold(shared, end.saturating_sub(offset));
    let page = size() as u64;
    let mut bytes = Vec::new();
    for number in offset / page..end.div_ceil(page) {
        let mut content = vec![0; size()];
        Content { kind: shared.kind, page: number }.fill(&mut content);
        bytes.extend(content);
    }
    let bytes = bytes.get((offset % page) as usize..)?.get(..end.saturating_sub(offset) as usize)?;
    results.words(&[0]).attributes(shared, FILE_HANDLE);
    results.words(&[bytes.len() as u32, u32::from(end == shared.length)]).opaque(bytes);
    Some(())
}

/// WRITE: keeps what was written apart from the file, and answers after a while that it is safe.
fn write(shared: &Shared, call: &mut Words<'_>, results: &mut Reply) -> Option<()> {
    const SAFE: u32 = 2;

    let (offset, count, _stable) = (call.long()?, call.word()?, call.word()?);
    let bytes = call.opaque()?;
    let first = offset / size() as u64;
    let pages = bytes.chunks(size()).map(<[u8]>::to_vec);
    shared.state().written.extend((first..).zip(pages));
    hold(shared, bytes.len() as u64);
    // Nothing is known of before.
    results.words(&[0, 0]).attributes(shared, FILE_HANDLE).words(&[count, SAFE]).long(1);
    Some(())
}

/// Keeps an answer back for as long as answers are to be kept back.
fn hold(shared: &Shared, bytes: u64) {
    let mut state = shared.state();
    state.waiting += bytes;
    state.requests += 1;
    shared.changed.notify_all();
    let held = |state: &mut State| state.answers == Answers::Held;
    state = shared.changed.wait_while(state, held).unwrap_or_else(PoisonError::into_inner);
    if let Answers::Within(microseconds) = state.answers
        && microseconds > 0
    {
        let late = state.requests.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
        drop(state);
        std::thread::sleep(Duration::from_micros(late % microseconds));
        state = shared.state();
    }
    state.waiting -= bytes;
}
