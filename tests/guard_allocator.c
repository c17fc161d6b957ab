// Preloaded before PyTorch: while switched on, memory of tensors lies directly before or behind a page that nobody may touch.
//
// PyTorch takes the memory of CPU tensors from posix_memalign. Each block gets pages of its own in a large reservation, is filled with
// 0xff (NaN in every floating type), ends or begins at an inaccessible page, and is inaccessible itself once it is freed: a read or a
// write outside it, or after its end, is a SIGSEGV. No address is used twice.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <sys/mman.h>

extern void __libc_free(void*);
extern void* __libc_memalign(size_t, size_t);

#define PAGE 4096ul
#define RESERVED (1ul << 37)  // of addresses, not of memory
#define MOST (1ul << 21)      // blocks
#define FLAGS (MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE)

static struct {
  char* first;   // accessible page
  size_t bytes;  // of accessible pages
} block[MOST];   // in the order of their addresses
static size_t blocks, used;
static char* reserved;
static int side;  // 0: off; 1: blocks end at an inaccessible page; 2: they begin behind one
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// 0 where addresses could be reserved.
int guard_switch(int on) {
  pthread_mutex_lock(&lock);
  if (on && !reserved) {
    char* found = mmap(NULL, RESERVED, PROT_NONE, FLAGS, -1, 0);
    reserved = found == MAP_FAILED ? NULL : found;
  }
  side = reserved ? on : 0;
  const int failed = on && !reserved;
  pthread_mutex_unlock(&lock);
  return failed;
}

size_t guard_blocks(void) { return blocks; }

int posix_memalign(void** into, size_t alignment, size_t bytes) {
  if (!side || bytes == 0) {
    *into = __libc_memalign(alignment, bytes);
    return *into ? 0 : ENOMEM;
  }
  const size_t inside = (bytes + PAGE - 1) / PAGE * PAGE;
  pthread_mutex_lock(&lock);
  char* const page = reserved + used + PAGE;
  const int full = blocks == MOST || used + inside + 2 * PAGE > RESERVED || mprotect(page, inside, PROT_READ | PROT_WRITE);
  if (!full) {
    block[blocks].first = page;
    block[blocks++].bytes = inside;
    used += inside + PAGE;
  }
  pthread_mutex_unlock(&lock);
  if (full) return ENOMEM;
  memset(page, 0xff, inside);
  *into = side == 1 ? page + (inside - bytes) : page;
  return 0;
}

void free(void* pointer) {
  char* const at = pointer;
  if (!reserved || at < reserved || at >= reserved + RESERVED) {
    __libc_free(pointer);
    return;
  }
  pthread_mutex_lock(&lock);
  size_t low = 0, high = blocks;  // the last block that begins at or before the pointer
  while (high - low > 1) {
    const size_t middle = (low + high) / 2;
    if (block[middle].first <= at)
      low = middle;
    else
      high = middle;
  }
  mmap(block[low].first, block[low].bytes, PROT_NONE, FLAGS | MAP_FIXED, -1, 0);
  pthread_mutex_unlock(&lock);
}
