"""The command line: `dpfa train | predict | plan | account | doctor`."""

from dpfa_jax.cli.entry import main

__all__ = ["main"]
