// |W_i - eta_i W_partner(i)| v_i on the CPU. The absolute value needs final weights: the softmax's
// statistics come first, in a sweep of their own, unless sci has left them.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "cci.h"

namespace cin_fast {
namespace {

class PairsForward : Pairs {
 public:
  struct Data {
    // x, v, y: elements.
    const void *x, *v;
    void* y;
    // float32 whatever the elements are; null where no gradient will ask for it.
    float* b;
    float *row_argmax, *row_sum;
    // Whether row_argmax and row_sum are known already.
    bool known_weights;
  };
  PairsForward(const Kernels& isa, const Shape& shape, float scale, std::vector<Pair> pairs,
               const float* eta, const Data& data)
      : Pairs(isa, shape, scale, std::move(pairs), eta), data_(data) {}

  void run() {
    const int64_t images = images_under_way(), rows = blocks_.padded();
    Scratch memory(images * rows * (x_slots_ + (data_.b ? 3 : 2) * width_ + 8));
    for (int64_t n = 0; n < images; n++) {
      PairImage image{};
      image.x_columns = memory.take(rows * x_slots_);
      image.v_rows = memory.take(packed_row(rows, width_));
      image.acc = memory.take(rows * width_);
      image.acc2 = data_.b ? memory.take(rows * width_) : nullptr;
      take_statistics(image, memory);
      flight_.push_back(image);
    }
    make_tiles(4);
    for_each_pair([&](const Job& job, const Team& team) {
      for_each_block(job, team, [&](int64_t side, int64_t block) { pack(job, side, block); });
      if (!data_.known_weights) find_weights(job, team);
      for_each_tile_pair(team, blocks_, [&](const TilePair& pair, int64_t thread) {
        tile_pair(job, pair, tiles_[thread]);
      });
      for_each_block(job, team, [&](int64_t side, int64_t block) { finish(job, side, block); });
    });
  }

 private:
  void pack(const Job& job, int64_t side, int64_t block) {
    const PairImage& packed = *job.side[side];
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block);
    const int64_t source = job.index[side] * blocks_.channels + row;
    isa_.pack_columns(isa_.at(data_.x, source * shape_.depth), shape_.depth, rows, shape_.depth,
                      packed.x_columns + row * x_slots_);
    isa_.pack_rows(isa_.at(data_.v, source * shape_.cols), shape_.cols, rows, shape_.cols,
                   packed.v_rows + packed_row(row, width_));
    // cci_weights asks for numbers that only the backward pass has.
    std::fill_n(packed.pivot + row, blocks_.size, 0.0f);
    std::fill_n(packed.delta + row, blocks_.size, 0.0f);
    if (data_.known_weights)
      restore_weights(packed, data_.x, source - row, block, data_.row_argmax, data_.row_sum);
  }

  void find_weights(const Job& job, const Team& team) {
    for (int64_t side = 0; side < job.images; side++)
      for_each_tile_pair(team, blocks_, [&](const TilePair& pair, int64_t thread) {
        statistics(*job.side[side], pair, tiles_[thread]);
      });
    for_each_block(job, team, [&](int64_t side, int64_t block) { shares(job, side, block); });
  }

  void statistics(const PairImage& sums, const TilePair& pair, const Tile& tile) {
    const auto [i, j, new_i, new_j] = pair;
    float* s = tile.t[0];
    const int64_t ld = blocks_.size, row = blocks_.first(i), col = blocks_.first(j);
    const int64_t rows = blocks_.rows(i), cols = blocks_.rows(j);
    gram(sums, i, j, s);
    isa_.scale_and_max(s, rows, cols, ld, scale_, tile.row_max, tile.col_max);
    isa_.merge_max(s, rows, cols, ld, false, tile.row_max, col, new_i, sums.max + row,
                   sums.argmax + row, sums.sum + row, tile.factor);
    isa_.exponentials(s, rows, cols, ld, sums.max + row, nullptr, sums.sum + row, nullptr);
    if (i == j) return;
    isa_.merge_max(s, rows, cols, ld, true, tile.col_max, row, new_j, sums.max + col,
                   sums.argmax + col, sums.sum + col, tile.factor);
    isa_.mirrored_exponentials(s, rows, cols, ld, sums.max + col, nullptr, sums.sum + col, nullptr);
  }

  void shares(const Job& job, int64_t side, int64_t block) {
    const PairImage& sums = *job.side[side];
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block);
    const int64_t target = job.index[side] * blocks_.channels + row;
    reciprocals(sums.sum + row, rows, sums.share + row, sums.share_rest + row);
    std::copy_n(sums.argmax + row, rows, data_.row_argmax + target);
    std::copy_n(sums.sum + row, rows, data_.row_sum + target);
  }

  void tile_pair(const Job& job, const TilePair& pair, const Tile& tile) {
    const auto [i, j, new_i, new_j] = pair;
    float* s[2] = {tile.t[0], tile.t[job.images - 1]};
    for (int64_t n = 0; n < job.images; n++) gram(*job.side[n], i, j, s[n]);
    for (int64_t n = 0; n < job.images; n++) {
      const PairImage &own = *job.side[n], &other = *job.side[1 - n];
      weigh(own, other, s[n], s[1 - n], job.eta[n], i, j, false, new_i, tile);
      if (i != j) weigh(own, other, s[n], s[1 - n], job.eta[n], i, j, true, new_j, tile);
    }
  }

