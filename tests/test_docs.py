"""The documentation says what the code does."""

from __future__ import annotations

import doctest
import json
import re
from pathlib import Path

from ds_llep import LLEPConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_examples_in_the_documentation():
    failed, tried = doctest.testfile(str(ROOT / "docs/how-it-works.md"), module_relative=False)
    assert tried and not failed


def test_table_of_config_keys():
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \| `([^`]+)` \|", README, flags=re.MULTILINE))
    defaults = LLEPConfig().model_dump()
    for section in ("monitor", "trace", "cost"):
        values = defaults.pop(section).items()
        defaults |= {f"{section}.{key}": value for key, value in values}
    assert {key: json.loads(value) for key, value in rows.items()} == defaults


def test_file_tree():
    """Every Python file of the package and the kernels is in the README's tree."""
    for path in [*ROOT.glob("ds_llep/*.py"), *ROOT.glob("kernels/*.py")]:
        assert f"  {path.name}" in README, f"{path.name} is missing from the file tree"
    for path in ROOT.glob("ds_configs/*.json"):
        assert f"`ds_configs/{path.name}`" in README
