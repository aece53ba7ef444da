/* A program that others run system calls in. Each role is a thread that does one thing over and over, with a known
 * value in every register, and checks that nothing else happened to it. `target ROLE...` prints "ROLE TID" for each,
 * answers each line on its standard input with one line for each role ("ROLE COUNT ERRORS LATEST-US FIRST-ERROR") and a
 * dot, and ends with its standard input. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/rseq.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define SHORT_NS 15000000L
#define LONG_NS 400000000L

struct role {
    const char *name;
    void (*work)(struct role *);
    atomic_int tid;
    atomic_ulong count, errors, latest_us, handled;
    char first_error[200];
    int fds[2];
};

static __thread struct role *self;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000UL + t.tv_nsec;
}

static void complain(struct role *r, const char *what, long value, long wanted) {
    if (atomic_fetch_add(&r->errors, 1) == 0)
        snprintf(r->first_error, sizeof r->first_error, "%s: %ld (%#lx) instead of %ld (%#lx)", what, value, value, wanted, wanted);
}

static void expect(struct role *r, const char *what, long value, long wanted) {
    if (value != wanted) complain(r, what, value, wanted);
}

/* rbx rbp r12-r15, rdi rsi rdx r10 r8 r9, rax, rcx, r11, flags: before and after. */
struct registers {
    uint64_t kept[6], arguments[6], rax, rcx, r11, flags, saved_stack;
    uint8_t xmm[16][16];
    uint64_t rounds;
};

/* Loads everything, makes the call (or counts down, for rounds != 0), stores everything. */
void with_registers(struct registers *before, struct registers *after);
extern char behind_call[];
__asm__(
    ".text\n.globl with_registers\nwith_registers:\n"
    "push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\npush %rsi\npush %rdi\n"
    "mov %rsp, 128(%rdi)\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\nmovups 136+16*\\n(%rdi), %xmm\\n\n.endr\n"
    "mov 392(%rdi), %rcx\n"
    "mov 0(%rdi), %rbx\nmov 8(%rdi), %rbp\nmov 16(%rdi), %r12\nmov 24(%rdi), %r13\nmov 32(%rdi), %r14\nmov 40(%rdi), %r15\n"
    "mov 56(%rdi), %rsi\nmov 64(%rdi), %rdx\nmov 72(%rdi), %r10\nmov 80(%rdi), %r8\nmov 88(%rdi), %r9\n"
    "mov 96(%rdi), %rax\n"
    "mov 112(%rdi), %r11\n"
    "pushq 120(%rdi)\n"
    "mov 48(%rdi), %rdi\n"
    "popfq\n"
    "jrcxz 2f\n"
    /* The red zone holds two values, no flag changes, rbx counts up while rcx counts down. */
    "mov %r15, -8(%rsp)\nmov %r14, -120(%rsp)\n"
    "1: lea 1(%rbx), %rbx\nloop 1b\n"
    "mov -8(%rsp), %r15\nmov -120(%rsp), %r14\n"
    "jmp 3f\n"
    "2: syscall\n.globl behind_call\nbehind_call:\n"
    "3: pushfq\n"
    "push %rdi\nmov 24(%rsp), %rdi\n" /* after: pushed rdi, flags, before, after */
    "mov %rbx, 0(%rdi)\nmov %rbp, 8(%rdi)\nmov %r12, 16(%rdi)\nmov %r13, 24(%rdi)\nmov %r14, 32(%rdi)\nmov %r15, 40(%rdi)\n"
    "mov %rsi, 56(%rdi)\nmov %rdx, 64(%rdi)\nmov %r10, 72(%rdi)\nmov %r8, 80(%rdi)\nmov %r9, 88(%rdi)\n"
    "mov %rax, 96(%rdi)\nmov %rcx, 104(%rdi)\nmov %r11, 112(%rdi)\n"
    "pop %rsi\nmov %rsi, 48(%rdi)\npop %rsi\nmov %rsi, 120(%rdi)\nmov %rsp, 128(%rdi)\n"
    ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\nmovups %xmm\\n, 136+16*\\n(%rdi)\n.endr\n"
    "cld\n"
    "pop %rdi\npop %rsi\npop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\nret\n");

/* CF PF AF ZF SF DF OF */
#define FLAGS 0xcd5UL
#define IF_AND_1 0x202UL

