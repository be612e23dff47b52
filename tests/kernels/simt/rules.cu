// Rules of csrc/cuda that no operator shows by its result. `rules NAME` ends with
//   0: the rule holds    10: it does not    11: the launch refused (its words go to stderr)
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/cluster_support.h"
#include "cuda/mma.h"
#include "cuda/multiscale_attention.h"
#include "cuda/shared_memory.h"
#include "cuda/tickets.h"

namespace {

using namespace magsd::MAGSD_ISA;
using namespace magsd::MAGSD_ISA::multiscale_attention;

bool is_tf32(float value) { return (__float_as_uint(value) & ~kTf32Bits) == 0; }

float number(int i) { return std::sin(static_cast<float>(3 * i + 1)); }

// D = A B of 16 x 8 and 8 x 8 entries, rounded down to TF32 or as they are.
bool product(bool partition) {
  const auto operand = [partition](int i) { return partition ? tf32_part(number(i)) : number(i); };
  std::vector<float> d(16 * 8);
  simt::launch({1, kWarp}, [&] {
    const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
    const auto a = [&](int row, int k) { return operand(8 * row + k); };
    const auto b = [&](int k, int column) { return operand(200 + 8 * k + column); };
    float sum[4] = {};
    mma_tf32(sum[0], sum[1], sum[2], sum[3], a(g, t), a(g + 8, t), a(g, t + 4), a(g + 8, t + 4),
             b(t, g), b(t + 4, g));
    for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
  });
  bool right = true;
  for (int i = 0; i < 16 * 8; ++i) {
    double wanted = 0;
    for (int k = 0; k < 8; ++k) {
      wanted += static_cast<double>(operand(i / 8 * 8 + k)) * operand(200 + 8 * k + i % 8);
    }
    right &= std::abs(d[i] - wanted) < 1e-6;
  }
  return right;
}

bool values_are_cut_in_two() {
  bool right = true;
  for (int i = 0; i < 1000; ++i) {
    const float value = number(i), part = tf32_part(value), rest = tf32_rest(value);
    right &= is_tf32(part) && is_tf32(rest) && is_tf32(to_tf32(value));
    right &= std::abs(value - part - rest) <= std::ldexp(std::abs(value), -21);
    right &= std::abs(value - to_tf32(value)) <= std::ldexp(std::abs(value), -11);
  }
  const float nan = to_tf32(__uint_as_float(0x7fffffffu));
  return right && nan != nan && is_tf32(nan);
}

// Every block leaves its number; the last of `blocks` with the same ticket adds up.
__global__ void add_blocks(Tickets tickets, int blocks, float* parts, float* sums) {
  const int which = static_cast<int>(blockIdx.x) / blocks;
  if (threadIdx.x == 0) parts[blockIdx.x] = static_cast<float>(blockIdx.x % blocks);
  if (!is_last_block(tickets, which, blocks)) return;
  if (threadIdx.x == 0) {
    for (int i = 0; i < blocks; ++i) sums[which] += parts[which * blocks + i];
  }
}

bool the_last_block_adds_up() {
  std::vector<unsigned> own(2, 0);
  bool right = true;
  for (const Tickets tickets : {Tickets{nullptr, 7}, Tickets{own.data(), 0}}) {
    for (int blocks = 1; blocks < 12; ++blocks) {
      std::vector<float> parts(2 * blocks, NAN), sums(2, 0.0f);
      simt::launch({static_cast<unsigned>(2 * blocks), 64},
                   [&] { add_blocks(tickets, blocks, parts.data(), sums.data()); });
      const float wanted = static_cast<float>(blocks * (blocks - 1) / 2);
      right &= sums[0] == wanted && sums[1] == wanted && own[0] == 0 && own[1] == 0;
    }
  }
  for (const unsigned counter : ticket_counters) right &= counter == 0;
  return right;
}

bool calls_that_may_meet_share_no_counter() {
  TicketDesk desk;
  const TicketDesk::Key one{0, 7}, two{0, 8}, elsewhere{1, 7};
  const int64_t first = desk.take(&one, 10);
  bool right = first == 0 && desk.take(&one, 4) == first && desk.take(&one, 10) == first;
  std::vector<int64_t> taken = {first, desk.take(&two, 10), desk.take(&elsewhere, 10),
                                desk.take(nullptr, 10), desk.take(nullptr, 10)};
  taken.push_back(desk.take(&one, 11));  // more than the stream had
  taken.push_back(desk.take(nullptr, 10));
  for (size_t i = 1; i < taken.size(); ++i) right &= taken[i] >= taken[i - 1] + 10;
  right &= desk.take(&one, 11) == taken[5] && desk.take(&two, 3) == taken[1];
  right &= desk.take(nullptr, kMostTickets) == -1 && desk.take(&two, kMostTickets) == -1;
  const int64_t left = kMostTickets - (taken.back() + 10);
  right &= desk.take(nullptr, left) == taken.back() + 10 && desk.take(nullptr, 1) == -1;
  const TicketDesk::Key late{0, 9};
  return right && desk.take(&late, 1) == -1 && desk.take(&two, 10) == taken[1];
}

extern "C" int magsd_emulate_multiprocessors(int count);

// Loads of a thread of a block's part, the most of all blocks.
int64_t loads_of(const Task& task, const Partition& partition) {
  const int64_t step = int64_t{partition.image_lanes} * partition.items;
  const int64_t images = std::min(partition.images, partition.batch);
  return ceil_div(partition.tiles, int64_t{partition.tile_splits}) * ceil_div(images, step) *
         task.loads;
}

// The parts of a map hold each of its values once, and none is empty.
bool covers(const Partition& partition) {
  int64_t values = 0;
  bool right = true;
  for (int split = 0; split < partition.splits; ++split) {
    const int64_t count = partition.count(split);
    right &= count > 0;
    values += count;
  }
  return right && values == partition.pixels * partition.batch;
}

// Bfloat16 maps of 28 x 28, 14 x 14 and 7 x 7 in channels last, 32 channels in two groups, on an
// H100: no thread has more than 1.25 times the loads of another, and all blocks run at once.
bool parts_have_equal_loads() {
  magsd_emulate_multiprocessors(132);
  const std::vector<Task> tasks = {{784, 1, 1}, {196, 1, 1}, {49, 1, 1}};
  bool right = true;
  for (const int64_t batch : {16, 64, 256, 1024}) {
    const std::vector<Partition> partitions = partitions_of(tasks, batch, 128, 2);
    int64_t blocks = 0, least = INT64_MAX, most = 0;
    for (size_t i = 0; i < partitions.size(); ++i) {
      right &= covers(partitions[i]);
      blocks += 2 * partitions[i].splits;
      least = std::min(least, loads_of(tasks[i], partitions[i]));
      most = std::max(most, loads_of(tasks[i], partitions[i]));
    }
    right &= 4 * most <= 5 * least && blocks <= 264 && (batch < 64 || blocks > 220);
  }
  return right;
}

// Any maps: every value has one block, and the partition is worth a device or no larger than need
// be.
bool parts_cover_every_map() {
  bool right = true;
  uint64_t seed = 1;
  const auto below = [&](int64_t most) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<int64_t>((seed >> 33) % static_cast<uint64_t>(most));
  };
  for (int i = 0; i < 2000; ++i) {
    magsd_emulate_multiprocessors(static_cast<int>(1 + below(150)));
    std::vector<Task> tasks;
    for (int64_t n = 1 + below(8); n > 0; --n) {
      const int items = 1 << below(4);
      tasks.push_back(
          {1 + below(1 << (1 + below(14))), items, items * static_cast<int>(1 + below(5))});
    }
    const int64_t batch = 1 + below(300), groups = 1 + below(40);
    const std::vector<Partition> partitions =
        partitions_of(tasks, batch, 1 << (5 + below(4)), groups);
    int64_t blocks = 0;
    for (const Partition& partition : partitions) {
      right &= covers(partition);
      blocks += groups * partition.splits;
    }
    const int64_t room = 2 * multiprocessors();
    right &= blocks <= room || static_cast<int64_t>(partitions.size()) * groups > room;
  }
  return right;
}

