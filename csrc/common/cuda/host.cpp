// Counters that stay zero between launches, and what a failed launch says.
#include "common/cuda/host.h"

#include "common/cuda/capture.h"

#if !INTERFLOW_EMULATION
#include <map>
#include <mutex>

namespace interflow {
namespace {

constexpr int64_t kSlabWords = 256 << 10;  // 1 MB
constexpr int64_t kAlign = 32;             // words: a slot has 128-byte lines of its own

// Zeroed memory of one device, handed out in slots and never taken back.
struct Slab {
  uint32_t* next = nullptr;
  int64_t left = 0;
};

struct Slot {
  uint32_t* words = nullptr;
  int64_t count = 0;
};

// What there is to do about an error, as the end of a sentence.
const char* remedy(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
      return "; the library was built for other GPUs: python -m interflow_kernels.info lists them, TORCH_CUDA_ARCH_LIST chooses them at build time";
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion: return "; the driver is older than the CUDA toolkit that built the library: update it";
    default: return "";
  }
}

// The text of an error that is then nobody else's to find.
std::string described(cudaError_t error) {
  (void)cudaGetLastError();
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")" + remedy(error);
}

// Also while a stream is being captured: allocation and zeroing happen now, on a stream of their own, and are not recorded.
void grow(Slab& slab, int64_t words) {
  RelaxedCapture relaxed;
  check_cuda(relaxed.error(), "entering relaxed capture mode");
  void* memory = nullptr;
  cudaStream_t stream = nullptr;
  int64_t bytes = std::max(words, kSlabWords) * 4;
  cudaError_t error = cudaMalloc(&memory, size_t(bytes));
  if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, size_t(bytes), stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (stream) cudaStreamDestroy(stream);
  if (error != cudaSuccess && memory) cudaFree(memory);
  check_cuda(error, "allocating a megabyte for counters");
  slab = {static_cast<uint32_t*>(memory), bytes / 4};
}

// Which a capture on this thread must not ask for its own stream, and on another thread not for any, unless it is relaxed.
unsigned long long number_of(cudaStream_t stream) {
  RelaxedCapture relaxed;
  check_cuda(relaxed.error(), "entering relaxed capture mode");
  unsigned long long number = 0;
  check_cuda(cudaStreamGetId(stream, &number), "asking for the stream's number");
  return number;
}

}  // namespace

// One slot for each stream, whose launches follow each other. Keyed by the stream's number, which is never used twice, unlike its handle.
//
// While a graph is being captured a fresh slot for each launch, since two graphs may run side by side. Nothing tells when such a graph is gone, so its slots
// are kept for the life of the process: 128 bytes or more for each launch that was ever captured. Two executables that were instantiated from one
// captured graph share its slots and must not run at the same time, as they must not anyway: they share all memory of the captured launches.
uint32_t* counters(int device, cudaStream_t stream, int64_t count) {
  static std::mutex mutex;
  static std::map<int, Slab> slabs;
  static std::map<std::pair<int, unsigned long long>, Slot> slots;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &capturing), "asking whether the stream is being captured");
  bool captured = capturing != cudaStreamCaptureStatusNone;
  unsigned long long number = captured ? 0 : number_of(stream);
  int64_t words = (count + kAlign - 1) / kAlign * kAlign;

  std::lock_guard<std::mutex> lock(mutex);
  Slot fresh;
  Slot& slot = captured ? fresh : slots[{device, number}];
  if (slot.count >= words) return slot.words;
  words = std::max(words, 2 * slot.count);  // a slot that was too small is left behind
  Slab& slab = slabs[device];
  if (slab.left < words) grow(slab, words);
  slot = {slab.next, words};
  slab.next += words;
  slab.left -= words;
  return slot.words;
}

int64_t l2_bytes() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "asking for the current device");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device), "asking for the size of the L2 cache");
  return bytes;
}

void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) INTERFLOW_CHECK(false, "interflow_kernels: ", what, " failed: ", described(error));
}

void check_launch(cudaError_t error, const char* op, const char* kernel) {
  if (error != cudaSuccess) INTERFLOW_CHECK(false, op, ": launching ", kernel, " failed: ", described(error));
}

// --- one copy in a process ---------------------------------------------------------------------------------------------------
namespace {
Refusal& refusal() {
  static Refusal refusal;
  return refusal;
}
}  // namespace

bool registers() {
  static const bool first = refusal().first(C10_STRINGIZE(INTERFLOW_LIBRARY) "_cuda_version", &kSlabWords, [] { return true; });
  return first;
}

}  // namespace interflow

// What this library exports, as csrc/library.cpp does for the schemas and the CPU kernels.
#define INTERFLOW_EXPORTED(name) C10_CONCATENATE(INTERFLOW_LIBRARY, _cuda##name)
extern "C" {
__attribute__((visibility("default"))) const char* INTERFLOW_EXPORTED(_version)() { return INTERFLOW_VERSION; }
__attribute__((visibility("default"))) const char* INTERFLOW_EXPORTED(_refusal)() { return interflow::refusal().text(); }
}
#endif
