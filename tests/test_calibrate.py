"""``ds-llep calibrate``, for real, on two CPU ranks."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys

import pytest
from launcher import WARM, warm_environment

from ds_llep.bench.calibrate import add_arguments, write
from ds_llep.bench.machine import H200, Machine
from ds_llep.cli import main

SMALL = "--matrix 128 --rows 256 --hidden-size 32 --ffn-size 64 --mebibytes 0.25,0.0625 --repeats 3"


def test_two_ranks(tmp_path):
    path = tmp_path / "machine.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [WARM, "-m", "ds_llep", "calibrate", "--device", "cpu", "--out", str(path)]
    command += [*SMALL.split(), "--inter-gbps", "100", "--name", "small"]
    env = warm_environment()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    machine = Machine.load(path)
    assert machine.name == "small" and machine.ranks_per_node == 2 and machine.dtype == "float32"
    assert {"all_to_all_between", "point_to_point_between"} <= {*machine.given}
    assert not {"all_to_all_inside", "memory_rate", "grouped_rate"} & {*machine.given}
    for points in (machine.all_to_all_inside, machine.point_to_point_inside):
        assert [size for size, _ in points] == [2**16, 2**18]
    assert machine.all_to_all_between == machine.point_to_point_between == ((2**30, 12.5e9),)
    assert [rows for rows, _ in machine.grouped_rate] == [8, 32, 256]
    # Whatever the machine, these are far from both ends.
    for rate in (machine.dense_rate, *(rate for _, rate in machine.grouped_rate)):
        assert 1e7 < rate < 1e14
    for rate in (machine.memory_rate, machine.local_rate, machine.all_to_all_inside[1][1]):
        assert 1e5 < rate < 1e13
    for name, value in dataclasses.asdict(machine).items():
        if name.startswith(("latency", "overhead", "autoep", "plan")):
            assert 1e-10 < value < 5, name
    assert done.stdout.count(f"written to {path}") == 1


def test_result_is_not_lost(capsys):
    """Where the file cannot be written, the machine is printed and the exit code says so."""
    assert write(H200, "/no/such/machine.json") == 2
    out, error = capsys.readouterr()
    assert H200.to_json() in out and "cannot write '/no/such/machine.json'" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "0"], "--rows 0; valid is above 0"),
        (["--inter-gbps", "-1"], "--inter-gbps -1.0; valid is above 0"),
        (["--mebibytes", "1,x"], "--mebibytes '1,x'; valid are numbers above 0 with commas"),
        (["--mebibytes", "0,1"], "--mebibytes '0,1'; valid"),
        (["--repeats", "0"], "--repeats 0; valid is above 0"),
    ],
)
def test_mistakes(capsys, options, message):
    assert main(["calibrate", "--out", "machine.json", *options]) == 2
    assert message in capsys.readouterr().err


def test_out_is_needed():
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    with pytest.raises((argparse.ArgumentError, SystemExit)):
        parser.parse_args([])
