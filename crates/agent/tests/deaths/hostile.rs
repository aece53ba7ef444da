//! Members that do what they can to harm the broker and the other members. Whatever they do, the broker answers, an
//! honest member beside them keeps all its bytes and goes on being merged, and nothing is left behind.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use abi::control::{self, Control};
use abi::wire::{Message, PACKET, Token};
use kernel::{CreateFlags, Pid, RecvOutcome, Seqpacket, SharedMap, Uffd};

use crate::stage::{Image, Player, Stage};

/// How long the broker may take to answer whoever asks beside an enemy.
const ANSWERS_WITHIN: Duration = Duration::from_secs(15);

/// A test and the image it takes.
pub(crate) type Test = fn(&Image);

pub(crate) const TESTS: [(&str, Test); 9] = [
    ("hostile-garbage", |image| beside(image, "garbage", 1)),
    ("hostile-random", |image| beside(image, "random", 2)),
    ("hostile-deaf", |image| beside(image, "deaf", 1)),
    ("hostile-chatter", |image| beside(image, "chatter", 1)),
    ("hostile-spin", |image| beside(image, "spin", 2)),
    ("hostile-stall", |image| beside(image, "stall", 1)),
    ("hostile-huge", |image| beside(image, "huge", 1)),
    ("hostile-corrupt", |image| beside(image, "corrupt", 2)),
    ("hostile-forks", |image| beside(image, "forks", 1)),
];

/// An honest member beside enemies.
fn beside(image: &Image, how: &str, enemies: usize) {
    let mut stage = Stage::new(image);
    let mut honest = stage.victim("honest member");
    honest.player.ask("fill");
    assert_eq!(honest.player.ask("merged"), "merged", "before the enemies came");
    let mut enemies: Vec<Player> = (0..enemies)
        .map(|_| {
            let mut command = stage.command("--enemy");
            if !matches!(how, "corrupt" | "forks") {
                command.env_remove("LD_PRELOAD");
            }
            command.args([how, &honest.player.pid().get().to_string()]);
            if how == "corrupt" {
                command.stderr(std::process::Stdio::null());
            }
            Player::start(command, format!("enemy ({how})"))
        })
        .collect();
    for enemy in &enemies {
        assert_eq!(enemy.hear(), "at it", "{how}");
    }
    // One that was there before, and one that comes now.
    let mut late = stage.victim("late honest member");
    for (player, order) in [(&mut honest.player, "diverge"), (&mut late.player, "fill")] {
        player.ask(order);
        let asked = Instant::now();
        stage.broker.ask("summary");
        assert!(asked.elapsed() < ANSWERS_WITHIN, "{how}: the broker took {:?} to answer", asked.elapsed());
        assert_eq!(player.ask("merged"), "merged", "{order} beside {how}: {}", stage.broker.ask("summary"));
    }
    assert!(late.player.ask("finish").starts_with("fine "));
    assert!(late.player.end().success());
    assert!(honest.player.ask("finish").starts_with("fine "));
    for enemy in &mut enemies {
        let _ = enemy.child.kill();
        let _ = enemy.child.wait();
    }
    assert!(honest.player.end().success());
    let helpers = [honest.helper.clone(), late.helper.clone()];
    drop((honest, late, enemies));
    stage.end(&helpers);
}

fn at_it() {
    use std::io::Write as _;
    println!("at it");
    std::io::stdout().flush().unwrap();
}

struct Dice(u64);

impl Dice {
    fn draw(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        // Interesting values come often.
        match self.0 % 8 {
            0 => u64::MAX,
            1 => u64::MAX - (self.0 >> 40),
            2 => (self.0 >> 17) & !0xfff,
            3 => self.0 >> 60,
            _ => self.0,
        }
    }
}

/// Where the broker is, and its secret.
fn address() -> (String, Token) {
    let variable = std::env::var("PAGEFOLD_AGENT").unwrap();
    let mut parts = variable.split(':');
    let (name, token) = (parts.next().unwrap().to_owned(), parts.next().unwrap().to_owned());
    let word = |range: std::ops::Range<usize>| u64::from_str_radix(&token[range], 16).unwrap();
    (name, Token(word(0..16), word(16..32)))
}

