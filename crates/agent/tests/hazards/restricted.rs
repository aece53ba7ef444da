//! C4: programs that filter their own system calls. The gate's own calls go through the filter too.

use crate::stand::Stand;
use crate::victim::{Region, Victim, fork, reap, wait_until};
use crate::whole::{large_pair, wait_whole};

pub(crate) const VICTIMS: &[Victim] = &[
    ("filter_kills", filter_kills),
    ("filter_kills_young", filter_kills_young),
    ("filter_answers", filter_answers),
    ("filter_of_few", filter_of_few),
    ("filter_refused", filter_refused),
    ("filter_traps", filter_traps),
];

const FIRST: u64 = 61_000;
const KILL: u32 = 0x8000_0000;
const EACCES: u32 = 0x0005_000d;
const ALLOW: u32 = 0x7fff_0000;

fn statement(code: u16, value: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf: 0, k: value }
}

/// Answers to these calls with `answer`, and lets all others through; what the kernel says to it.
fn forbid(calls: &[i64], answer: u32) -> i64 {
    let mut filter = vec![statement(0x20, 0)];
    for number in calls {
        filter.push(libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: *number as u32 });
        filter.push(statement(0x06, answer));
    }
    filter.push(statement(0x06, ALLOW));
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: restricts this process.
    unsafe { libc::syscall(libc::SYS_seccomp, 1, 0, &raw const program) }
}

fn forbid_for_good(calls: &[i64], answer: u32) {
    // SAFETY: a property of this process.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    assert_eq!(forbid(calls, answer), 0);
}

/// What plain memory does, in this process, in threads and in children.
fn use_memory(one: Region, two: Region) {
    two.check_from(FIRST);
    one.part(10, 20).advise(libc::MADV_DONTNEED);
    one.part(10, 20).check_zero();
    assert_eq!(one.part(50, 60).protect(libc::PROT_READ), 0);
    one.part(30, 40).unmap();
    one.part(40, one.pages).check_from(FIRST + 40);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let region = Region::map(8);
                    region.fill_from(1);
                    region.advise(libc::MADV_DONTNEED);
                    region.check_zero();
                    region.unmap();
                }
            });
        }
    });
    reap(fork(|| {
        two.part(100, 200).advise(libc::MADV_DONTNEED);
        two.part(100, 200).check_zero();
        two.part(200, two.pages).check_from(FIRST + 200);
    }));
    two.check_from(FIRST);
    assert_eq!(one.merged() + two.merged(), 0);
}

fn pair() -> (Region, Region) {
    let (one, two) = large_pair();
    one.fill_from(FIRST);
    two.fill_from(FIRST);
    (one, two)
}

fn filter_kills() {
    let (one, two) = pair();
    wait_whole(one, two);
    forbid_for_good(&[libc::SYS_gettid], KILL);
    use_memory(one, two);
}

/// Seen to fail: the next munmap was the program's last call.
#[test]
fn c4_a_filter_kills_nobody_for_the_gates_calls() {
    let stand = Stand::of_all(|_| true);
    stand.run("filter_kills");
    stand.assert_merged(8000);
    assert!(stand.summary().stopped.iter().any(|line| line.contains("seccomp")));
}

fn filter_kills_young() {
    let region = Region::map(100);
    forbid_for_good(&[libc::SYS_gettid], KILL);
    region.part(0, 50).unmap();
    std::thread::sleep(std::time::Duration::from_millis(1200));
    let (one, two) = pair();
    use_memory(one, two);
}

/// Seen to fail in the same way.
#[test]
fn c4_nor_before_there_is_a_helper() {
    Stand::of_all(|_| true).run("filter_kills_young");
}

/// As memcached's: gettid fails.
fn filter_answers() {
    let (one, two) = pair();
    wait_whole(one, two);
    forbid_for_good(&[libc::SYS_gettid], EACCES);
    use_memory(one, two);
}

/// Seen to fail: the gate went on with one id for all threads, and with it the lock of its table was everybody's.
#[test]
fn c4_a_filters_answers_are_not_taken_for_the_kernels() {
    Stand::of_all(|_| true).run("filter_answers");
}

/// Many programs forbid a few dangerous calls (QEMU's -sandbox, service managers).
fn filter_of_few() {
    let (one, two) = pair();
    wait_whole(one, two);
    forbid_for_good(&[libc::SYS_ptrace, libc::SYS_mount, libc::SYS_kexec_load], KILL);
    one.fill_from(FIRST);
    wait_until("it is merged again", || one.merged() > 4000);
    one.part(10, 20).advise(libc::MADV_DONTNEED);
    one.part(10, 20).check_zero();
    two.check_from(FIRST);
}

#[test]
fn c4_a_filter_that_lets_the_gate_through_changes_nothing() {
    let stand = Stand::of_all(|_| true);
    stand.run("filter_of_few");
    assert!(stand.summary().stopped.is_empty());
}

fn filter_refused() {
    let (one, two) = pair();
    wait_whole(one, two);
    // No filter: one that cannot be read, and one without an end.
    let nowhere = [1_u64, 8];
    // SAFETY: both are refused.
    let refused = unsafe {
        let first = libc::syscall(libc::SYS_seccomp, 1, 0, &raw const nowhere);
        (first, libc::prctl(22, 2, 8), libc::prctl(22, 7, 8))
    };
    assert_eq!(refused, (-1, -1, -1));
    one.fill_from(FIRST);
    wait_until("it is merged again", || one.merged() > 4000);
}

#[test]
fn c4_what_the_kernel_refuses_changes_nothing() {
    let stand = Stand::of_all(|_| true);
    stand.run("filter_refused");
    assert!(stand.summary().stopped.is_empty());
}

const TRAP: u32 = 0x0003_0000;

extern "C" fn answers(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the context of the call that was trapped.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    registers[libc::REG_RAX as usize] = -i64::from(libc::EPERM);
}

/// As sandboxes emulate calls: a handler answers in the kernel's place.
fn filter_traps() {
    let (one, two) = pair();
    wait_whole(one, two);
    let handler = answers as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);
    // SAFETY: a handler for traps.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        (action.sa_sigaction, action.sa_flags) = (handler as usize, libc::SA_SIGINFO);
        assert_eq!(libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()), 0);
    }
    forbid_for_good(&[libc::SYS_mlock, libc::SYS_clone, libc::SYS_fork], TRAP);
    // SAFETY: would lock pages of the victim, and fork.
    let refused = unsafe { (libc::mlock(one.pointer(0), 4096), libc::fork()) };
    assert_eq!(refused, (-1, -1));
    two.check_from(FIRST);
    one.part(10, 20).advise(libc::MADV_DONTNEED);
    one.part(10, 20).check_zero();
    assert_eq!(one.merged() + two.merged(), 0);
}

/// Seen to fail: the program's own calls were made with signals blocked, and the trap killed it.
#[test]
fn c4_traps_reach_their_handler() {
    Stand::of_all(|_| true).run("filter_traps");
}
