/* Which of an expert's tokens each rank computes, by the local rule of ds_llep/cut.py. */

#include <stdint.h>

typedef int64_t i64;

enum { OWN, NODE, ALL }; /* whose tokens a rank takes: its own first */

/* The segments of the experts that are not at home alone, by expert, then rank.
 *
 * E experts, P ranks; nodes_P: any numbers. found is [2 + P + room * (4 + P)] and gets, one after the
 * other: how many experts and segments there are; P numbers to work in; the experts; each segment's
 * expert, rank, and tokens, each with room for `room`; how many of the tokens are each source's. */
void cut(i64 P, i64 E, const i64 *counts_PE, const i64 *tokens_EP, const i64 *nodes_P, i64 room,
         i64 *found) {
    i64 *left_P = found + 2, *expert_X = left_P + P, *expert_J = expert_X + room;
    i64 *rank_J = expert_J + room, *tokens_J = rank_J + room, *sent_JP = tokens_J + room;
    i64 X = 0, J = 0;
    for (i64 e = 0; e < E; e++) {
        const i64 *tokens_P = tokens_EP + e * P;
        i64 home = e / (E / P), first = J, away = 0;
        for (i64 r = 0; r < P; r++) away |= tokens_P[r] & -(r != home);
        if (!away) continue;
        expert_X[X++] = e;
        for (i64 r = 0; r < P; r++) {
            left_P[r] = counts_PE[r * E + e];
            if (tokens_P[r]) expert_J[J] = e, rank_J[J] = r, tokens_J[J++] = tokens_P[r];
        }
        for (i64 at = first * P; at < J * P; at++) sent_JP[at] = 0;
        for (int whose = OWN; whose <= ALL; whose++)
            for (i64 j = first; j < J; j++) {
                i64 r = rank_J[j], begin = whose == OWN ? r : 0, end = whose == OWN ? r + 1 : P;
                i64 *sent_P = sent_JP + j * P, wanted = tokens_J[j];
                for (i64 p = 0; p < P; p++) wanted -= sent_P[p];
                for (i64 p = begin; p < end && wanted; p++) {
                    if (whose == NODE && nodes_P[p] != nodes_P[r]) continue;
                    i64 n = left_P[p] < wanted ? left_P[p] : wanted;
                    sent_P[p] += n, left_P[p] -= n, wanted -= n;
                }
            }
    }
    found[0] = X, found[1] = J;
}
