// Tiles of standard normals and Gumbels for the CPU engine: sixteen Philox counters at a time.
//
// The 32x32 -> 64 bit products are the cost, and no compiler vectorises them well: gcc 12 makes
// 0.9 ns a word of the plain loop on a Zen 4 core, 0.37 with one counter in each 64-bit lane and
// the widening multiply named. Hence two short twins for x86 beside the portable loop.
#pragma once

#include <algorithm>

#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12's own _mm512_undefined_epi32
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
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
inline constexpr int kNoiseGroup = 4 * kLanes;  // normals come in whole groups of as many
inline constexpr int kNoiseChunk = 8;           // groups drawn at once, first all of their words

// Word j of counter l is [j][l].
using NoiseWords = uint32_t[4][kNoiseChunk * kLanes];

// The round keys: a broadcast load each, where adding them up would cost the loop as much again.
struct RoundKeys {
  uint64_t x[philox::kRounds][2];

  explicit RoundKeys(uint64_t seed) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (auto& round : x) {
      round[0] = key0, round[1] = key1;
      key0 += philox::kWeyl0, key1 += philox::kWeyl1;
    }
  }
};

#if defined(FASTVAE_MULTIVERSION) || defined(__AVX512F__)
#define FASTVAE_AVX512_WORDS
FASTVAE_TARGET("arch=x86-64-v4")
inline void words_avx512(philox::Key key, uint64_t index, int groups, NoiseWords& words) {
  using Lanes = uint64_t __attribute__((vector_size(64)));  // the low halves count
  const auto multiply = [](Lanes a, uint32_t b) FASTVAE_TARGET("arch=x86-64-v4") {
    return (Lanes)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
  };
  constexpr Lanes kCount{0, 1, 2, 3, 4, 5, 6, 7};
  const RoundKeys keys(key.seed);
  for (int at = 0; at < groups * kLanes; at += kLanes) {
    Lanes c0[2], c1[2], c2[2] = {}, c3[2] = {};  // two at a time hide each other's latency
    for (int w = 0; w < 2; ++w) {
      c0[w] = kCount + (key.offset + index + static_cast<uint64_t>(at + 8 * w));
      c1[w] = c0[w] >> 32;
    }
#pragma GCC unroll 10
    for (int round = 0; round < philox::kRounds; ++round) {
#pragma GCC unroll 2
      for (int w = 0; w < 2; ++w) {
        const Lanes p0 = multiply(c0[w], philox::kMul0), p1 = multiply(c2[w], philox::kMul1);
        c0[w] = (p1 >> 32) ^ c1[w] ^ keys.x[round][0];
        c2[w] = (p0 >> 32) ^ c3[w] ^ keys.x[round][1];
        c1[w] = p1;
        c3[w] = p0;
      }
    }
    for (int w = 0; w < 2; ++w) {
      const Lanes c[4] = {c0[w], c1[w], c2[w], c3[w]};
      for (int j = 0; j < 4; ++j) {
        _mm256_storeu_si256((__m256i*)&words[j][at + 8 * w], _mm512_cvtepi64_epi32((__m512i)c[j]));
      }
    }
  }
}
#endif

#if defined(FASTVAE_MULTIVERSION) || (defined(__AVX2__) && !defined(__AVX512F__))
#define FASTVAE_AVX2_WORDS
FASTVAE_TARGET("arch=x86-64-v3")
inline void words_avx2(philox::Key key, uint64_t index, int groups, NoiseWords& words) {
  using Lanes = uint64_t __attribute__((vector_size(32)));
  const auto multiply = [](Lanes a, uint32_t b) FASTVAE_TARGET("arch=x86-64-v3") {
    return (Lanes)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
  };
  constexpr Lanes kCount{0, 1, 2, 3};
  const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  const RoundKeys keys(key.seed);
  for (int at = 0; at < groups * kLanes; at += 8) {
    Lanes c0[2], c1[2], c2[2] = {}, c3[2] = {};
    for (int w = 0; w < 2; ++w) {
      c0[w] = kCount + (key.offset + index + static_cast<uint64_t>(at + 4 * w));
      c1[w] = c0[w] >> 32;
    }
#pragma GCC unroll 10
    for (int round = 0; round < philox::kRounds; ++round) {
#pragma GCC unroll 2
      for (int w = 0; w < 2; ++w) {
        const Lanes p0 = multiply(c0[w], philox::kMul0), p1 = multiply(c2[w], philox::kMul1);
        c0[w] = (p1 >> 32) ^ c1[w] ^ keys.x[round][0];
        c2[w] = (p0 >> 32) ^ c3[w] ^ keys.x[round][1];
        c1[w] = p1;
        c3[w] = p0;
      }
    }
    for (int w = 0; w < 2; ++w) {
      const Lanes c[4] = {c0[w], c1[w], c2[w], c3[w]};
      for (int j = 0; j < 4; ++j) {
        const __m256i packed = _mm256_permutevar8x32_epi32((__m256i)c[j], even);
        _mm_storeu_si128((__m128i*)&words[j][at + 4 * w], _mm256_castsi256_si128(packed));
      }
    }
  }
}
#endif

