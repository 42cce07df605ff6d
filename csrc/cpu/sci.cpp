// softmax(scale x x^T) v and its gradient on the CPU.
//
// G = x x^T is symmetric, so the tile where row blocks I and J meet serves both: its rows give the
// weights P_IJ, its columns those of P_JI, each with its own maximum and sum. A tile pair costs 3
// products forward instead of 4, and 7 backward instead of 10. Shapes: B images, C channels, L
// positions, K columns of v; T rows a block.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sub.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "blocks.h"
#include "kernels.h"
#include "tensors.h"

namespace cin_fast {
namespace {

// One image of the forward pass: packed operands, and sums in the making. All are arrays of row
// blocks.
struct ForwardImage {
  float* x_columns;
  float* v_rows;
  float* acc;
  float* max;
  float* argmax;
  float* sum;
  // Of the weights as they are multiplied, in 16 bits: what acc is divided by. The same as sum
  // where they are not rounded.
  float* rounded_sum;
};

class Forward {
 public:
  // x, v, y and y_rest hold elements of isa; y_rest may be null.
  Forward(const Kernels& isa, const at::Tensor& x, const at::Tensor& v, float scale, at::Tensor& y,
          void* y_rest, at::Tensor& row_argmax, at::Tensor& row_sum)
      : isa_(isa),
        images_(x.size(0)),
        depth_(x.size(2)),
        slots_(isa.slots(depth_)),
        cols_(v.size(2)),
        width_(padded_width(isa_.width, cols_)),
        scale_(scale),
        blocks_(make_blocks(images_, x.size(1))),
        x_(x.const_data_ptr()),
        v_(v.const_data_ptr()),
        y_(y.mutable_data_ptr()),
        y_rest_(y_rest),
        row_argmax_(row_argmax.mutable_data_ptr<float>()),
        row_sum_(row_sum.mutable_data_ptr<float>()) {}

  void run() {
    const int64_t flights = images_in_flight(images_);
    const int64_t rows = blocks_.padded(), size = blocks_.size;
    Scratch memory(flights * rows * (slots_ + 2 * width_ + 4));
    for (int64_t n = 0; n < flights; n++) {
      ForwardImage image{memory.take(rows * slots_), memory.take(v_row(rows)),
                         memory.take(rows * width_), memory.take(rows),
                         memory.take(rows),          memory.take(rows)};
      image.rounded_sum = is_rounded() ? memory.take(rows) : image.sum;
      flight_.push_back(image);
    }
    const int64_t threads = at::get_num_threads();
    Scratch tiles(threads * (2 * size * size + 4 * size));
    for (int64_t t = 0; t < threads; t++)
      tiles_.push_back({tiles.take(size * size), tiles.take(size * size), tiles.take(size),
                        tiles.take(size), tiles.take(size), tiles.take(size)});
    for_each_image(images_, [&](int64_t index, const Team& team) {
      const ForwardImage& image = flight_[team.thread];
      const int64_t source = index * blocks_.channels;
      team.for_each_task(blocks_.count,
                         [&](int64_t block, int64_t) { pack(image, source, block); });
      for_each_tile_pair(team, blocks_, [&](const TilePair& pair, int64_t thread) {
        tile_pair(image, pair, tiles_[thread]);
      });
      team.for_each_task(blocks_.count,
                         [&](int64_t block, int64_t) { finish(image, source, block); });
    });
  }

 private:
  struct Tile {
    float *s, *q;
    float *row_max, *col_max, *row_factor, *col_factor;
  };

  // first_row: of the image among all rows of the batch.
  void pack(const ForwardImage& image, int64_t first_row, int64_t block) {
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block);
    const int64_t source = first_row + row;
    isa_.pack_columns(isa_.at(x_, source * depth_), depth_, rows, depth_,
                      image.x_columns + row * slots_);
    isa_.pack_rows(isa_.at(v_, source * cols_), cols_, rows, cols_, image.v_rows + v_row(row));
  }

  // Where a block's rows stand in v_rows.
  int64_t v_row(int64_t row) const { return row / isa_.pack * width_; }

