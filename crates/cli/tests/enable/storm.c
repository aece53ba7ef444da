// Processes that go on starting others, and look at themselves: storm MODE FILE.
//
// FILE is shared by all of them, an array of counters: [0] nobody goes on if it is set; [1] everybody must be merged (2: must
// not be) from now on; [2] how many found that they were not; [3] how many processes there were; [4] the last one that was
// wrong, its number; [5] how many live; [6] the second of the clock at which all end by themselves: whoever started them may have
// been killed.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
static _Atomic int *shared;
static char **own;

static int seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    return (int)now.tv_sec;
}

static int stop(void) { return atomic_load(&shared[0]) || seconds() >= atomic_load(&shared[6]); }

// What must be is read first: whoever begins to look later has had more time.
static void look(void) {
    int must = atomic_load(&shared[1]);
    int is = prctl(68, 0, 0, 0, 0);
    if ((must == 1 && is != 1) || (must == 2 && is != 0)) {
        atomic_fetch_add(&shared[2], 1);
        atomic_store(&shared[4], getpid());
    }
}

static void nap(long microseconds) {
    struct timespec time = {0, microseconds * 1000};
    nanosleep(&time, NULL);
}

static void born(void) {
    atomic_fetch_add(&shared[3], 1);
    look();
}

// Each forks and exits at once. Nobody waits for them: init does.
static void chain(void) {
    while (!stop()) {
        pid_t child = fork();
        if (child > 0)
            _exit(0);
        if (child < 0)
            nap(1000);
        else
            born();
    }
}

// Each makes some children, one after the other, each of which may make others; all end after some time.
static void bush(unsigned seed, int depth) {
    for (int n = 0; n < 6 && !stop(); n++) {
        if (atomic_load(&shared[5]) < 40) {
            pid_t child = fork();
            if (child == 0) {
                atomic_fetch_add(&shared[5], 1);
                born();
                if (depth < 6)
                    bush(rand_r(&seed) + n, depth + 1);
                look();
                atomic_fetch_sub(&shared[5], 1);
                _exit(0);
            }
        }
        nap(rand_r(&seed) % 2000);
        look();
        while (waitpid(-1, NULL, WNOHANG) > 0) {
        }
    }
    while (waitpid(-1, NULL, 0) > 0 || errno == EINTR) {
    }
}

// Threads that fork, and threads that start programs (which is vfork and exec).
static void *forker(void *seed) {
    unsigned own_seed = (unsigned)(unsigned long)seed;
    while (!stop()) {
        pid_t child;
        if (own_seed % 2) {
            child = fork();
            if (child == 0) {
                born();
                nap(500);
                look();
                _exit(0);
            }
        } else {
            char *arguments[] = {own[0], "once", own[2], NULL};
            if (posix_spawn(&child, "/proc/self/exe", NULL, NULL, arguments, environ) != 0)
                child = -1;
        }
        if (child > 0)
            waitpid(child, NULL, 0);
        else
            nap(1000);
        look();
    }
    return NULL;
}

// Begins a storm in a cgroup, says the number of its first process, and collects whom nobody else does. Init would do that
// too, but on some machines so slowly that the dead take all numbers there are.
static int reaper(const char *folder, char **rest) {
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    pid_t first = fork();
    if (first == 0) {
        char path[4096];
        snprintf(path, sizeof path, "%s/cgroup.procs", folder);
        int procs = open(path, O_WRONLY);
        if (procs < 0 || write(procs, "0", 1) != 1)
            _exit(3);
        close(procs);
        setsid();
        execv("/proc/self/exe", rest);
        _exit(4);
    }
    printf("%d\n", (int)first);
    fflush(stdout);
    while (wait(NULL) > 0 || errno == EINTR)
        ;
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 5 && !strcmp(argv[1], "reaper"))
        return reaper(argv[2], argv + 2);
    if (argc < 3)
        return 2;
    own = argv;
    int file = open(argv[2], O_RDWR);
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (file < 0 || shared == MAP_FAILED)
        return 2;
    close(file);
    int unset = 0;
    atomic_compare_exchange_strong(&shared[6], &unset, seconds() + 300);
    born();
    if (!strcmp(argv[1], "chain")) {
        // The first one stays.
        if (fork() == 0)
            chain();
        while (!stop())
            nap(5000);
    } else if (!strcmp(argv[1], "bush")) {
        while (!stop())
            bush(getpid(), 0);
    } else if (!strcmp(argv[1], "threads")) {
        pthread_t threads[4];
        for (long n = 0; n < 4; n++)
            pthread_create(&threads[n], NULL, forker, (void *)n);
        for (int n = 0; n < 4; n++)
            pthread_join(threads[n], NULL);
    } else if (!strcmp(argv[1], "exec")) {
        // The same process, another program again and again.
        nap(200);
        look();
        if (!stop())
            execv("/proc/self/exe", argv);
    }
    return 0;
}
