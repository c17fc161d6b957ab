// Closes what isa_begin.h opened.
#if defined(INTERFLOW_AVX2)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
