/* The plan by cost: a local search for the assignment whose slowest rank is the fastest.
 *
 * A rank's time is a sum of prices (ds_llep/costs.py), kept exactly for every rank while tokens are
 * shifted from one rank to another. The search keeps relieving the slowest rank: first along
 * experts that are shared already, which costs no transfer, then by lending another of its home
 * experts. A shift aims at a target time, on both ends, so that most ranks are settled by one. Where
 * nobody can relieve the slowest rank within the target, the target is raised, a third of the way.
 * What is found depends on the first target, so several are tried, each nearer to the best time
 * found so far.
 *
 * Integers only, no recursion, memory of a few [E, P] arrays: every rank finds the same plan.
 *
 * E experts, P ranks, M = E / P experts at home on a rank; node[p] in [0, P).
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;

enum { INSIDE, BETWEEN, KINDS };
enum { CANDIDATES = 2, TRIES = 3 }; /* helpers of each kind to choose from, shifts to try */
enum { SHIFTS = 5000 };             /* of a whole search: a millisecond or two */

/* Where a search starts: all at home, and again with helpers on other nodes first; experts replicated
 * where that spares one, two or four times the transfer, or once and within the target; all at
 * home, and helpers may be filled beyond the target; the best plan so far. */
enum { HOME, FAR_FIRST, REPLICATED, WITHIN_TARGET = REPLICATED + 3, OVERFILL, BEST, STARTS };

static const i64 NO_LIMIT = (i64)1 << 60;

typedef struct {
    i64 row, expert, copy[KINDS], weights[KINDS];
} Costs;

typedef struct {
    i64 P, E, M, nodes, min_tokens, max_foreign, max_rows, shifts;
    const int32_t *node; /* [P] */
    int32_t *member;     /* [P] the ranks by node */
    int32_t *first;      /* [P + 2] of each node among these; the last is for counting */
    Costs costs;
    i64 *own;     /* [E, P] tokens of each expert on each source rank */
    i64 *of_node; /* [E, P] the same by node */
    i64 *load;    /* [E] */
    i64 *by_load; /* [E] the experts, the largest first */
    /* What changes: tokens of each expert that each rank computes, and the ranks' times. */
    i64 *tokens;      /* [E, P] */
    uint8_t *takes;   /* [E, P] a helper has been opened */
    int32_t *helpers; /* [E] how many */
    int32_t *shared;  /* the experts that have helpers */
    i64 num_shared;
    i64 *rows, *time; /* [P] */
    i64 *in[KINDS], *out[KINDS], *lent[KINDS], *borrowed[KINDS]; /* [P] each */
} Search;

static i64 least(i64 a, i64 b) { return a < b ? a : b; }
static i64 most(i64 a, i64 b) { return a > b ? a : b; }

static i64 num_foreign(const Search *s, i64 r) {
    return s->borrowed[INSIDE][r] + s->borrowed[BETWEEN][r];
}

static int kind(const Search *s, i64 a, i64 b) { return s->node[a] != s->node[b]; }

static void retime(Search *s, i64 r) {
    i64 time = s->costs.row * s->rows[r];
    for (int k = 0; k < KINDS; k++) {
        time += s->costs.expert * s->borrowed[k][r];
        time += s->costs.copy[k] * most(s->in[k][r], s->out[k][r]);
        time += s->costs.weights[k] * most(s->lent[k][r], s->borrowed[k][r]);
    }
    s->time[r] = time;
}

/* Add (sign 1) or take away (-1) what the tokens of an expert cost the ranks of a node, under the
 * local cut of ds_llep/cut.py: a rank computes its own tokens first, then its node's. */
