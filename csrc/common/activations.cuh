// The activations and their derivatives in fp32, on ex2.approx and rcp.approx alone.
#pragma once
#include "../include/bottleneck.h"
#include "ptx.cuh"

namespace fastadapt::cuda {

FASTADAPT_DEVICE float exponential(float v) { return ptx::exp2_approx(1.4426950408889634f * v); }

// sigma(v), and 1 - sigma(v), which the subtraction would round away near sigma = 1. Below -80 sigma is 0 in every 2-byte type, and e would overflow. (No fmaxf, which
// takes -80 for a v that is no number.)
struct Logistic {
  float value, rest;
};
FASTADAPT_DEVICE Logistic logistic(float v) {
  const float e = exponential(v < -80.f ? 80.f : -v), s = ptx::rcp_approx(1.f + e);
  return {s, e * s};
}

// Three forms cover all activations, so a kernel holds three copies of its activation loops and not five:
// z from `least` on (relu, identity); z sigma(linear z + cubic z^3) (silu, and gelu_new, since 0.5 (1 + tanh u) = sigma(2 u)); the gelu with erf. The slope of relu at 0 is 0.
struct Piecewise {
  float least, below;  // the slope below zero
  FASTADAPT_DEVICE float operator()(float z) const { return z < least ? least : z; }
  FASTADAPT_DEVICE float slope(float z) const { return z > 0.f ? 1.f : below; }
};
struct Gated {
  float linear, cubic;
  FASTADAPT_DEVICE float operator()(float z) const { return z * logistic(z * (linear + cubic * z * z)).value; }
  FASTADAPT_DEVICE float slope(float z) const {
    const Logistic s = logistic(z * (linear + cubic * z * z));
    return s.value + z * s.value * s.rest * (linear + 3.f * cubic * z * z);
  }
};
struct Gelu {
  FASTADAPT_DEVICE float operator()(float z) const { return 0.5f * z * (1.f + erff(z * 0.7071067811865476f)); }
  FASTADAPT_DEVICE float slope(float z) const { return 0.5f * (1.f + erff(z * 0.7071067811865476f)) + z * 0.3989422804014327f * exponential(-0.5f * z * z); }
};

// Calls f with the activation: one branch a tile instead of one a number.
template <class F>
FASTADAPT_DEVICE void with_activation(Activation activation, F f) {
  if (activation == kGelu) return f(Gelu{});
  if (activation == kGeluNew || activation == kSilu) return f(activation == kSilu ? Gated{1.f, 0.f} : Gated{1.5957691216057308f, 0.07135481627260025f});
  return f(activation == kRelu ? Piecewise{0.f, 0.f} : Piecewise{__uint_as_float(0xff800000u), 1.f});
}

}  // namespace fastadapt::cuda
