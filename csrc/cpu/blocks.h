// How a batch is cut: row blocks, and the rounds in which their tiles are visited.

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "scratch.h"

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

// Whole vectors, at no pitch that would put many rows into the same few places of the cache.
inline int64_t padded_width(int64_t vector, int64_t n) {
  const int64_t width = (n + vector - 1) / vector * vector;
  return width % 256 == 0 ? width + vector : width;
}

// Asks for memory that is read soon.
inline void prefetch(const float* from, int64_t floats) {
  if (floats > 65536) return;
  for (int64_t n = 0; n < floats; n += 16) __builtin_prefetch(from + n, 0, 2);
}

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

// Row blocks I and J of an image meet. new_i, new_j: the block meets its first other (or itself).
struct TilePair {
  int64_t i, j;
  bool new_i, new_j;
};

// Who works on an image: one thread alone, or all together.
struct Team {
  bool alone;
  // Of the one thread; whose memory the image uses.
  int64_t thread;

  // run(task, thread) for each task.
  template <typename Run>
  void for_each_task(int64_t tasks, Run run) const {
    if (!alone) return cin_fast::for_each_task(tasks, run);
    for (int64_t task = 0; task < tasks; task++) run(task, thread);
  }
};

// run(image, team) for each image. As long as there is one for every thread, each thread takes
// whole images and waits for nobody; what is left over is shared image by image.
template <typename Run>
void for_each_image(int64_t images, Run run) {
  const int64_t threads = at::get_num_threads(), whole = images - images % threads;
  for_each_task(whole, [&](int64_t image, int64_t thread) { run(image, Team{true, thread}); });
  for (int64_t image = whole; image < images; image++) run(image, Team{false, 0});
}

// Images that for_each_image has under way at once.
inline int64_t images_in_flight(int64_t images) {
  return images < at::get_num_threads() ? 1 : at::get_num_threads();
}

// run(pair, thread) for each unordered pair of an image's row blocks, I = J included.
//
// Neighbouring blocks form a party, and parties meet in rounds: in round r those with
// I + J = r (mod their count), each exactly once. All pairs of two parties' blocks are one task:
// from one pair to the next only one block changes, the other is still in the cache. A task may add
// to what belongs to its blocks, so it waits until both parties have been through the round before;
// a block's sums always grow in the same order. Tasks are taken in the order of their rounds:
// whatever a task waits for is running already.
template <typename Run>
void for_each_tile_pair(const Team& team, const Blocks& blocks, Run run) {
  struct Meeting {
    int64_t i, j, round;
  };
  const int64_t party = blocks.count >= 8 * at::get_num_threads() || team.alone ? 2 : 1;
  const int64_t n = (blocks.count + party - 1) / party;
  std::vector<Meeting> meetings;
  for (int64_t round = 0; round < n; round++) {
    for (int64_t i = 0; i < n; i++) {
      const int64_t j = (round - i + n) % n;
      if (i < j) meetings.push_back({i, j, round});
    }
    for (int64_t i = 0; i < n; i++)
      if (2 * i % n == round) meetings.push_back({i, i, round});
  }
  // Rounds that each party has been through, and blocks that have met another.
  std::vector<std::atomic<int64_t>> done(n);
  std::vector<char> met(blocks.count);
  const auto wait_for = [&](int64_t which, int64_t round) {
    while (done[which].load(std::memory_order_acquire) < round) std::this_thread::yield();
  };
  const auto meet = [&](int64_t i, int64_t j, int64_t thread) {
    const TilePair pair{i, j, !met[i], !met[j]};
    met[i] = met[j] = 1;
    run(pair, thread);
  };
  team.for_each_task(static_cast<int64_t>(meetings.size()), [&](int64_t task, int64_t thread) {
    const Meeting& meeting = meetings[task];
    wait_for(meeting.i, meeting.round);
    wait_for(meeting.j, meeting.round);
    const int64_t end_i = std::min((meeting.i + 1) * party, blocks.count);
    const int64_t end_j = std::min((meeting.j + 1) * party, blocks.count);
    bool forth = true;
    for (int64_t i = meeting.i * party; i < end_i; i++, forth = !forth) {
      const int64_t begin_j = meeting.i == meeting.j ? i : meeting.j * party;
      for (int64_t k = begin_j; k < end_j; k++)
        meet(i, forth ? k : begin_j + end_j - 1 - k, thread);
    }
    done[meeting.i].store(meeting.round + 1, std::memory_order_release);
    done[meeting.j].store(meeting.round + 1, std::memory_order_release);
  });
}

}  // namespace cin_fast
