// XLA FFI handlers of the FP4 operations (docs/nvfp4.md, "Operations and layouts"), as handlers.cc has those
// of the 8-bit ones.
#include "common/params_fp4.h"
#include "handlers.h"
#include "operands.h"

namespace sage {
namespace {

void check_head_dim(Check& check, int64_t H, int64_t Hp) {
  check.require(H <= Hp && (Hp == 64 || Hp == 128 || Hp == 256), "Hp must be 64, 128 or 256");
}

void check_groups(Check& check, int64_t N, int64_t K) {
  check.require(K > 0 && N % K == 0, "the query heads must be a multiple of the key/value heads");
}

// Codes [rows..., length / 2] and scales [rows..., length / 16] of an array [rows..., length].
void check_blocks(Check& check, const char* name, const Arg& codes, const Arg& scales, Shape shape) {
  const int64_t length = shape.back();
  shape.back() = length / 2;
  check.buffer(name, codes, shape, {DataType::U8});
  shape.back() = length / 16;
  check.buffer((std::string(name) + "'s scales").c_str(), scales, shape, {DataType::F8E4M3FN});
}

ffi::Error quantize_kv_handler(Stream stream, Arg k, Arg v, Arg bounds, Out k4, Out k_scale,
                               Out k_tensor, Out k_mean, Out v4, Out v_scale, Out v_tensor,
                               Out v_mean, Out workspace, int32_t four_or_six, int32_t smooth_k,
                               int32_t smooth_v) {
  Check check("sage_jax_quantize_kv_fp4");
  const int64_t B = axis(k, 0), S = axis(k, 1), K = axis(k, 2), H = axis(k, 3);
  const int64_t Hp = axis(*k_mean, 2);
  check_head_dim(check, H, Hp);
  check.buffer("k", k, {B, S, K, H}, kFloats);
  check.buffer("v", v, {B, S, K, H}, kFloats);
  check.buffer("bounds", bounds, {B, 3}, {DataType::S32});
  check_blocks(check, "k4", *k4, *k_scale, {B, K, S, Hp});
  check_blocks(check, "v4", *v4, *v_scale, {B, K, Hp, 64 * tiles64(S)});
  check.buffer("k_tensor", *k_tensor, {B, K}, {DataType::F32});
  check.buffer("k_mean", *k_mean, {B, K, Hp}, {DataType::F32});
  check.buffer("v_tensor", *v_tensor, {B, K}, {DataType::F32});
  check.buffer("v_mean", *v_mean, {B, K, Hp}, {DataType::F32});

  QuantizeKvFp4Params params = {};
  params.shape = {int(B), 0, int(S), 0, int(K), int(H), int(Hp)};
  params.k_dtype = dtype_of(k);
  params.v_dtype = dtype_of(v);
  params.k = data<const void>(k);
  params.v = data<const void>(v);
  params.bounds = data<const int32_t>(bounds);
  params.four_or_six = four_or_six != 0;
  params.smooth_k = smooth_k != 0;
  params.smooth_v = smooth_v != 0;
  params.k4 = data<uint8_t>(*k4);
  params.k_scale = data<uint8_t>(*k_scale);
  params.k_tensor = data<float>(*k_tensor);
  params.k_mean = data<float>(*k_mean);
  params.v4 = data<uint8_t>(*v4);
  params.v_scale = data<uint8_t>(*v_scale);
  params.v_tensor = data<float>(*v_tensor);
  params.v_mean = data<float>(*v_mean);
  params.workspace = data<void>(*workspace);
  if (check.failed()) return check.result();
  check_workspace(check, workspace, quantize_kv_fp4_workspace_bytes(params.shape));
  if (check.failed()) return check.result();
  return finish("sage_jax_quantize_kv_fp4", quantize_kv_fp4(params, stream));
}

ffi::Error quantize_q_handler(Stream stream, Arg q, Arg k, Arg k_mean, Arg k_tensor, Arg bounds,
                              Out q4, Out q_scale, Out q_tensor, Out delta, Out lse_shift,
                              Out workspace, int32_t four_or_six, int32_t smooth_q, float scale) {
  Check check("sage_jax_quantize_q_fp4");
  const int64_t B = axis(q, 0), T = axis(q, 1), N = axis(q, 2), H = axis(q, 3);
  const int64_t S = axis(k, 1), K = axis(k, 2), Hp = axis(k_mean, 2), T128 = (T + 127) / 128;
  check_head_dim(check, H, Hp);
  check_groups(check, N, K);
  check.buffer("q", q, {B, T, N, H}, kFloats);
  check.buffer("k", k, {B, S, K, H}, kFloats);
  check.buffer("k_mean", k_mean, {B, K, Hp}, {DataType::F32});
  check.buffer("k_tensor", k_tensor, {B, K}, {DataType::F32});
  check.buffer("bounds", bounds, {B, 3}, {DataType::S32});
  check_blocks(check, "q4", *q4, *q_scale, {B, N, T, Hp});
  check.buffer("q_tensor", *q_tensor, {B, N, T128}, {DataType::F32});
  check.buffer("delta", *delta, {B, N, T128, S}, {DataType::F32});
  check.buffer("lse_shift", *lse_shift, {B, N, T}, {DataType::F32});

  QuantizeQFp4Params params = {};
  params.shape = {int(B), int(T), int(S), int(N), int(K), int(H), int(Hp)};
  params.q_dtype = dtype_of(q);
  params.k_dtype = dtype_of(k);
  params.q = data<const void>(q);
  params.k = data<const void>(k);
  params.k_mean = data<const float>(k_mean);
  params.k_tensor = data<const float>(k_tensor);
  params.bounds = data<const int32_t>(bounds);
  params.four_or_six = four_or_six != 0;
  params.smooth_q = smooth_q != 0;
  params.scale = scale;
  params.q4 = data<uint8_t>(*q4);
  params.q_scale = data<uint8_t>(*q_scale);
  params.q_tensor = data<float>(*q_tensor);
  params.delta = data<float>(*delta);
  params.lse_shift = data<float>(*lse_shift);
  params.workspace = data<void>(*workspace);
  if (check.failed()) return check.result();
  check_workspace(check, workspace, quantize_q_fp4_workspace_bytes(params.shape));
  if (check.failed()) return check.result();
  return finish("sage_jax_quantize_q_fp4", quantize_q_fp4(params, stream));
}

ffi::Error attend_handler(Stream stream, Arg q4, Arg q_scale, Arg q_tensor, Arg delta, Arg lse_shift,
                          Arg k4, Arg k_scale, Arg k_tensor, Arg v4, Arg v_scale, Arg v_tensor,
                          Arg v_mean, Arg bounds, Arg q_seg, Arg kv_seg, Arg mask, Arg bias, Out out,
                          Out lse, Out workspace, float scale, int64_t window_left,
                          int64_t window_right, int32_t mask_tile) {
  Check check("sage_jax_attend_fp4");
  const int64_t B = axis(q4, 0), N = axis(q4, 1), T = axis(q4, 2), Hp = 2 * axis(q4, 3);
  const int64_t K = axis(k4, 1), S = axis(k4, 2), H = axis(*out, 3), T128 = (T + 127) / 128;
  check_head_dim(check, H, Hp);
  check_groups(check, N, K);
  check_blocks(check, "q4", q4, q_scale, {B, N, T, Hp});
  check.buffer("q_tensor", q_tensor, {B, N, T128}, {DataType::F32});
  check.buffer("delta", delta, {B, N, T128, S}, {DataType::F32});
  check.buffer("lse_shift", lse_shift, {B, N, T}, {DataType::F32});
  check_blocks(check, "k4", k4, k_scale, {B, K, S, Hp});
  check.buffer("k_tensor", k_tensor, {B, K}, {DataType::F32});
  check_blocks(check, "v4", v4, v_scale, {B, K, Hp, 64 * tiles64(S)});
  check.buffer("v_tensor", v_tensor, {B, K}, {DataType::F32});
  check.buffer("v_mean", v_mean, {B, K, Hp}, {DataType::F32});
  check.buffer("out", *out, {B, T, N, H}, kFloats);
  check.buffer("lse", *lse, {B, N, T}, {DataType::F32});

  AttendFp4Params params = {};
  params.shape = {int(B), int(T), int(S), int(N), int(K), int(H), int(Hp)};
  params.masks = mask_params(
      check, {bounds, q_seg, kv_seg, mask, bias, window_left, window_right, mask_tile}, params.shape);
  params.scale = scale;
  params.q4 = data<const uint8_t>(q4);
  params.q_scale = data<const uint8_t>(q_scale);
  params.q_tensor = data<const float>(q_tensor);
  params.delta = data<const float>(delta);
  params.lse_shift = data<const float>(lse_shift);
  params.k4 = data<const uint8_t>(k4);
  params.k_scale = data<const uint8_t>(k_scale);
  params.k_tensor = data<const float>(k_tensor);
  params.v4 = data<const uint8_t>(v4);
  params.v_scale = data<const uint8_t>(v_scale);
  params.v_tensor = data<const float>(v_tensor);
  params.v_mean = data<const float>(v_mean);
  params.out_dtype = dtype_of(*out);
  params.out = data<void>(*out);
  params.lse = data<float>(*lse);
  params.workspace = data<void>(*workspace);
  if (check.failed()) return check.result();
  check_workspace(check, workspace, mask_workspace_bytes(params.shape, params.masks));
  if (check.failed()) return check.result();
  return finish("sage_jax_attend_fp4", attend_fp4(params, stream));
}

}  // namespace
}  // namespace sage

XLA_FFI_DEFINE_HANDLER_SYMBOL(SageQuantizeKvFp4Cuda, sage::quantize_kv_handler,
                              (sage::bind<3, 9>()
                                   .Attr<int32_t>("four_or_six")
                                   .Attr<int32_t>("smooth_k")
                                   .Attr<int32_t>("smooth_v")),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SageQuantizeQFp4Cuda, sage::quantize_q_handler,
                              (sage::bind<5, 6>()
                                   .Attr<int32_t>("four_or_six")
                                   .Attr<int32_t>("smooth_q")
                                   .Attr<float>("scale")),
                              {xla::ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(SageAttendFp4Cuda, sage::attend_handler,
                              (sage::bind<17, 3>()
                                   .Attr<float>("scale")
                                   .Attr<int64_t>("window_left")
                                   .Attr<int64_t>("window_right")
                                   .Attr<int32_t>("mask_tile")),
                              {xla::ffi::Traits::kCmdBufferCompatible});
