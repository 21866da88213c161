// The operations of docs/abi.md and docs/nvfp4.md as XLA FFI handlers for platform "cpu": read and check the
// buffers, fill a parameter struct, call the kernel. No FFI type goes further than this file.
#include "handlers.h"

#include <new>

#include "checks.h"
#include "dispatch.h"
#include "pool.h"

namespace sage {
namespace {

class XlaPool final : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool pool) : pool_(pool) {}
  int64_t threads() const override { return pool_.num_threads(); }
  void schedule(void (*task)(void*), void* data) override {
    pool_.Schedule([task, data] { task(data); });
  }

 private:
  ffi::ThreadPool pool_;
};

template <class Params>
ffi::Error run(const Buffers& io, void (*kernel)(const Params&, Pool&), const Params& params,
               ffi::ThreadPool pool) {
  if (io.failed()) return io.error();
  try {
    XlaPool threads(pool);
    kernel(params, threads);
    return ffi::Error::Success();
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "sage_jax: no memory left for the scratch arrays of a CPU kernel.");
  }
}

const Dims kRank4 = {kAnySize, kAnySize, kAnySize, kAnySize};

int64_t padded_head_dim(Buffers& io, int64_t H) {
  io.require(io.failed() || (H >= 1 && H <= 256),
             "the head dimension is " + std::to_string(H) + ", but must be 1 to 256.");
  return H <= 64 ? 64 : H <= 128 ? 128 : 256;
}

void require_grouped(Buffers& io, const Shape& s) {
  io.require(s.K > 0 && s.N % s.K == 0,
             std::to_string(s.N) + " query heads cannot share " + std::to_string(s.K) +
                 " key/value heads: the first must be a multiple of the second.");
}

// The shapes that quantized operands imply; H comes from `out` or `dout`.
Shape quantized_shape(Buffers& io, ffi::AnyBuffer q8, ffi::AnyBuffer k8) {
  auto q = q8.dimensions(), k = k8.dimensions();
  Shape s = {q[0], q[2], k[2], q[1], k[1], 0, q[3]};
  if (!io.failed()) require_grouped(io, s);
  io.require(
      io.failed() || s.Hp == 64 || s.Hp == 128 || s.Hp == 256,
      "`q8` has " + std::to_string(s.Hp) + " channels, but they must be padded to 64, 128 or 256.");
  return s;
}

Masks read_masks(Buffers& io, const Shape& s, int64_t window_left, int64_t window_right, int32_t mask_tile) {
  Masks masks = {};
  masks.bounds = data<int32_t>(io.operand("bounds", {kS32}, {s.B, 3}));
  masks.q_seg = static_cast<const int32_t*>(io.optional("q_seg", {kS32}, {s.B, s.T}));
  masks.kv_seg = static_cast<const int32_t*>(io.optional("kv_seg", {kS32}, {s.B, s.S}));
  io.require(!s.S || !s.T || !masks.q_seg == !masks.kv_seg,
             "`q_seg` and `kv_seg` must be given together.");
  io.require(mask_tile == 1 || mask_tile == kTile, "attribute `mask_tile` is not 1 or 64.");
  masks.mask_tile = mask_tile;
  Dims all = {s.B, s.N, s.T, s.S}, tiles = {s.B, s.N, (s.T + kTile - 1) / kTile, s.S64()};
  masks.mask = static_cast<const bool*>(
      io.broadcast("mask", {kPred}, mask_tile == 1 ? all : tiles, &masks.mask_strides));
  masks.bias = static_cast<const float*>(io.broadcast("bias", {kF32}, all, &masks.bias_strides));
  masks.window_left = window_left;
  masks.window_right = window_right;
  return masks;
}

