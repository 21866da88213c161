// Vectors of float32 and the number formats of docs/abi.md on them. Compiled once per instruction
// set.
//
// Nothing here depends on denormals: XLA's threads may flush them to zero.
#pragma once

#include "params.h"
#include "pool.h"
#include SAGE_ISA_HEADER

namespace sage::SAGE_ISA {

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kTiny = 0x1p-110f;  // groups whose largest magnitude is below this are zero

template <class V, class T>
inline V load(const T* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof(V));
  return vector;
}
template <class V, class T>
inline void store(T* to, V vector) {
  __builtin_memcpy(to, &vector, sizeof(V));
}
inline F loadf(const float* from) { return load<F>(from); }

inline F splat(float x) {
  return x - F{};
}  // not x + 0, which turns -0 into 0 and costs an addition
inline I splat_int(int32_t x) { return x - I{}; }
inline I bits_of(F x) { return (I)x; }
inline F from_bits(I x) { return (F)x; }
inline F to_float(I x) { return __builtin_convertvector(x, F); }
inline F absolute(F x) { return from_bits(bits_of(x) & 0x7fffffff); }

inline I lane_numbers() {
  I lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

inline F rotate(F x, int by) {
  I from;
  for (int i = 0; i < kLanes; ++i) from[i] = (i + by) % kLanes;
  return __builtin_shuffle(x, from);
}
inline float largest(F x) {
  for (int half = kLanes / 2; half > 0; half /= 2) x = max(x, rotate(x, half));
  return x[0];
}
template <int kHalf>
inline void halve_rows(F* rows) {
  if constexpr (kHalf > 0) {
    I low;
    for (int i = 0; i < kLanes; ++i)
      low[i] = i - i % (2 * kHalf) + i % kHalf + i / kHalf % 2 * kLanes;
    for (int i = 0; i < kHalf; ++i) {
      rows[i] = max(__builtin_shuffle(rows[i], rows[i + kHalf], low),
                    __builtin_shuffle(rows[i], rows[i + kHalf], low + kHalf));
    }
    halve_rows<kHalf / 2>(rows);
  }
}
// Lane i: the largest lane of rows[i], of kLanes rows, which are overwritten.
inline F largest_of_each(F* rows) {
  halve_rows<kLanes / 2>(rows);
  return rows[0];
}
inline float total(F x) {
  for (int half = kLanes / 2; half > 0; half /= 2) x = x + rotate(x, half);
  return x[0];
}

// To the nearest integer, ties to even, for |x| < 2^22.
inline F round_even(F x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

// To a grid of kBits mantissa bits after the leading one, whose smallest normal number is
// 2^kMinExponent: nearest, ties to even. Adding 1.5 times a power of two leaves exactly the wanted
// bits.
template <int kBits, int kMinExponent>
inline F round_to_grid(F x) {
  F power = from_bits(bits_of(x) & 0x7f800000);
  power = max(power, splat(kMinExponent < -126 ? 0x1p-126f : __builtin_ldexpf(1, kMinExponent)));
  F magic = power * __builtin_ldexpf(1.5f, 23 - kBits);
  return (x + magic) - magic;
}
// Saturating. A NaN stays NaN: min and max return their second argument when either is one.
inline F round_e4m3(F x) { return round_to_grid<3, -6>(min(splat(448), max(splat(-448), x))); }
inline F round_f16(F x) { return round_to_grid<10, -14>(x); }  // of |x| below f16's largest

inline I bf16_bits(F x) {  // nearest even, in the low halves; NaN stays NaN
  I bits = bits_of(x);
  I rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : splat_int(0x7fc0);
}
inline F round_bf16(F x) { return from_bits(bf16_bits(x) << 16); }

// The byte of x rounded to e4m3. Negative numbers that round to zero keep their sign.
inline I e4m3_code(F x) {
  F magnitude = absolute(round_e4m3(x));
  I normal = (bits_of(magnitude) >> 20) - (120 << 3);
  I subnormal = __builtin_convertvector(magnitude * 512.f, I);
  return (magnitude < 0x1p-6f ? subnormal : normal) | ((bits_of(x) >> 24) & 0x80);
}
inline F from_e4m3(I code) {
  I magnitude = code & 0x7f;
  F normal = from_bits((magnitude << 20) + (120 << 23));
  F value = magnitude < 8 ? to_float(magnitude) * 0x1p-9f : normal;
  return from_bits(bits_of(value) | ((code & 0x80) << 24));
}

// kLanes codes in memory. Moved to the place of f16's bits, they are f16 numbers 2^-8 times as
// large, which hardware widens; subnormal ones, too.
inline F load_e4m3(const uint8_t* from) {
  if constexpr (!kWidensF16) return from_e4m3(__builtin_convertvector(load<Bytes>(from), I));
  typedef int16_t SignedHalves __attribute__((vector_size(2 * kLanes)));
  SignedHalves codes = (SignedHalves) __builtin_convertvector(load<Bytes>(from), Halves);
  Halves bits = (Halves)(codes << 8 >> 1) & 0xbfff;
  return load_f16(reinterpret_cast<const uint16_t*>(&bits)) * 256.f;
}

// 2^x for x <= 127, relative error below 2e-7; 1 at 0; 0 below 2^-126. The polynomial is the
// minimax one on
// [-1/2, 1/2].
inline F exp2_fast(F x) {
  F clamped = max(x, splat(-126));
  F shifted = clamped + 0x1.8p23f;
  F f = clamped - (shifted - 0x1.8p23f);
  F y = multiply_add(f, splat(0x1.5bba14p-10f), splat(0x1.3cea88p-7f));
  y = multiply_add(y, f, splat(0x1.c6b752p-5f));
  y = multiply_add(y, f, splat(0x1.ebf9bcp-3f));
  y = multiply_add(y, f, splat(0x1.62e42ap-1f));
  y = multiply_add(y, f, splat(1));
  F power = from_bits(bits_of(y) + (bits_of(shifted) << 23));
  return x < -126.f ? F{} : power;
}

inline float power_of_two(int exponent) {  // -127 gives 0
  int32_t bits = (exponent + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, 4);
  return power;
}
inline int exponent_of(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return (bits >> 23 & 0xff) - 127;
}
inline bool is_nan(float x) { return x != x; }

struct Group {  // the scale of a group whose largest magnitude is known
  float scale, inverse;
  Group(float amax, float limit) {
    bool zero = amax < kTiny;
    scale = zero ? 0.f : amax * (1.f / limit);
    inverse = zero ? 0.f : limit / amax;
  }
};

inline F int8_values(F x, F inverse) {  // codes, still as floats
  return min(max(round_even(x * inverse), splat(-127)), splat(127));
}
inline void store_codes(int8_t* to, F codes) {
  store(to, __builtin_convertvector(__builtin_convertvector(codes, I), SignedBytes));
}
inline F load_codes(const int8_t* from) {
  return to_float(__builtin_convertvector(load<SignedBytes>(from), I));
}

inline F load_bf16(const uint16_t* from) {
  return from_bits(__builtin_convertvector(load<Halves>(from), I) << 16);
}
inline void store_bf16(uint16_t* to, F x) {
  store(to, __builtin_convertvector(bf16_bits(x), Halves));
}

template <class Load>
inline void load_row_as(float* to, const char* from, int64_t size, int64_t H, int64_t Hp,
                        Load load_one) {
  int64_t h = 0;
  for (; h + kLanes <= H; h += kLanes) store(to + h, load_one(from + h * size));
  for (; h < Hp; h += kLanes) {
    char tail[4 * kLanes] = {};
    if (h < H) __builtin_memcpy(tail, from + h * size, (H - h) * size);
    store(to + h, load_one(tail));
  }
}

// A row of H numbers of any float type as float32, zero-padded to Hp (a multiple of kLanes).
inline void load_row(float* to, Array from, int64_t offset, int64_t H, int64_t Hp) {
  const char* data = static_cast<const char*>(from.data);
  auto halves = [](const char* at) { return reinterpret_cast<const uint16_t*>(at); };
  if (from.dtype == DType::f32) {
    load_row_as(to, data + 4 * offset, 4, H, Hp, [](const char* at) { return load<F>(at); });
  } else if (from.dtype == DType::bf16) {
    load_row_as(to, data + 2 * offset, 2, H, Hp,
                [&](const char* at) { return load_bf16(halves(at)); });
  } else {
    load_row_as(to, data + 2 * offset, 2, H, Hp,
                [&](const char* at) { return load_f16(halves(at)); });
  }
}

// The inverse: rounds H of the padded float32 numbers to the result's type.
inline void store_row(Result to, int64_t offset, const float* from, int64_t H) {
  int64_t size = to.dtype == DType::f32 ? 4 : 2;
  char* data = static_cast<char*>(to.data) + offset * size;
  for (int64_t h = 0; h < H; h += kLanes) {
    char tail[4 * kLanes];
    char* target = h + kLanes > H ? tail : data + h * size;
    F x = loadf(from + h);
    if (to.dtype == DType::f32) store(target, x);
    else if (to.dtype == DType::bf16) store_bf16(reinterpret_cast<uint16_t*>(target), x);
    else store_f16(reinterpret_cast<uint16_t*>(target), x);
    if (target == tail) __builtin_memcpy(data + h * size, tail, (H - h) * size);
  }
}

// ‖x‖, where x(h) gives the lanes from channel h on. Squares are taken relative to the largest entry,
// so that those of tiny values do not underflow.
template <class Row>
inline float norm(int64_t Hp, Row x) {
  F top{}, sum{};
  for (int64_t h = 0; h < Hp; h += kLanes) top = max(top, absolute(x(h)));
  float largest_entry = largest(top);
  if (largest_entry < kTiny) return 0;
  F inverse = splat(1 / largest_entry);
  for (int64_t h = 0; h < Hp; h += kLanes) {
    F y = x(h) * inverse;
    sum += y * y;
  }
  return largest_entry * __builtin_sqrtf(total(sum));
}

inline bool all_finite(const float* row, int64_t count) {
  I largest_bits{};
  for (int64_t h = 0; h < count; h += kLanes) {
    I bits = bits_of(loadf(row + h)) & 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  for (int i = 0; i < kLanes; ++i) {
    if (largest_bits[i] >= 0x7f800000) return false;
  }
  return true;
}

// Runs body(items) on the pool's workers (pool.h).
template <class Body>
inline void on_workers(Pool& pool, int64_t count, const Body& body) {
  run_workers(
      pool, count, [](void* context, Items& items) { (*static_cast<const Body*>(context))(items); },
      const_cast<Body*>(&body));
}

}  // namespace sage::SAGE_ISA
