/* How the work of grouped products is laid out: see grouped_work.py. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;
typedef int32_t i32;

/* What a part costs beside its rows, in steps: writing 128 KB of fp32 and reading it back. */
#define PART_OVERHEAD 8
#define MOST_PARTS 16
#define TILES_PER_PROGRAM 16
/* Dealt items, a program gets one long one, or short ones in a row until it has so many steps: more
 * would be further apart from those that run at the same time, and share less of what they read;
 * with fewer, programs ask more often. */
#define STEPS_OF_A_HAND 64
#define MOST_OF_A_HAND 16

#define FIELDS 8  /* of a segment */
#define NUMBERS 9 /* of a layout: see lay_out */

static i64 least(i64 a, i64 b) { return a < b ? a : b; }
static i64 most(i64 a, i64 b) { return a > b ? a : b; }
static i64 divided_up(i64 a, i64 b) { return (a + b - 1) / b; }
/* So that every table begins at a multiple of 16 bytes: for another alignment Triton compiles anew. */
static i64 padded(i64 numbers) { return (numbers + 3) / 4 * 4; }

/* Group, first row and the group's end of each tile of `block` rows; returns how many. */
i64 row_tiles(i64 G, const i64 *counts_G, i64 block, i32 *found) {
    i64 stop = 0, tiles = 0;
    for (i64 g = 0; g < G; g++) {
        i64 row = stop;
        stop += counts_G[g];
        for (; row < stop; row += block, tiles++)
            found[3 * tiles] = g, found[3 * tiles + 1] = row, found[3 * tiles + 2] = stop;
    }
    return tiles;
}

/* A group: its rows, the steps of one of its tiles, and how many of its tiles are cut, into how
 * many parts each. */
typedef struct {
    i64 group, count, last_row, steps, cut, parts;
} Group;

static int larger_first(const void *left, const void *right) {
    const Group *a = left, *b = right;
    if (a->count != b->count) return a->count < b->count ? 1 : -1;
    return a->group < b->group ? -1 : 1;
}

/* Into how many parts to cut each of these tiles, so that they are done soonest. */
static i64 best_parts(i64 tiles, i64 steps, i64 programs) {
    i64 best = 1, best_time = INT64_MAX;
    for (i64 parts = 1; parts <= MOST_PARTS; parts++) {
        i64 overhead = parts > 1 ? PART_OVERHEAD : 0;
        i64 time = divided_up(tiles * parts, programs) * (divided_up(steps, parts) + overhead);
        if (time < best_time) best = parts, best_time = time;
    }
    return best;
}

static void cut_long_tiles(i64 G, Group *groups, i64 tiles, i64 programs) {
    i64 steps = 0;
    for (i64 g = 0; g < G; g++) steps += groups[g].steps;
    /* A tile is long if one more on a program shows in the time of the whole. */
    i64 is_long = most(steps * tiles / (programs * TILES_PER_PROGRAM), 2 * PART_OVERHEAD);
    for (i64 start = 0, stop; start < G && groups[start].steps > is_long; start = stop) {
        /* Groups of about one size fill rounds of all programs together. */
        i64 most_steps = groups[start].steps;
        for (stop = start; stop < G && 10 * groups[stop].steps >= 9 * most_steps;) stop++;
        i64 left_over = (stop - start) * tiles % programs;
        i64 parts = best_parts(left_over, most_steps, programs);
        for (i64 g = stop - 1; g >= start && parts > 1; g--) {
            groups[g].cut = least(left_over, tiles);
            left_over -= groups[g].cut;
        }
        for (i64 g = start; g < stop; g++) groups[g].parts = parts;
    }
}

/* The tables of what is computed whole, or in parts, one after the other in `found`, unless that is
 * NULL. numbers gets how many items, segments, tiles in parts and hands there are, and the sizes of
 * the tables, of which the last one is the queue and stays as it is. Returns the size of all. */
static i64 lay_out(i64 G, const Group *groups, i64 tiles, i64 block_k, int in_parts, i64 *numbers,
                   i32 *found) {
    i64 items = 0, segments = 0, cut_tiles = 0, hands = 0;
    i32 *of_items = found, *segment = NULL, *first_items = NULL, *starts = NULL;
    if (found) {
        segment = of_items + numbers[4];
        first_items = segment + numbers[5];
        starts = first_items + numbers[6];
    }
    for (i64 g = 0; g < G; g++) {
        i64 num_tiles = in_parts ? groups[g].cut : tiles - groups[g].cut;
        if (!num_tiles) continue;
        i64 parts = in_parts ? groups[g].parts : 1, count = num_tiles * parts;
        i64 first_row = groups[g].last_row - groups[g].count;
        i64 part_rows = divided_up(groups[g].steps, parts) * block_k;
        i64 steps = most(divided_up(least(groups[g].count, part_rows), block_k), 1);
        i64 hand = most(1, least(MOST_OF_A_HAND, STEPS_OF_A_HAND / steps));
        if (found) {
            i32 fields[FIELDS] = {groups[g].group, first_row, groups[g].last_row, items,
                                  in_parts ? tiles - num_tiles : 0, num_tiles, parts, part_rows};
            memcpy(segment + FIELDS * segments, fields, sizeof fields);
            for (i64 n = 0; n < count; n++) of_items[items + n] = segments;
            for (i64 n = 0; in_parts && n < num_tiles; n++)
                first_items[cut_tiles + n] = items + n * parts;
            for (i64 n = 0; n < count; n += hand) starts[hands + n / hand] = items + n;
        }
        items += count, segments++, hands += divided_up(count, hand);
        if (in_parts) cut_tiles += num_tiles;
    }
    if (found) starts[hands] = items;
    i64 all[NUMBERS] = {items, segments, cut_tiles, hands,
                        padded(items), padded(FIELDS * segments), padded(cut_tiles),
                        padded(hands + 1), padded(1)};
    memcpy(numbers, all, sizeof all);
    return all[4] + all[5] + all[6] + all[7] + all[8];
}

/* How the tiles of G groups are worked on by `programs` at a time, `tiles` of each group, block_k
 * rows a step: two layouts, of what is computed whole and in parts. numbers is [2 * NUMBERS].
 *
 * Returns 0, or -1 where there is no memory. */
int schedule(i64 G, const i64 *counts_G, i64 tiles, i64 block_k, i64 programs, i64 *numbers,
             i32 *found) {
    Group *groups = malloc((G ? G : 1) * sizeof *groups);
    if (!groups) return -1;
    for (i64 g = 0, stop = 0; g < G; g++) {
        stop += counts_G[g];
        groups[g] = (Group){g, counts_G[g], stop, most(divided_up(counts_G[g], block_k), 1), 0, 1};
    }
    qsort(groups, G, sizeof *groups, larger_first);
    cut_long_tiles(G, groups, tiles, programs);
    for (int in_parts = 0; in_parts < 2; in_parts++) {
        i64 *of_this = numbers + NUMBERS * in_parts;
        i64 size = lay_out(G, groups, tiles, block_k, in_parts, of_this, found);
        if (found) found += size;
    }
    free(groups);
    return 0;
}
