"""A member of a partition, as the isolation and lifetime tests need one: another process, of another user where it was
started by root, that holds a segment's descriptor as its standard input and does with it what it likes.

Usage: member.py UID attack|own|peek:PID:FD:ADDRESS|hold
One line of standard output for each thing tried: a name, a tab, and `works`, an errno's name, or a value.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import sys

F_ADD_SEALS, F_SEAL_GROW = 1033, 4
SYS_PIDFD_OPEN, SYS_PIDFD_GETFD, SYS_CACHESTAT = 434, 438, 451
PR_SET_DUMPABLE = 4
FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE = 1, 2
PAGE = os.sysconf("SC_PAGESIZE")
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def say(name, result):
    print(f"{name}\t{result}", flush=True)


def attempt(name, action):
    """Says how an attempt ended and returns what it gave, None if it failed."""
    try:
        result = action()
    except OSError as error:
        say(name, errno.errorcode[error.errno])
        return None
    say(name, "works")
    return result


def called(result):
    """The result of a C function that says -1."""
    if result in (-1, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def c_map(fd, prot, flags, length=PAGE):
    return called(libc.mmap(None, length, prot, flags, fd, 0))


def map_then_protect(fd):
    address = c_map(fd, mmap.PROT_READ, mmap.MAP_SHARED)
    called(libc.mprotect(address, PAGE, mmap.PROT_READ | mmap.PROT_WRITE))


def cachestat(fd, size):
    wanted = (ctypes.c_uint64 * 2)(0, size)
    stat = (ctypes.c_uint64 * 5)()
    called(libc.syscall(SYS_CACHESTAT, fd, ctypes.byref(wanted), ctypes.byref(stat), 0))


def change(prefix, fd):
    """All ways to change a segment through a descriptor."""
    size = os.fstat(fd).st_size
    attempt(prefix + "write", lambda: os.pwrite(fd, b"evil", 0))
    attempt(prefix + "append", lambda: os.pwrite(fd, b"evil", size))
    attempt(prefix + "map shared and writable", lambda: c_map(fd, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED))
    attempt(prefix + "map shared, then mprotect", lambda: map_then_protect(fd))
    attempt(prefix + "truncate", lambda: os.ftruncate(fd, PAGE))
    attempt(prefix + "extend", lambda: os.ftruncate(fd, size + PAGE))
    hole = FALLOC_KEEP_SIZE | FALLOC_PUNCH_HOLE
    attempt(prefix + "punch a hole", lambda: called(libc.fallocate(fd, hole, 0, PAGE)))
    attempt(prefix + "allocate behind the end", lambda: called(libc.fallocate(fd, 0, size, PAGE)))
    attempt(prefix + "add a seal", lambda: fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_GROW))


def write_own_memory(fd):
    """Writes into a private mapping, directly and by force through /proc/self/mem."""
    length = os.fstat(fd).st_size
    private = mmap.mmap(fd, length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    private[0:4] = b"mine"
    address = c_map(fd, mmap.PROT_READ, mmap.MAP_PRIVATE)
    with open("/proc/self/mem", "r+b", buffering=0) as memory:
        memory.seek(address)
        memory.write(b"mine")
    if private[0:4] != b"mine" or ctypes.string_at(address, 4) != b"mine":
        raise OSError(errno.EIO, "the copy was not written")


def attack():
    """A member of another user than the broker's, with a descriptor that can only be read."""
    again = attempt("open anew for writing", lambda: os.open("/proc/self/fd/0", os.O_RDWR))
    attempt("open anew for reading", lambda: os.open("/proc/self/fd/0", os.O_RDONLY))
    change("", 0)
    if again is not None:
        change("opened anew: ", again)
    attempt("change the mode", lambda: os.fchmod(0, 0o777))
    attempt("change the owner", lambda: os.fchown(0, os.getuid(), os.getgid()))
    attempt("set an attribute", lambda: os.setxattr("/proc/self/fd/0", "user.x", b"y"))
    attempt("cachestat", lambda: cachestat(0, os.fstat(0).st_size))
    attempt("write own copies", lambda: write_own_memory(0))


def own():
    """A member of the broker's own user, who owns the file together with it: what is left are the seals."""
    attempt("change the mode", lambda: os.fchmod(0, 0o600))
    writable = attempt("open anew for writing", lambda: os.open("/proc/self/fd/0", os.O_RDWR))
    if writable is not None:
        change("opened anew: ", writable)


def peek(pid, fd, address):
    """Somebody who is no member and was given nothing."""
    attempt("open a member's descriptor", lambda: os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY))
    attempt("open a member's mapping", lambda: os.open(f"/proc/{pid}/map_files/{address}", os.O_RDONLY))

    def take():
        pidfd = called(libc.syscall(SYS_PIDFD_OPEN, pid, 0))
        called(libc.syscall(SYS_PIDFD_GETFD, pidfd, fd, 0))

    attempt("take a member's descriptor", take)


def hold():
    """Maps the segment, touches all of it, and goes on with the mapping alone until told to go. Orders come from where
    the answers go, a socket."""
    length = os.fstat(0).st_size
    address = c_map(0, mmap.PROT_READ, mmap.MAP_PRIVATE, length)
    held = (ctypes.c_ubyte * length).from_address(address)
    say("touched", sum(held[at] for at in range(0, length, PAGE)))
    say("mapped", f"{address:x}-{address + length:x}")
    os.read(1, 1)
    os.close(0)
    say("closed", "works")
    os.read(1, 1)
    say("held", sum(held[at] for at in range(0, length, PAGE)))


def main():
    uid, what = int(sys.argv[1]), sys.argv[2]
    if uid != os.getuid():
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    if what == "attack":
        attack()
    elif what == "own":
        own()
    elif what == "hold":
        hold()
    else:
        _, pid, fd, address = what.split(":")
        peek(int(pid), int(fd), address)


main()
