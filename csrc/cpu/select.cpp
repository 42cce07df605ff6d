// Which instruction set runs.

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

#include "kernels.h"

namespace cin_fast {
namespace {

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#endif

}  // namespace

const Kernels& kernels(bool bfloat16) {
  const char* variable = std::getenv("CIN_FAST_CPU_ISA");
  const std::string_view forced = variable ? variable : "";
  TORCH_CHECK(forced.empty() || forced == "plain" || forced == "avx2" || forced == "avx512" ||
                  forced == "avx512_bf16",
              "CIN_FAST_CPU_ISA: expected plain, avx2, avx512 or avx512_bf16, found ", forced);
#if defined(__x86_64__)
  if (has_avx512_bf16() && (forced.empty() || forced == "avx512_bf16"))
    return bfloat16 ? avx512_bf16_kernels() : avx512_kernels();
  if (has_avx512() && (forced.empty() || forced == "avx512")) return avx512_kernels();
  if (has_avx2() && (forced.empty() || forced == "avx2")) return avx2_kernels();
#endif
  TORCH_CHECK(forced.empty() || forced == "plain", "CIN_FAST_CPU_ISA: this processor has no ",
              forced);
  return plain_kernels();
}

}  // namespace cin_fast