bool shared_memory_is_asked_for() {
  static const char kernels[3] = {};
  const size_t kilo = 1024;
  driver::kernels[kernels].declared = kilo;
  driver::kernels[kernels + 1].declared = 0;
  driver::kernels[kernels + 2].declared = 40 * kilo;
  bool right = true;
  for (driver::device = 0; driver::device < 2; ++driver::device) {
    for (const char* kernel = kernels; kernel < kernels + 3; ++kernel) {
      for (const size_t dynamic : {size_t{0}, 8 * kilo, 47 * kilo, 47 * kilo + 512, 48 * kilo,
                                   48 * kilo + 16, 100 * kilo, 9 * kilo, 150 * kilo}) {
        right &= allow_shared(kernel, dynamic) == cudaSuccess && driver::starts(kernel, dynamic);
        const int calls = driver::calls;
        right &= allow_shared(kernel, dynamic) == cudaSuccess && driver::calls == calls;
      }
      right &= allow_shared(kernel, 228 * kilo) != cudaSuccess;
    }
  }
  return right;
}

// On the first device the kernel is what nvcc made; on the second the driver compiled it from the
// PTX of an older GPU (0), finds no room for a cluster (1), or does not answer (2).
bool clusters_run_where_they_are_compiled_and_find_room() {
  static const char kernels[3] = {};
  for (const char* kernel = kernels; kernel < kernels + 3; ++kernel) {
    driver::kernels[kernel].ptx = {90, kernel == kernels ? 80 : 90};
    driver::kernels[kernel].clusters = {33, kernel == kernels       ? 33
                                            : kernel == kernels + 1 ? 0
                                                                    : -1};
  }
  bool right = true;
  for (driver::device = 0; driver::device < 2; ++driver::device) {
    for (const char* kernel = kernels; kernel < kernels + 3; ++kernel) {
      const ClusterShape shape{4, 256, 120 * 1024};
      bool runs = driver::device == 1;
      right &= runs_clusters(kernel, shape, &runs) == cudaSuccess;
      right &= runs == (driver::device == 0) && driver::last_error == cudaSuccess;
      const int calls = driver::calls;
      right &= runs_clusters(kernel, shape, &runs) == cudaSuccess;
      right &= runs == (driver::device == 0) && driver::calls == calls;
    }
  }
  return right;
}

