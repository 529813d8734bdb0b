"""What one GPU needs in a full fine-tuning step: DeepSpeed's states, llep's buffers, activations.

Pure arithmetic: sizes in, bytes out. It says in a second what a trial run says in an hour, at the
price of assumptions, which the functions below name. All parameters are trained, by AdamW, with
gradient accumulation, and DeepSpeed 0.19.8's defaults hold where :class:`Buffers` has no other.
Not counted: CUDA's context, NCCL's buffers, fragmentation, and memory of the host.

Letters: ``T`` tokens of a rank, ``K`` experts per token, ``D`` hidden size, ``F`` expert FFN size,
``N`` rows that a rank computes, ``M`` experts at home on it, ``P`` ranks of the EP group, ``b``
bytes of an element.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_llep.bench.models import ModelSize
from ds_llep.returns import BUNDLES_PER_ROUND

FP32_BYTES = 4
_EXPERT_GROUP = 178_956_971
"""Elements; DeepSpeed cuts the experts' parameter group of the optimizer at this size."""
_LOSS_BYTES = 12
"""Of a logit in the loss's backward: log-softmax, its gradient and the gradient before it, fp32."""


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """Sizes in elements of the ``"zero_optimization"`` section."""

    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    max_live: int = 1_000_000_000
    """The larger of ``stage3_max_live_parameters`` and ``stage3_max_reuse_distance``."""
    sub_group: int = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a model is trained."""

    gpus: int
    ep_size: int
    zero_stage: int
    tokens: int
    """T: of a micro-batch on one GPU."""
    element_bytes: int
    """2 for bf16, 4 for fp32."""
    checkpointing: bool
    offload_optimizer: bool = False
    offload_param: bool = False
    buffers: Buffers = Buffers()

    @property
    def edp_size(self) -> int:
        """Ranks that hold the same experts."""
        return self.gpus // self.ep_size


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a rank computes."""

    load_ratio: float
    """Rows of the rank with most, above the mean."""
    foreign_experts: int | None
    """That a rank borrows in a layer; None: AutoEP, which borrows none."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes on the GPU that needs most."""

    expert_weights: float
    other_weights: float
    gradients: float
    optimizer: float
    buckets: float
    gathered: float
    workspace: float
    activations: float
    """Kept from forward to backward."""
    loss: float
    layer: float
    """One layer in backward, foreign gradients among it."""
    step: float
    """What the optimizer's step makes for itself."""

    @property
    def steady(self) -> float:
        """Weights, gradients and optimizer states: there between two micro-batches."""
        return self.expert_weights + self.other_weights + self.gradients + self.optimizer

    @property
    def backward(self) -> float:
        """The highest point of forward and backward: at the loss, or in the last layer."""
        around = self.buckets + self.gathered + self.workspace + self.activations
        return self.steady + around + max(self.loss, self.layer)

    @property
    def in_step(self) -> float:
        """The highest point of the optimizer's step."""
        return self.steady + self.workspace + self.step

    @property
    def peak(self) -> float:
        return max(self.backward, self.in_step)


def footprint(model: ModelSize, setup: Setup, routing: Routing) -> Footprint:
    """What one GPU needs; every rank has as many experts."""
    assert model.num_experts % setup.ep_size == setup.gpus % setup.ep_size == 0
    b = setup.element_bytes
    of_experts, of_others = shares(setup, setup.zero_stage >= 3)
    on_gpu = 0 if setup.offload_param else b
    foreign = routing.foreign_experts or 0
    kept, layer = activations(model, setup, routing)
    return Footprint(
        expert_weights=on_gpu * of_experts * model.experts_numel,
        other_weights=on_gpu * of_others * model.other_numel,
        gradients=gradients(model, setup),
        optimizer=optimizer_states(model, setup),
        buckets=buckets(model, setup),
        gathered=gathered(model, setup, routing),
        workspace=b * foreign * model.expert_numel,
        activations=kept,
        loss=_LOSS_BYTES * setup.tokens * model.vocabulary,
        layer=layer,
        step=step_buffers(model, setup),
    )


