/* Copies of 256 KiB: by 16-byte loads and stores, and by `rep movsq`. */
#include <emmintrin.h>

#include "bench.h"

#define SIZE (256 << 10)

static char *from, *to;

static void prepare(void)
{
	uint64_t random = 3;
	from = memory(SIZE);
	to = memory(SIZE);
	for (int i = 0; i < SIZE; i++)
		from[i] = next_random(&random);
}

static uint64_t copy_sse(void)
{
	for (int round = 0; round < 3000; round++) {
		for (int i = 0; i < SIZE; i += 64)
			for (int j = i; j < i + 64; j += 16)
				_mm_store_si128((__m128i *)(to + j), _mm_load_si128((const __m128i *)(from + j)));
		from[round]++;
	}
	return checksum(0, to, SIZE);
}

static uint64_t copy_rep(void)
{
	for (int round = 0; round < 1500; round++) {
		const char *source = from;
		char *target = to;
		size_t count = SIZE / 8;
		asm volatile("rep movsq" : "+S"(source), "+D"(target), "+c"(count) : : "memory");
		from[round]++;
	}
	return checksum(0, to, SIZE);
}

const struct row row_memcpy_sse = { .name = "memcpy-sse", .prepare = prepare, .work = copy_sse };
const struct row row_memcpy_rep = { .name = "memcpy-rep", .prepare = prepare, .work = copy_rep };
