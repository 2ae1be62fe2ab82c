"""`dpfa train`."""

import dataclasses
import sys
from typing import Any

import tyro

from dpfa_jax.cli.entry import DONE, INTERRUPTED
from dpfa_jax.cli.program import program, quoted
from dpfa_jax.train.config import PLACE, TrainConfig, read_config
from dpfa_jax.train.run_folder import stored_config

_PROGRAM = "dpfa train"


def run(arguments: list[str]) -> int:
    """Trains, prints where the result lies, and returns the exit code."""
    config = parse(arguments)
    config.check()
    from dpfa_jax.train.run import train  # heavy: only once the arguments make sense

    report = train(config)
    if not report["finished"]:
        print(
            f"\nStopped after step {report['steps']} of {report['steps_planned']}; checkpoint, "
            f"ledger, report and model are in {report['folder']}.\n"
            f"Go on with: {program()} train --resume --out {quoted(report['folder'])}",
            file=sys.stderr,
        )
        return INTERRUPTED
    print(_summary(report))
    return DONE


def parse(arguments: list[str]) -> TrainConfig:
    """Flags over the config file, over the stored settings of a resumed run, over defaults.

    Errors: ArgumentError, RunError; SystemExit from tyro for a malformed flag.
    """
    flags = tyro.cli(TrainConfig, prog=_PROGRAM, args=arguments)
    if not flags.resume and flags.config is None:
        return flags
    flags.check()
    base = TrainConfig()
    if flags.resume and flags.out is not None:
        base = stored_config(flags.out)
    if flags.config is not None:
        base = dataclasses.replace(base, **_written(read_config(flags.config)))
    return tyro.cli(TrainConfig, prog=_PROGRAM, args=arguments, default=base)


def _written(config: TrainConfig) -> dict[str, Any]:
    """The settings of a file that are not defaults; where the run lives is the flags' to say."""
    plain = TrainConfig()
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(plain, field.name)
        and (field.name not in PLACE or field.name == "out")
    }


def _summary(report: dict) -> str:
    spent = "none: INSECURE test noise" if report["epsilon"] is None else f"{report['epsilon']:.3f}"
    lines = [
        "",
        f"accuracy         {100 * report['accuracy']:.1f} % on {report['data']['test_examples']} "
        "held-out examples",
        f"  one class      {100 * report['accuracy_majority']:.1f} %",
    ]
    if report["accuracy_nonprivate"] is not None:
        lines.append(f"  no privacy     {100 * report['accuracy_nonprivate']:.1f} %")
    if report["epsilon_note"] is not None:
        lines.append(f"note             {report['epsilon_note']}")
    folder = quoted(report["folder"])
    lines += [
        f"epsilon          {spent} of {report['epsilon_budget']:g} at delta {report['delta']:g}",
        f"time             {report['seconds_total']:.0f} s, "
        f"peak memory {report['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"report           {report['folder']}/report.html",
        f"check it         {program()} account {folder}",
    ]
    if report["data"]["kind"] == "text":
        lines.append(f'try it           {program()} predict --model {folder} "..."')
    return "\n".join(lines)