static void book(Search *s, i64 e, int32_t node, i64 sign) {
    const i64 *own = s->own + e * s->P, *tokens = s->tokens + e * s->P;
    const int32_t *end = s->member + s->first[node + 1];
    i64 wanted = 0, left = 0;
    for (const int32_t *r = s->member + s->first[node]; r < end; r++) {
        wanted += most(tokens[*r] - own[*r], 0);
        left += most(own[*r] - tokens[*r], 0);
    }
    for (const int32_t *r = s->member + s->first[node]; r < end; r++) {
        i64 sent = most(own[*r] - tokens[*r], 0), received = most(tokens[*r] - own[*r], 0);
        i64 near = least(sent, wanted);
        wanted -= near;
        s->out[INSIDE][*r] += sign * near;
        s->out[BETWEEN][*r] += sign * (sent - near);
        near = least(received, left);
        left -= near;
        s->in[INSIDE][*r] += sign * near;
        s->in[BETWEEN][*r] += sign * (received - near);
        s->rows[*r] += sign * tokens[*r];
    }
}

/* The same for one rank, where all ranks are on one node. */
static void book_rank(Search *s, i64 e, i64 r, i64 sign) {
    i64 own = s->own[e * s->P + r], tokens = s->tokens[e * s->P + r];
    s->out[INSIDE][r] += sign * most(own - tokens, 0);
    s->in[INSIDE][r] += sign * most(tokens - own, 0);
    s->rows[r] += sign * tokens;
}

/* Let rank `b` compute q tokens of an expert that rank `a` did. */
static void shift(Search *s, i64 e, i64 a, i64 b, i64 q) {
    s->shifts--;
    i64 home = e / s->M, *tokens = s->tokens + e * s->P;
    uint8_t *takes = s->takes + e * s->P;
    int32_t nodes[] = {s->node[a], s->node[b]};
    int count = 1 + kind(s, a, b);
    if (s->nodes == 1)
        book_rank(s, e, a, -1), book_rank(s, e, b, -1);
    else
        for (int i = 0; i < count; i++) book(s, e, nodes[i], -1);
    tokens[a] -= q;
    tokens[b] += q;
    if (s->nodes == 1)
        book_rank(s, e, a, 1), book_rank(s, e, b, 1);
    else
        for (int i = 0; i < count; i++) book(s, e, nodes[i], 1);
    if (b != home && !takes[b]) {
        int k = kind(s, home, b);
        takes[b] = 1, s->lent[k][home]++, s->borrowed[k][b]++;
        if (!s->helpers[e]++) s->shared[s->num_shared++] = e;
    }
    if (a != home && !tokens[a]) {
        int k = kind(s, home, a);
        takes[a] = 0, s->lent[k][home]--, s->borrowed[k][a]--;
        if (!--s->helpers[e]) {
            i64 i = 0;
            while (s->shared[i] != e) i++;
            s->shared[i] = s->shared[--s->num_shared];
        }
    }
    retime(s, home);
    if (s->nodes == 1)
        retime(s, a), retime(s, b);
    else
        for (int i = 0; i < count; i++)
            for (int32_t r = s->first[nodes[i]]; r < s->first[nodes[i] + 1]; r++)
                retime(s, s->member[r]);
}

/* Shift if that leaves both ranks under the time that the first one had. */
static int shift_if_better(Search *s, i64 e, i64 a, i64 b, i64 q) {
    i64 before = s->time[a];
    shift(s, e, a, b, q);
    if (s->time[a] < before && s->time[b] < before) return 1;
    shift(s, e, b, a, q);
    return 0;
}

/* Tokens that rank g must lose to get to `target`, if that costs it `extra`. An estimate: what it
 * receives is taken to fall as long as it is more than what it sends. */
static i64 needed(const Search *s, i64 g, i64 target, i64 extra, int k) {
    i64 over = s->time[g] + extra - target, busy = most(s->in[k][g] - s->out[k][g], 0);
    i64 both = s->costs.row + s->costs.copy[k];
    if (over <= busy * both) return (over + both - 1) / both;
    return busy + (over - busy * both + s->costs.row - 1) / s->costs.row;
}

/* Tokens of an expert that rank h can take up to `target`: its own ones first, which it then need
 * not send, then those of its node, then others. */
