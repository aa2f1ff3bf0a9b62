// The way in of a plain eager call: checks, autograd node, count and kernels in one step from Python, where fastadapt/functional.py and the ops' Functions take longer than a small
// kernel (measured, forward of a LoRA on 4 rows of 768: 23 us on their way, 9 on this one, 12 as eager operations). A call of 4 rows is what a step of generation is.
//
// Plain is what is right at a glance, on tensors of torch's own in torch's usual state. Anything else gets nothing and goes the long way, which knows modes, tracing, transforms,
// autocast and other backends, and says what is wrong. Formulas, what is saved, and which gradients are asked for are those of the ops' schema.py.
#include <ATen/autocast_mode.h>
#include <ATen/ops/randint.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>

#include "cpu_ops.h"
#include "include/dropout_add_norm.h"
#include "include/gated_bottleneck.h"

namespace {

using namespace fastadapt;
using namespace fastadapt::raw;
using at::ScalarType;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// ---- What is plain.

// A subclass, a fake, functional, batched or lazily negated tensor, or one elsewhere, has other dispatch keys too.
bool plain(const Tensor& t) {
  using c10::DispatchKey;
  const uint64_t usual = c10::DispatchKeySet({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU, DispatchKey::ADInplaceOrView}).raw_repr();
  return (t.key_set().raw_repr() & ~usual) == 0;
}

// Neither modes, tracing nor transforms. Below autograd, as in inference, is usual too.
bool usual_state(bool autocasts) {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  const uint64_t included = c10::default_included_set.raw_repr(), excluded = (c10::default_excluded_set | c10::autograd_dispatch_keyset_with_ADInplaceOrView).raw_repr();
  return (keys.included_.raw_repr() & ~included) == 0 && (keys.excluded_.raw_repr() & ~excluded) == 0 && !(autocasts && at::autocast::is_autocast_enabled(at::kCPU));
}

bool right(const Tensor& t, ScalarType dtype, at::IntArrayRef sizes) { return plain(t) && t.scalar_type() == dtype && t.sizes() == sizes; }
bool right(const optional<Tensor>& t, ScalarType dtype, at::IntArrayRef sizes) { return !t || right(*t, dtype, sizes); }

// (..., D) of a dtype that the kernels take, D >= 1.
bool right_input(const Tensor& x) {
  const ScalarType dtype = x.scalar_type();
  return plain(x) && x.dim() > 1 && x.size(-1) > 0 && (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf);
}

// A down-projection (R, D) of x, whose dtype is the parameters'.
bool right_projection(const Tensor& w, const Tensor& x) {
  return plain(w) && w.dim() == 2 && w.size(0) > 0 && w.size(1) == x.size(-1) && (w.scalar_type() == at::kFloat || w.scalar_type() == x.scalar_type());
}

bool right_number(const optional<Tensor>& t, ScalarType dtype) { return !t || (t->numel() == 1 && right(*t, dtype, t->sizes())); }

bool trained(const Tensor& t) { return t.requires_grad(); }
bool trained(const optional<Tensor>& t) { return t && t->requires_grad(); }

// Whether autograd has to see the call.
template <class... T>
bool recorded(const T&... tensors) {
  return at::GradMode::is_enabled() && !c10::impl::tls_local_dispatch_key_set().excluded_.has(c10::DispatchKey::AutogradCPU) && (trained(tensors) || ...);
}

// ---- Pieces of the calls.

Tensor or_undefined(const optional<Tensor>& t) { return t ? *t : Tensor(); }
optional<Tensor> or_none(const Tensor& t) { return t.defined() ? optional<Tensor>(t) : std::nullopt; }
bool is_given(const Tensor&) { return true; }
bool is_given(const optional<Tensor>& t) { return t.has_value(); }

// (..., D) as the rows that the kernels take; parameters as they take them.
Tensor rows(const Tensor& t) {
  const Tensor flat = t.dim() == 2 ? t : t.reshape({c10::multiply_integers(t.sizes().slice(0, t.dim() - 1)), t.size(-1)});
  return flat.stride(1) == 1 ? flat : flat.contiguous();
}
optional<Tensor> rows(const optional<Tensor>& t) { return t ? optional<Tensor>(rows(*t)) : t; }
// What was saved too: a hook on saved tensors may give it back with other strides.
Tensor whole(const Tensor& t) { return t.contiguous(); }
optional<Tensor> whole(const optional<Tensor>& t) { return t ? optional<Tensor>(t->contiguous()) : t; }
Tensor shaped(const Tensor& rows, const Tensor& like) { return like.dim() == 2 ? rows : rows.view(like.sizes()); }

// As functional.py does: without dropout there is no seed, and one that is not given is drawn.
optional<Tensor> seed_of(const optional<Tensor>& seed, double dropout) {
  if (dropout == 0) return {};
  return seed ? seed : at::randint(std::numeric_limits<int64_t>::max(), {1}, at::TensorOptions().dtype(at::kLong));
}

enum Op : int { kBottleneck, kDropoutAddNorm, kGatedBottleneck, kLora, kOps };
constexpr const char* kNames[kOps] = {"bottleneck", "dropout_add_norm", "gated_bottleneck", "lora"};
std::atomic<int64_t> counts[kOps][2];

// How often each of the ops ran, forward and backward.
std::vector<int64_t> entered(bool reset) {
  std::vector<int64_t> out;
  for (auto& op : counts)
    for (auto& count : op) out.push_back(reset ? count.exchange(0) : count.load());
  return out;
}

// What backward needs: tensors and numbers. The first number says which of the inputs are given, the others have no edge.
template <class... T>
double given(const T&... inputs) {
  int64_t bits = 0, i = 0;
  ((bits |= static_cast<int64_t>(is_given(inputs)) << i++), ...);
  return static_cast<double>(bits);
}
void keep(AutogradContext* ctx, variable_list tensors, std::vector<double> options) {
  ctx->set_materialize_grads(false);
  ctx->save_for_backward(std::move(tensors));
  ctx->saved_data.emplace("options", std::move(options));
}
std::vector<double> options_of(AutogradContext* ctx) { return ctx->saved_data.find("options")->second.toDoubleVector(); }

// A batched gradient (is_grads_batched), a lazily negated one or a subclass has no numbers of its own for a kernel.
void check_gradient(Op op, const Tensor& dy) {
  TORCH_CHECK(!dy.defined() || plain(dy), "fastadapt: backward of ", kNames[op],
              " takes a plain tensor as gradient, neither batched nor lazily negated; with forward inside `with fastadapt.backend.use('reference')` torch computes it");
}

// Identity, through which no second derivative goes.
struct Refusal : torch::autograd::Function<Refusal> {
  static variable_list forward(AutogradContext* ctx, int64_t op, at::TensorList gradients, at::TensorList /* of */) {
    ctx->saved_data["op"] = op;
    return gradients.vec();
  }
  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK(false, "fastadapt: double backward of ", kNames[ctx->saved_data["op"].toInt()],
                " is not supported; torch.func.grad and its like, under which fastadapt's functions are plain torch, can be nested");
  }
};

