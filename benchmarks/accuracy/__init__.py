"""The embedded model and what pruning costs it: training, evaluation, analyses, plots.

Run in benchmarks/: `python -m accuracy --help`.
"""
