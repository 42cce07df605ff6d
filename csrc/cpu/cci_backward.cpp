// The gradient of |W_i - eta_i W_partner(i)| v_i on the CPU, and with it, if asked for, that of
// W_i v_i: both make the same tiles again, and share the product with x.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "cci.h"

namespace cin_fast {
namespace {

class PairsBackward : Pairs {
 public:
  struct Data {
    // Elements. y and b are null where they are too coarse for the row sums of dP P, which then
    // take a sweep of their own.
    const void *dy, *x, *v, *y, *b;
    // Of sci, elements; null where its gradient is not asked for.
    const void *sci_dy, *sci_y;
    const float *row_argmax, *row_sum;
    // Elements; dv is null where v is x.
    void *dv, *dx;
    float* deta;
  };
  PairsBackward(const Kernels& isa, const Shape& shape, float scale, std::vector<Pair> pairs,
                const float* eta, const Data& data)
      : Pairs(isa, shape, scale, std::move(pairs), eta), data_(data) {}

  void run() {
    const int64_t images = images_under_way(), rows = blocks_.padded();
    const int64_t operands = slots_ + width_;
    Scratch memory(images * rows *
                   (x_slots_ + 2 * depth_width_ + operands + 8 + (data_.dv ? operands : 0) +
                    (data_.sci_dy ? operands : 0)));
    for (int64_t n = 0; n < images; n++) {
      PairImage image{};
      image.x_columns = memory.take(rows * x_slots_);
      image.x_rows = memory.take(packed_row(rows, depth_width_));
      image.dy_columns = memory.take(rows * slots_);
      image.dy_rows = memory.take(packed_row(rows, width_));
      image.acc = memory.take(rows * depth_width_);
      image.v_columns = data_.dv ? memory.take(rows * slots_) : image.x_columns;
      image.acc2 = data_.dv ? memory.take(rows * width_) : image.acc;
      if (data_.sci_dy) {
        image.sci_dy_columns = memory.take(rows * slots_);
        image.sci_dy_rows = memory.take(packed_row(rows, width_));
      }
      take_statistics(image, memory);
      flight_.push_back(image);
    }
    make_tiles(2 * tiles_of_image());
    for_each_pair([&](const Job& job, const Team& team) {
      for_each_block(job, team, [&](int64_t side, int64_t block) { pack(job, side, block); });
      for_each_block(job, team, [&](int64_t side, int64_t block) {
        row_sums(job, side, block);
        if (data_.sci_dy) add_sci_sums(job, side, block);
      });
      if (!data_.y)
        for_each_tile_pair(team, blocks_, [&](const TilePair& pair, int64_t thread) {
          gather_delta(job, pair, tiles_[thread]);
        });
      for_each_tile_pair(team, blocks_, [&](const TilePair& pair, int64_t thread) {
        tile_pair(job, pair, tiles_[thread]);
      });
      for_each_block(job, team, [&](int64_t side, int64_t block) { finish(job, side, block); });
      for (int64_t side = 0; side < job.images; side++) finish_eta(job, side);
    });
  }

 private:
  int64_t tiles_of_image() const { return data_.sci_dy ? 5 : 3; }

  void pack(const Job& job, int64_t side, int64_t block) {
    const PairImage& packed = *job.side[side];
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block);
    const int64_t depth = shape_.depth, cols = shape_.cols;
    const int64_t first = job.index[side] * blocks_.channels, source = first + row;
    const void* x = isa_.at(data_.x, source * depth);
    isa_.pack_columns(x, depth, rows, depth, packed.x_columns + row * x_slots_);
    isa_.pack_rows(x, depth, rows, depth, packed.x_rows + packed_row(row, depth_width_));
    const auto pack_gradient = [&](const void* gradient, float* columns, float* by_rows) {
      const void* dy = isa_.at(gradient, source * cols);
      isa_.pack_columns(dy, cols, rows, cols, columns + row * slots_);
      isa_.pack_rows(dy, cols, rows, cols, by_rows + packed_row(row, width_));
    };
    pack_gradient(data_.dy, packed.dy_columns, packed.dy_rows);
    if (data_.sci_dy) pack_gradient(data_.sci_dy, packed.sci_dy_columns, packed.sci_dy_rows);
    if (data_.dv)
      isa_.pack_columns(isa_.at(data_.v, source * cols), cols, rows, cols,
                        packed.v_columns + row * slots_);
    restore_weights(packed, data_.x, first, block, data_.row_argmax, data_.row_sum);
  }

