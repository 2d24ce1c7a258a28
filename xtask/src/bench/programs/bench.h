/* What the rows of `cargo xtask bench` share: one file has one subject, main.c knows them all. */
#ifndef BENCH_H
#define BENCH_H

#include <stddef.h>
#include <stdint.h>

/* A fixed amount of work. */
struct row {
	const char *name;
	/* Whether this processor can do it; NULL if any can. */
	int (*able)(void);
	/* What comes before the time counts; may be NULL. */
	void (*prepare)(void);
	/* The work; its result is the same on every machine that works rightly. */
	uint64_t (*work)(void);
};

/* Ends the row with this reason, and the error of the last system call. */
_Noreturn void fail(const char *what);

/* Zeroed memory, in place already: touching it faults no more. */
void *memory(size_t size);

/* The next of a sequence of numbers that look random (xorshift64*). */
static inline uint64_t next_random(uint64_t *state)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return *state * 0x2545f4914f6cdd1dULL;
}

/* FNV-1a, going on from `sum`. */
static inline uint64_t checksum(uint64_t sum, const void *data, size_t size)
{
	const unsigned char *bytes = data;
	for (size_t i = 0; i < size; i++)
		sum = (sum ^ bytes[i]) * 0x100000001b3ULL;
	return sum;
}

/* Runs a program with its streams on these files (NULL: none) and waits for it; fails unless it exits with 0. */
void run_program(char *const argv[], const char *in, const char *out);

/* The checksum of a file. */
uint64_t checksum_of_file(const char *path);

/* Runs a function in a child; the child's exit status is its result. */
int fork_to(int (*child)(void *), void *argument);

/* Waits for a child, which must exit with 0. */
void wait_for(int child);

#endif