def shares(setup: Setup, is_sharded: bool) -> tuple[float, float]:
    """The share of all routed experts, and of anything else, that a rank holds.

    A rank has its EP group's share of the experts. Beyond that, ZeRO divides experts by the EDP
    group and anything else by the world: optimizer states from stage 1 on, gradients from stage 2
    on, weights in stage 3. Both together divide experts by the world as well.
    """
    return (1 / setup.gpus, 1 / setup.gpus) if is_sharded else (1 / setup.ep_size, 1)


def own_numel(model: ModelSize, setup: Setup, is_sharded: bool) -> float:
    """Parameters of which this rank holds what is or is not sharded."""
    of_experts, of_others = shares(setup, is_sharded)
    return of_experts * model.experts_numel + of_others * model.other_numel


def gradients(model: ModelSize, setup: Setup) -> float:
    """Between micro-batches, in the weights' dtype; ZeRO 2 and 3 offload them with the optimizer.

    With ZeRO-1 they are whole until the accumulation's last micro-batch, wherever the optimizer is.
    """
    if setup.offload_optimizer and setup.zero_stage >= 2:
        return 0
    return setup.element_bytes * own_numel(model, setup, setup.zero_stage >= 2)


def optimizer_states(model: ModelSize, setup: Setup) -> float:
    """AdamW's two moments and the master weights, all in fp32: 12 bytes a parameter.

    Only ZeRO-0 in fp32 has no master weights: the weights are.
    """
    if setup.offload_optimizer:
        return 0
    has_master = setup.zero_stage >= 1 or setup.element_bytes < FP32_BYTES
    numel = own_numel(model, setup, setup.zero_stage >= 1)
    return numel * FP32_BYTES * (2 + has_master)


def buckets(model: ModelSize, setup: Setup) -> float:
    """Gradients on their way to their reduction, during backward.

    ZeRO 1 to 3 have a bucket of ``reduce_bucket_size``, whatever the model's size; 2 and 3 reduce a
    copy of what is in it while backward runs. (``overlap_comm`` gives ZeRO 1 and 2 a second one.)
    """
    if setup.zero_stage == 0:
        return 0
    size = setup.buffers.reduce_bucket
    copied = min(size, own_numel(model, setup, False)) if setup.zero_stage >= 2 else 0
    return setup.element_bytes * (size + copied)


def gathered(model: ModelSize, setup: Setup, routing: Routing) -> float:
    """Whole weights under ZeRO-3: a layer and what is prefetched, or what stays alive for reuse.

    Experts of an EDP group of one are whole already. AutoEP's autograd graph holds on to gathered
    experts, so without checkpointing those of all layers are there at the start of backward.
    """
    if setup.zero_stage < 3:
        return 0
    moves_experts = setup.edp_size > 1 or setup.offload_param
    experts = model.experts_numel / setup.ep_size if moves_experts else 0
    others = model.other_numel if setup.gpus > 1 or setup.offload_param else 0

    def alive(numel: float, of_a_layer: float) -> float:
        at_once = max(of_a_layer, model.embedding_numel) + setup.buffers.prefetch_bucket
        return min(numel, max(at_once, setup.buffers.max_live))

    if routing.foreign_experts is None and not setup.checkpointing:
        numel = experts + alive(others, model.other_layer_numel)
    else:
        one = model.other_layer_numel + experts / model.moe_layers
        numel = alive(experts + others, one)
    return setup.element_bytes * numel


def step_buffers(model: ModelSize, setup: Setup) -> float:
    """fp32 gradients of what the optimizer updates at once, and their copy in the weights' dtype.

    That is everything in ZeRO-0 (nothing in fp32), a parameter group of this rank in ZeRO 1 and 2,
    a sub-group in ZeRO-3.
    """
    if setup.offload_optimizer:
        return 0
    is_fp32 = setup.element_bytes == FP32_BYTES
    if setup.zero_stage == 0:
        return 0 if is_fp32 else FP32_BYTES * own_numel(model, setup, False)
    if setup.zero_stage < 3:
        group = min(model.experts_numel / setup.ep_size, _EXPERT_GROUP) / setup.edp_size
        numel = max(group, model.other_numel / setup.gpus)
    else:
        numel = min(own_numel(model, setup, True), setup.buffers.sub_group)
    return numel * (FP32_BYTES + (0 if is_fp32 else setup.element_bytes))


