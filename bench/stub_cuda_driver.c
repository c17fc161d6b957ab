// A CUDA driver that accepts every call and does nothing: what Triton's launcher links against in triton_host_time.py.
#include <stddef.h>
#include <string.h>

typedef int Result;
static int thing;

Result cuInit(unsigned flags) { return 0; }
Result cuDeviceGetCount(int* count) { return *count = 1, 0; }
Result cuDeviceGet(int* device, int ordinal) { return *device = 0, 0; }
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  enum { kWarp = 10, kProcessors = 16, kMajor = 75, kMinor = 76 };
  *value = attribute == kWarp ? 32 : attribute == kProcessors ? 132 : attribute == kMajor ? 9 : attribute == kMinor ? 0 : 232448;
  return 0;
}
Result cuDevicePrimaryCtxRetain(void** context, int device) { return *context = &thing, 0; }
Result cuCtxSetCurrent(void* context) { return 0; }
Result cuCtxGetCurrent(void** context) { return *context = &thing, 0; }
Result cuCtxGetDevice(int* device) { return *device = 0, 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }
Result cuCtxGetLimit(size_t* value, int limit) { return *value = 0, 0; }
Result cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }
Result cuFuncGetAttribute(int* value, int attribute, void* function) { return *value = attribute == 0 ? 1024 : 0, 0; }  // 0: threads of a block
Result cuFuncSetCacheConfig(void* function, int config) { return 0; }
Result cuGetErrorString(Result error, const char** text) { return *text = "", 0; }
Result cuModuleLoadData(void** module, const void* image) { return *module = &thing, 0; }
Result cuModuleUnload(void* module) { return 0; }
Result cuModuleGetFunction(void** function, void* module, const char* name) { return *function = &thing, 0; }
Result cuPointerGetAttribute(void* data, int attribute, unsigned long long pointer) { return memcpy(data, &pointer, sizeof pointer), 0; }
Result cuPointerGetAttributes(unsigned count, int* attributes, void** data, unsigned long long pointer) { return 0; }
Result cuStreamIsCapturing(void* stream, int* status) { return *status = 0, 0; }
Result cuDriverGetVersion(int* version) { return *version = 13000, 0; }
Result cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned x, unsigned y, unsigned z, unsigned shared, void* stream, void** parameters,
                      void** extra) {
  return 0;
}
Result cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) { return 0; }
Result cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) { return *clusters = 1, 0; }
Result cuTensorMapEncodeTiled(void) { return 0; }
Result cuTensorMapEncodeIm2col(void) { return 0; }
