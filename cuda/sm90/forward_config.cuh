// Sizes, shared-memory map and barriers of the forward kernel of Hopper.
#pragma once

#include <cstddef>

#include "common/params.h"
#include "common/scale.cuh"
#include "sm90/forward_stream.cuh"
#include "sm90/forward_values.cuh"

namespace sage::sm90 {

// `kInterpolates_`: where nobody asks for l, m or LSE, half of the exponentials are interpolated (forward_softmax.cuh).
template <class Values_, int kHeadDim_, bool kInterpolates_ = false>
struct ForwardConfig {
  using Values = Values_;
  static constexpr bool kInterpolates = kInterpolates_;
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(kHeadDim == 64 || kHeadDim == 128, "accumulators of more do not fit registers");

  // Consumer warpgroups, 64 rows each. Three where output of 16 bits leaves registers for them: three warps a scheduler hide
  // each other's latencies, and then one buffer of probabilities is enough.
  static constexpr int kGroups = Values::kElementBytes == 1 ? 3 : 2;
  static constexpr int kBuffers = kGroups == 3 ? 1 : 2;
  // Accumulators of scores start at the bits of this float, which a product of constants puts there (no code of e4m3 is
  // large enough for the 1.5·2^23 of common/scale.cuh): an integer below 3.9 million in magnitude added to the bits adds
  // 1/kStartUnits of itself to the float.
  static constexpr float kStart = 32 * 224.0f * 224.0f, kStartUnits = 8.0f;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kThreads = 128 * (kGroups + 1);
  // Scores, output and probabilities, with 16-bit values two tiles of them, lie in registers at the same time.
  static constexpr int kKeys = Values::kElementBytes == 1 || kHeadDim == 64 ? 128 : 64;
  static constexpr int kSlots = 2;  // row blocks under way
  static constexpr int kProducerRegisters = 56;
  static constexpr int kConsumerRegisters = kGroups == 3 ? 152 : 224;
  static constexpr int kLaunchRegisters = kGroups == 3 ? 128 : 168;  // the most that kThreads leave to each
  static_assert(kProducerRegisters + kGroups * kConsumerRegisters <=
                    (kGroups + 1) * kLaunchRegisters,
                "a block has the registers that it was launched with");

  static constexpr int kScores = kKeys / 2;      // of a thread
  static constexpr int kProbabilities = kKeys / 16 * Values::kRegisters;  // registers of a thread

  // --------------------------------------------------------------------------- shared-memory map
  // operands of kStart | notes of tiles | slots of row blocks | barriers | kSlots × Q tile [kRows][kHeadDim] s8 |
  // kStages × K tile [kKeys][kHeadDim] s8 | kStages × V tile | a region a warp
  // (kStart's operands are 128 bytes, but compute-sanitizer takes all of their rows for different ones: 4096 bytes.)
  using Slot = WorkSlot<kRows>;
  static constexpr int kAlignment = 1024;  // of tiles and regions, for the swizzle
  static constexpr int kQueryBytes = kRows * kHeadDim;
  static constexpr int kKeyBytes = kKeys * kHeadDim;
  static constexpr int kValueBytes = kKeys * kHeadDim * Values::kElementBytes;
  static constexpr int kWarpBytes = 16 * kHeadDim * 2;  // sums of 16 rows, or outputs on their way to memory
  static constexpr int kRegionsBytes = 4 * kGroups * kWarpBytes;
  static constexpr int kStartBytes = 8 * 16;  // eight rows, 16 products long, of which all others are copies
  static constexpr int kSharedLimit = 227 * 1024;  // what an sm_90 offers a block
  static constexpr int before_tiles(int stages) {
    const int bytes = kStartBytes + stages * static_cast<int>(sizeof(TileNote) + 3 * 8) +
                      kSlots * static_cast<int>(sizeof(Slot) + 3 * 8);
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  static constexpr int shared_bytes(int stages) {
    return before_tiles(stages) + kSlots * kQueryBytes + stages * (kKeyBytes + kValueBytes) + kRegionsBytes;
  }
  static constexpr int most_stages() {
    int stages = 8;
    while (shared_bytes(stages) > kSharedLimit) --stages;
    return stages;
  }
  static constexpr int kStages = most_stages();
  static_assert(kStages >= 4, "the pipeline needs room");
  static constexpr int kStartAt = 0;
  static constexpr int kNotesAt = kStartAt + kStartBytes;
  static constexpr int kSlotsAt = kNotesAt + kStages * static_cast<int>(sizeof(TileNote));
  static constexpr int kBarriersAt = kSlotsAt + kSlots * static_cast<int>(sizeof(Slot));
  static constexpr int kQueriesAt = before_tiles(kStages);
  static constexpr int kKeysAt = kQueriesAt + kSlots * kQueryBytes;
  static constexpr int kValuesAt = kKeysAt + kStages * kKeyBytes;
  static constexpr int kRegionsAt = kValuesAt + kStages * kValueBytes;
  static constexpr size_t kSharedBytes = shared_bytes(kStages);
  static_assert(kKeyBytes % kAlignment == 0 && kValueBytes % kAlignment == 0 && kQueryBytes % kAlignment == 0 &&
                    kWarpBytes % kAlignment == 0 && kSlotsAt % alignof(Slot) == 0 && kBarriersAt % 8 == 0,
                "alignment");

  // By all threads of the block: the code of 224.
  static __device__ void write_start(unsigned char* shared) {
    if (threadIdx.x < kStartBytes / 4) reinterpret_cast<uint32_t*>(shared + kStartAt)[threadIdx.x] = 0x76767676u;
  }
  static __device__ int queries(int slot) { return kQueriesAt + slot * kQueryBytes; }
  static __device__ int keys(int stage) { return kKeysAt + stage * kKeyBytes; }
  static __device__ int values(int stage) { return kValuesAt + stage * kValueBytes; }
  static __device__ TileNote* notes(unsigned char* shared) {
    return reinterpret_cast<TileNote*>(shared + kNotesAt);
  }
  static __device__ unsigned char* warp_region(unsigned char* shared, int warp) {
    return shared + kRegionsAt + warp * kWarpBytes;
  }
  // l and m of a finished row, in place of the queries of its warp.
  static __device__ float2& finished(unsigned char* shared, int slot, int row) {
    return reinterpret_cast<float2*>(shared + queries(slot) + row / 16 * 16 * kHeadDim)[row % 16];
  }
  static __device__ Slot* slots(unsigned char* shared) {
    return reinterpret_cast<Slot*>(shared + kSlotsAt);
  }
  static __device__ int scale(int slot) {
    return kSlotsAt + slot * static_cast<int>(sizeof(Slot)) + static_cast<int>(offsetof(Slot, scale));
  }
  static __device__ int full(int stage) { return kBarriersAt + 8 * stage; }
  static __device__ int k_empty(int stage) { return full(stage) + 8 * kStages; }
  static __device__ int v_empty(int stage) { return full(stage) + 16 * kStages; }
  static __device__ int slot_full(int slot) { return kBarriersAt + 24 * kStages + 8 * slot; }
  static __device__ int slot_empty(int slot) { return slot_full(slot) + 8 * kSlots; }
  static __device__ int rows_done(int slot) { return slot_empty(slot) + 8 * kSlots; }
};

}  // namespace sage::sm90
