/* Ranges that are none, with a wrong size above all: each is refused at once, and leaving works afterwards. In the oldest C
 * that the header is for. */
#include <pagefold.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define SIZE ((size_t)4 << 20)

static void expect(int line, int result, int wanted)
{
	if (result == wanted)
		return;
	fprintf(stderr, "line %d: %d instead of %d: %s\n", line, result, wanted, pagefold_last_error());
	exit(1);
}

static unsigned char *map(int flags)
{
	unsigned char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		exit(2);
	memset(memory, 7, SIZE);
	return memory;
}

static int merge(int partition, void *memory, size_t size)
{
	int error = pagefold_merge(partition, memory, size, NULL);
	if (error == PAGEFOLD_E_NO_USERFAULTFD)
		error = pagefold_merge_quiescent(partition, memory, size, NULL);
	return error;
}

int main(void)
{
	unsigned char *memory, *pierced, *shared;
	char hole[32];
	int partition;

	/* Nothing here takes long. */
	alarm(20);
	memory = map(MAP_PRIVATE);
	partition = pagefold_open("ranges", 0);
	if (partition < 0)
		return 3;
	expect(__LINE__, merge(partition, memory, (size_t)-1 / 2), PAGEFOLD_E_INVALID);
	expect(__LINE__, merge(partition, memory, (size_t)1 << 38), PAGEFOLD_E_INVALID);
	expect(__LINE__, merge(partition, memory, (size_t)1 << 44), PAGEFOLD_E_INVALID);
	expect(__LINE__, merge(partition, (void *)0xfffffffffffff001, 100), PAGEFOLD_E_INVALID);
	expect(__LINE__, pagefold_merge_quiescent(partition, memory, (size_t)1 << 44, NULL), PAGEFOLD_E_INVALID);
	expect(__LINE__, pagefold_unmerge(partition, memory, (size_t)-1 / 2, NULL), PAGEFOLD_E_INVALID);

	pierced = map(MAP_PRIVATE);
	munmap(pierced + 65536, 4096);
	expect(__LINE__, merge(partition, pierced, SIZE), PAGEFOLD_E_INVALID);
	sprintf(hole, "at %lx ", (unsigned long)(pierced + 65536));
	if (!strstr(pagefold_last_error(), hole)) {
		fprintf(stderr, "not said where the hole is: %s\n", pagefold_last_error());
		return 4;
	}
	shared = map(MAP_SHARED);
	expect(__LINE__, merge(partition, shared, SIZE), PAGEFOLD_E_INVALID);

	/* What was refused is not held, and does not disturb what is right. */
	expect(__LINE__, merge(partition, memory, SIZE), 0);
	expect(__LINE__, pagefold_leave(partition), 0);
	expect(__LINE__, memory[SIZE - 1], 7);
	expect(__LINE__, pagefold_close(partition), 0);
	puts("done");
	return 0;
}
