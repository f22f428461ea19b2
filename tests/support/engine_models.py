"""Tiny random checkpoints with tokenizer and processor, in the form that an engine loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_BASIC = ["<unk>", "<s>", "</s>", "<pad>"]
_QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]

_LLAVA_CHAT = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% elif c['type'] == 'video' %}<video>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %} "
    "{% endfor %}ASSISTANT:"
)
_QWEN_CHAT = _LLAVA_CHAT
for _kind in ("image", "video"):
    _placeholder = f"<|vision_start|><|{_kind}_pad|><|vision_end|>"
    _QWEN_CHAT = _QWEN_CHAT.replace(f"<{_kind}>", _placeholder)

SIDE = 112  # pixels of a LLaVA image: 8 x 8 patches


def _tokenizer(special: list[str], **named: str) -> Any:
    """A byte-level tokenizer with a few merges."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["USER: what is in the image? ASSISTANT: a cat", "describe the picture in detail"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=_BASIC + special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(text * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", extra_special_tokens=named,
    )  # fmt: skip


def _text(vocabulary: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "max_position_embeddings": 2048, "initializer_range": 0.3, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 3, **more,
    }  # fmt: skip


def _save(architecture: Any, config: Any, folder: Path) -> None:
    """Saves a model whose answers depend on the image."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = architecture(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and ("vision_tower" in name or "visual" in name):
                parameter.data.normal_(0, 0.15)
            elif parameter.ndim > 1 and "multi_modal_projector" in name:
                parameter.data.normal_(0, 0.2)
    model.float().save_pretrained(folder)


def _as_published(folder: Path) -> None:
    """Names the tower's weights as in published checkpoints; transformers 5 saves other names."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name in list(weights):
        if "vision_tower." in name and "vision_tower.vision_model." not in name:
            inside = name.replace("vision_tower.", "vision_tower.vision_model.", 1)
            weights[inside] = weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})


def clip(**changes: Any) -> Any:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
             "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14,
             "projection_dim": 64}  # fmt: skip
    return transformers.CLIPVisionConfig(**{**shape, **changes})


def llava(
    folder: Path, *, vision: Any = None, text: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """LLaVA-1.5: 64 visual tokens per image, unless another tower is given."""
    tokenizer = _tokenizer(["<image>"], image_token="<image>")
    vision = vision or clip()
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(
            **_text(len(tokenizer), **{"head_dim": 32, **(text or {})})
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **{
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "projector_hidden_act": "gelu",
            **changes,
        },
    )
    _save(transformers.LlavaForConditionalGeneration, config, folder)
    _as_published(folder)
    side = vision.image_size
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token="<image>",
        num_additional_image_tokens=int(isinstance(vision, transformers.CLIPVisionConfig)),
        chat_template=_LLAVA_CHAT,
    ).save_pretrained(folder)
    return folder


