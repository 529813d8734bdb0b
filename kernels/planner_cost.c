/* The plan by cost: a local search for the assignment whose slowest rank is the fastest.
 *
 * A rank's time is a sum of prices (ds_llep/costs.py), kept exactly for every rank while tokens are
 * shifted from one rank to another. The search keeps relieving the slowest rank: first along
 * experts that are shared already, which costs no transfer, then by lending another of its
 * experts, then by letting its node borrow experts that its tokens choose on other nodes. A shift
 * aims at a target time, on both ends, so that most ranks are settled by one. Where nobody can
 * relieve the slowest rank within the target, the target is raised, a third of the way. What is
 * found depends on the first target, so several are tried, each nearer to the best time found so
 * far. At last, each transfer of the best plan's slowest rank is tried without.
 *
 * Integers, and two IEEE doubles as in Python: every rank finds the same plan. No recursion, memory
 * of a few [E, P] arrays. Every layer waits for it, so what is known is kept: a plan that is gone back
 * to brings the times of its ranks along.
 *
 * E experts, P ranks, M = E / P experts at home on a rank.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;

enum { INSIDE, BETWEEN, KINDS };
/* Helpers of each kind to choose from, shifts to try, experts to borrow to choose from. */
enum { CANDIDATES = 2, TRIES = 3, EXPERTS = 4 };
enum { NO_MEMORY = -1, TOO_MANY = -2 };
enum { SHIFTS = 2000 };             /* of a whole search: half a millisecond */
enum { RANKS = 2 + 4 * KINDS };     /* numbers that are kept for each rank */

/* Where a search starts: all at home; experts replicated where that spares more than the transfer,
 * or so and within the target; the best plan so far. */
enum { HOME, REPLICATED, WITHIN_TARGET, BEST, STARTS };

static const i64 NO_LIMIT = (i64)1 << 60;

typedef struct {
    i64 row, expert, copy[KINDS], weights[KINDS];
} Costs;

typedef struct {
    i64 expert, helper, tokens;
} Spill;

typedef struct {
    i64 P, E, M, nodes, min_tokens, max_foreign, max_rows, shifts;
    int32_t *node;   /* [P] from 0 on, without gaps */
    int32_t *member; /* [P] the ranks by node */
    int32_t *first;  /* [P + 2] of each node among these; the last is for counting */
    int32_t *home;   /* [E] */
    Costs costs;
    i64 *own;     /* [E, P] tokens of each expert on each source rank */
    i64 *of_node; /* [E, P] the same by node, where there are several */
    i64 *load;    /* [E] */
    i64 *by_load;  /* [E] the experts, the largest first */
    i64 *most_own; /* [E] the most tokens on one rank */
    /* What changes: tokens of each expert that each rank and node computes, and the ranks' times. */
    i64 *tokens, *on_node; /* [E, P]; by node where there are several */
    uint8_t *takes;        /* [E, P] a helper has been opened */
    int32_t *helpers;      /* [E] how many */
    int32_t *shared;       /* the experts that have helpers */
    i64 num_shared;
    int32_t *under; /* the ranks below a target */
    int32_t *computed; /* the experts of a rank */
    i64 *ranks;     /* all of the following, RANKS * P */
    i64 *rows, *time, *in[KINDS], *out[KINDS], *lent[KINDS], *borrowed[KINDS]; /* [P] each */
} Search;

/* A plan that was written down. */
typedef struct {
    Spill *spills;
    i64 count;
    i64 *ranks;
} Saved;

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

/* Let rank r compute q more tokens of an expert, where all ranks are on one node. */
static void book_rank(Search *s, i64 e, i64 r, i64 q) {
    i64 at = e * s->P + r, kept = s->own[at] - s->tokens[at];
    s->out[INSIDE][r] += most(kept - q, 0) - most(kept, 0);
    s->in[INSIDE][r] += most(q - kept, 0) - most(-kept, 0);
    s->rows[r] += q;
    s->tokens[at] += q;
    retime(s, r);
}

/* Let ranks `more` and `less` of a node compute q tokens of an expert more and less (-1: no rank),
 * under the local cut of ds_llep/cut.py: a rank computes its own tokens first, then its node's. */
