// The verbs of reference.py that a CPU does best in C++, as operators of torch.
//
// Knows tensors and the formats of packed.py and panels.py. Knows no layer, no request and no page of Python. One
// source for every processor: float arithmetic is in vectors of 8 that the compiler maps to what there is, and only the
// products of 8-bit integers, a screen below, are written for AVX2, for VNNI (twice as wide with AVX-512), for Arm's
// dot products, and plainly.
//
// What is computed for a token never depends on the tokens beside it, nor on how many threads there are: each row's
// sums run in one order. So the same text comes out however requests are batched.
//
// Letters: T tokens, R rows of a matrix, C its columns, N hidden size, I width of an expert, E experts, A active
// experts, H query heads, K key/value heads, D head size, L tokens of a context, B blocks of S tokens.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#if !defined(ERNIE_PORTABLE) && defined(__AVX2__)
#include <immintrin.h>
#define ERNIE_AVX2 1
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define ERNIE_DPBUSD _mm256_dpbusd_epi32
#if defined(__AVX512BW__)
#define ERNIE_AVX512 1
#endif
#elif defined(__AVXVNNI__)
#define ERNIE_DPBUSD _mm256_dpbusd_avx_epi32
#endif
#elif !defined(ERNIE_PORTABLE) && defined(__ARM_FEATURE_DOTPROD) && defined(__aarch64__)
#include <arm_neon.h>
#define ERNIE_SDOT 1
#endif

#ifndef ERNIE_NAMESPACE
#define ERNIE_NAMESPACE ernie_serve_cpu
#endif

namespace {

using at::Tensor;
using bf16 = c10::BFloat16;

// ---- vectors of 8 ---------------------------------------------------------------------------------------------------

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));
typedef uint16_t h8 __attribute__((vector_size(16)));
typedef int8_t b8 __attribute__((vector_size(8)));

template <class V, class P>
inline V read(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline f8 load(const float* p) { return read<f8>(p); }
inline f8 load(const bf16* p) { return (f8)(__builtin_convertvector(read<h8>(p), u8) << 16); }
inline f8 load(const int8_t* p) {
#ifdef ERNIE_AVX2
  return (f8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(read<int64_t>(p))));
#else
  return __builtin_convertvector(__builtin_convertvector(read<b8>(p), i8), f8);
#endif
}

inline void store(float* p, f8 v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(bf16* p, f8 v) {  // to the nearest, ties to even; what is no number stays none
  u8 bits = (u8)v;
  u8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  h8 out = __builtin_convertvector(v == v ? rounded : (u8)(bits * 0 + 0x7fc0), h8);
  std::memcpy(p, &out, sizeof(out));
}

inline f8 all(float x) { return f8{x, x, x, x, x, x, x, x}; }
// Where one of the two is no number, the second is taken.
#ifdef ERNIE_AVX2
inline f8 largest(f8 a, f8 b) { return (f8)_mm256_max_ps((__m256)a, (__m256)b); }
inline f8 smallest(f8 a, f8 b) { return (f8)_mm256_min_ps((__m256)a, (__m256)b); }
#else
inline f8 largest(f8 a, f8 b) { return a > b ? a : b; }
inline f8 smallest(f8 a, f8 b) { return a < b ? a : b; }
#endif
inline f8 magnitude(f8 v) { return (f8)((i8)v & 0x7fffffff); }
inline f8 add_product(f8 sum, f8 a, f8 b) {
#if defined(ERNIE_AVX2) && defined(__FMA__)
  return (f8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return sum + a * b;  // fused or not is the compiler's choice, one for all instances in GCC 11, 12 and clang 14
#endif
}

// Eight numbers in the order in which `sum` adds those of a vector.
template <class V>
inline V sum_of(const V& a, const V& b, const V& c, const V& d, const V& e, const V& f, const V& g, const V& h) {
  return ((a + e) + (b + f)) + ((c + g) + (d + h));
}
inline float sum(f8 v) {
#ifdef ERNIE_AVX2
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehdup_ps(four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehl_ps(two, two)));
#else
  return sum_of(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7]);
#endif
}
inline float largest(f8 v) {
  return std::max(std::max(std::max(v[0], v[4]), std::max(v[1], v[5])),
                  std::max(std::max(v[2], v[6]), std::max(v[3], v[7])));
}

// Row i becomes column i.
inline void transpose(f8 (&v)[8]) {
#ifdef ERNIE_AVX2
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0x44);
      b[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + 2 + j], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    v[i] = (f8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    v[i + 4] = (f8)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
#else
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < i; j++) {
      const float x = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = x;
    }
#endif
}

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest whole number, ties to even
inline f8 rounded(f8 v) { return (v + ROUND) - ROUND; }
inline void store(int8_t* p, f8 whole) {
  b8 out = __builtin_convertvector((i8)(whole + ROUND) - (i8)all(ROUND), b8);
  std::memcpy(p, &out, sizeof(out));
}

inline f8 exponential(f8 x) {  // within 2 units of the last place; 0 far below, infinity far above
  f8 n = rounded(x * 1.44269504f);
  f8 kept = smallest(largest(n, all(-127)), all(128));
  f8 r = (x - kept * 0.693359375f) + kept * 2.12194440e-4f;
  f8 p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  i8 half = __builtin_convertvector(kept, i8) >> 1, rest = __builtin_convertvector(kept, i8) - half;
  f8 y = p * (f8)((half + 127) << 23) * (f8)((rest + 127) << 23);  // 2^n in two factors, each of them normal
  y = x < -88.0f ? f8{} : y;
  y = x > 88.8f ? all(std::numeric_limits<float>::infinity()) : y;
  return x == x ? y : x;
}

inline f8 silu(f8 x) { return x / (1.0f + exponential(-x)); }

// ---- threads --------------------------------------------------------------------------------------------------------

constexpr int64_t WORTH = 1 << 17;  // multiply-adds that are worth waking a thread for

// f(0) .. f(n - 1), which come to about `products` multiply-adds, on torch's threads. Each thread walks through
// neighbours, so that it reads memory in order; one that is done early takes from the others.
template <class F>
void share(int64_t n, int64_t products, const F& f) {
  const int64_t threads = std::min({static_cast<int64_t>(at::get_num_threads()), n, products / WORTH});
  if (threads <= 1 || at::in_parallel_region()) {
    for (int64_t i = 0; i < n; i++) f(i);
    return;
  }
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  const std::unique_ptr<Range[]> ranges(new Range[threads]);
  for (int64_t t = 0; t < threads; t++) {
    ranges[t].next = n * t / threads;
    ranges[t].end = n * (t + 1) / threads;
  }
  at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t own = first; own < last; own++)
      for (int64_t k = 0; k < threads; k++) {
        Range& range = ranges[(own + k) % threads];
        for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end;) f(i);
      }
  });
}

template <class F>
void share(int64_t n, const F& f) {
  share(n, std::numeric_limits<int64_t>::max(), f);
}

template <class T>
std::unique_ptr<T[]> room(int64_t n) {
  return std::unique_ptr<T[]>(new T[std::max<int64_t>(n, 1)]);
}

#define ERNIE_DISPATCH(type, name, ...)                                                   \
  [&] {                                                                                   \
    if (type == at::kFloat) {                                                             \
      using name = float;                                                                 \
      return __VA_ARGS__();                                                               \
    }                                                                                     \
    TORCH_CHECK(type == at::kBFloat16, "a tensor of float32 or bfloat16 is needed here"); \
    using name = bf16;                                                                    \
    return __VA_ARGS__();                                                                 \
  }()

// ---- activations in 8 bits ------------------------------------------------------------------------------------------

constexpr int GROUP = 32;

struct Group {  // 32 numbers of one token: q * scale
  int8_t q[GROUP];
  float scale;
  int32_t start4, start8;  // where the sum of products with a group of weights begins, see Dot
};

inline int32_t start4(const int8_t* q);
inline int32_t start8(const int8_t* q);

// Something that is no number, anywhere in the group, makes the scale none.
inline void quantize_group(const f8 (&x)[4], Group& out) {
  f8 m = largest(largest(magnitude(x[0]), magnitude(x[1])), largest(magnitude(x[2]), magnitude(x[3])));
  const float top = largest(m), nothing = sum((x[0] + x[1]) + (x[2] + x[3])) * 0.0f;
  const float inverse = top > 0 ? 127.0f / top : 0.0f;
  for (int i = 0; i < 4; i++) store(out.q + 8 * i, rounded(x[i] * inverse));
  out.scale = top / 127.0f + nothing;
  out.start4 = start4(out.q);
  out.start8 = start8(out.q);
}

template <class S>
void quantize_row(const S* x, int64_t columns, Group* out) {
  for (int64_t g = 0; g < columns / GROUP; g++, x += GROUP) {
    const f8 v[4] = {load(x), load(x + 8), load(x + 16), load(x + 24)};
    quantize_group(v, out[g]);
  }
}

// ---- 8 rows of weights by a few tokens
// --------------------------------------------------------------------------------
//
// Dot4 and Dot8 sum, in integers, one group of 8 rows with one group of a token: `start`, then `add` for each vector of
// weights (unsigned nibbles for 4 bits) and 4 numbers of the token, then `end`, which brings the codes in.

inline int32_t four(const int8_t* q) { return read<int32_t>(q); }
inline int32_t total(const int8_t* q) {
  int32_t s = 0;
  for (int i = 0; i < GROUP; i++) s += q[i];
  return s;
}

#if defined(ERNIE_DPBUSD)

inline f8 codes_of(const uint8_t* p) { return load(reinterpret_cast<const int8_t*>(p)); }
inline f8 end_of(__m256i sum, f8 codes) { return (f8)_mm256_cvtepi32_ps(sum) * codes; }
inline int32_t start4(const int8_t* q) { return -8 * total(q); }
inline int32_t start8(const int8_t* q) { return -128 * total(q); }

struct Dot4 {
  using Codes = f8;
  __m256i sum;
  void start(const Group& x) { sum = _mm256_set1_epi32(x.start4); }
  void add(__m256i w, int32_t x) { sum = ERNIE_DPBUSD(sum, w, _mm256_set1_epi32(x)); }
  f8 end(f8 codes) const { return end_of(sum, codes); }
};

struct Dot8 {
  using Codes = f8;
  using Weights = __m256i;
  __m256i sum;
  static Weights weights(__m256i w) { return _mm256_xor_si256(w, _mm256_set1_epi8(-128)); }  // w + 128
  void start(const Group& x) { sum = _mm256_set1_epi32(x.start8); }
  void add(Weights w, int32_t x) { sum = ERNIE_DPBUSD(sum, w, _mm256_set1_epi32(x)); }
  f8 end(f8 codes) const { return end_of(sum, codes); }
};

template <class Codes>
inline Codes codes(const uint8_t* p) {
  return codes_of(p);
}

#elif defined(ERNIE_AVX2)

// Keeps the compiler from turning one sum in a register into a tree of sums in memory.
inline void keep(__m256i& sum) { asm("" : "+x"(sum)); }

// Two sums of 16 bits a row, each of them exact: they begin at -8 times its numbers of the token, so that no sum on the
// way leaves -16 * 8 * 127 .. 16 * 8 * 127. The codes come in as the pairs are added.
inline int32_t start4(const int8_t* q) {
  int32_t even = 0, odd = 0;
  for (int i = 0; i < GROUP; i += 4) {
    even += q[i] + q[i + 1];
    odd += q[i + 2] + q[i + 3];
  }
  return static_cast<int32_t>(static_cast<uint32_t>(-8 * even & 0xffff) | static_cast<uint32_t>(-8 * odd) << 16);
}
inline int32_t start8(const int8_t*) { return 0; }

struct Dot4 {
  using Codes = __m256i;
  __m256i sum;
  void start(const Group& x) { sum = _mm256_set1_epi32(x.start4); }
  void add(__m256i w, int32_t x) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, _mm256_set1_epi32(x)));
    keep(sum);
  }
  f8 end(__m256i codes) const { return (f8)_mm256_cvtepi32_ps(_mm256_madd_epi16(sum, codes)); }
};