// The gradients that a kernel returned to their places among those of the inputs, the first `wide` as rows of the shape of `x`; what nobody asked for is no gradient. `of`: what they are
// functions of.
void place(Op op, variable_list computed, at::IntArrayRef places, int64_t needs, const variable_list& of, size_t wide, const Tensor& x, variable_list& out) {
  if (at::GradMode::is_enabled()) {
    variable_list defined;
    std::copy_if(of.begin(), of.end(), std::back_inserter(defined), [](const Tensor& t) { return t.defined(); });
    computed = Refusal::apply(static_cast<int64_t>(op), at::TensorList(computed), at::TensorList(defined));
  }
  for (size_t i = 0; i < places.size(); ++i)
    if (needs >> i & 1) out[places[i]] = i < wide ? shaped(computed[i], x) : std::move(computed[i]);
}

bool needs(AutogradContext* ctx, double given, int64_t place) {
  const uint64_t bits = static_cast<uint64_t>(given);
  return bits >> place & 1 && ctx->needs_input_grad(std::popcount(bits & ((uint64_t{1} << place) - 1)));
}
int64_t needs_of(AutogradContext* ctx, double given, at::IntArrayRef places) {
  int64_t bits = 0;
  for (size_t i = 0; i < places.size(); ++i) bits |= static_cast<int64_t>(needs(ctx, given, places[i])) << i;
  return bits;
}