static i64 room(const Search *s, i64 e, i64 h, i64 target) {
    i64 home = e / s->M, total = 0;
    const i64 *own = s->own + e * s->P, *tokens = s->tokens + e * s->P;
    int k = kind(s, home, h);
    i64 left = target - s->time[h];
    if (h != home && !s->takes[e * s->P + h]) {
        left -= s->costs.expert;
        if (s->borrowed[k][h] >= s->lent[k][h]) left -= s->costs.weights[k];
    }
    i64 mine = most(own[h] - tokens[h], 0), near = NO_LIMIT;
    if (k == BETWEEN) {
        near = s->of_node[e * s->P + s->node[h]] - mine;
        for (int32_t r = s->first[s->node[h]]; r < s->first[s->node[h] + 1]; r++)
            near -= tokens[s->member[r]];
        near = most(near, 0);
    }
    i64 spared = least(mine, most(s->out[k][h] - s->in[k][h], 0));
    i64 idle = most(s->out[INSIDE][h] - s->in[INSIDE][h] - (k == INSIDE ? spared : 0), 0);
    i64 row = s->costs.row;
    i64 amounts[] = {spared, mine - spared, least(near, idle), near - least(near, idle), NO_LIMIT};
    i64 prices[] = {row - s->costs.copy[k], row, row, row + s->costs.copy[INSIDE],
                    row + s->costs.copy[BETWEEN]};
    for (int i = 0; i < 5; i++) {
        if (prices[i] > 0 && (left < 0 || left / prices[i] < amounts[i])) {
            total = left > 0 ? total + left / prices[i] : 0;
            break;
        }
        left -= prices[i] * amounts[i];
        total += amounts[i];
    }
    return least(total, s->max_rows - s->rows[h]);
}

/* Relieve rank g along an expert that it shares with other ranks already. */
static int relieve_shared(Search *s, i64 g, i64 target) {
    for (i64 i = 0; i < s->num_shared; i++) {
        i64 e = s->shared[i], home = e / s->M, at = e * s->P;
        if (g != home && !s->takes[at + g]) continue;
        for (i64 last = -1, b; ; last = s->time[b] * s->P + b) { /* the others by time */
            b = -1;
            for (i64 r = 0; r < s->P; r++)
                if (r != g && (r == home || s->takes[at + r]) && s->time[r] * s->P + r > last &&
                    (b < 0 || s->time[r] < s->time[b]))
                    b = r;
            if (b < 0 || s->time[b] >= target) break;
            i64 q = least(needed(s, g, target, 0, kind(s, g, b)), room(s, e, b, target));
            q = least(q, s->tokens[at + g]);
            if (g != home) q = least(q, s->tokens[at + g] - s->min_tokens);
            if (q > 0 && shift_if_better(s, e, g, b, q)) return 1;
        }
    }
    return 0;
}

typedef struct {
    i64 left, own, time, expert, helper, tokens;
} Candidate;

static int before(const Candidate *a, const Candidate *b) {
    if (a->left != b->left) return a->left < b->left;
    if (a->own != b->own) return a->own > b->own;
    if (a->time != b->time) return a->time < b->time;
    return a->expert < b->expert;
}

/* Relieve rank g by lending one of its home experts to a rank that has none of it. The helper is
 * filled up to `target` or, to `overfill` it, as far as g is: a rank that borrows can lend as many
 * experts at no price, so it may hand on what is too much for it. */
