/* A chain of pointers through 8 MiB in random order: each load waits for the one before. */
#include "bench.h"

#define COUNT (1 << 17)
#define STEPS 1500000

/* A cache line each. */
struct link {
	struct link *next;
	uint64_t value;
	char rest[48];
};

static struct link *links;

static void prepare(void)
{
	static uint32_t order[COUNT];
	uint64_t random = 42;
	links = memory(COUNT * sizeof *links);
	for (uint32_t i = 0; i < COUNT; i++)
		order[i] = i;
	for (uint32_t i = COUNT - 1; i > 0; i--) {
		uint32_t other = next_random(&random) % (i + 1), kept = order[i];
		order[i] = order[other];
		order[other] = kept;
	}
	for (uint32_t i = 0; i < COUNT; i++) {
		links[order[i]].next = &links[order[(i + 1) % COUNT]];
		links[order[i]].value = i;
	}
}

static uint64_t work(void)
{
	uint64_t sum = 0;
	const struct link *link = links;
	for (unsigned i = 0; i < STEPS; i++) {
		sum = sum * 3 + link->value;
		link = link->next;
	}
	return sum;
}

const struct row row_chase = { .name = "chase", .prepare = prepare, .work = work };