ffi::Error quantize_kv(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                       int32_t pv, float v_range, int32_t smooth_k, int32_t smooth_v,
                       int32_t dp) {
  Buffers io("sage_jax_quantize_kv", args, rets, 3, 10);
  auto k = io.operand("k", {kF32, kF16, kBF16}, kRank4);
  auto d = k.dimensions();
  Shape s = {d[0], 0, d[1], 0, d[2], d[3], padded_head_dim(io, d[3])};
  auto v = io.operand("v", {kF32, kF16, kBF16}, {s.B, s.S, s.K, s.H});
  auto bounds = io.operand("bounds", {kS32}, {s.B, 3});
  io.require(pv >= 0 && pv <= 3, "attribute `pv` is not 0, 1, 2 or 3.");
  io.require(dp >= 0 && dp <= 2, "attribute `dp` is not 0, 1 or 2.");
  Dims dense = {s.B, s.K, s.S, s.Hp}, turned = {s.B, s.K, s.Hp, s.Sp()};
  Dims tiles = {s.B, s.K, s.S64()}, channels = {s.B, s.K, s.Hp}, none = {0};
  constexpr ffi::DataType kPvTypes[] = {kE4M3, kF16, kBF16, kS8};
  QuantizeKv p = {
      s,       array(k),      array(v),      data<int32_t>(bounds), static_cast<Pv>(pv),
      v_range, smooth_k != 0, smooth_v != 0, static_cast<Dp>(dp)};
  p.k8 = data<int8_t>(io.result("k8", {kS8}, dense));
  p.k_scale = data<float>(io.result("k_scale", {kF32}, tiles));
  p.k_mean = data<float>(io.result("k_mean", {kF32}, channels));
  bool transposed = pv == 0 || pv == 3;
  p.v_pv = data<void>(io.result("v_pv", {kPvTypes[pv & 3]}, transposed ? turned : dense));
  p.v_scale = data<float>(io.result("v_scale", {kF32}, pv == 3 ? tiles : channels));
  p.v_mean = data<float>(io.result("v_mean", {kF32}, channels));
  p.v_dp = data<void>(io.result("v_dp", {dp == 2 ? kBF16 : kS8}, dp ? dense : none));
  p.v_dp_scale = data<float>(io.result("v_dp_scale", {kF32}, dp == 1 ? tiles : none));
  p.k_max = data<float>(io.result("k_max", {kF32}, dp ? channels : none));
  p.v_norm = data<float>(io.result("v_norm", {kF32}, dp ? Dims{s.B, s.K} : none));
  return run(io, kernels().quantize_kv, p, pool);
}

ffi::Error quantize_q(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                      int64_t q_block, float scale) {
  Buffers io("sage_jax_quantize_q", args, rets, 3, 3);
  auto q = io.operand("q", {kF32, kF16, kBF16}, kRank4);
  auto d = q.dimensions();
  int64_t Hp = padded_head_dim(io, d[3]);
  auto k_mean = io.operand("k_mean", {kF32}, {d[0], kAnySize, Hp});
  Shape s = {d[0], d[1], 0, d[2], k_mean.dimensions()[1], d[3], Hp};
  if (!io.failed()) require_grouped(io, s);
  auto bounds = io.operand("bounds", {kS32}, {s.B, 3});
  io.require(q_block >= 1, "attribute `q_block` must be at least 1.");
  QuantizeQ p = {s, array(q), data<float>(k_mean), data<int32_t>(bounds), q_block, scale};
  p.q8 = data<int8_t>(io.result("q8", {kS8}, {s.B, s.N, s.T, s.Hp}));
  p.q_scale = data<float>(io.result("q_scale", {kF32}, {s.B, s.N, s.T}));
  p.lse_shift = data<float>(io.result("lse_shift", {kF32}, {s.B, s.N, s.T}));
  return run(io, kernels().quantize_q, p, pool);
}

