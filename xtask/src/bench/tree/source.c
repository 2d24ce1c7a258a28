/*
 * What the row `gcc` compiles, after the preprocessor: the same few hundred lines for a few types. It needs no
 * headers, so that it is the same wherever it is compiled.
 */
typedef unsigned long size;
void *calloc(size, size);
void free(void *);

#define CODE(T, NAME, HASH, LESS, COMBINE) \
struct NAME##_entry { T key; T value; struct NAME##_entry *next; }; \
struct NAME##_map { struct NAME##_entry **buckets; size count, used; }; \
 \
static size NAME##_hash(T key, size count) \
{ \
	return (size)(HASH) % count; \
} \
 \
static void NAME##_grow(struct NAME##_map *map) \
{ \
	size count = map->count ? map->count * 2 : 8; \
	struct NAME##_entry **buckets = calloc(count, sizeof *buckets); \
	for (size i = 0; i < map->count; i++) \
		for (struct NAME##_entry *entry = map->buckets[i], *next; entry; entry = next) { \
			size at = NAME##_hash(entry->key, count); \
			next = entry->next; \
			entry->next = buckets[at]; \
			buckets[at] = entry; \
		} \
	free(map->buckets); \
	map->buckets = buckets; \
	map->count = count; \
} \
 \
T *NAME##_find(struct NAME##_map *map, T key, int make) \
{ \
	if (map->used * 4 >= map->count * 3) \
		NAME##_grow(map); \
	struct NAME##_entry **place = &map->buckets[NAME##_hash(key, map->count)]; \
	for (struct NAME##_entry *entry = *place; entry; entry = entry->next) \
		if (entry->key == key) \
			return &entry->value; \
	if (!make) \
		return 0; \
	struct NAME##_entry *entry = calloc(1, sizeof *entry); \
	entry->key = key; \
	entry->next = *place; \
	*place = entry; \
	map->used++; \
	return &entry->value; \
} \
 \
void NAME##_sort(T *items, size count) \
{ \
	while (count > 1) { \
		T a = items[0], pivot = items[count / 2], b = items[count - 1]; \
		if (LESS(b, a)) { T kept = a; a = b; b = kept; } \
		if (LESS(pivot, a)) pivot = a; \
		else if (LESS(b, pivot)) pivot = b; \
		size low = 0, high = count - 1; \
		for (;;) { \
			while (LESS(items[low], pivot)) low++; \
			while (LESS(pivot, items[high])) high--; \
			if (low >= high) break; \
			T kept = items[low]; items[low++] = items[high]; items[high--] = kept; \
		} \
		size left = low == high && !LESS(pivot, items[low]) ? low : high + 1; \
		if (!left || left == count) left = count / 2; \
		NAME##_sort(items, left); \
		items += left; \
		count -= left; \
	} \
} \
 \
void NAME##_multiply(T *restrict to, const T *restrict one, const T *restrict other, size n) \
{ \
	for (size i = 0; i < n; i++) \
		for (size j = 0; j < n; j++) { \
			T sum = 0; \
			for (size k = 0; k < n; k++) \
				sum = COMBINE(sum, one[i * n + k], other[k * n + j]); \
			to[i * n + j] = sum; \
		} \
} \
 \
T NAME##_evaluate(const char **text, struct NAME##_map *variables, int level) \
{ \
	T value = 0; \
	while (**text == ' ') ++*text; \
	if (level == 3) { \
		switch (**text) { \
		case '(': ++*text; value = NAME##_evaluate(text, variables, 0); if (**text == ')') ++*text; break; \
		case '-': ++*text; return -NAME##_evaluate(text, variables, 3); \
		case '0' ... '9': while (**text >= '0' && **text <= '9') value = value * 10 + (*(*text)++ - '0'); break; \
		case 'a' ... 'z': { T *found = NAME##_find(variables, *(*text)++, 1); value = *found; break; } \
		case '#': ++*text; value = variables->used; break; \
		case '$': ++*text; value = variables->count; break; \
		default: break; \
		} \
		return value; \
	} \
	value = NAME##_evaluate(text, variables, level + 1); \
	for (;;) { \
		while (**text == ' ') ++*text; \
		char sign = **text; \
		T right; \
		switch (level) { \
		case 0: if (sign != '<' && sign != '>') return value; break; \
		case 1: if (sign != '+' && sign != '-') return value; break; \
		default: if (sign != '*' && sign != '/') return value; break; \
		} \
		++*text; \
		right = NAME##_evaluate(text, variables, level + 1); \
		switch (sign) { \
		case '<': value = LESS(value, right); break; \
		case '>': value = LESS(right, value); break; \
		case '+': value += right; break; \
		case '-': value -= right; break; \
		case '*': value *= right; break; \
		case '/': if (right != 0) value /= right; break; \
		} \
	} \
} \
 \
size NAME##_distance(const T *one, size m, const T *other, size n) \
{ \
	size *row = calloc(n + 1, sizeof *row); \
	for (size j = 0; j <= n; j++) row[j] = j; \
	for (size i = 1; i <= m; i++) { \
		size corner = row[0]; \
		row[0] = i; \
		for (size j = 1; j <= n; j++) { \
			size above = row[j], cost = corner + (one[i - 1] != other[j - 1]); \
			size least = above + 1 < row[j - 1] + 1 ? above + 1 : row[j - 1] + 1; \
			row[j] = least < cost ? least : cost; \
			corner = above; \
		} \
	} \
	size result = row[n]; \
	free(row); \
	return result; \
}

#define LESS(a, b) ((a) < (b))
#define BY_PRODUCT(sum, a, b) ((sum) + (a) * (b))
#define BY_MIXING(sum, a, b) (((sum) ^ (a)) + ((b) << 1 | (sum) >> 3))
#define BY_LARGEST(sum, a, b) ((a) * (b) > (sum) ? (a) * (b) : (sum))

#define INTEGER(T, NAME) \
	CODE(T, NAME, key * 2654435761u, LESS, BY_PRODUCT) \
	CODE(T, NAME##_mixed, (key ^ key >> 3) + 7, LESS, BY_MIXING)
#define FLOATING(T, NAME) \
	CODE(T, NAME, key * 31, LESS, BY_PRODUCT) \
	CODE(T, NAME##_largest, key + 1, LESS, BY_LARGEST)

INTEGER(int, of_int)
FLOATING(double, of_double)
