// The verbs of reference.py that a CPU does best in C++, as operators of torch.
//
// Knows tensors and the format of packed.py. Knows no layer, no request and no page of Python. One source for every
// processor: float arithmetic is in vectors of 8 that the compiler maps to what there is, and only the products of
// 8-bit integers, a screen below, are written for AVX2, for AVX-512-VNNI, and without either.
//
// What is computed for a token never depends on the tokens beside it, nor on how many threads there are: each row's
// sums run in one order. So the same text comes out however requests are batched.
//
// Letters: T tokens, R rows of a matrix, C its columns, N hidden size, I width of an expert, E experts, A active
// experts, H query heads, K key/value heads, D head size, L tokens of a context, B blocks of S tokens.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#if !defined(ERNIE_PORTABLE) && defined(__AVX2__)
#include <immintrin.h>
#define ERNIE_AVX2 1
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define ERNIE_DPBUSD _mm256_dpbusd_epi32
#elif defined(__AVXVNNI__)
#define ERNIE_DPBUSD _mm256_dpbusd_avx_epi32
#endif
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

template <class V, class P> inline V read(const P* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

inline f8 load(const float* p) { return read<f8>(p); }
inline f8 load(const bf16* p) { return (f8)(__builtin_convertvector(read<h8>(p), u8) << 16); }
inline f8 load(const int8_t* p) { return __builtin_convertvector(__builtin_convertvector(read<b8>(p), i8), f8); }

inline void store(float* p, f8 v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(bf16* p, f8 v) {  // to the nearest, ties to even; what is no number stays none
  u8 bits = (u8)v;
  u8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  h8 out = __builtin_convertvector(v == v ? rounded : (u8)(bits * 0 + 0x7fc0), h8);
  std::memcpy(p, &out, sizeof(out));
}

inline f8 all(float x) { return f8{} + x; }
inline f8 largest(f8 a, f8 b) { return a > b ? a : b; }
inline f8 smallest(f8 a, f8 b) { return a < b ? a : b; }
inline f8 magnitude(f8 v) { return (f8)((i8)v & 0x7fffffff); }

inline float sum(f8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }
inline float largest(f8 v) {
  return std::max(std::max(std::max(v[0], v[4]), std::max(v[1], v[5])),
                  std::max(std::max(v[2], v[6]), std::max(v[3], v[7])));
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

// f(0) .. f(n - 1), on torch's threads. Each thread walks through neighbours, so that it reads memory in order; one
// that is done early takes from the others.
template <class F> void share(int64_t n, const F& f) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), n);
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

template <class T> std::unique_ptr<T[]> room(int64_t n) { return std::unique_ptr<T[]>(new T[std::max<int64_t>(n, 1)]); }

// f<T>(first, count) over 0 .. n - 1, T at a time
#define ERNIE_DISPATCH(type, name, ...)                                                  \
  [&] {                                                                                  \
    if (type == at::kFloat) { using name = float; return __VA_ARGS__(); }                \
    TORCH_CHECK(type == at::kBFloat16, "a tensor of float32 or bfloat16 is needed here"); \
    using name = bf16;                                                                   \
    return __VA_ARGS__();                                                                \
  }()

// ---- activations in 8 bits ------------------------------------------------------------------------------------------

constexpr int GROUP = 32;

struct Group {  // 32 numbers of one token: q * scale
  int8_t q[GROUP];
  float scale;
  int32_t start4, start8;  // where the sum of products with a group of weights begins, see Dot
};

struct Dot4;
struct Dot8;
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

template <class S> void quantize_row(const S* x, int64_t columns, Group* out) {
  for (int64_t g = 0; g < columns / GROUP; g++, x += GROUP) {
    const f8 v[4] = {load(x), load(x + 8), load(x + 16), load(x + 24)};
    quantize_group(v, out[g]);
  }
}

// ---- 8 rows of weights by a few tokens --------------------------------------------------------------------------------
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

template <class Codes> inline Codes codes(const uint8_t* p) { return codes_of(p); }

#elif defined(ERNIE_AVX2)

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
  void add(__m256i w, int32_t x) { sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, _mm256_set1_epi32(x))); }
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
  }
  f8 end(f8 codes) const { return (f8)_mm256_cvtepi32_ps(sum) * codes; }
};

template <class Codes> inline Codes codes(const uint8_t* p);
template <> inline f8 codes<f8>(const uint8_t* p) { return load(reinterpret_cast<const int8_t*>(p)); }
template <> inline __m256i codes<__m256i>(const uint8_t* p) {  // each code twice, in 16 bits
  const __m256i places = _mm256_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3,  //
                                          -1, 4, -1, 4, -1, 5, -1, 5, -1, 6, -1, 6, -1, 7, -1, 7);
  return _mm256_srai_epi16(_mm256_shuffle_epi8(_mm256_set1_epi64x(read<int64_t>(p)), places), 8);
}

#else

inline f8 codes_of(const uint8_t* p) { return load(reinterpret_cast<const int8_t*>(p)); }
inline int32_t start4(const int8_t* q) { return -8 * total(q); }
inline int32_t start8(const int8_t*) { return 0; }