static void fill(struct registers *b, unsigned seed) {
    for (int i = 0; i < 6; i++) b->kept[i] = 0x1111111111111111UL * (i + 1) ^ seed;
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) b->xmm[i][j] = seed * 31 + i * 16 + j;
    b->rcx = b->rounds = 0;
    b->r11 = 0xabcdef0123456789UL;
    b->flags = (seed * 2654435761U & FLAGS) | IF_AND_1;
}

static void same(struct role *r, struct registers *b, struct registers *a) {
    static const char *const names[] = {"rbx", "rbp", "r12", "r13", "r14", "r15", "rdi", "rsi", "rdx", "r10", "r8", "r9"};
    for (int i = 0; i < 12; i++) {
        uint64_t wanted = i < 6 ? b->kept[i] : b->arguments[i - 6];
        if (i == 0 && b->rounds) wanted += b->rounds;
        expect(r, names[i], i < 6 ? a->kept[i] : a->arguments[i - 6], wanted);
    }
    expect(r, "rsp", a->saved_stack, b->saved_stack);
    expect(r, "flags", a->flags & FLAGS, b->flags & FLAGS);
    expect(r, "xmm", memcmp(a->xmm, b->xmm, sizeof a->xmm), 0);
}

/* A system call, everything else checked. */
static long call(struct role *r, long number, long a, long b, long c, long d, long e, long f) {
    struct registers before, after;
    fill(&before, atomic_load(&r->count) + 1);
    before.rax = number;
    long arguments[6] = {a, b, c, d, e, f};
    memcpy(before.arguments, arguments, sizeof arguments);
    with_registers(&before, &after);
    same(r, &before, &after);
    expect(r, "rcx behind a call", after.rcx, (long)behind_call);
    expect(r, "r11 behind a call", after.r11 & FLAGS, before.flags & FLAGS);
    return after.rax;
}

static void timed(struct role *r, uint64_t begun, long ns) {
    long took = now() - begun;
    if (took < ns - 100000) complain(r, "too early, ns", took, ns);
    unsigned long late = took > ns ? (took - ns) / 1000 : 0, old = atomic_load(&r->latest_us);
    if (late > old) atomic_store(&r->latest_us, late);
}

/* Calls with a time-out, of which nothing comes but its end. */
static long limit(struct role *r) { return strstr(r->name, "_long") ? LONG_NS : SHORT_NS; }
#define TIMED(NAME, PREPARE, WANTED, ...)                                                             \
    static void work_##NAME(struct role *r) {                                                         \
        long ns = limit(r), ms = ns / 1000000;                                                        \
        struct timespec t = {ns / 1000000000, ns % 1000000000};                                       \
        (void)ms, (void)t;                                                                            \
        PREPARE;                                                                                      \
        for (;; atomic_fetch_add(&r->count, 1)) {                                                     \
            uint64_t begun = now();                                                                   \
            expect(r, #NAME, call(r, __VA_ARGS__), WANTED);                                           \
            timed(r, begun, ns);                                                                      \
            expect(r, "time-out changed", t.tv_sec * 1000000000 + t.tv_nsec, ns);                     \
        }                                                                                             \
    }
#define P(x) ((long)(x))
TIMED(nanosleep, , 0, SYS_nanosleep, P(&t), 0, 3, 4, 5, 6)
TIMED(clock_nanosleep, , 0, SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, P(&t), 0, 5, 6)
TIMED(poll, struct pollfd p = {.fd = r->fds[0]}; p.events = POLLIN, 0, SYS_poll, P(&p), 1, ms, 4, 5, 6)
TIMED(futex_timed, int word = 7, -ETIMEDOUT, SYS_futex, P(&word), FUTEX_WAIT_PRIVATE, 7, P(&t), 5, 6)
TIMED(epoll_timed, struct epoll_event e; int ep = epoll_create1(0), 0, SYS_epoll_wait, ep, P(&e), 1, ms, 5, 6)
TIMED(epoll_pwait, struct epoll_event e; int ep = epoll_create1(0), 0, SYS_epoll_pwait, ep, P(&e), 1, ms, 0, 8)
TIMED(epoll_pwait2, struct epoll_event e; int ep = epoll_create1(0), 0, SYS_epoll_pwait2, ep, P(&e), 1, P(&t), 0, 8)
TIMED(sigtimedwait, sigset_t s; sigemptyset(&s); sigaddset(&s, SIGUSR2), -EAGAIN, SYS_rt_sigtimedwait, P(&s), 0, P(&t), 8, 5, 6)
TIMED(semtimedop, int id = semget(IPC_PRIVATE, 1, 0600); struct sembuf s = {.sem_op = -1}, -EAGAIN, SYS_semtimedop, id, P(&s), 1, P(&t), 5, 6)
TIMED(io_getevents, unsigned long ctx = 0; char ev[64]; syscall(SYS_io_setup, 4, &ctx), 0, SYS_io_getevents, ctx, 1, 1, P(ev), P(&t), 6)
TIMED(io_pgetevents, unsigned long ctx = 0; char ev[64]; syscall(SYS_io_setup, 4, &ctx), 0, SYS_io_pgetevents, ctx, 1, 1, P(ev), P(&t), 0)

