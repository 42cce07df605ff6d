// |W_i - eta_i W_partner(i)| v_i and its gradient on the CPU.
//
// A job is a pair of images, or one image that is its own partner. Each tile of an image's x x^T is
// computed once and serves four times: in both directions of the pair, and for row blocks I and J.
// Legend as in sci.cpp; for an image, `other` is its partner.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "blocks.h"
#include "kernels.h"
#include "tensors.h"

namespace cin_fast {
namespace {

// Two images' tiles fill the cache sooner than one's.
constexpr int64_t kLargestPairBlock = 128;

struct Pair {
  int64_t a, b;
  int64_t images() const { return a == b ? 1 : 2; }
};

std::vector<Pair> make_pairs(const at::Tensor& partner) {
  const at::Tensor contiguous = partner.contiguous();
  const int64_t* of = contiguous.const_data_ptr<int64_t>();
  const int64_t n = contiguous.numel();
  std::vector<Pair> pairs;
  for (int64_t i = 0; i < n; i++) {
    TORCH_CHECK(of[i] >= 0 && of[i] < n && of[of[i]] == i,
                "partner: expected an involution, found ", of[i], " at ", i);
    if (i <= of[i]) pairs.push_back({i, of[i]});
  }
  return pairs;
}

struct Shape {
  int64_t images, channels, depth, cols;
};

struct PairImage {
  float *x_columns, *x_rows;
  float *v_columns, *v_rows;
  float *dy_columns, *dy_rows;
  // Forward: y and b in the making. Backward: dx and dv.
  float *acc, *acc2;
  float *max, *argmax, *sum, *share, *share_rest, *pivot, *delta, *deta;

  RowStats stats(int64_t row) const {
    return {max + row, share + row, share_rest + row, pivot + row, delta + row};
  }
};

// A pair under way: its two images, which are one and the same if an image is its own partner.
struct Job {
  int64_t images;
  const PairImage* side[2];
  // In the batch.
  int64_t index[2];
  float eta[2];
};

class Pairs {
 public:
  Pairs(const Shape& shape, float scale, std::vector<Pair> pairs, const float* eta)
      : isa_(kernels()),
        shape_(shape),
        depth_width_(padded_width(isa_.width, shape.depth)),
        width_(padded_width(isa_.width, shape.cols)),
        scale_(scale),
        eta_(eta),
        pairs_(std::move(pairs)),
        blocks_(
            make_blocks(static_cast<int64_t>(pairs_.size()), shape.channels, kLargestPairBlock)) {}

 protected:
  struct Tile {
    float* t[6];
    float *row_max, *col_max, *factor;
  };

  int64_t images_under_way() const {
    return 2 * images_in_flight(static_cast<int64_t>(pairs_.size()));
  }

  void make_tiles() {
    const int64_t threads = at::get_num_threads(), size = blocks_.size;
    tile_memory_.emplace(threads * (6 * size * size + 3 * size));
    for (int64_t n = 0; n < threads; n++) {
      Tile tile;
      for (float*& t : tile.t) t = tile_memory_->take(size * size);
      tile.row_max = tile_memory_->take(size);
      tile.col_max = tile_memory_->take(size);
      tile.factor = tile_memory_->take(size);
      tiles_.push_back(tile);
    }
  }

  void take_statistics(PairImage& image, Scratch& memory) const {
    for (float** array : {&image.max, &image.argmax, &image.sum, &image.share, &image.share_rest,
                          &image.pivot, &image.delta, &image.deta})
      *array = memory.take(blocks_.padded());
  }

  // run(job, team) for each pair.
  template <typename Run>
  void for_each_pair(Run run) {
    for_each_image(static_cast<int64_t>(pairs_.size()), [&](int64_t n, const Team& team) {
      const auto [a, b] = pairs_[n];
      const int64_t images = pairs_[n].images();
      const PairImage* first = &flight_[2 * team.thread];
      run(Job{images, {first, first + images - 1}, {a, b}, {eta_[a], eta_[b]}}, team);
    });
  }

