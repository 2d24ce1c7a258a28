/* What the kernel does for processes: a system call, two that talk through pipes, new ones, and threads that wait. */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bench.h"

static uint64_t getppid_work(void)
{
	uint64_t same = 0, parent = getppid();
	for (int i = 0; i < 500000; i++)
		same += (uint64_t)syscall(SYS_getppid) == parent;
	return same;
}

#define MESSAGES 8000

/* From the parent, and back. */
static int there[2], back[2];

static void pass_on(int from, int to)
{
	char byte;
	if (read(from, &byte, 1) != 1 || write(to, &byte, 1) != 1)
		fail("pipe");
}

static int answer(void *unused)
{
	(void)unused;
	for (int i = 0; i < MESSAGES; i++)
		pass_on(there[0], back[1]);
	return 0;
}

static uint64_t pipe_work(void)
{
	if (pipe(there) || pipe(back))
		fail("pipe");
	int child = fork_to(answer, NULL);
	if (write(there[1], "x", 1) != 1)
		fail("write");
	for (int i = 1; i < MESSAGES; i++)
		pass_on(back[0], there[1]);
	char last = 0;
	if (read(back[0], &last, 1) != 1)
		fail("read");
	wait_for(child);
	return last;
}

static int end(void *unused)
{
	(void)unused;
	return 0;
}

static uint64_t fork_work(void)
{
	uint64_t count = 0;
	for (; count < 500; count++)
		wait_for(fork_to(end, NULL));
	return count;
}

/* This program once more, which ends at once. */
static uint64_t exec_work(void)
{
	char *const argv[] = { "/bench", "nothing", NULL };
	uint64_t count = 0;
	for (; count < 200; count++)
		run_program(argv, NULL, NULL);
	return count;
}

#define TURNS 20000

static int turn;

static void wait_for_turn(int mine)
{
	int now;
	while ((now = __atomic_load_n(&turn, __ATOMIC_ACQUIRE)) % 2 != mine)
		syscall(SYS_futex, &turn, FUTEX_WAIT_PRIVATE, now, NULL, NULL, 0);
}

static void *take_turns(void *mine)
{
	for (int i = 0; i < TURNS; i++) {
		wait_for_turn(mine != NULL);
		__atomic_add_fetch(&turn, 1, __ATOMIC_RELEASE);
		syscall(SYS_futex, &turn, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
	}
	return NULL;
}

static uint64_t futex_work(void)
{
	pthread_t other;
	if (pthread_create(&other, NULL, take_turns, &turn))
		fail("pthread_create");
	take_turns(NULL);
	pthread_join(other, NULL);
	return turn;
}

const struct row row_getppid = { .name = "getppid", .work = getppid_work };
const struct row row_pipe = { .name = "pipe", .work = pipe_work };
const struct row row_fork = { .name = "fork", .work = fork_work };
const struct row row_exec = { .name = "exec", .work = exec_work };
const struct row row_futex = { .name = "futex", .work = futex_work };