/* Works before each wait: who has had more than its share of a CPU is not taken off the queue at once. */
static void work_epoll_worn(struct role *r) {
    long ns = SHORT_NS * 4;
    struct timespec t = {0, ns};
    struct epoll_event e;
    for (int ep = epoll_create1(0);; atomic_fetch_add(&r->count, 1)) {
        uint64_t begun = now();
        while (now() - begun < 2000000) {}
        begun = now();
        expect(r, "epoll_worn", call(r, SYS_epoll_pwait2, ep, P(&e), 1, P(&t), 0, 8), 0);
        timed(r, begun, ns);
    }
}

/* Calls with their rest of time written back: the register checks of TIMED, not that of the structure. */
static void work_ppoll(struct role *r) {
    for (;; atomic_fetch_add(&r->count, 1)) {
        struct timespec t = {0, SHORT_NS};
        uint64_t begun = now();
        expect(r, "ppoll", call(r, SYS_ppoll, 0, 0, P(&t), 0, 8, 6), 0);
        timed(r, begun, SHORT_NS);
    }
}
static void work_select(struct role *r) {
    for (;; atomic_fetch_add(&r->count, 1)) {
        struct timeval t = {0, SHORT_NS / 1000};
        uint64_t begun = now();
        expect(r, "select", call(r, SYS_select, 0, 0, 0, 0, P(&t), 6), 0);
        timed(r, begun, SHORT_NS);
    }
}
/* A socket's own time-out. */
static void work_recv_timed(struct role *r) {
    int s[2];
    socketpair(AF_UNIX, SOCK_STREAM, 0, s);
    struct timeval t = {0, SHORT_NS / 1000};
    setsockopt(s[0], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
    char byte;
    for (;; atomic_fetch_add(&r->count, 1)) {
        uint64_t begun = now();
        expect(r, "recv", call(r, SYS_recvfrom, s[0], P(&byte), 1, 0, 0, 0), -EAGAIN);
        timed(r, begun, SHORT_NS);
    }
}

/* Calls that wait for something that another thread does now and then: everything comes, once, in order. */
static atomic_int word, woken;
static void nap(void) { usleep(1000); }
static void *feed_read(void *p) {
    struct role *r = p;
    for (uint64_t n = 0;; n++) { nap(); if (write(r->fds[1], &n, 8) != 8) abort(); }
}
static void work_read(struct role *r) {
    pthread_t t; pthread_create(&t, 0, feed_read, r);
    for (uint64_t n = 0, got;; n++, atomic_fetch_add(&r->count, 1)) {
        got = ~0UL;
        expect(r, "read", call(r, SYS_read, r->fds[0], P(&got), 8, 4, 5, 6), 8);
        expect(r, "sequence", got, n);
    }
}
/* Moves much more than fits into a pipe, all of it at each call. */
static void *take(void *p) {
    static char taken[1 << 16];
    struct role *r = p;
    struct epoll_event e;
    /* In no call that would be a better one to be stopped in. */
    for (int ep = epoll_create1(0);; epoll_wait(ep, &e, 1, 1)) if (read(r->fds[0], taken, sizeof taken) <= 0) abort();
}
static void work_write_all(struct role *r) {
    static char all[1 << 20];
    pthread_t t; pthread_create(&t, 0, take, r);
    for (;; atomic_fetch_add(&r->count, 1))
        expect(r, "write", call(r, SYS_write, r->fds[1], P(all), sizeof all, 4, 5, 6), sizeof all);
}
static void *feed_futex(void *p) {
    for (;; nap()) {
        atomic_fetch_add(&word, 1);
        atomic_fetch_add(&woken, syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1));
    }
    return p;
}
static void work_futex(struct role *r) {
    pthread_t t; pthread_create(&t, 0, feed_futex, r);
    for (int taken = 0;; atomic_fetch_add(&r->count, 1)) {
        int seen = atomic_load(&word);
        long result = call(r, SYS_futex, P(&word), FUTEX_WAIT_PRIVATE, seen, 0, 5, 6);
        if (result != 0 && result != -EAGAIN) complain(r, "futex", result, 0);
        /* The word may be as it was: changed, then read here, then its wake-up. The last one may not be counted yet. */
        taken += result == 0;
        if (taken > atomic_load(&woken) + 1) complain(r, "futex woken for nothing", taken, atomic_load(&woken));
    }
}
static void *feed_epoll(void *p) {
    struct role *r = p;
    for (;; nap()) eventfd_write(r->fds[1], 1);
    return p;
}
static void work_epoll(struct role *r) {
    int ep = epoll_create1(0);
    r->fds[1] = eventfd(0, 0);
    struct epoll_event e = {EPOLLIN, {.u64 = 77}};
    epoll_ctl(ep, EPOLL_CTL_ADD, r->fds[1], &e);
    pthread_t t; pthread_create(&t, 0, feed_epoll, r);
    for (;; atomic_fetch_add(&r->count, 1)) {
        memset(&e, 0, sizeof e);
        expect(r, "epoll_wait", call(r, SYS_epoll_wait, ep, P(&e), 1, -1, 5, 6), 1);
        expect(r, "event", e.data.u64, 77);
        eventfd_t n;
        eventfd_read(r->fds[1], &n);
    }
}
static struct sockaddr_un address;
static socklen_t address_length;
static void *feed_accept(void *p) {
    for (;;) {
        nap();
        int s = socket(AF_UNIX, SOCK_STREAM, 0);
        if (connect(s, (void *)&address, address_length)) abort();
        close(s);
    }
}
static void work_accept(struct role *r) {
    int s = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    bind(s, (void *)&a, sizeof(sa_family_t));
    address_length = sizeof address;
    getsockname(s, (void *)&address, &address_length);
    listen(s, 5);
    pthread_t t; pthread_create(&t, 0, feed_accept, r);
    for (;; atomic_fetch_add(&r->count, 1)) {
        long fd = call(r, SYS_accept, s, 0, 0, 4, 5, 6);
        if (fd < 0) complain(r, "accept", fd, 3);
        else close(fd);
    }
}
static void work_compute(struct role *r) {
    struct registers before, after;
    for (unsigned n = 1;; n++, atomic_fetch_add(&r->count, 1)) {
        fill(&before, n);
        for (int i = 0; i < 6; i++) before.arguments[i] = 0x0123456789abcdefUL * (i + n);
        before.rax = 0xfeedfacecafebeefUL;
        before.rounds = 1000000;
        with_registers(&before, &after);
        same(r, &before, &after);
        expect(r, "rax", after.rax, before.rax);
        expect(r, "r11", after.r11, before.r11);
        expect(r, "rcx", after.rcx, 0);
    }
}

