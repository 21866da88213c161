// XLA FFI handlers of the 8-bit operations (docs/abi.md, "CUDA extras"): check the buffers, fill in the
// parameter struct, launch on XLA's stream. Nothing is allocated and no device state is read, so XLA
// may capture the calls in CUDA graphs and replay them.
#include "handlers.h"
#include "operands.h"

namespace sage {
namespace {

DataType pv_type(int32_t pv) {
  constexpr DataType kTypes[] = {DataType::F8E4M3FN, DataType::F16, DataType::BF16, DataType::S8};
  return kTypes[pv];
}

ffi::Error quantize_kv_handler(Stream stream, Arg k, Arg v, Arg bounds, Out k8, Out k_scale,
                               Out k_mean, Out v_pv, Out v_scale, Out v_mean, Out v_dp,
                               Out v_dp_scale, Out k_max, Out v_norm, Out workspace, int32_t pv, float v_range,
                               int32_t smooth_k, int32_t smooth_v, int32_t dp) {
  Check check("sage_jax_quantize_kv");
  const int64_t B = axis(k, 0), S = axis(k, 1), K = axis(k, 2), H = axis(k, 3), Hp = axis(*k8, 3);
  const int64_t S64 = tiles64(S), Sp = 64 * S64;
  check.require(pv >= 0 && pv <= 3 && dp >= 0 && dp <= 2, "pv must be 0 to 3 and dp 0 to 2");
  check.require(pv != 0 || v_range <= 3.5f, "v_range is " + std::to_string(v_range) +
                                                 ", but must be at most 3.5, which 16-bit sums of P·V have room for; "
                                                 "export the program again");
  check.require(H <= Hp && (Hp == 64 || Hp == 128 || Hp == 256), "Hp must be 64, 128 or 256");
  if (check.failed()) return check.result();
  const bool transposed = pv == 0 || pv == 3;
  check.buffer("k", k, {B, S, K, H}, kFloats);
  check.buffer("v", v, {B, S, K, H}, kFloats);
  check.buffer("bounds", bounds, {B, 3}, {DataType::S32});
  check.buffer("k8", *k8, {B, K, S, Hp}, {DataType::S8});
  check.buffer("k_scale", *k_scale, {B, K, S64}, {DataType::F32});
  check.buffer("k_mean", *k_mean, {B, K, Hp}, {DataType::F32});
  check.buffer("v_pv", *v_pv, transposed ? Shape{B, K, Hp, Sp} : Shape{B, K, S, Hp},
               {pv_type(pv)});
  check.buffer("v_scale", *v_scale, pv == 3 ? Shape{B, K, S64} : Shape{B, K, Hp}, {DataType::F32});
  check.buffer("v_mean", *v_mean, {B, K, Hp}, {DataType::F32});
  check.buffer("v_dp", *v_dp, dp == 0 ? Shape{0} : Shape{B, K, S, Hp},
               {dp == 2 ? DataType::BF16 : DataType::S8});
  check.buffer("v_dp_scale", *v_dp_scale, dp == 1 ? Shape{B, K, S64} : Shape{0}, {DataType::F32});
  check.buffer("k_max", *k_max, dp == 0 ? Shape{0} : Shape{B, K, Hp}, {DataType::F32});
  check.buffer("v_norm", *v_norm, dp == 0 ? Shape{0} : Shape{B, K}, {DataType::F32});

  QuantizeKvParams params = {};
  params.shape = {int(B), 0, int(S), 0, int(K), int(H), int(Hp)};
  params.k_dtype = dtype_of(k);
  params.v_dtype = dtype_of(v);
  params.k = data<const void>(k);
  params.v = data<const void>(v);
  params.bounds = data<const int32_t>(bounds);
  params.pv = static_cast<PvFormat>(pv);
  params.dp = static_cast<DpFormat>(dp);
  params.v_range = v_range;
  params.smooth_k = smooth_k != 0;
  params.smooth_v = smooth_v != 0;
  params.k8 = data<int8_t>(*k8);
  params.k_scale = data<float>(*k_scale);
  params.k_mean = data<float>(*k_mean);
  params.v_pv = data<void>(*v_pv);
  params.v_scale = data<float>(*v_scale);
  params.v_mean = data<float>(*v_mean);
  params.v_dp = data<void>(*v_dp);
  params.v_dp_scale = data<float>(*v_dp_scale);
  params.k_max = data<float>(*k_max);
  params.v_norm = data<float>(*v_norm);
  params.workspace = data<void>(*workspace);
  check_workspace(check, workspace, quantize_kv_workspace_bytes(params.shape));
  if (check.failed()) return check.result();
  return finish("sage_jax_quantize_kv", quantize_kv(params, stream));
}

ffi::Error quantize_q_handler(Stream stream, Arg q, Arg k_mean, Arg bounds, Out q8, Out q_scale,
                              Out lse_shift, int64_t q_block, float scale) {
  Check check("sage_jax_quantize_q");
  const int64_t B = axis(q, 0), T = axis(q, 1), N = axis(q, 2), H = axis(q, 3);
  const int64_t K = axis(k_mean, 1), Hp = axis(k_mean, 2);
  check.require(q_block == 1 || q_block == 64 || q_block == 128, "q_block must be 1, 64 or 128");
  check.require(H <= Hp && (Hp == 64 || Hp == 128 || Hp == 256), "Hp must be 64, 128 or 256");
  check.require(K > 0 && N % K == 0, "the query heads must be a multiple of the key/value heads");
  check.buffer("q", q, {B, T, N, H}, kFloats);
  check.buffer("k_mean", k_mean, {B, K, Hp}, {DataType::F32});
  check.buffer("bounds", bounds, {B, 3}, {DataType::S32});
  check.buffer("q8", *q8, {B, N, T, Hp}, {DataType::S8});
  check.buffer("q_scale", *q_scale, {B, N, T}, {DataType::F32});
  check.buffer("lse_shift", *lse_shift, {B, N, T}, {DataType::F32});
  if (check.failed()) return check.result();

  QuantizeQParams params = {};
  params.shape = {int(B), int(T), 0, int(N), int(K), int(H), int(Hp)};
  params.q_dtype = dtype_of(q);
  params.q = data<const void>(q);
  params.k_mean = data<const float>(k_mean);
  params.bounds = data<const int32_t>(bounds);
  params.q_block = static_cast<int>(q_block);
  params.scale = scale;
  params.q8 = data<int8_t>(*q8);
  params.q_scale = data<float>(*q_scale);
  params.lse_shift = data<float>(*lse_shift);
  return finish("sage_jax_quantize_q", quantize_q(params, stream));
}

// Checks k8 and k_scale; the shape with what they say of it.
AttentionShape key_shape(Check& check, AttentionShape shape, const Arg& k8, const Arg& k_scale) {
  const int B = shape.batch, K = axis(k8, 1), S = axis(k8, 2), Hp = axis(k8, 3);
  check.require(shape.head_dim <= Hp && (Hp == 64 || Hp == 128 || Hp == 256), "Hp must be 64, 128 or 256");
  check.require(K > 0 && shape.heads % K == 0, "the query heads must be a multiple of the key/value heads");
  check.buffer("k8", k8, {B, K, S, Hp}, {DataType::S8});
  check.buffer("k_scale", k_scale, {B, K, tiles64(S)}, {DataType::F32});
  shape.keys = S, shape.kv_heads = K, shape.padded_dim = Hp;
  return shape;
}

// Checks q8, q_scale, k8, k_scale and gives the shape that all of attention shares.
AttentionShape attention_shape(Check& check, const Arg& q8, const Arg& q_scale, const Arg& k8,
                               const Arg& k_scale, int head_dim) {
  const int B = axis(q8, 0), N = axis(q8, 1), T = axis(q8, 2);
  const AttentionShape shape = key_shape(check, {B, T, 0, N, 0, head_dim, 0}, k8, k_scale);
  check.buffer("q8", q8, {B, N, T, shape.padded_dim}, {DataType::S8});
  check.buffer("q_scale", q_scale, {B, N, T}, {DataType::F32});
  return shape;
}

// What attention takes besides queries.
struct KeyOperands {
  Arg k8, k_scale, v_pv, v_scale, v_mean;
};

// Their checks, and what follows from them.
AttendParams attend_params(Check& check, const AttentionShape& shape, const KeyOperands& keys, const MaskOperands& masks,
                           Out out, Out workspace, int32_t pv, int32_t f16_accumulate, float scale) {
  const int64_t B = shape.batch, T = shape.queries, S = shape.keys, N = shape.heads, K = shape.kv_heads,
                Hp = shape.padded_dim, S64 = tiles64(S);
  AttendParams params = {};
  check.require(pv >= 0 && pv <= 3, "pv must be 0 to 3");
  if (check.failed()) return params;
  const bool transposed = pv == 0 || pv == 3;
  check.buffer("v_pv", keys.v_pv, transposed ? Shape{B, K, Hp, 64 * S64} : Shape{B, K, S, Hp}, {pv_type(pv)});
  check.buffer("v_scale", keys.v_scale, pv == 3 ? Shape{B, K, S64} : Shape{B, K, Hp}, {DataType::F32});
  check.buffer("v_mean", keys.v_mean, {B, K, Hp}, {DataType::F32});
  check.buffer("out", *out, {B, T, N, shape.head_dim}, kFloats);
  params.shape = shape;
  params.masks = mask_params(check, masks, shape);
  params.pv = static_cast<PvFormat>(pv);
  params.f16_accumulate = f16_accumulate != 0;
  params.scale = scale;
  params.k8 = data<const int8_t>(keys.k8);
  params.k_scale = data<const float>(keys.k_scale);
  params.v_pv = data<const void>(keys.v_pv);
  params.v_scale = data<const float>(keys.v_scale);
  params.v_mean = data<const float>(keys.v_mean);
  params.out_dtype = dtype_of(*out);
  params.out = data<void>(*out);
  params.workspace = data<void>(*workspace);
  return params;
}

ffi::Error attend_handler(Stream stream, Arg q8, Arg q_scale, Arg lse_shift, Arg k8, Arg k_scale,
                          Arg v_pv, Arg v_scale, Arg v_mean, Arg bounds, Arg q_seg, Arg kv_seg,
                          Arg mask, Arg bias, Out out, Out lse, Out m, Out l, Out workspace,
                          int32_t pv, int32_t f16_accumulate, float scale, int64_t window_left,
                          int64_t window_right, int32_t mask_tile) {
  Check check("sage_jax_attend");
  const AttentionShape shape =
      attention_shape(check, q8, q_scale, k8, k_scale, axis(*out, 3));
  const int64_t B = shape.batch, T = shape.queries, N = shape.heads;
  AttendParams params = attend_params(check, shape, {k8, k_scale, v_pv, v_scale, v_mean},
                                      {bounds, q_seg, kv_seg, mask, bias, window_left, window_right, mask_tile}, out,
                                      workspace, pv, f16_accumulate, scale);
  check.buffer("lse_shift", lse_shift, {B, N, T}, {DataType::F32});
  check.buffer("lse", *lse, {B, N, T}, {DataType::F32});
  check.buffer("m", *m, {B, N, T}, {DataType::F32});
  check.buffer("l", *l, {B, N, T}, {DataType::F32});
  params.q8 = data<const int8_t>(q8);
  params.q_scale = data<const float>(q_scale);
  params.lse_shift = data<const float>(lse_shift);
  params.lse = data<float>(*lse);
  params.m = data<float>(*m);
  params.l = data<float>(*l);
  if (check.failed()) return check.result();
  check_workspace(check, workspace, attend_workspace_bytes(params));
  if (check.failed()) return check.result();
  return finish("sage_jax_attend", attend(params, stream));
}

ffi::Error attend_queries_handler(Stream stream, Arg q, Arg k8, Arg k_scale, Arg v_pv, Arg v_scale, Arg v_mean, Arg bounds,
                                  Arg q_seg, Arg kv_seg, Arg mask, Arg bias, Out out, Out workspace, int32_t pv,
                                  int32_t f16_accumulate, float scale, int64_t window_left, int64_t window_right,
                                  int32_t mask_tile) {
  Check check("sage_jax_attend_queries");
  const int B = axis(q, 0), T = axis(q, 1), N = axis(q, 2), H = axis(q, 3);
  const AttentionShape shape = key_shape(check, {B, T, 0, N, 0, H, 0}, k8, k_scale);
  AttendParams params = attend_params(check, shape, {k8, k_scale, v_pv, v_scale, v_mean},
                                      {bounds, q_seg, kv_seg, mask, bias, window_left, window_right, mask_tile}, out,
                                      workspace, pv, f16_accumulate, scale);
  check.buffer("q", q, {B, T, N, H}, kFloats);
  params.q = data<const void>(q);
  params.q_dtype = dtype_of(q);
  if (check.failed()) return check.result();
  check_workspace(check, workspace, attend_workspace_bytes(params));
  if (check.failed()) return check.result();
  return finish("sage_jax_attend_queries", attend(params, stream));
}

ffi::Error attend_backward_handler(Stream stream, Arg q8, Arg q_scale, Arg k8, Arg k_scale,
                                   Arg k_mean, Arg v_dp, Arg v_dp_scale, Arg k_max, Arg v_norm, Arg v_mean, Arg m,
                                   Arg l, Arg out, Arg dout, Arg dlse, Arg bounds, Arg q_seg, Arg kv_seg,
                                   Arg mask, Arg bias, Out dq, Out dk, Out dv, Out dlogits, Out workspace,
                                   int32_t backward, int32_t dp, int32_t exact_delta,
                                   int32_t deterministic, float scale, int64_t window_left, int64_t window_right, int32_t mask_tile) {
  Check check("sage_jax_attend_backward");
  check.require(backward == 0 || backward == 1, "backward must be 0 (train8) or 1 (sagebwd)");
  check.require(dp == 2 || (dp == 1 && backward == 0),
                "dp must be 2 (bf16), or 1 (int8) with backward 0 (train8)");
  const AttentionShape shape = attention_shape(check, q8, q_scale, k8, k_scale, axis(out, 3));
  const int64_t B = shape.batch, T = shape.queries, S = shape.keys, N = shape.heads,
                K = shape.kv_heads, H = shape.head_dim, Hp = shape.padded_dim;
  check.buffer("k_mean", k_mean, {B, K, Hp}, {DataType::F32});
  check.buffer("v_dp", v_dp, {B, K, S, Hp}, {dp == 1 ? DataType::S8 : DataType::BF16});
  check.buffer("v_dp_scale", v_dp_scale, dp == 1 ? Shape{B, K, tiles64(S)} : Shape{0},
               {DataType::F32});
  check.buffer("k_max", k_max, {B, K, Hp}, {DataType::F32});
  check.buffer("v_norm", v_norm, {B, K}, {DataType::F32});
  check.buffer("v_mean", v_mean, {B, K, Hp}, {DataType::F32});
  check.buffer("m", m, {B, N, T}, {DataType::F32});
  check.buffer("l", l, {B, N, T}, {DataType::F32});
  check.buffer("out", out, {B, T, N, H}, kFloats);
  check.buffer("dout", dout, {B, T, N, H}, {out.element_type()});
  check.buffer("dlse", dlse, {B, N, T}, {DataType::F32});
  check.buffer("dq", *dq, {B, T, N, H}, kFloats);
  check.buffer("dk", *dk, {B, S, K, H}, kFloats);
  check.buffer("dv", *dv, {B, S, K, H}, kFloats);
  check.buffer("dlogits", *dlogits, {0, 0, 0, 0}, {DataType::F32});

  BackwardParams params = {};
  params.shape = shape;
  params.masks =
      mask_params(check, {bounds, q_seg, kv_seg, mask, bias, window_left, window_right, mask_tile}, shape);
  params.backward = static_cast<Backward>(backward);
  params.dp = static_cast<DpFormat>(dp);
  params.exact_delta = exact_delta != 0;
  params.deterministic = deterministic != 0;
  params.scale = scale;
  params.q8 = data<const int8_t>(q8);
  params.q_scale = data<const float>(q_scale);
  params.k8 = data<const int8_t>(k8);
  params.k_scale = data<const float>(k_scale);
  params.k_mean = data<const float>(k_mean);
  params.v_dp = data<const void>(v_dp);
  params.v_dp_scale = data<const float>(v_dp_scale);
  params.k_max = data<const float>(k_max);
  params.v_norm = data<const float>(v_norm);
  params.v_mean = data<const float>(v_mean);
  params.m = data<const float>(m);
  params.l = data<const float>(l);
  params.out_dtype = dtype_of(out);
  params.out = data<const void>(out);
  params.dout = data<const void>(dout);
  params.dlse = data<const float>(dlse);
  params.dq_dtype = dtype_of(*dq);
  params.dk_dtype = dtype_of(*dk);
  params.dv_dtype = dtype_of(*dv);
  params.dq = data<void>(*dq);
  params.dk = data<void>(*dk);
  params.dv = data<void>(*dv);
  params.workspace = data<void>(*workspace);
  if (check.failed()) return check.result();
  check_workspace(check, workspace, backward_workspace_bytes(params));
  if (check.failed()) return check.result();
  return finish("sage_jax_attend_backward", attend_backward(params, stream));
}

}  // namespace
}  // namespace sage

