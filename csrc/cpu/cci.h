// What both directions of |W_i - eta_i W_partner(i)| v_i share: pairs of images, and their memory.
//
// A job is a pair of images, or one image that is its own partner. Each tile of an image's x x^T is
// computed once and serves four times: in both directions of the pair, and for row blocks I and J.
// Legend as in sci.cpp; for an image, `other` is its partner.

#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <utility>
#include <vector>

#include "blocks.h"
#include "kernels.h"
#include "tensors.h"

namespace cin_fast {

// Two images' tiles fill the cache sooner than one's.
constexpr int64_t kLargestPairBlock = 128;

struct Pair {
  int64_t a, b;
  int64_t images() const { return a == b ? 1 : 2; }
};

inline std::vector<Pair> make_pairs(const at::Tensor& partner) {
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

struct PairImage {
  float *x_columns, *x_rows;
  float *v_columns, *v_rows;
  float *dy_columns, *dy_rows;
  // Where sci's gradient is taken along.
  float *sci_dy_columns, *sci_dy_rows;
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
  Pairs(const Kernels& isa, const Shape& shape, float scale, std::vector<Pair> pairs,
        const float* eta)
      : isa_(isa),
        shape_(shape),
        x_slots_(isa.slots(shape.depth)),
        slots_(isa.slots(shape.cols)),
        depth_width_(padded_width(isa_.width, shape.depth)),
        width_(padded_width(isa_.width, shape.cols)),
        scale_(scale),
        eta_(eta),
        pairs_(std::move(pairs)),
        blocks_(
            make_blocks(static_cast<int64_t>(pairs_.size()), shape.channels, kLargestPairBlock)) {}

 protected:
  static constexpr int64_t kMostTiles = 10;
  struct Tile {
    float* t[kMostTiles];
    float *row_max, *col_max, *factor;
  };

  int64_t images_under_way() const {
    return 2 * images_in_flight(static_cast<int64_t>(pairs_.size()));
  }

  // `count` of them for each thread.
  void make_tiles(int64_t count) {
    const int64_t threads = at::get_num_threads(), size = blocks_.size;
    tile_memory_.emplace(threads * (count * size * size + 3 * size));
    for (int64_t n = 0; n < threads; n++) {
      Tile tile{};
      for (int64_t t = 0; t < count; t++) tile.t[t] = tile_memory_->take(size * size);
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

  // What makes a block's weights again, of an image whose first row is `first` in the batch: where
  // its rows' largest weights stand, and their sums.
  void restore_weights(const PairImage& packed, const void* x, int64_t first, int64_t block,
                       const float* row_argmax, const float* row_sum) const {
    const int64_t row = blocks_.first(block), rows = blocks_.rows(block);
    for (float* array : {packed.argmax, packed.share, packed.share_rest})
      std::fill_n(array + row, blocks_.size, 0.0f);
    copy_argmax(row_argmax + first + row, rows, shape_.channels, packed.argmax + row);
    reciprocals(row_sum + first + row, rows, packed.share + row, packed.share_rest + row);
    isa_.max_logits(packed.x_columns + row * x_slots_, isa_.at(x, first * shape_.depth),
                    packed.argmax + row, rows, shape_.depth, scale_, packed.max + row);
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
    isa_.gram(image.x_columns + blocks_.first(i) * x_slots_,
              image.x_columns + blocks_.first(j) * x_slots_, blocks_.rows(i), blocks_.rows(j),
              shape_.depth, s, blocks_.size);
  }

  // Where a row stands that is packed by rows, `width` wide.
  int64_t packed_row(int64_t row, int64_t width) const { return row / isa_.pack * width; }

  const Kernels& isa_;
  const Shape shape_;
  const int64_t x_slots_, slots_, depth_width_, width_;
  const float scale_;
  const float* eta_;
  const std::vector<Pair> pairs_;
  const Blocks blocks_;
  std::vector<PairImage> flight_;
  std::vector<Tile> tiles_;
  std::optional<Scratch> tile_memory_;
};

inline void check_pairs(const char* name, const at::Tensor& x, const at::Tensor& partner,
                        const at::Tensor& eta, const std::optional<at::Tensor>& v) {
  check_features(name, x, v);
  TORCH_CHECK(partner.scalar_type() == at::kLong, name, ": partner: expected int64, found ",
              partner.scalar_type());
  check_shape(name, "partner", partner, x.sizes().slice(0, 1));
  check_shape(name, "eta", eta, partner.sizes());
}

}  // namespace cin_fast