/* Waits for ever, for signals without SA_RESTART: each ends the call with EINTR. With a time-out so long that it does
 * not end here, too. */
static void forever(struct role *r, long number, long a, long b, long c, long d) {
    for (;; atomic_fetch_add(&r->count, 1)) {
        long result = call(r, number, a, b, c, d, 0, 8);
        if (result != -EINTR && !(result == -EAGAIN && number == SYS_rt_sigtimedwait)) complain(r, "a wait for ever", result, -EINTR);
    }
}
static struct timespec hour = {3600, 0};
static void work_read_forever(struct role *r) { static char byte; forever(r, SYS_read, r->fds[0], P(&byte), 1, 4); }
static void work_epoll_forever(struct role *r) {
    static struct epoll_event e;
    forever(r, SYS_epoll_wait, epoll_create1(0), P(&e), 1, -1);
}
static void work_epoll_hour(struct role *r) {
    static struct epoll_event e;
    forever(r, SYS_epoll_wait, epoll_create1(0), P(&e), 1, 3600000);
}
static void work_epoll_pwait2_hour(struct role *r) {
    static struct epoll_event e;
    forever(r, SYS_epoll_pwait2, epoll_create1(0), P(&e), 1, P(&hour));
}
/* Calls with a signal mask of their own. "open": SIGUSR1 is blocked but for the call, which each one sent ends, and nothing
 * else does. "closed": it is blocked in the call only, which ends when there is something to read, and with nothing else. */
