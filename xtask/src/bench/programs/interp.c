/* A threaded interpreter: an indirect jump at the end of each instruction, to where the program says (computed goto). */
#include "bench.h"

enum { PUSH, ADD, XOR, DUP, OVER, ROT, DEC, LOOP, DROP, HALT };

static const unsigned char program[] = {
	DUP, PUSH, 5, ADD, OVER, XOR, PUSH, 3, ROT, ADD, DUP, ADD, OVER, XOR, DUP, DROP, PUSH, 9, XOR, ADD, DEC, LOOP, HALT,
};

uint64_t interp_work(unsigned rounds)
{
	static const void *const code[] = { &&push, &&add, &&xor, &&dup, &&over, &&rot, &&dec, &&loop, &&drop, &&halt };
	uint64_t stack[16] = { 1, 2 }, *top = stack + 1, count = rounds;
	const unsigned char *at = program;
#define NEXT goto *code[*at++]
	NEXT;
push:	*++top = *at++; NEXT;
add:	top[-1] += *top; top--; NEXT;
xor:	top[-1] ^= *top; top--; NEXT;
dup:	top[1] = *top; top++; NEXT;
over:	top[1] = top[-1]; top++; NEXT;
rot:	*top = *top << 13 | *top >> 51; NEXT;
drop:	top--; NEXT;
dec:	count--; NEXT;
loop:
	if (count) {
		/* Whatever the program leaves, two numbers go on. */
		uint64_t last = *top;
		top = stack + 1;
		top[-1] ^= last;
		*top += last;
		at = program;
	}
	NEXT;
halt:
	return stack[0] ^ stack[1];
}

static uint64_t work(void)
{
	return interp_work(5000000);
}

const struct row row_interp = { .name = "interp", .work = work };
