"""Each family under llep is the Hugging Face model: loss, logits and every gradient.

The reference is the whole model in fp64 on the tokens of all ranks at once. Routers choose freely;
tokens are drawn until no choice is close, so that rounding cannot send one elsewhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from unittest import mock

import deepspeed.comm as dist
import engines
import families
import layers
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad

import ds_llep
from ds_llep.biased import split

MARGIN = 1e-3  # between scores, relative; fp32 is wrong by some 1e-6
AUX = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
DOCS = (Path(__file__).parent.parent / "docs/families.md").read_text()


def draw_tokens(model: torch.nn.Module, seed: int) -> torch.Tensor:
    """``[ranks, tokens]`` that no router of the model is in two minds about."""
    margins, topk = [], torch.topk
    generator = torch.Generator().manual_seed(seed)
    device = get_accelerator().current_device_name()
    vocab = model.config.vocab_size

    def measured(scores, k, dim=-1, **options):
        ordered = scores.sort(dim=dim, descending=True).values
        last, next_best = ordered[..., k - 1], ordered[..., k]
        margins.append(((last - next_best) / last.abs()).min())
        return topk(scores, k, dim=dim, **options)

    while True:
        ids = torch.randint(vocab, (dist.get_world_size(), engines.SEQ_LEN), generator=generator)
        ids = ids.to(device)
        margins.clear()
        with torch.no_grad(), mock.patch.object(torch, "topk", measured):
            model(input_ids=ids)
        if min(margins) > MARGIN:
            return ids


def reference(model, ids: torch.Tensor, ep_size: int, by_rank: bool) -> tuple[float, dict]:
    """Loss of all tokens; this rank's logits and AutoEP's view of all gradients.

    ``by_rank`` makes the loss the mean of each rank's, which differs for what is not a mean over
    tokens.
    """
    parts = ids.split(1) if by_rank else [ids]
    outputs = [model(input_ids=part, labels=part) for part in parts]
    loss = sum(output.loss for output in outputs) / len(parts)
    loss.backward()
    logits = torch.cat([output.logits for output in outputs])
    found = {"logits": logits[dist.get_rank()].unsqueeze(0).detach()}
    for name, parameter in model.named_parameters():
        is_gpt_oss = model.config.model_type == "gpt_oss"
        found.update(engines.autoep_view(name, parameter.grad, ep_size, is_gpt_oss))
    return loss.item(), found


def join_attention(tensors: dict) -> dict:
    """Each layer's attention as one: alone, queries' gradients are small sums of large numbers."""
    joined, parts = {}, {}
    for name, tensor in tensors.items():
        module, attention, _ = name.partition(".self_attn.")
        if attention and tensor is not None:
            parts.setdefault(module + attention, []).append(tensor.flatten())
        else:
            joined[name] = tensor
    return joined | {name: torch.cat(tensors) for name, tensors in parts.items()}


def parity(
    family: str, stage: int, ep_size: int, seed: int, settings: dict, expert_parallel: dict
) -> dict:
    """On every rank: tensors over budget, errors of AutoEP and ours, and what was spilled."""

    def model():
        return families.enliven(families.build(family, seed, **settings), seed)

    whole = model().double().to(get_accelerator().current_device_name())
    ids = draw_tokens(whole, seed)
    own = ids[dist.get_rank()].unsqueeze(0)
    loss, expected = reference(whole, ids, ep_size, by_rank="output_router_logits" in settings)
    found = []
    for section in (None, {}):
        config = engines.ds_config(stage, ep_size, llep=section)
        config["expert_parallel"].update(expert_parallel)
        engine = engines.initialize(model(), config)
        output = engine(input_ids=own, labels=own)
        engine.backward(output.loss)
        tensors = {"logits": output.logits.detach()}
        for name, parameter in engine.module.named_parameters():
            tensors[name] = safe_get_full_grad(parameter)
            if ".mlp.experts." in name and family == "gpt_oss":
                config = whole.config
                size = config.hidden_size if name.endswith("2") else config.intermediate_size
                tensors[name], tensors[f"{name}_bias"] = split(tensors[name], size)
        errors = layers.errors(join_attention(tensors), join_attention(expected))
        errors["loss"] = abs(engines.mean_over_ranks(output.loss) - loss) / loss
        found.append(errors)
        status = ds_llep.status(engine)
        engine.destroy()
    theirs, ours = found
    return {
        "over": layers.over_budget(ours, theirs),
        "theirs": theirs,
        "ours": ours,
        "without": [name for name in tensors if name not in expected],
        "status": status,
    }


def check(pools, family: str, stage: int, ep_size: int, seed: int, *others: dict) -> None:
    """On four ranks; anew where the router happens to balance by itself."""
    for attempt in range(5):
        results = pools(4).run(parity, family, stage, ep_size, seed + attempt, *others)
        for rank, result in enumerate(results):
            assert not result["over"], f"rank {rank}, attempt {attempt}: {result['over']}"
            assert not result["without"], f"not in the reference: {result['without']}"
            assert max(result["ours"].values()) < 1e-4, "another function; AutoEP computes it too"
        if all(sum(result["status"]["spilled_tokens"]) > 0 for result in results):
            return
    pytest.fail("nothing was spilled: the test tests nothing")


@pytest.mark.parametrize("ep_size", [2, 4])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_families(pools, family, ep_size, seed):
    families.FAMILIES[family]()  # skips what this transformers lacks
    # One ZeRO stage for each EP size, and the other way round for the next family.
    stage = 3 if (list(families.FAMILIES).index(family) + ep_size // 2) % 2 else 1
    check(pools, family, stage, ep_size, seed, {}, {})


@pytest.mark.parametrize(
    "family, stage, ep_size", [("mixtral", 3, 2), ("qwen2_moe", 1, 2), ("qwen3_5_moe", 1, 4)]
)
def test_auxiliary_loss(pools, family, stage, ep_size, seed):
    """Each rank's own, as everywhere in data parallelism; AutoEP alone has Qwen3.5's wrong."""
    families.FAMILIES[family]()
    check(pools, family, stage, ep_size, seed, AUX, {})


def test_greedy_despite_groups(pools, seed):
    """DeepSeek-V2's routers may ignore the groups that the model's config has."""
    without_groups = {"num_expert_groups": 1, "num_limited_groups": 1}
    case = "deepseek_v2", 1, 2, seed, {"topk_method": "greedy"}, without_groups
    check(pools, *case)


@pytest.mark.parametrize("family, stage, ep_size", [("olmoe", 3, 2), ("glm4_moe", 1, 4)])
def test_described_families(pools, family, stage, ep_size, seed):
    """The examples in docs/families.md, in JSON as they stand there."""
    families.DESCRIBED[family]()
    (example,) = re.findall(rf"^`{family}`.*?```json\n(.*?)```", DOCS, re.DOTALL | re.MULTILINE)
    section = json.loads(example)["expert_parallel"]
    patterns = {key: value for key, value in section.items() if key != "autoep_size"}
    check(pools, family, stage, ep_size, seed, {}, patterns)
