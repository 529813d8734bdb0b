/* Which of an expert's tokens each rank computes, by the local rule of ds_llep/cut.py. */

#include <stddef.h>
#include <stdint.h>

typedef int64_t i64;

enum { OWN, NODE, ALL }; /* whose tokens a rank takes: its own first */

static i64 least(i64 a, i64 b) { return a < b ? a : b; }

/* The segments of the experts that are not at home alone, by expert, then rank.
 *
 * E experts, P ranks; nodes_P: any numbers. near_EP: of what a rank sends of an expert or gets, what
 * stays in its node, as planner "cost" found it; NULL: of the first ranks as much as can. found is
 * [2 + 2 * P + room * (4 + P)] and gets, one after the other: how many experts and segments there
 * are; 2 * P numbers to work in; the experts; each segment's expert, rank, and tokens, each with
 * room for `room`; how many of the tokens are each source's. */
void cut(i64 P, i64 E, const i64 *counts_PE, const i64 *tokens_EP, const i64 *nodes_P,
         const i64 *near_EP, i64 room, i64 *found) {
    i64 *left_P = found + 2, *leaves_P = left_P + P, *expert_X = leaves_P + P;
    i64 *expert_J = expert_X + room, *rank_J = expert_J + room, *tokens_J = rank_J + room;
    i64 *sent_JP = tokens_J + room, X = 0, J = 0;
    for (i64 e = 0; e < E; e++) {
        const i64 *tokens_P = tokens_EP + e * P, *near_P = near_EP ? near_EP + e * P : NULL;
        i64 home = e / (E / P), first = J, away = 0;
        for (i64 r = 0; r < P; r++) away |= tokens_P[r] & -(r != home);
        if (!away) continue;
        expert_X[X++] = e;
        for (i64 r = 0; r < P; r++) {
            left_P[r] = counts_PE[r * E + e];
            leaves_P[r] = near_P ? left_P[r] - tokens_P[r] - near_P[r] : 0;
            if (tokens_P[r]) expert_J[J] = e, rank_J[J] = r, tokens_J[J++] = tokens_P[r];
        }
        for (i64 at = first * P; at < J * P; at++) sent_JP[at] = 0;
        for (int whose = OWN; whose <= ALL; whose++)
            for (i64 j = first; j < J; j++) {
                i64 r = rank_J[j], begin = whose == OWN ? r : 0, end = whose == OWN ? r + 1 : P;
                i64 *sent_P = sent_JP + j * P, wanted = tokens_J[j];
                for (i64 p = 0; p < P; p++) wanted -= sent_P[p];
                if (whose == NODE && near_P) wanted = least(wanted, near_P[r]);
                for (i64 p = begin; p < end && wanted; p++) {
                    if (whose == NODE && nodes_P[p] != nodes_P[r]) continue;
                    i64 kept = whose == NODE && leaves_P[p] > 0 ? leaves_P[p] : 0;
                    i64 n = least(left_P[p] - kept, wanted);
                    sent_P[p] += n, left_P[p] -= n, wanted -= n;
                }
            }
    }
    found[0] = X, found[1] = J;
}
