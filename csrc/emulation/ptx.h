// What each wrapper of csrc/cuda/ptx.cuh does, in plain arithmetic after the PTX manual.
// An error inside the real wrapper cannot show here: tests/test_cuda_ptx.py looks there, on a GPU.
#pragma once

#include "../cuda/panel_extents.h"
#include "cuda.h"

#define CIN_FAST_WGMMA
#define CIN_FAST_SM90A

namespace ptx {

inline void cp_async_16(void* destination, const void* source, bool valid, EMULATION_SITE) {
  emulation::cp_async(destination, source, 16, valid, EMULATION_HERE);
}

inline void cp_async_commit() { emulation::cp_async_commit(); }

template <int kPending>
void cp_async_wait() {
  emulation::cp_async_wait(kPending);
}

inline void ldmatrix_x4(uint32_t (&matrices)[4], const void* row, EMULATION_SITE) {
  emulation::Ldmatrix operands{matrices, row};
  emulation::collective(emulation::Collective::kLdmatrix, ~0u, &operands, EMULATION_HERE);
}

inline void ldmatrix_x4_trans(uint32_t (&matrices)[4], const void* row, EMULATION_SITE) {
  emulation::Ldmatrix operands{matrices, row};
  emulation::collective(emulation::Collective::kLdmatrixTrans, ~0u, &operands, EMULATION_HERE);
}

namespace detail {

inline float low(uint32_t bits, __nv_bfloat16) {
  bits <<= 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline float low(uint32_t bits, __half) {
  _Float16 value;
  memcpy(&value, &bits, 2);
  return float(value);
}

// D = A B + C for m16n8k16: A row-major in four registers a lane, B column-major in two.
template <class T>
void mma_16(emulation::Mma* const* lanes) {
  float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const emulation::Mma& m = *lanes[lane];
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8, column = pair + i / 2 * 8;
      a[row][column] = low(m.a[i], T{});
      a[row][column + 1] = low(m.a[i] >> 16, T{});
      c[group + i / 2 * 8][pair + i % 2] = m.c[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[pair + i * 8][group] = low(m.b[i], T{});
      b[pair + i * 8 + 1][group] = low(m.b[i] >> 16, T{});
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) lanes[lane]->c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

inline float tf32(uint32_t bits) {
  bits &= 0xffffe000;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The same for m16n8k8: the hardware reads the upper 19 bits of each operand.
inline void mma_8(emulation::Mma* const* lanes) {
  float a[16][8], b[8][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const emulation::Mma& m = *lanes[lane];
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a[group + i % 2 * 8][member + i / 2 * 4] = tf32(m.a[i]);
      c[group + i / 2 * 8][member * 2 + i % 2] = m.c[i];
    }
    for (int i = 0; i < 2; ++i) b[member + i * 4][group] = tf32(m.b[i]);
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 8; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) lanes[lane]->c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

}  // namespace detail

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMULATION_SITE) {
  emulation::Mma operands{c, a, b, detail::mma_16<T>};
  emulation::collective(emulation::Collective::kMma, ~0u, &operands, EMULATION_HERE);
}

inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             EMULATION_SITE) {
  emulation::Mma operands{c, a, b, detail::mma_8};
  emulation::collective(emulation::Collective::kMma, ~0u, &operands, EMULATION_HERE);
}

// What follows is sm_90's own.
inline void grid_dependency_launch() {}
inline void grid_dependency_wait() { emulation::grid_dependency_wait(); }

// And this is sm_90a's own.
constexpr uint32_t kSwizzle32Bytes = 3;
using TensorMap = emulation::TensorMap;

inline uint32_t shared_address(const void* p) { return emulation::shared_address(p); }

inline void mbarrier_init(uint64_t* barrier, int arrivals, EMULATION_SITE) {
  emulation::mbarrier_init(barrier, arrivals, EMULATION_HERE);
}

inline void fence_mbarrier_init() { emulation::fence_mbarrier_init(); }

inline void mbarrier_arrive(uint64_t* barrier, EMULATION_SITE) {
  emulation::mbarrier_arrive(barrier, EMULATION_HERE);
}

inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes, EMULATION_SITE) {
  emulation::mbarrier_arrive_expect(barrier, bytes, EMULATION_HERE);
}

inline void mbarrier_wait(uint64_t* barrier, int parity, EMULATION_SITE) {
  emulation::mbarrier_wait(barrier, parity, EMULATION_HERE);
}

inline void bulk_copy_5d(void* destination, const TensorMap* map, uint64_t* barrier, int turn,
                         int image, EMULATION_SITE) {
  emulation::bulk_copy(destination, *map, barrier, turn, image, EMULATION_HERE);
}

inline void bulk_copy(void* destination, const void* source, int bytes, uint64_t* barrier,
                      EMULATION_SITE) {
  // A box of one group.
  const TensorMap group{source, size_t(bytes), 1, 1, 1, 1, 1, 1, 1, 1};
  emulation::bulk_copy(destination, group, barrier, 0, 0, EMULATION_HERE);
}

template <int kThreads>
void named_barrier(int barrier, EMULATION_SITE) {
  emulation::named_barrier(barrier, kThreads, EMULATION_HERE);
}

template <int kThreads>
void named_barrier_arrive(int barrier, EMULATION_SITE) {
  emulation::named_barrier_arrive(barrier, kThreads, EMULATION_HERE);
}

inline void fence_proxy_async() { emulation::fence_proxy_async(); }

template <int kRegisters>
void setmaxnreg_dec(EMULATION_SITE) {
  emulation::setmaxnreg(kRegisters, EMULATION_HERE);
}

template <int kRegisters>
void setmaxnreg_inc(EMULATION_SITE) {
  emulation::setmaxnreg(kRegisters, EMULATION_HERE);
}

inline void wgmma_fence() { emulation::wgmma_fence(); }
inline void wgmma_commit() { emulation::wgmma_commit(); }

template <int kPending>
void wgmma_wait() {
  emulation::wgmma_wait(kPending);
}

template <int kPending>
void wgmma_wait_behind(float) {
  emulation::wgmma_wait(kPending);
}

namespace detail {

template <class T>
float widen(uint16_t bits) {
  return low(bits, T{});
}

}  // namespace detail

template <class T, int kColumns>
void wgmma_ss(float (*d)[4], uint64_t a, uint64_t b, bool accumulate, EMULATION_SITE) {
  emulation::wgmma({d[0], nullptr, a, b, kColumns, accumulate, false, detail::widen<T>},
                   EMULATION_HERE);
}

template <class T, int kColumns>
void wgmma_rs(float (*d)[4], const uint32_t (&a)[4], uint64_t b, EMULATION_SITE) {
  emulation::wgmma({d[0], a, 0, b, kColumns, true, true, detail::widen<T>}, EMULATION_HERE);
}

// To the nearest TF32 number, ties away from zero.
inline uint32_t round_to_tf32(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  if ((bits & 0x7f800000) == 0x7f800000) return bits;
  return (bits + 0x1000) & 0xffffe000;
}

inline float exp2_approximate(float value) { return exp2f(value); }

inline uint32_t pack(__nv_bfloat16 low, __nv_bfloat16 high) {
  return low.bits | uint32_t(high.bits) << 16;
}

inline uint32_t pack(__half low, __half high) {
  uint16_t bits[2];
  memcpy(&bits[0], &low, 2);
  memcpy(&bits[1], &high, 2);
  return bits[0] | uint32_t(bits[1]) << 16;
}

}  // namespace ptx

inline cudaError_t encode_tensor_map(ptx::TensorMap* map, const void* data,
                                     const PanelExtents& extents, const PanelStrides& strides,
                                     int box_turns, int box_panels) {
  // What cuTensorMapEncodeTiled refuses.
  if (reinterpret_cast<uintptr_t>(data) % 16 || box_turns < 1 || box_turns > 256 ||
      box_panels < 1 || box_panels > 256)
    return cudaErrorInvalidValue;
  *map = {data,           512,          extents.images, extents.panels, extents.turns,
          extents.groups, strides.step, strides.height, box_turns,      box_panels};
  return cudaSuccess;
}
