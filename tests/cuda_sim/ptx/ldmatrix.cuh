// Host version of cuda/ptx/ldmatrix.cuh.
#pragma once

#include <cstring>

#include "sim.h"

namespace sage::ptx {

template <int kMatrices>
void sim_ldmatrix(const char* name, uint32_t (&r)[kMatrices], uint32_t address, bool transpose) {
  struct Operands {
    uint32_t address;
    uint32_t* r;
  } mine = {address, r};
  sim::warp_collective(name, &mine, [=](void** lanes) {
    for (int matrix = 0; matrix < kMatrices; ++matrix) {
      uint16_t rows[8][8];
      for (int row = 0; row < 8; ++row) {
        const uint32_t from = static_cast<Operands*>(lanes[8 * matrix + row])->address;
        memcpy(rows[row], sim::shared_at(name, from, 16, 16), 16);
      }
      for (int lane = 0; lane < 32; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const uint32_t low = transpose ? rows[2 * t][g] : rows[g][2 * t];
        const uint32_t high = transpose ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
        static_cast<Operands*>(lanes[lane])->r[matrix] = low | high << 16;
      }
    }
  });
}

inline void ldmatrix_x1(uint32_t (&r)[1], uint32_t a) { sim_ldmatrix("ldmatrix_x1", r, a, false); }
inline void ldmatrix_x2(uint32_t (&r)[2], uint32_t a) { sim_ldmatrix("ldmatrix_x2", r, a, false); }
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t a) { sim_ldmatrix("ldmatrix_x4", r, a, false); }
inline void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t a) {
  sim_ldmatrix("ldmatrix_x2_trans", r, a, true);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a) {
  sim_ldmatrix("ldmatrix_x4_trans", r, a, true);
}

}  // namespace sage::ptx
