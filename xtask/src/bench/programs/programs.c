/* Debian's own programs on files in memory. */
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

#include "bench.h"

/* Words of a small vocabulary, as text has them: some often, most seldom. */
static void write_text(const char *path, size_t size)
{
	FILE *file = fopen(path, "w");
	uint64_t random = 11;
	if (!file)
		fail(path);
	for (size_t written = 0; written < size;) {
		uint64_t number = next_random(&random);
		uint64_t word = (number >> 40) % ((number >> 20) % 3000 + 1);
		int count = fprintf(file, "%s%llx%c", word % 3 ? "the" : "of", (unsigned long long)(word * word),
				    number % 11 ? ' ' : '\n');
		if (count < 0)
			fail(path);
		written += count;
	}
	if (fclose(file))
		fail(path);
}

static void gzip_prepare(void)
{
	write_text("/tmp/text", 2 << 20);
}

static uint64_t gzip_work(void)
{
	char *const argv[] = { "/programs/gzip", "-cn", NULL };
	run_program(argv, "/tmp/text", "/tmp/text.gz");
	return checksum_of_file("/tmp/text.gz");
}

static void perl_prepare(void)
{
	write_text("/tmp/text", 3 << 18);
}

static uint64_t perl_work(void)
{
	char *const argv[] = { "/programs/perl", "/programs/words.pl", NULL };
	run_program(argv, "/tmp/text", "/tmp/words");
	return checksum_of_file("/tmp/words");
}

/* What `gcc -O2 -c` does behind the preprocessor. */
static uint64_t gcc_work(void)
{
	char *const compiler[] = {
		"/programs/cc1", "-fpreprocessed", "/programs/source.i", "-quiet", "-O2", "-o", "/tmp/source.s", NULL,
	};
	char *const assembler[] = { "/programs/as", "-o", "/tmp/source.o", "/tmp/source.s", NULL };
	run_program(compiler, NULL, NULL);
	run_program(assembler, NULL, NULL);
	return checksum_of_file("/tmp/source.s");
}

const struct row row_gzip = { .name = "gzip", .prepare = gzip_prepare, .work = gzip_work };
const struct row row_perl = { .name = "perl", .prepare = perl_prepare, .work = perl_work };
const struct row row_gcc = { .name = "gcc", .work = gcc_work };
