"""Marker `quickly_compiled`: XLA optimises nothing where a test compiles more than it computes.

A program with noise compiles five times as fast. Slow tests of the same file are compiled as the
library's users compile them.
"""

import jax
import pytest

# A flag, not an option of one `jit`: it also reaches what a call compiles inside. Subprocesses
# take the environment variable of the same name.
_FLAG = "jax_disable_most_optimizations"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Around the fixtures too; what was compiled unlike the next test's programs is forgotten."""
    is_quick = "quickly_compiled" in item.keywords and "slow" not in item.keywords
    if is_quick != jax.config.values[_FLAG]:
        jax.clear_caches()
        jax.config.update(_FLAG, is_quick)
    return (yield)