// One Stream for every launch, no allocation, no read-back: XLA may record the calls.
XLA_FFI_DEFINE_HANDLER_SYMBOL(SageQuantizeKvCuda, sage::quantize_kv_handler,
                              (sage::bind<3, 11>()
                                   .Attr<int32_t>("pv")
                                   .Attr<float>("v_range")
                                   .Attr<int32_t>("smooth_k")
                                   .Attr<int32_t>("smooth_v")
                                   .Attr<int32_t>("dp")),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SageQuantizeQCuda, sage::quantize_q_handler,
                              (sage::bind<3, 3>().Attr<int64_t>("q_block").Attr<float>("scale")),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SageAttendCuda, sage::attend_handler,
                              (sage::bind<13, 5>()
                                   .Attr<int32_t>("pv")
                                   .Attr<int32_t>("f16_accumulate")
                                   .Attr<float>("scale")
                                   .Attr<int64_t>("window_left")
                                   .Attr<int64_t>("window_right")
                                   .Attr<int32_t>("mask_tile")),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SageAttendQueriesCuda, sage::attend_queries_handler,
                              (sage::bind<11, 2>()
                                   .Attr<int32_t>("pv")
                                   .Attr<int32_t>("f16_accumulate")
                                   .Attr<float>("scale")
                                   .Attr<int64_t>("window_left")
                                   .Attr<int64_t>("window_right")
                                   .Attr<int32_t>("mask_tile")),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SageAttendBackwardCuda, sage::attend_backward_handler,
                              (sage::bind<20, 5>()
                                   .Attr<int32_t>("backward")
                                   .Attr<int32_t>("dp")
                                   .Attr<int32_t>("exact_delta")
                                   .Attr<int32_t>("deterministic")
                                   .Attr<float>("scale")
                                   .Attr<int64_t>("window_left")
                                   .Attr<int64_t>("window_right")
                                   .Attr<int32_t>("mask_tile")),
                              {xla::ffi::Traits::kCmdBufferCompatible});