struct Dot8 {
  using Codes = f8;
  struct Weights {
    __m256i signs, sizes;
  };
  __m256i sum;
  static Weights weights(__m256i w) { return {w, _mm256_abs_epi8(w)}; }
  void start(const Group&) { sum = _mm256_setzero_si256(); }
  void add(const Weights& w, int32_t x) {
    const __m256i pairs = _mm256_maddubs_epi16(w.sizes, _mm256_sign_epi8(_mm256_set1_epi32(x), w.signs));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    keep(sum);
  }
  f8 end(f8 codes) const { return (f8)_mm256_cvtepi32_ps(sum) * codes; }
};

template <class Codes>
inline Codes codes(const uint8_t* p);
template <>
inline f8 codes<f8>(const uint8_t* p) {
  return load(reinterpret_cast<const int8_t*>(p));
}
template <>
inline __m256i codes<__m256i>(const uint8_t* p) {  // each code twice, in 16 bits
  const __m256i places = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3,  //
                                          -1, 4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7);
  return _mm256_srai_epi16(_mm256_shuffle_epi8(_mm256_set1_epi64x(read<int64_t>(p)), places), 8);
}

#elif defined(ERNIE_SDOT)

inline int32_t start4(const int8_t* q) { return -8 * total(q); }
inline int32_t start8(const int8_t*) { return 0; }

struct Bytes {
  uint8x16_t first, last;  // of 4 rows each
};

struct Dot {
  using Codes = f8;
  int32x4_t first, last;
  void begin(int32_t x) { first = last = vdupq_n_s32(x); }
  void add(const Bytes& w, int32_t x) {
    const int8x16_t numbers = vreinterpretq_s8_s32(vdupq_n_s32(x));
    first = vdotq_s32(first, vreinterpretq_s8_u8(w.first), numbers);
    last = vdotq_s32(last, vreinterpretq_s8_u8(w.last), numbers);
  }
  f8 end(f8 codes) const {
    f8 sums;
    const float32x4_t halves[2] = {vcvtq_f32_s32(first), vcvtq_f32_s32(last)};
    std::memcpy(&sums, halves, sizeof(sums));
    return sums * codes;
  }
};
struct Dot4 : Dot {
  void start(const Group& x) { begin(x.start4); }
};
struct Dot8 : Dot {
  using Weights = Bytes;
  static Bytes weights(const Bytes& w) { return w; }
  void start(const Group&) { begin(0); }
};

template <class Codes>
inline Codes codes(const uint8_t* p) {
  return load(reinterpret_cast<const int8_t*>(p));
}

#else

inline f8 codes_of(const uint8_t* p) { return load(reinterpret_cast<const int8_t*>(p)); }
inline int32_t start4(const int8_t* q) { return -8 * total(q); }
inline int32_t start8(const int8_t*) { return 0; }

struct Bytes {
  uint8_t at[32];
};
template <class B>
inline void add_four(i8& sum, const B* w, int32_t x) {
  int8_t q[4];
  std::memcpy(q, &x, 4);
  for (int row = 0; row < 8; row++)
    sum[row] += w[4 * row] * q[0] + w[4 * row + 1] * q[1] + w[4 * row + 2] * q[2] + w[4 * row + 3] * q[3];
}

struct Dot4 {
  using Codes = f8;
  i8 sum;
  void start(const Group& x) { sum = i8{} + x.start4; }
  void add(const Bytes& w, int32_t x) { add_four(sum, w.at, x); }
  f8 end(f8 codes) const { return __builtin_convertvector(sum, f8) * codes; }
};

struct Dot8 {
  using Codes = f8;
  using Weights = Bytes;
  i8 sum;
  static const Bytes& weights(const Bytes& w) { return w; }
  void start(const Group&) { sum = i8{}; }
  void add(const Bytes& w, int32_t x) { add_four(sum, reinterpret_cast<const int8_t*>(w.at), x); }
  f8 end(f8 codes) const { return __builtin_convertvector(sum, f8) * codes; }
};

template <class Codes>
inline Codes codes(const uint8_t* p) {
  return codes_of(p);
}

#endif

#if defined(ERNIE_AVX2)
inline __m256i vector(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i low(__m256i w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
inline __m256i high(__m256i w) { return _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(15)); }
#elif defined(ERNIE_SDOT)
inline Bytes vector(const uint8_t* p) { return {vld1q_u8(p), vld1q_u8(p + 16)}; }
inline Bytes low(const Bytes& w) { return {vandq_u8(w.first, vdupq_n_u8(15)), vandq_u8(w.last, vdupq_n_u8(15))}; }
inline Bytes high(const Bytes& w) { return {vshrq_n_u8(w.first, 4), vshrq_n_u8(w.last, 4)}; }
#else
inline Bytes vector(const uint8_t* p) { return read<Bytes>(p); }
inline Bytes low(const Bytes& w) {
  Bytes out;
  for (int i = 0; i < 32; i++) out.at[i] = w.at[i] & 15;
  return out;
}
inline Bytes high(const Bytes& w) {
  Bytes out;
  for (int i = 0; i < 32; i++) out.at[i] = w.at[i] >> 4;
  return out;
}
#endif

constexpr int64_t unit_bytes(int bits) { return 16 + 64 * bits; }
constexpr int64_t AHEAD = 4096;  // bytes that are asked for before they are needed: the machine's own guess is shorter
constexpr int TOKENS = 6;        // tokens at once, for the registers hold no more
#ifdef ERNIE_AVX512
constexpr int EIGHT_BIT_TOKENS = TOKENS;  // the same of weights in 8 bits
constexpr int FEW_TOKENS = 4;             // so many wait for memory, which one block alone asks for sooner
#else
constexpr int EIGHT_BIT_TOKENS = 4;
#endif
constexpr int RUN = 8;  // blocks of 8 rows at once, at most: 64 rows

using Sums = f8[TOKENS];  // of one block of 8 rows, for each token

// out[t] = 8 rows times token t, without the rows' scales. `data` is one block of rows, `units` its units.
template <int BITS, int T>
inline void multiply(const uint8_t* data, int64_t units, const Group* const* x, f8* out) {
  using Dot = std::conditional_t<BITS == 4, Dot4, Dot8>;
  f8 sums[T] = {};
  for (int64_t g = 0; g < 2 * units; g++) {
    const uint8_t* unit = data + (g >> 1) * unit_bytes(BITS);
    const uint8_t* w = unit + 16 + (g & 1) * 32 * BITS;
    __builtin_prefetch(w + AHEAD);
    __builtin_prefetch(w + AHEAD + 64);
    if constexpr (BITS == 8) {
      __builtin_prefetch(w + AHEAD + 128);
      __builtin_prefetch(w + AHEAD + 192);
    }
    Dot dots[T];
    for (int t = 0; t < T; t++) dots[t].start(x[t][g]);
    for (int i = 0; i < BITS; i++) {
      if constexpr (BITS == 4) {
        const auto v = vector(w + 32 * i);
        const auto first = low(v), second = high(v);
        for (int t = 0; t < T; t++) dots[t].add(first, four(x[t][g].q + 8 * i));
        for (int t = 0; t < T; t++) dots[t].add(second, four(x[t][g].q + 8 * i + 4));
      } else {
        const auto v = Dot::weights(vector(w + 32 * i));
        for (int t = 0; t < T; t++) dots[t].add(v, four(x[t][g].q + 4 * i));
      }
    }
    const auto c = codes<typename Dot::Codes>(unit + 8 * (g & 1));
    for (int t = 0; t < T; t++) sums[t] = add_product(sums[t], dots[t].end(c), all(x[t][g].scale));
  }
  for (int t = 0; t < T; t++) out[t] = sums[t];
}

#ifdef ERNIE_AVX512
inline __m512i two(__m256i first, __m256i second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

// The same, to the last bit, of two blocks at once, `data` and the one `next` bytes behind it, in vectors of 512 bits:
// what is spread of a token is spread for both.
template <int BITS, int T>
inline void multiply_two(const uint8_t* data, int64_t next, int64_t units, const Group* const* x, f8* out, f8* second) {
  const __m512i nibble = _mm512_set1_epi8(15), sign = _mm512_set1_epi8(-128);
  __m512 sums[T] = {};
  for (int64_t g = 0; g < 2 * units; g++) {
    const uint8_t* unit = data + (g >> 1) * unit_bytes(BITS);
    const uint8_t* w = unit + 16 + (g & 1) * 32 * BITS;
    const uint8_t* ahead = w + AHEAD;
    if (ahead >= data + next) ahead += next;  // the first block's end is followed by the next pair, not by the second
    for (int i = 0; i < 32 * BITS; i += 64) {
      __builtin_prefetch(ahead + i);
      __builtin_prefetch(ahead + next + i);
    }
    __m512i dots[T];
    for (int t = 0; t < T; t++) dots[t] = _mm512_set1_epi32(BITS == 4 ? x[t][g].start4 : x[t][g].start8);
    for (int i = 0; i < BITS; i++) {
      const __m512i v = two(vector(w + 32 * i), vector(w + next + 32 * i));
      if constexpr (BITS == 4) {
        const __m512i low = _mm512_and_si512(v, nibble), high = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
        for (int t = 0; t < T; t++)
          dots[t] = _mm512_dpbusd_epi32(dots[t], low, _mm512_set1_epi32(four(x[t][g].q + 8 * i)));
        for (int t = 0; t < T; t++)
          dots[t] = _mm512_dpbusd_epi32(dots[t], high, _mm512_set1_epi32(four(x[t][g].q + 8 * i + 4)));
      } else {
        const __m512i raised = _mm512_xor_si512(v, sign);
        for (int t = 0; t < T; t++)
          dots[t] = _mm512_dpbusd_epi32(dots[t], raised, _mm512_set1_epi32(four(x[t][g].q + 4 * i)));
      }
    }
    const uint8_t* code = unit + 8 * (g & 1);
    const __m512 codes = _mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_set_epi64x(read<int64_t>(code + next), read<int64_t>(code))));
    for (int t = 0; t < T; t++) {
      const __m512 whole = _mm512_mul_ps(_mm512_cvtepi32_ps(dots[t]), codes);
      sums[t] = _mm512_fmadd_ps(whole, _mm512_set1_ps(x[t][g].scale), sums[t]);
    }
  }
  for (int t = 0; t < T; t++) {
    std::memcpy(&out[t], &sums[t], sizeof(f8));
    std::memcpy(&second[t], reinterpret_cast<const char*>(&sums[t]) + sizeof(f8), sizeof(f8));
  }
}
#endif

constexpr int64_t PIECE = 48 << 10;  // bytes of weights that a thread takes at a time, and keeps while tokens pass

// x [T, C] as rows of so many cells, each written by f(row, columns, its cells)
template <class Cell, class S, class F>
std::unique_ptr<Cell[]> each_row(const S* x, int64_t tokens, int64_t columns, int64_t cells, const F& f) {
  const int64_t some = std::max<int64_t>(1, 16384 / std::max<int64_t>(columns, 1));
  auto out = room<Cell>(tokens * cells);
  share((tokens + some - 1) / some, tokens * columns, [&](int64_t i) {
    for (int64_t t = i * some; t < std::min(tokens, (i + 1) * some); t++)
      f(x + t * columns, columns, out.get() + t * cells);
  });
  return out;
}

// A packed matrix, or a stack of them.
struct Matrix {
  using Cell = Group;  // what a row of activations is made of
  static constexpr int64_t CELL = GROUP;

  const uint8_t* data;
  const float* scales;
  int64_t bits, blocks, units, members;

  Matrix(const Tensor& d, const Tensor& s, int64_t bits) : bits(bits) {
    const int64_t n = d.dim();
    TORCH_CHECK(bits == 4 || bits == 8, "weights have 4 or 8 bits, not ", bits);
    TORCH_CHECK((n == 3 || n == 4) && d.scalar_type() == at::kByte && d.is_contiguous(), "data is no packed matrix");
    TORCH_CHECK(d.size(n - 1) == unit_bytes(bits), "a unit of ", bits, " bits has not ", d.size(n - 1), " bytes");
    blocks = d.size(n - 3), units = d.size(n - 2), members = n == 4 ? d.size(0) : 1;
    TORCH_CHECK(s.scalar_type() == at::kFloat && s.is_contiguous() && s.numel() == members * blocks * 8,
                "a packed matrix has a float32 scale for each of its padded rows");
    data = d.const_data_ptr<uint8_t>();
    scales = s.const_data_ptr<float>();
  }

