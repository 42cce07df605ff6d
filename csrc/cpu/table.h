// The kernels of one instruction set, by name.

#pragma once

#include "pairs.h"
#include "rows.h"
#include "thin.h"
#include "tile.h"

namespace cin_fast::CIN_FAST_ISA {

constexpr Kernels kTable = {
    .width = kWidth,
    .pack = kPack,
    .pack_columns = pack_columns,
    .pack_rows = pack_rows,
    .gram = gram,
    .multiply = multiply<false>,
    .multiply_transposed = multiply<true>,
    .scale_and_max = scale_and_max,
    .merge_max = merge_max,
    .rescale = rescale,
    .exponentials = exponentials,
    .mirrored_exponentials = mirrored_exponentials,
    .results = results,
    .max_logits = max_logits,
    .pivots = pivots,
    .deltas = deltas,
    .sci_delta = sci_delta,
    .sci_gradient = sci_gradient,
    .cci_weights = cci_weights,
    .cci_delta = cci_delta,
    .cci_gradient = cci_gradient,
    .thin_forward = thin_forward,
    .thin_input = thin_input,
    .thin_weight = thin_weight,
};

}  // namespace cin_fast::CIN_FAST_ISA