ffi::Error attend(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                  int32_t pv, int32_t f16_accumulate, float scale, int64_t window_left,
                  int64_t window_right, int32_t mask_tile) {
  Buffers io("sage_jax_attend", args, rets, 13, 4);
  Attend p = {};
  auto q8 = io.operand("q8", {kS8}, kRank4);
  auto d = q8.dimensions();
  Dims rows = {d[0], d[1], d[2]};
  p.q_scale = data<float>(io.operand("q_scale", {kF32}, rows));
  p.lse_shift = data<float>(io.operand("lse_shift", {kF32}, rows));
  auto k8 = io.operand("k8", {kS8}, {d[0], kAnySize, kAnySize, d[3]});
  Shape s = quantized_shape(io, q8, k8);
  io.require(pv >= 0 && pv <= 3, "attribute `pv` is not 0, 1, 2 or 3.");
  Dims dense = {s.B, s.K, s.S, s.Hp}, turned = {s.B, s.K, s.Hp, s.Sp()};
  Dims tiles = {s.B, s.K, s.S64()}, channels = {s.B, s.K, s.Hp};
  constexpr ffi::DataType kPvTypes[] = {kE4M3, kF16, kBF16, kS8};
  bool transposed = pv == 0 || pv == 3;
  p.k_scale = data<float>(io.operand("k_scale", {kF32}, tiles));
  p.v_pv = data<void>(io.operand("v_pv", {kPvTypes[pv & 3]}, transposed ? turned : dense));
  p.v_scale = data<float>(io.operand("v_scale", {kF32}, pv == 3 ? tiles : channels));
  p.v_mean = data<float>(io.operand("v_mean", {kF32}, channels));
  p.masks = read_masks(io, s, window_left, window_right, mask_tile);
  auto out = io.result("out", {kF32, kF16, kBF16}, {s.B, s.T, s.N, kAnySize});
  s.H = out.dimensions()[3];
  io.require(
      io.failed() || padded_head_dim(io, s.H) == s.Hp,
      "`out` has " + std::to_string(s.H) + " channels, which is not what `q8` was padded from.");
  p.lse = data<float>(io.result("lse", {kF32}, rows));
  p.m = data<float>(io.result("m", {kF32}, rows));
  p.l = data<float>(io.result("l", {kF32}, rows));
  p.shape = s;
  p.q8 = data<int8_t>(q8);
  p.k8 = data<int8_t>(k8);
  p.out = writable(out);
  p.pv = static_cast<Pv>(pv);
  p.f16_accumulate = f16_accumulate != 0;
  p.scale = scale;
  return run(io, kernels().attend, p, pool);
}

