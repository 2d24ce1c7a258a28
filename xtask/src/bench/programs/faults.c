/* Page faults that the kernel answers with memory, and those that it answers with a signal. */
#define _GNU_SOURCE
#include <signal.h>
#include <sys/mman.h>

#include "bench.h"

#define PAGE 4096
#define PAGES 1024

static uint64_t faults_work(void)
{
	uint64_t sum = 0;
	for (int round = 0; round < 30; round++) {
		volatile char *at = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (at == MAP_FAILED)
			fail("mmap");
		/* No huge pages: a fault for each. */
		madvise((void *)at, PAGES * PAGE, MADV_NOHUGEPAGE);
		for (int i = 0; i < PAGES; i++)
			sum += at[i * PAGE]++ == 0;
		munmap((void *)at, PAGES * PAGE);
	}
	return sum;
}

static volatile char *page;
static volatile uint64_t signals;

static void segv(int signal, siginfo_t *info, void *context)
{
	(void)signal, (void)context;
	signals += info->si_addr == (void *)page;
	mprotect((void *)page, PAGE, PROT_READ | PROT_WRITE);
}

static void segv_prepare(void)
{
	struct sigaction action = { .sa_sigaction = segv, .sa_flags = SA_SIGINFO };
	page = memory(PAGE);
	if (sigaction(SIGSEGV, &action, NULL))
		fail("sigaction");
}

static uint64_t segv_work(void)
{
	for (int i = 0; i < 12000; i++) {
		mprotect((void *)page, PAGE, PROT_NONE);
		*page = i;
	}
	return signals;
}

const struct row row_faults = { .name = "faults", .work = faults_work };
const struct row row_segv = { .name = "segv", .prepare = segv_prepare, .work = segv_work };
