/*
 * The agent of `cargo xtask bench`: runs the rows that it is asked for, natively and as all that lives in a guest.
 *
 * It says `bench: ready`. For every name that it then reads, a line each, it answers
 *     bench: begin NAME
 *     bench: end NAME NANOSECONDS CPU CHECKSUM
 * or `bench: unable NAME` where the processor lacks something, or `bench: failed NAME REASON`. The host takes the time
 * between the two lines; the times that are told are by this machine's own clock, and of its processor for this row.
 * With `pin` as argument each row stays on the processor on which it begins, as in a guest that has but one.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "bench.h"

#define ROWS(X) \
	X(integer) X(sieve) X(chase) X(sha256) X(interp) X(fib) X(indirect) X(quicksort) X(tree) \
	X(memcpy_sse) X(memcpy_rep) X(triad) X(scalar_fp) X(vector_sse2) X(vector_avx2) \
	X(getppid) X(pipe) X(fork) X(exec) X(faults) X(segv) X(futex) \
	X(gzip) X(perl) X(gcc) X(parallel)

#define DECLARE(name) extern const struct row row_##name;
ROWS(DECLARE)

#define POINT(name) &row_##name,
static const struct row *const rows[] = { ROWS(POINT) };

static const char *current = "";

void fail(const char *what)
{
	printf("bench: failed %s %s: %s\n", current, what, strerror(errno));
	exit(1);
}

void *memory(size_t size)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (at == MAP_FAILED)
		fail("mmap");
	return at;
}

int fork_to(int (*child)(void *), void *argument)
{
	int pid = fork();
	if (pid < 0)
		fail("fork");
	if (pid == 0)
		_exit(child(argument));
	return pid;
}

void wait_for(int child)
{
	int status;
	if (waitpid(child, &status, 0) != child)
		fail("waitpid");
	if (status != 0) {
		errno = 0;
		fail("a child did not end well");
	}
}

struct program {
	char *const *argv;
	const char *in, *out;
};

static int execute(void *argument)
{
	const struct program *program = argument;
	int in = program->in ? open(program->in, O_RDONLY) : -1;
	int out = program->out ? open(program->out, O_WRONLY | O_CREAT | O_TRUNC, 0600) : -1;
	if ((program->in && dup2(in, 0) < 0) || (program->out && dup2(out, 1) < 0))
		return 126;
	execv(program->argv[0], program->argv);
	return 127;
}

void run_program(char *const argv[], const char *in, const char *out)
{
	struct program program = { argv, in, out };
	wait_for(fork_to(execute, &program));
}

uint64_t checksum_of_file(const char *path)
{
	static char buffer[65536];
	uint64_t sum = 0;
	ssize_t count;
	int file = open(path, O_RDONLY);
	if (file < 0)
		fail(path);
	while ((count = read(file, buffer, sizeof buffer)) > 0)
		sum = checksum(sum, buffer, count);
	close(file);
	return sum;
}

static uint64_t now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ULL + time.tv_nsec;
}

static uint64_t nanoseconds(struct timeval time)
{
	return time.tv_sec * 1000000000ULL + time.tv_usec * 1000ULL;
}

/* What this process and the children that it has waited for took of a processor. */
static uint64_t processor_time(void)
{
	struct rusage self, children;
	getrusage(RUSAGE_SELF, &self);
	getrusage(RUSAGE_CHILDREN, &children);
	return nanoseconds(self.ru_utime) + nanoseconds(self.ru_stime) + nanoseconds(children.ru_utime) +
	       nanoseconds(children.ru_stime);
}

/* A row has a process of its own: what it leaves behind goes with it. */
static int run(void *argument)
{
	const struct row *row = argument;
	if (row->able && !row->able()) {
		printf("bench: unable %s\n", row->name);
		return 0;
	}
	if (row->prepare)
		row->prepare();
	printf("bench: begin %s\n", row->name);
	uint64_t begin = now(), begin_processor = processor_time();
	uint64_t result = row->work();
	uint64_t time = now() - begin, processor = processor_time() - begin_processor;
	printf("bench: end %s %" PRIu64 " %" PRIu64 " %016" PRIx64 "\n", row->name, time, processor, result);
	return 0;
}

static const struct row *find(const char *name)
{
	for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
		if (!strcmp(rows[i]->name, name))
			return rows[i];
	return NULL;
}

static void pin(int processor)
{
	cpu_set_t set;
	CPU_ZERO(&set);
	CPU_SET(processor, &set);
	sched_setaffinity(0, sizeof set, &set);
}

static void serve(const char *name, int pinned)
{
	const struct row *row = find(name);
	current = name;
	if (!row) {
		printf("bench: failed %s no such row\n", name);
		return;
	}
	cpu_set_t all;
	sched_getaffinity(0, sizeof all, &all);
	if (pinned)
		pin(sched_getcpu());
	int child = fork_to(run, (void *)row), status;
	sched_setaffinity(0, sizeof all, &all);
	if (waitpid(child, &status, 0) != child || WIFSIGNALED(status))
		printf("bench: failed %s killed by signal %d\n", name, WTERMSIG(status));
}

int main(int argc, char **argv)
{
	char line[64];
	if (argc > 1 && !strcmp(argv[1], "nothing"))
		return 0;
	/* On a guest's console: no echo, and lines as they are. */
	struct termios terminal;
	if (!tcgetattr(0, &terminal)) {
		cfmakeraw(&terminal);
		tcsetattr(0, TCSANOW, &terminal);
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	/* What a child of a row must not read. */
	setvbuf(stdin, NULL, _IONBF, 0);
	printf("bench: ready\n");
	while (fgets(line, sizeof line, stdin)) {
		line[strcspn(line, "\r\n")] = 0;
		serve(line, argc > 1 && !strcmp(argv[1], "pin"));
	}
	return 0;
}