/// A process that plays member and helper in one.
struct Impostor {
    link: Seqpacket,
    control: SharedMap<Control>,
    uffd: Uffd,
    start: u64,
    len: u64,
}

impl Impostor {
    /// Introduces itself, with memory whose content is the honest member's.
    fn new(pages: usize) -> Self {
        let (name, token) = address();
        // SAFETY: a fresh mapping; the scratch areas are reserved like a helper's.
        let map = |len: usize| unsafe {
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            libc::mmap(std::ptr::null_mut(), len, prot, flags | libc::MAP_NORESERVE, -1, 0) as u64
        };
        let (start, len) = (map(pages * 4096), pages * 4096);
        let (control, fd) = SharedMap::<Control>::create("pagefold-control").unwrap();
        control.magic.store(control::MAGIC, SeqCst);
        control.version.store(control::VERSION, SeqCst);
        let link = Seqpacket::connect_abstract(name.as_bytes()).unwrap();
        let hello = Message::Hello {
            version: control::VERSION,
            member: std::process::id(),
            control: std::ptr::from_ref::<Control>(&control) as u64,
            scratch: map(4 << 20).next_multiple_of(2 << 20),
            diverged_scratch: map(1 << 20),
            token,
        };
        link.send(&hello.encode(), &[fd.as_fd()]).unwrap();
        let (_, device) = receive(&link).expect("a welcome");
        let uffd = match device {
            Some(device) => Uffd::from_device(device.as_fd(), CreateFlags::empty()).unwrap(),
            None => Uffd::create(CreateFlags::empty()).unwrap(),
        };
        link.send(&Message::Userfault { errno: 0 }.encode(), &[uffd.as_fd()]).unwrap();
        receive(&link).expect("that it is ready");
        Self { link, control, uffd, start, len: len as u64 }
    }

    fn hand_over(&self, slot: usize, start: u64, end: u64) {
        self.control.ranges[slot].start.store(start, SeqCst);
        self.control.ranges[slot].end.store(end, SeqCst);
        self.control.layout_epoch.fetch_add(1, SeqCst);
    }

    /// The honest member's contents, so that there is something to be ordered.
    fn fill(&self) {
        self.hand_over(0, self.start, self.start + self.len);
        for page in 0..self.len / 4096 {
            let id = 1000 + page % 64;
            for index in 0..512_u64 {
                let word = id.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index);
                // SAFETY: inside the impostor's own memory.
                unsafe { ((self.start + page * 4096) as *mut u64).add(index as usize).write_volatile(word) };
            }
        }
    }
}

fn receive(link: &Seqpacket) -> Option<(Message, Option<OwnedFd>)> {
    let mut packet = [0; PACKET];
    match link.recv_timeout(&mut packet, Duration::from_secs(10)) {
        Ok(RecvOutcome::Packet { length, mut fds }) => Some((Message::decode(&packet[..length])?, fds.pop())),
        _ => None,
    }
}

pub(crate) fn enemy(arguments: &[String]) {
    let honest: u32 = arguments[1].parse().unwrap();
    let mut dice = Dice(u64::from(std::process::id()) << 20 | 1);
    match arguments[0].as_str() {
        "garbage" => garbage(&mut dice, honest),
        "random" => random(&mut dice),
        "deaf" => {
            let impostor = Impostor::new(128);
            impostor.fill();
            at_it();
            std::thread::sleep(Duration::from_secs(1000));
        }
        "chatter" => {
            let impostor = Impostor::new(128);
            impostor.fill();
            at_it();
            loop {
                if impostor.link.send(&Message::Done { count: u32::MAX }.encode(), &[]).is_err() {
                    std::thread::sleep(Duration::from_millis(10));
                }
            }
        }
        "spin" => {
            let impostor = Impostor::new(128);
            impostor.fill();
            at_it();
            // Whatever priority it is given for its plan is used for nothing.
            loop {
                std::hint::spin_loop();
            }
        }
        "stall" => stall(),
        "huge" => huge(),
        "corrupt" => corrupt(&mut dice),
        "forks" => forks(),
        other => panic!("{other}"),
    }
}