static int relieve_lending(Search *s, i64 g, i64 target, int far_first, int overfill) {
    i64 high = overfill ? s->time[g] : target;
    Candidate best[TRIES];
    int found = 0;
    for (int k = 0; k < KINDS; k++) {
        i64 extra = s->lent[k][g] >= s->borrowed[k][g] ? s->costs.weights[k] : 0;
        i64 last = -1, want = needed(s, g, target, extra, k);
        i64 relief = s->costs.row + s->costs.copy[k];
        for (int c = 0; c < CANDIDATES; c++) {
            i64 h = -1; /* the ranks of this kind by time */
            for (i64 r = 0; r < s->P; r++)
                if (r != g && kind(s, g, r) == k && s->time[r] * s->P + r > last &&
                    num_foreign(s, r) < s->max_foreign &&
                    (h < 0 || s->time[r] < s->time[h]))
                    h = r;
            if (h < 0 || s->time[h] >= high) break;
            last = s->time[h] * s->P + h;
            for (i64 e = g * s->M; e < (g + 1) * s->M; e++) {
                if (s->takes[e * s->P + h] || s->tokens[e * s->P + g] < s->min_tokens) continue;
                i64 q = least(least(want, s->tokens[e * s->P + g]), room(s, e, h, high));
                if (q < s->min_tokens) continue;
                Candidate new = {most(s->time[g] + extra - q * relief, target),
                                 least(s->own[e * s->P + h], q), s->time[h], e, h, q};
                if (far_first && k == INSIDE) new.left += NO_LIMIT;
                int i = found < TRIES ? found++ : TRIES;
                for (; i > 0 && before(&new, &best[i - 1]); i--)
                    if (i < TRIES) best[i] = best[i - 1];
                if (i < TRIES) best[i] = new;
            }
        }
    }
    for (int i = 0; i < found; i++)
        if (shift_if_better(s, best[i].expert, g, best[i].helper, best[i].tokens)) return 1;
    return 0;
}

static i64 slowest(const Search *s) {
    i64 g = 0;
    for (i64 r = 1; r < s->P; r++)
        if (s->time[r] > s->time[g]) g = r;
    return g;
}

/* Take back every transfer without which no rank gets slower than `time`. */
static void take_back(Search *s, i64 time) {
    for (i64 i = s->num_shared - 1; i >= 0; i--) {
        i64 e = s->shared[i], home = e / s->M;
        for (i64 h = 0; h < s->P; h++)
            if (s->takes[e * s->P + h]) {
                i64 q = s->tokens[e * s->P + h];
                shift(s, e, h, home, q);
                int too_many = num_foreign(s, home) && s->rows[home] > s->max_rows;
                if (s->time[slowest(s)] > time || too_many)
                    shift(s, e, home, h, q);
            }
    }
}

typedef struct {
    i64 expert, helper, tokens;
} Spill;

/* Write down where tokens are computed away from home; how many places. */
static i64 save(const Search *s, Spill *spills) {
    i64 count = 0;
    for (i64 i = 0; i < s->num_shared; i++)
        for (i64 h = 0, at = s->shared[i] * s->P; h < s->P; h++)
            if (s->takes[at + h]) spills[count++] = (Spill){s->shared[i], h, s->tokens[at + h]};
    return count;
}

/* Go to a plan that was written down. */
static void restore(Search *s, const Spill *spills, i64 count) {
    while (s->num_shared) {
        i64 e = s->shared[s->num_shared - 1], h = 0;
        while (!s->takes[e * s->P + h]) h++;
        shift(s, e, h, e / s->M, s->tokens[e * s->P + h]);
    }
    for (i64 i = 0; i < count; i++)
        shift(s, spills[i].expert, spills[i].expert / s->M, spills[i].helper, spills[i].tokens);
}

/* Let the fastest ranks of a node take tokens of an expert that are on it, as far as `target` allows
 * and as long as the copies between nodes that this spares are worth `times` the transfer. */
static void replicate_on(Search *s, i64 e, int32_t node, i64 target, i64 times) {
    i64 home = e / s->M, at = e * s->P, left = s->of_node[at + node];
    i64 spared = s->costs.copy[BETWEEN] - s->costs.copy[INSIDE];
    i64 price = times * (s->costs.weights[BETWEEN] + s->costs.expert);
    while (left >= s->min_tokens && left * spared >= price) {
        i64 h = -1;
        for (int32_t i = s->first[node]; i < s->first[node + 1]; i++) {
            i64 r = s->member[i];
            if (!s->takes[at + r] && num_foreign(s, r) < s->max_foreign &&
                (h < 0 || s->time[r] < s->time[h]))
                h = r;
        }
        i64 q = h < 0 ? 0 : least(least(left, s->tokens[at + home]), room(s, e, h, target));
        if (q < s->min_tokens || q * spared < price) break;
        shift(s, e, home, h, q);
        left -= q;
    }
}