static sigset_t usr1_only(void) { sigset_t s; sigemptyset(&s); sigaddset(&s, SIGUSR1); return s; }
static struct epoll_event event;
static void masked_open(struct role *r, long number, long a, long b, long c, long d, long e, long f) {
    sigset_t own = usr1_only();
    pthread_sigmask(SIG_BLOCK, &own, 0);
    for (;; atomic_fetch_add(&r->count, 1)) {
        unsigned long handled = atomic_load(&r->handled);
        expect(r, "a masked wait", call(r, number, a, b, c, d, e, f), -EINTR);
        expect(r, "handlers run in it", atomic_load(&r->handled) - handled, 1);
        sigset_t now;
        pthread_sigmask(SIG_BLOCK, 0, &now);
        expect(r, "mask behind it", sigismember(&now, SIGUSR1), 1);
    }
}
static sigset_t none;
struct sized { sigset_t *set; size_t size; };
static struct sized none_sized = {&none, 8};
static void work_ppoll_open(struct role *r) { masked_open(r, SYS_ppoll, 0, 0, 0, P(&none), 8, 6); }
static void work_pselect_open(struct role *r) { masked_open(r, SYS_pselect6, 0, 0, 0, 0, 0, P(&none_sized)); }
static void work_epoll_pwait_open(struct role *r) { masked_open(r, SYS_epoll_pwait, epoll_create1(0), P(&event), 1, -1, P(&none), 8); }
static void work_epoll_pwait_open_hour(struct role *r) {
    masked_open(r, SYS_epoll_pwait, epoll_create1(0), P(&event), 1, 3600000, P(&none), 8);
}
static void work_sigsuspend_open(struct role *r) { masked_open(r, SYS_rt_sigsuspend, P(&none), 8, 3, 4, 5, 6); }
static void *feed_masked(void *p) {
    struct role *r = p;
    for (;; usleep(3000)) if (write(r->fds[1], "x", 1) != 1) abort();
}
static void masked_closed(struct role *r, long number, long a, long b, long c, long d, long e, long f) {
    pthread_t t; pthread_create(&t, 0, feed_masked, r);
    for (;; atomic_fetch_add(&r->count, 1)) {
        char byte;
        struct pollfd p = {.fd = r->fds[0], .events = POLLIN};
        expect(r, "a masked wait", call(r, number, number == SYS_ppoll ? P(&p) : a, b, c, d, e, f), 1);
        read(r->fds[0], &byte, 1);
    }
}
static sigset_t usr1;
static void work_ppoll_closed(struct role *r) { usr1 = usr1_only(); masked_closed(r, SYS_ppoll, 0, 1, 0, P(&usr1), 8, 6); }
static int watching(struct role *r) {
    struct epoll_event e = {.events = EPOLLIN};
    int ep = epoll_create1(0);
    epoll_ctl(ep, EPOLL_CTL_ADD, r->fds[0], &e);
    usr1 = usr1_only();
    return ep;
}
static void work_epoll_pwait_closed(struct role *r) { masked_closed(r, SYS_epoll_pwait, watching(r), P(&event), 1, -1, P(&usr1), 8); }
static void work_epoll_pwait_closed_hour(struct role *r) {
    masked_closed(r, SYS_epoll_pwait, watching(r), P(&event), 1, 3600000, P(&usr1), 8);
}
static void work_sleep_hour(struct role *r) { forever(r, SYS_nanosleep, P(&hour), 0, 3, 4); }
static void work_futex_forever(struct role *r) { static int w = 5; forever(r, SYS_futex, P(&w), FUTEX_WAIT_PRIVATE, 5, 0); }

/* Two contexts on stacks of their own that a signal handler switches between, both in a wait of an hour: when one comes
 * back its handler returns into its call, which ends with EINTR. */