/// Everything that can be sent without being a member.
fn garbage(dice: &mut Dice, honest: u32) {
    let (name, token) = address();
    at_it();
    let mut pipe = [0; 2];
    // SAFETY: the kernel writes two numbers; the descriptors stay open.
    let pipe = unsafe {
        libc::pipe(pipe.as_mut_ptr());
        BorrowedFd::borrow_raw(pipe[0])
    };
    let (_sealed, right_size) = SharedMap::<Control>::create("garbage").unwrap();
    let short = kernel::memfd::create("short", kernel::Bytes(4096)).unwrap();
    kernel::memfd::seal_size(short.as_fd()).unwrap();
    let unsealed = kernel::memfd::create("unsealed", kernel::Bytes(1 << 22)).unwrap();
    let file = std::fs::File::open("/proc/self/exe").unwrap();
    let mut held = Vec::new();
    loop {
        let Ok(link) = Seqpacket::connect_abstract(name.as_bytes()) else { continue };
        let token = if dice.draw().is_multiple_of(3) { Token(dice.draw(), dice.draw()) } else { token };
        let member = match dice.draw() % 6 {
            0 => honest,
            1 => 1,
            2 => 0,
            3 => u32::MAX,
            4 => std::process::id(),
            _ => dice.draw() as u32,
        };
        let hello = Message::Hello {
            version: if dice.draw().is_multiple_of(5) { dice.draw() as u32 } else { control::VERSION },
            member,
            control: dice.draw(),
            scratch: dice.draw(),
            diverged_scratch: dice.draw(),
            token,
        };
        let descriptors = [link.as_fd(), pipe, right_size.as_fd(), short.as_fd(), unsealed.as_fd(), file.as_fd()];
        let given = &descriptors[(dice.draw() % 6) as usize..][..1];
        let mut packet = hello.encode().to_vec();
        match dice.draw() % 8 {
            0 => packet.truncate(dice.draw() as usize % PACKET),
            1 => packet.resize(dice.draw() as usize % 4096, 0xaa),
            2 => packet.iter_mut().for_each(|byte| *byte = dice.draw() as u8),
            3 => packet = br#"{"version":1,"token":[18446744073709551615,0]}"#.to_vec(),
            _ => {}
        }
        let _ = link.send(&packet, if dice.draw().is_multiple_of(4) { &[] } else { given });
        let _ = link.send(&Message::Done { count: 1 }.encode(), &descriptors[..2]);
        // Some hang on without a word.
        if held.len() < 100 {
            held.push(link);
        } else {
            held[(dice.draw() % 100) as usize] = link;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// A member whose whole control area is noise.
fn random(dice: &mut Dice) {
    let impostor = Impostor::new(256);
    impostor.fill();
    at_it();
    let control = &impostor.control;
    let words = size_of::<Control>() / 4;
    let area = std::ptr::from_ref::<Control>(control) as *const std::sync::atomic::AtomicU32;
    loop {
        for _ in 0..2000 {
            // SAFETY: the area consists of atomics.
            unsafe { (*area.add((dice.draw() as usize >> 3) % words)).store(dice.draw() as u32, SeqCst) };
        }
        for slot in 0..control::RANGES_MAX {
            let start = dice.draw();
            impostor.hand_over(slot, start, if dice.draw().is_multiple_of(2) { 1 << 47 } else { dice.draw() });
        }
        control.counters.frozen.iter().for_each(|bucket| bucket.store(u64::MAX, SeqCst));
        impostor.hand_over(0, 0, 1 << 47);
        let _ = impostor.link.send(&Message::Done { count: dice.draw() as u32 }.encode(), &[]);
        std::thread::sleep(Duration::from_millis(1));
        let _keeps = &impostor.uffd;
    }
}

/// A member whose pages vanish while they are read, behind a userfaultfd of its own that nobody serves.
fn stall() {
    let impostor = Impostor::new(1 << 15);
    let own = Uffd::create(CreateFlags::empty()).unwrap();
    own.api(kernel::UffdFeatures::empty()).unwrap();
    let range =
        kernel::Range::new(kernel::Vaddr(impostor.start), kernel::Vaddr(impostor.start + impostor.len)).unwrap();
    for page in 0..impostor.len / 4096 {
        // SAFETY: inside the impostor's own memory; no two pages are equal, and none is zero.
        unsafe { ((impostor.start + page * 4096) as *mut u64).write_volatile(page + 1) };
    }
    own.register(range, kernel::Mode::MISSING).unwrap();
    impostor.hand_over(0, impostor.start, impostor.start + impostor.len);
    at_it();
    // When they have settled, they go, from the last on.
    std::thread::sleep(Duration::from_millis(500));
    for page in (0..impostor.len / 4096).rev() {
        // SAFETY: as above.
        unsafe { libc::madvise((impostor.start + page * 4096) as *mut libc::c_void, 4096, libc::MADV_DONTNEED) };
        if page % 16 == 0 {
            std::thread::sleep(Duration::from_micros(800));
        }
    }
    std::thread::sleep(Duration::from_secs(1000));
}

/// The whole address space, in as many pieces as the kernel allows, and the store mapped over and over.
fn huge() {
    let impostor = Impostor::new(128);
    impostor.fill();
    let (prot, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
    // SAFETY: fresh mappings.
    unsafe {
        let whole = libc::mmap(std::ptr::null_mut(), 64 << 40, prot, flags, -1, 0);
        assert_ne!(whole, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        let pieces = libc::mmap(std::ptr::null_mut(), 60_000 * 4096, prot, flags, -1, 0).cast::<u8>();
        for page in (0..60_000).step_by(2) {
            libc::mprotect(pieces.add(page * 4096).cast(), 4096, libc::PROT_READ);
        }
    }
    impostor.hand_over(0, 0, 1 << 47);
    at_it();
    loop {
        // Every cycle everything is to be read anew.
        impostor.control.layout_epoch.fetch_add(1, SeqCst);
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A program with a true agent that overwrites it: first what it shares with the broker, then its data and its code.
fn corrupt(dice: &mut Dice) {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a fresh mapping, handed over.
    let start = unsafe {
        let start = libc::mmap(std::ptr::null_mut(), 256 * 4096, prot, flags, -1, 0).cast::<u64>();
        for page in 0..256_u64 {
            for index in 0..512 {
                let word = (1000 + page % 64).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(index);
                start.add((page * 512 + index) as usize).write(word);
            }
        }
        libc::madvise(start.cast(), 256 * 4096, libc::MADV_MERGEABLE);
        start
    };
    at_it();
    std::thread::sleep(Duration::from_millis(dice.draw() % 1500));
    let maps = kernel::maps::read(Pid::this()).unwrap();
    let of = |name: &str| {
        let found = maps.iter().filter(|vma| vma.name.to_string_lossy().contains(name)).map(|vma| vma.range);
        found.collect::<Vec<_>>()
    };
    for (areas, tries) in [(of("pagefold-control"), 3000), (of("agent_image"), 100_000)] {
        for _ in 0..tries {
            for area in &areas {
                let at = area.start().get() + dice.draw() % area.len().get() / 8 * 8;
                // SAFETY: none. It may well be the end of this process.
                unsafe {
                    if tries > 3000 {
                        libc::mprotect((at & !0xfff) as *mut libc::c_void, 4096, 7);
                    }
                    (at as *mut u64).write_volatile(dice.draw());
                }
            }
            // SAFETY: mapped above.
            unsafe { start.add((dice.draw() % 131_072) as usize).write_volatile(1) };
            if tries <= 3000 {
                std::thread::sleep(Duration::from_micros(700));
            }
        }
    }
}

/// Children as fast as they come, some of which hand memory over, too.
fn forks() {
    at_it();
    let mut turn = 0_u32;
    loop {
        turn += 1;
        // SAFETY: the child makes system calls only, and ends.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                if turn.is_multiple_of(32) {
                    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                    let start = libc::mmap(std::ptr::null_mut(), 64 * 4096, prot, flags, -1, 0);
                    libc::madvise(start, 64 * 4096, libc::MADV_MERGEABLE);
                }
                libc::_exit(0);
            }
            if turn.is_multiple_of(8) {
                while libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) > 0 {}
                libc::usleep(5000);
            }
        }
    }
}
