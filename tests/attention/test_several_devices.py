"""V6, V10 on several devices: the results of one, no gather, a share of the memory each.

GPUs: python -m pytest -m gpu tests/attention/test_several_devices.py    (-n 4 is faster)
"""

import pytest
from helpers import forced_devices, several_devices


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", several_devices.CALLS)
def test_calls_on_gpus(name, count):
    several_devices.check_on_gpus(name, count, "mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("count", [2, 4])
def test_a_private_step_on_gpus(count):
    """The noise of one device, bit for bit, and the whole batch's sum."""
    several_devices.check_step(several_devices.Sizes(rows=256), several_devices.gpus(count), None)


@pytest.mark.slow  # test_sharding.py has eight devices in the quick suite
@pytest.mark.parametrize("is_quick", [True, False])
def test_the_same_on_cpu_devices(is_quick):
    program = f"from helpers import several_devices as s; s.on_cpu(is_quick={is_quick})"
    assert forced_devices.printed(4, "-c", program) == "passed"