  int64_t columns() const { return units * 64; }
  int64_t block_bytes() const { return units * unit_bytes(bits); }
  const uint8_t* block(int64_t member, int64_t b) const { return data + (member * blocks + b) * block_bytes(); }
  f8 scale(int64_t member, int64_t b) const { return load(scales + (member * blocks + b) * 8); }

  int64_t at_once() const { return bits == 4 ? TOKENS : EIGHT_BIT_TOKENS; }
  int64_t piece() const { return std::max<int64_t>(1, PIECE / block_bytes()); }

  // Rows 8b .. 8(b + n) - 1 of a member times `count` tokens, at most at_once().
  void times(int64_t member, int64_t b, int64_t n, const Group* const* x, int64_t count, Sums* out) const {
    int64_t i = 0;
#ifdef ERNIE_AVX512
    for (; count > FEW_TOKENS && i + 2 <= n; i += 2) times_two(member, b + i, x, count, out[i], out[i + 1]);
#endif
    for (; i < n; i++) times_block(member, b + i, x, count, out[i]);
  }

  // x [T, C] in 8 bits, a row of groups for each token
  template <class S>
  static std::unique_ptr<Group[]> prepared(const S* x, int64_t tokens, int64_t columns) {
    return each_row<Group>(x, tokens, columns, columns / GROUP, quantize_row<S>);
  }

  // 32 numbers of a row, as the next product takes them
  template <class S>
  static void keep(const f8 (&numbers)[4], Group* to) {
    quantize_group(numbers, *to);
  }

 private:
  __attribute__((noinline)) void times_block(int64_t member, int64_t b, const Group* const* x, int64_t count,
                                             f8* out) const {
    const uint8_t* at = block(member, b);
    bits == 4 ? dispatch<4, TOKENS>(at, x, count, out) : dispatch<8, EIGHT_BIT_TOKENS>(at, x, count, out);
    const f8 s = scale(member, b);
    for (int64_t t = 0; t < count; t++) out[t] *= s;
  }

#ifdef ERNIE_AVX512
  __attribute__((noinline)) void times_two(int64_t member, int64_t b, const Group* const* x, int64_t count, f8* out,
                                           f8* second) const {
    const uint8_t* at = block(member, b);
    bits == 4 ? dispatch_two<4, TOKENS>(at, x, count, out, second) : dispatch_two<8, TOKENS>(at, x, count, out, second);
    const f8 s = scale(member, b), s2 = scale(member, b + 1);
    for (int64_t t = 0; t < count; t++) out[t] *= s, second[t] *= s2;
  }

  template <int BITS, int T>
  void dispatch_two(const uint8_t* at, const Group* const* x, int64_t count, f8* out, f8* second) const {
    if (count == T) return multiply_two<BITS, T>(at, block_bytes(), units, x, out, second);
    if constexpr (T - 1 > FEW_TOKENS) return dispatch_two<BITS, T - 1>(at, x, count, out, second);
  }
#endif

  template <int BITS, int T>
  void dispatch(const uint8_t* at, const Group* const* x, int64_t count, f8* out) const {
    if (count == T) return multiply<BITS, T>(at, units, x, out);
    if constexpr (T > 1) return dispatch<BITS, T - 1>(at, x, count, out);
  }
};

// ---- 16 rows of bfloat16 by a few tokens ----------------------------------------------------------------------------
//
// A panel is 16 rows: for each column 8 pairs, row i beside row 8 + i, so that one load brings 16 rows their next
// column, and a shift and a mask make floats of them: with 6 tokens that costs nothing beside their products. Every sum
// is one chain in the order of the columns, so that it has the same bits whatever is computed beside it.

constexpr int64_t PANEL = 16;

// out[2p], out[2p + 1] = the rows of panel p times each token. P panels lie one behind the other.
template <int P, int T>
__attribute__((noinline)) void multiply_panels(const uint16_t* data, int64_t columns, const float* const* x,
                                               Sums* out) {
  f8 sums[2 * P][T] = {};
  for (int64_t c = 0; c < columns; c++)
    for (int p = 0; p < P; p++) {
      const uint16_t* at = data + (p * columns + c) * PANEL;
      __builtin_prefetch(reinterpret_cast<const uint8_t*>(at) + AHEAD);
      const u8 pairs = read<u8>(at);
      const f8 first = (f8)(pairs << 16), second = (f8)(pairs & 0xffff0000u);
      for (int t = 0; t < T; t++) {
        const f8 number = all(x[t][c]);
        sums[2 * p][t] = add_product(sums[2 * p][t], first, number);
        sums[2 * p + 1][t] = add_product(sums[2 * p + 1][t], second, number);
      }
    }
  for (int i = 0; i < 2 * P; i++)
    for (int t = 0; t < T; t++) out[i][t] = sums[i][t];
}

template <class S>
void widen_row(const S* x, int64_t columns, float* out) {
  int64_t c = 0;
  for (; c + 8 <= columns; c += 8) store(out + c, load(x + c));
  for (; c < columns; c++) out[c] = static_cast<float>(x[c]);
}

// A matrix in panels, or several of one shape, each in memory of its own.
struct Panels {
  using Cell = float;
  static constexpr int64_t CELL = 1;

  std::vector<const uint16_t*> data;
  int64_t blocks = 0, members, width = 0;  // blocks of 8 rows, two to a panel

  explicit Panels(at::TensorList matrices) : members(static_cast<int64_t>(matrices.size())) {
    for (const Tensor& d : matrices) {
      TORCH_CHECK(d.dim() == 4 && d.size(2) == 8 && d.size(3) == 2 && d.scalar_type() == at::kBFloat16 &&
                      d.is_contiguous(),
                  "a matrix in panels is bfloat16 [R / 16, C, 8, 2]");
      TORCH_CHECK(d.sizes() == matrices[0].sizes(), "matrices of one stack have one shape");
      data.push_back(reinterpret_cast<const uint16_t*>(d.const_data_ptr<bf16>()));
      blocks = 2 * d.size(0), width = d.size(1);
    }
  }

  int64_t columns() const { return width; }
  const uint16_t* panel(int64_t member, int64_t p) const { return data[member] + p * width * PANEL; }

  int64_t at_once() const { return TOKENS; }
  int64_t piece() const { return RUN * std::max<int64_t>(1, PIECE / (RUN * 8 * 2 * std::max<int64_t>(width, 1))); }

  // Rows 8b .. 8(b + n) - 1 of a member times `count` tokens, at most at_once(). Both b and n are even.
  void times(int64_t member, int64_t b, int64_t n, const float* const* x, int64_t count, Sums* out) const {
    for (int64_t i = 0; i < n;) {
      const uint16_t* at = panel(member, (b + i) / 2);
      // A sum waits for its last product. With few tokens it takes several panels to have others meanwhile.
      const int64_t most = count == 1 ? 4 : count == 2 ? 2 : 1, left = (n - i) / 2;
      const int64_t taken = left >= most ? most : left >= 2 && most >= 2 ? 2 : 1;
      if (taken == 4)
        multiply_panels<4, 1>(at, width, x, out + i);
      else if (taken == 2 && count == 1)
        multiply_panels<2, 1>(at, width, x, out + i);
      else if (taken == 2)
        multiply_panels<2, 2>(at, width, x, out + i);
      else
        one_panel<TOKENS>(at, x, count, out + i);
      i += 2 * taken;
    }
  }

  template <class S>
  static std::unique_ptr<float[]> prepared(const S* x, int64_t tokens, int64_t columns) {
    return each_row<float>(x, tokens, columns, columns, widen_row<S>);
  }

  template <class S>
  static void keep(const f8 (&numbers)[4], float* to) {
    for (int i = 0; i < 4; i++) {
      S rounded[8];
      store(rounded, numbers[i]);
      store(to + 8 * i, load(rounded));
    }
  }

 private:
  template <int T>
  void one_panel(const uint16_t* at, const float* const* x, int64_t count, Sums* out) const {
    if (count == T) return multiply_panels<1, T>(at, width, x, out);
    if constexpr (T > 1) return one_panel<T - 1>(at, x, count, out);
  }
};

// ---- linear ---------------------------------------------------------------------------------------------------------

template <class S>
void store_rows(S* out, f8 v, int64_t count) {
  if (count >= 8) return store(out, v);
  for (int64_t i = 0; i < count; i++) out[i] = static_cast<S>(v[i]);
}

// `tokens` rows of activations, `stride` cells apart from `base`, in the order of `index` if there is one
template <class Cell>
void point(const Cell* base, const int32_t* index, int64_t count, int64_t stride, const Cell** out) {
  for (int64_t k = 0; k < count; k++) out[k] = base + (index ? index[k] : k) * stride;
}

template <class M>
Tensor times_all(const Tensor& x_, const M& w, int64_t rows) {
  const Tensor x = x_.contiguous();
  TORCH_CHECK(x.dim() == 2 && x.size(1) == w.columns(), "the weight has ", w.columns(), " columns, x ", x.sizes());
  const int64_t T = x.size(0), cells = w.columns() / M::CELL;
  Tensor y = at::empty({T, rows}, x.options());
  ERNIE_DISPATCH(x.scalar_type(), S, [&] {
    const auto in = M::prepared(x.const_data_ptr<S>(), T, w.columns());
    S* out = y.data_ptr<S>();
    const int64_t some = w.piece();
    share((w.blocks + some - 1) / some, T * rows * w.columns(), [&](int64_t i) {
      const int64_t last = std::min(w.blocks, (i + 1) * some);
      for (int64_t t = 0; t < T; t += w.at_once()) {
        const int64_t count = std::min(w.at_once(), T - t);
        const typename M::Cell* tokens[TOKENS];
        point(in.get() + t * cells, nullptr, count, cells, tokens);
        for (int64_t b = i * some; b < last; b += RUN) {
          const int64_t n = std::min<int64_t>(RUN, last - b);
          Sums sums[RUN];
          w.times(0, b, n, tokens, count, sums);
          for (int64_t k = 0; k < count; k++)
            for (int64_t j = 0; j < n; j++)
              store_rows(out + (t + k) * rows + 8 * (b + j), sums[j][k], rows - 8 * (b + j));
        }
      }
    });
  });
  return y;
}

Tensor linear(const Tensor& x, const Tensor& data, const Tensor& scales, int64_t bits, int64_t rows) {
  const Matrix w(data, scales, bits);
  TORCH_CHECK(w.members == 1 && rows <= w.blocks * 8 && rows > w.blocks * 8 - 8, "rows do not fit the packed matrix");
  return times_all(x, w, rows);
}

Tensor panel_linear(const Tensor& x, const Tensor& data, int64_t rows) {
  const Panels w(data);
  TORCH_CHECK(rows <= w.blocks * 8 && rows > w.blocks * 8 - PANEL, "rows do not fit the panels");
  return times_all(x, w, rows);
}

// ---- the router -----------------------------------------------------------------------------------------------------

// logits[t] = w . x[t], float32, for up to four tokens; each token's sums are in the same order however many there are
template <class S, int G>
void scores_of(const float* w, const S* x, int64_t N, float* out, int64_t stride) {
  f8 sums[G][2] = {};
  for (int64_t n = 0; n < N; n += 16)
    for (int i = 0; i < 2; i++) {
      const f8 v = load(w + n + 8 * i);
      for (int t = 0; t < G; t++) sums[t][i] += v * load(x + t * N + n + 8 * i);
    }
  for (int t = 0; t < G; t++) out[t * stride] = sum(sums[t][0] + sums[t][1]);
}

struct Router {
  const float *weight, *bias;
  int64_t E, N, A;
  float norm_min;