// ---- The ops. `forward` without a context is a call without gradients.

struct LoRA : torch::autograd::Function<LoRA> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& y, const Tensor& w_down, const Tensor& w_up, const optional<Tensor>& b_up, const optional<Tensor>& seed,
                        double scale, double dropout) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ++counts[kLora][0];
    const auto [out, z] = lora(rows(x), rows(y), whole(w_down), whole(w_up), whole(b_up), seed, scale, dropout, ctx != nullptr);
    if (ctx) keep(ctx, {x, z, w_down, w_up, or_undefined(seed)}, {given(x, y, w_down, w_up, b_up), scale, dropout});
    return shaped(out, y);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static constexpr int64_t kPlaces[] = {0, 2, 3, 4};
    variable_list out(8);
    const Tensor& dy = grads[0];
    if (!dy.defined()) return out;
    const std::vector<double> options = options_of(ctx);
    if (needs(ctx, options[0], 1)) out[1] = dy;
    const int64_t asked = needs_of(ctx, options[0], kPlaces);
    if (!asked) return out;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &z = saved[1], &w_down = saved[2], &w_up = saved[3], &seed = saved[4];
    variable_list computed;
    {
      check_gradient(kLora, dy);
      const at::AutoDispatchBelowADInplaceOrView below;
      ++counts[kLora][1];
      auto [dx, dw_down, dw_up, db_up] = lora_backward(rows(dy), rows(x), whole(z), whole(w_down), whole(w_up), or_none(seed), options[1], options[2], asked);
      computed = {dx, dw_down, dw_up, db_up};
    }
    place(kLora, std::move(computed), kPlaces, asked, {dy, x, w_down, w_up}, 1, x, out);
    return out;
  }
};

optional<Tensor> lora_entrance(const optional<Tensor>& x_, const optional<Tensor>& y_, const optional<Tensor>& w_down_, const optional<Tensor>& w_up_, const optional<Tensor>& b_up,
                               const optional<Tensor>& seed_, double scale, double dropout) {
  if (!x_ || !y_ || !w_down_ || !w_up_ || !usual_state(true)) return {};
  const Tensor &x = *x_, &y = *y_, &w_down = *w_down_, &w_up = *w_up_;
  if (!right_input(x) || !right_projection(w_down, x) || !plain(y) || y.dim() != x.dim() || y.size(-1) < 1 || y.scalar_type() != x.scalar_type()) return {};
  const int64_t out = y.size(-1), last = x.dim() - 1;
  const ScalarType dtype = w_down.scalar_type();
  if (y.sizes().slice(0, last) != x.sizes().slice(0, last) || !right(w_up, dtype, {out, w_down.size(0)}) || !right(b_up, dtype, {out}) || !right_number(seed_, at::kLong)) return {};
  if (!std::isfinite(scale) || !(dropout >= 0 && dropout < 1)) return {};
  const optional<Tensor> seed = seed_of(seed_, dropout);
  return recorded(x, y, w_down, w_up, b_up) ? LoRA::apply(x, y, w_down, w_up, b_up, seed, scale, dropout) : LoRA::forward(nullptr, x, y, w_down, w_up, b_up, seed, scale, dropout);
}

