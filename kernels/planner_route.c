/* What ds_llep/route.py needs of a plan whose experts cut by the local rule. */

#include <stdint.h>

typedef int64_t i64;

/* A plan of E experts on P ranks: how many tokens of an expert each source has and each rank
 * computes; the segments of the experts that are not at home alone, by expert, then rank; and how
 * many of a segment's tokens are each source's. */
typedef struct {
    i64 P, E, J;
    const i64 *counts_PE, *tokens_EP, *expert_J, *rank_J, *sent_JP;
} Plan;

static i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* Parcels that `rank` may send to each rank at most, then those that it may receive: see _splits.
 *
 * found is [2 * P], work [2 * P]. */
void splits(const Plan *plan, const i64 *reached_PP, const i64 *alone_PE, i64 rank, i64 top_k,
            i64 *found, i64 *work) {
    i64 P = plan->P, E = plan->E, M = E / P;
    i64 *sent_P = found, *received_P = found + P, *copies_P = work, *here_P = work + P;
    for (i64 p = 0; p < P; p++) {
        sent_P[p] = reached_PP[rank * P + p], received_P[p] = reached_PP[p * P + rank];
        copies_P[p] = here_P[p] = 0;
    }
    for (i64 e = 0, j = 0; e < E; e++) {
        i64 home = e / M, at_home = -1, spills = 0;
        const i64 *counts_P = plan->counts_PE + e; /* E from one source to the next */
        for (; j < plan->J && plan->expert_J[j] == e; j++) {
            i64 r = plan->rank_J[j];
            const i64 *sent_JP = plan->sent_JP + j * P;
            spills = 1;
            copies_P[r] += sent_JP[rank];
            if (r == rank)
                for (i64 p = 0; p < P; p++) here_P[p] += sent_JP[p];
            if (r == home)
                at_home = j;
            else {
                sent_P[r] += sent_JP[rank];
                if (r == rank)
                    for (i64 p = 0; p < P; p++) received_P[p] += sent_JP[p];
            }
        }
        if (!spills) {
            copies_P[home] += counts_P[rank * E];
            if (home == rank)
                for (i64 p = 0; p < P; p++) here_P[p] += counts_P[p * E];
            continue;
        }
        for (i64 p = 0; p < P; p++) {
            i64 kept = at_home < 0 ? 0 : plan->sent_JP[at_home * P + p];
            i64 less = least(kept - alone_PE[p * E + e], 0);
            if (p == rank) sent_P[home] += less;
            if (home == rank) received_P[p] += less;
        }
    }
    i64 own = 0;
    for (i64 e = 0; e < E; e++) own += plan->counts_PE[rank * E + e];
    for (i64 p = 0; p < P && plan->J; p++) {
        i64 theirs = 0;
        for (i64 e = 0; e < E; e++) theirs += plan->counts_PE[p * E + e];
        sent_P[p] = least(least(sent_P[p], own / top_k), copies_P[p]);
        received_P[p] = least(least(received_P[p], theirs / top_k), here_P[p]);
    }
    sent_P[rank] = received_P[rank] = 0;
}

/* Ends and shifts of the runs of `rank`'s copies, int32 [2, E, P]: see find_runs.
 *
 * work is [2 * P]. */
void runs(const Plan *plan, i64 rank, int32_t *found, i64 *work) {
    i64 P = plan->P, E = plan->E, M = E / P, place = 0;
    i64 *home_row_P = work, *foreign_row_P = work + P;
    for (i64 r = 0; r < P; r++) {
        home_row_P[r] = foreign_row_P[r] = 0;
        for (i64 e = r * M; e < (r + 1) * M; e++) foreign_row_P[r] += plan->tokens_EP[e * P + r];
    }
    for (i64 e = 0, j = 0; e < E; e++) {
        i64 home = e / M, spills = j < plan->J && plan->expert_J[j] == e;
        for (i64 r = 0; r < P; r++) {
            i64 sent = 0, earlier = 0, *row = r == home ? home_row_P + r : foreign_row_P + r;
            int32_t *end = found + e * P + r, *shift = end + E * P;
            if (spills && j < plan->J && plan->expert_J[j] == e && plan->rank_J[j] == r) {
                const i64 *sent_P = plan->sent_JP + j++ * P;
                sent = sent_P[rank];
                for (i64 p = 0; p < rank; p++) earlier += sent_P[p];
            } else if (!spills && r == home) {
                sent = plan->counts_PE[rank * E + e];
                for (i64 p = 0; p < rank; p++) earlier += plan->counts_PE[p * E + e];
            }
            i64 tokens = plan->tokens_EP[e * P + r];
            *shift = tokens || r == home ? (int32_t)(*row + earlier - place) : 0;
            *end = (int32_t)(place += sent);
            *row += tokens;
        }
    }
}