/* Let ranks take tokens that are on them, or on their nodes, where the copies that this spares are
 * worth `times` the transfer; the largest experts first. */
static void replicate(Search *s, i64 target, i64 times) {
    for (i64 i = 0; i < s->E; i++) {
        i64 e = s->by_load[i], home = e / s->M, at = e * s->P;
        i64 most_spared = s->load[e] * most(s->costs.copy[INSIDE], s->costs.copy[BETWEEN]);
        if (most_spared < times * least(s->costs.weights[INSIDE], s->costs.weights[BETWEEN])) break;
        for (int32_t node = 0; node < s->nodes; node++)
            if (node != s->node[home]) replicate_on(s, e, node, target, times);
        for (i64 h = 0; h < s->P; h++) {
            int k = kind(s, home, h);
            if (h == home || s->takes[at + h] || num_foreign(s, h) >= s->max_foreign) continue;
            i64 q = least(least(s->own[at + h], s->tokens[at + home]), room(s, e, h, target));
            if (q >= s->min_tokens &&
                q * s->costs.copy[k] >= times * (s->costs.weights[k] + s->costs.expert))
                shift(s, e, home, h, q);
        }
    }
}

/* Relieve the slowest rank until nothing does. */
static void search(Search *s, i64 target, int far_first, int overfill) {
    for (i64 step = 0; step < 3 * s->P && s->shifts > 0; step++) {
        i64 g = slowest(s), over = s->time[g] - target;
        if (over <= 0) break;
        if (relieve_shared(s, g, target)) continue;
        if (relieve_lending(s, g, target, far_first, overfill)) continue;
        if (over <= target / 200) break;
        target += over / 3;
    }
}

static int descending(const void *a, const void *b) {
    i64 x = *(const i64 *)a, y = *(const i64 *)b;
    return (x < y) - (x > y);
}

/* The plan.
 *
 * node_P: from 0 on, without gaps. costs: row, expert, copy inside and between, weights inside and
 * between. limits: fewest tokens of a spill, most foreign experts of a rank, most rows of a rank
 * that helps. start: expert, helper and tokens of each spill of another plan, which this one will
 * not be slower than. tokens_EP gets the plan, times the slowest rank's time without and with it.
 * Returns 0, or -1 where there is no memory. */