  void tile_pair(const ForwardImage& image, const TilePair& pair, const Tile& tile) {
    const auto [i, j, new_i, new_j] = pair;
    const int64_t ld = blocks_.size, row = blocks_.first(i), col = blocks_.first(j);
    const int64_t rows = blocks_.rows(i), cols = blocks_.rows(j);
    const bool mirrored = i != j;
    // What the products with v need comes while those of x are made.
    for (const int64_t first : {row, col}) {
      prefetch(image.v_rows + v_row(first), v_row(rows));
      prefetch(image.acc + first * width_, rows * width_);
    }
    isa_.gram(image.x_columns + row * slots_, image.x_columns + col * slots_, rows, cols, depth_,
              tile.s, ld);
    isa_.scale_and_max(tile.s, rows, cols, ld, scale_, tile.row_max, tile.col_max);
    isa_.merge_max(tile.s, rows, cols, ld, false, tile.row_max, col, new_i, image.max + row,
                   image.argmax + row, image.sum + row, tile.row_factor);
    if (!new_i) isa_.rescale(image.acc + row * width_, rows, width_, width_, tile.row_factor);
    float* const rounded_i = rounded_sum(image, row, new_i, tile.row_factor);
    if (mirrored) {
      isa_.merge_max(tile.s, rows, cols, ld, true, tile.col_max, row, new_j, image.max + col,
                     image.argmax + col, image.sum + col, tile.col_factor);
      if (!new_j) isa_.rescale(image.acc + col * width_, cols, width_, width_, tile.col_factor);
      isa_.mirrored_exponentials(tile.s, rows, cols, ld, image.max + col, tile.q, image.sum + col,
                                 rounded_sum(image, col, new_j, tile.col_factor));
      isa_.multiply_transposed(tile.q, isa_.pack * ld, image.v_rows + v_row(row), cols, cols_, rows,
                               image.acc + col * width_, width_, !new_j);
    }
    isa_.exponentials(tile.s, rows, cols, ld, image.max + row, tile.s, image.sum + row, rounded_i);
    isa_.multiply(tile.s, ld, image.v_rows + v_row(col), rows, cols_, cols,
                  image.acc + row * width_, width_, !new_i);
  }

  // Elements of two: weights are rounded to them before they are multiplied.
  bool is_rounded() const { return isa_.pack > 1; }

  // A block's sums of rounded weights, shrunk as acc is, for more of them; null where there are
  // none beside the sums.
  float* rounded_sum(const ForwardImage& image, int64_t row, bool first,
                     const float* factor) const {
    if (!is_rounded()) return nullptr;
    float* const sum = image.rounded_sum + row;
    for (int64_t r = 0; r < blocks_.size; r++) sum[r] = first ? 0.0f : sum[r] * factor[r];
    return sum;
  }

  void finish(const ForwardImage& image, int64_t first_row, int64_t block) {
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block);
    const int64_t target = first_row + row;
    isa_.results(image.acc + row * width_, width_, rows, cols_, image.rounded_sum + row,
                 isa_.at(y_, target * cols_), y_rest_ ? isa_.at(y_rest_, target * cols_) : nullptr);
    std::copy_n(image.argmax + row, rows, row_argmax_ + target);
    std::copy_n(image.sum + row, rows, row_sum_ + target);
  }

  const Kernels& isa_;
  const int64_t images_, depth_, slots_, cols_, width_;
  const float scale_;
  const Blocks blocks_;
  const void *x_, *v_;
  void *y_, *y_rest_;
  float *row_argmax_, *row_sum_;
  std::vector<ForwardImage> flight_;
  std::vector<Tile> tiles_;
};

// One image of the backward pass. v = x where v_columns is x_columns; then dv goes into dx.
struct BackwardImage {
  float *x_columns, *x_rows;
  float* v_columns;
  float *dy_columns, *dy_rows;
  float *dx, *dv;
  float *argmax, *max, *share, *share_rest, *pivot, *delta;

  RowStats stats(int64_t row) const {
    return {max + row, share + row, share_rest + row, pivot + row, delta + row};
  }
};

class Backward {
 public:
  struct Inputs {
    // Elements. y is null where it is too coarse for delta = dY . Y, which then takes a sweep of
    // its own; y_rest is null where y is all of the result.
    const void *dy, *x, *v, *y, *y_rest;
    const float *row_argmax, *row_sum;
  };

  Backward(const Kernels& isa, const Shape& shape, float scale, const Inputs& in, void* dx,
           void* dv)
      : isa_(isa),
        shape_(shape),
        x_slots_(isa.slots(shape.depth)),
        slots_(isa.slots(shape.cols)),
        depth_width_(padded_width(isa_.width, shape.depth)),
        width_(padded_width(isa_.width, shape.cols)),
        scale_(scale),
        blocks_(make_blocks(shape.images, shape.channels)),
        in_(in),
        dx_(dx),
        dv_(dv),
        separate_v_(dv != nullptr) {}

