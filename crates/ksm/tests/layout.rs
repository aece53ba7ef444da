//! The shared layout, seen from the programs that get it.
#![allow(clippy::unwrap_used, reason = "tests")]
use std::io::Read as _;
use std::process::{Command, Stdio};

use kernel::launch::Launch;
use pagefold_ksm::{Applied, Layout, StackLimit};

/// Where a program's libraries, heap and stack lie, the size of a new thread's stack, and what it takes for its limit.
const LOOK: &str = r"
import ctypes, resource, threading
def lines(): return [line.split() for line in open('/proc/self/maps')]
def at(name): return next(line[0] for line in lines() if line[-1].endswith(name))
before = {line[0] for line in lines()}
size = []
def thread():
    # The thread's own mapping is the one that holds a local variable of its C stack.
    attr, here = ctypes.create_string_buffer(64), ctypes.c_size_t()
    libc = ctypes.CDLL(None)
    libc.pthread_self.restype = ctypes.c_void_p
    assert libc.pthread_getattr_np(ctypes.c_void_p(libc.pthread_self()), attr) == 0
    assert libc.pthread_attr_getstacksize(attr, ctypes.byref(here)) == 0
    size.append(here.value)
worker = threading.Thread(target=thread); worker.start(); worker.join()
libc = next(line[0] for line in lines() if 'libc.so' in line[-1] or 'libc-' in line[-1])
print(libc, at('[heap]').split('-')[0], at('[stack]').split('-')[1], at('[vdso]'), size[0], resource.getrlimit(resource.RLIMIT_STACK)[0])
";

struct Seen {
    places: Vec<String>,
    thread_stack: u64,
    limit: u64,
}

fn look(layout: Layout, stack: StackLimit, command: &mut Command) -> Option<Seen> {
    let mut command = std::mem::replace(command, Command::new("false"));
    command.env("PYTHONHASHSEED", "0").stdout(Stdio::piped());
    let (mut launched, applied) = layout.spawn(Launch::new(command), stack).unwrap();
    let mut text = String::new();
    launched.child.stdout.take().unwrap().read_to_string(&mut text).unwrap();
    assert!(launched.child.wait().unwrap().success(), "{text}");
    if let Applied::SharedWithRaisedLimit(error) = applied {
        println!("skipped: no ptrace here ({error})");
        return None;
    }
    let mut words: Vec<String> = text.split_whitespace().map(ToOwned::to_owned).collect();
    let limit = words.pop()?.parse().unwrap();
    let thread_stack = words.pop()?.parse().unwrap();
    Some(Seen { places: words, thread_stack, limit })
}

fn python() -> Option<Command> {
    // Not a wrapper script of a version manager: that one would be stopped at its exec, not the interpreter.
    let found = Command::new("python3").args(["-c", "import sys; print(sys.executable)"]).output().ok()?;
    let real = String::from_utf8(found.stdout).ok()?;
    let mut command = Command::new(real.trim());
    command.args(["-S", "-c", LOOK]);
    Some(command)
}

fn own_limit() -> kernel::sched::Limit {
    kernel::sched::limit(kernel::Pid::this(), kernel::sched::Resource::Stack).unwrap()
}

#[test]
fn members_lie_alike_partitions_do_not_and_nobody_sees_the_limit() {
    if python().is_none() {
        return println!("skipped: no python3");
    }
    let user = own_limit();
    let (one, other) = (Layout::draw().unwrap(), Layout::draw().unwrap());
    let run = |layout| look(layout, StackLimit::PutBack, &mut python().unwrap());
    let (Some(first), Some(second), Some(elsewhere)) = (run(one), run(one), run(other)) else { return };
    assert_eq!(first.places, second.places, "libc, heap, stack and vdso of two members");
    assert_ne!(first.places[0], elsewhere.places[0], "libc of two partitions");
    let by_default = run(Layout::Default).unwrap();
    assert_ne!(by_default.places[0], run(Layout::Default).unwrap().places[0], "libc without a shared layout");
    for seen in [&first, &second, &elsewhere] {
        assert_eq!(Some(seen.limit), user.soft, "the program's own limit");
        assert_eq!(seen.thread_stack, by_default.thread_stack, "the stack of a new thread");
    }
}

#[test]
fn a_limit_that_is_kept_lays_out_what_the_program_executes_too() {
    if python().is_none() {
        return println!("skipped: no python3");
    }
    let nested = |layout, stack| {
        let inner = python().unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", "\"$@\"; exit $?", "sh"]).arg(inner.get_program()).args(inner.get_args());
        look(layout, stack, &mut shell)
    };
    let layout = Layout::draw().unwrap();
    let Layout::Shared { stack_soft } = layout else { panic!("not drawn") };
    let direct = look(layout, StackLimit::Kept, &mut python().unwrap()).unwrap();
    let below = nested(layout, StackLimit::Kept).unwrap();
    assert_eq!(direct.places, below.places);
    assert_eq!((direct.limit, direct.thread_stack), (stack_soft.get(), stack_soft.get()));
    // Put back, the programs below lie alike too, but where they do in every partition.
    let (Some(one), Some(other)) =
        (nested(layout, StackLimit::PutBack), nested(Layout::draw().unwrap(), StackLimit::PutBack))
    else {
        return;
    };
    assert_eq!(one.places, other.places);
    assert_ne!(one.places[0], below.places[0]);
}

#[test]
fn the_environment_tells_an_agent_the_users_limit() {
    let mut command = Command::new("sh");
    command.args(["-c", "echo $PAGEFOLD_STACK_SOFT $PAGEFOLD_LAYOUT_STACK $(ulimit -s)"]).stdout(Stdio::piped());
    let layout = Layout::draw().unwrap();
    let Layout::Shared { stack_soft } = layout else { panic!("not drawn") };
    let (launched, _) = layout.spawn(Launch::new(command), StackLimit::Kept).unwrap();
    let output = launched.child.wait_with_output().unwrap();
    let user = own_limit().soft.map_or("unlimited".to_owned(), |bytes| bytes.to_string());
    let expected = format!("{user} {stack_soft} {}\n", stack_soft.get() / 1024);
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
}