struct Bottleneck : torch::autograd::Function<Bottleneck> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up,
                        const optional<Tensor>& gate, const optional<Tensor>& scale_tensor, const optional<Tensor>& residual, double scale, int64_t activation, bool add_input) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ++counts[kBottleneck][0];
    const auto [y, z] = bottleneck(rows(x), whole(w_down), whole(b_down), whole(w_up), whole(b_up), whole(gate), scale_tensor, rows(residual), scale, activation, add_input, ctx != nullptr);
    if (ctx)
      keep(ctx, {x, z, w_down, w_up, or_undefined(b_up), or_undefined(gate), or_undefined(scale_tensor)},
           {given(x, w_down, b_down, w_up, b_up, gate, scale_tensor, residual), scale, static_cast<double>(activation), static_cast<double>(add_input)});
    return shaped(y, x);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static constexpr int64_t kPlaces[] = {0, 1, 2, 3, 4, 5, 6};
    variable_list out(11);
    const Tensor& dy = grads[0];
    if (!dy.defined()) return out;
    const std::vector<double> options = options_of(ctx);
    if (needs(ctx, options[0], 7)) out[7] = dy;
    const int64_t asked = needs_of(ctx, options[0], kPlaces);
    if (!asked) return out;
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &z = saved[1], &w_down = saved[2], &w_up = saved[3], &b_up = saved[4], &gate = saved[5], &scale_tensor = saved[6];
    variable_list computed;
    {
      check_gradient(kBottleneck, dy);
      const at::AutoDispatchBelowADInplaceOrView below;
      ++counts[kBottleneck][1];
      auto [dx, dw_down, db_down, dw_up, db_up, dgate, dscale] =
          bottleneck_backward(rows(dy), rows(x), whole(z), whole(w_down), whole(w_up), whole(or_none(b_up)), whole(or_none(gate)), or_none(scale_tensor), options[1],
                              static_cast<int64_t>(options[2]), options[3] != 0, asked);
      computed = {dx, dw_down, db_down, dw_up, db_up, dgate, dscale};
    }
    place(kBottleneck, std::move(computed), kPlaces, asked, {dy, x, w_down, w_up, b_up, gate, scale_tensor}, 1, x, out);
    return out;
  }
};

optional<Tensor> bottleneck_entrance(const optional<Tensor>& x_, const optional<Tensor>& w_down_, const optional<Tensor>& b_down, const optional<Tensor>& w_up_, const optional<Tensor>& b_up,
                                     const optional<Tensor>& gate, const optional<Tensor>& scale_tensor, const optional<Tensor>& residual, double scale, int64_t activation, bool add_input) {
  if (!x_ || !w_down_ || !w_up_ || !usual_state(true)) return {};
  const Tensor &x = *x_, &w_down = *w_down_, &w_up = *w_up_;
  if (!right_input(x) || !right_projection(w_down, x) || !right(residual, x.scalar_type(), x.sizes()) || !std::isfinite(scale)) return {};
  const int64_t rank = w_down.size(0), width = x.size(-1);
  const ScalarType dtype = w_down.scalar_type();
  if (!right(w_up, dtype, {width, rank}) || !right(b_down, dtype, {rank}) || !right(b_up, dtype, {width}) || !right(gate, dtype, {width}) || !right_number(scale_tensor, dtype)) return {};
  if (!recorded(x, w_down, b_down, w_up, b_up, gate, scale_tensor, residual))
    return Bottleneck::forward(nullptr, x, w_down, b_down, w_up, b_up, gate, scale_tensor, residual, scale, activation, add_input);
  return Bottleneck::apply(x, w_down, b_down, w_up, b_up, gate, scale_tensor, residual, scale, activation, add_input);
}

// Numbers of a gated bottleneck; `kind` as in include/gated_bottleneck.h.
struct GateOptions {
  double input_scale, adapter_scale, scale;
  int64_t activation, kind;
  bool add;
  int64_t samples, save_gate;
};

