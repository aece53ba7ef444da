/* Two processes with the same memory, merged through one partition.
 *
 *   cc -I include examples/c/merge.c -L TARGET -lpagefold_c -o merge && LD_LIBRARY_PATH=TARGET ./merge
 */
#include <pagefold.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define SIZE ((size_t)16 << 20)

static int fail(const char *what, int error)
{
	fprintf(stderr, "%s: %s: %s\n", what, pagefold_strerror(error), pagefold_last_error());
	return 1;
}

static unsigned char *fill(void)
{
	unsigned char *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return NULL;
	for (size_t i = 0; i < SIZE / sizeof(unsigned); i++)
		((unsigned *)memory)[i] = (unsigned)i * 2654435761u;
	return memory;
}

static int intact(const unsigned char *memory)
{
	for (size_t i = 0; i < SIZE / sizeof(unsigned); i++)
		if (((const unsigned *)memory)[i] != (unsigned)i * 2654435761u)
			return 0;
	return 1;
}

/* Live where that is possible, else in this thread, which is the only one. */
static int merge(int partition, unsigned char *memory, struct pagefold_report *report)
{
	int error = pagefold_merge(partition, memory, SIZE, report);
	if (error == PAGEFOLD_E_NO_USERFAULTFD)
		error = pagefold_merge_quiescent(partition, memory, SIZE, report);
	return error;
}

int main(void)
{
	struct pagefold_report report;
	int partition = pagefold_open("example", 0);
	if (partition < 0)
		return fail("open", partition);
	unsigned char *memory = fill();
	if (!memory)
		return 1;
	int error = merge(partition, memory, &report);
	if (error)
		return fail("merge", error);

	pid_t child = fork();
	if (child == 0) {
		/* The child inherits the partition; memory that it fills itself is its own. */
		unsigned char *own = fill();
		if (!own)
			_exit(1);
		error = merge(partition, own, &report);
		if (error)
			_exit(fail("merge in the child", error));
		printf("child: %llu pages merged\n", (unsigned long long)report.pages_merged);
		fflush(stdout);
		_exit(report.bytes_merged > SIZE / 2 && intact(own) ? 0 : 2);
	}
	int status;
	if (waitpid(child, &status, 0) != child || status != 0) {
		fprintf(stderr, "the child failed: %x\n", status);
		return 1;
	}
	if (!intact(memory)) {
		fprintf(stderr, "the memory has changed\n");
		return 1;
	}
	error = pagefold_unmerge(partition, memory, SIZE, &report);
	if (error)
		return fail("unmerge", error);
	error = pagefold_leave(partition);
	if (error)
		return fail("leave", error);
	if (!intact(memory))
		return 1;
	error = pagefold_close(partition);
	if (error)
		return fail("close", error);
	puts("done");
	return 0;
}
