// Kernels with a planted fault, each beside its correct counterpart, and a check of what the shim
// offers. `faults NAME 0|1` runs the kernel without or with its fault and ends with
//   0: the result is right    10: it is wrong    11: the launch refused (its words go to stderr)
// unless a sanitizer ends it before.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "simt/simt.h"

extern "C" void magsd_emulate_capability(int capability);

namespace {

constexpr int kThreads = 96;
constexpr unsigned kAll = 0xffffffffu;

std::vector<float> ramp(int count) {
  std::vector<float> values(count);
  for (int i = 0; i < count; ++i) values[i] = static_cast<float>(i);
  return values;
}

// Runs one block of kernel(in, out), in[i] = i; whether out[i] is wanted(i).
using Kernel = void (*)(const float* in, float* out);
bool one_block(Kernel kernel, const std::function<float(int)>& wanted, int threads = kThreads,
               std::size_t shared = 64) {
  const std::vector<float> in = ramp(kThreads);
  std::vector<float> out(kThreads, -1.0f);
  simt::launch({1, threads, shared}, [&] { kernel(in.data(), out.data()); });
  for (int i = 0; i < kThreads; ++i) {
    if (out[i] != wanted(i)) return false;
  }
  return true;
}
float same(int i) { return static_cast<float>(i); }
float neighbor(int i) { return static_cast<float>((i + 1) % kThreads); }

template <bool kFault>
__global__ void read_after_write(const float* in, float* out) {
  MAGSD_SHARED(float, tile, [kThreads]);
  const int t = threadIdx.x;
  tile[t] = in[t];
  if (!kFault) __syncthreads();
  out[t] = tile[(t + 1) % kThreads];
}

template <bool kFault>
__global__ void write_after_read(const float* in, float* out) {
  MAGSD_SHARED(float, tile, [kThreads]);
  const int t = threadIdx.x;
  float value = in[t];
  for (int round = 0; round < 3; ++round) {
    tile[t] = value;
    __syncthreads();
    value = tile[(t + 1) % kThreads];
    if (!kFault) __syncthreads();
  }
  out[t] = value;
}

template <bool kFault>
__global__ void read_before_anyone_wrote(const float* in, float* out) {
  MAGSD_DYNAMIC_SHARED(float, sums);
  const int t = threadIdx.x;
  if (!kFault && t == 0) sums[0] = 0;
  __syncthreads();
  if (t == 0) sums[0] += in[1];
  __syncthreads();
  out[t] = in[t] * sums[0];
}

template <bool kFault>
__global__ void lanes_without_syncwarp(const float* in, float* out) {
  const int t = threadIdx.x;
  out[t] = in[t];
  if (!kFault) __syncwarp();
  const float other = out[t ^ 1];
  if (!kFault) __syncwarp();
  out[t] = other;
}

template <bool kFault>
__global__ void shared_read_past_the_end(const float* in, float* out) {
  MAGSD_SHARED(float, tile, [kThreads]);
  const int t = threadIdx.x;
  tile[t] = in[t];
  __syncthreads();
  const float* const start = tile;
  out[t] = kFault ? start[t + 1] : start[(t + 1) % kThreads];
}

template <bool kFault>
__global__ void shared_write_before_the_start(const float* in, float* out) {
  MAGSD_SHARED(float, tile, [kThreads]);
  float* const start = tile;
  const int t = threadIdx.x;
  start[kFault ? t - 1 : t] = in[t];
  __syncthreads();
  out[t] = tile[t];
}

template <bool kFault>
__global__ void dynamic_shared_past_the_end(const float* in, float* out) {
  MAGSD_DYNAMIC_SHARED(float, some);  // 16 of them
  const int t = threadIdx.x;
  if (t < (kFault ? 17 : 16)) some[t] = in[t];
  __syncthreads();
  out[t] = t < 16 ? some[t] : in[t];
}

template <bool kFault>
__global__ void global_read_past_the_end(const float* in, float* out) {
  const int t = threadIdx.x;
  out[t] = in[kFault ? t + 1 : (t + 1) % kThreads];
}

template <bool kFault>
__global__ void global_write_past_the_end(const float* in, float* out) {
  const int t = threadIdx.x;
  out[kFault ? t + 1 : t] = in[t];
}

template <bool kFault>
__global__ void misaligned_float4(const float* in, float* out) {
  const int t = threadIdx.x;
  if (t % 4 != 0) return;
  const float4& four = *reinterpret_cast<const float4*>(in + (kFault && t + 4 < kThreads) + t);
  *reinterpret_cast<float4*>(out + t) = four;
}

template <bool kFault>
__global__ void barrier_that_some_skip(const float* in, float* out) {
  const int t = threadIdx.x;
  if (!kFault || t != 5) __syncthreads();
  out[t] = in[t];
}

template <bool kFault>
__global__ void barrier_after_some_have_left(const float* in, float* out) {
  const int t = threadIdx.x;
  out[t] = in[t];
  if (kFault && t >= 64) return;
  __syncthreads();
}

template <bool kFault>
__global__ void barriers_at_two_places(const float* in, float* out) {
  const int t = threadIdx.x;
  if (kFault && t % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[t] = in[t];
}

template <bool kFault>
__global__ void shuffle_that_some_skip(const float* in, float* out) {
  const int t = threadIdx.x;
  float value = in[t];
  if (!kFault || t % 32 != 31) value = __shfl_xor_sync(kAll, value, 1);
  out[t] = __shfl_xor_sync(kAll, value, 1);
}

template <bool kFault>
__global__ void shuffle_in_a_loop_of_unequal_length(const float* in, float* out) {
  const int t = threadIdx.x;
  float value = in[t];
  for (int i = 0; i < (kFault ? 1 + t % 3 : 2); ++i) value = __shfl_xor_sync(kAll, value, 1);
  out[t] = value;
}

template <bool kFault>
__global__ void mask_of_half_a_warp(const float* in, float* out) {
  const int t = threadIdx.x;
  const float other = __shfl_xor_sync(kFault ? 0xffffu : kAll, in[t], 1);
  out[t] = __shfl_xor_sync(kAll, other, 1);
}

template <bool kFault>
__global__ void lanes_at_two_functions(const float* in, float* out) {
  const int t = threadIdx.x;
  out[t] = in[t];
  if (kFault && t % 32 < 16) {
    out[t] += static_cast<float>(__ballot_sync(kAll, 0));
  } else {
    out[t] += static_cast<float>(__shfl_sync(kAll, 0, 0));
  }
}

template <bool kFault>
__global__ void lanes_exchange_two_types(const float* in, float* out) {
  const int t = threadIdx.x;
  out[t] = in[t];
  const auto zero = [](auto value) { return static_cast<float>(__shfl_sync(kAll, value, 0)); };
  out[t] += kFault && t % 2 == 0 ? zero(0.0) : zero(0.0f);
}

__global__ void copy(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x]; }

template <bool kFault>
__global__ void too_much_shared(const float* in, float* out) {
  MAGSD_SHARED(float, large, [kFault ? 12289 : 12288]);
  large[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = large[threadIdx.x];
}

// Beside 226 KB of dynamic shared memory.
template <bool kFault>
__global__ void too_much_shared_of_both_kinds(const float* in, float* out) {
  MAGSD_SHARED(float, some, [kFault ? 257 : 256]);
  some[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = some[threadIdx.x];
}

// Adds the running number of the block to what the block before it wrote.
template <bool kFault>
__global__ void blocks_in_order(const float* in, float* out) {
  if (threadIdx.x != 0) return;
  const unsigned b = blockIdx.x;
  if (kFault) {
    out[b] = in[b] + (b == 0 ? 0.0f : out[b - 1]);
    return;
  }
  out[b] = 0;
  for (unsigned i = 0; i <= b; ++i) out[b] += in[i];
}

// Clusters of three blocks and of eight, each with its part of `out`, called as kernel(in, out);
// whether out[i] is what lies `further` on, around the cluster.
constexpr int kBlockThreads = 32, kHere = 0, kNextBlock = kBlockThreads;
bool one_cluster(Kernel kernel, int further) {
  for (const int blocks : {3, simt::kMostClusterBlocks}) {
    const int threads = blocks * kBlockThreads;
    const std::vector<float> in = ramp(threads);
    std::vector<float> out(threads, -1.0f);
    simt::launch({dim3(static_cast<unsigned>(blocks)), kBlockThreads, 64, blocks},
                 [&] { kernel(in.data(), out.data()); });
    for (int i = 0; i < threads; ++i) {
      if (out[i] != in[(i + further) % threads]) return false;
    }
  }
  return true;
}
int cluster_index() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }
int cluster_blocks() { return static_cast<int>(simt::position().cluster_size); }
int next_rank() { return static_cast<int>(simt::position().cluster_rank + 1) % cluster_blocks(); }

void cluster_arrive(simt::Line line = simt::Line::of_call()) {
  simt::cluster_arrive({"cluster_arrive", line.number});
}
void cluster_barrier(simt::Line line = simt::Line::of_call()) {
  cluster_arrive(line);
  simt::cluster_wait();
}

template <typename T>
T& at_peer(T& mine, int rank) {
  return *static_cast<T*>(simt::peer_shared(&mine, rank));
}

// Every block takes what the next one of its cluster put into its shared memory.
template <bool kFault>
__global__ void peer_read_before_a_barrier(const float* in, float* out) {
  MAGSD_SHARED(float, tile, [kThreads]);
  const int t = threadIdx.x, i = cluster_index();
  tile[t] = in[i];
  if (!kFault) cluster_barrier();
  out[i] = at_peer(tile[t], next_rank());
  cluster_barrier();
}

template <bool kFault>
__global__ void peer_read_behind_a_barrier_of_the_block(const float* in, float* out) {
  MAGSD_DYNAMIC_SHARED(float, tile);
  const int t = threadIdx.x, i = cluster_index();
  if (t < 16) tile[t] = in[i];
  if (kFault) {
    __syncthreads();
  } else {
    cluster_barrier();
  }
  const int next = (i + kNextBlock) % static_cast<int>(gridDim.x * blockDim.x);
  out[i] = t < 16 ? at_peer(tile[t], next_rank()) : in[next];
  cluster_barrier();
}

template <bool kFault>
__global__ void peer_that_ends_while_it_is_read(const float* in, float* out) {
  MAGSD_SHARED(float, tile, [kThreads]);
  const int t = threadIdx.x, i = cluster_index();
  tile[t] = in[i];
  cluster_barrier();
  out[i] = at_peer(tile[t], next_rank());
  if (!kFault) cluster_barrier();
}

template <bool kFault>
__global__ void peer_write_after_read(const float* in, float* out) {
  MAGSD_SHARED(float, tile, [kThreads]);
  const int t = threadIdx.x, i = cluster_index();
  float value = in[i];
  const int rounds = cluster_blocks() + 1;  // around the cluster and one block on
  for (int round = 0; round < rounds; ++round) {
    tile[t] = value;
    cluster_barrier();
    value = at_peer(tile[t], next_rank());
    if (!kFault || round == rounds - 1) cluster_barrier();
  }
  out[i] = value;
}

template <bool kFault>
__global__ void peer_out_of_range(const float* in, float* out) {
  MAGSD_SHARED(float, tile, [kThreads]);
  const int t = threadIdx.x, i = cluster_index();
  tile[t] = in[i];
  cluster_barrier();
  const int rank = static_cast<int>(simt::position().cluster_rank) + 1;
  out[i] = at_peer(tile[t], kFault ? rank : rank % cluster_blocks());
  cluster_barrier();
}

template <bool kFault>
__global__ void peer_of_global_memory(const float* in, float* out) {
  MAGSD_SHARED(float, tile, [kThreads]);
  const int t = threadIdx.x, i = cluster_index();
  tile[t] = in[i];
  cluster_barrier();
  out[i] = at_peer(kFault ? out[t] : tile[t], next_rank());
  cluster_barrier();
}

template <bool kFault>
__global__ void peer_read_past_the_end(const float* in, float* out) {
  MAGSD_SHARED(float, tile, [kBlockThreads]);
  const int t = threadIdx.x, i = cluster_index();
  tile[t] = in[i];
  cluster_barrier();
  const float* const peer = &at_peer(tile[0], next_rank());
  out[i] = peer[kFault ? t + 1 : t];
  cluster_barrier();
}

template <bool kFault>
__global__ void cluster_barrier_that_a_block_skips(const float* in, float* out) {
  const int i = cluster_index();
  if (!kFault || blockIdx.x != 1) cluster_barrier();
  out[i] = in[i];
}

template <bool kFault>
__global__ void cluster_barrier_that_a_thread_skips(const float* in, float* out) {
  const int i = cluster_index();
  if (!kFault || i != 40) cluster_barrier();
  out[i] = in[i];
}

template <bool kFault>
__global__ void cluster_barriers_at_two_places(const float* in, float* out) {
  const int i = cluster_index();
  if (kFault && blockIdx.x == 1) {
    cluster_barrier();
  } else {
    cluster_barrier();
  }
  out[i] = in[i];
}

template <bool kFault>
__global__ void cluster_wait_without_arrival(const float* in, float* out) {
  const int i = cluster_index();
  if (!kFault || blockIdx.x != 1) cluster_arrive();
  simt::cluster_wait();
  out[i] = in[i];
}

template <bool kFault>
__global__ void cluster_arrival_twice(const float* in, float* out) {
  const int i = cluster_index();
  for (int arrival = 0; arrival < (kFault ? 2 : 1); ++arrival) cluster_arrive();
  simt::cluster_wait();
  out[i] = in[i];
}

template <bool kFault>
__global__ void cluster_arrival_without_wait(const float* in, float* out) {
  const int i = cluster_index();
  cluster_arrive();
  if (!kFault) simt::cluster_wait();
  out[i] = in[i];
}

template <bool kFault>
__global__ void misaligned_row_of_ldmatrix(const float* in, float* out) {
  MAGSD_SHARED(float4, rows, [2 * 32]);
  const int t = threadIdx.x, lane = t % 32;
  reinterpret_cast<float*>(&rows[2 * lane])[0] = in[t];
  __syncthreads();
  const char* row = reinterpret_cast<const char*>(&rows[2 * lane]) + (kFault && lane == 9 ? 4 : 0);
  unsigned matrices[4];
  simt::load_matrices(row, false, matrices, {"ldmatrix", 0});
  out[t] = in[t];
}

template <bool kFault>
__global__ void ldmatrix_past_the_end(const float* in, float* out) {
  MAGSD_SHARED(float4, rows, [32]);
  const int t = threadIdx.x, lane = t % 32;
  rows[lane] = {};
  __syncthreads();
  unsigned matrices[4];
  const float4* const first = rows;
  simt::load_matrices(first + lane + kFault, false, matrices, {"ldmatrix", 0});
  out[t] = in[t];
}

// Several launches: with few blocks some run in the lucky order.
template <bool kFault>
bool order_of_blocks(int count) {
  const std::vector<float> in = ramp(count);
  bool right = true;
  for (int launch = 0; launch < 8; ++launch) {
    std::vector<float> out(count, -1.0f);
    simt::launch({static_cast<unsigned>(count), 32},
                 [&] { blocks_in_order<kFault>(in.data(), out.data()); });
    for (int b = 0; b < count; ++b) right &= out[b] == static_cast<float>(b * (b + 1) / 2);
  }
  return right;
}

// A fault ends the launch; the next one, on the same stacks, must not notice.
template <bool kFault>
bool launch_after_a_refused_one() {
  try {
    if (kFault) one_block(barrier_that_some_skip<true>, same);
  } catch (const std::runtime_error&) {
  }
  return one_block(write_after_read<false>, [](int i) { return neighbor((i + 2) % kThreads); });
}

// What the shim offers. A thread counts in `wrong` what is not as CUDA has it.
__global__ void offers(const float* aligned, int* counters, int* wrong) {
  MAGSD_SHARED(int, tile, [2][kThreads]);
  MAGSD_DYNAMIC_SHARED(double, dynamic);
  const int t = threadIdx.x, lane = t % 32;
  const auto require = [&](bool holds) { *wrong += !holds; };
  require(blockDim.x == kThreads && gridDim.x == 3 && gridDim.y == 2 && blockIdx.x < 3);

  require(__shfl_sync(kAll, t, 7) == t - lane + 7);
  require(__shfl_sync(kAll, t, 33) == t - lane + 1 && __shfl_sync(kAll, t, -1) == t - lane + 31);
  require(__shfl_up_sync(kAll, t, 3) == (lane < 3 ? t : t - 3));
  require(__shfl_down_sync(kAll, t, 3) == (lane > 28 ? t : t + 3));
  require(__shfl_xor_sync(kAll, 0.5 * t, 5) == 0.5 * (t - lane + (lane ^ 5)));
  const float4 four = __shfl_xor_sync(kAll, float4{1, 2, 3, static_cast<float>(t)}, 1);
  require(four.z == 3 && four.w == static_cast<float>(t ^ 1));
  int sum = t;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  require(sum == 32 * (t - lane) + 31 * 16);

  require(__ballot_sync(kAll, lane % 2) == 0xaaaaaaaau);
  require(__any_sync(kAll, lane == 9) == 1 && __any_sync(kAll, 0) == 0);
  require(__all_sync(kAll, 2) == 1 && __all_sync(kAll, lane != 9) == 0);
  require(__syncthreads_or(t == 70) == 1 && __syncthreads_or(0) == 0);

  tile[1][t] = t;
  dynamic[t] = 2.0 * t;
  require(reinterpret_cast<std::uintptr_t>(dynamic) % 16 == 0);
  __syncthreads();
  require(tile[1][kThreads - 1 - t] == kThreads - 1 - t);
  require(dynamic[kThreads - 1 - t] == 2.0 * (kThreads - 1 - t));

  atomicAdd(counters, 1);
  atomicMax(counters + 1, t);
  atomicMin(counters + 2, t);
  const float4 loaded = __ldg(reinterpret_cast<const float4*>(aligned) + t % 4);
  require(loaded.y == static_cast<float>(4 * (t % 4) + 1));
  require(__float_as_uint(1.0f) == 0x3f800000u && __uint_as_float(0x40000000u) == 2.0f);
  require(__ffs(8) == 4 && __clz(1) == 31 && __popc(0xf0u) == 4);
}

bool everything_offered() {
  std::vector<float4> aligned(4);
  float* entries = &aligned[0].x;
  for (int i = 0; i < 16; ++i) entries[i] = static_cast<float>(i);
  std::vector<int> counters = {0, -1, kThreads};
  int wrong = 0;
  simt::launch({dim3(3, 2), kThreads, kThreads * sizeof(double)},
               [&] { offers(entries, counters.data(), &wrong); });
  return wrong == 0 && counters == std::vector<int>{6 * kThreads, kThreads - 1, 0};
}

// Row r of matrix i holds 64 i + 8 r + column; and what a cluster is told of itself.
__global__ void offers_of_newer_gpus(unsigned cluster, int* wrong) {
  MAGSD_SHARED(uint16_t, rows, [32][8]);
  MAGSD_SHARED(unsigned, rank, [1]);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const auto require = [&](bool holds) { *wrong += !holds; };
  for (int column = 0; column < 8; ++column) {
    rows[lane][column] = static_cast<uint16_t>(8 * lane + column);
  }
  __syncthreads();
  for (const bool transposed : {false, true}) {
    unsigned matrices[4];
    simt::load_matrices(rows[lane], transposed, matrices, {"ldmatrix", 0});
    for (int i = 0; i < 4; ++i) {
      const int first = 64 * i + (transposed ? 8 * 2 * t + g : 8 * g + 2 * t);
      require(matrices[i] % 65536 == static_cast<unsigned>(first));
      require(matrices[i] / 65536 == static_cast<unsigned>(first + (transposed ? 8 : 1)));
    }
  }
  rank[0] = blockIdx.x % cluster;
  require(simt::position().cluster_size == cluster && simt::position().cluster_rank == rank[0]);
  require(gridDim.x == 3 * cluster && gridDim.y == 2 && blockDim.x == 32);
  // Two barriers, the first of which ends while some have not left it.
  for (int round = 0; round < 2; ++round) cluster_barrier();
  for (unsigned i = 0; i < cluster; ++i) require(at_peer(rank[0], static_cast<int>(i)) == i);
  cluster_barrier();
}

bool everything_of_newer_gpus() {
  int wrong = 0;
  for (const unsigned cluster : {2u, 8u}) {
    simt::launch({dim3(3 * cluster, 2), 32, 0, static_cast<int>(cluster)},
                 [&] { offers_of_newer_gpus(cluster, &wrong); });
  }
  return wrong == 0 && simt::capability() == 90;
}

bool launch_of(dim3 grid, int threads, std::size_t shared, int cluster = 1) {
  int ran = 0;
  simt::launch({grid, threads, shared, cluster}, [&] { ++ran; });
  return ran == static_cast<int>(grid.x * grid.y * grid.z) * threads;
}

float third_neighbor(int i) { return static_cast<float>((i + 3) % kThreads); }

#define BOTH(name, wanted) \
  {#name, [](bool fault) { return one_block(fault ? name<true> : name<false>, wanted); }}

#define OF_CLUSTER(name, further) \
  {#name, [](bool fault) { return one_cluster(fault ? name<true> : name<false>, further); }}

const std::map<std::string, std::function<bool(bool)>> kCases = {
    BOTH(read_after_write, neighbor),
    BOTH(write_after_read, third_neighbor),
    BOTH(read_before_anyone_wrote, same),
    BOTH(lanes_without_syncwarp, [](int i) { return static_cast<float>(i ^ 1); }),
    BOTH(shared_read_past_the_end, neighbor),
    BOTH(shared_write_before_the_start, same),
    BOTH(dynamic_shared_past_the_end, same),
    BOTH(global_read_past_the_end, neighbor),
    BOTH(global_write_past_the_end, same),
    BOTH(misaligned_float4, same),
    BOTH(barrier_that_some_skip, same),
    BOTH(barrier_after_some_have_left, same),
    BOTH(barriers_at_two_places, same),
    BOTH(shuffle_that_some_skip, same),
    BOTH(shuffle_in_a_loop_of_unequal_length, same),
    BOTH(mask_of_half_a_warp, same),
    BOTH(lanes_at_two_functions, same),
    BOTH(lanes_exchange_two_types, same),
    BOTH(too_much_shared, same),
    {"too_much_shared_of_both_kinds",
     [](bool fault) {
       return one_block(
           fault ? too_much_shared_of_both_kinds<true> : too_much_shared_of_both_kinds<false>, same,
           kThreads, 226 * 1024);
     }},
    BOTH(misaligned_row_of_ldmatrix, same),
    BOTH(ldmatrix_past_the_end, same),
    OF_CLUSTER(peer_read_before_a_barrier, kNextBlock),
    OF_CLUSTER(peer_read_behind_a_barrier_of_the_block, kNextBlock),
    OF_CLUSTER(peer_that_ends_while_it_is_read, kNextBlock),
    OF_CLUSTER(peer_write_after_read, kNextBlock),
    OF_CLUSTER(peer_out_of_range, kNextBlock),
    OF_CLUSTER(peer_of_global_memory, kNextBlock),
    OF_CLUSTER(peer_read_past_the_end, kNextBlock),
    OF_CLUSTER(cluster_barrier_that_a_block_skips, kHere),
    OF_CLUSTER(cluster_barrier_that_a_thread_skips, kHere),
    OF_CLUSTER(cluster_barriers_at_two_places, kHere),
    OF_CLUSTER(cluster_wait_without_arrival, kHere),
    OF_CLUSTER(cluster_arrival_twice, kHere),
    OF_CLUSTER(cluster_arrival_without_wait, kHere),
    {"cluster_too_large", [](bool fault) { return launch_of(72, 32, 0, fault ? 9 : 8); }},
    {"cluster_that_does_not_divide_the_grid",
     [](bool fault) { return launch_of(fault ? 10 : 12, 32, 0, 4); }},
    {"cluster_on_an_older_gpu",
     [](bool fault) {
       if (fault) magsd_emulate_capability(89);
       return launch_of(4, 32, 0, 4);
     }},
    {"block_of_no_whole_warps",
     [](bool fault) { return one_block(copy, same, fault ? kThreads - 16 : kThreads); }},
    {"block_too_large", [](bool fault) { return launch_of(1, fault ? 1056 : 1024, 0); }},
    {"grid_too_large", [](bool fault) { return launch_of(dim3(1, fault ? 65536 : 9), 32, 0); }},
    {"grid_of_nothing", [](bool fault) { return launch_of(fault ? 0 : 1, 32, 0); }},
    {"dynamic_shared_too_large",
     [](bool fault) { return launch_of(1, 32, fault ? 232449 : 232448); }},
    {"order_of_2_blocks",
     [](bool fault) { return fault ? order_of_blocks<true>(2) : order_of_blocks<false>(2); }},
    {"order_of_9_blocks",
     [](bool fault) { return fault ? order_of_blocks<true>(9) : order_of_blocks<false>(9); }},
    {"launch_after_a_refused_one",
     [](bool fault) {
       return fault ? launch_after_a_refused_one<true>() : launch_after_a_refused_one<false>();
     }},
    {"launch_after_a_refused_cluster",
     [](bool fault) {
       try {
         if (fault) one_cluster(cluster_barrier_that_a_thread_skips<true>, kHere);
       } catch (const std::runtime_error&) {
       }
       return one_cluster(peer_write_after_read<false>, kNextBlock) &&
              one_block(write_after_read<false>, third_neighbor);
     }},
    {"everything_offered", [](bool) { return everything_offered(); }},
    {"everything_of_newer_gpus", [](bool) { return everything_of_newer_gpus(); }},
};

}  // namespace

int main(int count, char** words) {
  if (count != 3) return 12;
  try {
    return kCases.at(words[1])(words[2] == std::string("1")) ? 0 : 10;
  } catch (const std::runtime_error& refusal) {
    std::fprintf(stderr, "%s\n", refusal.what());
    return 11;
  }
}
