"""The operators against eager PyTorch, and the numerics that they rest on.

Run in benchmarks/: `python -m operators.cpu --help`.
"""