  // run(side, block) for each row block of a job's images.
  template <typename Run>
  void for_each_block(const Job& job, const Team& team, Run run) const {
    team.for_each_task(job.images * blocks_.count, [&](int64_t task, int64_t) {
      run(task / blocks_.count, task % blocks_.count);
    });
  }

  void gram(const PairImage& image, int64_t i, int64_t j, float* s) const {
    isa_.gram(image.x_columns + blocks_.first(i) * shape_.depth,
              image.x_columns + blocks_.first(j) * shape_.depth, blocks_.rows(i), blocks_.rows(j),
              shape_.depth, s, blocks_.size);
  }

  const Kernels& isa_;
  const Shape shape_;
  const int64_t depth_width_, width_;
  const float scale_;
  const float* eta_;
  const std::vector<Pair> pairs_;
  const Blocks blocks_;
  std::vector<PairImage> flight_;
  std::vector<Tile> tiles_;
  std::optional<Scratch> tile_memory_;
};

class PairsForward : Pairs {
 public:
  struct Data {
    const float *x, *v;
    float *y, *b, *row_argmax, *row_sum;
  };
  PairsForward(const Shape& shape, float scale, std::vector<Pair> pairs, const float* eta,
               const Data& data)
      : Pairs(shape, scale, std::move(pairs), eta), data_(data) {}

  void run() {
    const int64_t images = images_under_way(), rows = blocks_.padded();
    Scratch memory(images * rows * (shape_.depth + 3 * width_ + 8));
    for (int64_t n = 0; n < images; n++) {
      PairImage image{};
      image.x_columns = memory.take(rows * shape_.depth);
      image.v_rows = memory.take(rows * width_);
      image.acc = memory.take(rows * width_);
      image.acc2 = memory.take(rows * width_);
      take_statistics(image, memory);
      flight_.push_back(image);
    }
    make_tiles();
    for_each_pair([&](const Job& job, const Team& team) {
      for_each_block(job, team, [&](int64_t side, int64_t block) { pack(job, side, block); });
      for (int64_t side = 0; side < job.images; side++)
        for_each_tile_pair(team, blocks_, [&](const TilePair& pair, int64_t thread) {
          statistics(*job.side[side], pair, tiles_[thread]);
        });
      for_each_block(job, team, [&](int64_t side, int64_t block) { shares(job, side, block); });
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
    isa_.pack_columns(data_.x + source * shape_.depth, shape_.depth, rows, shape_.depth,
                      packed.x_columns + row * shape_.depth);
    isa_.pack_rows(data_.v + source * shape_.cols, shape_.cols, rows, shape_.cols,
                   packed.v_rows + row * width_);
    // cci_weights asks for numbers that only the backward pass has.
    std::fill_n(packed.pivot + row, blocks_.size, 0.0f);
    std::fill_n(packed.delta + row, blocks_.size, 0.0f);
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
    isa_.exponentials(s, rows, cols, ld, sums.max + row, nullptr, sums.sum + row);
    if (i == j) return;
    isa_.merge_max(s, rows, cols, ld, true, tile.col_max, row, new_j, sums.max + col,
                   sums.argmax + col, sums.sum + col, tile.factor);
    isa_.mirrored_exponentials(s, rows, cols, ld, sums.max + col, nullptr, sums.sum + col);
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
    multiply(a, ld, own.v_rows + from * width_, n, shape_.cols, depth, own.acc + to * width_,
             width_, !first);
    multiply(b, ld, own.v_rows + from * width_, n, shape_.cols, depth, own.acc2 + to * width_,
             width_, !first);
  }

  void finish(const Job& job, int64_t side, int64_t block) {
    const PairImage& sums = *job.side[side];
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block);
    for (int64_t r = row; r < row + rows; r++) {
      const int64_t target = (job.index[side] * blocks_.channels + r) * shape_.cols;
      std::copy_n(sums.acc + r * width_, shape_.cols, data_.y + target);
      std::copy_n(sums.acc2 + r * width_, shape_.cols, data_.b + target);
    }
  }

  const Data data_;
};

class PairsBackward : Pairs {
 public:
  struct Data {
    const float *dy, *x, *v, *y, *b, *row_argmax, *row_sum;
    // Whether y and b are too coarse for the row sums of dP P (16 bits are), which then take a
    // sweep of their own.
    bool coarse;
    // Null where v is x.
    float* dv;
    float *dx, *deta;
  };
  PairsBackward(const Shape& shape, float scale, std::vector<Pair> pairs, const float* eta,
                const Data& data)
      : Pairs(shape, scale, std::move(pairs), eta), data_(data) {}