  void run() {
    const int64_t flights = images_in_flight(shape_.images);
    const int64_t rows = blocks_.padded(), size = blocks_.size;
    const int64_t image_floats = rows * (x_slots_ + 2 * depth_width_ + slots_ + width_ + 6) +
                                 (separate_v_ ? rows * (slots_ + width_) : 0);
    Scratch memory(flights * image_floats);
    for (int64_t n = 0; n < flights; n++) {
      BackwardImage image;
      image.x_columns = memory.take(rows * x_slots_);
      image.x_rows = memory.take(rows / isa_.pack * depth_width_);
      image.dx = memory.take(rows * depth_width_);
      image.dy_columns = memory.take(rows * slots_);
      image.dy_rows = memory.take(rows / isa_.pack * width_);
      image.argmax = memory.take(rows);
      image.max = memory.take(rows);
      image.share = memory.take(rows);
      image.share_rest = memory.take(rows);
      image.pivot = memory.take(rows);
      image.delta = memory.take(rows);
      image.v_columns = separate_v_ ? memory.take(rows * slots_) : image.x_columns;
      image.dv = separate_v_ ? memory.take(rows * width_) : image.dx;
      flight_.push_back(image);
    }
    const int64_t threads = at::get_num_threads();
    Scratch tiles(threads * 3 * size * size);
    for (int64_t t = 0; t < threads; t++)
      tiles_.push_back({tiles.take(size * size), tiles.take(size * size), tiles.take(size * size)});
    for_each_image(shape_.images, [&](int64_t index, const Team& team) {
      const BackwardImage& image = flight_[team.thread];
      const int64_t source = index * blocks_.channels;
      team.for_each_task(blocks_.count,
                         [&](int64_t block, int64_t) { pack(image, source, block); });
      if (!in_.y)
        for_each_tile_pair(team, blocks_, [&](const TilePair& pair, int64_t thread) {
          gather_delta(image, pair.i, pair.j, tiles_[thread]);
        });
      for_each_tile_pair(team, blocks_, [&](const TilePair& pair, int64_t thread) {
        tile_pair(image, pair, tiles_[thread]);
      });
      team.for_each_task(blocks_.count,
                         [&](int64_t block, int64_t) { finish(image, source, block); });
    });
  }

 private:
  struct Tile {
    float *s, *e, *f;
  };

