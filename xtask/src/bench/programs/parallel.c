/* Two processes that compute, on whatever processors there are. */
#include "bench.h"

uint64_t integer_work(unsigned rounds);
uint64_t sieve_work(unsigned rounds);
uint64_t interp_work(unsigned rounds);

static int compute(void *unused)
{
	(void)unused;
	uint64_t result = integer_work(100000000) ^ sieve_work(50) ^ interp_work(5000000);
	return result == 0;
}

static uint64_t work(void)
{
	int children[2];
	for (int i = 0; i < 2; i++)
		children[i] = fork_to(compute, NULL);
	for (int i = 0; i < 2; i++)
		wait_for(children[i]);
	return 2;
}

const struct row row_parallel = { .name = "parallel", .work = work };