static ucontext_t contexts[3];
static int current;
static void switches(int signal) {
    (void)signal;
    atomic_fetch_add(&self->handled, 1);
    int old = current;
    current = !old;
    swapcontext(contexts + old, contexts + current);
}
static void fiber(void) {
    struct epoll_event e;
    /* Each its own time-out: a way back that was written for the other is seen. */
    forever(self, SYS_epoll_wait, epoll_create1(0), P(&e), 1, 3600000 + current);
}
static void work_fibers(struct role *r) {
    static char stacks[2][1 << 16];
    (void)r;
    struct sigaction action = {.sa_handler = switches, .sa_flags = SA_NODEFER};
    sigaction(SIGRTMIN + 3, &action, 0);
    for (int i = 0; i < 2; i++) {
        getcontext(contexts + i);
        contexts[i].uc_stack.ss_sp = stacks[i];
        contexts[i].uc_stack.ss_size = sizeof stacks[i];
        makecontext(contexts + i, fiber, 0);
    }
    swapcontext(contexts + 2, contexts);
}

/* Forks when a signal tells it to: behind the call that this ends, or in the handler; its child waits. The latest child is
 * the count. */
static struct role *forker;
static void fork_one(long call, long a, long b, long c) {
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        syscall(call, a, b, c);
    } else {
        atomic_store(&forker->count, child);
    }
}
static void forks_in_handler(int signal) {
    static char byte;
    (void)signal;
    fork_one(SYS_read, forker->fds[0], P(&byte), 1);
}
static void work_fork_when_told(struct role *r) {
    static struct epoll_event e;
    pid_t self = getpid();
    struct sigaction action = {.sa_handler = forks_in_handler};
    forker = r;
    sigaction(SIGRTMIN + 4, &action, 0);
    for (int ep = epoll_create1(0);;) {
        unsigned long handled = atomic_load(&r->handled);
        syscall(SYS_epoll_wait, ep, &e, 1, 3600000);
        while (getpid() != self) pause();
        if (atomic_load(&r->handled) != handled) fork_one(SYS_pause, 0, 0, 0);
    }
}

/* fork, exec and exit as fast as they go. */
static void work_fork(struct role *r) {
    for (;; atomic_fetch_add(&r->count, 1)) {
        pid_t child = fork();
        if (child == 0) {
            struct timespec t = {0, 1000000};
            /* The child sleeps and ends: calls that were made in its parent are nothing to it. */
            _exit(nanosleep(&t, 0) == 0 ? 0 : 9);
        }
        int status = -1;
        while (waitpid(child, &status, 0) == -1 && errno == EINTR) complain(r, "waitpid", -EINTR, child);
        expect(r, "child", status, 0);
    }
}
static void work_vfork(struct role *r) {
    static struct timespec t = {0, 20000000};
    for (;; atomic_fetch_add(&r->count, 1)) {
        pid_t child = vfork();
        if (child == 0) {
            syscall(SYS_nanosleep, &t, 0);
            _exit(7);
        }
        int status = -1;
        while (waitpid(child, &status, 0) == -1 && errno == EINTR) complain(r, "waitpid", -EINTR, child);
        expect(r, "child", WEXITSTATUS(status), 7);
    }
}
/* Its child executes nothing for as long as it lives. */
static void work_vfork_forever(struct role *r) {
    if (vfork() == 0) {
        static struct timespec t = {3600, 0};
        syscall(SYS_prctl, PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
        syscall(SYS_nanosleep, &t, 0);
        _exit(0);
    }
    complain(r, "back from vfork", 0, 0);
    pause();
}
static void *ends(void *p) { return p; }
static void work_threads(struct role *r) {
    for (;; atomic_fetch_add(&r->count, 1)) {
        pthread_t t;
        int error = pthread_create(&t, 0, ends, 0);
        expect(r, "pthread_create", error, 0);
        if (!error) pthread_join(t, 0);
    }
}

/* A restartable sequence that only its abort handler leaves: whoever is stopped inside must come out there. */
static void work_rseq(struct role *r) {
    static __thread struct rseq own __attribute__((aligned(32)));
    struct rseq *area = &own;
    if (__rseq_size) area = (void *)((char *)__builtin_thread_pointer() + __rseq_offset);
    else if (syscall(SYS_rseq, area, 32, 0, 0x53053053)) complain(r, "rseq", errno, 0);
    for (;; atomic_fetch_add(&r->count, 1)) {
        __asm__ volatile(
            ".pushsection __rseq_cs, \"aw\"\n.balign 32\n9: .long 0, 0\n.quad 1f, 2f - 1f, 4f\n.popsection\n"
            "lea 9b(%%rip), %%rax\nmov %%rax, %0\n"
            "1: jmp 1b\n2:\n"
            ".byte 0x0f, 0xb9, 0x3d\n.long 0x53053053\n4:\n"
            : "=m"(area->rseq_cs) : : "rax", "memory");
    }
}

/* Threads and programs that protect themselves, and wait. */
static void work_hidden(struct role *r) { prctl(PR_SET_DUMPABLE, 0); atomic_store(&r->count, 1); pause(); }
static void work_strict(struct role *r) {
    static char byte;
    atomic_store(&r->count, 1);
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT);
    syscall(SYS_read, r->fds[0], &byte, 1);
}
static void work_caught(struct role *r) {
    static char selector;
    prctl(PR_SET_SYSCALL_USER_DISPATCH, 1, 0, 0, &selector);
    atomic_store(&r->count, 1);
    pause();
}
/* The trap flag makes a signal of each instruction. */
static void stepped(int signal) { (void)signal; }
static void work_stepping(struct role *r) {
    signal(SIGTRAP, stepped);
    atomic_store(&r->count, 1);
    __asm__ volatile("pushfq\norl $0x100, (%%rsp)\npopfq\n1: jmp 1b" ::: "memory");
}

