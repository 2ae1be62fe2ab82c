"""How a run clips and noises, in words and as JSON values: for the report and the ledger."""

import dataclasses
import math
from typing import Any

import numpy as np
from jaxtyping import Array, Float32

from dpfa_jax.accounting import calibrate
from dpfa_jax.core import ArgumentError
from dpfa_jax.dpsgd import DPSGDPlan

# Calibration stops within 0.1 % of what was asked for; what is further below has another reason.
_CLOSE = 0.99
_LESS = 0.98


def privacy_options(plan: DPSGDPlan) -> dict[str, Any]:
    """What a run was asked for beside its budget, as JSON values; named like the settings."""
    adaptive = plan.release.adaptive_clipping
    return {
        "clipping": "flat" if plan.groups is None else "per-layer",
        "adaptive_clipping": None if adaptive is None else dataclasses.asdict(adaptive),
        "noise_bands": len(plan.release.noise_strategy),
    }


def clip_norms(
    plan: DPSGDPlan, present: Float32[Array, " groups"] | tuple[()] = ()
) -> dict[str, float]:
    """Clip norm of each group by its path; of the one flat group by "".

    `present`: those that adaptive clipping has come to, which are released; else the plan's.
    """
    norms = plan.release.l2_clip_norms if len(present) == 0 else np.asarray(present).tolist()
    paths = [""] if plan.groups is None else [", ".join(group) for group in plan.groups]
    return dict(zip(paths, norms, strict=True))


def options_text(plan: DPSGDPlan) -> str:
    """The options in one sentence; empty where all are the defaults."""
    parts, release = [], plan.release
    if plan.groups is not None:
        parts.append(f"clipped per layer, in {len(plan.groups)} groups")
    adaptive = release.adaptive_clipping
    if adaptive is not None:
        parts.append(
            f"clip norms follow the {adaptive.quantile:g} quantile of the gradients' norms, for "
            f"{100 * adaptive.budget_share:g} % of the noise's precision"
        )
    if len(release.noise_strategy) > 1:
        parts.append(
            f"noise correlated over {len(release.noise_strategy)} steps, cyclic Poisson batches"
        )
    text = "; ".join(parts)
    return text[:1].upper() + text[1:]


def option_rows(options: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of the report's table, from its `options`."""
    first, last = options["l2_clip_norms"], options["last_l2_clip_norms"]
    adaptive, bands = options["adaptive_clipping"], options["noise_bands"]
    norm = f"{math.hypot(*first.values()):g}"
    if options["clipping"] == "per-layer":
        norm += f" in all, {_range(first)} for each parameter's part"
    if adaptive is not None:
        norm = (
            f"{norm}, at first; then the {adaptive['quantile']:g} quantile of the norms, estimated "
            f"with {100 * adaptive['budget_share']:g} % of the noise's precision; {_range(last)} "
            "at the end"
        )
    noise = "independent from step to step"
    if bands > 1:
        noise = f"correlated over {bands} steps (banded matrix factorisation, cyclic batches)"
    return [
        ("clipping", options["clipping"] + ("" if adaptive is None else ", adaptive")),
        ("clip norm of one example's gradient", norm),
        ("noise", noise),
    ]


def less_than_asked(plan: DPSGDPlan, epsilon: float) -> str | None:
    """Says that, and why, a plan spends clearly less than `epsilon`; None where it does not."""
    if plan.epsilon >= _CLOSE * epsilon:
        return None
    return (
        f"epsilon {epsilon:g} was asked for; this run spends at most {plan.epsilon:.3g}: "
        f"{_why_no_less_noise(plan)}"
    )


def _why_no_less_noise(plan: DPSGDPlan) -> str:
    noise = plan.release.noise_multiplier
    less = dataclasses.replace(plan.release, noise_multiplier=_LESS * noise)
    try:
        calibrate(less, delta=plan.delta, count=plan.steps)
    except ArgumentError as error:
        return (
            f"with a noise multiplier below {noise:.3g}, {error.parameter} = {error.value:g} would "
            f"be {error.problem}"
        )
    return f"no run is planned with a noise multiplier below {noise:.3g}"


def _range(norms: dict[str, float]) -> str:
    low, high = min(norms.values()), max(norms.values())
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"
