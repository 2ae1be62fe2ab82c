"""Programs on several CPU devices, which XLA must be told of before it starts: each its process."""

import os
import subprocess
import sys


def printed(count, *arguments, is_optimised=False, timeout=None):
    """What Python prints, given `arguments`, on `count` devices. Warnings are errors.

    `is_optimised`: compiled as the library's users compile, not as under the marker
    `quickly_compiled`. `timeout`: seconds.
    """
    environment = {
        **os.environ,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(not is_optimised),
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
