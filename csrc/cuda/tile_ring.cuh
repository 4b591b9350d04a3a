// Streams the tiles of a packed codebook through shared memory, for the wgmma searches.
//
// A block takes units of work (search.h: unit = blockIdx.x, + blocks, ...), and each of its warps reads all tiles of a
// unit. Thread 0 loads them, kStageTiles at a time, into a ring of kStages stages by bulk copies. It stays kLag stages
// short of filling the ring, so it hardly ever waits for the slowest warp. A warp only for the copies would take
// registers from all others.
#pragma once

#include "codebook.cuh"
#include "ptx.cuh"

namespace semhitok::cuda {

template <int kTileBytes, int kStageTiles, int kStages>
class TileRing {
  static_assert(kStages >= 2, "a stage is loaded while another is used");
  static_assert(kTileBytes % kCoreMatrixBytes == 0, "every tile begins at a core matrix");
  static constexpr int kStageBytes = kTileBytes * kStageTiles;
  static constexpr int kLag = kStages / 2;

 public:
  static constexpr int kTilesPerStage = kStageTiles, kSharedBytes = kStages * kStageBytes;
  struct Barriers {
    uint64_t full[kStages], empty[kStages];
  };

  // Called by all threads of the block, which has `warps` warps.
  __device__ __forceinline__ TileRing(Barriers& barriers, const char* codes, const Shares& shares, int tiles,
                                      int blocks, int warps)
      : barriers_(barriers), stages_(dynamic_shared()), codes_(codes), shares_(shares), tiles_(tiles), blocks_(blocks) {
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages; ++s) {
        barrier_init(&barriers_.full[s], 1);
        barrier_init(&barriers_.empty[s], warps);
      }
      barrier_init_fence();
    }
    __syncthreads();
    next_unit_ = static_cast<int>(blockIdx.x) - blocks_;
    next_tile_ = next_end_ = 0;
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages - kLag; ++s) load_next();
    }
  }

  // Called by whole warps: returns the address of the next stage's tiles.
  __device__ __forceinline__ const char* wait() {
    if (threadIdx.x == 0) load_next();
    __syncwarp();
    barrier_wait(&barriers_.full[stage_], round_);
    return stages_ + stage_ * kStageBytes;
  }

  // Called by whole warps when they are done with the stage from wait().
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(&barriers_.empty[stage_]);
    if (++stage_ == kStages) stage_ = 0, round_ ^= 1;
  }

 private:
  __device__ __forceinline__ void load_next() {
    if (next_tile_ == next_end_) {
      next_unit_ += blocks_;
      if (next_unit_ >= shares_.row_tiles * shares_.splits) {
        next_unit_ -= blocks_;  // stays at the end
        return;
      }
      next_tile_ = next_unit_ % shares_.splits * shares_.tiles_per_split;
      next_end_ = min(next_tile_ + shares_.tiles_per_split, tiles_);
    }
    const int count = min(kStageTiles, next_end_ - next_tile_);
    barrier_wait(&barriers_.empty[next_stage_], next_round_ ^ 1);  // no wait in the first round
    barrier_arrive_expect(&barriers_.full[next_stage_], count * kTileBytes);
    copy_bulk(stages_ + next_stage_ * kStageBytes, codes_ + static_cast<int64_t>(next_tile_) * kTileBytes,
              count * kTileBytes, &barriers_.full[next_stage_]);
    next_tile_ += count;
    if (++next_stage_ == kStages) next_stage_ = 0, next_round_ ^= 1;
  }

  Barriers& barriers_;
  char* stages_;
  const char* codes_;
  Shares shares_;
  int tiles_, blocks_;
  int stage_ = 0, next_stage_ = 0;
  uint32_t round_ = 0, next_round_ = 0;  // parity of the number of rounds through the ring
  int next_unit_, next_tile_, next_end_;
};

}  // namespace semhitok::cuda
