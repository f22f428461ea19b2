"""VisPruner for vision-language models: what stands around the operators of `vispruner_cuda`.

Today this package holds the demo (`python -m vispruner.demo`) and its parts: `clip` runs a CLIP
vision tower and collects the features and [CLS] attention that pruning needs, `pictures` draws
what was kept. Its modules need the extra `vispruner-cuda[transformers]`; importing the package
itself needs nothing.
"""
