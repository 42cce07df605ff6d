// The execution model of one CUDA kernel launch on the host, for tests: every thread of a block is
// a fiber, blocks run one after another. Wrong synchronisation is an error with file and line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulation {

struct Site {
  const char* file;
  int line;
};

// Operations that a whole warp, or a warp group of four, performs together.
enum class Collective { kSyncWarp, kShuffle, kLdmatrix, kLdmatrixTrans, kMma, kWgmma };

struct Shuffle {
  uint64_t in, out;
  int source;
};

struct Ldmatrix {
  uint32_t* registers;
  const void* row;
};

// What mma.sync does to one warp, given the operands of its 32 lanes.
struct Mma {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
  void (*compute)(Mma* const* lanes);
};

void collective(Collective kind, uint32_t mask, void* operands, Site site);
void barrier(Site site);
void* shared_memory(unsigned index, size_t bytes);
int lane();

void cp_async(void* destination, const void* source, int bytes, bool valid, Site site);
void cp_async_commit();
void cp_async_wait(int pending);

// An access that the compiler's instrumentation does not see.
void check_access(const void* address, size_t bytes, bool write, const char* what, Site site);

int set_shared_memory_limit(const void* kernel, int bytes);
int last_error();
void launch(const void* kernel, const char* name, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body);

template <class T>
T shuffle(uint32_t mask, T value, int source, Site site) {
  Shuffle operands{0, 0, source};
  memcpy(&operands.in, &value, sizeof value);
  collective(Collective::kShuffle, mask, &operands, site);
  memcpy(&value, &operands.out, sizeof value);
  return value;
}

}  // namespace emulation

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

// For wrappers: who called, as default arguments.
#define EMULATION_SITE const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define EMULATION_HERE \
  emulation::Site { file_, line_ }
