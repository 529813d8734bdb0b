"""The ``"llep"`` section of a DeepSpeed JSON.

Every key is typed and bounded here, once, and read nowhere else by name. A mistake is a
``ValueError`` that says which key, what was given and what is valid: a run that silently trains
without balancing because of a misspelt key costs more than one that stops.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

from deepspeed.runtime.config_utils import DeepSpeedConfigModel
from pydantic import ConfigDict, Field, ValidationError, model_validator

SECTION = "llep"
LEAST_RATE = 1e-4
MOST_MICROSECONDS = 1e6
_INVALID = "invalid DeepSpeed config: "
# The paper's limits, which its planner needs and which bound another one only where they are given.
_WITHOUT_LIMITS = {"imbalance_threshold": 1.0, "capacity_factor": None, "min_tokens_per_gemm": 0}


class _StrictModel(DeepSpeedConfigModel):
    """Strict types, no unknown keys, frozen, and errors a user can act on.

    ``DeepSpeedConfigModel`` drops values equal to ``"auto"``, which would turn a mistake into the
    default; here ``"auto"`` is a value like any other.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, validate_assignment=False)

    def __init__(self, /, **data: Any) -> None:
        try:
            # Past DeepSpeed's own, whose parameter "strict" would catch a key of that name.
            super(DeepSpeedConfigModel, self).__init__(**data)
        except ValidationError as error:
            raise ValueError(_explain(type(self), error)) from None


class MonitorConfig(_StrictModel):
    """The ``"monitor"`` sub-section: statistics through DeepSpeed's monitor."""

    enabled: bool = False
    """Write load ratios and spill sizes to the monitors that the DeepSpeed JSON enables."""

    interval: int = Field(default=10, ge=1)
    """Optimizer steps between two writes; at least 1."""


class TraceConfig(_StrictModel):
    """The ``"trace"`` sub-section: what the router chose, recorded into a file."""

    enabled: bool = False
    """Record the counts of tokens by source rank and expert, those of global rank 0's EP group."""

    path: str = Field(default="llep_trace.npz", min_length=1)
    """The file, from the working directory of rank 0; where it exists, a number is added."""

    interval: int = Field(default=1, ge=1)
    """One micro-batch of so many is recorded; at least 1."""

    max_bytes: int = Field(default=64 * 2**20, ge=1)
    """Memory for counts; where it is full, every second micro-batch goes and interval doubles."""


class GivenRates(_StrictModel):
    """Rates of a machine that somebody knows; null: not known. Also what a file of rates holds."""

    # The bounds keep prices times all of a rank's rows within 64 bits.
    tflops: float | None = Field(default=None, ge=LEAST_RATE, allow_inf_nan=False)
    """TFLOP/s of a rank at the experts' products."""

    inside_gbytes: float | None = Field(default=None, ge=LEAST_RATE, allow_inf_nan=False)
    """GB/s that a rank sends to others of its node."""

    between_gbytes: float | None = Field(default=None, ge=LEAST_RATE, allow_inf_nan=False)
    """GB/s that a rank sends to other nodes."""

    expert_us: float | None = Field(default=None, gt=0, le=MOST_MICROSECONDS)
    """Microseconds that one more foreign expert costs beside its rows."""

    exposed: float | None = Field(default=None, ge=0, le=1)
    """The share of a weight transfer that other work does not hide."""

    spill_us: float | None = Field(default=None, ge=0, le=MOST_MICROSECONDS)
    """Microseconds that any spill costs a layer, whatever it moves: what the host does for it."""


class CostConfig(GivenRates):
    """The ``"cost"`` sub-section: where planner ``"cost"`` has its prices and its nodes from."""

    file: str | None = Field(default=None, min_length=1)
    """Rates that are not given are read from here, or else measured and written here by rank 0."""

    ranks_per_node: int | None = Field(default=None, ge=1)
    """Ranks of a node, in the order of global ranks; null: found out."""