struct Bytes {
  uint8_t at[32];
};
template <class B> inline void add_four(i8& sum, const B* w, int32_t x) {
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

template <class Codes> inline Codes codes(const uint8_t* p) { return codes_of(p); }

#endif

#if defined(ERNIE_AVX2)
inline __m256i vector(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline __m256i low(__m256i w) { return _mm256_and_si256(w, _mm256_set1_epi8(15)); }
inline __m256i high(__m256i w) { return _mm256_and_si256(_mm256_srli_epi16(w, 4), _mm256_set1_epi8(15)); }
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
constexpr int64_t AHEAD = 1024;  // bytes that are asked for before they are needed: the machine's own guess is shorter
constexpr int TOKENS = 4;        // tokens at once: what the registers hold

// out[t] = 8 rows times token t, without the rows' scales. `data` is one block of rows, `units` its units.
template <int BITS, int T> inline void multiply(const uint8_t* data, int64_t units, const Group* const* x, f8* out) {
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
    for (int t = 0; t < T; t++) sums[t] += dots[t].end(c) * x[t][g].scale;
  }
  for (int t = 0; t < T; t++) out[t] = sums[t];
}

// A packed matrix, or a stack of them.
struct Matrix {
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

  // Rows 8b .. 8b + 7 of a member times `count` (up to TOKENS) tokens.
  void times(int64_t member, int64_t b, const Group* const* x, int64_t count, f8* out) const {
    const uint8_t* at = block(member, b);
    bits == 4 ? dispatch<4>(at, x, count, out) : dispatch<8>(at, x, count, out);
    const f8 s = scale(member, b);
    for (int64_t t = 0; t < count; t++) out[t] *= s;
  }

 private:
  template <int BITS> void dispatch(const uint8_t* at, const Group* const* x, int64_t count, f8* out) const {
    static_assert(TOKENS == 4);
    switch (count) {
      case 1: return multiply<BITS, 1>(at, units, x, out);
      case 2: return multiply<BITS, 2>(at, units, x, out);
      case 3: return multiply<BITS, 3>(at, units, x, out);
      default: return multiply<BITS, 4>(at, units, x, out);
    }
  }
};

constexpr int64_t PIECE = 48 << 10;  // bytes of weights that a thread takes at a time, and keeps while tokens pass

// x [T, C] in 8 bits, a row of groups for each token
template <class S> std::unique_ptr<Group[]> quantized(const S* x, int64_t tokens, int64_t columns) {
  const int64_t groups = columns / GROUP, some = std::max<int64_t>(1, 16384 / columns);
  auto out = room<Group>(tokens * groups);
  share((tokens + some - 1) / some, [&](int64_t i) {
    for (int64_t t = i * some; t < std::min(tokens, (i + 1) * some); t++)
      quantize_row(x + t * columns, columns, out.get() + t * groups);
  });
  return out;
}

template <class S> void store_rows(S* out, f8 v, int64_t count) {
  if (count >= 8) return store(out, v);
  for (int64_t i = 0; i < count; i++) out[i] = static_cast<S>(v[i]);
}

Tensor linear(const Tensor& x_, const Tensor& data, const Tensor& scales, int64_t bits, int64_t rows) {
  const Matrix w(data, scales, bits);
  const Tensor x = x_.contiguous();
  TORCH_CHECK(x.dim() == 2 && x.size(1) == w.columns(), "the weight has ", w.columns(), " columns, x ", x.sizes());
  TORCH_CHECK(w.members == 1 && rows <= w.blocks * 8 && rows > w.blocks * 8 - 8, "rows do not fit the packed matrix");
  const int64_t T = x.size(0), groups = w.columns() / GROUP;
  Tensor y = at::empty({T, rows}, x.options());
  ERNIE_DISPATCH(x.scalar_type(), S, [&] {
    const auto q = quantized(x.const_data_ptr<S>(), T, w.columns());
    S* out = y.data_ptr<S>();
    const int64_t some = std::max<int64_t>(1, PIECE / w.block_bytes());
    share((w.blocks + some - 1) / some, [&](int64_t i) {
      const int64_t last = std::min(w.blocks, (i + 1) * some);
      for (int64_t t = 0; t < T; t += TOKENS) {
        const int64_t count = std::min<int64_t>(TOKENS, T - t);
        const Group* tokens[TOKENS];
        for (int64_t k = 0; k < count; k++) tokens[k] = q.get() + (t + k) * groups;
        for (int64_t b = i * some; b < last; b++) {
          f8 sums[TOKENS];
          w.times(0, b, tokens, count, sums);
          for (int64_t k = 0; k < count; k++) store_rows(out + (t + k) * rows + 8 * b, sums[k], rows - 8 * b);
        }
      }
    });
  });
  return y;
}

// MORE

}  // namespace

TORCH_LIBRARY(ERNIE_NAMESPACE, m) {
  m.def("linear(Tensor x, Tensor data, Tensor scales, int bits, int rows) -> Tensor", linear);
}
