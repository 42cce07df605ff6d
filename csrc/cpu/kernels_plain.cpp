// The kernels for any processor.

#include <cstdint>
#include <cstring>

#include "kernels.h"

#define CIN_FAST_ISA plain
#include "vec_plain.h"
// Over that vector:
#include "operand_float.h"
// Every kernel is written once, over both.
#include "table.h"

namespace cin_fast {
const Kernels& plain_kernels() { return plain::kTable; }
}  // namespace cin_fast