  Router(const Tensor& w, const Tensor& b, int64_t top_k, double norm_min)
      : A(top_k), norm_min(static_cast<float>(norm_min)) {
    TORCH_CHECK(w.dim() == 2 && w.is_contiguous() && w.scalar_type() == at::kFloat && b.is_contiguous() &&
                    b.scalar_type() == at::kFloat && b.numel() == w.size(0) && w.size(1) % 16 == 0,
                "the router's weight is [E, N] and its bias [E], both float32, N a multiple of 16");
    weight = w.const_data_ptr<float>(), bias = b.const_data_ptr<float>();
    E = w.size(0), N = w.size(1);
    TORCH_CHECK(A > 0 && A <= E, "of ", E, " experts ", A, " are chosen");
  }

  // The experts of x [T, N]: weights and ids, both [T, A].
  template <class S>
  void choose(const S* x, int64_t T, S* weights, int64_t* ids) const {
    const auto logits = room<float>(T * E);
    const int64_t tiles = (T + 3) / 4, experts = 16, slices = (E + experts - 1) / experts;
    share(tiles * slices, T * E * N, [&](int64_t i) {
      const int64_t t = i % tiles * 4, first = i / tiles * experts, count = std::min<int64_t>(4, T - t);
      for (int64_t e = first; e < std::min(E, first + experts); e++) {
        float* out = logits.get() + t * E + e;
        const S* rows = x + t * N;
        if (count == 1)
          scores_of<S, 1>(weight + e * N, rows, N, out, E);
        else if (count == 2)
          scores_of<S, 2>(weight + e * N, rows, N, out, E);
        else if (count == 3)
          scores_of<S, 3>(weight + e * N, rows, N, out, E);
        else
          scores_of<S, 4>(weight + e * N, rows, N, out, E);
      }
    });
    std::vector<uint8_t> taken(E);
    for (int64_t t = 0; t < T; t++) {
      float* p = logits.get() + t * E;
      const float top = *std::max_element(p, p + E);
      float total = 0, chosen = 0;
      for (int64_t e = 0; e < E; e++) total += p[e] = std::exp(p[e] - top);
      for (int64_t e = 0; e < E; e++) p[e] /= total;
      std::fill(taken.begin(), taken.end(), 0);
      int64_t* id = ids + t * A;
      for (int64_t a = 0; a < A; a++) {
        int64_t best = -1;
        for (int64_t e = 0; e < E; e++)
          if (!taken[e] && (best < 0 || p[e] + bias[e] > p[best] + bias[best])) best = e;
        taken[best] = 1;
        id[a] = best;
        chosen += p[best];
      }
      const float divisor = std::max(chosen, norm_min);
      for (int64_t a = 0; a < A; a++) weights[t * A + a] = static_cast<S>(p[id[a]] / divisor);
    }
  }
};

std::tuple<Tensor, Tensor> route(const Tensor& x_, const Tensor& weight, const Tensor& bias, int64_t A,
                                 double norm_min) {
  const Tensor x = x_.contiguous();
  const Router router(weight, bias, A, norm_min);
  TORCH_CHECK(x.dim() == 2 && x.size(1) == router.N, "the router reads rows of ", router.N, " numbers, x ", x.sizes());
  const int64_t T = x.size(0);
  Tensor weights = at::empty({T, A}, x.options()), ids = at::empty({T, A}, x.options().dtype(at::kLong));
  ERNIE_DISPATCH(x.scalar_type(), S, [&] {
    router.choose(x.const_data_ptr<S>(), T, weights.data_ptr<S>(), ids.data_ptr<int64_t>());
  });
  return {weights, ids};
}

// ---- experts --------------------------------------------------------------------------------------------------------

constexpr int64_t PASS = 1024;  // tokens that go through the experts together, so that memory stays bounded

// One expert's share of a pass: its matrices, and its rows, which lie together in the order of their tokens. The
// shared MLP is one more, that every token goes to with weight 1.
template <class M>
struct Job {
  const M *gate_up, *down;
  int64_t member, first, count;  // of its rows, among all rows of the pass
  int64_t width, hidden;         // I, and where its rows begin among the cells of all hidden rows
};

constexpr int64_t HIDDEN = 32;  // hidden units that are made together

// silu(gate) * up of 32 hidden units for all rows of a job, rounded as the next product takes them. The 64 rows of
// weights stay in the cache.
template <class M, class S>
void hidden_units(const Job<M>& job, int64_t piece, const typename M::Cell* x, const int32_t* token, int64_t cells,
                  typename M::Cell* hidden) {
  const M& w = *job.gate_up;
  const int64_t up = job.width / 8, blocks = HIDDEN / 8;
  for (int64_t r = 0; r < job.count; r += w.at_once()) {
    const int64_t count = std::min(w.at_once(), job.count - r);
    const typename M::Cell* tokens[TOKENS];
    point(x, token + job.first + r, count, cells, tokens);
    Sums gate[blocks], out[blocks];
    w.times(job.member, blocks * piece, blocks, tokens, count, gate);
    w.times(job.member, up + blocks * piece, blocks, tokens, count, out);
    for (int64_t k = 0; k < count; k++) {
      f8 units[blocks];
      for (int64_t i = 0; i < blocks; i++) units[i] = out[i][k] * silu(gate[i][k]);
      M::template keep<S>(units, hidden + job.hidden + ((r + k) * job.width + piece * HIDDEN) / M::CELL);
    }
  }
}

// sums [T, 8 blocks] += weight * down of all rows of a job, for some blocks of its output.
template <class M>
void add_down(const Job<M>& job, int64_t first, int64_t blocks, const typename M::Cell* hidden, const int32_t* token,
              const float* weight, float* sums) {
  const M& w = *job.down;
  const int64_t cells = job.width / M::CELL;
  for (int64_t r = 0; r < job.count; r += w.at_once()) {
    const int64_t count = std::min(w.at_once(), job.count - r);
    const typename M::Cell* rows[TOKENS];
    point(hidden + job.hidden + r * cells, nullptr, count, cells, rows);
    for (int64_t b = 0; b < blocks; b += RUN) {
      const int64_t n = std::min<int64_t>(RUN, blocks - b);
      Sums out[RUN];
      w.times(job.member, first + b, n, rows, count, out);
      for (int64_t k = 0; k < count; k++) {
        const int64_t row = job.first + r + k;
        float* sum = sums + (token[row] * blocks + b) * 8;
        for (int64_t i = 0; i < n; i++) store(sum + 8 * i, load(sum + 8 * i) + out[i][k] * weight[row]);
      }
    }
  }
}

// One pass: x [T, N] to y [T, N]. `ids` and `weights` are [T, A]. Sums are taken in the order of the experts.
template <class M, class S>
void mix(const S* x, const S* weights, const int64_t* ids, int64_t T, int64_t A, const M& gate_up, const M& down,
         const M* shared_gate_up, const M* shared_down, int64_t N, S* y) {
  const int64_t E = gate_up.members;
  std::vector<int64_t> counts(E + 1);
  for (int64_t i = 0; i < T * A; i++) counts[ids[i]]++;
  std::vector<Job<M>> jobs;
  std::vector<int64_t> next(E);  // the place of each expert's next row
  int64_t rows = 0, hidden_cells = 0;
  auto add = [&](const M& g, const M& d, int64_t member, int64_t count) {
    jobs.push_back({&g, &d, member, rows, count, d.columns(), hidden_cells});
    rows += count;
    hidden_cells += count * d.columns() / M::CELL;
  };
  for (int64_t e = 0; e < E; e++) {
    next[e] = rows;
    if (counts[e]) add(gate_up, down, e, counts[e]);
  }
  if (shared_gate_up) add(*shared_gate_up, *shared_down, 0, T);
  std::vector<int32_t> token(rows);
  std::vector<float> weight(rows, 1.0f);
  for (int64_t i = 0; i < T * A; i++) {
    const int64_t row = next[ids[i]]++;
    token[row] = static_cast<int32_t>(i / A);
    weight[row] = static_cast<float>(weights[i]);
  }
  if (shared_gate_up)
    for (int64_t t = 0; t < T; t++) token[rows - T + t] = static_cast<int32_t>(t);

  const auto in = M::prepared(x, T, N);
  const auto hidden = room<typename M::Cell>(hidden_cells);
  std::vector<int64_t> ends;  // of the jobs' pieces
  for (const Job<M>& job : jobs) ends.push_back((ends.empty() ? 0 : ends.back()) + job.width / HIDDEN);
  const int64_t products = N * hidden_cells * M::CELL;  // of down; gate and up have twice as many
  share(ends.empty() ? 0 : ends.back(), 2 * products, [&](int64_t i) {
    const int64_t j = std::upper_bound(ends.begin(), ends.end(), i) - ends.begin();
    hidden_units<M, S>(jobs[j], i - (j ? ends[j - 1] : 0), in.get(), token.data(), N / M::CELL, hidden.get());
  });

  const int64_t blocks = N / 8, some = down.piece();
  share((blocks + some - 1) / some, products, [&](int64_t i) {
    const int64_t first = i * some, mine = std::min(some, blocks - first);
    const std::unique_ptr<float[]> sums(new float[T * mine * 8]());
    for (const Job<M>& job : jobs) add_down(job, first, mine, hidden.get(), token.data(), weight.data(), sums.get());
    for (int64_t t = 0; t < T; t++)
      for (int64_t b = 0; b < mine; b++) store(y + t * N + (first + b) * 8, load(sums.get() + (t * mine + b) * 8));
  });
}

template <class M>
void check_experts(const M& gate_up, const M& down, int64_t N) {
  TORCH_CHECK(gate_up.columns() == N && down.blocks * 8 == N && gate_up.blocks * 8 == 2 * down.columns() &&
                  gate_up.members == down.members,
              "gate_up is [E, 2I, N] and down [E, N, I]");
  TORCH_CHECK(down.columns() % HIDDEN == 0, "the width of an expert is a multiple of ", HIDDEN, ", not ",
              down.columns());
}

// x [T, N] to the experts that the router says, and to the MLP beside them if there is one.
template <class M>
Tensor routed(const Tensor& x_, const Router& router, const M& gate_up, const M& down,
              const M* shared_gate_up = nullptr, const M* shared_down = nullptr) {
  const int64_t N = gate_up.columns(), A = router.A;
  check_experts(gate_up, down, N);
  if (shared_gate_up) check_experts(*shared_gate_up, *shared_down, N);
  const Tensor x = x_.contiguous();
  TORCH_CHECK(x.dim() == 2 && x.size(1) == N && router.N == N && router.E == gate_up.members,
              "x is [T, ", N, "], and the router knows these experts");
  const int64_t T = x.size(0);
  Tensor y = at::empty_like(x);
  ERNIE_DISPATCH(x.scalar_type(), S, [&] {
    const auto weights = room<S>(T * A);
    const auto ids = room<int64_t>(T * A);
    const S* in = x.const_data_ptr<S>();
    router.choose(in, T, weights.get(), ids.get());
    for (int64_t t = 0; t < T; t += PASS)
      mix(in + t * N, weights.get() + t * A, ids.get() + t * A, std::min(PASS, T - t), A, gate_up, down,
          shared_gate_up, shared_down, N, y.data_ptr<S>() + t * N);
  });
  return y;
}

Tensor moe(const Tensor& x, const Tensor& router_, const Tensor& bias, int64_t A, double norm_min,
           const Tensor& gate_up_data, const Tensor& gate_up_scales, int64_t gate_up_bits, const Tensor& down_data,
           const Tensor& down_scales, int64_t down_bits, const std::optional<Tensor>& shared_gate_up_data,
           const std::optional<Tensor>& shared_gate_up_scales, int64_t shared_gate_up_bits,
           const std::optional<Tensor>& shared_down_data, const std::optional<Tensor>& shared_down_scales,
           int64_t shared_down_bits) {
  const Router router(router_, bias, A, norm_min);
  const Matrix gate_up(gate_up_data, gate_up_scales, gate_up_bits), down(down_data, down_scales, down_bits);
  if (!shared_gate_up_data) return routed(x, router, gate_up, down);
  const Matrix shared_gate_up(*shared_gate_up_data, *shared_gate_up_scales, shared_gate_up_bits),
      shared_down(*shared_down_data, *shared_down_scales, shared_down_bits);
  return routed(x, router, gate_up, down, &shared_gate_up, &shared_down);
}

