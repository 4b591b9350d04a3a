// The tiles of a packed codebook on their way through shared memory, for the wgmma searches.
//
// A block goes over its units of work (search.h: unit = blockIdx.x, + blocks, ...), and every warp of it over all tiles
// of each. Thread 0 brings them, kStageTiles at a time, into a ring of kStages stages by bulk copies; kLag stages are
// left between what is brought and what is used, so that it hardly ever waits for the slowest warp. A warp for the
// copies alone would take registers from all others.
#pragma once

#include "codebook.cuh"
#include "ptx.cuh"

namespace semhitok::cuda {

template <int kTileBytes, int kStageTiles, int kStages>
class TileRing {
  static_assert(kStages >= 2, "a stage is brought while another is used");
  static_assert(kTileBytes % kCoreMatrixBytes == 0, "every tile begins at a core matrix");
  static constexpr int kStageBytes = kTileBytes * kStageTiles;
  static constexpr int kLag = kStages / 2;

 public:
  static constexpr int kTilesPerStage = kStageTiles, kSharedBytes = kStages * kStageBytes;
  struct Barriers {
    uint64_t full[kStages], empty[kStages];
  };

  // By all threads of the block, whose number of warps is `warps`.
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
    coming_unit_ = static_cast<int>(blockIdx.x) - blocks_;
    coming_tile_ = coming_end_ = 0;
    if (threadIdx.x == 0) {
      for (int s = 0; s < kStages - kLag; ++s) bring();
    }
  }

  // By whole warps: the next stage's tiles are at the address returned.
  __device__ __forceinline__ const char* wait() {
    if (threadIdx.x == 0) bring();
    __syncwarp();
    barrier_wait(&barriers_.full[stage_], round_);
    return stages_ + stage_ * kStageBytes;
  }

  // By whole warps: done with the stage that wait() gave.
  __device__ __forceinline__ void release() {
    __syncwarp();
    if (threadIdx.x % kWarp == 0) barrier_arrive(&barriers_.empty[stage_]);
    if (++stage_ == kStages) stage_ = 0, round_ ^= 1;
  }

 private:
  __device__ __forceinline__ void bring() {
    if (coming_tile_ == coming_end_) {
      coming_unit_ += blocks_;
      if (coming_unit_ >= shares_.row_tiles * shares_.splits) {
        coming_unit_ -= blocks_;  // and stays at the end
        return;
      }
      coming_tile_ = coming_unit_ % shares_.splits * shares_.tiles_per_split;
      coming_end_ = min(coming_tile_ + shares_.tiles_per_split, tiles_);
    }
    const int count = min(kStageTiles, coming_end_ - coming_tile_);
    barrier_wait(&barriers_.empty[coming_stage_], coming_round_ ^ 1);  // the first time round there is no wait
    barrier_arrive_expect(&barriers_.full[coming_stage_], count * kTileBytes);
    copy_bulk(stages_ + coming_stage_ * kStageBytes, codes_ + static_cast<int64_t>(coming_tile_) * kTileBytes,
              count * kTileBytes, &barriers_.full[coming_stage_]);
    coming_tile_ += count;
    if (++coming_stage_ == kStages) coming_stage_ = 0, coming_round_ ^= 1;
  }

  Barriers& barriers_;
  char* stages_;
  const char* codes_;
  Shares shares_;
  int tiles_, blocks_;
  int stage_ = 0, coming_stage_ = 0;
  uint32_t round_ = 0, coming_round_ = 0;  // parity of how often the ring was gone round
  int coming_unit_, coming_tile_, coming_end_;
};

}  // namespace semhitok::cuda
