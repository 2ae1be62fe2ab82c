"""Passes of fastDP (Bu et al., 2023), book-keeping with flat clipping, as its authors set it up.

`clipping_mode="MixOpt"` chooses for each layer between ghost norms and gradients of each example;
`origin_params` names the first trained layers, so that autograd takes no gradient of the others;
`clipping_fn="Abadi"` is the clipping of the other methods (the default normalises, at equal cost).

It fails under autocast: its clipping factors come out float32 where a layer's inputs and output
gradients are bfloat16, and the products of both are refused. So it is run as its authors run mixed
precision: the model in bfloat16, AdamW on parameters in float32, which the model has a copy of. Its
norms, clipping factors and noise are then bfloat16. Layers that it has no rule for, RMSNorm among
them, it would leave untrained without a word that stops a run: here that is an error.
"""

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from fastDP import PrivacyEngine
from torch import nn
from torch.nn import functional
from torch_models import GPT2, Llama, ViT


def attached(
    model: nn.Module,
    optimizer_of: Callable[[Any], Any],
    batch: int,
    clip: float,
    noise: float,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Callable[[Any, Any, bool], None], Any]:
    """((inputs, targets, is the last of the batch) -> None, the optimizer that steps).

    `dtype` is that of the model; the parameters that the optimizer steps are float32.
    """
    names, copies = zip(
        *((name, own) for name, own in model.named_parameters() if own.requires_grad), strict=True
    )
    parameters = [own.detach().float().clone() for own in copies]
    model.to(dtype)
    optimizer = optimizer_of(parameters)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for stages and the row
        engine = PrivacyEngine(
            model, batch_size=batch, sample_size=100 * batch, num_steps=100,
            noise_multiplier=noise, max_grad_norm=clip, clipping_mode="MixOpt",
            clipping_fn="Abadi", clipping_style="all-layer", loss_reduction="mean",
            origin_params=_first_trained(model),
        )  # fmt: skip
    engine.attach(optimizer)

    def before(*_: Any) -> None:
        left = sorted(set(names) - {name for name, _ in engine.named_params})
        if left:
            layer = type(model.get_submodule(left[0].rpartition(".")[0])).__name__
            raise NotImplementedError(
                f"fastDP clips no gradient of {layer}: {left[0]} and {len(left) - 1} others"
            )
        for parameter, own in zip(parameters, copies, strict=True):
            parameter.grad, own.grad = own.grad.float(), None

    def after(*_: Any) -> None:
        with torch.no_grad():
            torch._foreach_copy_(copies, parameters)
        optimizer.zero_grad(set_to_none=True)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)

    def one_pass(inputs: Any, targets: Any, is_last: bool) -> None:
        logits = model(inputs.to(dtype) if inputs.is_floating_point() else inputs)
        functional.cross_entropy(
            logits.float().reshape(-1, logits.shape[-1]), targets.reshape(-1)
        ).backward()
        if is_last:
            optimizer.step()

    return one_pass, optimizer


def _first_trained(model: nn.Module) -> list[str]:
    """Parts of names: the layers that no trained layer comes before, a bias where there is one."""
    if isinstance(model, ViT):
        return ["patches.bias", "places"]
    if isinstance(model, GPT2):
        return ["tokens", "places"]
    assert isinstance(model, Llama)
    if model.tokens.weight.requires_grad:
        return ["tokens"]
    return ["blocks.0.query.a", "blocks.0.value.a"]
