/* Calls through pointers to one of eight functions, in an order that repeats late. */
#include "bench.h"

#define CALLS 15000000

typedef uint64_t function(uint64_t);

#define FUNCTION(name, expression) \
	__attribute__((noinline)) static uint64_t name(uint64_t x) { return expression; }

FUNCTION(one, x + 1)
FUNCTION(two, x ^ 0x55)
FUNCTION(three, x * 3)
FUNCTION(four, x - (x >> 3))
FUNCTION(five, x + (x << 2))
FUNCTION(six, ~x)
FUNCTION(seven, x >> 1 | x << 63)
FUNCTION(eight, x ^ x >> 7)

static function *const functions[] = { one, two, three, four, five, six, seven, eight };
static function *calls[1024];

static void prepare(void)
{
	uint64_t random = 7;
	for (int i = 0; i < 1024; i++)
		calls[i] = functions[next_random(&random) >> 61];
}

static uint64_t work(void)
{
	uint64_t x = 1;
	for (unsigned i = 0; i < CALLS; i++)
		x = calls[i % 1024](x);
	return x;
}

const struct row row_indirect = { .name = "indirect", .prepare = prepare, .work = work };
