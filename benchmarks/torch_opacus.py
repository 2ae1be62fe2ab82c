"""Passes of Opacus with ghost clipping: parameters float32, products bfloat16 (autocast)."""

from collections.abc import Callable
from typing import Any

import torch
from opacus import PrivacyEngine
from torch import nn


def attached(
    model: nn.Module, optimizer_of: Callable[[Any], Any], batch: int, clip: float, noise: float
) -> tuple[Callable[[Any, Any, bool], None], Any]:
    """((inputs, targets, is the last of the batch) -> None, the optimizer that steps)."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device, inner = trained[0].device.type, optimizer_of(trained)
    data = torch.utils.data.TensorDataset(torch.zeros(batch, 1))
    model, optimizer, criterion, _ = PrivacyEngine().make_private(
        module=model, optimizer=inner, criterion=nn.CrossEntropyLoss(reduction="mean"),
        data_loader=torch.utils.data.DataLoader(data, batch_size=batch),
        noise_multiplier=noise, max_grad_norm=clip, grad_sample_mode="ghost",
        poisson_sampling=False,
    )  # fmt: skip

    def one_pass(inputs: Any, targets: Any, is_last: bool) -> None:
        optimizer.signal_skip_step(do_skip=not is_last)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            logits = model(inputs)
        loss = criterion(
            logits.float().reshape(-1, logits.shape[-1]), targets.reshape(-1), shape=logits.shape
        )
        loss.backward()
        optimizer.step()

    return one_pass, inner
