/* What the planner "cost" keeps of a plan in the making: the tokens of each expert that each rank
 * computes, what follows from them for every rank's time (ds_llep/costs.py), exactly, and how that
 * changes where tokens are shifted from one rank to another. The search is in planner_cost.c.
 *
 * A rank computes its own tokens first, then its node's. Where the ranks of a node send more of an
 * expert's tokens than others there want, it is free whose stay, and where they want more, who gets
 * these: that is `near`, a part of the plan, chosen by the ranks' times.
 *
 * E experts, P ranks, M = E / P experts at home on a rank.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;

enum { INSIDE, BETWEEN, KINDS };
enum { RANKS = 2 + 4 * KINDS }; /* numbers that are kept for each rank */

typedef struct {
    i64 row, expert, copy[KINDS], weights[KINDS], spill;
} Costs;

typedef struct {
    i64 expert, helper, tokens;
} Spill;

typedef struct {
    i64 P, E, M, nodes, min_tokens, max_foreign, max_rows, shifts;
    int keep_own; /* a rank lends no tokens that are its own */
    Costs costs;
    /* Ranks are numbered by node here. */
    int32_t *number, *rank; /* [P] of each rank, and which rank that is */
    int32_t *node;          /* [P] from 0 on, without gaps */
    int32_t *first;         /* [P + 2] rank of each node; the last is for counting */
    int32_t *home;          /* [E] */
    i64 *own;               /* [E, P] tokens of each expert on each source rank */
    i64 *of_node;           /* [E, P] the same by node, where there are several */
    i64 *load;              /* [E] */
    i64 *by_load;           /* [E] the experts, the largest first */
    i64 *most_own;          /* [E] the most tokens on one rank */
    /* What changes: tokens of each expert that each rank and node computes, and the ranks' times. */
    i64 *tokens, *on_node; /* [E, P]; by node where there are several */
    i64 *near;             /* [E, P] where there are several: of what a rank sends or gets, */
    i64 *near_home;        /* what stays in its node; and the same with all at home */
    uint8_t *takes;        /* [E, P] a helper has been opened */
    int32_t *helpers;      /* [E] how many */
    int32_t *shared;       /* the experts that have helpers */
    i64 num_shared;
    i64 *ranks; /* all of the following, RANKS * P */
    i64 *rows, *time, *in[KINDS], *out[KINDS], *lent[KINDS], *borrowed[KINDS]; /* [P] each */
    /* To work in. */
    int32_t *under;    /* [P] the ranks below a target */
    int32_t *computed; /* [E] the experts of a rank */
    i64 *remembered;   /* [2, P] */
} Search;

