"""`python -m dpfa_jax.cli`, the same as `dpfa`."""

import sys

from dpfa_jax.cli.entry import main

sys.exit(main())
