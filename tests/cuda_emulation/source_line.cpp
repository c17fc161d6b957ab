// Where in the sources an instruction comes from: binutils' addr2line is asked, so that a fault names file and line.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "runtime.h"

namespace interflow::emulation {

std::string source_line(const void* pc) {
  Dl_info info;
  if (!pc || !dladdr(pc, &info) || !info.dli_fname) return "?";
  size_t offset = size_t(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase)) - 1;
  char command[1200];
  std::snprintf(command, sizeof command, "addr2line -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  FILE* pipe = popen(command, "r");
  if (!pipe) return "?";
  std::string found;
  char line[1024];
  while (std::fgets(line, sizeof line, pipe)) {  // the innermost place that is not the emulation's own
    std::string text(line, std::strcspn(line, " \n"));
    if (text.find("cuda_emulation/emulation.h") != std::string::npos || text[0] == '?') continue;
    if (found.empty()) found = text.substr(text.rfind('/') + 1);
  }
  pclose(pipe);
  return found.empty() ? "?" : found;
}

}  // namespace interflow::emulation