  // Row sums of P dP, as pivot and delta, and of dM P_other:
  // P dP = dY . A - eta_other dY_other . b_other, A = y + eta b; dM P_other = dY . b.
  void row_sums(const Job& job, int64_t side, int64_t block) {
    const PairImage &own = *job.side[side], &other = *job.side[1 - side];
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block), cols = shape_.cols;
    const int64_t first = job.index[side] * blocks_.channels;
    const int64_t other_first = job.index[1 - side] * blocks_.channels;
    float use[kLargestPairBlock] = {}, other_use[kLargestPairBlock] = {};
    signs_at_largest(job, side, block, use, other_use);
    const float *dy = own.dy_columns + row * slots_, *other_dy = other.dy_columns + row * slots_;
    const void *v = isa_.at(data_.v, first * cols), *other_v = isa_.at(data_.v, other_first * cols);
    float other_pivot[kLargestPairBlock];
    isa_.pivots(dy, v, own.argmax + row, use, rows, cols, own.pivot + row);
    isa_.pivots(other_dy, other_v, own.argmax + row, other_use, rows, cols, other_pivot);
    for (int64_t r = 0; r < rows; r++) own.pivot[row + r] -= job.eta[1 - side] * other_pivot[r];
    for (float* array : {own.delta, own.deta}) std::fill_n(array + row, blocks_.size, 0.0f);
    std::fill(own.pivot + row + rows, own.pivot + row + blocks_.size, 0.0f);
    if (!data_.y) return;
    const float *y = static_cast<const float*>(data_.y) + (first + row) * cols,
                *b = static_cast<const float*>(data_.b) + (first + row) * cols,
                *other_b = static_cast<const float*>(data_.b) + (other_first + row) * cols;
    float other_delta[kLargestPairBlock];
    isa_.deltas(dy, static_cast<const float*>(v), y, b, job.eta[side], own.argmax + row, use, rows,
                cols, own.delta + row);
    isa_.deltas(other_dy, static_cast<const float*>(other_v), other_b, nullptr, 0.0f,
                own.argmax + row, other_use, rows, cols, other_delta);
    const float* dy_rows = static_cast<const float*>(data_.dy) + (first + row) * cols;
    for (int64_t r = 0; r < rows; r++) {
      own.delta[row + r] -= job.eta[1 - side] * other_delta[r];
      double sum = 0;
      for (int64_t k = r * cols; k < (r + 1) * cols; k++)
        sum += static_cast<double>(dy_rows[k]) * b[k];
      own.deta[row + r] = static_cast<float>(sum);
    }
    std::fill(own.delta + row + rows, own.delta + row + blocks_.size, 0.0f);
  }

