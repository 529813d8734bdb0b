"""What planning costs on this CPU, and what the plans buy: `python -m ds_llep.bench.plan`.

One line for each number of ranks, workload and planner, medians over layers. Milliseconds to plan
are the host's, on one rank; every rank plans before it can send a token, so they are added to every
MoE layer's forward, but for planner "lla" where a GPU plans. The slowest rank's time is that of the
cost model that planner "cost" minimises (ds_llep/costs.py), with an H200's rates: a prediction, and
the same yardstick for all planners. Copies and weights are counted.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ds_llep.bench import output
from ds_llep.bench.cost import ep_plan
from ds_llep.bench.machine import H200
from ds_llep.bench.micro_batches import from_workload
from ds_llep.bench.records import read_section
from ds_llep.bench.shapes import PRESETS, Shape, preset
from ds_llep.bench.step import System, costs_of, plan_layer
from ds_llep.costs import rank_costs
from ds_llep.plan import Plan

COLUMNS = ["ranks", "workload", "planner", "plan ms", "send+recv ms", "slowest rank ms"]
COLUMNS += ["load ratio", "spills", "most foreign", "weights MB", "copies sent k", "between nodes"]


def check(plan: Plan) -> None:
    """A wrong plan's time means nothing, so what is sent must be what is received and all of it."""
    sent_PEP = np.stack([plan.send_EP(rank) for rank in range(plan.num_ranks)])
    received_PPE = np.stack([plan.recv_PE(rank) for rank in range(plan.num_ranks)])
    assert (sent_PEP.transpose(2, 0, 1) == received_PPE).all(), "sent differs from received"
    assert (sent_PEP.sum(2) == plan.counts_PE).all(), "a source rank loses tokens"
    assert (sent_PEP.sum(0) == plan.tokens_EP).all(), "a computing rank misses tokens"


def median_ms(function: Callable[[], object], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def measure(
    counts_PE: np.ndarray, shape: Shape, section: dict | None, system: System, repeats: int
) -> list[float]:
    """A line's numbers of one layer; no section stands for standard expert parallelism."""
    P = len(counts_PE)
    nodes_P = np.arange(P) // system.ranks_per_node
    config = read_section("{}" if section is None else section)

    def make() -> Plan:
        return ep_plan(counts_PE) if section is None else plan_layer(*layer)

    def split() -> None:
        fresh = make()
        fresh.send_EP(0), fresh.recv_PE(0)

    layer = counts_PE, shape, config, system
    plan = make()
    check(plan)
    plan_ms = median_ms(make, repeats)
    sent_PP = np.stack([plan.send_EP(rank).sum(0) for rank in range(P)])
    np.fill_diagonal(sent_PP, 0)
    local = plan.nodes_P is not None
    prices = costs_of(*layer)
    time_P = rank_costs(counts_PE, plan.tokens_EP, prices, nodes_P, local, plan.near_EP)
    return [
        *(plan_ms, max(0.0, median_ms(split, repeats) - plan_ms), time_P.max() / 1e9),
        *(plan.load_ratio_after, len(plan.spills)),
        max(len(plan.foreign_experts(rank)) for rank in range(P)),
        len(plan.spills) * shape.expert_numel * 2 / 1e6,
        *(sent_PP.sum() / 1e3, sent_PP[nodes_P[:, None] != nodes_P].sum() / 1e3),
    ]


def lines(args: argparse.Namespace) -> list[list[str]]:
    """The table's."""
    system = System(H200, args.ranks_per_node, H200.dtype)
    planners: dict[str, str | None] = {"ep": None}
    planners |= {name: f'{{"planner": "{name}", {args.limits}}}' for name in args.planners}
    found = []
    for num_ranks in args.ranks:
        for workload in args.workloads:
            shape = replace(preset(args.shape), tokens=args.tokens)
            layers = from_workload(workload, shape, num_ranks, args.layers, 0, args.seed)
            for name, section in planners.items():
                values = [measure(*layer, section, system, args.repeats) for layer in layers]
                medians = np.median(values, axis=0)
                formats = ("{:.3f}", "{:.3f}", "{:.2f}", "{:.2f}", *["{:.0f}"] * 5)
                cells = [f.format(value) for f, value in zip(formats, medians, strict=True)]
                found.append([str(num_ranks), workload, name, *cells])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ds_llep.bench.plan", description=__doc__)
    add = parser.add_argument
    add("--shape", default="qwen3-30b-a3b", choices=PRESETS, help="(default: qwen3-30b-a3b)")
    add("--ranks", type=int, nargs="+", default=[8, 32], metavar="P", help="(default: 8 32)")
    add("--ranks-per-node", type=int, default=8, metavar="N", help="(default: 8)")
    names = ["balanced", "zipf:1", "95:1", "real:gsm_english"]
    add("--workloads", nargs="+", default=names, help=f"(default: {' '.join(names)})")
    add("--tokens", type=int, default=8192, metavar="T", help="of a rank (default: 8192)")
    add("--layers", type=int, default=1, help="of which medians are taken (default: 1)")
    add("--planners", nargs="+", default=["lla", "cost"], help="(default: lla cost)")
    add("--limits", default='"imbalance_threshold": 1.0', metavar="JSON", help="of both planners")
    add("--repeats", type=int, default=50, help="timed calls (default: 50)")
    add("--seed", type=int, default=0, help="of the routing (default: 0)")
    args = parser.parse_args(argv)
    if min(args.repeats, args.layers, args.tokens, args.ranks_per_node, *args.ranks) < 1:
        parser.error("valid is 1 or more for repeats, tokens, layers, ranks and ranks per node")
    output.table(f"plans of a layer of {args.shape}, seed {args.seed}", COLUMNS, lines(args))


if __name__ == "__main__":
    main()
