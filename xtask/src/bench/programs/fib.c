/* Recursive calls: Fibonacci numbers the slow way. */
#include "bench.h"

/* As the source says it: not unrolled into loops. */
__attribute__((noinline, noclone, optimize("no-optimize-sibling-calls", "no-ipa-cp")))
static uint64_t fib(unsigned n)
{
	return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

static uint64_t work(void)
{
	return fib(37);
}

const struct row row_fib = { .name = "fib", .work = work };
