"""V6, V10 on several devices: the results of one, no gather, a share of the memory each.

GPUs: python -m pytest -m gpu tests/attention/test_several_devices.py    (-n 4 is faster)
"""

import jax
import pytest
from helpers import forced_devices, several_devices

# A kernel that an earlier test has traced is lowered anew, under this test's own filters.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")

CALLS = (
    "one key head a query head", "grouped", "one key head", "example", "noise of an example",
    "memory",
)  # fmt: skip


def gpus(count):
    found = [device for device in jax.devices() if device.platform == "gpu"]
    if len(found) < count:
        pytest.skip(f"{count} GPUs are due, {len(found)} are here")
    return found[:count]


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", CALLS)
def test_calls_on_gpus(name, count, implementation):
    """Forward, backward, GQA, MQA, both private readouts; batch, and batch and heads in pieces."""
    sizes = several_devices.Sizes()
    case = several_devices.cases(sizes, implementation)[name]
    meshes = several_devices.meshes(gpus(count))
    several_devices.check(sizes, case, meshes, is_kernel=True)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4])
def test_a_private_step_on_gpus(count):
    """The noise of one device, bit for bit, and the whole batch's sum."""
    several_devices.check_step(several_devices.Sizes(rows=256), gpus(count), None)


@pytest.mark.slow  # test_sharding.py has eight devices in the quick suite
@pytest.mark.parametrize("is_quick", [True, False])
def test_the_same_on_cpu_devices(is_quick):
    program = f"from helpers import several_devices as s; s.on_cpu(is_quick={is_quick})"
    assert forced_devices.printed(4, "-c", program) == "passed"
