// Tiles of standard normals for the CPU engine: sixteen Philox counters at a time.
//
// The 32x32 -> 64 bit products are the cost, and no compiler vectorises them well: gcc 12 makes
// 0.9 ns a word of the plain loop on a Zen 4 core, 0.37 with one counter in each 64-bit lane and
// the widening multiply named. Hence two short twins for x86 beside the portable loop.
#pragma once

#if defined(__x86_64__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12's own _mm512_undefined_epi32
#include <immintrin.h>
#endif

#include "philox.h"

// FASTVAE_MULTIVERSION: the hot loops are compiled for several levels and the processor's best is
// chosen at load time. Without it (FASTVAE_ISA=x86-64-v3, other processors) the flags decide.
#ifdef FASTVAE_MULTIVERSION
#define FASTVAE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define FASTVAE_TARGET(isa) __attribute__((target(isa)))
#else
#define FASTVAE_CLONES
#define FASTVAE_TARGET(isa)
#endif

namespace fastvae::cpu {

inline constexpr int kLanes = 16;               // floats in the widest vector register
inline constexpr int kNoiseGroup = 4 * kLanes;  // elements drawn at once

using NoiseWords = uint32_t[4][kLanes];  // word j of counter l

#if defined(FASTVAE_MULTIVERSION) || defined(__AVX512F__)
#define FASTVAE_AVX512_WORDS
FASTVAE_TARGET("arch=x86-64-v4")
inline void words_avx512(philox::Key key, uint64_t index, NoiseWords& words) {
  using Lanes = uint64_t __attribute__((vector_size(64)));  // the low halves count
  const auto multiply = [](Lanes a, uint32_t b) FASTVAE_TARGET("arch=x86-64-v4") {
    return (Lanes)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
  };
  for (int half = 0; half < kLanes; half += 8) {
    Lanes c0 = (Lanes{0, 1, 2, 3, 4, 5, 6, 7} + half) + (key.offset + index);
    Lanes c1 = c0 >> 32, c2 = {}, c3 = {};
    uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < philox::kRounds; ++round) {
      const Lanes p0 = multiply(c0, philox::kMul0), p1 = multiply(c2, philox::kMul1);
      c0 = (p1 >> 32) ^ c1 ^ static_cast<uint64_t>(key0);
      c2 = (p0 >> 32) ^ c3 ^ static_cast<uint64_t>(key1);
      c1 = p1;
      c3 = p0;
      key0 += philox::kWeyl0;
      key1 += philox::kWeyl1;
    }
    const Lanes c[4] = {c0, c1, c2, c3};
    for (int j = 0; j < 4; ++j) {
      _mm256_storeu_si256((__m256i*)&words[j][half], _mm512_cvtepi64_epi32((__m512i)c[j]));
    }
  }
}
#endif

#if defined(FASTVAE_MULTIVERSION) || (defined(__AVX2__) && !defined(__AVX512F__))
#define FASTVAE_AVX2_WORDS
FASTVAE_TARGET("arch=x86-64-v3")
inline void words_avx2(philox::Key key, uint64_t index, NoiseWords& words) {
  using Lanes = uint64_t __attribute__((vector_size(32)));
  const auto multiply = [](Lanes a, uint32_t b) FASTVAE_TARGET("arch=x86-64-v3") {
    return (Lanes)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
  };
  const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  for (int quarter = 0; quarter < kLanes; quarter += 4) {
    Lanes c0 = (Lanes{0, 1, 2, 3} + quarter) + (key.offset + index);
    Lanes c1 = c0 >> 32, c2 = {}, c3 = {};
    uint32_t key0 = static_cast<uint32_t>(key.seed), key1 = static_cast<uint32_t>(key.seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < philox::kRounds; ++round) {
      const Lanes p0 = multiply(c0, philox::kMul0), p1 = multiply(c2, philox::kMul1);
      c0 = (p1 >> 32) ^ c1 ^ static_cast<uint64_t>(key0);
      c2 = (p0 >> 32) ^ c3 ^ static_cast<uint64_t>(key1);
      c1 = p1;
      c3 = p0;
      key0 += philox::kWeyl0;
      key1 += philox::kWeyl1;
    }
    const Lanes c[4] = {c0, c1, c2, c3};
    for (int j = 0; j < 4; ++j) {
      const __m256i packed = _mm256_permutevar8x32_epi32((__m256i)c[j], even);
      _mm_storeu_si128((__m128i*)&words[j][quarter], _mm256_castsi256_si128(packed));
    }
  }
}
#endif

inline void words_portable(philox::Key key, uint64_t index, NoiseWords& words) {
  for (int l = 0; l < kLanes; ++l) {
    const philox::Words w = philox::block(key, index + static_cast<uint64_t>(l));
    for (int j = 0; j < 4; ++j) words[j][l] = w.x[j];
  }
}

inline void philox_words(philox::Key key, uint64_t index, NoiseWords& words) {
#if defined(FASTVAE_MULTIVERSION)
  static const auto best = __builtin_cpu_supports("x86-64-v4")   ? words_avx512
                           : __builtin_cpu_supports("x86-64-v3") ? words_avx2
                                                                 : words_portable;
  best(key, index, words);
#elif defined(FASTVAE_AVX512_WORDS)
  words_avx512(key, index, words);
#elif defined(FASTVAE_AVX2_WORDS)
  words_avx2(key, index, words);
#else
  words_portable(key, index, words);
#endif
}

// Box-Muller over one group of words.
template <class T>
FASTVAE_CLONES void box_muller(const NoiseWords& words, T* to) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const philox::Pair<T> a = philox::normal_pair<T>(words[0][l], words[1][l]);
    const philox::Pair<T> b = philox::normal_pair<T>(words[2][l], words[3][l]);
    to[4 * l] = a.first;
    to[4 * l + 1] = a.second;
    to[4 * l + 2] = b.first;
    to[4 * l + 3] = b.second;
  }
}

// Normals of blocks index, index + 1, ...: at least count of them, rounded up to whole groups.
template <class T>
inline void fill_normal(philox::Key key, uint64_t index, T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kNoiseGroup) {
    NoiseWords words;
    philox_words(key, index + static_cast<uint64_t>(i) / 4, words);
    box_muller(words, to + i);
  }
}

}  // namespace fastvae::cpu