ffi::Error attend_backward(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                           int32_t backward, int32_t dp, int32_t exact_delta, int32_t /*deterministic: always*/, float scale,
                           int64_t window_left, int64_t window_right, int32_t mask_tile) {
  Buffers io("sage_jax_attend_backward", args, rets, 20, 4);
  AttendBackward p = {};
  auto q8 = io.operand("q8", {kS8}, kRank4);
  auto d = q8.dimensions();
  Dims rows = {d[0], d[1], d[2]};
  p.q_scale = data<float>(io.operand("q_scale", {kF32}, rows));
  auto k8 = io.operand("k8", {kS8}, {d[0], kAnySize, kAnySize, d[3]});
  Shape s = quantized_shape(io, q8, k8);
  io.require(backward == 0 || backward == 1, "attribute `backward` is not 0 or 1.");
  io.require(dp == 2 || (dp == 1 && backward == 0),
             "attribute `dp` is neither 2 (bf16) nor, with `backward` 0, 1 (int8).");
  Dims dense = {s.B, s.K, s.S, s.Hp}, tiles = {s.B, s.K, s.S64()}, none = {0};
  p.k_scale = data<float>(io.operand("k_scale", {kF32}, tiles));
  p.k_mean = data<float>(io.operand("k_mean", {kF32}, {s.B, s.K, s.Hp}));
  p.v_dp = data<void>(io.operand("v_dp", {dp == 1 ? kS8 : kBF16}, dense));
  p.v_dp_scale = data<float>(io.operand("v_dp_scale", {kF32}, dp == 1 ? tiles : none));
  p.k_max = data<float>(io.operand("k_max", {kF32}, {s.B, s.K, s.Hp}));
  p.v_norm = data<float>(io.operand("v_norm", {kF32}, {s.B, s.K}));
  p.v_mean = data<float>(io.operand("v_mean", {kF32}, {s.B, s.K, s.Hp}));
  p.m = data<float>(io.operand("m", {kF32}, rows));
  p.l = data<float>(io.operand("l", {kF32}, rows));
  auto out = io.operand("out", {kF32, kF16, kBF16}, {s.B, s.T, s.N, kAnySize});
  s.H = out.dimensions()[3];
  io.require(
      io.failed() || padded_head_dim(io, s.H) == s.Hp,
      "`out` has " + std::to_string(s.H) + " channels, which is not what `q8` was padded from.");
  auto dout = io.operand("dout", {kF32, kF16, kBF16}, {s.B, s.T, s.N, s.H});
  p.dlse = data<float>(io.operand("dlse", {kF32}, rows));
  p.masks = read_masks(io, s, window_left, window_right, mask_tile);
  p.dq = writable(io.result("dq", {kF32, kF16, kBF16}, {s.B, s.T, s.N, s.H}));
  p.dk = writable(io.result("dk", {kF32, kF16, kBF16}, {s.B, s.S, s.K, s.H}));
  p.dv = writable(io.result("dv", {kF32, kF16, kBF16}, {s.B, s.S, s.K, s.H}));
  auto dlogits = io.result("dlogits", {kF32}, kRank4);
  if (dlogits.element_count() > 0) {
    auto t = dlogits.dimensions();
    io.require(t[0] == s.B && t[1] == s.N && t[2] == s.T && t[3] == s.S,
               "`dlogits` is neither empty nor of shape [B, N, T, S].");
    p.dlogits = data<float>(dlogits);
  }
  p.shape = s;
  p.q8 = data<int8_t>(q8);
  p.k8 = data<int8_t>(k8);
  p.out = array(out);
  p.dout = array(dout);
  p.backward = static_cast<Backward>(backward);
  p.dp = static_cast<Dp>(dp);
  p.exact_delta = exact_delta != 0;
  p.scale = scale;
  return run(io, kernels().attend_backward, p, pool);
}

// Codes and scales of a quantized [..., last] as results.
WritableBlocks blocks_result(Buffers& io, const std::string& name, Dims dims) {
  int64_t last = dims.back();
  dims.back() = last / 2;
  WritableBlocks blocks = {};
  blocks.codes = data<uint8_t>(io.result((name + "4").c_str(), {kU8}, dims));
  dims.back() = last / kFp4Block;
  blocks.scale = data<uint8_t>(io.result((name + "_scale").c_str(), {kE4M3}, dims));
  return blocks;
}

// The same as operands.
Blocks blocks_operand(Buffers& io, const std::string& name, Dims dims) {
  int64_t last = dims.back();
  dims.back() = last / 2;
  Blocks blocks = {};
  blocks.codes = data<uint8_t>(io.operand((name + "4").c_str(), {kU8}, dims));
  dims.back() = last / kFp4Block;
  blocks.scale = data<uint8_t>(io.operand((name + "_scale").c_str(), {kE4M3}, dims));
  return blocks;
}

