// The kernels for bfloat16 on processors with AVX-512 and its BF16 extension.

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__x86_64__)

#include <immintrin.h>

// Only what is written below may use these instructions: headers of the standard library, included
// above, give inline functions that any processor may be handed.
#if defined(__clang__)
#pragma clang attribute push(                                                          \
    __attribute__((target("avx512bf16,avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), \
    apply_to = function)
#else
// The compiler's own intrinsics read a variable that they leave unset on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif

#define CIN_FAST_ISA avx512_bf16
#include "vec_avx512.h"
// Over that vector:
#include "operand_bfloat16.h"
// Every kernel is written once, over both.
#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace cin_fast {
const Kernels& avx512_bf16_kernels() { return avx512_bf16::kTable; }
}  // namespace cin_fast

#endif
