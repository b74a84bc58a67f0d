// Gaussians of full covariance C C^T, C lower triangular with a positive diagonal. All in nats.
//
//   z = mu + C eps,   KL(N(mu, C C^T) || N(0, I)) = (|mu|^2 + |C|_F^2 - D) / 2 - sum_i log C_ii
//
// Nothing is solved or factorised: the determinant of a triangle is its diagonal. On the diagonal
// that is ReparameterizeKl of gaussian.h, whatever map gives it (scale.h). What is left, below, is
// linear in C, and added to it by the engines (triangle.h, covariance.cu):
//
//   z_i += sum_{j<i} C_ij eps_j,   KL += sum_{j<i} C_ij^2 / 2,
//   d C_ij = grad_z_i eps_j + grad_kl C_ij.
#pragma once

#include "gaussian.h"

namespace fastvae {

struct Triangle {
  template <class T>
  static FASTVAE_HD T sample(T z, T c, T eps) {
    return z + c * eps;
  }
  template <class T>
  static FASTVAE_HD T kl(T kl, T c) {
    return kl + T(0.5) * (c * c);
  }
  template <class T>
  static FASTVAE_HD T gradient(T c, T eps, T grad_z, T grad_kl) {
    return grad_z * eps + grad_kl * c;
  }
};

// Rows meet triangles: row r that of number r % triangles, so that samples may share them.
struct TriangleSweep {
  DType dtype = DType::kFloat32;  // of the triangles; all else is float, or double, and contiguous
  int64_t rows = 0, dims = 0, triangles = 1;
  const void* scale_tril = nullptr;  // at and above the diagonal it is not read
  int64_t triangle_stride = 0, line_stride = 0, column_stride = 0;
  const int64_t* key = nullptr;      // z_i of a row takes normal row * dims + i
  void *z = nullptr, *kl = nullptr;  // [rows, dims], [rows]: added to

  const void *grad_z = nullptr, *grad_kl = nullptr;  // [rows, dims], [rows]; null: zero
  const void* d_diagonal = nullptr;                  // [rows, dims]
  void* d_scale_tril = nullptr;  // [triangles, dims, dims], contiguous, zero above the diagonal
};

}  // namespace fastvae