static void book(Search *s, i64 e, int32_t node, i64 more, i64 less, i64 q) {
    i64 at = e * s->P, wanted = 0, left = 0, new_wanted, new_left;
    const i64 *own = s->own + at;
    i64 *tokens = s->tokens + at;
    const int32_t *begin = s->member + s->first[node], *end = s->member + s->first[node + 1];
    for (const int32_t *r = begin; r < end; r++) {
        wanted += most(tokens[*r] - own[*r], 0);
        left += most(own[*r] - tokens[*r], 0);
    }
    new_wanted = wanted, new_left = left;
    for (int i = 0; i < 2; i++) {
        i64 r = i ? less : more, change = i ? -q : q;
        if (r < 0) continue;
        i64 kept = own[r] - tokens[r];
        new_wanted += most(change - kept, 0) - most(-kept, 0);
        new_left += most(kept - change, 0) - most(kept, 0);
        s->on_node[at + node] += change;
    }
    for (const int32_t *p = begin; p < end; p++) {
        i64 r = *p, change = r == more ? q : r == less ? -q : 0, kept = own[r] - tokens[r];
        i64 sent = most(kept, 0), received = most(-kept, 0);
        i64 new_sent = most(kept - change, 0), new_received = most(change - kept, 0);
        i64 near = least(sent, wanted), new_near = least(new_sent, new_wanted);
        wanted -= near, new_wanted -= new_near;
        i64 out = new_near - near, out_between = new_sent - sent - out;
        near = least(received, left), new_near = least(new_received, new_left);
        left -= near, new_left -= new_near;
        i64 in = new_near - near, in_between = new_received - received - in;
        if (!(change | out | out_between | in | in_between)) continue;
        s->out[INSIDE][r] += out, s->out[BETWEEN][r] += out_between;
        s->in[INSIDE][r] += in, s->in[BETWEEN][r] += in_between;
        s->rows[r] += change;
        tokens[r] += change;
        retime(s, r);
    }
}

/* Let rank `b` compute q tokens of an expert that rank `a` did. */
static void shift(Search *s, i64 e, i64 a, i64 b, i64 q) {
    s->shifts--;
    i64 home = s->home[e], at = e * s->P;
    if (s->nodes == 1) {
        book_rank(s, e, a, -q);
        book_rank(s, e, b, q);
    } else if (s->node[a] == s->node[b]) {
        book(s, e, s->node[a], b, a, q);
    } else {
        book(s, e, s->node[a], -1, a, q);
        book(s, e, s->node[b], b, -1, q);
    }
    if (b != home && !s->takes[at + b]) {
        int k = kind(s, home, b);
        s->takes[at + b] = 1, s->lent[k][home]++, s->borrowed[k][b]++;
        if (!s->helpers[e]++) s->shared[s->num_shared++] = e;
        retime(s, home), retime(s, b);
    }
    if (a != home && !s->tokens[at + a]) {
        int k = kind(s, home, a);
        s->takes[at + a] = 0, s->lent[k][home]--, s->borrowed[k][a]--;
        if (!--s->helpers[e]) {
            i64 i = 0;
            while (s->shared[i] != e) i++;
            s->shared[i] = s->shared[--s->num_shared];
        }
        retime(s, home), retime(s, a);
    }
}

