// Stacks with a guard page, and the switch between them: x86-64 and AArch64 in assembly, ucontext elsewhere.
#include "fibers.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if INTERFLOW_EMULATION_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace interflow::emulation {
namespace {

constexpr size_t kGuard = 64 << 10;

#if defined(__x86_64__) || defined(__aarch64__)
extern "C" __attribute__((visibility("hidden"))) void interflow_switch_stack(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.hidden interflow_switch_stack
.globl interflow_switch_stack
.type interflow_switch_stack, @function
interflow_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size interflow_switch_stack, .-interflow_switch_stack
)");
void* first_frame(char* top, void (*entry)()) {
  auto frame = reinterpret_cast<uint64_t*>(top) - 8;  // entry finds the alignment of a called function
  for (int i = 0; i < 8; ++i) frame[i] = 0;
  frame[6] = uint64_t(entry);
  return frame;
}
#else
asm(R"(
.text
.hidden interflow_switch_stack
.globl interflow_switch_stack
.type interflow_switch_stack, %function
interflow_switch_stack:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size interflow_switch_stack, .-interflow_switch_stack
)");
void* first_frame(char* top, void (*entry)()) {
  auto frame = reinterpret_cast<uint64_t*>(top) - 20;
  for (int i = 0; i < 20; ++i) frame[i] = 0;
  frame[11] = uint64_t(entry);  // x30
  return frame;
}
#endif
void switch_stack(void** save, void* load) { interflow_switch_stack(save, load); }
void prepare(void** saved, char*, char* top, void (*entry)()) { *saved = first_frame(top, entry); }
void release(void*) {}
#else
void switch_stack(void** save, void* load) {
  if (!*save) *save = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*save), static_cast<ucontext_t*>(load));
}
void prepare(void** saved, char* stack, char* top, void (*entry)()) {
  if (!*saved) *saved = new ucontext_t;
  auto context = static_cast<ucontext_t*>(*saved);
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = size_t(top - stack);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
void release(void* saved) { delete static_cast<ucontext_t*>(saved); }
#endif

#if INTERFLOW_EMULATION_ASAN
Fiber* left = nullptr;     // the fiber that a switch is leaving
Fiber* entered = nullptr;  // and the one that it enters
#endif

}  // namespace

void Fiber::begin(void (*entry)(), unsigned color) {
  if (!stack_) {
    void* memory = mmap(nullptr, kGuard + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE)) std::perror("stack of an emulated thread"), std::abort();
    stack_ = static_cast<char*>(memory) + kGuard;
  }
  char* top = stack_ + kStackBytes - 64 * (color % 61);
#if INTERFLOW_EMULATION_ASAN
  __asan_unpoison_memory_region(stack_, kStackBytes);  // redzones of frames that a fault abandoned
  bottom_ = stack_, size_ = kStackBytes, fake_stack_ = nullptr;
  entry_ = entry;
  entry = [] { arrived(); entered->entry_(); };
#endif
  prepare(&saved_, stack_, top, entry);
}

#if INTERFLOW_EMULATION_ASAN
void Fiber::arrived() {
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(entered->fake_stack_, &bottom, &size);
  if (!left->bottom_) left->bottom_ = bottom, left->size_ = size;  // the OS thread's own stack
}
#endif

void Fiber::go(Fiber& from, Fiber& to) {
#if INTERFLOW_EMULATION_ASAN
  left = &from, entered = &to;
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
  switch_stack(&from.saved_, to.saved_);
  arrived();
#else
  switch_stack(&from.saved_, to.saved_);
#endif
}

Fiber::~Fiber() {
  if (stack_) munmap(stack_ - kGuard, kGuard + kStackBytes);
  release(saved_);
}

}  // namespace interflow::emulation