// Clusters of four blocks find room, those of eight do not.
bool clusters_of_each_size_are_asked_for() {
  static const char kernel = 0;
  driver::kernels[&kernel].ptx = {90, 90};
  driver::kernels[&kernel].clusters = {33, 33};
  driver::kernels[&kernel].most_blocks = 4;
  bool right = true;
  for (const int blocks : {4, 8, 4, 8}) {
    bool runs = blocks == 8;
    right &= runs_clusters(&kernel, {blocks, 256, 120 * 1024}, &runs) == cudaSuccess;
    right &= runs == (blocks == 4);
  }
  return right;
}

const std::map<std::string, std::function<bool()>> kCases = {
    {"product", [] { return product(true); }},
    {"product_of_longer_numbers", [] { return product(false); }},
    {"values_are_cut_in_two", values_are_cut_in_two},
    {"clusters_run_where_they_are_compiled_and_find_room",
     clusters_run_where_they_are_compiled_and_find_room},
    {"clusters_of_each_size_are_asked_for", clusters_of_each_size_are_asked_for},
    {"the_last_block_adds_up", the_last_block_adds_up},
    {"calls_that_may_meet_share_no_counter", calls_that_may_meet_share_no_counter},
    {"parts_have_equal_loads", parts_have_equal_loads},
    {"parts_cover_every_map", parts_cover_every_map},
    {"shared_memory_is_asked_for", shared_memory_is_asked_for},
};

}  // namespace

int main(int count, char** words) {
  if (count != 2) return 12;
  try {
    return kCases.at(words[1])() ? 0 : 10;
  } catch (const std::runtime_error& refusal) {
    std::fprintf(stderr, "%s\n", refusal.what());
    return 11;
  }
}