Tensor panel_moe(const Tensor& x, const Tensor& router_, const Tensor& bias, int64_t A, double norm_min,
                 at::TensorList gate_up_, at::TensorList down_, const std::optional<Tensor>& shared_gate_up_,
                 const std::optional<Tensor>& shared_down_) {
  const Router router(router_, bias, A, norm_min);
  const Panels gate_up(gate_up_), down(down_);
  if (!shared_gate_up_) return routed(x, router, gate_up, down);
  const Panels shared_gate_up(*shared_gate_up_), shared_down(*shared_down_);
  return routed(x, router, gate_up, down, &shared_gate_up, &shared_down);
}

// ---- making packed matrices -----------------------------------------------------------------------------------------

// The 4-bit scale of a group with the least squared error, and its numbers. See packed.py for the candidates.
inline int8_t search(const f8 (&w)[4], float top, float row_scale, float inverse, bool more, f8 (&q)[4]) {
  static constexpr float divisors[] = {7.1f, 7.4f, 7.7f, 8.0f, 8.3f, 8.6f, 8.9f};
  float best_error = std::numeric_limits<float>::infinity(), best_code = 0;
  auto numbers = [&](float code, int i) {
    const float scale = code * row_scale;
    return smallest(largest(rounded(w[i] * (scale != 0 ? 1.0f / scale : 0.0f)), all(-8)), all(7));
  };
  auto consider = [&](float code) {
    f8 error = {};
    for (int i = 0; i < 4; i++) {
      const f8 off = w[i] - numbers(code, i) * (code * row_scale);
      error += off * off;
    }
    const float e = sum(error);
    const bool better = e < best_error;
    best_error = better ? e : best_error;
    best_code = better ? code : best_code;
  };
  consider(std::nearbyint(top / 7 * inverse));
  for (int i = 0; more && i < 7; i++) {
    const float code = std::nearbyint(top / divisors[i] * inverse);
    consider(code);
    consider(-code);
  }
  for (int i = 0; i < 4; i++) q[i] = numbers(best_code, i);
  return static_cast<int8_t>(best_code);
}

// One row of 8: into the unit's bytes of that row.
template <class S, int BITS>
void quantize_weights(const S* w, int64_t columns, int row, bool more, uint8_t* block, float* scale) {
  const int64_t groups = columns / GROUP;
  const auto tops = room<float>(groups);
  float top = 0;
  for (int64_t g = 0; g < groups; g++) {
    const S* p = w + g * GROUP;
    const f8 m = largest(largest(magnitude(load(p)), magnitude(load(p + 8))),
                         largest(magnitude(load(p + 16)), magnitude(load(p + 24))));
    tops[g] = largest(m);
    top = std::max(top, tops[g]);
  }
  constexpr float MOST = BITS == 4 ? 7 : 127;
  *scale = top / MOST / 127;
  const float inverse = *scale > 0 ? 1.0f / *scale : 0.0f;
  for (int64_t g = 0; g < groups; g++) {
    const S* p = w + g * GROUP;
    const f8 v[4] = {load(p), load(p + 8), load(p + 16), load(p + 24)};
    uint8_t* unit = block + (g >> 1) * unit_bytes(BITS);
    uint8_t* body = unit + 16 + (g & 1) * 32 * BITS + 4 * row;
    int8_t q[GROUP];
    if constexpr (BITS == 4) {
      f8 best[4] = {};
      unit[8 * (g & 1) + row] = static_cast<uint8_t>(search(v, tops[g], *scale, inverse, more, best));
      for (int i = 0; i < 4; i++) store(q + 8 * i, best[i]);
      for (int i = 0; i < 4; i++)
        for (int b = 0; b < 4; b++)
          body[32 * i + b] = static_cast<uint8_t>((q[8 * i + b] + 8) | (q[8 * i + 4 + b] + 8) << 4);
    } else {
      const float code = std::nearbyint(tops[g] / MOST * inverse), step = code * *scale;
      const f8 over = all(step != 0 ? 1.0f / step : 0.0f);
      unit[8 * (g & 1) + row] = static_cast<uint8_t>(static_cast<int8_t>(code));
      for (int i = 0; i < 4; i++) store(q + 8 * i, smallest(largest(rounded(v[i] * over), all(-127)), all(127)));
      for (int i = 0; i < 8; i++) std::memcpy(body + 32 * i, q + 4 * i, 4);
    }
  }
}

// weight [R, C] into data [R / 8, C / 64, unit] and scales [R], both there already
void quantize(const Tensor& weight_, int64_t bits, bool search, Tensor& data, Tensor& scales) {
  const Matrix room_for(data, scales, bits);
  const Tensor weight = weight_.contiguous();
  const int64_t R = weight.size(0), C = weight.size(1);
  TORCH_CHECK(C == room_for.columns() && R <= room_for.blocks * 8, "the packed matrix is of another shape");
  uint8_t* out = data.data_ptr<uint8_t>();
  float* scale = scales.data_ptr<float>();
  ERNIE_DISPATCH(weight.scalar_type(), S, [&] {
    const S* w = weight.const_data_ptr<S>();
    const std::vector<S> zeros(C);
    share(room_for.blocks, [&](int64_t b) {
      for (int row = 0; row < 8; row++) {
        const S* from = 8 * b + row < R ? w + (8 * b + row) * C : zeros.data();
        uint8_t* block = out + b * room_for.block_bytes();
        if (bits == 4)
          quantize_weights<S, 4>(from, C, row, search, block, scale + 8 * b + row);
        else
          quantize_weights<S, 8>(from, C, row, search, block, scale + 8 * b + row);
      }
    });
  });
}

template <int BITS>
void unpack_row(const uint8_t* block, int64_t units, int row, float scale, float* out) {
  for (int64_t g = 0; g < 2 * units; g++, out += GROUP) {
    const uint8_t* unit = block + (g >> 1) * unit_bytes(BITS);
    const uint8_t* body = unit + 16 + (g & 1) * 32 * BITS + 4 * row;
    const float step = static_cast<int8_t>(unit[8 * (g & 1) + row]) * scale;
    for (int i = 0; i < GROUP; i++) {
      if constexpr (BITS == 4)
        out[i] = ((body[32 * (i / 8) + i % 4] >> (i & 4) & 15) - 8) * step;
      else
        out[i] = static_cast<int8_t>(body[32 * (i / 4) + i % 4]) * step;
    }
  }
}

Tensor embedding(const Tensor& ids_, const Tensor& data, const Tensor& scales, int64_t bits, int64_t rows,
                 at::ScalarType dtype) {
  const Matrix w(data, scales, bits);
  const Tensor ids = ids_.contiguous();
  const int64_t T = ids.numel(), C = w.columns();
  Tensor y = at::empty({T, C}, scales.options().dtype(dtype));
  ERNIE_DISPATCH(dtype, S, [&] {
    const auto line = room<float>(C);
    for (int64_t t = 0; t < T; t++) {
      const int64_t id = ids.const_data_ptr<int64_t>()[t];
      TORCH_CHECK_INDEX(id >= 0 && id < rows, "token id ", id, " is outside of the ", rows, " rows of the embedding");
      const float scale = w.scales[id];
      if (bits == 4)
        unpack_row<4>(w.block(0, id / 8), w.units, id % 8, scale, line.get());
      else
        unpack_row<8>(w.block(0, id / 8), w.units, id % 8, scale, line.get());
      for (int64_t c = 0; c < C; c += 8) store(y.data_ptr<S>() + t * C + c, load(line.get() + c));
    }
  });
  return y;
}

// weight [R, C] of bfloat16 in panels, its rows padded with zeros
Tensor panels(const Tensor& weight_) {
  const Tensor weight = weight_.contiguous();
  TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == at::kBFloat16, "panels are made of a bfloat16 matrix");
  const int64_t R = weight.size(0), C = weight.size(1), count = (R + PANEL - 1) / PANEL;
  Tensor data = at::empty({count, C, 8, 2}, weight.options());
  const auto* from = reinterpret_cast<const uint16_t*>(weight.const_data_ptr<bf16>());
  auto* to = reinterpret_cast<uint16_t*>(data.data_ptr<bf16>());
  const std::vector<uint16_t> zeros(C);
  share(count, [&](int64_t p) {
    const uint16_t* rows[PANEL];
    for (int64_t i = 0; i < PANEL; i++) rows[i] = PANEL * p + i < R ? from + (PANEL * p + i) * C : zeros.data();
    uint16_t* out = to + p * C * PANEL;
    for (int64_t c = 0; c < C; c++, out += PANEL)
      for (int64_t i = 0; i < 8; i++) {
        out[2 * i] = rows[i][c];
        out[2 * i + 1] = rows[8 + i][c];
      }
  });
  return data;
}

Tensor panel_embedding(const Tensor& ids_, const Tensor& data, int64_t rows, at::ScalarType dtype) {
  const Panels w(data);
  TORCH_CHECK(rows <= w.blocks * 8 && rows > w.blocks * 8 - PANEL, "rows do not fit the panels");
  const Tensor ids = ids_.contiguous();
  const int64_t T = ids.numel(), C = w.columns();
  Tensor y = at::empty({T, C}, data.options().dtype(dtype));
  const auto* numbers = data.const_data_ptr<bf16>();
  ERNIE_DISPATCH(dtype, S, [&] {
    for (int64_t t = 0; t < T; t++) {
      const int64_t id = ids.const_data_ptr<int64_t>()[t];
      TORCH_CHECK_INDEX(id >= 0 && id < rows, "token id ", id, " is outside of the ", rows, " rows of the embedding");
      const bf16* from = numbers + id / PANEL * C * PANEL + id % 8 * 2 + id / 8 % 2;
      for (int64_t c = 0; c < C; c++) y.data_ptr<S>()[t * C + c] = static_cast<S>(from[c * PANEL]);
    }
  });
  return y;
}

// ---- attention ------------------------------------------------------------------------------------------------------
//
// A row is one query token; its H / K heads that share a key are taken together, up to HEADS at once. Its context is
// cut into parts at fixed places, each part is a softmax of its own, and the parts are joined in order: so a row's
// numbers do not depend on how many threads share its parts, nor on whether it came alone or in a long prompt.
//
// A few rows read keys where they lie, a vector of 8 numbers at a time. Rows of a prompt come in tiles, for which keys
// are turned so that a vector is 8 tokens. Sums are in the same order both ways: a chain for each of 8 lanes, then
// these.

constexpr int HEADS = 5;         // query heads at once, for the registers hold no more
constexpr int64_t STRETCH = 64;  // tokens between two looks at the largest score; they stay in the cache
constexpr int64_t PARTS = 32;    // at most, in a context
constexpr int64_t FEW = 4;       // up to so many rows of a request, its threads share the parts of each; else the rows
constexpr int64_t TILE = 32;     // rows that pass over a stretch together
constexpr int64_t SOON = 8;      // tokens ahead of which a key or a value is asked for

// Parts are as long as this: a function of the row's own context, and of nothing else.
inline int64_t part_length(int64_t context) {
  int64_t length = 512;
  while (length * PARTS < context) length *= 2;
  return length;
}

// How a cache keeps a row of D numbers. `scale` is what they are multiplied by.
template <class S>
struct Kept {
  static int64_t width(int64_t D) { return D; }
  static float scale(const S*, int64_t) { return 1.0f; }
};
template <>
struct Kept<int8_t> {
  static int64_t width(int64_t D) { return D + 4; }
  static float scale(const int8_t* row, int64_t D) { return read<float>(row + D); }
};

// A softmax under way, of some heads of a row: the largest score, the sum of exponentials, the weighted sum of values.
struct Softmax {
  float largest[HEADS], sum[HEADS];
  float* values;  // [HEADS, D]

  void clear(int64_t D) {
    for (int h = 0; h < HEADS; h++) largest[h] = -std::numeric_limits<float>::infinity(), sum[h] = 0;
    std::fill(values, values + HEADS * D, 0.0f);
  }

  // Take in another, of tokens that come later.
  void join(const Softmax& later, int heads, int64_t D) {
    for (int h = 0; h < heads; h++) {
      const float top = later.largest[h] > largest[h] ? later.largest[h] : largest[h];
      const float own = std::exp(largest[h] - top), theirs = std::exp(later.largest[h] - top);
      largest[h] = top;
      sum[h] = sum[h] * own + later.sum[h] * theirs;
      for (int64_t d = h * D; d < (h + 1) * D; d += 8)
        store(values + d, load(values + d) * own + load(later.values + d) * theirs);
    }
  }
};

