"""``ds-llep``: benchmarks, simulation, traces and plots; also ``python -m ds_llep``.

Each command is a module with ``add_arguments(parser)`` and ``run(args) -> int``, imported when it
is asked for. What a user can get wrong is a ``ValueError`` or an ``OSError``: one line on standard
error and exit code 2.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from ds_llep.run import split_launcher_args

COMMANDS = {  # name: (module, what it does)
    "bench": ("ds_llep.bench.run", "time MoE layers: AutoEP against llep, skewed and balanced"),
    "model": ("ds_llep.bench.model", "time fine-tuning steps of a whole model, likewise"),
    "moe": ("ds_llep.bench.native", "time DeepSpeed's own MoE layers, with and without llep"),
    "memory": ("ds_llep.bench.budget", "estimate a GPU's memory in fine-tuning, and what fits"),
    "simulate": ("ds_llep.bench.simulate", "predict step times on machines that are not at hand"),
    "calibrate": ("ds_llep.bench.calibrate", "measure this machine's rates for simulate"),
    "trace": ("ds_llep.bench.summary", "summarise a recorded trace, recommend planner settings"),
    "plot": ("ds_llep.bench.plot", "draw results and traces as PNG and SVG"),
}


def main(argv: list[str] | None = None) -> int:
    """Run the command named in ``argv``; the exit code."""
    # DeepSpeed's launcher puts --local_rank in front; the environment says the same.
    _, argv = split_launcher_args(sys.argv[1:] if argv is None else argv)
    # Only the module of the command at hand is imported: most of them load PyTorch.
    chosen = next((word for word in argv if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="ds-llep", description="Tools around ds_llep.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    module = None
    for name, (path, summary) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name == chosen:
            module = importlib.import_module(path)
            command.description = module.__doc__
            module.add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return module.run(args)
    except (ValueError, OSError) as error:
        print(f"ds-llep {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
