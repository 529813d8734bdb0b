/* The plan by cost: a local search for the assignment whose slowest rank is the fastest.
 *
 * A rank's time is a sum of prices (ds_llep/costs.py), kept exactly for every rank while tokens are
 * shifted from one rank to another (planner_state.h). The search keeps relieving the slowest rank:
 * first by letting another rank's tokens leave their node in place of its own, then along experts
 * that are shared already, neither of which costs a transfer, then by lending another of its
 * experts, then by letting nodes borrow experts that their tokens choose on other nodes. A shift
 * aims at a target time, on both ends, so that most ranks are settled by one. Where nobody can
 * relieve the slowest rank within the target, the target is raised, a third of the way. What is
 * found depends on the first target, so several are tried, each nearer to the best time found so
 * far. Then each transfer of the best plan's slowest rank is tried without, and at last, with several
 * nodes, some starts from home in other ways.
 *
 * Integers, and two IEEE doubles as in Python: every rank finds the same plan. No recursion, memory
 * of a few [E, P] arrays. Every layer waits for it, so what is known is kept: a plan that is gone
 * back to brings the times of its ranks along.
 */

#include <math.h>

#include "planner_state.h"

/* Helpers of each kind to choose from, shifts to try, experts to borrow to choose from. */
enum { CANDIDATES = 2, TRIES = 3, EXPERTS = 2 };
enum { NO_MEMORY = -1, TOO_MANY = -2 };
enum { SHIFTS = 2000, SHIFTS_OF_NODES = 1100 }; /* of a whole search: half a millisecond or more */

/* Where a search starts: all at home; experts replicated where that spares more than the transfer,
 * or so and within the target; the best plan so far. */
enum { HOME, REPLICATED, WITHIN_TARGET, BEST, STARTS };

enum loans { NONE, LAST, FIRST };

static const i64 NO_LIMIT = (i64)1 << 60;

/* Shift if that leaves both ranks under the time that the first one had. */
static int shift_if_better(Search *s, i64 e, i64 a, i64 b, i64 q) {
    i64 before = s->time[a], *near = s->remembered;
    remember(s, e, near);
    shift(s, e, a, b, q);
    if (s->time[a] < before && s->time[b] < before && s->time[s->home[e]] < before) return 1;
    unshift(s, e, a, b, q, near);
    return 0;
}

/* Relieve rank g of what it sends to other nodes, or gets from them, whichever is more: of an
 * expert that is shared, another rank of its node does so instead. */
