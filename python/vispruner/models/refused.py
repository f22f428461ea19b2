"""Vision-language models that cannot be pruned: `config.model_type` to the reason."""

from __future__ import annotations

_CROSS = "it reads images by cross-attention, without tokens in the prompt"
_QUERIES = "it condenses an image into a fixed number of queries, which have no place in the image"
_PADDED = "its encoder pads pictures, and the received attention would be read unmasked"

REFUSED = {
    "blip-2": _QUERIES,
    "gemma4": _PADDED,
    "gemma4_unified": _PADDED,
    "idefics": _CROSS,
    "idefics2": _QUERIES,
    "instructblip": _QUERIES,
    "instructblipvideo": _QUERIES,
    "mllama": _CROSS,
    "vipllava": "it uses features of five layers, whose attentions are not comparable",
}
