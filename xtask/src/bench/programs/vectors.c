/* Floating point: STREAM's triad, scalars that depend on each other, and polynomials on vectors with SSE2 and AVX2. */
#include <immintrin.h>

#include "bench.h"

#define COUNT (1 << 17)

static double *a, *b, *c;

static void prepare(void)
{
	a = memory(COUNT * sizeof *a);
	b = memory(COUNT * sizeof *b);
	c = memory(COUNT * sizeof *c);
	for (int i = 0; i < COUNT; i++) {
		b[i] = i * 0.5;
		c[i] = i % 97;
	}
}

/* a = b + s · c, over 3 MiB. */
static uint64_t triad(void)
{
	for (int round = 0; round < 500; round++) {
		__m128d s = _mm_set1_pd(round);
		for (int i = 0; i < COUNT; i += 4) {
			_mm_store_pd(a + i, _mm_add_pd(_mm_load_pd(b + i), _mm_mul_pd(s, _mm_load_pd(c + i))));
			_mm_store_pd(a + i + 2, _mm_add_pd(_mm_load_pd(b + i + 2), _mm_mul_pd(s, _mm_load_pd(c + i + 2))));
		}
	}
	return checksum(0, a, COUNT * sizeof *a);
}

/* Orbits of the logistic map and a running quotient. */
static uint64_t scalar(void)
{
	double x = 0.3, y = 0.6, z = 1;
	for (int i = 0; i < 15000000; i++) {
		x = 3.9 * x * (1 - x);
		y = 3.7 * y * (1 - y);
		z = (z + x) / (1 + y);
	}
	double result[] = { x, y, z };
	return checksum(0, result, sizeof result);
}

#define SMALL 2048
#define ROUNDS 20000

/* ((x · 0.99 + b) · 0.5 + c · 0.25) over 48 KiB, again and again. */
static uint64_t sse2(void)
{
	const __m128d p = _mm_set1_pd(0.99), q = _mm_set1_pd(0.5), r = _mm_set1_pd(0.25);
	for (int round = 0; round < ROUNDS; round++)
		for (int i = 0; i < SMALL; i += 2) {
			__m128d x = _mm_add_pd(_mm_mul_pd(_mm_load_pd(a + i), p), _mm_load_pd(b + i));
			x = _mm_add_pd(_mm_mul_pd(x, q), _mm_mul_pd(_mm_load_pd(c + i), r));
			_mm_store_pd(a + i, x);
		}
	return checksum(0, a, SMALL * sizeof *a);
}

/* The same, and as many 32-bit integers multiplied, shifted and shuffled. */
__attribute__((target("avx2")))
static uint64_t avx2(void)
{
	const __m256d p = _mm256_set1_pd(0.99), q = _mm256_set1_pd(0.5), r = _mm256_set1_pd(0.25);
	__m256i sum = _mm256_set1_epi32(1);
	for (int round = 0; round < ROUNDS; round++)
		for (int i = 0; i < SMALL; i += 4) {
			__m256d x = _mm256_add_pd(_mm256_mul_pd(_mm256_load_pd(a + i), p), _mm256_load_pd(b + i));
			x = _mm256_add_pd(_mm256_mul_pd(x, q), _mm256_mul_pd(_mm256_load_pd(c + i), r));
			_mm256_store_pd(a + i, x);
			__m256i bits = _mm256_shuffle_epi32(_mm256_castpd_si256(x), 0xb1);
			sum = _mm256_add_epi32(sum, _mm256_srli_epi32(bits, 5));
		}
	uint64_t result = checksum(0, a, SMALL * sizeof *a);
	return checksum(result, &sum, sizeof sum);
}

static int has_avx2(void)
{
	return __builtin_cpu_supports("avx2");
}

const struct row row_triad = { .name = "triad", .prepare = prepare, .work = triad };
const struct row row_scalar_fp = { .name = "scalar-fp", .work = scalar };
const struct row row_vector_sse2 = { .name = "vector-sse2", .prepare = prepare, .work = sse2 };
const struct row row_vector_avx2 = { .name = "vector-avx2", .able = has_avx2, .prepare = prepare, .work = avx2 };
