// The kernels for processors with AVX2 and FMA.

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

// Only what is written below may use these instructions: headers of the standard library, included
// above, give inline functions that any processor may be handed.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#define CIN_FAST_ISA avx2
#include "vec_avx2.h"
// Over that vector:
#include "operand_float.h"
// Every kernel is written once, over both.
#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace cin_fast {
const Kernels& avx2_kernels() { return avx2::kTable; }
}  // namespace cin_fast

#endif