class LLEPConfig(_StrictModel):
    """The ``"llep"`` section. Keys are explained in README.md, bounds are enforced here.

    Raises:
        ValueError: an unknown key, a wrong type or a value out of bounds, with the valid values.
    """

    enabled: bool = False
    """Balance the expert-parallel MoE layers of this engine."""

    planner: Literal["lla", "cost"] = "lla"
    """``"lla"``: Least-Loaded Assignment, Algorithms 2-3 of arXiv 2601.17111; ``"cost"``: the least
    time of the slowest rank."""

    imbalance_threshold: float = Field(default=1.3, ge=1.0, allow_inf_nan=False)
    """lambda: standard EP while max/mean of the home loads is below it; 1 always plans, which is
    the default with ``"cost"``."""

    capacity_factor: float | None = Field(default=1.0, ge=1.0, allow_inf_nan=False)
    """alpha: rows that a rank may take, relative to the mean over the EP group; null, the default
    with ``"cost"`` and not valid with ``"lla"``: any number."""

    min_tokens_per_gemm: int = Field(default=1024, ge=0)
    """m: fewest tokens of one expert worth sending to a helper; by default 0 with ``"cost"``."""

    weight_source: Literal["auto", "owner", "shards"] = "auto"
    """Who sends a spilled expert's weights: its home rank, or under ZeRO-3 the shards' holders."""

    backward_weights: Literal["refetch", "keep"] = "refetch"
    """Fetch foreign weights again in backward, or keep them in memory since forward."""

    max_foreign_experts: int | None = Field(default=None, ge=0)
    """Most foreign experts that a rank holds at once in a layer; null: as many as planned."""

    max_foreign_bytes: int | None = Field(default=None, ge=1)
    """Size of the workspace for foreign experts, all layers' together; null: as planned."""

    weight_cache: bool = True
    """Do not fetch again, while weights are the same, what is still in the workspace."""

    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Triton kernels, their plain-PyTorch twins, or whichever fits the device."""

    monitor: MonitorConfig = Field(default_factory=MonitorConfig)
    """See :class:`MonitorConfig`."""

    trace: TraceConfig = Field(default_factory=TraceConfig)
    """See :class:`TraceConfig`."""

    cost: CostConfig = Field(default_factory=CostConfig)
    """See :class:`CostConfig`."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_planner(cls, data: dict[str, Any]) -> dict[str, Any]:
        return {**_WITHOUT_LIMITS, **data} if data.get("planner") == "cost" else data

    @model_validator(mode="after")
    def _fits_planner(self) -> LLEPConfig:
        if self.planner == "lla":
            if self.capacity_factor is None:
                raise ValueError(
                    f'"{SECTION}.capacity_factor": input should be a valid number with "planner": '
                    '"lla", got None'
                )
            given = self.cost.model_dump(exclude_none=True)
            if given:
                raise ValueError(
                    f'"{SECTION}.cost" has no effect with "planner": "lla", got {given!r}; set '
                    f'"{SECTION}.planner" to "cost" or remove it'
                )
        return self

    def with_room(
        self, expert_bytes: int, whose: str = "", in_dtype: str = ""
    ) -> tuple[LLEPConfig, int | None]:
        """The config with its two limits on foreign experts made one.

        Args:
            expert_bytes: of one expert in the dtype that it travels in.
            whose: the layer, for the message.
            in_dtype: the dtype, for the message.

        Returns:
            The config, and the foreign experts that ``max_foreign_bytes`` has room for; None: any.

        Raises:
            ValueError: ``max_foreign_bytes`` is less than one expert.
        """
        limit, room = self.max_foreign_bytes, None
        if limit is not None:
            if limit < expert_bytes:
                raise ValueError(
                    f'"{SECTION}.max_foreign_bytes": {limit} is less than one expert{whose}, '
                    f"{expert_bytes} bytes{in_dtype}. Give it {expert_bytes} or more; to keep all "
                    'experts at home, set "max_foreign_experts" to 0.'
                )
            room = limit // expert_bytes
        limits = [most for most in (self.max_foreign_experts, room) if most is not None]
        return self.model_copy(update={"max_foreign_experts": min(limits, default=None)}), room

    @classmethod
    def from_ds_config(cls, ds_config: dict[str, Any]) -> LLEPConfig:
        """Read the section from a whole DeepSpeed config; absent means all defaults, disabled.

        Raises:
            ValueError: the section is no JSON object, or one of its keys is wrong.
        """
        section = ds_config.get(SECTION, {})
        if not isinstance(section, dict):
            raise ValueError(
                f'"{SECTION}" must be a JSON object such as {{"enabled": true}}, got {section!r}'
            )
        return cls(**section)


def _explain(model: type[DeepSpeedConfigModel], error: ValidationError) -> str:
    """One line per mistake: key, value given, what is valid, and the likely fix."""
    below = {MonitorConfig: "monitor.", TraceConfig: "trace.", CostConfig: "cost."}.get(model, "")
    what, prefix = _INVALID, f"{SECTION}.{below}"
    if model is GivenRates:  # from a file
        what, prefix = "invalid rates: ", ""
    lines = []
    for detail in error.errors():
        key = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            close = difflib.get_close_matches(key, model.model_fields, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else ""
            lines.append(
                f'unknown key "{prefix}{key}"; valid keys: {", ".join(model.model_fields)}{hint}'
            )
        elif detail["type"] == "value_error":  # a section below this one has explained itself
            lines.append(str(detail["ctx"]["error"]).removeprefix(_INVALID))
        else:
            valid = detail["msg"][0].lower() + detail["msg"][1:]
            lines.append(f'"{prefix}{key}": {valid}, got {detail["input"]!r}')
    return what + "; ".join(lines)
