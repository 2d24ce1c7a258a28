/* libc's qsort of random numbers: a call through a pointer for each comparison. */
#include <stdlib.h>

#include "bench.h"

#define COUNT 400000

static uint32_t *numbers;

static void prepare(void)
{
	uint64_t random = 1;
	numbers = memory(COUNT * sizeof *numbers);
	/* Where it sorts: touched before, too. */
	free(malloc(COUNT * sizeof *numbers));
	for (int i = 0; i < COUNT; i++)
		numbers[i] = next_random(&random);
}

static int compare(const void *a, const void *b)
{
	uint32_t one = *(const uint32_t *)a, other = *(const uint32_t *)b;
	return one < other ? -1 : one > other;
}

static uint64_t work(void)
{
	qsort(numbers, COUNT, sizeof *numbers, compare);
	return checksum(0, numbers, COUNT * sizeof *numbers);
}

const struct row row_quicksort = { .name = "quicksort", .prepare = prepare, .work = work };