static int relieve_carrying(Search *s, i64 g, i64 target) {
    i64 spared = s->costs.copy[BETWEEN] - s->costs.copy[INSIDE], before = s->time[g];
    i64 ahead = s->in[BETWEEN][g] - s->out[BETWEEN][g], sign = ahead > 0 ? -1 : 1;
    if (s->nodes == 1 || spared <= 0 || !ahead) return 0;
    i64 want = (before - target + spared - 1) / spared, end = s->first[s->node[g] + 1];
    for (i64 i = 0; i < s->num_shared; i++) {
        i64 e = s->shared[i], at = e * s->P, moved = sign * (s->own[at + g] - s->tokens[at + g]);
        if (moved <= s->near[at + g]) continue;
        for (i64 r = s->first[s->node[g]]; r < end; r++) {
            if (r == g || sign * (s->own[at + r] - s->tokens[at + r]) <= 0) continue;
            i64 idle = most(sign * (s->in[BETWEEN][r] - s->out[BETWEEN][r]), 0);
            i64 q = least(least(moved - s->near[at + g], want), s->near[at + r]);
            q = least(q, idle + most(target - s->time[r], 0) / spared);
            if (q <= 0) continue;
            s->shifts--;
            keep_near(s, e, g, q), keep_near(s, e, r, -q);
            if (s->time[g] < before && s->time[r] < before) return 1;
            keep_near(s, e, g, -q), keep_near(s, e, r, q);
        }
    }
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

/* Whether rank g gets faster by q tokens of an expert less, which a rank of this kind takes, though
 * that costs it `extra`. An estimate: tokens of g's own are then sent, and may take longer than to
 * compute them. */
static int relieves(const Search *s, i64 e, i64 g, int k, i64 q, i64 extra) {
    i64 at = e * s->P + g, kept = s->own[at] - s->tokens[at], copy = s->costs.copy[k];
    i64 sent = most(kept + q, 0) - most(kept, 0), idle = most(s->in[k][g] - s->out[k][g], 0);
    i64 received = least(q, most(-kept, 0));
    return copy * most(sent - idle, 0) + extra < s->costs.row * q + copy * least(received, idle);
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
            if (q > 0 && relieves(s, e, g, kind(s, g, b), q, 0) && shift_if_better(s, e, g, b, q))
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
    for (i64 e = s->rank[g] * s->M, end = e + s->M; e < end; e++) s->computed[count++] = e;
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
                int of_home = kind(s, home, h);
                if (home == h) continue;
                if (home != g && s->time[home] + lending(s, home, of_home) >= s->time[g]) continue;
                i64 left = lefts[of_home], heavy = s->time[g] + (g == home ? weights : 0);
                i64 has = s->tokens[at + g] - (g == home ? 0 : s->min_tokens);
                i64 cap = least(wants[g != home], has);
                if (s->keep_own) cap = least(cap, most(s->tokens[at + g] - s->own[at + g], 0));
                i64 rest = most(heavy - cap * relief, target);
                /* Few are worth a closer look: most would not be taken even if they fit. */
                if (found == TRIES && rest > best[TRIES - 1].left) continue;
                Candidate new = {rest, least(s->own[at + h], cap), s->time[h], e, h, cap};
                if (found == TRIES && !before(&new, &best[TRIES - 1])) continue;
                if (s->takes[at + h] || cap < s->min_tokens) continue;
                i64 q = room(s, e, h, left, cap);
                if (q < s->min_tokens) continue;
                if (!relieves(s, e, g, k, q, home == g ? weights : 0)) continue;
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
    for (i64 e = s->rank[h] * s->M, end = e + s->M; e < end; e++) {
        i64 n = e * s->P + s->node[r], q = s->of_node[n] - s->on_node[n];
        q = least(q, s->tokens[e * s->P + h]);
        if (q > *tokens && !s->takes[e * s->P + r]) *tokens = q, found = e;
    }
    return found;
}

/* Let rank h take tokens of an expert from another node's rank, and if need be let the expert's
 * home borrow one of rank h's in return, which costs no more weights: if the ranks together are
 * then slower than `target` by less than `above`. */
static int borrow_if_better(Search *s, i64 e, i64 from, i64 h, i64 q, i64 target, i64 above) {
    i64 home = s->home[e], q_back, *near = s->remembered, *near_back = near + s->P;
    remember(s, e, near);
    shift(s, e, from, h, q);
    if (excess(s, target) < above) return 1;
    int may_borrow = s->node[home] != s->node[h] && num_foreign(s, home) < s->max_foreign;
    i64 back = may_borrow ? find_return(s, h, home, &q_back) : -1;
    if (back >= 0 && s->rows[home] + q_back <= s->max_rows) {
        remember(s, back, near_back);
        shift(s, back, h, home, q_back);
        if (excess(s, target) < above) return 1;
        unshift(s, back, h, home, q_back, near_back);
    }
    unshift(s, e, from, h, q, near);
    return 0;
}

/* The rank of another node that computes an expert's tokens of this node: its home, or, where that
 * is on the node itself, the helper that computes the most; or -1. */
static i64 find_source(const Search *s, i64 e, int32_t node) {
    i64 at = e * s->P, found = -1;
    if (s->node[s->home[e]] != node) return s->home[e];
    if (!s->helpers[e]) return -1;
    for (i64 r = 0; r < s->P; r++)
        if (s->node[r] != node && s->tokens[at + r] > (found < 0 ? 0 : s->tokens[at + found]))
            found = r;
    return found;
}

typedef struct {
    i64 expert, from, node, tokens;
    i64 later, change; /* by how much `from`, and all ranks together, then get slower: an estimate */
} Loan;

/* What a node may compute by itself of the tokens of an expert that it sends to rank `from` of
 * another node: none if they are too few. */
static Loan find_loan(const Search *s, i64 e, i64 from, i64 node, i64 target) {
    i64 at = e * s->P, home = s->home[e], q = s->of_node[at + node] - s->on_node[at + node];
    if (q <= 0) return (Loan){0};
    i64 stays = s->tokens[at + from] - q; /* a helper keeps no fewer than it may help with */
    if (from != home && stays > 0) q -= most(s->min_tokens - stays, 0);
    q = least(q, s->tokens[at + from]);
    if (q < s->min_tokens) return (Loan){0};
    i64 busy = most(s->in[BETWEEN][from] - s->out[BETWEEN][from], 0);
    i64 relief = s->costs.row * q + s->costs.copy[BETWEEN] * least(busy, q);
    i64 over = s->time[from] - target, lent = from == home ? lending(s, home, BETWEEN) : 0;
    i64 later = most(over + lent - relief, 0) - most(over, 0);
    return (Loan){e, from, node, q, later, later};
}

/* Keep the best loans, the best one first. Returns how many there are. */
static int keep_loan(Loan *best, int found, Loan loan) {
    int j = found;
    while (j > 0 && loan.change < best[j - 1].change) j--;
    if (j == EXPERTS) return found;
    if (found < EXPERTS) found++;
    for (int i = found - 1; i > j; i--) best[i] = best[i - 1];
    best[j] = loan;
    return found;
}

/* Relieve rank g of what it sends to other nodes, or gets from them, whichever is more: let its
 * node, or the other one, compute tokens that it would send. Others of that node get faster by this
 * too, the one that computes and home slower, so what counts is by how much all ranks together are
 * slower than `target`. */
static int relieve_between(Search *s, i64 g, i64 target) {
    i64 ahead = s->out[BETWEEN][g] - s->in[BETWEEN][g];
    if (s->nodes == 1 || !ahead) return 0;
    i64 spared = s->costs.copy[BETWEEN] - s->costs.copy[INSIDE];
    Loan best[EXPERTS];
    int found = 0;
    for (i64 e = 0; e < s->E && ahead > 0; e++) {
        i64 at = e * s->P, mine = s->own[at + g] - s->tokens[at + g], from;
        if (mine <= 0 || (found == EXPERTS && -mine * spared >= best[EXPERTS - 1].change)) continue;
        if ((from = find_source(s, e, s->node[g])) < 0) continue;
        Loan loan = find_loan(s, e, from, s->node[g], target);
        loan.change -= spared * least(mine, loan.tokens);
        if (loan.tokens) found = keep_loan(best, found, loan);
    }
    for (i64 i = find_experts(s, g) - 1; i >= 0 && ahead < 0; i--)
        for (i64 node = 0; node < s->nodes; node++) {
            if (node == s->node[g]) continue;
            Loan loan = find_loan(s, s->computed[i], g, node, target);
            if (loan.tokens) found = keep_loan(best, found, loan);
        }
    /* By less than a twentieth of a transfer, too many would be made. */
    i64 above = excess(s, target) - (s->costs.expert + s->costs.weights[BETWEEN]) / 20;
    for (int i = 0; i < found; i++) {
        i64 e = best[i].expert, at = e * s->P, q = best[i].tokens, h = -1, lowest = NO_LIMIT;
        for (i64 r = s->first[best[i].node]; r < s->first[best[i].node + 1]; r++) {
            i64 home = s->home[e], time = s->time[r];
            if (s->rows[r] + q > s->max_rows) continue;
            if (r != home && !s->takes[at + r]) {
                if (num_foreign(s, r) >= s->max_foreign) continue;
                time += s->costs.expert + borrowing(s, r, kind(s, home, r)) + best[i].later;
            }
            time -= s->costs.copy[INSIDE] * most(s->own[at + r] - s->tokens[at + r], 0);
            if (time < lowest) lowest = time, h = r;
        }
        if (h >= 0 && borrow_if_better(s, e, best[i].from, h, q, target, above)) return 1;
    }
    return 0;
}

/* Whether a rank that helps has more rows than that allows. */
static int too_many(const Search *s, i64 r) {
    return num_foreign(s, r) && s->rows[r] > s->max_rows;
}

/* What the home of an expert at least needs longer where rank h no longer helps: an estimate, as
 * it leaves out whose tokens then stay on the node. */
static i64 longer_without(const Search *s, i64 e, i64 h) {
    i64 home = s->home[e], at = e * s->P, q = s->tokens[at + h];
    i64 sent = most(s->own[at + home] - s->tokens[at + home], 0);
    int k = kind(s, home, h);
    i64 weights = s->lent[k][home] > s->borrowed[k][home] ? s->costs.weights[k] : 0;
    i64 copy = most(s->costs.copy[INSIDE], s->costs.copy[BETWEEN]);
    return s->costs.row * q - weights - copy * least(sent, q);
}

/* Take back every transfer without which no rank gets slower than `time`. */
static void take_back(Search *s, i64 time) {
    for (i64 i = s->num_shared - 1; i >= 0; i--) {
        i64 e = s->shared[i], home = s->home[e];
        for (i64 h = 0; h < s->P; h++) {
            i64 q = s->tokens[e * s->P + h];
            if (!s->takes[e * s->P + h] || s->time[home] + longer_without(s, e, h) > time) continue;
            remember(s, e, s->remembered);
            shift(s, e, h, home, q);
            if (s->time[slowest(s)] > time || too_many(s, home))
                unshift(s, e, h, home, q, s->remembered);
        }
    }
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
        for (i64 r = s->first[node]; r < s->first[node + 1]; r++)
            if (!s->takes[at + r] && num_foreign(s, r) < s->max_foreign &&
                (h < 0 || s->time[r] + borrowing(s, r, BETWEEN) <
                              s->time[h] + borrowing(s, h, BETWEEN)))
                h = r;
        if (h < 0) break;
        i64 q = least(left, s->tokens[at + home]);
        q = room(s, e, h, left_for(s, h, target, BETWEEN), q);
        added += borrowing(s, h, BETWEEN);
        if (q < s->min_tokens || q * spared < s->costs.expert + added / 2) break;
        shift(s, e, home, h, q);
        left -= q;
    }
}

