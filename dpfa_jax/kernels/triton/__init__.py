"""Attention on Ampere and Ada GPUs in Pallas Triton; nothing here is imported before it is tried.

The folder goes with one line of `kernels.dispatch` and `attention.checks`.
"""