/* Shift if that leaves both ranks under the time that the first one had. */
static int shift_if_better(Search *s, i64 e, i64 a, i64 b, i64 q) {
    i64 before = s->time[a];
    shift(s, e, a, b, q);
    if (s->time[a] < before && s->time[b] < before && s->time[s->home[e]] < before) return 1;
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

/* What one expert more to lend, or to borrow, adds to a rank's time: only one of both counts. */
static i64 lending(const Search *s, i64 r, int k) {
    return s->lent[k][r] >= s->borrowed[k][r] ? s->costs.weights[k] : 0;
}

static i64 borrowing(const Search *s, i64 r, int k) {
    return s->borrowed[k][r] >= s->lent[k][r] ? s->costs.weights[k] : 0;
}

/* What is left up to `target` of rank h's time when it helps with another home's expert. */
static i64 left_for(const Search *s, i64 h, i64 target, int k) {
    return target - s->time[h] - s->costs.expert - borrowing(s, h, k);
}

/* Tokens of an expert, up to `cap`, that rank h can take in the time `left`: its own ones first,
 * which it then need not send, then those of its node, then others. */
static i64 room(const Search *s, i64 e, i64 h, i64 left, i64 cap) {
    i64 at = e * s->P, total = 0, row = s->costs.row;
    int k = kind(s, s->home[e], h);
    cap = least(cap, s->max_rows - s->rows[h]);
    i64 mine = most(s->own[at + h] - s->tokens[at + h], 0), near = NO_LIMIT;
    if (k == BETWEEN) {
        i64 n = at + s->node[h];
        near = most(s->of_node[n] - mine - s->on_node[n], 0);
    }
    i64 spared = least(mine, most(s->out[k][h] - s->in[k][h], 0));
    i64 idle = most(s->out[INSIDE][h] - s->in[INSIDE][h] - (k == INSIDE ? spared : 0), 0);
    i64 unheard = least(near, idle);
    i64 amounts[] = {spared, mine - spared, unheard, near - unheard, NO_LIMIT};
    i64 prices[] = {row - s->costs.copy[k], row, row, row + s->costs.copy[INSIDE],
                    row + s->costs.copy[BETWEEN]};
    for (int i = 0; i < 5 && (total < cap || left < 0); i++) {
        /* Whatever saves time is taken whole. */
        i64 amount = prices[i] > 0 ? least(amounts[i], most(cap - total, 0)) : amounts[i];
        i64 price = prices[i] * amount;
        if (prices[i] > 0 && left < price) return left > 0 ? total + left / prices[i] : 0;
        left -= price;
        total += amount;
    }
    return least(total, cap);
}

/* Whether rank g gets faster by q tokens of an expert less, which a rank of this kind takes. An
 * estimate: tokens of g's own are then sent, and may take longer than to compute them. */
static int relieves(const Search *s, i64 e, i64 g, int k, i64 q) {
    i64 at = e * s->P + g, kept = s->own[at] - s->tokens[at];
    i64 sent = most(kept + q, 0) - most(kept, 0), idle = most(s->in[k][g] - s->out[k][g], 0);
    return s->costs.copy[k] * most(sent - idle, 0) < s->costs.row * q;
}

/* The ranks but g whose time is below `target`, the fastest first; how many. */
static i64 find_under(Search *s, i64 g, i64 target) {
    i64 count = 0;
    for (i64 r = 0; r < s->P; r++) {
        if (r == g || s->time[r] >= target) continue;
        i64 i = count++;
        for (; i > 0 && s->time[s->under[i - 1]] > s->time[r]; i--) s->under[i] = s->under[i - 1];
        s->under[i] = r;
    }
    return count;
}

/* Relieve rank g along an expert that it shares with other ranks already. */
static int relieve_shared(Search *s, i64 g, i64 target) {
    i64 count = s->num_shared ? find_under(s, g, target) : 0;
    if (!count) return 0;
    i64 want[] = {needed(s, g, target, 0, INSIDE), needed(s, g, target, 0, BETWEEN)};
    for (i64 i = 0; i < s->num_shared; i++) {
        i64 e = s->shared[i], home = s->home[e], at = e * s->P;
        i64 has = s->tokens[at + g] - (g == home ? 0 : s->min_tokens);
        if (has <= 0 || (g != home && !s->takes[at + g])) continue;
        for (i64 j = 0; j < count; j++) {
            i64 b = s->under[j];
            if (b != home && !s->takes[at + b]) continue;
            i64 q = room(s, e, b, target - s->time[b], least(want[kind(s, g, b)], has));
            if (q > 0 && relieves(s, e, g, kind(s, g, b), q) && shift_if_better(s, e, g, b, q))
                return 1;
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

/* The experts that rank g may lend, its own first; how many. With several nodes, a helper lends on:
 * one that has taken a node's tokens shares them there. */
static i64 find_experts(Search *s, i64 g) {
    i64 count = 0;
    for (i64 e = g * s->M; e < (g + 1) * s->M; e++) s->computed[count++] = e;
    if (s->nodes > 1 && num_foreign(s, g))
        for (i64 i = 0; i < s->num_shared; i++)
            if (s->takes[s->shared[i] * s->P + g]) s->computed[count++] = s->shared[i];
    return count;
}

/* Relieve rank g by lending one of its experts to a rank that has none of it. The helper is
 * filled up to `target` or, to `overfill` it, as far as g is: a rank that borrows can lend as many
 * experts at no price, so it may hand on what is too much for it. */
static int relieve_lending(Search *s, i64 g, i64 target, int overfill) {
    i64 high = overfill ? s->time[g] : target;
    Candidate best[TRIES];
    int found = 0;
    i64 count = find_experts(s, g);
    for (int k = 0; k < KINDS; k++) {
        i64 weights = lending(s, g, k), last = -1, relief = s->costs.row + s->costs.copy[k];
        i64 wants[] = {needed(s, g, target, weights, k), needed(s, g, target, 0, k)};
        for (int c = 0; c < CANDIDATES; c++) {
            i64 h = -1; /* the ranks of this kind by time */
            for (i64 r = 0; r < s->P; r++)
                if (r != g && kind(s, g, r) == k && s->time[r] * s->P + r > last &&
                    num_foreign(s, r) < s->max_foreign &&
                    (h < 0 || s->time[r] < s->time[h]))
                    h = r;
            if (h < 0 || s->time[h] >= high) break;
            last = s->time[h] * s->P + h;
            i64 lefts[] = {left_for(s, h, high, INSIDE), left_for(s, h, high, BETWEEN)};
            i64 left_most = most(lefts[INSIDE], lefts[BETWEEN]);
            if (left_most < 0 && s->costs.row > s->costs.copy[k]) continue;
            for (i64 i = 0; i < count; i++) {
                i64 e = s->computed[i], home = s->home[e], at = e * s->P;
                if (home == h) continue;
                i64 left = lefts[kind(s, home, h)], heavy = s->time[g] + (g == home ? weights : 0);
                i64 has = s->tokens[at + g] - (g == home ? 0 : s->min_tokens);
                i64 cap = least(wants[g != home], has);
                i64 rest = most(heavy - cap * relief, target);
                /* Few are worth a closer look: most would not be taken even if they fit. */
                if (found == TRIES && rest > best[TRIES - 1].left) continue;
                Candidate new = {rest, least(s->own[at + h], cap), s->time[h], e, h, cap};
                if (found == TRIES && !before(&new, &best[TRIES - 1])) continue;
                if (s->takes[at + h] || cap < s->min_tokens) continue;
                i64 q = room(s, e, h, left, cap);
                if (q < s->min_tokens) continue;
                if (q < cap) {
                    new.left = most(heavy - q * relief, target);
                    new.own = least(new.own, q), new.tokens = q;
                }
                int j = found < TRIES ? found++ : TRIES;
                for (; j > 0 && before(&new, &best[j - 1]); j--)
                    if (j < TRIES) best[j] = best[j - 1];
                if (j < TRIES) best[j] = new;
            }
        }
    }
    for (int i = 0; i < found; i++)
        if (shift_if_better(s, best[i].expert, g, best[i].helper, best[i].tokens)) return 1;
    return 0;
}

/* By how much ranks are slower than `target`, together. */
static i64 excess(const Search *s, i64 target) {
    i64 sum = 0;
    for (i64 r = 0; r < s->P; r++) sum += most(s->time[r] - target, 0);
    return sum;
}

/* The expert at home on rank h of which most tokens, and enough, leave the node of rank r; or -1. */
static i64 find_return(const Search *s, i64 h, i64 r, i64 *tokens) {
    i64 found = -1;
    *tokens = s->min_tokens - 1;
    for (i64 e = h * s->M; e < (h + 1) * s->M; e++) {
        i64 n = e * s->P + s->node[r], q = s->of_node[n] - s->on_node[n];
        q = least(q, s->tokens[e * s->P + h]);
        if (q > *tokens && !s->takes[e * s->P + r]) *tokens = q, found = e;
    }
    return found;
}

/* Let rank h take tokens of an expert from its home, and if need be let home borrow one of rank h's
 * in return, which costs no more weights: if the ranks together are then slower than `target` by
 * less than `above`. */
static int borrow_if_better(Search *s, i64 e, i64 h, i64 q, i64 target, i64 above) {
    i64 home = s->home[e], q_back;
    shift(s, e, home, h, q);
    if (excess(s, target) < above) return 1;
    i64 back = num_foreign(s, home) < s->max_foreign ? find_return(s, h, home, &q_back) : -1;
    if (back >= 0 && s->rows[home] + q_back <= s->max_rows) {
        shift(s, back, h, home, q_back);
        if (excess(s, target) < above) return 1;
        shift(s, back, home, h, q_back);
    }
    shift(s, e, h, home, q);
    return 0;
}

/* Relieve rank g of what it sends to other nodes: let its node borrow an expert that its tokens
 * choose. The node's others get faster by that too, the one that borrows and home slower, so what
 * counts is by how much all ranks together are slower than `target`. */
static int relieve_sending(Search *s, i64 g, i64 target) {
    if (s->nodes == 1 || s->out[BETWEEN][g] <= s->in[BETWEEN][g]) return 0;
    int32_t node = s->node[g];
    i64 spared = s->costs.copy[BETWEEN] - s->costs.copy[INSIDE];
    Candidate best[EXPERTS]; /* `own`: what home gets slower */
    int found = 0;
    for (i64 e = 0; e < s->E; e++) {
        i64 at = e * s->P, home = s->home[e], mine = s->own[at + g] - s->tokens[at + g];
        if (mine <= 0 || s->node[home] == node) continue;
        if (found == EXPERTS && -mine * spared >= best[EXPERTS - 1].left) continue;
        i64 left = least(s->of_node[at + node] - s->on_node[at + node], s->tokens[at + home]);
        if (left < s->min_tokens) continue;
        i64 busy = most(s->in[BETWEEN][home] - s->out[BETWEEN][home], 0);
        i64 relief = s->costs.row * left + s->costs.copy[BETWEEN] * least(busy, left);
        i64 over = s->time[home] - target;
        i64 later = most(over + lending(s, home, BETWEEN) - relief, 0) - most(over, 0);
        Candidate new = {later - spared * least(mine, left), later, 0, e, -1, left};
        if (found == EXPERTS && !before(&new, &best[EXPERTS - 1])) continue;
        int j = found < EXPERTS ? found++ : EXPERTS - 1;
        for (; j > 0 && before(&new, &best[j - 1]); j--) best[j] = best[j - 1];
        best[j] = new;
    }
    /* By less than a tenth of a transfer, too many would be made. */
    i64 above = excess(s, target) - (s->costs.expert + s->costs.weights[BETWEEN]) / 10;
    for (int i = 0; i < found; i++) {
        i64 e = best[i].expert, at = e * s->P, left = best[i].tokens, h = -1, lowest = NO_LIMIT;
        for (int32_t j = s->first[node]; j < s->first[node + 1]; j++) {
            i64 r = s->member[j], time = s->time[r];
            if (s->rows[r] + left > s->max_rows) continue;
            if (!s->takes[at + r]) {
                if (num_foreign(s, r) >= s->max_foreign) continue;
                time += s->costs.expert + borrowing(s, r, BETWEEN) + best[i].own;
            }
            time -= s->costs.copy[INSIDE] * most(s->own[at + r] - s->tokens[at + r], 0);
            if (time < lowest) lowest = time, h = r;
        }
        if (h >= 0 && borrow_if_better(s, e, h, left, target, above)) return 1;
    }
    return 0;
}

static i64 slowest(const Search *s) {
    i64 g = 0;
    for (i64 r = 1; r < s->P; r++)
        if (s->time[r] > s->time[g]) g = r;
    return g;
}

/* Whether a rank that helps has more rows than that allows. */
static int too_many(const Search *s, i64 r) {
    return num_foreign(s, r) && s->rows[r] > s->max_rows;
}

/* Take back every transfer without which no rank gets slower than `time`. */
static void take_back(Search *s, i64 time) {
    for (i64 i = s->num_shared - 1; i >= 0; i--) {
        i64 e = s->shared[i], home = e / s->M;
        for (i64 h = 0; h < s->P; h++)
            if (s->takes[e * s->P + h]) {
                i64 q = s->tokens[e * s->P + h];
                shift(s, e, h, home, q);
                if (s->time[slowest(s)] > time || too_many(s, home))
                    shift(s, e, home, h, q);
            }
    }
}

static void save(const Search *s, Saved *saved) {
    saved->count = 0;
    for (i64 i = 0; i < s->num_shared; i++)
        for (i64 h = 0, at = s->shared[i] * s->P; h < s->P; h++)
            if (s->takes[at + h])
                saved->spills[saved->count++] = (Spill){s->shared[i], h, s->tokens[at + h]};
    memcpy(saved->ranks, s->ranks, RANKS * s->P * sizeof(i64));
}

/* Compute q more tokens of an expert on rank r and its node; the ranks' times are not touched. */
static void put(Search *s, i64 e, i64 r, i64 q) {
    s->tokens[e * s->P + r] += q;
    s->on_node[e * s->P + s->node[r]] += q;
}

/* Go to a plan that was written down. */
static void restore(Search *s, const Saved *saved) {
    s->shifts -= saved->count / 8; /* a shift takes as long as to restore so many transfers */
    for (i64 i = 0; i < s->num_shared; i++) {
        i64 e = s->shared[i], at = e * s->P;
        for (i64 h = 0; s->helpers[e]; h++) {
            if (!s->takes[at + h]) continue;
            i64 q = s->tokens[at + h];
            put(s, e, h, -q), put(s, e, s->home[e], q);
            s->takes[at + h] = 0, s->helpers[e]--;
        }
    }
    s->num_shared = 0;
    for (i64 i = 0; i < saved->count; i++) {
        Spill *spill = saved->spills + i;
        i64 e = spill->expert;
        put(s, e, s->home[e], -spill->tokens), put(s, e, spill->helper, spill->tokens);
        s->takes[e * s->P + spill->helper] = 1;
        if (!s->helpers[e]++) s->shared[s->num_shared++] = e;
    }
    memcpy(s->ranks, saved->ranks, RANKS * s->P * sizeof(i64));
}

/* Let the fastest ranks of a node take tokens of an expert that are on it, as far as `target` allows
 * and as long as the copies between nodes that this spares are worth the transfer: the mean of
 * what it adds to both ends. */
static void replicate_on(Search *s, i64 e, int32_t node, i64 target) {
    i64 home = s->home[e], at = e * s->P, left = s->of_node[at + node];
    i64 spared = s->costs.copy[BETWEEN] - s->costs.copy[INSIDE];
    while (left >= s->min_tokens) {
        i64 h = -1, added = lending(s, home, BETWEEN);
        if (left * spared < s->costs.expert + added / 2) break;
        for (int32_t i = s->first[node]; i < s->first[node + 1]; i++) {
            i64 r = s->member[i];
            if (!s->takes[at + r] && num_foreign(s, r) < s->max_foreign &&
                (h < 0 || s->time[r] + borrowing(s, r, BETWEEN) <
                              s->time[h] + borrowing(s, h, BETWEEN)))
                h = r;
        }
        if (h < 0) break;
        i64 q = least(left, s->tokens[at + home]);
        q = room(s, e, h, left_for(s, h, target, BETWEEN), q);
        added += borrowing(s, h, BETWEEN);
        if (q < s->min_tokens || q * spared < s->costs.expert + added / 2) break;
        shift(s, e, home, h, q);
        left -= q;
    }
}

/* Let ranks take tokens that are on them, or on their nodes, where the copies that this spares are
 * worth the transfer; the largest experts first. */
static void replicate(Search *s, i64 target) {
    i64 copy = most(s->costs.copy[INSIDE], s->costs.copy[BETWEEN]);
    i64 full = s->costs.expert + least(s->costs.weights[INSIDE], s->costs.weights[BETWEEN]);
    for (i64 i = 0; i < s->E; i++) {
        i64 e = s->by_load[i], home = s->home[e], at = e * s->P;
        if (!s->num_shared && s->load[e] * copy < full) break; /* the first adds to both ends */
        for (int32_t node = 0; node < s->nodes; node++)
            if (node != s->node[home]) replicate_on(s, e, node, target);
        int may_pay = 0;
        for (int k = 0; k < KINDS; k++) {
            i64 price = s->costs.expert + lending(s, home, k) / 2;
            may_pay |= s->most_own[e] * s->costs.copy[k] >= price;
        }
        for (i64 h = 0; may_pay && h < s->P; h++) {
            int k = kind(s, home, h);
            i64 q = least(s->own[at + h], s->tokens[at + home]), n = at + s->node[h];
            i64 price = s->costs.expert + (lending(s, home, k) + borrowing(s, h, k)) / 2;
            if (k == BETWEEN) q = least(q, s->of_node[n] - s->on_node[n]);
            if (q < s->min_tokens || q * s->costs.copy[k] < price) continue;
            if (h == home || s->takes[at + h] || num_foreign(s, h) >= s->max_foreign) continue;
            q = room(s, e, h, left_for(s, h, target, k), q);
            if (q >= s->min_tokens && q * s->costs.copy[k] >= price) shift(s, e, home, h, q);
        }
    }
}

/* Relieve the slowest rank until nothing does. overfill: helpers may be filled beyond the target.
 * sending: nodes may borrow what they send. */
static void search(Search *s, i64 target, i64 best, int overfill, int sending) {
    for (i64 step = 0; step < 3 * s->P && s->shifts > 0; step++) {
        i64 g = slowest(s), over = s->time[g] - target;
        if (over <= 0) break;
        if (relieve_shared(s, g, target)) continue;
        if (relieve_lending(s, g, target, overfill)) continue;
        if (sending && relieve_sending(s, g, target)) continue;
        if (over <= target / 200) break;
        target += over / 3;
        if (target >= best) break;
    }
}

static int descending(const void *a, const void *b) {
    i64 x = *(const i64 *)a, y = *(const i64 *)b;
    return (x < y) - (x > y);
}

static i64 rows_of(double factor, i64 mean) {
    double rows = factor * (double)mean;
    return rows < (double)NO_LIMIT ? (i64)rows : NO_LIMIT;
}

/* Planner "lla" (ds_llep/planners.py): Algorithms 2 and 3 of the paper, as the same integers.
 *
 * load, by_load: of the experts, and these by it. factor: `capacity_factor`. spills gets what leaves
 * home, and has room for E * P. effective and foreign are [P], to work in. Returns how many
 * spills. */
i64 plan_lla(i64 P, i64 E, const i64 *load, const i64 *by_load, i64 min_tokens, i64 max_foreign,
             double factor, Spill *spills, i64 *effective, i64 *foreign) {
    i64 M = E / P, total = 0, count = 0;
    memset(effective, 0, P * sizeof(i64)), memset(foreign, 0, P * sizeof(i64));
    for (i64 e = 0; e < E; e++) effective[e / M] += load[e], total += load[e];
    i64 mean = total / P;
    i64 capacity = most(1, mean ? rows_of(factor, mean) : total);
    for (i64 i = 0; i < E; i++) {
        i64 e = by_load[i], home = e / M, first = count;
        i64 rest = least(load[e], effective[home] - capacity);
        if (rest <= 0) continue;
        effective[home] -= rest;
        while (rest) {
            i64 h = -1, lowest = effective[0];
            for (i64 r = 0; r < P; r++) {
                lowest = least(lowest, effective[r]);
                if (r != home && foreign[r] < max_foreign && (h < 0 || effective[r] < effective[h]))
                    h = r;
            }
            if (h < 0) break;
            i64 space = capacity - effective[h], chunk = least(rest, space);
            if (space <= 0 && effective[h] > lowest) break;
            if (chunk < min_tokens) chunk = rest;
            effective[h] += chunk, rest -= chunk;
            i64 at = first;
            while (at < count && spills[at].helper != h) at++;
            if (at == count) spills[count++] = (Spill){e, h, 0};
            spills[at].tokens += chunk;
        }
        effective[home] += rest;
        for (i64 at = first; at < count; at++) foreign[spills[at].helper]++;
    }
    return count;
}

/* Number the nodes and list their ranks. */
static void find_nodes(Search *s, const i64 *nodes_P) {
    i64 P = s->P;
    for (i64 p = 0; p < P; p++) {
        i64 q = p ? p - 1 : 0; /* mostly the same */
        if (nodes_P[q] != nodes_P[p])
            for (q = 0; nodes_P[q] != nodes_P[p];) q++;
        s->node[p] = q < p ? s->node[q] : s->nodes++;
        s->first[s->node[p] + 2]++;
    }
    for (i64 n = 1; n < P; n++) s->first[n + 1] += s->first[n];
    for (i64 p = 0; p < P; p++) s->member[s->first[s->node[p] + 1]++] = p;
}

/* All at home. Returns the tokens of all. */
static i64 begin(Search *s, const i64 *counts_PE) {
    i64 P = s->P, E = s->E, M = s->M, total = 0;
    for (i64 e = 0; e < E; e++) s->home[e] = e / M;
    for (i64 p = 0; p < P; p++)
        for (i64 home = 0; home < P; home++) {
            i64 copies = 0;
            for (i64 e = home * M; e < (home + 1) * M; e++) {
                i64 n = counts_PE[p * E + e];
                s->own[e * P + p] = n;
                s->load[e] += n;
                s->most_own[e] = most(s->most_own[e], n);
                copies += n;
                if (s->nodes > 1) s->of_node[e * P + s->node[p]] += n;
            }
            s->rows[home] += copies;
            total += copies;
            if (p == home) continue;
            s->out[kind(s, p, home)][p] += copies;
            s->in[kind(s, p, home)][home] += copies;
        }
    /* Sorted as one number each: of equal loads the lower expert first. */
    for (i64 e = 0; e < E; e++) {
        put(s, e, s->home[e], s->load[e]);
        s->by_load[e] = s->load[e] * E + E - 1 - e;
    }
    qsort(s->by_load, E, sizeof(i64), descending);
    for (i64 e = 0; e < E; e++) s->by_load[e] = E - 1 - s->by_load[e] % E;
    return total;
}

/* Go from all at home to the plan of "lla", as far as it is within the limits. */
static void apply_lla(Search *s, double factor, Spill *spills, i64 *memory) {
    i64 *rows = memory, count = plan_lla(s->P, s->E, s->load, s->by_load, s->min_tokens,
                                         s->max_foreign, factor, spills, memory, memory + s->P);
    memcpy(rows, s->rows, s->P * sizeof(i64));
    for (i64 i = 0; i < count; i++) {
        if (spills[i].tokens < s->min_tokens) continue;
        rows[s->home[spills[i].expert]] -= spills[i].tokens;
        rows[spills[i].helper] += spills[i].tokens;
    }
    for (i64 i = 0; i < count; i++)
        if (spills[i].tokens >= s->min_tokens && rows[spills[i].helper] > s->max_rows) return;
    for (i64 i = 0; i < count; i++)
        if (spills[i].tokens >= s->min_tokens)
            shift(s, spills[i].expert, s->home[spills[i].expert], spills[i].helper,
                  spills[i].tokens);
}

/* Keep the plan if it is faster than `best`, which is then its time. */
static int keep(Search *s, Saved *found, i64 *best) {
    i64 time = s->time[slowest(s)];
    if (time >= *best) return 0;
    take_back(s, time);
    *best = s->time[slowest(s)], save(s, found);
    return 1;
}

/* Search from several starts for plans that are faster than `best`. Returns the best time. */
static i64 improve(Search *s, const Saved *at_home, Saved *found, i64 best, i64 mean, i64 bound) {
    /* Each target is nearer to the best time by a share of its distance from what no plan beats,
     * rows shared evenly. For each, several starts. */
    static const i64 shares[] = {0, 50, 25, 12, 6, 3};
    int worth_replicating = 1;
    for (int i = 0, in_vain = 0; i < 6 && in_vain < 3; i++, in_vain++) {
        i64 target = i ? best - (best - bound) * shares[i] / 100 : mean;
        for (int from = 0; from < STARTS && s->shifts > 0; from++) {
            if (from == REPLICATED && i > 0) continue; /* the same start again */
            if (from == BEST && !found->count && s->nodes == 1) continue;
            int last = s->nodes > 1 ? 2 : 1; /* later ones seldom gain by it */
            if (from == WITHIN_TARGET && (i > last || !worth_replicating)) continue;
            restore(s, from == BEST && found->count ? found : at_home);
            if (from == REPLICATED) replicate(s, NO_LIMIT), worth_replicating = s->num_shared > 0;
            if (from == WITHIN_TARGET) replicate(s, target);
            if ((from == REPLICATED || from == WITHIN_TARGET) && !s->num_shared) continue;
            /* Either with helpers filled beyond the target or without finds more at times. */
            int overfill = from == HOME && i % 2 == 0;
            search(s, target, best, overfill, from == BEST && i > 0);
            if (keep(s, found, &best)) in_vain = -1;
        }
    }
    return best;
}

/* Search from the best plan without one of its transfers, each in turn; on one node, where others
 * seldom gain, only those of the slowest rank. Returns the best time. */
static i64 reconsider(Search *s, Saved *found, i64 best, i64 bound) {
    restore(s, found);
    i64 g = slowest(s);
    for (i64 i = 0; i < found->count && s->shifts > 0; i++) {
        Spill spill = found->spills[i];
        i64 home = s->home[spill.expert];
        if (s->nodes == 1 && g != home && g != spill.helper) continue;
        restore(s, found);
        shift(s, spill.expert, spill.helper, home, spill.tokens);
        if (too_many(s, home)) continue;
        search(s, best - (best - bound) / 20, best, 1, 1);
        if (keep(s, found, &best)) g = slowest(s), i = -1;
    }
    return best;
}

/* The plan.
 *
 * nodes_P: any numbers. costs: row, expert, copy inside and between, weights inside and between.
 * limits: fewest tokens of a spill, most foreign experts of a rank, most tokens of all that the
 * prices allow for. factor: most rows of a rank that helps, relative to the mean; infinite: any
 * number. threshold: the load ratio below which nothing spills. tokens_EP gets the plan, times the
 * slowest rank's time without and with it.
 *
 * Returns the number of spills, or NO_MEMORY or TOO_MANY tokens. */
i64 plan_cost(i64 P, i64 E, const i64 *counts_PE, const i64 *nodes_P, const i64 *costs,
              const i64 *limits, double factor, double threshold, i64 *tokens_EP, i64 *times) {
    int limited = factor < INFINITY;
    Search s = {.P = P, .E = E, .M = E / P, .shifts = SHIFTS};
    s.costs = (Costs){costs[0], costs[1], {costs[2], costs[3]}, {costs[4], costs[5]}};
    s.min_tokens = most(limits[0], 1), s.max_foreign = limits[1];
    i64 *memory = calloc(4 * E * P + 3 * E + 3 * RANKS * P, sizeof(i64));
    int32_t *small = calloc(4 * E + 4 * P + 2 + (E * P + 3) / 4, sizeof(int32_t));
    Spill *spills = malloc(E * P * sizeof(Spill));
    if (!memory || !small || !spills) {
        free(memory), free(small), free(spills);
        return NO_MEMORY;
    }
    i64 *next = memory;
    s.own = next, next += E * P, s.of_node = next, next += E * P;
    s.tokens = next, next += E * P, s.on_node = next, next += E * P;
    s.load = next, next += E, s.by_load = next, next += E;
    s.most_own = next, next += E;
    Saved at_home = {.ranks = next}, found = {spills, 0, next + RANKS * P};
    next += 2 * RANKS * P;
    s.ranks = next, s.rows = next, next += P, s.time = next, next += P;
    for (int k = 0; k < KINDS; k++) {
        s.in[k] = next, next += P, s.out[k] = next, next += P;
        s.lent[k] = next, next += P, s.borrowed[k] = next, next += P;
    }
    s.helpers = small, s.shared = s.helpers + E, s.home = s.shared + E;
    s.computed = s.home + E;
    s.node = s.computed + E, s.member = s.node + P, s.under = s.member + P, s.first = s.under + P;
    s.takes = (uint8_t *)(s.first + P + 2);

    find_nodes(&s, nodes_P);
    i64 total = begin(&s, counts_PE), most_rows = 0, sum = 0, best = 0;
    memcpy(tokens_EP, s.tokens, E * P * sizeof(i64));
    if (total > limits[2]) {
        found.count = TOO_MANY;
    } else {
        for (i64 r = 0; r < P; r++) {
            retime(&s, r);
            most_rows = most(most_rows, s.rows[r]), sum += s.time[r] / P;
        }
        save(&s, &at_home);
        best = times[0] = s.time[slowest(&s)];
        /* Whole numbers as doubles, divided once: the load ratio of ds_llep/plan.py. */
        if (total && (double)(most_rows * P) / (double)total >= threshold) {
            s.max_rows = limited ? rows_of(factor, total / P) : NO_LIMIT;
            apply_lla(&s, limited ? factor : 1, spills, found.ranks);
            if (s.time[slowest(&s)] < best) best = s.time[slowest(&s)], save(&s, &found);
            best = improve(&s, &at_home, &found, best, sum, s.costs.row * total / P);
            if (found.count) best = reconsider(&s, &found, best, s.costs.row * total / P);
        }
        times[1] = best;
    }
    for (i64 i = 0; i < found.count; i++) {
        i64 at = spills[i].expert * P;
        tokens_EP[at + s.home[spills[i].expert]] -= spills[i].tokens;
        tokens_EP[at + spills[i].helper] = spills[i].tokens;
    }
    free(memory), free(small), free(spills);
    return found.count;
}
