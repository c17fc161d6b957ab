// Included first in every source (setup.py): asks for the versions of C library functions that glibc has had from the start, where a newer glibc on the building
// machine would give the newest. So the libraries run on every system since glibc 2.28 (manylinux_2_28), wherever they are built.
//
// dlopen and its like moved from libdl into libc in 2.34, and kept their old versions there; exp and its like lost their wrapper for errno in 2.29.
#pragma once
#include <features.h>

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
#if defined(__x86_64__)
#define INTERFLOW_FIRST_GLIBC "GLIBC_2.2.5"
#else
#define INTERFLOW_FIRST_GLIBC "GLIBC_2.17"
#endif
#define INTERFLOW_OLD(function) __asm__(".symver " #function "," #function "@" INTERFLOW_FIRST_GLIBC);
INTERFLOW_OLD(dlopen)
INTERFLOW_OLD(dlclose)
INTERFLOW_OLD(dlsym)
INTERFLOW_OLD(dladdr)
INTERFLOW_OLD(dlerror)
INTERFLOW_OLD(exp)
INTERFLOW_OLD(log)
INTERFLOW_OLD(pow)
INTERFLOW_OLD(exp2)
INTERFLOW_OLD(log2)
#undef INTERFLOW_OLD
#undef INTERFLOW_FIRST_GLIBC
#endif