struct GatedBottleneck : torch::autograd::Function<GatedBottleneck> {
  static Tensor forward(AutogradContext* ctx, const Tensor& h, const optional<Tensor>& x, const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up,
                        const optional<Tensor>& b_up, const optional<Tensor>& g, const optional<Tensor>& g_bias, const optional<Tensor>& g_up, const optional<Tensor>& g_up_bias,
                        const GateOptions& o) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ++counts[kGatedBottleneck][0];
    // Reading a saved gate is cheaper than recomputing it (schema.py).
    const auto [y, z, zg, logits, total, gate] =
        gated_bottleneck(rows(h), rows(x), whole(w_down), whole(b_down), whole(w_up), whole(b_up), whole(g), whole(g_bias), whole(g_up), whole(g_up_bias), o.input_scale, o.adapter_scale,
                         o.scale, o.activation, o.kind, o.add, o.samples, ctx && o.save_gate != 0, ctx != nullptr);
    if (ctx)
      keep(ctx,
           {h, or_undefined(x), z, zg, logits, total, gate, w_down, or_undefined(b_down), w_up, or_undefined(b_up), or_undefined(g), or_undefined(g_bias), or_undefined(g_up),
            or_undefined(g_up_bias)},
           {given(h, x, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias), o.input_scale, o.adapter_scale, o.scale, static_cast<double>(o.activation), static_cast<double>(o.kind),
            static_cast<double>(o.add), static_cast<double>(o.samples)});
    return shaped(y, h);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static constexpr int64_t kPlaces[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
    variable_list out(11);
    const Tensor& dy = grads[0];
    const std::vector<double> o = options_of(ctx);
    const int64_t asked = dy.defined() ? needs_of(ctx, o[0], kPlaces) : 0;
    if (!asked) return out;
    const variable_list s = ctx->get_saved_variables();
    const Tensor &h = s[0], &z = s[2], &zg = s[3], &logits = s[4], &total = s[5], &gate = s[6];
    variable_list computed, of{dy};
    for (const Tensor& t : s)
      if (t.requires_grad()) of.push_back(t);
    const auto parameter = [&](size_t i) { return whole(or_none(s[i])); };
    {
      check_gradient(kGatedBottleneck, dy);
      const at::AutoDispatchBelowADInplaceOrView below;
      ++counts[kGatedBottleneck][1];
      auto gradients = gated_bottleneck_backward(rows(dy), rows(h), rows(or_none(s[1])), whole(z), whole(zg), whole(logits), whole(total), whole(gate), whole(s[7]), parameter(8),
                                                 whole(s[9]), parameter(10), parameter(11), parameter(12), parameter(13), parameter(14), o[1], o[2], o[3], static_cast<int64_t>(o[4]), static_cast<int64_t>(o[5]), o[6] != 0,
                                                 static_cast<int64_t>(o[7]), asked);
      std::apply([&](auto&... t) { computed = {t...}; }, gradients);
    }
    place(kGatedBottleneck, std::move(computed), kPlaces, asked, of, 2, h, out);
    return out;
  }
};