// values[h] += sum over the tokens of share[token][h] * value, W * 8 dimensions of them from d. `head` is where the
// key head lies in a token's row.
template <class S, int G, int W>
inline void add_values(const S* const* rows, int64_t head, int64_t count, const float* shares, int64_t d, int64_t D,
                       float* values) {
  f8 sums[G][W];
  for (int h = 0; h < G; h++)
    for (int i = 0; i < W; i++) sums[h][i] = load(values + h * D + d + 8 * i);
  for (int64_t j = 0; j < count; j++) {
    f8 v[W];
    for (int i = 0; i < W; i++) v[i] = load(rows[j] + head + d + 8 * i);
    for (int h = 0; h < G; h++)
      for (int i = 0; i < W; i++) sums[h][i] = add_product(sums[h][i], v[i], all(shares[j * G + h]));
  }
  for (int h = 0; h < G; h++)
    for (int i = 0; i < W; i++) store(values + h * D + d + 8 * i, sums[h][i]);
}

// Asks for `size` numbers of a row before they are needed.
template <class S>
inline void ask_for(const S* row, int64_t size) {
  const char* at = reinterpret_cast<const char*>(row);
  for (int64_t i = 0; i < size * static_cast<int64_t>(sizeof(S)); i += 64) __builtin_prefetch(at + i);
}

// The scores of J tokens and G heads; each is summed in the same order whatever J is.
template <class S, int G, int J>
inline void score(const float* q, const S* const* keys, int64_t head, int64_t D, float root, float (*scores)[STRETCH]) {
  f8 sums[J][G] = {};
  for (int64_t d = 0; d < D; d += 8) {
    f8 k[J];
    for (int j = 0; j < J; j++) k[j] = load(keys[j] + head + d);
    for (int h = 0; h < G; h++) {
      const f8 own = load(q + h * D + d);
      for (int j = 0; j < J; j++) sums[j][h] = add_product(sums[j][h], k[j], own);
    }
  }
  for (int j = 0; j < J; j++) {
    const float scale = Kept<S>::scale(keys[j] + head, D) * root;
    for (int h = 0; h < G; h++) scores[h][j] = sum(sums[j][h]) * scale;
  }
}

// The scores of `count` tokens become their part in the softmax, and `scale(token)` times that is their share. There is
// room for scores up to a multiple of 8.
template <int G, class F>
inline void weigh(float (*scores)[STRETCH], int64_t count, const F& scale, int64_t D, Softmax& state, float* shares) {
  const int64_t even = (count + 7) / 8 * 8;
  for (int h = 0; h < G; h++) {
    for (int64_t j = count; j < even; j++) scores[h][j] = -std::numeric_limits<float>::infinity();
    f8 tops = load(scores[h]);
    for (int64_t j = 8; j < even; j += 8) tops = largest(load(scores[h] + j), tops);
    const float top = std::max(state.largest[h], largest(tops)), fade = std::exp(state.largest[h] - top);
    f8 total = {};
    for (int64_t j = 0; j < even; j += 8) {
      const f8 e = exponential(load(scores[h] + j) - top);
      total += e;
      store(scores[h] + j, e);
    }
    state.largest[h] = top;
    state.sum[h] = state.sum[h] * fade + sum(total);
    if (fade != 1.0f)
      for (int64_t d = h * D; d < (h + 1) * D; d += 8) store(state.values + d, load(state.values + d) * fade);
  }
  for (int64_t j = 0; j < count; j++)
    for (int h = 0; h < G; h++) shares[j * G + h] = scores[h][j] * scale(j);
}

// A stretch that a tile of rows passes over, in float32: one load brings 8 tokens the next number of their keys, or 8
// numbers of the next token's value.
struct Wide {
  std::unique_ptr<float[]> keys;    // [STRETCH / 16, 8, D / 8, 16]: number 8 i + l of a token is number i of its lane l
  std::unique_ptr<float[]> values;  // [D / 16, STRETCH, 16], the last half empty where D is no multiple of 16
  float key_scales[STRETCH] = {}, value_scales[STRETCH] = {};

  explicit Wide(int64_t D) : keys(room<float>(STRETCH * D)), values(room<float>(STRETCH * (D + 8))) {}

  template <class S>
  void take(const S* const* k, const S* const* v, int64_t count, int64_t D) {
    for (int64_t j = 0; j < count; j++) {
      ask_for(k[std::min(j + SOON, count - 1)], Kept<S>::width(D));
      ask_for(v[std::min(j + SOON, count - 1)], Kept<S>::width(D));
      key_scales[j] = Kept<S>::scale(k[j], D);
      value_scales[j] = Kept<S>::scale(v[j], D);
      for (int64_t d = 0; d < D; d += 8)
        store(values.get() + (d / 16 * STRETCH + j) * 16 + d % 16, load(v[j] + d));
    }
    for (int64_t j = 0; j < (count + 15) / 16 * 16; j += 8)
      for (int64_t i = 0; i < D / 8; i++) {
        f8 some[8];
        for (int64_t t = 0; t < 8; t++) some[t] = j + t < count ? load(k[j + t] + 8 * i) : f8{};
        transpose(some);
        float* to = keys.get() + j / 16 * 16 * D + j % 16;
        for (int64_t lane = 0; lane < 8; lane++) store(to + (lane * (D / 8) + i) * 16, some[lane]);
      }
  }
};

// 16 tokens' numbers times those of q [G, D] that are 8 apart: what a lane of `score` adds up.
template <int G>
inline void add_lane(const float* q, const float* keys, int64_t D, f8 (&sums)[G][2]) {
  f8 chain[G][2] = {};
  for (int64_t i = 0; i < D / 8; i++) {
    const f8 first = load(keys + 16 * i), second = load(keys + 16 * i + 8);
    for (int h = 0; h < G; h++) {
      const f8 own = all(q[h * D + 8 * i]);
      chain[h][0] = add_product(chain[h][0], first, own);
      chain[h][1] = add_product(chain[h][1], second, own);
    }
  }
  for (int h = 0; h < G; h++) sums[h][0] = chain[h][0], sums[h][1] = chain[h][1];
}

// The scores of 16 tokens, from `at` of a stretch on.
template <int G>
__attribute__((noinline)) void score_wide(const float* q, const Wide& wide, int64_t at, int64_t D, float root,
                                          float (*scores)[STRETCH]) {
  f8 lanes[8][G][2];
  for (int64_t lane = 0; lane < 8; lane++)
    add_lane<G>(q + lane, wide.keys.get() + (at / 2 + lane) * (D / 8) * 16, D, lanes[lane]);
  for (int i = 0; i < 2; i++) {
    const f8 scales = load(wide.key_scales + at + 8 * i) * root;
    for (int h = 0; h < G; h++)
      store(scores[h] + at + 8 * i, sum_of(lanes[0][h][i], lanes[1][h][i], lanes[2][h][i], lanes[3][h][i],
                                           lanes[4][h][i], lanes[5][h][i], lanes[6][h][i], lanes[7][h][i]) *
                                        scales);
  }
}

// As `add_values`, of values in the order of `Wide`: one function for both takes 2 to 4 % longer here.
template <int G, int W>
__attribute__((noinline)) void add_wide(const float* rows, int64_t count, const float* shares, int64_t d, int64_t D,
                                        float* values) {
  f8 sums[G][W];
  for (int h = 0; h < G; h++)
    for (int i = 0; i < W; i++) sums[h][i] = load(values + h * D + d + 8 * i);
  for (int64_t j = 0; j < count; j++) {
    f8 v[W];
    for (int i = 0; i < W; i++) v[i] = load(rows + 16 * j + 8 * i);
    for (int h = 0; h < G; h++)
      for (int i = 0; i < W; i++) sums[h][i] = add_product(sums[h][i], v[i], all(shares[j * G + h]));
  }
  for (int h = 0; h < G; h++)
    for (int i = 0; i < W; i++) store(values + h * D + d + 8 * i, sums[h][i]);
}

// The same as `attend_part`, to the last bit, for some rows: row i has `counts[i]` of the stretch's tokens.
template <int G>
void attend_tile(const float* const* q, const Wide& wide, const int64_t* counts, int64_t n, int64_t D,
                 Softmax* states) {
  alignas(32) float scores[TILE][G][STRETCH], shares[TILE][STRETCH * G];
  const float root = 1.0f / std::sqrt(static_cast<float>(D));
  for (int64_t at = 0; at < STRETCH; at += 16)
    for (int64_t i = 0; i < n; i++)
      if (at < counts[i]) score_wide<G>(q[i], wide, at, D, root, scores[i]);
  for (int64_t i = 0; i < n; i++)
    if (counts[i] > 0)
      weigh<G>(scores[i], counts[i], [&](int64_t j) { return wide.value_scales[j]; }, D, states[i], shares[i]);
  for (int64_t d = 0; d < D; d += 16)
    for (int64_t i = 0; i < n; i++) {
      const float* rows = wide.values.get() + d * STRETCH;
      if (d + 16 <= D)
        add_wide<G, 2>(rows, counts[i], shares[i], d, D, states[i].values);
      else
        add_wide<G, 1>(rows, counts[i], shares[i], d, D, states[i].values);
    }
}

// f(the number of heads, as a constant)
template <int G = HEADS, class F>
void with_heads(int heads, const F& f) {
  if (heads == G) return f(std::integral_constant<int, G>());
  if constexpr (G > 1) return with_heads<G - 1>(heads, f);
}

// The cache of one layer, and which heads are taken together.
template <class S>
struct Cache {
  const S *keys, *values;
  int64_t block_size, K, D;
  const int32_t* table;

  // Where the keys and values of `count` tokens from `first` on lie, of one head.
  void find(int64_t first, int64_t count, int64_t head, const S** k, const S** v) const {
    const int64_t width = Kept<S>::width(D);
    for (int64_t j = 0; j < count; j++) {
      const int64_t p = first + j, at = ((table[p / block_size] * block_size + p % block_size) * K + head) * width;
      k[j] = keys + at;
      v[j] = values + at;
    }
  }
};

struct Row {
  int64_t token, context;  // of the step, and how many tokens it sees
};

template <class S, class Q>
struct Attention {
  const Q* q;  // [T, H, D]
  Q* out;
  Cache<S> cache;
  int64_t H, K, D;

  int64_t group() const { return H / K; }
  int64_t pieces() const { return (group() + HEADS - 1) / HEADS; }
  int64_t per_piece() const { return (group() + pieces() - 1) / pieces(); }

  void queries(const Row& row, int64_t first_head, int heads, float* to) const {
    const Q* from = q + (row.token * H + first_head) * D;
    for (int64_t i = 0; i < heads * D; i += 8) store(to + i, load(from + i));
  }

  void finish(const Row& row, int64_t first_head, int heads, const Softmax& state) const {
    for (int h = 0; h < heads; h++) {
      Q* to = out + (row.token * H + first_head + h) * D;
      for (int64_t d = 0; d < D; d += 8) store(to + d, load(state.values + h * D + d) / state.sum[h]);
    }
  }

  // All parts of some rows, of heads [first_head, first_head + heads), which share key head `k`.
  void tile(const Row* rows, int64_t n, int64_t k, int64_t first_head, int heads) const {
    const int64_t size = HEADS * D;
    const auto memory = room<float>(3 * n * size);
    Softmax whole[TILE], part[TILE];
    const float* queries_of[TILE];
    for (int64_t i = 0; i < n; i++) {
      float* own = memory.get() + 3 * i * size;
      whole[i].values = own;
      part[i].values = own + size;
      whole[i].clear(D);
      part[i].clear(D);
      queries(rows[i], first_head, heads, own + 2 * size);
      queries_of[i] = own + 2 * size;
    }
    Wide wide(D);
    const S *keys[STRETCH], *values[STRETCH];
    const int64_t longest = rows[n - 1].context;  // rows come in the order of their positions
    for (int64_t at = 0; at < longest; at += STRETCH) {
      const int64_t count = std::min(STRETCH, longest - at);
      cache.find(at, count, k, keys, values);
      wide.take<S>(keys, values, count, D);
      int64_t counts[TILE];
      for (int64_t i = 0; i < n; i++) counts[i] = std::min(STRETCH, rows[i].context - at);
      with_heads(heads, [&](auto G) { attend_tile<G()>(queries_of, wide, counts, n, D, part); });
      for (int64_t i = 0; i < n; i++)
        if (counts[i] > 0 && ((at + STRETCH) % part_length(rows[i].context) == 0 || at + STRETCH >= rows[i].context)) {
          whole[i].join(part[i], heads, D);
          part[i].clear(D);
        }
    }
    for (int64_t i = 0; i < n; i++) finish(rows[i], first_head, heads, whole[i]);
  }
};