inline void words_portable(philox::Key key, uint64_t index, int groups, NoiseWords& words) {
  for (int l = 0; l < groups * kLanes; ++l) {
    const philox::Words w = philox::block(key, index + static_cast<uint64_t>(l));
    for (int j = 0; j < 4; ++j) words[j][l] = w.x[j];
  }
}

// The words of blocks index, index + 1, ...
inline void philox_words(philox::Key key, uint64_t index, int groups, NoiseWords& words) {
#if defined(FASTVAE_MULTIVERSION)
  static const auto best = __builtin_cpu_supports("x86-64-v4")   ? words_avx512
                           : __builtin_cpu_supports("x86-64-v3") ? words_avx2
                                                                 : words_portable;
  best(key, index, groups, words);
#elif defined(FASTVAE_AVX512_WORDS)
  words_avx512(key, index, groups, words);
#elif defined(FASTVAE_AVX2_WORDS)
  words_avx2(key, index, groups, words);
#else
  words_portable(key, index, groups, words);
#endif
}

// Box-Muller over groups of words.
template <class T>
FASTVAE_CLONES void box_muller(const NoiseWords& words, int groups, T* to) {
  const int n = groups * kLanes;
#pragma omp simd
  for (int l = 0; l < n; ++l) {
    const philox::Pair<T> a = philox::normal_pair<T>(words[0][l], words[1][l]);
    const philox::Pair<T> b = philox::normal_pair<T>(words[2][l], words[3][l]);
    to[4 * l] = a.first;
    to[4 * l + 1] = a.second;
    to[4 * l + 2] = b.first;
    to[4 * l + 3] = b.second;
  }
}

// Of every word its Gumbel. The words are put in order first: interleaved stores of what is
// computed cost gcc twice as much as the arithmetic.
template <class T>
FASTVAE_CLONES void gumbels(const NoiseWords& words, int groups, T* to) {
  const int n = groups * kLanes;
  uint32_t ordered[kNoiseChunk * kNoiseGroup];
#pragma omp simd
  for (int l = 0; l < n; ++l) {
    ordered[4 * l] = words[0][l];
    ordered[4 * l + 1] = words[1][l];
    ordered[4 * l + 2] = words[2][l];
    ordered[4 * l + 3] = words[3][l];
  }
#pragma omp simd
  for (int i = 0; i < 4 * n; ++i) to[i] = philox::gumbel<T>(ordered[i]);
}

// Draws from blocks index, index + 1, ...: at least count numbers, rounded up to whole groups,
// which transform(words, groups, to) makes of their words.
template <class T, class Transform>
inline void fill_noise(philox::Key key, uint64_t index, T* to, int64_t count,
                       const Transform& transform) {
  NoiseWords words;
  constexpr int64_t kChunk = kNoiseChunk * kNoiseGroup;
  for (int64_t i = 0; i < count; i += kChunk) {
    const auto groups =
        static_cast<int>((std::min(kChunk, count - i) + kNoiseGroup - 1) / kNoiseGroup);
    philox_words(key, index + static_cast<uint64_t>(i) / 4, groups, words);
    transform(words, groups, to + i);
  }
}

template <class T>
inline void fill_normal(philox::Key key, uint64_t index, T* to, int64_t count) {
  fill_noise(key, index, to, count, box_muller<T>);
}
template <class T>
inline void fill_gumbel(philox::Key key, uint64_t index, T* to, int64_t count) {
  fill_noise(key, index, to, count, gumbels<T>);
}

}  // namespace fastvae::cpu