ffi::Error quantize_kv_fp4(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                           int32_t four_or_six, int32_t smooth_k, int32_t smooth_v) {
  Buffers io("sage_jax_quantize_kv_fp4", args, rets, 3, 8);
  auto k = io.operand("k", {kF32, kF16, kBF16}, kRank4);
  auto d = k.dimensions();
  Shape s = {d[0], 0, d[1], 0, d[2], d[3], padded_head_dim(io, d[3])};
  auto v = io.operand("v", {kF32, kF16, kBF16}, {s.B, s.S, s.K, s.H});
  auto bounds = io.operand("bounds", {kS32}, {s.B, 3});
  QuantizeKvFp4 p = {s, array(k), array(v), data<int32_t>(bounds)};
  p.four_or_six = four_or_six != 0;
  p.smooth_k = smooth_k != 0;
  p.smooth_v = smooth_v != 0;
  Dims heads = {s.B, s.K}, channels = {s.B, s.K, s.Hp};
  p.k4 = blocks_result(io, "k", {s.B, s.K, s.S, s.Hp});
  p.k_tensor = data<float>(io.result("k_tensor", {kF32}, heads));
  p.k_mean = data<float>(io.result("k_mean", {kF32}, channels));
  p.v4 = blocks_result(io, "v", {s.B, s.K, s.Hp, s.Sp()});
  p.v_tensor = data<float>(io.result("v_tensor", {kF32}, heads));
  p.v_mean = data<float>(io.result("v_mean", {kF32}, channels));
  return run(io, kernels().quantize_kv_fp4, p, pool);
}

ffi::Error quantize_q_fp4(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                          int32_t four_or_six, int32_t smooth_q, float scale) {
  Buffers io("sage_jax_quantize_q_fp4", args, rets, 5, 5);
  auto q = io.operand("q", {kF32, kF16, kBF16}, kRank4);
  auto d = q.dimensions();
  auto k = io.operand("k", {kF32, kF16, kBF16}, {d[0], kAnySize, kAnySize, d[3]});
  auto keys = k.dimensions();
  Shape s = {d[0], d[1], keys[1], d[2], keys[2], d[3], padded_head_dim(io, d[3])};
  if (!io.failed()) require_grouped(io, s);
  QuantizeQFp4 p = {s, array(q), array(k)};
  p.k_mean = data<float>(io.operand("k_mean", {kF32}, {s.B, s.K, s.Hp}));
  p.k_tensor = data<float>(io.operand("k_tensor", {kF32}, {s.B, s.K}));
  p.bounds = data<int32_t>(io.operand("bounds", {kS32}, {s.B, 3}));
  p.four_or_six = four_or_six != 0;
  p.smooth_q = smooth_q != 0;
  p.scale = scale;
  p.q4 = blocks_result(io, "q", {s.B, s.N, s.T, s.Hp});
  p.q_tensor = data<float>(io.result("q_tensor", {kF32}, {s.B, s.N, s.T128()}));
  p.delta = data<float>(io.result("delta", {kF32}, {s.B, s.N, s.T128(), s.S}));
  p.lse_shift = data<float>(io.result("lse_shift", {kF32}, {s.B, s.N, s.T}));
  return run(io, kernels().quantize_q_fp4, p, pool);
}