def llava_next(folder: Path, *, vision: Any = None, strategy: str = "default") -> Path:
    """LLaVA-NeXT: tiles of 64 patches, three layouts."""
    tokenizer = _tokenizer(["<image>"], image_token="<image>")
    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = transformers.LlavaNextConfig(
        vision_config=vision or clip(),
        text_config=transformers.LlamaConfig(**_text(len(tokenizer), head_dim=32)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        projector_hidden_act="gelu",
        image_grid_pinpoints=pinpoints,
    )
    _save(transformers.LlavaNextForConditionalGeneration, config, folder)
    _as_published(folder)
    transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessor(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=pinpoints,
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy=strategy,
        image_token="<image>",
        num_additional_image_tokens=int(strategy == "default"),
        chat_template=_LLAVA_CHAT,
    ).save_pretrained(folder)
    return folder


def _qwen(
    folder: Path, architecture: Any, config: Any, processor: Any, video: Any, vision: Any, text: Any
) -> Path:
    tokenizer = _tokenizer(_QWEN)
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    whole = config(
        vision_config=vision,
        text_config=_text(len(tokenizer), rope_parameters={**rope, **text.pop("rope", {})}, **text),
        tie_word_embeddings=False,
        **ids,
    )
    _save(architecture, whole, folder)
    pixels = {
        "patch_size": vision["patch_size"], "temporal_patch_size": 2, "merge_size": 2,
        "min_pixels": 28 * 28, "max_pixels": 28 * 28 * 256,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    size = {"shortest_edge": pixels["min_pixels"], "longest_edge": pixels["max_pixels"]}
    processor(
        image_processor=transformers.Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=video(**pixels, size=size),
        chat_template=_QWEN_CHAT,
    ).save_pretrained(folder)
    return folder


def qwen25(folder: Path, **text: Any) -> Path:
    """Qwen2.5-VL with windows of 2 x 2 merged tokens and two blocks of full attention."""
    vision = {
        "depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 56,
        "fullatt_block_indexes": [1, 3], "out_hidden_size": 64, "tokens_per_second": 2,
    }  # fmt: skip
    return _qwen(
        folder,
        transformers.Qwen2_5_VLForConditionalGeneration,
        transformers.Qwen2_5_VLConfig,
        transformers.Qwen2_5_VLProcessor,
        transformers.Qwen2VLVideoProcessor,
        vision,
        text,
    )


def qwen2(folder: Path) -> Path:
    """Qwen2-VL: full attention in all blocks of its vision transformer."""
    vision = {
        "depth": 4, "embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    return _qwen(
        folder,
        transformers.Qwen2VLForConditionalGeneration,
        transformers.Qwen2VLConfig,
        transformers.Qwen2VLProcessor,
        transformers.Qwen2VLVideoProcessor,
        vision,
        {},
    )


_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
            "norm_topk_prob": True}  # fmt: skip
_SHARED = {**_EXPERTS, "shared_expert_intermediate_size": 64}
#: Layers of Qwen3.5. Linear attention in vLLM on a CPU takes bfloat16 only, so that all layers but
#: those of one model here are layers of full attention.
_HYBRID = {
    "layer_types": ["full_attention", "full_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
_LINEAR = {**_HYBRID, "layer_types": ["linear_attention", "full_attention"]}


def _qwen_from_3_on(folder: Path, name: str, deep: list[int], **text: Any) -> Path:
    vision = {
        "depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": deep,
    }  # fmt: skip
    return _qwen(
        folder,
        getattr(transformers, f"{name}ForConditionalGeneration"),
        getattr(transformers, f"{name}Config"),
        transformers.Qwen3VLProcessor,
        transformers.Qwen3VLVideoProcessor,
        vision,
        {
            "head_dim": 32,
            "rope": {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
            **text,
        },
    )


def qwen3(folder: Path) -> Path:
    """Qwen3-VL with features of two earlier blocks."""
    return _qwen_from_3_on(folder, "Qwen3VL", [0, 1])


def qwen3_moe(folder: Path) -> Path:
    _qwen_from_3_on(folder, "Qwen3VLMoe", [0, 1], **_EXPERTS)
    # As published: transformers 5 saves the experts the other way around, and loads both.
    file = folder / "model.safetensors"
    weights = {
        name: weight.transpose(1, 2).contiguous() if ".experts." in name else weight
        for name, weight in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def qwen35(folder: Path) -> Path:
    return _qwen_from_3_on(folder, "Qwen3_5", [], **_HYBRID)


def qwen35_linear(folder: Path) -> Path:
    """Qwen3.5: a layer of linear and one of full attention."""
    return _qwen_from_3_on(folder, "Qwen3_5", [], **_LINEAR)


def qwen35_moe(folder: Path) -> Path:
    return _qwen_from_3_on(folder, "Qwen3_5Moe", [], **_HYBRID, **_SHARED)


def qwen35_moe_linear(folder: Path) -> Path:
    return _qwen_from_3_on(folder, "Qwen3_5Moe", [], **_LINEAR, **_SHARED)


def qwen25_few_positions(folder: Path) -> Path:
    """The same as `qwen25` with rotary embeddings for 4 * 128 positions."""
    return qwen25(folder, max_position_embeddings=128)


def siglip(**changes: Any) -> Any:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
             "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14,
             "vision_use_head": False}  # fmt: skip
    return transformers.SiglipVisionConfig(**{**shape, **changes})


def llava_siglip(folder: Path) -> Path:
    """LLaVA with a tower without [CLS], all of whose features go to the language model."""
    return llava(folder, vision=siglip(), vision_feature_select_strategy="full")


def llava_next_siglip(folder: Path) -> Path:
    return llava_next(folder, vision=siglip(), strategy="full")


def internvl(folder: Path) -> Path:
    """InternVL: up to 7 tiles of 16 tokens, which are 2 x 2 patches."""
    named = {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>",
    }  # fmt: skip
    tokenizer = _tokenizer(list(named.values()), **named)
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=2,
            image_size=[SIDE, SIDE], patch_size=[14, 14], use_qk_norm=True,
        ),
        text_config=transformers.Qwen2Config(**_text(len(tokenizer))),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        downsample_ratio=0.5,
    )  # fmt: skip
    _save(transformers.InternVLForConditionalGeneration, config, folder)
    size = {"height": SIDE, "width": SIDE}
    transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=size, max_patches=6),
        tokenizer=tokenizer,
        video_processor=transformers.InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=_LLAVA_CHAT.replace("<image>", "<IMG_CONTEXT>"),
    ).save_pretrained(folder)
    return folder