optional<Tensor> gated_bottleneck_entrance(const optional<Tensor>& h_, const optional<Tensor>& x, const optional<Tensor>& w_down_, const optional<Tensor>& b_down, const optional<Tensor>& w_up_,
                                           const optional<Tensor>& b_up, const optional<Tensor>& g, const optional<Tensor>& g_bias, const optional<Tensor>& g_up,
                                           const optional<Tensor>& g_up_bias, double input_scale, double adapter_scale, double scale, int64_t activation, int64_t kind, bool add,
                                           int64_t save_gate) {
  if (!h_ || !w_down_ || !w_up_ || !g || !usual_state(true)) return {};
  const Tensor &h = *h_, &w_down = *w_down_, &w_up = *w_up_;
  if (!right_input(h) || !right_projection(w_down, h) || !right(x, h.scalar_type(), h.sizes()) || x.has_value() == (kind == kMiddleY)) return {};
  const int64_t rank = w_down.size(0), width = h.size(-1);
  const ScalarType dtype = w_down.scalar_type();
  if (!right(w_up, dtype, {width, rank}) || !right(b_down, dtype, {rank}) || !right(b_up, dtype, {width})) return {};
  if (kind == kLarge) {
    if (!right_projection(*g, h) || g->scalar_type() != dtype || !g_up || !right(g_bias, dtype, {g->size(0)}) || !right(g_up, dtype, {width, g->size(0)}) || !right(g_up_bias, dtype, {width}))
      return {};
  } else if (g_up || g_up_bias || !right(g, dtype, {kind == kSmall ? 2 * width : width}) || (kind == kMiddleY ? g_bias.has_value() : !right(g_bias, dtype, {1}))) {
    return {};
  }
  if (kind == kSmall && (h.dim() != 3 || h.size(1) == 0)) return {};
  if (!std::isfinite(input_scale) || !std::isfinite(adapter_scale) || !std::isfinite(scale)) return {};
  const GateOptions options{input_scale, adapter_scale, scale, activation, kind, add, kind == kSmall ? h.size(0) : 1, save_gate};
  if (!recorded(h, x, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias))
    return GatedBottleneck::forward(nullptr, h, x, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias, options);
  return GatedBottleneck::apply(h, x, w_down, b_down, w_up, b_up, g, g_bias, g_up, g_up_bias, options);
}

struct DropoutAddNorm : torch::autograd::Function<DropoutAddNorm> {
  // y, and v where it is wanted and not x; without a norm v alone.
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const optional<Tensor>& residual, const optional<Tensor>& weight, const optional<Tensor>& bias,
                               const optional<Tensor>& seed, int64_t norm, double eps, double dropout, bool return_sum) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ++counts[kDropoutAddNorm][0];
    const bool is_x = norm && !residual && !seed, returns_v = !norm || (return_sum && !is_x);
    auto [y, v, mean, rstd] = dropout_add_norm(rows(x), rows(residual), whole(weight), whole(bias), seed, norm, eps, dropout, ctx || returns_v);
    if (returns_v) v = shaped(v, x);
    if (ctx)
      keep(ctx, {norm ? is_x ? x : v : Tensor(), norm == kLayerNorm ? mean : Tensor(), norm ? rstd : Tensor(), or_undefined(weight), or_undefined(seed)},
           {given(x, residual, weight, bias), static_cast<double>(norm), dropout, static_cast<double>(x.scalar_type()),
            static_cast<double>(!seed && (!residual || residual->scalar_type() == x.scalar_type()))});
    variable_list out;
    if (norm) out.push_back(shaped(y, x));
    if (returns_v) out.push_back(v);
    return out;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static constexpr int64_t kPlaces[] = {0, 1, 2, 3};
    variable_list out(9);
    const std::vector<double> options = options_of(ctx);
    const bool norm = options[1] != 0, same = options[4] != 0;  // same: x has the residual's gradient
    const Tensor dy = norm ? grads[0] : Tensor(), dv = norm ? grads.size() > 1 ? grads[1] : Tensor() : grads[0], &like = dy.defined() ? dy : dv;
    if (!like.defined()) return out;
    const int64_t wanted = needs_of(ctx, options[0], kPlaces);
    const bool need_x = wanted & 1, need_residual = wanted & 2;
    // Without dy the sum's gradient is the residual's, and there are no others.
    const int64_t asked = (need_x && !(same && (!dy.defined() || need_residual)) ? 1 : 0) | (dy.defined() ? wanted & 14 : 0);
    if (asked) {
      variable_list saved = ctx->get_saved_variables();
      if (!dy.defined()) std::fill(saved.begin(), saved.end() - 1, Tensor());
      const Tensor &v = saved[0], &mean = saved[1], &rstd = saved[2], &weight = saved[3], &seed = saved[4];
      variable_list computed;
      {
        check_gradient(kDropoutAddNorm, dy), check_gradient(kDropoutAddNorm, dv);
        const at::AutoDispatchBelowADInplaceOrView below;
        ++counts[kDropoutAddNorm][1];
        auto [dx, dresidual, dweight, dbias] =
            dropout_add_norm_backward(rows(or_none(dy)), rows(or_none(dv)), rows(or_none(v)), whole(or_none(mean)), whole(or_none(rstd)), whole(or_none(weight)), or_none(seed),
                                      dy.defined() ? static_cast<int64_t>(options[1]) : 0, options[2], static_cast<ScalarType>(options[3]), asked);
        computed = {dx, dresidual, dweight, dbias};
      }
      place(kDropoutAddNorm, std::move(computed), kPlaces, asked, {dy, dv, v, weight}, 2, like, out);
    }
    if (!dy.defined() && need_residual) out[1] = dv;
    if (need_x && !(asked & 1)) out[0] = dy.defined() ? out[1] : dv;
    return out;
  }
};