int plan_cost(i64 P, i64 E, const i64 *counts_PE, const int32_t *node_P, const i64 *costs,
              const i64 *limits, const i64 *start, i64 num_start, i64 *tokens_EP, i64 *times) {
    Search s = {.P = P, .E = E, .M = E / P, .node = node_P};
    s.costs = (Costs){costs[0], costs[1], {costs[2], costs[3]}, {costs[4], costs[5]}};
    s.shifts = SHIFTS;
    s.min_tokens = most(limits[0], 1), s.max_foreign = limits[1], s.max_rows = limits[2];
    i64 *memory = calloc(3 * E * P + 2 * E + (2 + 4 * KINDS) * P, sizeof(i64));
    char *flags = calloc((2 * E + 2 * P + 2) * sizeof(int32_t) + E * P, 1);
    Spill *found = malloc(E * P * sizeof(Spill));
    if (!memory || !flags || !found) {
        free(memory), free(flags), free(found);
        return -1;
    }
    i64 *next = memory;
    s.own = next, next += E * P, s.of_node = next, next += E * P, s.tokens = next, next += E * P;
    s.load = next, next += E, s.by_load = next, next += E;
    s.rows = next, next += P, s.time = next, next += P;
    for (int k = 0; k < KINDS; k++) {
        s.in[k] = next, next += P, s.out[k] = next, next += P;
        s.lent[k] = next, next += P, s.borrowed[k] = next, next += P;
    }
    s.helpers = (int32_t *)flags, s.shared = s.helpers + E;
    s.member = s.shared + E, s.first = s.member + P;
    s.takes = (uint8_t *)(s.first + P + 2);
    for (i64 p = 0; p < P; p++) {
        s.first[node_P[p] + 2]++;
        s.nodes = most(s.nodes, node_P[p] + 1);
    }
    for (i64 n = 1; n < P; n++) s.first[n + 1] += s.first[n];
    for (i64 p = 0; p < P; p++) s.member[s.first[node_P[p] + 1]++] = p;

    i64 total = 0;
    for (i64 p = 0; p < P; p++)
        for (i64 e = 0; e < E; e++) {
            i64 n = counts_PE[p * E + e];
            s.own[e * P + p] = n;
            s.of_node[e * P + node_P[p]] += n;
            s.load[e] += n;
            total += n;
        }
    /* Sorted as one number each: of equal loads the lower expert first. */
    for (i64 e = 0; e < E; e++) {
        s.tokens[e * P + e / s.M] = s.load[e];
        s.by_load[e] = s.load[e] * E + E - 1 - e;
    }
    qsort(s.by_load, E, sizeof(i64), descending);
    for (i64 e = 0; e < E; e++) s.by_load[e] = E - 1 - s.by_load[e] % E;
    for (i64 e = 0; e < E; e++)
        for (int32_t n = 0; n < s.nodes; n++)
            if (s.of_node[e * P + n] || n == node_P[e / s.M]) book(&s, e, n, 1);
    i64 mean = 0;
    for (i64 r = 0; r < P; r++) retime(&s, r), mean += s.time[r] / P;

    times[0] = s.time[slowest(&s)];
    memcpy(tokens_EP, s.tokens, E * P * sizeof(i64));
    i64 best = times[0], num_found = 0;
    restore(&s, (const Spill *)start, num_start);
    if (s.time[slowest(&s)] < best) best = s.time[slowest(&s)], num_found = save(&s, found);

    /* Each target is nearer to the best time by a share of its distance from what no plan beats,
     * rows shared evenly. For each, several starts. */
    static const i64 shares[] = {0, 60, 40, 25, 15, 10, 5, 2};
    i64 bound = s.costs.row * total / P;
    for (int i = 0, in_vain = 0; i < 8 && in_vain < 3; i++, in_vain++) {
        i64 target = i ? best - (best - bound) * shares[i] / 100 : mean;
        for (int from = 0; from < STARTS && s.shifts > 0; from++) {
            int replicated = from >= REPLICATED && from < WITHIN_TARGET;
            if (replicated && i > 0) continue; /* the same start again */
            /* These are for several nodes, or for one, where the rest is soon found. */
            if (s.nodes == 1 && (from == FAR_FIRST || replicated)) continue;
            if (s.nodes == 1 && from == WITHIN_TARGET && i > 1) continue;
            /* On many, the shifts are better spent on what carries less. */
            if (s.nodes > 1 && from == OVERFILL) continue;
            restore(&s, found, from == BEST ? num_found : 0);
            if (replicated) replicate(&s, NO_LIMIT, 1 << (from - REPLICATED));
            if (from == WITHIN_TARGET) replicate(&s, target, 1);
            search(&s, target, from == FAR_FIRST, from == OVERFILL);
            if (s.time[slowest(&s)] >= best) continue;
            take_back(&s, s.time[slowest(&s)]);
            best = s.time[slowest(&s)], num_found = save(&s, found), in_vain = -1;
        }
    }
    for (i64 i = 0; i < num_found; i++) {
        i64 at = found[i].expert * P;
        tokens_EP[at + found[i].expert / s.M] -= found[i].tokens;
        tokens_EP[at + found[i].helper] = found[i].tokens;
    }
    times[1] = best;
    free(memory), free(flags), free(found);
    return 0;
}