def llava_onevision(folder: Path) -> Path:
    """LLaVA-OneVision: tiles of 64 patches, an overview and pooled tiles."""
    tokenizer = _tokenizer(["<image>", "<video>"], image_token="<image>", video_token="<video>")
    pinpoints = [[SIDE * high, SIDE * wide] for high in (1, 2, 4) for wide in (1, 2, 4)]
    config = transformers.LlavaOnevisionConfig(
        vision_config=siglip(),
        text_config=transformers.Qwen2Config(**_text(len(tokenizer))),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_9",
    )
    _save(transformers.LlavaOnevisionForConditionalGeneration, config, folder)
    _as_published(folder)
    size = {"height": SIDE, "width": SIDE}
    transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size=size, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=64,
        vision_feature_select_strategy="full",
        image_token="<image>",
        video_token="<video>",
        chat_template=_LLAVA_CHAT,
    ).save_pretrained(folder)
    return folder


def eagle(folder: Path, target: Path) -> Path:
    """A draft model of the EAGLE kind for a LLaVA: it drafts the last token again.

    It has one layer, which changes nothing, and the embeddings of the target. Its first
    layer has no norm before the attention.
    """
    vocabulary = transformers.AutoConfig.from_pretrained(target).get_text_config().vocab_size
    config = transformers.LlamaConfig(
        **{**_text(vocabulary, head_dim=32), "num_hidden_layers": 1},
        architectures=["LlamaForCausalLM"],
    )
    weights = transformers.LlamaModel(config).layers.state_dict(prefix="layers.")
    del weights["layers.0.input_layernorm.weight"]
    for output in ("self_attn.o_proj", "mlp.down_proj"):
        weights[f"layers.0.{output}.weight"].zero_()
    # Of embedding and features of a token, the features.
    same = torch.eye(config.hidden_size)
    weights["fc.weight"] = torch.cat([torch.zeros_like(same), same], 1)
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


BUILDERS = {
    "llava_onevision": llava_onevision,
    "internvl": internvl,
    "llava": llava,
    "llava_next": llava_next,
    "llava_next_siglip": llava_next_siglip,
    "llava_siglip": llava_siglip,
    "qwen2": qwen2,
    "qwen25": qwen25,
    "qwen25_few_positions": qwen25_few_positions,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "qwen35": qwen35,
    "qwen35_linear": qwen35_linear,
    "qwen35_moe": qwen35_moe,
    "qwen35_moe_linear": qwen35_moe_linear,
}