  void pack(const BackwardImage& image, int64_t first_row, int64_t block) {
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block);
    const int64_t depth = shape_.depth, cols = shape_.cols;
    const int64_t source = first_row + row;
    const void *x = isa_.at(in_.x, source * depth), *dy = isa_.at(in_.dy, source * cols);
    isa_.pack_columns(x, depth, rows, depth, image.x_columns + row * x_slots_);
    isa_.pack_columns(dy, cols, rows, cols, image.dy_columns + row * slots_);
    isa_.pack_rows(x, depth, rows, depth, image.x_rows + row / isa_.pack * depth_width_);
    isa_.pack_rows(dy, cols, rows, cols, image.dy_rows + row / isa_.pack * width_);
    if (separate_v_)
      isa_.pack_columns(isa_.at(in_.v, source * cols), cols, rows, cols,
                        image.v_columns + row * slots_);
    take_statistics(image, source, row, rows);
  }

  void take_statistics(const BackwardImage& image, int64_t source, int64_t row, int64_t rows) {
    const int64_t depth = shape_.depth, cols = shape_.cols, first = source - row;
    for (float* array : {image.argmax, image.share, image.share_rest})
      std::fill_n(array + row, blocks_.size, 0.0f);
    copy_argmax(in_.row_argmax + source, rows, shape_.channels, image.argmax + row);
    reciprocals(in_.row_sum + source, rows, image.share + row, image.share_rest + row);
    isa_.max_logits(image.x_columns + row * x_slots_, isa_.at(in_.x, first * depth),
                    image.argmax + row, rows, depth, scale_, image.max + row);
    float use[kLargestBlock];
    for (int64_t r = 0; r < blocks_.size; r++) use[r] = image.share[row + r] > 0.5f ? 1.0f : 0.0f;
    const float* dy_columns = image.dy_columns + row * slots_;
    isa_.pivots(dy_columns, isa_.at(in_.v, first * cols), image.argmax + row, use, rows, cols,
                image.pivot + row);
    if (!in_.y) {
      std::fill_n(image.delta + row, blocks_.size, 0.0f);
      return;
    }
    isa_.deltas(dy_columns, isa_.at(in_.v, first * cols), isa_.at(in_.y, source * cols),
                in_.y_rest ? isa_.at(in_.y_rest, source * cols) : nullptr, 1.0f, image.argmax + row,
                use, rows, cols, image.delta + row);
  }

  void gather_delta(const BackwardImage& image, int64_t i, int64_t j, const Tile& tile) {
    const int64_t row = blocks_.first(i), col = blocks_.first(j);
    products(image, i, j, tile);
    isa_.sci_delta(tile.s, tile.e, tile.f, blocks_.rows(i), blocks_.rows(j), blocks_.size, scale_,
                   image.stats(row), image.stats(col), image.delta + row,
                   i == j ? nullptr : image.delta + col);
  }

  void products(const BackwardImage& image, int64_t i, int64_t j, const Tile& tile) {
    const int64_t ld = blocks_.size, row = blocks_.first(i), col = blocks_.first(j);
    const int64_t rows = blocks_.rows(i), cols = blocks_.rows(j);
    isa_.gram(image.x_columns + row * x_slots_, image.x_columns + col * x_slots_, rows, cols,
              shape_.depth, tile.s, ld);
    const auto product = [&](const float* a, const float* b, float* c) {
      isa_.gram(a + row * slots_, b + col * slots_, rows, cols, shape_.cols, c, ld);
    };
    product(image.dy_columns, image.v_columns, tile.e);
    product(image.v_columns, image.dy_columns, tile.f);
  }

  void tile_pair(const BackwardImage& image, const TilePair& pair, const Tile& tile) {
    const auto [i, j, new_i, new_j] = pair;
    const int64_t ld = blocks_.size, row = blocks_.first(i), col = blocks_.first(j);
    const int64_t rows = blocks_.rows(i), cols = blocks_.rows(j);
    const int64_t depth = shape_.depth, k = shape_.cols;
    const auto x_rows = [&](int64_t first) {
      return image.x_rows + first / isa_.pack * depth_width_;
    };
    const auto dy_rows = [&](int64_t first) { return image.dy_rows + first / isa_.pack * width_; };
    for (const int64_t first : {row, col}) {
      prefetch(x_rows(first), rows / isa_.pack * depth_width_);
      prefetch(image.dx + first * depth_width_, rows * depth_width_);
      prefetch(dy_rows(first), rows / isa_.pack * width_);
    }
    products(image, i, j, tile);
    isa_.sci_gradient(tile.s, tile.e, tile.f, rows, cols, ld, scale_, image.stats(row),
                      image.stats(col));
    isa_.multiply(tile.s, ld, x_rows(col), rows, depth, cols, image.dx + row * depth_width_,
                  depth_width_, !new_i);
    isa_.multiply(tile.f, ld, dy_rows(col), rows, k, cols, image.dv + row * width_, width_,
                  !new_i || !separate_v_);
    if (i == j) return;
    isa_.multiply_transposed(isa_.across(tile.s, tile.e, ld), isa_.pack * ld, x_rows(row), cols,
                             depth, rows, image.dx + col * depth_width_, depth_width_, !new_j);
    isa_.multiply_transposed(tile.e, isa_.pack * ld, dy_rows(row), cols, k, rows,
                             image.dv + col * width_, width_, !new_j || !separate_v_);
  }

  void finish(const BackwardImage& image, int64_t first_row, int64_t block) {
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block);
    const int64_t target = first_row + row;
    isa_.results(image.dx + row * depth_width_, depth_width_, rows, shape_.depth, nullptr,
                 isa_.at(dx_, target * shape_.depth), nullptr);
    if (separate_v_)
      isa_.results(image.dv + row * width_, width_, rows, shape_.cols, nullptr,
                   isa_.at(dv_, target * shape_.cols), nullptr);
  }

  const Kernels& isa_;
  const Shape shape_;
  const int64_t x_slots_, slots_, depth_width_, width_;
  const float scale_;
  const Blocks blocks_;
  const Inputs in_;
  void *dx_, *dv_;
  const bool separate_v_;
  std::vector<BackwardImage> flight_;
  std::vector<Tile> tiles_;
};

