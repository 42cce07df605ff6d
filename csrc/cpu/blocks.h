// How a batch is cut: row blocks, the rounds in which their tiles are visited, and scratch memory.

#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

namespace cin_fast {

// The C rows of an image in blocks of `size`, the last one shorter.
struct Blocks {
  int64_t channels, size, count;

  Blocks(int64_t channels_, int64_t size_)
      : channels(channels_), size(size_), count((channels_ + size_ - 1) / size_) {}
  int64_t first(int64_t block) const { return block * size; }
  int64_t rows(int64_t block) const { return std::min(size, channels - first(block)); }
  int64_t padded() const { return count * size; }
};

constexpr int64_t kLargestBlock = 128;
constexpr int64_t kSmallestBlock = 32;

// Big blocks read less memory a product; smaller ones give every thread something to do.
inline Blocks make_blocks(int64_t images, int64_t channels, int64_t largest = kLargestBlock) {
  const int64_t wanted = 2 * at::get_num_threads();
  int64_t size = largest;
  const auto tasks = [&] { return images * ((channels + size - 1) / size + 1) / 2; };
  while (size > kSmallestBlock && (tasks() < wanted || channels <= size / 2)) size /= 2;
  return Blocks(channels, size);
}

// How many images are worked on at once: enough to fill every round, and no more memory than that.
inline int64_t images_in_flight(int64_t images, const Blocks& blocks) {
  const int64_t tasks = (blocks.count + 1) / 2;
  return std::clamp<int64_t>((4 * at::get_num_threads() + tasks - 1) / tasks, 1, images);
}

// Floats handed out in pieces, each starting on a cache line.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : memory_(at::empty({floats}, at::kFloat)), next_(memory_.data_ptr<float>()) {}
  float* take(int64_t floats) {
    float* piece = next_;
    next_ += padded(floats);
    return piece;
  }
  static int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

 private:
  at::Tensor memory_;
  float* next_;
};

// 1 / sum as a number and the rest that its rounding left.
inline void reciprocals(const float* sum, int64_t n, float* share, float* rest) {
  for (int64_t i = 0; i < n; i++) {
    const double exact = 1.0 / static_cast<double>(sum[i]);
    share[i] = static_cast<float>(exact);
    rest[i] = static_cast<float>(exact - static_cast<double>(share[i]));
  }
}

// run(task, thread) for each task, whoever is free taking the next. Tasks do not share what they
// write, so that order and number of threads leave no trace in the result.
template <typename Run>
void for_each_task(int64_t tasks, Run run) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      run(task, begin);
  });
}

// run(image, I, J, round, thread) for each unordered pair of row blocks, I = J included, of each
// image. In round r meet the blocks with I + J = r (mod count): every block exactly once, so a
// task may add to what belongs to I and to J, and it always does so in the same order.
template <typename Run>
void for_each_tile_pair(int64_t images, const Blocks& blocks, Run run) {
  struct Pair {
    int64_t i, j;
  };
  const int64_t n = blocks.count;
  std::vector<Pair> pairs;
  for (int64_t round = 0; round < n; round++) {
    pairs.clear();
    for (int64_t i = 0; i < n; i++) {
      const int64_t j = (round - i + n) % n;
      if (i < j) pairs.push_back({i, j});
    }
    // The diagonal is less work: last, it evens out the threads' ends.
    for (int64_t i = 0; i < n; i++)
      if (2 * i % n == round) pairs.push_back({i, i});
    const int64_t count = static_cast<int64_t>(pairs.size());
    for_each_task(images * count, [&](int64_t task, int64_t thread) {
      const Pair& pair = pairs[task / images];
      run(task % images, pair.i, pair.j, round, thread);
    });
  }
}

}  // namespace cin_fast
