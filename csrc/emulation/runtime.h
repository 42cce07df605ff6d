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
enum class Collective { kSyncWarp, kShuffle, kLdmatrix, kLdmatrixTrans, kMma, kWgmma, kSetmaxnreg };

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

// wgmma, by one of the 128 threads of a warp group.
struct Wgmma {
  float* d;
  // The left operand: these registers, or shared memory as the descriptor says.
  const uint32_t* a_registers;
  uint64_t a, b;
  int columns;
  bool accumulate;
  // Whether the product's depth runs down the rows of the right operand's memory, or along them.
  bool b_down;
  float (*widen)(uint16_t bits);
};

// A tensor in panels in global memory, and the box of it that one bulk copy takes: see csrc/cuda's.
struct TensorMap {
  const void* data;
  size_t group_bytes;
  int images, panels, turns, groups, step, height, box_turns, box_panels;
};

void collective(Collective kind, uint32_t mask, void* operands, Site site);
void barrier(Site site);
void named_barrier(unsigned number, unsigned threads, Site site);
void named_barrier_arrive(unsigned number, unsigned threads, Site site);
void* shared_memory(unsigned index, size_t bytes);
int lane();

void cp_async(void* destination, const void* source, int bytes, bool valid, Site site);
void cp_async_commit();
void cp_async_wait(int pending);

void mbarrier_init(const void* barrier, int arrivals, Site site);
void fence_mbarrier_init();
void mbarrier_arrive(const void* barrier, Site site);
void mbarrier_arrive_expect(const void* barrier, int bytes, Site site);
void mbarrier_wait(const void* barrier, int parity, Site site);
void bulk_copy(void* destination, const TensorMap& map, const void* barrier, int turn, int image,
               Site site);
void fence_proxy_async();

void wgmma(const Wgmma& product, Site site);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
void setmaxnreg(int registers, Site site);

// The address that kernels put into descriptors.
uint32_t shared_address(const void* address);

// An access that the compiler's instrumentation does not see.
void check_access(const void* address, size_t bytes, bool write, const char* what, Site site);

void grid_dependency_wait();
int set_shared_memory_limit(const void* kernel, int bytes);
int last_error();
void launch(const void* kernel, const char* name, dim3 grid, dim3 block, size_t shared_bytes,
            bool early, const std::function<void()>& body);

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