struct Results {
  // y_rest is what rounding took off y, in x's dtype; empty where nothing was.
  at::Tensor y, row_argmax, row_sum, y_rest;
};

Results forward(const at::Tensor& x, const std::optional<at::Tensor>& v, double scale,
                bool keeps_rest) {
  const Kernels& isa = kernels_for(x);
  const at::Tensor our_x = elements(isa, x), our_v = v ? elements(isa, *v) : our_x;
  at::Tensor y = at::empty_like(our_v);
  at::Tensor row_argmax = at::empty({x.size(0), x.size(1)}, x.options().dtype(at::kFloat));
  at::Tensor row_sum = at::empty_like(row_argmax);
  const auto type = x.scalar_type();
  const bool in_kernel = keeps_rest && type == y.scalar_type();
  at::Tensor rest = in_kernel ? at::empty_like(y) : at::empty({0}, x.options());
  if (x.size(0) > 0)
    Forward(isa, our_x, our_v, static_cast<float>(scale), y,
            in_kernel ? rest.mutable_data_ptr() : nullptr, row_argmax, row_sum)
        .run();
  const at::Tensor result = y.to(type);
  if (keeps_rest && !in_kernel) rest = at::sub(y, result).to(type);
  return {result, row_argmax, row_sum, rest};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> sci(const at::Tensor& x,
                                                               const std::optional<at::Tensor>& v,
                                                               double scale) {
  check_features("cpu_sci", x, v);
  const Results r = forward(x, v, scale, x.scalar_type() != at::kFloat);
  return {r.y, r.row_argmax, r.row_sum, r.y_rest};
}

at::Tensor sci_values(const at::Tensor& x, const std::optional<at::Tensor>& v, double scale) {
  check_features("cpu_sci_values", x, v);
  return forward(x, v, scale, false).y;
}

std::tuple<at::Tensor, at::Tensor> sci_backward(const at::Tensor& dy, const at::Tensor& x,
                                                const std::optional<at::Tensor>& v,
                                                const at::Tensor& y, const at::Tensor& row_argmax,
                                                const at::Tensor& row_sum, const at::Tensor& y_rest,
                                                double scale) {
  check_features("cpu_sci_backward", x, v);
  check_shape("cpu_sci_backward", "dy", dy, v ? v->sizes() : x.sizes());
  check_shape("cpu_sci_backward", "y", y, dy.sizes());
  check_statistics("cpu_sci_backward", x, row_argmax, row_sum);
  const Kernels& isa = kernels_for(x);
  const at::Tensor our_x = elements(isa, x), our_v = v ? elements(isa, *v) : our_x;
  const at::Tensor our_dy = elements(isa, dy), our_y = elements(isa, y);
  const at::Tensor our_argmax = row_argmax.contiguous(), our_sum = row_sum.contiguous();
  const bool is_whole = x.scalar_type() == at::kFloat;
  if (!is_whole) check_shape("cpu_sci_backward", "y_rest", y_rest, dy.sizes());
  const at::Tensor our_rest = is_whole ? y_rest : elements(isa, y_rest);
  at::Tensor dx = at::empty_like(our_x);
  at::Tensor dv = v ? at::empty_like(our_v) : at::empty({0}, our_x.options());
  const Shape shape{x.size(0), x.size(1), x.size(2), our_v.size(2)};
  const Backward::Inputs in{.dy = our_dy.const_data_ptr(),
                            .x = our_x.const_data_ptr(),
                            .v = our_v.const_data_ptr(),
                            .y = is_whole && has_few_channels(x) ? nullptr : our_y.const_data_ptr(),
                            .y_rest = is_whole ? nullptr : our_rest.const_data_ptr(),
                            .row_argmax = our_argmax.const_data_ptr<float>(),
                            .row_sum = our_sum.const_data_ptr<float>()};
  if (x.size(0) > 0)
    Backward(isa, shape, static_cast<float>(scale), in, dx.mutable_data_ptr(),
             v ? dv.mutable_data_ptr() : nullptr)
        .run();
  return {dx.to(x.scalar_type()), dv.to(x.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(cin_fast, CPU, m) {
  m.impl("cpu_sci", &sci);
  m.impl("cpu_sci_values", &sci_values);
  m.impl("cpu_sci_backward", &sci_backward);
}

}  // namespace cin_fast
