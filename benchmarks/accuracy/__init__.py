"""Training of the embedded model, and its accuracy with pruning: evaluation, analyses, plots.

Run in benchmarks/: `python -m accuracy --help`.
"""