// Query heads that share a key, on their way through a part of a row's context.
struct HeadGroup {
  int heads;
  int64_t head;                // where their key lies in a token's row
  int64_t asks;                // numbers of it that are asked for ahead; by the first of its lanes
  float *q, *scores, *shares;  // [heads, D], [heads, STRETCH], [STRETCH, heads]
  Softmax* state;
};

// How heads go through a part. Memory gives rows whole faster than it gives a piece of each, so all heads pass over a
// few tokens before the next ones. Sums of values are then loaded and stored more often, for which rows of 8 bits have no
// time: they wait less.
template <class S>
struct Way {
  static constexpr bool whole_rows = sizeof(S) > 1;
  static constexpr int64_t near = whole_rows ? 4 : STRETCH;  // tokens
};

// Tokens from `at` to `end` for lanes of neighbouring key heads, of which `key_head` is the first.
template <class S>
void attend_part(const HeadGroup* lanes, int64_t n, const Cache<S>& cache, int64_t key_head, int64_t at, int64_t end) {
  constexpr int64_t NEAR = Way<S>::near;
  const int64_t D = cache.D;
  const float root = 1.0f / std::sqrt(static_cast<float>(D));
  const S *keys[STRETCH], *values[STRETCH];
  for (; at < end; at += STRETCH) {
    const int64_t count = std::min(STRETCH, end - at);
    cache.find(at, count, key_head, keys, values);
    for (int64_t first = 0; first < count; first += NEAR)
      for (const HeadGroup* lane = lanes; lane < lanes + n; lane++)
        with_heads(lane->heads, [&](auto G) {
          for (int64_t j = first; j < std::min(count, first + NEAR); j += 2) {
            for (int64_t i = j; i < std::min(count, j + 2); i++) {
              ask_for(keys[std::min(i + SOON, count - 1)] + lane->head, lane->asks);
              if (!Way<S>::whole_rows) ask_for(values[i] + lane->head, lane->asks);
            }
            auto* out = reinterpret_cast<float (*)[STRETCH]>(lane->scores + j);
            if (j + 1 < count)
              score<S, G(), 2>(lane->q, keys + j, lane->head, D, root, out);
            else
              score<S, G(), 1>(lane->q, keys + j, lane->head, D, root, out);
          }
        });
    for (const HeadGroup* lane = lanes; lane < lanes + n; lane++)
      with_heads(lane->heads, [&](auto G) {
        for (int64_t j = 0; Way<S>::whole_rows && j < std::min(count, SOON); j++)
          ask_for(values[j] + lane->head, lane->asks);
        auto* scores = reinterpret_cast<float (*)[STRETCH]>(lane->scores);
        auto scale = [&](int64_t j) { return Kept<S>::scale(values[j] + lane->head, D); };
        weigh<G()>(scores, count, scale, D, *lane->state, lane->shares);
      });
    for (int64_t first = 0; first < count; first += NEAR)
      for (const HeadGroup* lane = lanes; lane < lanes + n; lane++)
        with_heads(lane->heads, [&](auto G) {
          const int64_t some = std::min(NEAR, count - first), last = std::min(count, first + SOON + NEAR);
          const float* shares = lane->shares + first * G();
          int64_t next = first + SOON, d = 0;
          for (; d + 16 <= D; d += 16) {
            if (Way<S>::whole_rows && next < last) ask_for(values[next++] + lane->head, lane->asks);
            add_values<S, G(), 2>(values + first, lane->head, some, shares, d, D, lane->state->values);
          }
          if (d < D) add_values<S, G(), 1>(values + first, lane->head, some, shares, d, D, lane->state->values);
        });
  }
}

struct Part {  // of the context of one row
  int64_t request, row, part;
};
struct Tile {
  int64_t request, row, rows;
};

template <class S, class Q>
void attend_all(const Q* q, Q* out, Cache<S> cache, int64_t H, const int32_t* tables, int64_t table_length,
                const int32_t* starts, const int32_t* contexts, int64_t R) {
  const int64_t K = cache.K, D = cache.D;
  auto of = [&](int64_t r) {
    Attention<S, Q> a{q, out, cache, H, K, D};
    a.cache.table = tables + r * table_length;
    return a;
  };
  auto row = [&](int64_t r, int64_t i) {
    return Row{starts[r] + i, contexts[r] - (starts[r + 1] - starts[r]) + i + 1};
  };
  const Attention<S, Q> any = of(0);
  const int64_t pieces = any.pieces(), each = any.per_piece(), lanes = K * pieces, group = any.group();
  auto heads_of = [&](int64_t piece) { return static_cast<int>(std::min(each, group - piece * each)); };

  const int64_t threads = at::get_num_threads();
  std::vector<Part> parts;
  int64_t prompt_rows = 0, products = 0;
  for (int64_t r = 0; r < R; r++) {
    const int64_t n = starts[r + 1] - starts[r];
    products += 2 * n * contexts[r] * H * D;
    if (n > FEW) prompt_rows += n;
    for (int64_t i = 0; n <= FEW && i < n; i++) {
      const int64_t context = row(r, i).context, length = part_length(context);
      for (int64_t part = 0; part * length < context; part++) parts.push_back({r, i, part});
    }
  }
  int64_t most = TILE;  // rows of a tile: fewer where threads would have none
  while (most > 8 && prompt_rows / most * K < threads) most /= 2;
  std::vector<Tile> tiles;
  for (int64_t r = 0; r < R; r++) {
    const int64_t n = starts[r + 1] - starts[r];
    for (int64_t i = 0; n > FEW && i < n; i += most) tiles.push_back({r, i, std::min(most, n - i)});
  }
  // Key heads that go through a part together: all, unless threads would wait for one another
  const int64_t num_parts = static_cast<int64_t>(parts.size()), num_tiles = static_cast<int64_t>(tiles.size());
  const bool all_heads = Way<S>::whole_rows && (num_parts >= 4 * threads || threads == 1);
  const int64_t together = all_heads ? K : 1, shares = K / together;
  const int64_t size = HEADS * D;
  const auto memory = room<float>(num_parts * lanes * size);
  const auto states = room<Softmax>(num_parts * lanes);
  share(num_parts * shares + num_tiles * K, products, [&](int64_t index) {
    if (index >= num_parts * shares) {
      const int64_t k = (index - num_parts * shares) % K;
      const Tile& tile = tiles[(index - num_parts * shares) / K];
      Row rows[TILE];
      for (int64_t i = 0; i < tile.rows; i++) rows[i] = row(tile.request, tile.row + i);
      for (int64_t piece = 0; piece < pieces; piece++)
        of(tile.request).tile(rows, tile.rows, k, k * group + piece * each, heads_of(piece));
      return;
    }
    const int64_t slot = index / shares, first = index % shares * together;
    const Part& part = parts[slot];
    const Attention<S, Q> a = of(part.request);
    const Row mine = row(part.request, part.row);
    const int64_t n = together * pieces, own = size + 2 * HEADS * STRETCH;
    const auto passing = room<float>(n * own);
    const auto some = room<HeadGroup>(n);
    for (int64_t i = 0; i < n; i++) {
      const int64_t k = first + i / pieces, piece = i % pieces, lane = slot * lanes + k * pieces + piece;
      float* q = passing.get() + i * own;
      states[lane].values = memory.get() + lane * size;
      states[lane].clear(D);
      a.queries(mine, k * group + piece * each, heads_of(piece), q);
      const int64_t width = Kept<S>::width(D), asks = piece == 0 ? width : 0;
      float* scores = q + size;
      some[i] = {heads_of(piece), (k - first) * width, asks, q, scores, scores + HEADS * STRETCH, &states[lane]};
    }
    const int64_t length = part_length(mine.context), end = std::min(mine.context, (part.part + 1) * length);
    attend_part<S>(some.get(), n, a.cache, first, part.part * length, end);
  });
  const auto values = room<float>(size);
  for (int64_t first = 0, last; first < num_parts; first = last) {
    for (last = first + 1; last < num_parts && parts[last].part > 0;) last++;
    for (int64_t lane = 0; lane < lanes; lane++) {
      const int64_t k = lane / pieces, piece = lane % pieces;
      Softmax whole;
      whole.values = values.get();
      whole.clear(D);
      for (int64_t i = first; i < last; i++) whole.join(states[i * lanes + lane], heads_of(piece), D);
      const Row mine = row(parts[first].request, parts[first].row);
      of(parts[first].request).finish(mine, k * group + piece * each, heads_of(piece), whole);
    }
  }
}

Tensor attention(const Tensor& q_, const Tensor& k_cache, const Tensor& v_cache, const Tensor& tables_,
                 const Tensor& starts_, const Tensor& contexts_) {
  const Tensor q = q_.contiguous(), tables = tables_.contiguous(), starts = starts_.contiguous(),
               contexts = contexts_.contiguous();
  TORCH_CHECK(q.dim() == 3 && k_cache.dim() == 4 && k_cache.sizes() == v_cache.sizes() && k_cache.is_contiguous() &&
                  v_cache.is_contiguous() && k_cache.scalar_type() == v_cache.scalar_type(),
              "q is [T, H, D], and the caches are [B, S, K, width]");
  for (const Tensor& t : {tables, starts, contexts}) TORCH_CHECK(t.scalar_type() == at::kInt, "a layout is of int32");
  const int64_t T = q.size(0), H = q.size(1), D = q.size(2), R = contexts.size(0), K = k_cache.size(2),
                S = k_cache.size(1);
  const bool eight = k_cache.scalar_type() == at::kByte;
  TORCH_CHECK(D % 8 == 0 && H % K == 0 && k_cache.size(3) == D + (eight ? 4 : 0) && starts.size(0) == R + 1 &&
                  tables.dim() == 2 && tables.size(0) == R,
              "heads, caches and layout do not fit one another");
  const int32_t *table = tables.const_data_ptr<int32_t>(), *start = starts.const_data_ptr<int32_t>(),
                *context = contexts.const_data_ptr<int32_t>();
  TORCH_CHECK(start[0] == 0 && start[R] == T, "the requests do not cover the step");
  for (int64_t r = 0; r < R; r++) {
    TORCH_CHECK(start[r] <= start[r + 1] && start[r + 1] - start[r] <= context[r] && context[r] <= S * tables.size(1),
                "request ", r, " has another number of tokens");
    for (int64_t b = 0; b * S < context[r]; b++) {
      const int32_t block = table[r * tables.size(1) + b];
      TORCH_CHECK(block >= 0 && block < k_cache.size(0), "block ", block, " is outside of the cache");
    }
  }
  Tensor out = at::empty({T, H * D}, q.options());
  ERNIE_DISPATCH(q.scalar_type(), Q, [&] {
    auto run = [&](auto* keys, auto* values) {
      using Element = std::remove_const_t<std::remove_pointer_t<decltype(keys)>>;
      attend_all<Element, Q>(q.const_data_ptr<Q>(), out.data_ptr<Q>(), Cache<Element>{keys, values, S, K, D, table}, H,
                             table, tables.size(1), start, context, R);
    };
    if (R == 0) return;
    if (eight)
      return run(reinterpret_cast<const int8_t*>(k_cache.const_data_ptr<uint8_t>()),
                 reinterpret_cast<const int8_t*>(v_cache.const_data_ptr<uint8_t>()));
    ERNIE_DISPATCH(k_cache.scalar_type(), E, [&] { run(k_cache.const_data_ptr<E>(), v_cache.const_data_ptr<E>()); });
  });
  return out;
}

