// Philox4x32 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011) and
// the normals and Gumbels made of it. Host and device, torch-free, one counter at a time.
//
// The layout of the noise, a contract with every caller (DESIGN section 3):
//   key     = (seed, offset), offset in blocks of four words;
//   counter = (offset_lo, offset_hi, 0, 0); element i uses block offset + i / 4, word i % 4;
//   uniform = x 2^-32 + 2^-33, from all 32 bits, in (0, 1];
//   normal  = Box-Muller: words (0, 1) give elements (0, 1) as r cos, r sin; (2, 3) likewise;
//   gumbel  = -log(-log u), each of its own word.
#pragma once

#include "math.h"

namespace fastvae::philox {

struct Words {
  uint32_t x[4];
};

inline constexpr uint32_t kMul0 = 0xD2511F53u, kMul1 = 0xCD9E8D57u;
inline constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
inline constexpr int kRounds = 10;

struct Key {
  uint64_t seed, offset;
};

template <int Rounds>
FASTVAE_HD Words rounds(Words c, uint32_t key0, uint32_t key1) {
  FASTVAE_UNROLL
  for (int round = 0; round < Rounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kMul0) * c.x[0];
    const uint64_t p1 = static_cast<uint64_t>(kMul1) * c.x[2];
    c = {{static_cast<uint32_t>(p1 >> 32) ^ c.x[1] ^ key0, static_cast<uint32_t>(p1),
          static_cast<uint32_t>(p0 >> 32) ^ c.x[3] ^ key1, static_cast<uint32_t>(p0)}};
    key0 += kWeyl0;
    key1 += kWeyl1;
  }
  return c;
}

// The four words of one block of a key's stream; block wraps at 2^64.
FASTVAE_HD Words block(Key key, uint64_t index) {
  const uint64_t counter = key.offset + index;
  return rounds<kRounds>(
      {{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0u, 0u}},
      static_cast<uint32_t>(key.seed), static_cast<uint32_t>(key.seed >> 32));
}

// x 2^-32 + 2^-33. The product by a power of two is exact, so this is one rounding with or without
// an FMA: uniforms are bit-equal everywhere. The largest word rounds to 1, whose logarithm is 0.
template <class T>
FASTVAE_HD T uniform(uint32_t x) {
  return static_cast<T>(x) * T(0x1p-32) + T(0x1p-33);
}
// The same, exact, and vector code everywhere: x are the low bits of 2^20 + x 2^-32.
template <>
FASTVAE_HD double uniform<double>(uint32_t x) {
  return math::from_bits(math::to_bits(0x1p20) + x) - (0x1p20 - 0x1p-33);
}

template <class T>
struct Pair {
  T first, second;
};

// Box-Muller: sqrt(-2 log u0) (cos, sin)(2 pi u1). Largest |z|: sqrt(66 log 2) = 6.76.
template <class T>
FASTVAE_HD Pair<T> normal_pair(uint32_t x0, uint32_t x1) {
  const T radius = math::sqrt(T(-2) * math::log_normal(uniform<T>(x0)));
  const math::SinCos<T> angle = math::sincos_turn(uniform<T>(x1));
  return {radius * angle.cos, radius * angle.sin};
}

// u - 1 for u > 1/2, of the exact u: its word, as a signed number, is that of u - 1.
template <class T>
FASTVAE_HD T uniform_minus_one(uint32_t x) {
  return static_cast<T>(static_cast<int32_t>(x)) * T(0x1p-32) + T(0x1p-33);
}

// The standard Gumbel -log(-log u), of the exact u: none rounds to 1, and the tails of float and
// double are the same, from -log(33 log 2) = -3.13 to 33 log 2 = 22.87.
template <class T>
FASTVAE_HD T gumbel(uint32_t x) {
  return -math::log_normal(-math::log_unit(uniform<T>(x), uniform_minus_one<T>(x)));
}

}  // namespace fastvae::philox
