"""What planning costs on this CPU, and what the plan buys: `python -m ds_llep.bench.plan`.

Times are medians for one layer and one micro-batch on one rank. Every rank plans before it can
send a token, so the milliseconds printed here are added to every MoE layer's forward.
"""

import argparse
import dataclasses
import statistics
import time

import numpy as np

from ds_llep.bench.workloads import Draw, parse
from ds_llep.plan import Plan, make_plan

SIZES = ((64, 8), (128, 8), (256, 32), (256, 64))
WORKLOADS = ("balanced", "zipf:1", "95:1")


def check(plan: Plan) -> None:
    """A wrong plan's time means nothing, so what is sent must be what is received and all of it."""
    sent_PEP = np.stack([plan.send_EP(rank) for rank in range(plan.num_ranks)])
    received_PPE = np.stack([plan.recv_PE(rank) for rank in range(plan.num_ranks)])
    assert (sent_PEP.transpose(2, 0, 1) == received_PPE).all(), "sent differs from received"
    assert (sent_PEP.sum(2) == plan.counts_PE).all(), "a source rank loses tokens"
    assert (sent_PEP.sum(0) == plan.tokens_EP).all(), "a computing rank misses tokens"


def median_ms(function, repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def split(plan: Plan) -> None:
    plan.send_EP(0)
    plan.recv_PE(0)


def main(argv: list[str] | None = None) -> None:
    from ds_llep.config import LLEPConfig

    parser = argparse.ArgumentParser(prog="python -m ds_llep.bench.plan", description=__doc__)
    parser.add_argument("--repeats", type=int, default=200, help="timed calls (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the routing (default: 0)")
    parser.add_argument(
        "--rows", type=int, default=32768, help="token copies per rank, T * K (default: 32768)"
    )
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.rows < 0:
        parser.error("valid is --repeats >= 1 and --rows >= 0")
    config = LLEPConfig(enabled=True)

    print(
        f"{'E':>4} {'P':>3}  {'workload':<9} {'make_plan ms':>12} {'send+recv ms':>12} "
        f"{'ratio before':>12} {'after':>6} {'spills':>6}"
    )
    for E, P in SIZES:
        for workload in WORKLOADS:
            # One expert a token: then it is the rows alone that count.
            draw = Draw(E, 1, args.rows, source=0, layer=0, step=0, seed=args.seed)
            counts_PE = parse(workload).counts_PE(P, draw)
            plan = make_plan(counts_PE, config)
            check(plan)
            plan_ms = median_ms(lambda c=counts_PE: make_plan(c, config), args.repeats)
            # Each keeps what it cut.
            fresh = iter([dataclasses.replace(plan) for _ in range(args.repeats + 1)])
            split_ms = median_ms(lambda f=fresh: split(next(f)), args.repeats)
            print(
                f"{E:>4} {P:>3}  {workload:<9} {plan_ms:>12.3f} {split_ms:>12.3f} "
                f"{plan.load_ratio_before:>12.2f} {plan.load_ratio_after:>6.2f} "
                f"{len(plan.spills):>6}"
            )


if __name__ == "__main__":
    main()
