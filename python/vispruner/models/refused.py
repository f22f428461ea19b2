"""Models with images that cannot be pruned, by `config.model_type`, and the reason."""

from __future__ import annotations

_CROSS = "its images are read by cross-attention and take no tokens of the prompt"
_QUERIES = "it condenses an image into a fixed number of queries, none of which is a place"
_PADDED = "its encoder pads patches of pictures, and the attention they receive is read unmasked"

REFUSED = {
    "blip-2": _QUERIES,
    "gemma4": _PADDED,
    "gemma4_unified": _PADDED,
    "idefics": _CROSS,
    "idefics2": _QUERIES,
    "instructblip": _QUERIES,
    "instructblipvideo": _QUERIES,
    "mllama": _CROSS,
    "vipllava": "it takes features of five layers at once, whose attentions do not compare",
}
