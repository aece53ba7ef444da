#ifndef PAGEFOLD_H
#define PAGEFOLD_H

/* Made by cbindgen from crates/capi/src/lib.rs; do not edit. See pagefold(3). */

#include <stddef.h>
#include <stdint.h>

/*
 Members do not trust each other: every run of pages lies in a sealed file of its own.
 */
#define PAGEFOLD_STRICT 1

/*
 The callers vouch that nobody else holds references to the pages that they merge.
 */
#define PAGEFOLD_VOUCH 2

/*
 What the functions return when they fail.
 */
typedef enum pagefold_error {
  /*
   An argument makes no sense: no such partition, a null pointer, an unknown flag, or a range in which something is
   not private memory of the process's: a hole, a shared mapping, a file.
   */
  PAGEFOLD_E_INVALID = -1,
  /*
   The descriptor is no partition's.
   */
  PAGEFOLD_E_NOT_A_PARTITION = -2,
  /*
   The process that serves the partition has ended.
   */
  PAGEFOLD_E_ENDED = -3,
  /*
   userfaultfd is not permitted, or cannot move pages: pagefold_merge_quiescent works without.
   */
  PAGEFOLD_E_NO_USERFAULTFD = -4,
  /*
   The C library of this process is not understood, or no code can be loaded.
   */
  PAGEFOLD_E_NO_AGENT = -5,
  /*
   The process has an agent, or merges in another partition. Or its helper is not there: another thread takes the
   process out of the partition, or the machine is slow. Then try again.
   */
  PAGEFOLD_E_BUSY = -6,
  /*
   The broker does not let this process in, or may not read it.
   */
  PAGEFOLD_E_DENIED = -7,
  /*
   Memory, descriptors, processes or ranges have run out.
   */
  PAGEFOLD_E_LIMIT = -8,
  /*
   Anything else.
   */
  PAGEFOLD_E_OTHER = -9
} pagefold_error;

/*
 What a call did. Counts of pages but where a unit is named.
 */
typedef struct pagefold_report {
  /*
   Looked at.
   */
  uint64_t pages_scanned;
  /*
   Of the caller, the store's now.
   */
  uint64_t pages_merged;
  /*
   Of the caller, zeros that were given back.
   */
  uint64_t zero_pages;
  /*
   Of other processes, merged with the caller's.
   */
  uint64_t pages_merged_elsewhere;
  /*
   Got their own copies back.
   */
  uint64_t pages_unmerged;
  /*
   Had an equal partner and were left as they were.
   */
  uint64_t pages_refused;
  /*
   Bytes of the caller that are no longer its own.
   */
  uint64_t bytes_merged;
  /*
   How long it took, in nanoseconds.
   */
  uint64_t elapsed_ns;
  /*
   CPU time, in nanoseconds.
   */
  uint64_t cpu_ns;
} pagefold_report;

#ifdef __cplusplus
extern "C" {
#endif

/*
 Opens a new partition, which this process serves. `name` is for reports. Returns its descriptor, closed on exec,
 which is to be closed by pagefold_close only.

 # Safety
 `name` is a string.
 */
int pagefold_open(const char *name,
                  unsigned int flags);

/*
 Joins the partition whose descriptor this is: inherited, or received over a socket. Takes the descriptor over and
 returns it.

 # Safety
 The descriptor belongs to the caller, who leaves it to this library.
 */
int pagefold_join(int fd);

/*
 Merges a range now; other threads may use it meanwhile. Only whole pages inside the range are merged, and never the
 last of them. All of it must be mapped, as private memory; otherwise nothing is done. `report` may be null.

 # Safety
 The range is memory of the caller's, and mapping calls on it go through the C library. `report` is null or writable.
 */
int pagefold_merge(int partition,
                   const void *start,
                   size_t size,
                   struct pagefold_report *report);

/*
 Merges a range in the calling thread. Needs no userfaultfd. The first process with a page makes it known, the
 second one's is merged, the first one's at its next call.

 # Safety
 As pagefold_merge, and until this returns nothing writes the range or changes its mapping.
 */
int pagefold_merge_quiescent(int partition,
                             const void *start,
                             size_t size,
                             struct pagefold_report *report);

/*
 Gives a range its own pages back. `report` may be null.

 # Safety
 `report` is null or writable.
 */
int pagefold_unmerge(int partition, const void *start, size_t size, struct pagefold_report *report);

/*
 Gives everything that this process handed over its own pages back and takes it out of the partition.
 */
int pagefold_leave(int partition);

/*
 Closes a partition. If this process serves it, it ends; what is merged stays merged.
 */
int pagefold_close(int partition);

/*
 A short text for a number that one of these functions returned. Static.
 */
const char *pagefold_strerror(int error);

/*
 What went wrong in the last call of this thread that failed, with its cause and the way out. Valid until the
 thread's next call.
 */
const char *pagefold_last_error(void);

#ifdef __cplusplus
}
#endif

#endif  /* PAGEFOLD_H */