  void weigh(const PairImage& own, const PairImage& other, const float* s, const float* other_s,
             float eta, int64_t i, int64_t j, bool mirrored, bool first, const Tile& tile) {
    const int64_t ld = blocks_.size, row = blocks_.first(i), col = blocks_.first(j);
    const int64_t rows = blocks_.rows(i), cols = blocks_.rows(j);
    float *a = tile.t[2], *b = tile.t[3];
    const int64_t to = mirrored ? col : row, from = mirrored ? row : col;
    isa_.cci_weights(s, other_s, own.stats(to), other.stats(to), mirrored, eta, rows, cols, ld,
                     scale_, a, b);
    const auto multiply = mirrored ? isa_.multiply_transposed : isa_.multiply;
    const int64_t n = mirrored ? cols : rows, depth = mirrored ? rows : cols;
    const int64_t pitch = mirrored ? isa_.pack * ld : ld;
    const float* v_rows = own.v_rows + packed_row(from, width_);
    multiply(a, pitch, v_rows, n, shape_.cols, depth, own.acc + to * width_, width_, !first);
    if (data_.b)
      multiply(b, pitch, v_rows, n, shape_.cols, depth, own.acc2 + to * width_, width_, !first);
  }

  void finish(const Job& job, int64_t side, int64_t block) {
    const PairImage& sums = *job.side[side];
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block);
    const int64_t target = job.index[side] * blocks_.channels + row, cols = shape_.cols;
    isa_.results(sums.acc + row * width_, width_, rows, cols, nullptr,
                 isa_.at(data_.y, target * cols), nullptr);
    if (!data_.b) return;
    for (int64_t r = 0; r < rows; r++)
      std::copy_n(sums.acc2 + (row + r) * width_, cols, data_.b + (target + r) * cols);
  }

  const Data data_;
};

enum class Keep { kValues, kGradients };

// y in x's dtype and b in float32, from row_argmax and row_sum, or with these. b is empty where
// values alone are kept.
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& partner,
                                           const at::Tensor& eta,
                                           const std::optional<at::Tensor>& v, double scale,
                                           at::Tensor& row_argmax, at::Tensor& row_sum,
                                           bool known_weights, Keep keep = Keep::kGradients) {
  const Kernels& isa = kernels_for(x);
  const at::Tensor our_x = elements(isa, x), our_v = v ? elements(isa, *v) : our_x;
  const at::Tensor wide_eta = wide(eta);
  at::Tensor y = at::empty_like(our_v);
  at::Tensor b = keep == Keep::kGradients ? at::empty_like(our_v, our_v.options().dtype(at::kFloat))
                                          : at::empty({0}, at::kFloat);
  const Shape shape{x.size(0), x.size(1), x.size(2), our_v.size(2)};
  const PairsForward::Data data{
      .x = our_x.const_data_ptr(),
      .v = our_v.const_data_ptr(),
      .y = y.mutable_data_ptr(),
      .b = keep == Keep::kGradients ? b.mutable_data_ptr<float>() : nullptr,
      .row_argmax = row_argmax.mutable_data_ptr<float>(),
      .row_sum = row_sum.mutable_data_ptr<float>(),
      .known_weights = known_weights};
  if (x.size(0) > 0)
    PairsForward(isa, shape, static_cast<float>(scale), make_pairs(partner),
                 wide_eta.const_data_ptr<float>(), data)
        .run();
  return {y.to(x.scalar_type()), b};
}

at::Tensor cci_values(const at::Tensor& x, const at::Tensor& partner, const at::Tensor& eta,
                      const std::optional<at::Tensor>& v, double scale) {
  check_pairs("cpu_cci_values", x, partner, eta, v);
  at::Tensor row_argmax = at::empty({x.size(0), x.size(1)}, x.options().dtype(at::kFloat));
  at::Tensor row_sum = at::empty_like(row_argmax);
  return std::get<0>(forward(x, partner, eta, v, scale, row_argmax, row_sum, false, Keep::kValues));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cci(const at::Tensor& x,
                                                               const at::Tensor& partner,
                                                               const at::Tensor& eta,
                                                               const std::optional<at::Tensor>& v,
                                                               double scale) {
  check_pairs("cpu_cci", x, partner, eta, v);
  at::Tensor row_argmax = at::empty({x.size(0), x.size(1)}, x.options().dtype(at::kFloat));
  at::Tensor row_sum = at::empty_like(row_argmax);
  const auto [y, b] = forward(x, partner, eta, v, scale, row_argmax, row_sum, false);
  return {y, b.to(x.scalar_type()), row_argmax, row_sum};
}

std::tuple<at::Tensor, at::Tensor> cci_after_sci(const at::Tensor& x, const at::Tensor& partner,
                                                 const at::Tensor& eta, const at::Tensor& v,
                                                 const at::Tensor& row_argmax,
                                                 const at::Tensor& row_sum, double scale) {
  check_pairs("cpu_cci_after_sci", x, partner, eta, v);
  check_statistics("cpu_cci_after_sci", x, row_argmax, row_sum);
  at::Tensor our_argmax = row_argmax.contiguous(), our_sum = row_sum.contiguous();
  return forward(x, partner, eta, v, scale, our_argmax, our_sum, true);
}

}  // namespace

TORCH_LIBRARY_IMPL(cin_fast, CPU, m) {
  m.impl("cpu_cci", &cci);
  m.impl("cpu_cci_values", &cci_values);
  m.impl("cpu_cci_after_sci", &cci_after_sci);
}

}  // namespace cin_fast
