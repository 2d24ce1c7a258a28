/* The sieve of Eratosthenes in a megabyte: stores of bytes with growing strides. */
#include <string.h>

#include "bench.h"

#define SIZE (1 << 20)

static unsigned char *composite;

static void prepare(void)
{
	composite = memory(SIZE);
}

static uint64_t primes(void)
{
	uint64_t count = 0;
	memset(composite, 0, SIZE);
	for (unsigned i = 2; i < SIZE; i++) {
		if (composite[i])
			continue;
		count++;
		for (unsigned multiple = 2 * i; multiple < SIZE; multiple += i)
			composite[multiple] = 1;
	}
	return count;
}

uint64_t sieve_work(unsigned rounds)
{
	uint64_t count = 0;
	if (!composite)
		prepare();
	while (rounds--)
		count += primes();
	return count;
}

static uint64_t work(void)
{
	return sieve_work(20);
}

const struct row row_sieve = { .name = "sieve", .prepare = prepare, .work = work };
