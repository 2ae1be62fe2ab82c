"""Kills one training run at given moments and resumes it; prints what was seen as one JSON line.

Usage: kill_driver.py CSV OUT STEPS KILLS SEED. Every attempt is a fork of this process, which has
imported all there is but has not started JAX, so that an attempt starts within seconds.
"""

import hashlib
import io
import json
import os
import random
import sys
import time
from pathlib import Path

from helpers.tiny_run import PARAMETERS, tiny_config

import dpfa_jax.train.charges as charges
import dpfa_jax.train.run as run
from dpfa_jax.accounting import Budget, Ledger, LedgerFile
from dpfa_jax.dpsgd import DPSGDPlan, DPStep
from dpfa_jax.noise import key_words
from dpfa_jax.train.data import load_data
from dpfa_jax.train.progress import PlainProgress


def attempt(csv: Path, out: Path, steps: int, log: Path) -> None:
    """One run or resumption, with every key and every executed step written down first."""
    stream = log.open("a")

    def note(kind: str, key: object) -> None:
        digest = hashlib.sha256(bytes(key_words(key).tobytes())).hexdigest()
        stream.write(f"{kind} {digest}\n")
        stream.flush()

    real_charge, real_make = charges.charge, run.make_dp_step

    def charge(ledger, release, count):
        ledger, keys = real_charge(ledger, release, count=count)
        for key in keys:
            note("drawn", key)
        return ledger, keys

    def make_dp_step(*args):
        made = real_make(*args)

        def step(state, batch, is_real, key):
            note("released", key)  # before it runs: at least what was released is written down
            return made.step(state, batch, is_real, key)

        return DPStep(made.init, step)

    charges.charge, run.make_dp_step = charge, make_dp_step
    resume = (out / "config.json").exists()
    config = tiny_config(csv, out, steps=steps, evaluate_every=steps, resume=resume)
    run.train(config, PlainProgress(io.StringIO()))


def lines(log: Path) -> list[str]:
    # A line that the kill cut short names no whole key.
    text = log.read_text() if log.exists() else ""
    return [line for line in text.split("\n")[:-1] if len(line.split(" ")[-1]) == 64]


def charged(out: Path) -> int:
    if not (out / "ledger.jsonl").exists():
        return 0
    file = LedgerFile.open(out / "ledger.jsonl", read_only=True)
    try:
        return file.ledger.total_count
    finally:
        file.close()


def main() -> None:
    csv, out, steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    kills, rng = int(sys.argv[4]), random.Random(int(sys.argv[5]))
    examples = len(load_data(str(csv), max_length=8).train_labels)
    log = out.parent / "keys.log"
    # Numbers only, no JAX: the forks inherit the calibration.
    plan = DPSGDPlan.calibrated(
        epsilon=8.0,
        delta=1e-5,
        dataset_size=examples,
        expected_batch_size=64,
        steps=steps,
        l2_clip_norm=1.0,
        num_parameters=PARAMETERS,
    )
    Budget(8.0, 1e-5).require(Ledger(), plan.release.record(), 1)
    seen = {"short": [], "codes": []}
    for number in range(kills + 1):
        before = len([line for line in lines(log) if line.startswith("released")])
        child = os.fork()
        if child == 0:
            code = 3
            try:
                attempt(csv, out, steps, log)
                code = 0
            except BaseException as error:
                print(f"attempt {number}: {type(error).__name__}: {error}", file=sys.stderr)
            finally:
                os._exit(code)
        if number < kills:
            due, deadline = before + rng.randint(1, 3), time.monotonic() + 120
            while time.monotonic() < deadline:
                if len([line for line in lines(log) if line.startswith("released")]) >= due:
                    break
                time.sleep(0.002)
            time.sleep(rng.random() * 0.05)
            os.kill(child, 9)
        _, status = os.waitpid(child, 0)
        seen["codes"].append(os.waitstatus_to_exitcode(status))
        released = len([line for line in lines(log) if line.startswith("released")])
        if (out / "ledger.jsonl").exists() and charged(out) < released:
            seen["short"].append([charged(out), released])
    drawn = [line for line in lines(log) if line.startswith("drawn")]
    released = [line for line in lines(log) if line.startswith("released")]
    seen |= {"drawn": len(drawn), "drawn_once": len(set(drawn))}
    seen |= {"released": len(released), "released_once": len(set(released))}
    seen |= {"charged": charged(out), "planned": plan.steps}
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