ffi::Error attend_fp4(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets rets,
                      float scale, int64_t window_left, int64_t window_right, int32_t mask_tile) {
  Buffers io("sage_jax_attend_fp4", args, rets, 17, 2);
  AttendFp4 p = {};
  auto q4 = io.operand("q4", {kU8}, kRank4);
  auto d = q4.dimensions();
  Dims rows = {d[0], d[1], d[2]};
  int64_t Hp = d[3] * 2, tiles = (d[2] + kFp4Queries - 1) / kFp4Queries;
  p.q4.codes = data<uint8_t>(q4);
  p.q4.scale =
      data<uint8_t>(io.operand("q_scale", {kE4M3}, {d[0], d[1], d[2], Hp / kFp4Block}));
  p.q_tensor = data<float>(io.operand("q_tensor", {kF32}, {d[0], d[1], tiles}));
  auto delta = io.operand("delta", {kF32}, {d[0], d[1], tiles, kAnySize});
  p.delta = data<float>(delta);
  p.lse_shift = data<float>(io.operand("lse_shift", {kF32}, rows));
  int64_t S = delta.dimensions()[3];
  auto k4 = io.operand("k4", {kU8}, {d[0], kAnySize, S, d[3]});
  Shape s = {d[0], d[2], S, d[1], k4.dimensions()[1], 0, Hp};
  if (!io.failed()) require_grouped(io, s);
  p.k4.codes = data<uint8_t>(k4);
  p.k4.scale = data<uint8_t>(io.operand("k_scale", {kE4M3}, {s.B, s.K, S, Hp / kFp4Block}));
  p.k_tensor = data<float>(io.operand("k_tensor", {kF32}, {s.B, s.K}));
  p.v4 = blocks_operand(io, "v", {s.B, s.K, Hp, s.Sp()});
  p.v_tensor = data<float>(io.operand("v_tensor", {kF32}, {s.B, s.K}));
  p.v_mean = data<float>(io.operand("v_mean", {kF32}, {s.B, s.K, Hp}));
  p.masks = read_masks(io, s, window_left, window_right, mask_tile);
  auto out = io.result("out", {kF32, kF16, kBF16}, {s.B, s.T, s.N, kAnySize});
  s.H = out.dimensions()[3];
  io.require(
      io.failed() || padded_head_dim(io, s.H) == s.Hp,
      "`out` has " + std::to_string(s.H) + " channels, which is not what `q4` was padded from.");
  p.lse = data<float>(io.result("lse", {kF32}, rows));
  p.shape = s;
  p.out = writable(out);
  p.scale = scale;
  return run(io, kernels().attend_fp4, p, pool);
}

// What all bindings begin with.
auto bind() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().RemainingRets(); }

}  // namespace

XLA_FFI_Error* quantize_kv_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler = bind()
                             .Attr<int32_t>("pv")
                             .Attr<float>("v_range")
                             .Attr<int32_t>("smooth_k")
                             .Attr<int32_t>("smooth_v")
                             .Attr<int32_t>("dp")
                             .To(quantize_kv)
                             .release();
  return handler->Call(frame);
}

XLA_FFI_Error* quantize_q_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler =
      bind().Attr<int64_t>("q_block").Attr<float>("scale").To(quantize_q).release();
  return handler->Call(frame);
}

XLA_FFI_Error* attend_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler = bind()
                             .Attr<int32_t>("pv")
                             .Attr<int32_t>("f16_accumulate")
                             .Attr<float>("scale")
                             .Attr<int64_t>("window_left")
                             .Attr<int64_t>("window_right")
                             .Attr<int32_t>("mask_tile")
                             .To(attend)
                             .release();
  return handler->Call(frame);
}

XLA_FFI_Error* attend_backward_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler = bind()
                             .Attr<int32_t>("backward")
                             .Attr<int32_t>("dp")
                             .Attr<int32_t>("exact_delta")
                             .Attr<int32_t>("deterministic")
                             .Attr<float>("scale")
                             .Attr<int64_t>("window_left")
                             .Attr<int64_t>("window_right")
                             .Attr<int32_t>("mask_tile")
                             .To(attend_backward)
                             .release();
  return handler->Call(frame);
}

XLA_FFI_Error* quantize_kv_fp4_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler = bind()
                             .Attr<int32_t>("four_or_six")
                             .Attr<int32_t>("smooth_k")
                             .Attr<int32_t>("smooth_v")
                             .To(quantize_kv_fp4)
                             .release();
  return handler->Call(frame);
}

XLA_FFI_Error* quantize_q_fp4_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler = bind()
                             .Attr<int32_t>("four_or_six")
                             .Attr<int32_t>("smooth_q")
                             .Attr<float>("scale")
                             .To(quantize_q_fp4)
                             .release();
  return handler->Call(frame);
}

XLA_FFI_Error* attend_fp4_handler(XLA_FFI_CallFrame* frame) {
  static auto* handler = bind()
                             .Attr<float>("scale")
                             .Attr<int64_t>("window_left")
                             .Attr<int64_t>("window_right")
                             .Attr<int32_t>("mask_tile")
                             .To(attend_fp4)
                             .release();
  return handler->Call(frame);
}

}  // namespace sage