/* Let ranks take tokens of an expert that are on them, where the copies that this spares are worth
 * the transfer. */
static void replicate_on_ranks(Search *s, i64 e, i64 target) {
    i64 home = s->home[e], at = e * s->P;
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

/* Let ranks take tokens that are on their nodes, then those that are on them, where it pays; the
 * largest experts first. */
static void replicate(Search *s, i64 target) {
    i64 copy = most(s->costs.copy[INSIDE], s->costs.copy[BETWEEN]);
    i64 full = s->costs.expert + least(s->costs.weights[INSIDE], s->costs.weights[BETWEEN]);
    for (int on_ranks = s->nodes == 1; on_ranks < 2; on_ranks++)
        for (i64 i = 0; i < s->E; i++) {
            i64 e = s->by_load[i];
            if (!s->num_shared && s->load[e] * copy < full) break; /* the first adds to both ends */
            for (int32_t node = 0; node < s->nodes && !on_ranks; node++)
                if (node != s->node[s->home[e]]) replicate_on(s, e, node, target);
            if (on_ranks) replicate_on_ranks(s, e, target);
        }
}

/* Relieve the slowest rank until nothing does. overfill: helpers may be filled beyond the target.
 * loans: whether nodes may borrow what they send, and if that is tried first or last. */
static void search(Search *s, i64 target, i64 best, int overfill, enum loans loans) {
    int in_vain = 0; /* nodes have tried to borrow since the last change */
    for (i64 step = 0; step < 3 * s->P && s->shifts > 0; step++) {
        i64 g = slowest(s), over = s->time[g] - target;
        if (over <= 0) break;
        if (relieve_carrying(s, g, target) ||
            (loans == FIRST && !in_vain && relieve_between(s, g, target)) ||
            relieve_shared(s, g, target) || relieve_lending(s, g, target, overfill) ||
            (loans == LAST && !in_vain && relieve_between(s, g, target))) {
            in_vain = 0;
            continue;
        }
        in_vain = 1;
        if (over <= target / 200) break;
        target += over / 3;
        if (target >= best) break;
    }
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

/* Go from all at home to the plan of "lla", cut in rank order, as far as it is within the limits. */
static void apply_lla(Search *s, double factor, Spill *spills, i64 *memory) {
    i64 *rows = memory, count = plan_lla(s->P, s->E, s->load, s->by_load, s->min_tokens,
                                         s->max_foreign, factor, spills, memory, memory + s->P);
    memcpy(rows, s->rows, s->P * sizeof(i64));
    for (i64 i = 0; i < count; i++) spills[i].helper = s->number[spills[i].helper];
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
    for (i64 i = 0; i < s->num_shared && s->nodes > 1; i++)
        for (int32_t node = 0; node < s->nodes; node++) settle(s, s->shared[i], node, 1);
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
            search(s, target, best, overfill, from == BEST && i > 0 ? LAST : NONE);
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
        search(s, best - (best - bound) / 20, best, 1, LAST);
        if (keep(s, found, &best)) g = slowest(s), i = -1;
    }
    return best;
}

/* With several nodes, search once more from home in other ways, which find other plans: nodes borrow
 * first; then a rank at first lends no tokens that are its own, so that it need not send them.
 * Returns the best time. */
static i64 start_otherwise(Search *s, const Saved *at_home, Saved *found, i64 best, i64 mean,
                           i64 bound) {
    for (int keep_own = 0; keep_own < 2 && s->nodes > 1; keep_own++)
        for (int i = 0; i < 3 && s->shifts > 0; i++) {
            i64 target = i ? best - (best - bound) / (2 << i) : mean;
            restore(s, at_home);
            s->keep_own = keep_own;
            search(s, target, best, 1, keep_own ? LAST : FIRST);
            s->keep_own = 0;
            if (keep_own) search(s, target, best, 1, LAST);
            if (keep(s, found, &best)) best = reconsider(s, found, best, bound), i = 0;
        }
    return best;
}

/* What a search needs, all in one piece, and zeros; or NULL. */
static i64 *allocate(Search *s, Saved *at_home, Saved *found) {
    i64 P = s->P, E = s->E;
    i64 longs = 7 * E * P + 3 * E + 2 * P + 3 * RANKS * P, ints = 4 * E + 5 * P + 2;
    i64 bytes = longs * sizeof(i64) + E * P * sizeof(Spill) + ints * sizeof(int32_t) + E * P;
    i64 *memory = calloc(1, bytes);
    if (!memory) return NULL;
    i64 *next = memory;
    s->own = next, next += E * P, s->of_node = next, next += E * P;
    s->tokens = next, next += E * P, s->on_node = next, next += E * P;
    s->near = next, next += E * P, s->near_home = next, next += E * P;
    found->near = next, next += E * P;
    s->load = next, next += E, s->by_load = next, next += E, s->most_own = next, next += E;
    s->remembered = next, next += 2 * P;
    at_home->ranks = next, next += RANKS * P, found->ranks = next, next += RANKS * P;
    s->ranks = next, s->rows = next, next += P, s->time = next, next += P;
    for (int k = 0; k < KINDS; k++) {
        s->in[k] = next, next += P, s->out[k] = next, next += P;
        s->lent[k] = next, next += P, s->borrowed[k] = next, next += P;
    }
    found->spills = (Spill *)next;
    int32_t *small = (int32_t *)(found->spills + E * P);
    s->helpers = small, small += E, s->shared = small, small += E;
    s->home = small, small += E, s->computed = small, small += E;
    s->node = small, small += P, s->number = small, small += P, s->rank = small, small += P;
    s->under = small, small += P, s->first = small, small += P + 2;
    s->takes = (uint8_t *)small;
    return memory;
}

/* Write down what each rank computes of each expert, and, of what it then sends or gets of one that
 * is shared, what stays in its node. */
static void write(const Search *s, const Saved *found, i64 *tokens_EP, i64 *near_EP) {
    i64 P = s->P;
    for (i64 e = 0; e < s->E; e++) tokens_EP[e * P + s->rank[s->home[e]]] = s->load[e];
    for (i64 i = 0; i < found->count; i++) {
        i64 e = found->spills[i].expert, at = e * P, tokens = found->spills[i].tokens;
        tokens_EP[at + s->rank[s->home[e]]] -= tokens;
        tokens_EP[at + s->rank[found->spills[i].helper]] = tokens;
        if (i + 1 < found->count && found->spills[i + 1].expert == e) continue;
        for (i64 r = 0; r < P; r++) {
            i64 kept = s->own[at + r] - tokens_EP[at + s->rank[r]];
            near_EP[at + s->rank[r]] = s->nodes > 1 ? found->near[at + r] : most(kept, -kept);
        }
    }
}

/* The plan.
 *
 * nodes_P: any numbers. costs: row, expert, copy inside and between, weights inside and between,
 * spill. limits: fewest tokens of a spill, most foreign experts of a rank, most tokens of all that
 * the prices allow for. factor: most rows of a rank that helps, relative to the mean; infinite: any
 * number. threshold: the load ratio below which nothing spills. tokens_EP and near_EP are zeros and
 * get the plan, times the slowest rank's time without and with it.
 *
 * Returns the number of spills, or NO_MEMORY or TOO_MANY tokens. */
i64 plan_cost(i64 P, i64 E, const i64 *counts_PE, const i64 *nodes_P, const i64 *costs,
              const i64 *limits, double factor, double threshold, i64 *tokens_EP, i64 *near_EP,
              i64 *times) {
    int limited = factor < INFINITY;
    Search s = {.P = P, .E = E, .M = E / P};
    s.costs = (Costs){costs[0], costs[1], {costs[2], costs[3]}, {costs[4], costs[5]}, costs[6]};
    s.min_tokens = most(limits[0], 1), s.max_foreign = limits[1];
    Saved at_home = {0}, found = {0};
    i64 *memory = allocate(&s, &at_home, &found);
    if (!memory) return NO_MEMORY;
    find_nodes(&s, nodes_P);
    s.shifts = s.nodes > 1 ? SHIFTS_OF_NODES : SHIFTS;
    i64 total = begin(&s, counts_PE), most_rows = 0, sum = 0;
    if (total > limits[2]) {
        free(memory);
        return TOO_MANY;
    }
    for (i64 r = 0; r < P; r++) {
        retime(&s, r);
        most_rows = most(most_rows, s.rows[r]), sum += s.time[r] / P;
    }
    save(&s, &at_home);
    i64 best = s.time[slowest(&s)], bound = s.costs.row * total / P;
    times[0] = best;
    /* Whole numbers as doubles, divided once: the load ratio of ds_llep/plan.py. */
    int skewed = total && (double)(most_rows * P) / (double)total >= threshold;
    if (skewed && best - bound > s.costs.spill) { /* no plan is faster than `bound` */
        s.max_rows = limited ? rows_of(factor, total / P) : NO_LIMIT;
        apply_lla(&s, limited ? factor : 1, found.spills, found.ranks);
        if (s.time[slowest(&s)] < best) best = s.time[slowest(&s)], save(&s, &found);
        best = improve(&s, &at_home, &found, best, sum, bound);
        if (found.count) best = reconsider(&s, &found, best, bound);
        best = start_otherwise(&s, &at_home, &found, best, sum, bound);
    }
    if (found.count && best + s.costs.spill >= times[0]) found.count = 0;
    times[1] = found.count ? best + s.costs.spill : times[0];
    write(&s, &found, tokens_EP, near_EP);
    free(memory);
    return found.count;
}
