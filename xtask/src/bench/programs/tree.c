/* Binary trees made and thrown away: malloc and free of small pieces, and walks through them. */
#include <stdlib.h>

#include "bench.h"

#define DEPTH 16
#define ROUNDS 10

struct node {
	struct node *left, *right;
};

static struct node *make(int depth)
{
	struct node *node = malloc(sizeof *node);
	if (!node)
		fail("malloc");
	node->left = depth ? make(depth - 1) : NULL;
	node->right = depth ? make(depth - 1) : NULL;
	return node;
}

static uint64_t count(const struct node *node)
{
	return node ? 1 + count(node->left) + count(node->right) : 0;
}

static void throw_away(struct node *node)
{
	if (!node)
		return;
	throw_away(node->left);
	throw_away(node->right);
	free(node);
}

static uint64_t work(void)
{
	uint64_t nodes = 0;
	for (int i = 0; i < ROUNDS; i++) {
		struct node *root = make(DEPTH);
		nodes += count(root);
		throw_away(root);
	}
	return nodes;
}

const struct row row_tree = { .name = "tree", .work = work };
