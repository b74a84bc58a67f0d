// The contract between the mixtures of logistic.h and their engines (pixels.h, logistic.cu). A
// pixel has a value in each of its channels; it comes from one of several components, all channels
// from the same one:
//
//   log_prob = log sum_k softmax(logits)_k prod_c P(x_c; mu_ck + sum_{j<c} tanh(a_cjk) x_j, s_ck)
//
// Inputs lie in memory in any order: slices of what a network put out, channels last or first, are
// read where they are. Nothing of the size of pixels x components is stored, but for gradients.
#pragma once

#include "logistic.h"

namespace fastvae {

// Where an element lies, in strides of elements: of pixel (i0, i1, ...), innermost first, channel c
// and component k. The channels of coeffs are pairs of a channel and one before it, c (c - 1) / 2 +
// j.
inline constexpr int kMaxGroups = 4;
struct PixelOperand {
  const void* data = nullptr;  // null: not there, or not wanted
  int64_t pixel[kMaxGroups] = {};
  int64_t channel = 0, component = 0;
};

struct PixelMixture {
  DType dtype = DType::kFloat32;  // of inputs and gradients; what is [pixels] is float, or double
  int64_t sizes[kMaxGroups] = {1, 1, 1, 1};  // of the pixels, which are counted innermost first
  int64_t channels = 0, components = 0;
  double levels = 255;                       // bins, less one
  ScaleMap scale_map = ScaleMap::kLogScale;  // what log_scale holds
  PixelOperand x, logits, mu, log_scale, coeffs;

  void* log_prob = nullptr;    // [pixels]
  void* kept = nullptr;        // [pixels, 2]: of a Normaliser; or null
  const void* grad = nullptr;  // [pixels]
  PixelOperand d_x, d_logits, d_mu, d_log_scale, d_coeffs;

  FASTVAE_HD int64_t pixels() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
};

FASTVAE_HD constexpr int64_t pair_of(int64_t channel, int64_t before) {
  return channel * (channel - 1) / 2 + before;
}

}  // namespace fastvae