  void run() {
    const int64_t images = images_under_way(), rows = blocks_.padded();
    const int64_t depth = shape_.depth, cols = shape_.cols;
    Scratch memory(images * rows * (depth + 2 * depth_width_ + cols + width_ + 8) +
                   (data_.dv ? images * rows * (cols + width_) : 0));
    for (int64_t n = 0; n < images; n++) {
      PairImage image{};
      image.x_columns = memory.take(rows * depth);
      image.x_rows = memory.take(rows * depth_width_);
      image.dy_columns = memory.take(rows * cols);
      image.dy_rows = memory.take(rows * width_);
      image.acc = memory.take(rows * depth_width_);
      image.v_columns = data_.dv ? memory.take(rows * cols) : image.x_columns;
      image.acc2 = data_.dv ? memory.take(rows * width_) : image.acc;
      take_statistics(image, memory);
      flight_.push_back(image);
    }
    make_tiles();
    for_each_pair([&](const Job& job, const Team& team) {
      for_each_block(job, team, [&](int64_t side, int64_t block) { pack(job, side, block); });
      for_each_block(job, team, [&](int64_t side, int64_t block) { row_sums(job, side, block); });
      if (data_.coarse)
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
  void pack(const Job& job, int64_t side, int64_t block) {
    const PairImage& packed = *job.side[side];
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block);
    const int64_t depth = shape_.depth, cols = shape_.cols;
    const int64_t first = job.index[side] * blocks_.channels, source = first + row;
    isa_.pack_columns(data_.x + source * depth, depth, rows, depth, packed.x_columns + row * depth);
    isa_.pack_rows(data_.x + source * depth, depth, rows, depth,
                   packed.x_rows + row * depth_width_);
    isa_.pack_columns(data_.dy + source * cols, cols, rows, cols, packed.dy_columns + row * cols);
    isa_.pack_rows(data_.dy + source * cols, cols, rows, cols, packed.dy_rows + row * width_);
    if (data_.dv)
      isa_.pack_columns(data_.v + source * cols, cols, rows, cols, packed.v_columns + row * cols);
    for (float* array : {packed.argmax, packed.share, packed.share_rest})
      std::fill_n(array + row, blocks_.size, 0.0f);
    std::copy_n(data_.row_argmax + source, rows, packed.argmax + row);
    reciprocals(data_.row_sum + source, rows, packed.share + row, packed.share_rest + row);
    isa_.max_logits(packed.x_columns + row * depth, data_.x + first * depth, packed.argmax + row,
                    rows, depth, scale_, packed.max + row);
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
    isa_.pivots(own.dy_columns + row * cols, data_.v + first * cols, data_.y + (first + row) * cols,
                data_.b + (first + row) * cols, job.eta[side], own.argmax + row, use, rows, cols,
                own.pivot + row, own.delta + row);
    float pivot[kLargestPairBlock], delta[kLargestPairBlock];
    isa_.pivots(other.dy_columns + row * cols, data_.v + other_first * cols,
                data_.b + (other_first + row) * cols, nullptr, 0.0f, own.argmax + row, other_use,
                rows, cols, pivot, delta);
    for (int64_t r = 0; r < rows; r++) {
      own.pivot[row + r] -= job.eta[1 - side] * pivot[r];
      own.delta[row + r] -= job.eta[1 - side] * delta[r];
      const float *dy = data_.dy + (first + row + r) * cols,
                  *b = data_.b + (first + row + r) * cols;
      double sum = 0;
      for (int64_t k = 0; k < cols; k++) sum += static_cast<double>(dy[k]) * b[k];
      own.deta[row + r] = static_cast<float>(sum);
    }
    for (float* array : {own.pivot, own.delta, own.deta})
      std::fill(array + row + rows, array + row + blocks_.size, 0.0f);
    if (data_.coarse) {
      std::fill_n(own.delta + row, rows, 0.0f);
      std::fill_n(own.deta + row, rows, 0.0f);
    }
  }

  // sign(M) of both directions where a row's largest weight stands; 0 if that is no more than 1/2.
  void signs_at_largest(const Job& job, int64_t side, int64_t block, float* use,
                        float* other_use) const {
    const PairImage &own = *job.side[side], &other = *job.side[1 - side];
    const int64_t row = blocks_.first(block), depth = shape_.depth;
    const float* other_x = data_.x + job.index[1 - side] * blocks_.channels * depth;
    const auto sign = [](float m) { return static_cast<float>((m > 0) - (m < 0)); };
    float logit[kLargestPairBlock];
    isa_.max_logits(other.x_columns + row * depth, other_x, own.argmax + row, blocks_.rows(block),
                    depth, scale_, logit);
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
    const int64_t rows = blocks_.rows(i), cols = blocks_.rows(j), k = shape_.cols;
    const int64_t at = 3 * (job.images - 1) * n;
    PairSide side{tile.t[at],         tile.t[at + 1],
                  tile.t[at + 2],     packed.stats(row),
                  packed.stats(col),  job.eta[n],
                  packed.delta + row, i == j ? nullptr : packed.delta + col,
                  packed.deta + row};
    if (n < job.images) {
      for (const int64_t first : {row, col})
        for (const float* wanted : {packed.x_rows, packed.acc})
          prefetch(wanted + first * depth_width_, rows * depth_width_);
      gram(packed, i, j, side.s);
      isa_.gram(packed.dy_columns + row * k, packed.v_columns + col * k, rows, cols, k, side.e, ld);
      isa_.gram(packed.v_columns + row * k, packed.dy_columns + col * k, rows, cols, k, side.f, ld);
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
    isa_.multiply(side.s, ld, packed.x_rows + col * depth_width_, rows, depth, cols,
                  packed.acc + row * depth_width_, depth_width_, !new_i);
    isa_.multiply(side.f, ld, packed.dy_rows + col * width_, rows, k, cols,
                  packed.acc2 + row * width_, width_, !new_i || !data_.dv);
    if (i == j) return;
    isa_.multiply_transposed(side.s, ld, packed.x_rows + row * depth_width_, cols, depth, rows,
                             packed.acc + col * depth_width_, depth_width_, !new_j);
    isa_.multiply_transposed(side.e, ld, packed.dy_rows + row * width_, cols, k, rows,
                             packed.acc2 + col * width_, width_, !new_j || !data_.dv);
  }

  void finish(const Job& job, int64_t side, int64_t block) {
    const PairImage& sums = *job.side[side];
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block);
    for (int64_t r = row; r < row + rows; r++) {
      const int64_t target = job.index[side] * blocks_.channels + r;
      std::copy_n(sums.acc + r * depth_width_, shape_.depth, data_.dx + target * shape_.depth);
      if (data_.dv)
        std::copy_n(sums.acc2 + r * width_, shape_.cols, data_.dv + target * shape_.cols);
    }
  }

  void finish_eta(const Job& job, int64_t side) {
    double sum = 0;
    for (int64_t r = 0; r < blocks_.channels; r++) sum += job.side[side]->deta[r];
    data_.deta[job.index[side]] = static_cast<float>(-sum);
  }

  const Data data_;
};

void check(const char* name, const at::Tensor& x, const at::Tensor& partner, const at::Tensor& eta,
           const std::optional<at::Tensor>& v) {
  check_features(name, x, v);
  TORCH_CHECK(partner.scalar_type() == at::kLong, name, ": partner: expected int64, found ",
              partner.scalar_type());
  check_shape(name, "partner", partner, x.sizes().slice(0, 1));
  check_shape(name, "eta", eta, partner.sizes());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> cci(const at::Tensor& x,
                                                               const at::Tensor& partner,
                                                               const at::Tensor& eta,
                                                               const std::optional<at::Tensor>& v,
                                                               double scale) {
  check("cpu_cci", x, partner, eta, v);
  const at::Tensor wide_x = wide(x), wide_v = v ? wide(*v) : wide_x, wide_eta = wide(eta);
  at::Tensor y = at::empty_like(wide_v), b = at::empty_like(wide_v);
  at::Tensor row_argmax = at::empty({x.size(0), x.size(1)}, wide_x.options());
  at::Tensor row_sum = at::empty_like(row_argmax);
  const Shape shape{x.size(0), x.size(1), x.size(2), wide_v.size(2)};
  const PairsForward::Data data{
      wide_x.const_data_ptr<float>(),       wide_v.const_data_ptr<float>(),
      y.mutable_data_ptr<float>(),          b.mutable_data_ptr<float>(),
      row_argmax.mutable_data_ptr<float>(), row_sum.mutable_data_ptr<float>()};
  if (x.size(0) > 0)
    PairsForward(shape, static_cast<float>(scale), make_pairs(partner),
                 wide_eta.const_data_ptr<float>(), data)
        .run();
  return {y.to(x.scalar_type()), b.to(x.scalar_type()), row_argmax, row_sum};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cci_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& partner, const at::Tensor& eta,
    const std::optional<at::Tensor>& v, const at::Tensor& y, const at::Tensor& b,
    const at::Tensor& row_argmax, const at::Tensor& row_sum, double scale) {
  check("cpu_cci_backward", x, partner, eta, v);
  const at::IntArrayRef rows = x.sizes().slice(0, 2);
  check_shape("cpu_cci_backward", "dy", dy, v ? v->sizes() : x.sizes());
  check_shape("cpu_cci_backward", "y", y, dy.sizes());
  check_shape("cpu_cci_backward", "b", b, dy.sizes());
  check_shape("cpu_cci_backward", "row_max", row_argmax, rows);
  check_shape("cpu_cci_backward", "row_sum", row_sum, rows);
  const at::Tensor wide_x = wide(x), wide_dy = wide(dy), wide_eta = wide(eta);
  const at::Tensor wide_v = v ? wide(*v) : wide_x, wide_y = wide(y), wide_b = wide(b);
  at::Tensor dx = at::empty_like(wide_x);
  at::Tensor dv = v ? at::empty_like(wide_v) : at::empty({0}, wide_x.options());
  at::Tensor deta = at::empty_like(wide_eta);
  const Shape shape{x.size(0), x.size(1), x.size(2), wide_v.size(2)};
  const PairsBackward::Data data{wide_dy.const_data_ptr<float>(),
                                 wide_x.const_data_ptr<float>(),
                                 wide_v.const_data_ptr<float>(),
                                 wide_y.const_data_ptr<float>(),
                                 wide_b.const_data_ptr<float>(),
                                 row_argmax.const_data_ptr<float>(),
                                 row_sum.const_data_ptr<float>(),
                                 x.scalar_type() != at::kFloat || x.size(1) <= kExactChannels,
                                 v ? dv.mutable_data_ptr<float>() : nullptr,
                                 dx.mutable_data_ptr<float>(),
                                 deta.mutable_data_ptr<float>()};
  if (x.size(0) > 0)
    PairsBackward(shape, static_cast<float>(scale), make_pairs(partner),
                  wide_eta.const_data_ptr<float>(), data)
        .run();
  return {dx.to(x.scalar_type()), deta, dv.to(x.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(cin_fast, CPU, m) {
  m.impl("cpu_cci", &cci);
  m.impl("cpu_cci_backward", &cci_backward);
}

}  // namespace cin_fast
