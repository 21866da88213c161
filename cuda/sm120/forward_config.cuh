// Sizes, shared-memory map and barriers of the FP4 forward kernel.
#pragma once

#include "common/mask.cuh"
#include "common/params_fp4.h"
#include "common/tile.cuh"

namespace sage::sm120 {

// What consumers need of a row block. In shared memory, because registers are dear.
template <int kGroups>
struct WorkSlot {
  Mask mask;
  int row;      // its first query
  int channel;  // the first of its outputs
  float value_tensor;
  const float* value_means;   // of all channels
  float multiplier[kGroups];  // from products to the log2 domain
};

// What consumers need of a tile of keys: its first, and what each group of 64 rows sees of each half.
struct alignas(8) TileNote {
  int key;
  uint32_t view;  // bit 2·group + half: everything; 8 above it: something, see TileView; and these:
};
inline constexpr uint32_t kEnds = 1u << 31;  // the last tile of its row block
inline constexpr uint32_t kStop = 1u << 30;  // no tile: the stream has ended
inline constexpr int kSlotBit = 16;          // the slot of its row block

template <int kHeadDim_, int kConsumers_>
struct ForwardConfig {
  static constexpr int kHeadDim = kHeadDim_, kConsumers = kConsumers_;
  static_assert(kHeadDim == 64 || kHeadDim == 128 || kHeadDim == 256, "docs/abi.md pads to these");
  // Output channels of a block. Fewer than all: more blocks, which compute the scores again.
  static constexpr int kChannels = kHeadDim < 128 ? kHeadDim : 128;
  static constexpr int kSplits = kHeadDim / kChannels;
  // Twelve consumers need more registers than their share of the file: a whole warpgroup of loaders, of which
  // one warp works, hands its own over.
  static constexpr bool kMovesRegisters = kConsumers == 12;
  static constexpr int kProducerRegisters = 56, kConsumerRegisters = 152;
  static_assert(kProducerRegisters + 3 * kConsumerRegisters == 4 * 128, "512 threads start with 128");
  static constexpr int kThreads = (kConsumers + (kMovesRegisters ? 4 : 1)) * kWarpSize;
  static constexpr int kRows = 16 * kConsumers;
  static constexpr int kGroups = kRows / 64;
  static_assert(kRows % 64 == 0 && kGroups <= 4, "see TileNote");
  static constexpr int kHalfKeys = kTileKeys, kKeys = 2 * kHalfKeys;
  static constexpr int kSteps = kHeadDim / 64;          // products along the channels of Q and K
  static constexpr int kKeyScaleBytes = kHeadDim / 16;  // of a key

  // --------------------------------------------------------------------------- shared-memory map
  // kStages × { K codes [keys][Hp/2] | V codes [channels][keys/2] | K scales [keys][Hp/16] |
  // V scales [channels][2][4] | ΔS [groups][keys] } | notes of tiles | slots of row blocks | barriers
  using KeyTile = SharedTile<kKeys, kHeadDim / 2>;
  using ValueTile = SharedTile<kChannels, kKeys / 2>;
  static constexpr int kValuesAt = KeyTile::kBytes;
  static constexpr int kKeyScalesAt = kValuesAt + ValueTile::kBytes;
  static constexpr int kValueScalesAt = kKeyScalesAt + kKeys * kKeyScaleBytes;
  static constexpr int kDeltaAt = kValueScalesAt + 8 * kChannels;
  static constexpr int kAlignment = 1024;  // of tiles, for the swizzle
  static constexpr int kStageBytes =
      (kDeltaAt + kGroups * 4 * kKeys + kAlignment - 1) / kAlignment * kAlignment;
  static constexpr int kStages = kHeadDim == 256 ? 2 : 4, kSlots = 2;
  using Slot = WorkSlot<kGroups>;
  static constexpr int kNotesAt = kStages * kStageBytes;
  static constexpr int kSlotsAt = kNotesAt + kStages * static_cast<int>(sizeof(TileNote));
  static_assert(alignof(Slot) == 8, "slots follow each other");
  static constexpr int kBarriersAt = kSlotsAt + kSlots * static_cast<int>(sizeof(Slot));
  static constexpr size_t kSharedBytes = kBarriersAt + 8 * (2 * kStages + kSlots);
  static_assert(kSharedBytes <= 99 * 1024, "what an sm_120 offers a block");

  // Lane 4g + t of the product of 32 columns, taken in the order of load_b16_interleaved(), brings the scales
  // of column g of the t-th eight. They lie in the order of lanes: here is where those of column c are.
  static __device__ int scale_place(int c) { return 4 * (c / 8 * 2 + c % 2) + c / 2 % 4; }
  // Lane t starts from ΔS of columns 8t ... 8t + 7, which it reads as two vectors, the four lanes side by side.
  static __device__ int delta_place(int c) { return 16 * (c / 4 % 2) + 4 * (c / 8) + c % 4; }

  static __device__ TileNote* notes(unsigned char* shared) {
    return reinterpret_cast<TileNote*>(shared + kNotesAt);
  }
  static __device__ Slot* slots(unsigned char* shared) {
    return reinterpret_cast<Slot*>(shared + kSlotsAt);
  }
  static __device__ int full(int stage) { return kBarriersAt + 8 * stage; }
  static __device__ int empty(int stage) { return full(stage) + 8 * kStages; }
  static __device__ int slot_empty(int slot) { return kBarriersAt + 16 * kStages + 8 * slot; }
};

}  // namespace sage::sm120