// ---- the small ones -------------------------------------------------------------------------------------------------

inline float rounded_to(const float*, float x) { return x; }
inline float rounded_to(const bf16*, float x) { return static_cast<float>(static_cast<bf16>(x)); }

// The norm of residual + delta, which residual becomes. Rounded where the reference rounds.
Tensor add_rms_norm(Tensor& residual_, const std::optional<Tensor>& delta_, const Tensor& weight, double eps) {
  const Tensor residual = residual_.contiguous();
  TORCH_CHECK(residual.dim() == 2 && weight.is_contiguous() && weight.scalar_type() == residual.scalar_type() &&
                  weight.numel() == residual.size(1),
              "residual is [T, N] and the norm's weight [N], of one dtype");
  const Tensor delta = delta_ ? delta_->contiguous() : Tensor();
  TORCH_CHECK(!delta_ || (delta.sizes() == residual.sizes() && delta.scalar_type() == residual.scalar_type()),
              "what is added is of another shape or dtype");
  const int64_t T = residual.size(0), N = residual.size(1), most = N - N % 8,
                some = std::max<int64_t>(1, 32768 / std::max<int64_t>(N, 1));
  Tensor y = at::empty(residual.sizes(), residual.options());
  ERNIE_DISPATCH(residual.scalar_type(), S, [&] {
    S *stream = residual.data_ptr<S>(), *out = y.data_ptr<S>();
    const S *added = delta_ ? delta.const_data_ptr<S>() : nullptr, *w = weight.const_data_ptr<S>();
    share((T + some - 1) / some, [&](int64_t i) {
      for (int64_t t = i * some; t < std::min(T, (i + 1) * some); t++) {
        S* r = stream + t * N;
        f8 squares[2] = {};
        float rest = 0;  // of a row that is not made of whole vectors
        for (int64_t n = 0; n < most; n += 8) {
          if (added) store(r + n, load(r + n) + load(added + t * N + n));
          const f8 v = load(r + n);
          squares[(n >> 3) & 1] += v * v;
        }
        for (int64_t n = most; n < N; n++) {
          if (added) r[n] = static_cast<S>(static_cast<float>(r[n]) + static_cast<float>(added[t * N + n]));
          rest += static_cast<float>(r[n]) * static_cast<float>(r[n]);
        }
        const float factor = 1.0f / std::sqrt((sum(squares[0] + squares[1]) + rest) / N + static_cast<float>(eps));
        for (int64_t n = 0; n < most; n += 8) {
          S whole[8];
          store(whole, load(r + n) * factor);
          store(out + t * N + n, load(whole) * load(w + n));
        }
        for (int64_t n = most; n < N; n++)
          out[t * N + n] = static_cast<S>(rounded_to(r, static_cast<float>(r[n]) * factor) * static_cast<float>(w[n]));
      }
    });
  });
  if (delta_ && !residual.is_same(residual_)) residual_.copy_(residual);
  return y;
}

// silu(gate) * up of rows [gate, up]. Rounded where the reference rounds.
Tensor swiglu(const Tensor& gate_up_) {
  const Tensor gate_up = gate_up_.contiguous();
  TORCH_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 16 == 0, "gate and up are [T, 2 I], I a multiple of 8");
  const int64_t T = gate_up.size(0), I = gate_up.size(1) / 2;
  Tensor y = at::empty({T, I}, gate_up.options());
  ERNIE_DISPATCH(gate_up.scalar_type(), S, [&] {
    const S* from = gate_up.const_data_ptr<S>();
    S* out = y.data_ptr<S>();
    share(T, T * I * 16, [&](int64_t t) {
      for (int64_t i = 0; i < I; i += 8) {
        S gate[8];
        store(gate, silu(load(from + t * 2 * I + i)));
        store(out + t * I + i, load(gate) * load(from + t * 2 * I + I + i));
      }
    });
  });
  return y;
}

// Cosine and sine of positions [T] times frequencies [D / 2]: [T, D / 2, 2]
Tensor rotary(const Tensor& positions_, const Tensor& frequencies_) {
  const Tensor positions = positions_.contiguous(), frequencies = frequencies_.contiguous();
  TORCH_CHECK(positions.dim() == 1 && positions.scalar_type() == at::kLong && frequencies.dim() == 1 &&
                  frequencies.scalar_type() == at::kFloat,
              "positions are int64 [T], frequencies float32 [D / 2]");
  const int64_t T = positions.size(0), D = frequencies.size(0);
  const int64_t* position = positions.const_data_ptr<int64_t>();
  const float* frequency = frequencies.const_data_ptr<float>();
  Tensor y = at::empty({T, D, 2}, frequencies.options());
  float* out = y.data_ptr<float>();
  share((T + 15) / 16, T * D * 32, [&](int64_t i) {
    for (int64_t t = i * 16; t < std::min(T, (i + 1) * 16); t++)
      for (int64_t d = 0; d < D; d++) {
        const float angle = static_cast<float>(position[t]) * frequency[d];
        out[(t * D + d) * 2] = std::cos(angle);
        out[(t * D + d) * 2 + 1] = std::sin(angle);
      }
  });
  return y;
}

// A row of D numbers as a cache keeps it.
inline void keep_row(const float* x, int64_t D, float* to) { std::copy(x, x + D, to); }
inline void keep_row(const float* x, int64_t D, bf16* to) {
  for (int64_t d = 0; d < D; d += 8) store(to + d, load(x + d));
}
inline void keep_row(const float* x, int64_t D, int8_t* to) {
  f8 m = {};
  for (int64_t d = 0; d < D; d += 8) m = largest(magnitude(load(x + d)), m);
  const float scale = largest(m) / 127.0f;
  for (int64_t d = 0; d < D; d += 8) store(to + d, rounded(scale > 0 ? load(x + d) / scale : f8{}));
  std::memcpy(to + D, &scale, 4);
}

template <class S>
void turn_row(const S* x, const float* rotary, int64_t D, float* to) {
  for (int64_t d = 0; d < D; d += 2) {
    const float a = static_cast<float>(x[d]), b = static_cast<float>(x[d + 1]), cos = rotary[d], sin = rotary[d + 1];
    to[d] = rounded_to(x, a * cos - b * sin);
    to[d + 1] = rounded_to(x, b * cos + a * sin);
  }
}

Tensor rope_and_write(const Tensor& qkv_, const Tensor& rotary_, Tensor& k_cache, Tensor& v_cache, const Tensor& slots_,
                      int64_t H) {
  const Tensor qkv = qkv_.contiguous(), rotary = rotary_.contiguous(), slots = slots_.contiguous();
  TORCH_CHECK(
      k_cache.dim() == 4 && k_cache.is_contiguous() && v_cache.is_contiguous() && k_cache.sizes() == v_cache.sizes(),
      "the caches are [B, S, K, width]");
  const bool eight = k_cache.scalar_type() == at::kByte;
  const int64_t T = qkv.size(0), K = k_cache.size(2), width = k_cache.size(3), D = width - (eight ? 4 : 0);
  const int64_t num_slots = k_cache.size(0) * k_cache.size(1);
  TORCH_CHECK(qkv.dim() == 2 && qkv.size(1) == (H + 2 * K) * D && rotary.scalar_type() == at::kFloat &&
                  rotary.numel() == T * D && slots.scalar_type() == at::kLong && slots.numel() == T && D % 8 == 0,
              "queries, keys and values are [T, (H + 2K) D], and there is a slot for each token");
  for (int64_t t = 0; t < T; t++) {
    const int64_t slot = slots.const_data_ptr<int64_t>()[t];
    TORCH_CHECK(slot >= 0 && slot < num_slots, "slot ", slot, " is outside of the cache");
  }
  Tensor q = at::empty({T, H, D}, qkv.options());
  ERNIE_DISPATCH(qkv.scalar_type(), S, [&] {
    auto run = [&](auto* keys, auto* values) {
      share((T + 15) / 16, [&](int64_t i) {
        const auto row = room<float>(D);
        for (int64_t t = i * 16; t < std::min(T, (i + 1) * 16); t++) {
          const S* from = qkv.const_data_ptr<S>() + t * (H + 2 * K) * D;
          const float* angles = rotary.const_data_ptr<float>() + t * D;
          const int64_t slot = slots.const_data_ptr<int64_t>()[t];
          for (int64_t h = 0; h < H; h++, from += D) {
            turn_row(from, angles, D, row.get());
            keep_row(row.get(), D, q.data_ptr<S>() + (t * H + h) * D);
          }
          for (int64_t k = 0; k < K; k++, from += D) {
            turn_row(from, angles, D, row.get());
            keep_row(row.get(), D, keys + (slot * K + k) * width);
          }
          for (int64_t k = 0; k < K; k++, from += D) {
            for (int64_t d = 0; d < D; d += 8) store(row.get() + d, load(from + d));
            keep_row(row.get(), D, values + (slot * K + k) * width);
          }
        }
      });
    };
    if (eight)
      return run(reinterpret_cast<int8_t*>(k_cache.data_ptr<uint8_t>()),
                 reinterpret_cast<int8_t*>(v_cache.data_ptr<uint8_t>()));
    ERNIE_DISPATCH(k_cache.scalar_type(), E, [&] { run(k_cache.data_ptr<E>(), v_cache.data_ptr<E>()); });
  });
  return q;
}

// Both of the above: queries, keys and values of new tokens to what they see.
Tensor write_and_attend(const Tensor& qkv, const Tensor& rotary, Tensor& k_cache, Tensor& v_cache, const Tensor& slots, int64_t H,
              const Tensor& tables, const Tensor& starts, const Tensor& contexts) {
  return attention(rope_and_write(qkv, rotary, k_cache, v_cache, slots, H), k_cache, v_cache, tables, starts, contexts);
}

}  // namespace

TORCH_LIBRARY(ERNIE_NAMESPACE, m) {
  m.def("linear(Tensor x, Tensor data, Tensor scales, int bits, int rows) -> Tensor", linear);
  m.def(
      "moe(Tensor x, Tensor router, Tensor bias, int top_k, float norm_min, Tensor gate_up, Tensor gate_up_scales, int gate_up_bits, "
      "Tensor down, Tensor down_scales, int down_bits, Tensor? shared_gate_up, Tensor? shared_gate_up_scales, "
      "int shared_gate_up_bits, Tensor? shared_down, Tensor? shared_down_scales, int shared_down_bits) -> Tensor",
      moe);
  m.def("panels(Tensor weight) -> Tensor", panels);
  m.def("panel_linear(Tensor x, Tensor data, int rows) -> Tensor", panel_linear);
  m.def(
      "panel_moe(Tensor x, Tensor router, Tensor bias, int top_k, float norm_min, Tensor[] gate_up, Tensor[] down, "
      "Tensor? shared_gate_up, Tensor? shared_down) -> Tensor",
      panel_moe);
  m.def("panel_embedding(Tensor ids, Tensor data, int rows, ScalarType dtype) -> Tensor", panel_embedding);
  m.def("quantize(Tensor weight, int bits, bool search, Tensor(a!) data, Tensor(b!) scales) -> ()", quantize);
  m.def(
      "attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor query_starts, "
      "Tensor context_lens) -> Tensor",
      attention);
  m.def("add_rms_norm(Tensor(a!) residual, Tensor? delta, Tensor weight, float eps) -> Tensor", add_rms_norm);
  m.def("swiglu(Tensor gate_up) -> Tensor", swiglu);
  m.def("rotary(Tensor positions, Tensor frequencies) -> Tensor", rotary);
  m.def("route(Tensor x, Tensor weight, Tensor bias, int top_k, float norm_min) -> (Tensor, Tensor)", route);
  m.def(
      "rope_and_write(Tensor qkv, Tensor rotary, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, int num_heads) "
      "-> Tensor",
      rope_and_write);
  m.def(
      "attend(Tensor qkv, Tensor rotary, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, int num_heads, "
      "Tensor block_tables, Tensor query_starts, Tensor context_lens) -> Tensor",
      write_and_attend);
  m.def("embedding(Tensor ids, Tensor data, Tensor scales, int bits, int rows, ScalarType dtype) -> Tensor", embedding);
}
