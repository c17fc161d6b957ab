// What a new compiler takes from a newer C or C++ library than manylinux_2_28 has, said in what that one has: so a library that is built anywhere runs on
// every system since glibc 2.28 and GCC 8. Each function has the name that the compiler asks for, and is seen by the library alone that it is linked into.
//
// csrc/common/old_glibc.h does the same for functions of glibc that have an older version of the same name.
#include <exception>
#include <new>
#include <sstream>
#include <string>

#if defined(__GLIBC__) && defined(__GLIBCXX__) && (defined(__x86_64__) || defined(__aarch64__))
#define INTERFLOW_HIDDEN __attribute__((visibility("hidden")))

// glibc 2.32. libstdc++ spares atomic counts in a process of one thread: there may always be more.
extern "C" {
extern INTERFLOW_HIDDEN char __libc_single_threaded;
char __libc_single_threaded = 0;
}

// GLIBCXX_3.4.26: constructors without a mode.
INTERFLOW_HIDDEN void ostringstream_made(void* at) __asm__("_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
INTERFLOW_HIDDEN void stringstream_made(void* at) __asm__("_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void ostringstream_made(void* at) { new (at) std::ostringstream(std::ios_base::out); }
void stringstream_made(void* at) { new (at) std::stringstream(std::ios_base::out | std::ios_base::in); }

// GLIBCXX_3.4.29: C++20's str() for lvalues and rvalues, in place of the one str() before.
std::string str_before(const std::stringbuf* buffer) __asm__("_ZNKSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
INTERFLOW_HIDDEN std::string str_of_lvalue(const std::stringbuf* buffer) __asm__("_ZNKRSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
INTERFLOW_HIDDEN std::string str_of_rvalue(std::stringbuf* buffer) __asm__("_ZNOSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string str_of_lvalue(const std::stringbuf* buffer) { return str_before(buffer); }
std::string str_of_rvalue(std::stringbuf* buffer) { return str_before(buffer); }

// GLIBCXX_3.4.29: what an allocation of too many elements calls.
[[noreturn]] INTERFLOW_HIDDEN void too_many_elements() __asm__("_ZSt28__throw_bad_array_new_lengthv");
[[noreturn]] void too_many_elements() { throw std::bad_array_new_length(); }

// CXXABI_1.3.13: a std::exception_ptr counts in functions of its own, where before the copy constructor and the destructor did.
void copied(void* at, const std::exception_ptr* from) __asm__("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
void destroyed(std::exception_ptr* at) __asm__("_ZNSt15__exception_ptr13exception_ptrD1Ev");
INTERFLOW_HIDDEN void count_up(std::exception_ptr* one) __asm__("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
INTERFLOW_HIDDEN void count_down(std::exception_ptr* one) __asm__("_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");
void count_up(std::exception_ptr* one) {
  alignas(std::exception_ptr) char counted[sizeof(std::exception_ptr)];
  copied(counted, one);
}
void count_down(std::exception_ptr* one) { destroyed(one); }
#endif
