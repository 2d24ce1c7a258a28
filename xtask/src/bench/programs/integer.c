/* Arithmetic in registers: no memory, one well predicted branch. */
#include "bench.h"

uint64_t integer_work(unsigned rounds)
{
	uint64_t a = 1, b = 2, c = 3;
	for (unsigned i = 0; i < rounds; i++) {
		a += b ^ (c << 3);
		b = (b << 7 | b >> 57) + a;
		c ^= a * 5 + (b >> 11);
	}
	return a ^ b ^ c;
}

static uint64_t work(void)
{
	return integer_work(80000000);
}

const struct row row_integer = { .name = "integer", .work = work };
