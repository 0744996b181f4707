// The 32-byte registers of AVX2, F16C and FMA, for the two units that have them; vectors.h says what the names mean.
// The unit has switched the compiler to its instruction set before.
#define GAM_VECTOR_BYTES 32
#define GAM_TO_DOUBLES(v) (Doubles) _mm256_cvtps_pd((__m128)(v))
#define GAM_MULTIPLY_ADD(a, b, c) (Doubles) _mm256_fmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c))

namespace gam {
namespace {

// Writes a line at an aligned address past the caches; `for_each_chunk` orders it before what follows.
#define GAM_STREAM_LINE(to, from) gam::stream_line(to, from)
inline void stream_line(char* to, const char* from) {
  for (int half = 0; half < 64; half += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + half),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + half)));
}

inline __m128 load_float16(const void* p) { return _mm_cvtph_ps(_mm_loadl_epi64(static_cast<const __m128i*>(p))); }

// Eight numbers of float16. The instruction keeps a part of a NaN's bits, `narrow` does not.
#define GAM_FLOAT16 8
inline void widen_float16(const void* from, float* to) {
  _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}

inline void narrow_float16(const float* from, void* to) {
  const __m256 x = _mm256_loadu_ps(from), sign = _mm256_and_ps(x, _mm256_set1_ps(-0.0f));
  const __m256 nan = _mm256_or_ps(sign, _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)));
  const __m256 value = _mm256_blendv_ps(x, nan, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

}  // namespace
}  // namespace gam