  // Adds sci's share of P dP, dY . Y.
  void add_sci_sums(const Job& job, int64_t side, int64_t block) {
    const PairImage& own = *job.side[side];
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block), cols = shape_.cols;
    const int64_t first = job.index[side] * blocks_.channels;
    float use[kLargestPairBlock], sum[kLargestPairBlock];
    for (int64_t r = 0; r < blocks_.size; r++) use[r] = own.share[row + r] > 0.5f ? 1.0f : 0.0f;
    const float *dy = own.sci_dy_columns + row * slots_, *argmax = own.argmax + row;
    const void* v = isa_.at(data_.v, first * cols);
    isa_.pivots(dy, v, argmax, use, rows, cols, sum);
    for (int64_t r = 0; r < rows; r++) own.pivot[row + r] += sum[r];
    if (!data_.sci_y) return;
    isa_.deltas(dy, static_cast<const float*>(v),
                static_cast<const float*>(data_.sci_y) + (first + row) * cols, nullptr, 0.0f,
                argmax, use, rows, cols, sum);
    for (int64_t r = 0; r < rows; r++) own.delta[row + r] += sum[r];
  }

  // sign(M) of both directions where a row's largest weight stands; 0 if that is no more than 1/2.
  void signs_at_largest(const Job& job, int64_t side, int64_t block, float* use,
                        float* other_use) const {
    const PairImage &own = *job.side[side], &other = *job.side[1 - side];
    const int64_t row = blocks_.first(block), depth = shape_.depth;
    const void* other_x = isa_.at(data_.x, job.index[1 - side] * blocks_.channels * depth);
    const auto sign = [](float m) { return static_cast<float>((m > 0) - (m < 0)); };
    float logit[kLargestPairBlock];
    isa_.max_logits(other.x_columns + row * x_slots_, other_x, own.argmax + row,
                    blocks_.rows(block), depth, scale_, logit);
    for (int64_t r = 0; r < blocks_.rows(block); r++) {
      const float weight = own.share[row + r];
      if (!(weight > 0.5f)) continue;
      const float other_weight = std::exp(logit[r] - other.max[row + r]) * other.share[row + r];
      use[r] = sign(weight - job.eta[side] * other_weight);
      other_use[r] = sign(other_weight - job.eta[1 - side] * weight);
    }
  }

  PairSide side(const Job& job, int64_t n, int64_t i, int64_t j, const Tile& tile) {
    const PairImage& packed = *job.side[n];
    const int64_t ld = blocks_.size, row = blocks_.first(i), col = blocks_.first(j);
    const int64_t rows = blocks_.rows(i), cols = blocks_.rows(j);
    float* const* t = tile.t + tiles_of_image() * (job.images - 1) * n;
    float* col_delta = i == j ? nullptr : packed.delta + col;
    PairSide side{t[0],
                  t[1],
                  t[2],
                  packed.stats(row),
                  packed.stats(col),
                  job.eta[n],
                  packed.delta + row,
                  col_delta,
                  packed.deta + row,
                  data_.sci_dy ? t[3] : nullptr,
                  data_.sci_dy ? t[4] : nullptr};
    if (n < job.images) {
      for (const int64_t first : {row, col}) {
        prefetch(packed.x_rows + packed_row(first, depth_width_), packed_row(rows, depth_width_));
        prefetch(packed.acc + first * depth_width_, rows * depth_width_);
      }
      gram(packed, i, j, side.s);
      const auto product = [&](const float* a, const float* b, float* c) {
        isa_.gram(a + row * slots_, b + col * slots_, rows, cols, shape_.cols, c, ld);
      };
      product(packed.dy_columns, packed.v_columns, side.e);
      product(packed.v_columns, packed.dy_columns, side.f);
      if (data_.sci_dy) {
        product(packed.sci_dy_columns, packed.v_columns, side.sci_e);
        product(packed.v_columns, packed.sci_dy_columns, side.sci_f);
      }
    }
    return side;
  }

  void gather_delta(const Job& job, const TilePair& pair, const Tile& tile) {
    const PairSide a = side(job, 0, pair.i, pair.j, tile), b = side(job, 1, pair.i, pair.j, tile);
    isa_.cci_delta(a, b, blocks_.rows(pair.i), blocks_.rows(pair.j), blocks_.size, scale_);
  }

  void tile_pair(const Job& job, const TilePair& pair, const Tile& tile) {
    const PairSide sides[2] = {side(job, 0, pair.i, pair.j, tile),
                               side(job, 1, pair.i, pair.j, tile)};
    isa_.cci_gradient(sides[0], sides[1], blocks_.rows(pair.i), blocks_.rows(pair.j), blocks_.size,
                      scale_);
    for (int64_t n = 0; n < job.images; n++) add_products(*job.side[n], sides[n], pair);
  }

  void add_products(const PairImage& packed, const PairSide& side, const TilePair& pair) {
    const auto [i, j, new_i, new_j] = pair;
    const int64_t ld = blocks_.size, row = blocks_.first(i), col = blocks_.first(j);
    const int64_t rows = blocks_.rows(i), cols = blocks_.rows(j);
    const int64_t depth = shape_.depth, k = shape_.cols;
    const auto x_rows = [&](int64_t r) { return packed.x_rows + packed_row(r, depth_width_); };
    const auto by_rows = [&](const float* dy, int64_t r) { return dy + packed_row(r, width_); };
    isa_.multiply(side.s, ld, x_rows(col), rows, depth, cols, packed.acc + row * depth_width_,
                  depth_width_, !new_i);
    isa_.multiply(side.f, ld, by_rows(packed.dy_rows, col), rows, k, cols,
                  packed.acc2 + row * width_, width_, !new_i || !data_.dv);
    if (data_.sci_dy)
      isa_.multiply(side.sci_f, ld, by_rows(packed.sci_dy_rows, col), rows, k, cols,
                    packed.acc2 + row * width_, width_, true);
    if (i == j) return;
    isa_.multiply_transposed(isa_.across(side.s, side.e, ld), isa_.pack * ld, x_rows(row), cols,
                             depth, rows, packed.acc + col * depth_width_, depth_width_, !new_j);
    isa_.multiply_transposed(side.e, isa_.pack * ld, by_rows(packed.dy_rows, row), cols, k, rows,
                             packed.acc2 + col * width_, width_, !new_j || !data_.dv);
    if (data_.sci_dy)
      isa_.multiply_transposed(side.sci_e, isa_.pack * ld, by_rows(packed.sci_dy_rows, row), cols,
                               k, rows, packed.acc2 + col * width_, width_, true);
  }

  void finish(const Job& job, int64_t side, int64_t block) {
    const PairImage& sums = *job.side[side];
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block);
    const int64_t target = job.index[side] * blocks_.channels + row;
    isa_.results(sums.acc + row * depth_width_, depth_width_, rows, shape_.depth, nullptr,
                 isa_.at(data_.dx, target * shape_.depth), nullptr);
    if (data_.dv)
      isa_.results(sums.acc2 + row * width_, width_, rows, shape_.cols, nullptr,
                   isa_.at(data_.dv, target * shape_.cols), nullptr);
  }

  void finish_eta(const Job& job, int64_t side) {
    double sum = 0;
    for (int64_t r = 0; r < blocks_.channels; r++) sum += job.side[side]->deta[r];
    data_.deta[job.index[side]] = static_cast<float>(-sum);
  }

  const Data data_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> cci_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& partner, const at::Tensor& eta,
    const std::optional<at::Tensor>& v, const at::Tensor& y, const at::Tensor& b,
    const at::Tensor& row_argmax, const at::Tensor& row_sum, double scale) {
  check_pairs("cpu_cci_backward", x, partner, eta, v);
  check_shape("cpu_cci_backward", "dy", dy, v ? v->sizes() : x.sizes());
  check_shape("cpu_cci_backward", "y", y, dy.sizes());
  check_shape("cpu_cci_backward", "b", b, dy.sizes());
  check_statistics("cpu_cci_backward", x, row_argmax, row_sum);
  const Kernels& isa = kernels_for(x);
  const at::Tensor our_x = elements(isa, x), our_v = v ? elements(isa, *v) : our_x;
  const at::Tensor our_dy = elements(isa, dy), wide_eta = wide(eta);
  const at::Tensor our_y = is_coarse(x) ? y : elements(isa, y);
  const at::Tensor our_b = is_coarse(x) ? b : elements(isa, b);
  const at::Tensor our_argmax = row_argmax.contiguous(), our_sum = row_sum.contiguous();
  at::Tensor dx = at::empty_like(our_x);
  at::Tensor dv = v ? at::empty_like(our_v) : at::empty({0}, our_x.options());
  at::Tensor deta = at::empty_like(wide_eta);
  const Shape shape{x.size(0), x.size(1), x.size(2), our_v.size(2)};
  const PairsBackward::Data data{.dy = our_dy.const_data_ptr(),
                                 .x = our_x.const_data_ptr(),
                                 .v = our_v.const_data_ptr(),
                                 .y = is_coarse(x) ? nullptr : our_y.const_data_ptr(),
                                 .b = is_coarse(x) ? nullptr : our_b.const_data_ptr(),
                                 .sci_dy = nullptr,
                                 .sci_y = nullptr,
                                 .row_argmax = our_argmax.const_data_ptr<float>(),
                                 .row_sum = our_sum.const_data_ptr<float>(),
                                 .dv = v ? dv.mutable_data_ptr() : nullptr,
                                 .dx = dx.mutable_data_ptr(),
                                 .deta = deta.mutable_data_ptr<float>()};
  if (x.size(0) > 0)
    PairsBackward(isa, shape, static_cast<float>(scale), make_pairs(partner),
                  wide_eta.const_data_ptr<float>(), data)
        .run();
  return {dx.to(x.scalar_type()), deta, dv.to(x.scalar_type())};
}

