"""Attention on Hopper GPUs in Pallas Mosaic GPU; nothing here is imported before it is tried."""
