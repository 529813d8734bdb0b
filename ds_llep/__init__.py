"""Load balancing for expert-parallel Mixture-of-Experts training with DeepSpeed.

``import ds_llep`` makes DeepSpeed engines read an ``"llep"`` section in their JSON; without that
section the import changes nothing. See README.md for the section and how to use it.
"""

from ds_llep.activate import register, status
from ds_llep.compat import __version__ as __version__
from ds_llep.config import LLEPConfig
from ds_llep.export import save_pretrained
from ds_llep.moe import MoE
from ds_llep.plan import Plan, Spill, make_plan

__all__ = [
    "LLEPConfig",
    "MoE",
    "Plan",
    "Spill",
    "make_plan",
    "register",
    "save_pretrained",
    "status",
]

register()