// Of sci and cci together: dy and y are sci's, eta is given, and so is its part in dy.
std::tuple<at::Tensor, at::Tensor> pair_sweep(const at::Tensor& dy, const at::Tensor& dy_pair,
                                              const at::Tensor& x, const at::Tensor& partner,
                                              const at::Tensor& eta, const at::Tensor& v,
                                              const at::Tensor& y, const at::Tensor& y_pair,
                                              const at::Tensor& b, const at::Tensor& row_argmax,
                                              const at::Tensor& row_sum, double scale) {
  check_pairs("cpu_pair_sweep", x, partner, eta, v);
  for (const auto& [name, t] :
       {std::pair{"dy", &dy}, {"dy_pair", &dy_pair}, {"y", &y}, {"y_pair", &y_pair}, {"b", &b}})
    check_shape("cpu_pair_sweep", name, *t, v.sizes());
  check_statistics("cpu_pair_sweep", x, row_argmax, row_sum);
  const Kernels& isa = kernels_for(x);
  const bool coarse = is_coarse(x);
  const at::Tensor our_x = elements(isa, x), our_v = elements(isa, v);
  const at::Tensor our_dy = elements(isa, dy), our_dy_pair = elements(isa, dy_pair);
  const at::Tensor our_y = elements(isa, y), our_y_pair = elements(isa, y_pair), our_b = wide(b);
  const at::Tensor our_argmax = row_argmax.contiguous(), our_sum = row_sum.contiguous();
  const at::Tensor wide_eta = wide(eta);
  at::Tensor dx = at::empty_like(our_x), dv = at::empty_like(our_v),
             deta = at::empty_like(wide_eta);
  const Shape shape{x.size(0), x.size(1), x.size(2), v.size(2)};
  const PairsBackward::Data data{.dy = our_dy_pair.const_data_ptr(),
                                 .x = our_x.const_data_ptr(),
                                 .v = our_v.const_data_ptr(),
                                 .y = coarse ? nullptr : our_y_pair.const_data_ptr(),
                                 .b = coarse ? nullptr : our_b.const_data_ptr(),
                                 .sci_dy = our_dy.const_data_ptr(),
                                 .sci_y = coarse ? nullptr : our_y.const_data_ptr(),
                                 .row_argmax = our_argmax.const_data_ptr<float>(),
                                 .row_sum = our_sum.const_data_ptr<float>(),
                                 .dv = dv.mutable_data_ptr(),
                                 .dx = dx.mutable_data_ptr(),
                                 .deta = deta.mutable_data_ptr<float>()};
  if (x.size(0) > 0)
    PairsBackward(isa, shape, static_cast<float>(scale), make_pairs(partner),
                  wide_eta.const_data_ptr<float>(), data)
        .run();
  return {dx.to(x.scalar_type()), dv.to(x.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(cin_fast, CPU, m) {
  m.impl("cpu_cci_backward", &cci_backward);
  m.impl("cpu_pair_sweep", &pair_sweep);
}

}  // namespace cin_fast
