"""`dpfa plan`: epsilon against noise, batch and epochs, before any data are touched."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from dpfa_jax.accounting import calibrate
from dpfa_jax.accounting.calibration import Calibration
from dpfa_jax.accounting.guarantee import answers_epsilon
from dpfa_jax.accounting.losses import COARSE
from dpfa_jax.cli.entry import DONE
from dpfa_jax.cli.table import print_table
from dpfa_jax.core import ArgumentError, checks
from dpfa_jax.release import TrainingRelease
from dpfa_jax.train.noise_sums import summed_noise

# Calibration stops within 0.1 % of the budget.
_CLOSE = 0.99


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """What training will cost, before you train: epsilon for each noise, batch and epochs.

    Attributes:
      examples: public number of training examples.
      batch: expected batch sizes to compare.
      epochs: passes over the data to compare; steps = epochs * examples / batch.
      noise: noise multipliers to compare.
      delta: chance that the promise of epsilon fails; below 1 / examples.
      epsilon: also find the least noise that keeps this budget, for each batch and epochs.
      parameters: trainable numbers of the model.
      noise_bands: steps over which the noise is correlated (banded matrix factorisation); 1 is
        independent noise. With --epsilon, a column compares the noise in the parameters with that
        of independent noise at the same budget.
      out: write a plot here, as .svg or .png.
    """

    examples: int = 5485
    batch: tuple[int, ...] = (256, 512)
    epochs: tuple[float, ...] = (5.0, 10.0, 20.0)
    noise: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0)
    delta: float = 1e-5
    epsilon: float | None = None
    parameters: int = 100_000
    noise_bands: int = 1
    out: Path | None = None


def run(arguments: list[str]) -> int:
    """Prints the table, writes the plot, returns the exit code."""
    config = tyro.cli(PlanConfig, prog="dpfa plan", args=arguments)
    _check(config)
    noises = sorted(config.noise)
    costs: dict[tuple[int, float], list[float]] = {}
    for batch in config.batch:
        for epochs in config.epochs:
            steps = _steps(config, batch, epochs)
            costs[batch, epochs] = [_cost(config, batch, steps, noise) for noise in noises]
    header = ["batch", "epochs", "steps", *(f"noise {noise:g}" for noise in noises)]
    if config.epsilon is not None:
        header.append(f"noise for epsilon {config.epsilon:g}")
        if config.noise_bands > 1:
            header.append("in the parameters, against independent")
    rows = []
    for (batch, epochs), line in costs.items():
        steps = _steps(config, batch, epochs)
        row = [f"{batch:,}", f"{epochs:g}", f"{steps:,}", *(f"{cost:.2f}" for cost in line)]
        if config.epsilon is not None:
            row += _for_epsilon(config, batch, steps, config.epsilon)
        rows.append(row)
    print(f"epsilon at delta {config.delta:g}, {config.examples:,} examples, {_batches(config)}")
    print_table(header, rows)
    if config.out is not None:
        _plot(config.out, noises, costs, config.delta)
        print(f"plot: {config.out}")
    return DONE


def _check(config: PlanConfig) -> None:
    checks.count("examples", config.examples)
    checks.delta("delta", config.delta, units=config.examples)
    checks.count("parameters", config.parameters)
    checks.count("noise_bands", config.noise_bands)
    for name in ("batch", "epochs", "noise"):
        for value in getattr(config, name):
            checks.positive(name, value)
        if not getattr(config, name):
            raise ArgumentError(name, (), "nothing to compare", "Pass at least one number.")
    for batch in config.batch:
        if batch > config.examples:
            raise ArgumentError(
                "batch", batch, f"more than the {config.examples} examples", "Pass a smaller one."
            )
        if batch > config.examples // config.noise_bands:
            raise ArgumentError(
                "noise_bands",
                config.noise_bands,
                f"a step draws from one of {config.noise_bands} groups of "
                f"{config.examples // config.noise_bands} examples, fewer than batch = {batch}",
                "Pass fewer bands or a smaller batch.",
            )
        for epochs in config.epochs:
            if config.noise_bands > _steps(config, batch, epochs):
                raise ArgumentError(
                    "noise_bands",
                    config.noise_bands,
                    f"more than the steps of {epochs:g} epochs in batches of {batch}",
                    "Pass fewer bands.",
                )
    if config.epsilon is not None:
        checks.positive("epsilon", config.epsilon)
    if config.out is not None and config.out.suffix not in (".svg", ".png"):
        raise ArgumentError("out", str(config.out), "neither .svg nor .png", "Rename it.")


def _steps(config: PlanConfig, batch: int, epochs: float) -> int:
    return max(1, round(epochs * config.examples / batch))


def _batches(config: PlanConfig) -> str:
    if config.noise_bands == 1:
        return "Poisson batches"
    return f"noise correlated over {config.noise_bands} steps, cyclic Poisson batches"


def _release(config: PlanConfig, batch: int, noise: float, bands: int) -> TrainingRelease:
    # What correlated noise costs depends on the number of bands, not on their weights.
    strategy = (1.0,) * bands
    return TrainingRelease(
        1.0, noise, config.examples, batch, config.parameters, noise_strategy=strategy
    )


def _cost(config: PlanConfig, batch: int, steps: int, noise: float) -> float:
    record = _release(config, batch, noise, config.noise_bands).record()
    return answers_epsilon(((record, steps),), config.delta, "pld", COARSE)


def _for_epsilon(config: PlanConfig, batch: int, steps: int, epsilon: float) -> list[str]:
    """The least noise, and where it is correlated, what is left of it in the parameters."""
    found = _calibrated(config, batch, steps, epsilon, config.noise_bands)
    noise = found.release.noise_multiplier
    cell = f"{noise:.3f}"
    if found.epsilon < _CLOSE * epsilon:  # the least noise that is planned for
        cell += f" (spends {found.epsilon:.3g})"
    if config.noise_bands == 1:
        return [cell]
    from dpfa_jax.dpsgd import banded_strategy  # heavy: only where it is asked for

    independent = _calibrated(config, batch, steps, epsilon, 1).release.noise_multiplier
    correlated = summed_noise(banded_strategy(steps, config.noise_bands), steps)
    ratio = noise * correlated.mean / (independent * summed_noise((1.0,), steps).mean)
    return [cell, f"{ratio:.2f}"]


def _calibrated(
    config: PlanConfig, batch: int, steps: int, epsilon: float, bands: int
) -> Calibration[TrainingRelease]:
    release = _release(config, batch, 1.0, bands)
    return calibrate(release, delta=config.delta, epsilon=epsilon, count=steps)


def _plot(
    path: Path, noises: Sequence[float], costs: dict[tuple[int, float], list[float]], delta: float
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes: Any = figure.subplots()
    batches = sorted({batch for batch, _ in costs})
    epochs = sorted({epoch for _, epoch in costs})
    styles = ["-", "--", ":", "-."]
    for (batch, epoch), line in costs.items():
        colour = f"C{epochs.index(epoch)}"
        style = styles[batches.index(batch) % len(styles)]
        label = f"{epoch:g} epochs, batch {batch}"
        axes.plot(noises, line, style, color=colour, marker="o", markersize=3, label=label)
    axes.set_xlabel("noise multiplier (standard deviation / clip norm)")
    axes.set_ylabel(f"epsilon at delta {delta:g}")
    top = max(cost for line in costs.values() for cost in line)
    if math.isfinite(top):
        axes.set_ylim(0, 1.05 * top)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)