def activations(model: ModelSize, setup: Setup, routing: Routing) -> tuple[float, float]:
    """Kept from forward to backward; and one layer in backward, above what is kept.

    With checkpointing a layer keeps its input, and all of the layer at hand is made again.
    """
    b, T = setup.element_bytes, setup.tokens
    layers = model.layers * attention_bytes(model, setup)
    layers += model.moe_layers * moe_bytes(model, setup, routing) + dense_bytes(model, setup)
    working = moe_backward_bytes(model, setup, routing)
    last_norm = (FP32_BYTES + 2 * b) * T * model.hidden_size
    if setup.checkpointing:
        inputs = b * T * model.hidden_size * model.layers
        return inputs + last_norm, layers / model.layers + working
    return layers + last_norm, working


def attention_bytes(model: ModelSize, setup: Setup) -> float:
    """What attention and a layer's two norms keep, of all tokens.

    An RMSNorm computes in fp32 and keeps its input so and its normed value in the weights' dtype.
    Rotary embedding keeps its input and that with halves swapped. Attention's kernel (flash or
    memory-efficient) keeps queries, keys, values and result, and no matrix of scores: eager
    attention keeps far more. Keys and values are not repeated over the heads of a group.
    """
    b, size = setup.element_bytes, model.attention
    norm = FP32_BYTES + b
    elements = 2 * size.rotated + size.read + size.out + size.latent
    norms = norm * (2 * model.hidden_size + size.normed) + 2 * b * model.hidden_size
    return setup.tokens * (norms + b * elements)


def dense_bytes(model: ModelSize, setup: Setup) -> float:
    """What shared experts and dense MLPs of all layers keep: gate, its SiLU, up, their product."""
    return setup.tokens * setup.element_bytes * 4 * model.dense_width


def moe_bytes(model: ModelSize, setup: Setup, routing: Routing) -> float:
    """What the routed experts of one layer keep.

    llep: a row, gate and up. AutoEP: the activation as well, and every copy's result where the
    token came from, for the gradient of its score; the router's logits and scores in both.
    """
    b, D, F = setup.element_bytes, model.hidden_size, model.ffn_size
    copies = setup.tokens * model.top_k
    rows = copies * routing.load_ratio
    router = 2 * FP32_BYTES * setup.tokens * model.num_experts
    if routing.foreign_experts is None:
        return b * (rows * (D + 3 * F) + copies * D) + router
    return b * rows * (D + 2 * F) + router


def moe_backward_bytes(model: ModelSize, setup: Setup, routing: Routing) -> float:
    """What backward of one MoE layer adds to what the layer keeps, at the higher of two points.

    When the activation's gradient becomes gate's and up's, a row has the result's gradient D and
    3 F beside what is kept. When the weights' gradients are made, gate and up are gone, and there
    are gradients of gate and up and two more D, parcels on their way in both directions, and
    gradients of M home experts. llep then has those of foreign experts too, at a home at most
    ``BUNDLES_PER_ROUND`` returned ones.
    """
    D, F, P = model.hidden_size, model.ffn_size, setup.ep_size
    copies = setup.tokens * model.top_k
    rows = copies * routing.load_ratio
    bundles = model.num_experts / P
    if routing.foreign_experts is None:
        parcels = 0
    else:
        # A token is expected on so many other ranks if its experts are anywhere.
        parcels = 2 * setup.tokens * (P - 1) * (1 - (1 - 1 / P) ** model.top_k)
        if routing.foreign_experts:
            bundles += max(routing.foreign_experts, BUNDLES_PER_ROUND)
    at_hidden = rows * (D + 3 * F)
    at_weights = rows * 2 * D + parcels * D + bundles * model.expert_numel
    return setup.element_bytes * max(at_hidden, at_weights)