using TwoOptional = std::tuple<optional<Tensor>, optional<Tensor>>;

TwoOptional dropout_add_norm_entrance(const optional<Tensor>& x_, const optional<Tensor>& residual, const optional<Tensor>& weight, const optional<Tensor>& bias,
                                      const optional<Tensor>& seed_, int64_t norm, double eps, double dropout, bool return_sum) {
  if (!x_ || !right_input(*x_) || !usual_state(false) || !right_number(seed_, at::kLong)) return {};
  const Tensor& x = *x_;
  const bool wide = residual && residual->scalar_type() == at::kFloat;
  if (!right(residual, wide ? at::kFloat : x.scalar_type(), x.sizes())) return {};
  const at::IntArrayRef width = x.sizes().slice(x.dim() - 1);
  if (weight ? norm == 0 || !right(weight, weight->scalar_type() == at::kFloat || wide ? at::kFloat : x.scalar_type(), width) || !right(bias, weight->scalar_type(), width) : bias.has_value())
    return {};
  if (!(eps >= 0 && std::isfinite(eps)) || !(dropout >= 0 && dropout < 1) || (norm == 0 && !residual && dropout == 0)) return {};
  const optional<Tensor> seed = seed_of(seed_, dropout);
  const variable_list out = recorded(x, residual, weight, bias) ? DropoutAddNorm::apply(x, residual, weight, bias, seed, norm, eps, dropout, return_sum)
                                                                : DropoutAddNorm::forward(nullptr, x, residual, weight, bias, seed, norm, eps, dropout, return_sum);
  // What would be x itself is x.
  return {out[0], !return_sum ? optional<Tensor>() : norm == 0 ? out[0] : out.size() > 1 ? out[1] : x};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fastadapt_cpu, m) {
  m.def(
      "bottleneck_entrance(Tensor? x, Tensor? w_down, Tensor? b_down, Tensor? w_up, Tensor? b_up, Tensor? gate, Tensor? scale_tensor, Tensor? residual, float scale, int activation,"
      " bool add_input) -> Tensor?",
      &bottleneck_entrance);
  m.def(
      "gated_bottleneck_entrance(Tensor? h, Tensor? x, Tensor? w_down, Tensor? b_down, Tensor? w_up, Tensor? b_up, Tensor? gate_weight, Tensor? gate_bias, Tensor? gate_up_weight,"
      " Tensor? gate_up_bias, float input_scale, float adapter_scale, float scale, int activation, int kind, bool add, int save_gate) -> Tensor?",
      &gated_bottleneck_entrance);
  m.def("lora_entrance(Tensor? x, Tensor? y, Tensor? w_down, Tensor? w_up, Tensor? b_up, Tensor? seed, float scale, float dropout) -> Tensor?", &lora_entrance);
  m.def(
      "dropout_add_norm_entrance(Tensor? x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, int norm, float eps, float dropout, bool return_sum) -> (Tensor?, Tensor?)",
      &dropout_add_norm_entrance);
  m.def("entered(bool reset) -> int[]", &entered);
}
