// Registration once in a process: a second copy of a library, from another path, registers nothing and says so.
//
// Two copies come together where the package is installed twice, or where its library is loaded by hand beside it. The dispatcher refuses a second
// definition, and a refusal inside a static initialiser would end the process. So each copy first looks for another one, by an exported function.
#pragma once
#include <dlfcn.h>
#include <link.h>
#include <torch/csrc/stable/library.h>

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

// The operators' namespace, as interflow_kernels/_namespace.py fixes it; the host emulation of the CUDA part gives another.
#ifndef INTERFLOW_LIBRARY
#define INTERFLOW_LIBRARY interflow_kernels
#endif
#ifndef INTERFLOW_VERSION
#define INTERFLOW_VERSION "unknown"
#endif

namespace interflow {

// Whether this copy registers its operators; decided once, by the library's own source of that name. Registers the schemas where they are its own.
bool registers();

// Of the copy that came first: where it lies and its version. path empty: there is none.
struct OtherCopy {
  std::string path, version;
};

// Looks among the loaded libraries for one, other than that of `own`, that exports the function `marker`, which returns its version.
inline OtherCopy other_copy(const char* marker, const void* own) {
  std::vector<std::string> paths;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* into) {
        if (info->dlpi_name && *info->dlpi_name) static_cast<std::vector<std::string>*>(into)->push_back(info->dlpi_name);
        return 0;
      },
      &paths);
  Dl_info here{};
  if (!dladdr(own, &here)) return {};
  for (const std::string& path : paths) {
    if (path == here.dli_fname) continue;
    void* handle = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) continue;
    void* found = dlsym(handle, marker);
    Dl_info there{};
    bool of_its_own = found && dladdr(found, &there) && path == there.dli_fname;  // and not of a library that it depends on
    std::string version = of_its_own ? reinterpret_cast<const char* (*)()>(found)() : "";
    dlclose(handle);
    if (of_its_own) return {path, version};
  }
  return {};
}

// Why this copy registers nothing: on stderr, and kept for whoever asks. Empty where its operators, or another copy's of its version, serve.
class Refusal {
 public:
  // Decides; `define` registers what this copy alone may define and returns whether it could.
  template <class Define>
  bool first(const char* marker, const void* own, Define define) {
    Dl_info here{};
    std::string path = dladdr(own, &here) ? here.dli_fname : "this library";
    OtherCopy other = other_copy(marker, own);
    if (other.path.empty() && define()) return true;
    std::string text = other.path.empty() ? "interflow_kernels: the operators are defined in this process already, not by " + path + ", which is not used"
                                          : "interflow_kernels: the operators come from " + other.path + " (version " + other.version + "); a second copy, " + path +
                                                " (version " + std::string(INTERFLOW_VERSION) + "), is not used";
    std::fprintf(stderr, "%s\n", text.c_str());
    if (other.version != INTERFLOW_VERSION) text_ = text;
    return false;
  }
  const char* text() const { return text_.empty() ? nullptr : text_.c_str(); }

 private:
  std::string text_;
};

using Registration = std::unique_ptr<torch::stable::detail::StableTorchLibraryInit>;

inline Registration register_if_first(void (*fill)(torch::stable::detail::StableLibrary&), const char* library, const char* key, const char* file, uint32_t line) {
  if (!registers()) return nullptr;
  return std::make_unique<torch::stable::detail::StableTorchLibraryInit>(torch::stable::detail::StableLibrary::Kind::IMPL, fill, library, key, file, line);
}

}  // namespace interflow

// As STABLE_TORCH_LIBRARY_IMPL, where this copy of the library is the one that registers; one in a source file.
#define INTERFLOW_LIBRARY_IMPL(library, key, m)                                                                                                 \
  static void interflow_register(torch::stable::detail::StableLibrary&);                                                                        \
  static const interflow::Registration interflow_registered =                                                                                   \
      interflow::register_if_first(&interflow_register, C10_STRINGIZE(library), C10_STRINGIZE(key), __FILE__, __LINE__);                        \
  static void interflow_register(torch::stable::detail::StableLibrary& m)
