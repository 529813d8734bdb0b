"""Each family under llep is the Hugging Face model: loss, logits and every gradient.

The reference is the whole model in fp64 on the tokens of all ranks at once. Routers choose freely;
tokens are drawn until no choice is close, so that rounding cannot send one elsewhere.
"""

from __future__ import annotations

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

MARGIN = 1e-4  # of a router's score; fp32 is wrong by 1e-6 of it
AUX = {"output_router_logits": True, "router_aux_loss_coef": 0.1}


def draw_tokens(model: torch.nn.Module, seed: int) -> torch.Tensor:
    """``[ranks, tokens]`` that no router of the model is in two minds about."""
    margins, topk = [], torch.topk
    generator = torch.Generator().manual_seed(seed)
    device = get_accelerator().current_device_name()
    vocab = model.config.vocab_size

    def measured(scores, k, dim=-1, **options):
        ordered = scores.sort(dim=dim, descending=True).values
        margins.append((ordered[..., k - 1] - ordered[..., k]).min())
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
        found.update(engines.autoep_view(name, parameter.grad, ep_size))
    return loss.item(), found


def parity(
    family: str, stage: int, ep_size: int, seed: int, settings: dict, expert_parallel: dict
) -> dict:
    """On every rank: tensors over budget, errors of AutoEP and ours, and what was spilled."""

    def model():
        return families.enliven(families.build(family, seed, **settings), seed)

    whole = model().double().to(get_accelerator().current_device_name())
    ids = draw_tokens(whole, seed)
    own = ids[dist.get_rank()].unsqueeze(0)
    loss, expected = reference(whole, ids, ep_size, by_rank=bool(settings))
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
        errors = layers.errors(tensors, expected)
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


def check(results: list[dict]) -> None:
    for rank, result in enumerate(results):
        assert not result["over"], f"rank {rank}: {result['over']}"
        assert not result["without"], f"not in the reference: {result['without']}"
        assert max(result["theirs"].values()) < 1e-4, "AutoEP computes another function"
        spilled = result["status"]["spilled_tokens"]
        assert sum(spilled) > 0, "nothing was spilled: the test tests nothing"


@pytest.mark.parametrize("ep_size", [2, 4])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_families(pools, family, ep_size, seed):
    families.FAMILIES[family]()  # skips what this transformers lacks
    # Both stages for every EP size and for half of the families each.
    stage = 3 if (list(families.FAMILIES).index(family) + ep_size // 2) % 2 else 1
    check(pools(4).run(parity, family, stage, ep_size, seed, {}, {}))
