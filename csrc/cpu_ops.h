// The raw CPU ops that cpu_entrance.cpp calls; cpu_ops.cpp has them.
#pragma once
#include <ATen/core/Tensor.h>

namespace fastadapt::raw {

using at::Tensor;
using std::optional;

std::tuple<Tensor, Tensor> bottleneck(const Tensor& x, const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up, const optional<Tensor>& gate,
                                      const optional<Tensor>& scale_tensor, const optional<Tensor>& residual, double scale, int64_t activation, bool add_input, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_backward(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w_down, const Tensor& w_up,
                                                                                       const optional<Tensor>& b_up, const optional<Tensor>& gate, const optional<Tensor>& scale_tensor,
                                                                                       double scale, int64_t activation, bool add_input, int64_t needs);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_bottleneck(const Tensor& h, const optional<Tensor>& x, const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up,
                                                                            const optional<Tensor>& b_up, const optional<Tensor>& g, const optional<Tensor>& g_bias,
                                                                            const optional<Tensor>& g_up, const optional<Tensor>& g_up_bias, double input_scale, double adapter_scale,
                                                                            double scale, int64_t activation, int64_t kind, bool add, int64_t samples, int64_t save_gate, bool save);
using TenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
TenTensors gated_bottleneck_backward(const Tensor& dy, const Tensor& h, const optional<Tensor>& x, const Tensor& z, const Tensor& zg, const Tensor& logits, const Tensor& total, const Tensor& gate,
                                     const Tensor& w_down, const optional<Tensor>& b_down, const Tensor& w_up, const optional<Tensor>& b_up, const optional<Tensor>& g,
                                     const optional<Tensor>& g_bias, const optional<Tensor>& g_up, const optional<Tensor>& g_up_bias, double input_scale, double adapter_scale, double scale,
                                     int64_t activation, int64_t kind, bool add, int64_t samples, int64_t needs);
std::tuple<Tensor, Tensor> lora(const Tensor& x, const Tensor& y, const Tensor& w_down, const Tensor& w_up, const optional<Tensor>& b_up, const optional<Tensor>& seed, double scale,
                                double dropout, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor> lora_backward(const Tensor& dy, const Tensor& x, const Tensor& z, const Tensor& w_down, const Tensor& w_up, const optional<Tensor>& seed,
                                                         double scale, double dropout, int64_t needs);
std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_norm(const Tensor& x, const optional<Tensor>& residual, const optional<Tensor>& weight, const optional<Tensor>& bias,
                                                            const optional<Tensor>& seed, int64_t norm, double eps, double dropout, bool save);
std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_norm_backward(const optional<Tensor>& dy, const optional<Tensor>& dv, const optional<Tensor>& v, const optional<Tensor>& mean,
                                                                     const optional<Tensor>& rstd, const optional<Tensor>& weight, const optional<Tensor>& seed, int64_t norm,
                                                                     double dropout, at::ScalarType dtype, int64_t needs);

}  // namespace fastadapt::raw