static void handler(int signal) {
    int saved = errno;
    if (self) atomic_fetch_add(&self->handled, 1);
    (void)signal;
    errno = saved;
}

static struct role roles[] = {
#define ROLE(NAME) {#NAME, work_##NAME}
#define LONG(NAME) {#NAME "_long", work_##NAME}
    ROLE(nanosleep), ROLE(clock_nanosleep), ROLE(poll), ROLE(futex_timed), ROLE(epoll_timed), ROLE(epoll_pwait), ROLE(epoll_pwait2),
    ROLE(sigtimedwait), ROLE(semtimedop), ROLE(io_getevents), ROLE(io_pgetevents), ROLE(ppoll), ROLE(select), ROLE(recv_timed), ROLE(read), ROLE(futex),
    ROLE(epoll), ROLE(epoll_worn), ROLE(accept), ROLE(compute), ROLE(read_forever), ROLE(epoll_forever), ROLE(epoll_hour), ROLE(epoll_pwait2_hour),
    ROLE(sleep_hour), ROLE(futex_forever), ROLE(fibers), ROLE(write_all), ROLE(fork_when_told), ROLE(fork), ROLE(threads), ROLE(vfork), ROLE(vfork_forever),
    ROLE(ppoll_open), ROLE(pselect_open), ROLE(epoll_pwait_open), ROLE(epoll_pwait_open_hour), ROLE(sigsuspend_open),
    ROLE(ppoll_closed), ROLE(epoll_pwait_closed), ROLE(epoll_pwait_closed_hour),
    ROLE(rseq), ROLE(hidden), ROLE(strict), ROLE(caught), ROLE(stepping),
    LONG(nanosleep), LONG(poll), LONG(futex_timed), LONG(epoll_timed), LONG(epoll_pwait2), LONG(sigtimedwait), LONG(semtimedop), LONG(io_getevents), LONG(io_pgetevents),
};
#define ROLES (sizeof roles / sizeof *roles)

static void *start(void *p) {
    self = p;
    atomic_store(&self->tid, gettid());
    self->work(self);
    return 0;
}

int main(int argc, char **argv) {
    struct sigaction action = {.sa_handler = handler};
    sigaction(SIGUSR1, &action, 0);
    sigaction(SIGRTMIN + 1, &action, 0);
    action.sa_flags = SA_RESTART;
    sigaction(SIGRTMIN + 2, &action, 0);
    /* Only the threads under test get signals that are for the process. */
    for (int i = 1; i < argc; i++) {
        struct role *r = 0;
        for (size_t n = 0; n < ROLES; n++)
            if (!strcmp(roles[n].name, argv[i])) r = roles + n;
        if (!r || (r->fds[0] == 0 && pipe(r->fds))) return 2;
        pthread_t t;
        if (pthread_create(&t, 0, start, r)) return 3;
        while (!atomic_load(&r->tid)) sched_yield();
        printf("%s %d\n", r->name, r->tid);
    }
    printf(".\n");
    fflush(stdout);
    char line[100];
    while (fgets(line, sizeof line, stdin)) {
        for (size_t n = 0; n < ROLES; n++) {
            struct role *r = roles + n;
            if (r->tid)
                printf("%s %lu %lu %lu %lu %s\n", r->name, r->count, r->errors, r->latest_us, r->handled, r->first_error);
        }
        printf(".\n");
        fflush(stdout);
    }
    return 0;
}
