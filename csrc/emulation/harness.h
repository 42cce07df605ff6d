// What tests/test_cuda_emulation.py calls through ctypes.
#pragma once

extern "C" {
// What went wrong since the last reset; empty if nothing.
const char* emulation_error();
// The kernels launched since the last reset, with spaces between.
const char* emulation_launched();
// Cycles that ldmatrix lost to bank conflicts since the last reset.
long emulation_conflicts();
// order: 0 runs warps and blocks forward, 1 backward, from 2 on it is a seed. shared_limit: the
// most shared memory that a block of this chip may ask for.
void emulation_reset(int order, int shared_limit);
// Global memory that kernels may touch, with `guard` forbidden bytes on either side.
void emulation_buffer(const void* begin, long bytes, long guard);
}

// dtype and float32_products count as in operators.h.
struct EmulationCall {
  int dtype, batch, channels, positions, columns;
  float scale;
  int float32_products, shared_limit, capability, multiprocessors;
};