/* A plan that was written down. */
typedef struct {
    Spill *spills;
    i64 count;
    i64 *ranks;
    i64 *near; /* [E, P]: what is there of experts with spills counts */
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

/* Of what rank r sends or gets of an expert, let q tokens more stay in its node. */
static void keep_near(Search *s, i64 e, i64 r, i64 q) {
    i64 at = e * s->P + r, **moved = s->own[at] > s->tokens[at] ? s->out : s->in;
    moved[INSIDE][r] += q, moved[BETWEEN][r] -= q;
    s->near[at] += q;
    retime(s, r);
}

/* Let rank r compute q more tokens of an expert, where there are several nodes. Of what it then
 * sends or gets, at most as much as before stays in its node. */
static void book_rank_of_node(Search *s, i64 e, i64 r, i64 q) {
    i64 at = e * s->P + r, kept = s->own[at] - s->tokens[at], left = kept - q;
    i64 moved = most(kept, -kept), moves = most(left, -left);
    i64 near = s->near[at], stays = (kept > 0) == (left > 0) ? least(near, moves) : 0;
    i64 **before = kept > 0 ? s->out : s->in, **after = left > 0 ? s->out : s->in;
    before[INSIDE][r] -= near, before[BETWEEN][r] -= moved - near;
    after[INSIDE][r] += stays, after[BETWEEN][r] += moves - stays;
    s->near[at] = stays;
    s->rows[r] += q;
    s->tokens[at] += q;
    s->on_node[e * s->P + s->node[r]] += q;
    retime(s, r);
}

/* Let as many of an expert's tokens stay in a node as can. Where not all do, let as few change as
 * can, so that the slowest ranks' stay; in_order: those of the first ranks. */
static void settle(Search *s, i64 e, int32_t node, int in_order) {
    i64 at = e * s->P, end = s->first[node + 1], sent = 0, wanted = 0, near[] = {0, 0};
    const i64 *own = s->own + at, *tokens = s->tokens + at;
    for (i64 r = s->first[node]; r < end && in_order; r++) keep_near(s, e, r, -s->near[at + r]);
    for (i64 r = s->first[node]; r < end; r++) {
        i64 kept = own[r] - tokens[r], stays = s->near[at + r];
        sent += most(kept, 0), wanted += most(-kept, 0);
        near[0] += kept > 0 ? stays : 0, near[1] += kept > 0 ? 0 : stays;
    }
    for (int getting = 0; getting < 2; getting++) {
        i64 more = least(sent, wanted) - near[getting];
        while (more) {
            i64 found = -1, found_free = 0;
            for (i64 r = s->first[node]; r < end; r++) {
                i64 amount = getting ? tokens[r] - own[r] : own[r] - tokens[r];
                i64 free = more > 0 ? amount - s->near[at + r] : s->near[at + r];
                if (amount <= 0 || !free) continue;
                int better = found < 0;
                if (!better && !in_order) better = (more > 0) == (s->time[r] > s->time[found]);
                if (better) found = r, found_free = free;
            }
            i64 q = more > 0 ? least(found_free, more) : -least(found_free, -more);
            keep_near(s, e, found, q), more -= q;
        }
    }
}

/* Let rank `b` compute q tokens of an expert that rank `a` did; what stays in nodes is open. */
static void move(Search *s, i64 e, i64 a, i64 b, i64 q) {
    i64 home = s->home[e], at = e * s->P;
    void (*book_one)(Search *, i64, i64, i64) = s->nodes > 1 ? book_rank_of_node : book_rank;
    book_one(s, e, a, -q);
    book_one(s, e, b, q);
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

/* Let rank `b` compute q tokens of an expert that rank `a` did. */
static void shift(Search *s, i64 e, i64 a, i64 b, i64 q) {
    s->shifts--;
    move(s, e, a, b, q);
    if (s->nodes == 1) return;
    settle(s, e, s->node[a], 0);
    if (s->node[a] != s->node[b]) settle(s, e, s->node[b], 0);
}

/* Write down what a shift of an expert may change beside its tokens. */
static void remember(const Search *s, i64 e, i64 *near) {
    if (s->nodes > 1) memcpy(near, s->near + e * s->P, s->P * sizeof(i64));
}

/* Take a shift from rank `a` to rank `b` back. */
static void unshift(Search *s, i64 e, i64 a, i64 b, i64 q, const i64 *near) {
    s->shifts--;
    move(s, e, b, a, q);
    for (int i = 0; i < 2 && s->nodes > 1; i++) {
        int32_t node = s->node[i ? b : a];
        for (i64 r = s->first[node]; r < s->first[node + 1]; r++) {
            i64 more = near[r] - s->near[e * s->P + r];
            if (more) keep_near(s, e, r, more);
        }
    }
}

static i64 slowest(const Search *s) {
    i64 g = 0;
    for (i64 r = 1; r < s->P; r++)
        if (s->time[r] > s->time[g]) g = r;
    return g;
}

static void save(const Search *s, Saved *saved) {
    saved->count = 0;
    for (i64 i = 0; i < s->num_shared; i++) {
        i64 at = s->shared[i] * s->P;
        for (i64 h = 0; h < s->P; h++)
            if (s->takes[at + h])
                saved->spills[saved->count++] = (Spill){s->shared[i], h, s->tokens[at + h]};
        if (s->nodes > 1) memcpy(saved->near + at, s->near + at, s->P * sizeof(i64));
    }
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
        if (s->nodes > 1) memcpy(s->near + at, s->near_home + at, s->P * sizeof(i64));
    }
    s->num_shared = 0;
    for (i64 i = 0; i < saved->count; i++) {
        Spill *spill = saved->spills + i;
        i64 e = spill->expert;
        put(s, e, s->home[e], -spill->tokens), put(s, e, spill->helper, spill->tokens);
        s->takes[e * s->P + spill->helper] = 1;
        if (s->helpers[e]++) continue;
        s->shared[s->num_shared++] = e;
        if (s->nodes > 1) memcpy(s->near + e * s->P, saved->near + e * s->P, s->P * sizeof(i64));
    }
    memcpy(s->ranks, saved->ranks, RANKS * s->P * sizeof(i64));
}

static int descending(const void *a, const void *b) {
    i64 x = *(const i64 *)a, y = *(const i64 *)b;
    return (x < y) - (x > y);
}

/* Number the nodes, and the ranks by node. */
static void find_nodes(Search *s, const i64 *nodes_P) {
    i64 P = s->P;
    int32_t *node = s->under; /* of each rank */
    for (i64 p = 0; p < P; p++) {
        i64 q = p ? p - 1 : 0; /* mostly the same */
        if (nodes_P[q] != nodes_P[p])
            for (q = 0; nodes_P[q] != nodes_P[p];) q++;
        node[p] = q < p ? node[q] : s->nodes++;
        s->first[node[p] + 2]++;
    }
    for (i64 n = 1; n < P; n++) s->first[n + 1] += s->first[n];
    for (i64 p = 0; p < P; p++) {
        i64 number = s->first[node[p] + 1]++;
        s->number[p] = number, s->rank[number] = p, s->node[number] = node[p];
    }
}

/* All at home. Returns the tokens of all. */
static i64 begin(Search *s, const i64 *counts_PE) {
    i64 P = s->P, E = s->E, M = s->M, total = 0;
    for (i64 e = 0; e < E; e++) s->home[e] = s->number[e / M];
    for (i64 p = 0; p < P; p++)
        for (i64 home = 0; home < P; home++) {
            i64 copies = 0, first = s->rank[home] * M;
            for (i64 e = first; e < first + M; e++) {
                i64 n = counts_PE[s->rank[p] * E + e];
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
    for (i64 e = 0; e < E && s->nodes > 1; e++) {
        i64 home = s->home[e], node = s->node[home], at = e * P;
        for (i64 r = s->first[node]; r < s->first[node + 1]; r++)
            s->near_home[at + r] = s->own[at + r];
        s->near_home[at + home] = s->of_node[at + node] - s->own[at + home];
        memcpy(s->near + at, s->near_home + at, P * sizeof(i64));
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

