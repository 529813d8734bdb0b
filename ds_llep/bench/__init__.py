"""Benchmarks, one module each: `python -m ds_llep.bench.NAME --help`."""
