/* Comes into a state in which its code is not all that its files say, tells an address, and stays. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

__attribute__((aligned(4096))) void victim(void) { asm volatile(".skip 4096, 0x90"); }

int main(int count, char **words)
{
	const char *how = words[1], *what = count > 2 ? words[2] : "";
	int all = PROT_READ | PROT_WRITE | PROT_EXEC;
	void *at = NULL;

	if (!strcmp(how, "anonymous") && *what && !dlopen(what, RTLD_NOW))
		return 1;
	if (!strcmp(how, "anonymous"))
		at = mmap(NULL, 8192, all, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!strcmp(how, "memfd")) {
		int fd = memfd_create("code", 0);
		if (ftruncate(fd, 4096))
			return 1;
		at = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
	}
	if (!strcmp(how, "open"))
		at = dlopen(what, RTLD_NOW);
	if (!strcmp(how, "again"))
		at = dlmopen(LM_ID_NEWLM, what, RTLD_NOW);
	if (!strcmp(how, "data"))
		at = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, open(what, O_RDONLY), 0);
	if (!strcmp(how, "patch")) {
		at = (void *)((unsigned long)victim & ~4095ul);
		if (mprotect(at, 8192, all))
			return 1;
		((volatile char *)victim)[100] = 0x91;
		if (mprotect(at, 8192, PROT_READ | PROT_EXEC))
			return 1;
	}
	if (!strcmp(how, "plain"))
		at = &count;
	if (!at || at == MAP_FAILED)
		return 1;
	printf("%#lx\n", (unsigned long)at);
	fflush(stdout);
	pause();
}
