// Large fresh outputs on huge pages: what a first write costs is mostly the kernel handing out 4 KB pages one by one.
#pragma once
#include <cstddef>
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace interflow {

constexpr int64_t kHugePage = 2 << 20;

// Asks the kernel to back [data, data + bytes) with 2 MB pages where it has not mapped it yet. A hint: nothing depends on it,
// and where the kernel knows no huge pages or the memory is in use already, nothing happens. Only whole huge pages are named.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  auto end = (reinterpret_cast<uintptr_t>(data) + uintptr_t(bytes)) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace interflow
