"""The model and its processor: small instances of standard transformers classes."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vispruner.embedded.scenes import Style, vocabulary

from .recipe import Recipe

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(5)
MEAN, STD = 0.5, 0.25  # of the pixels, in [0, 1]
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)


def word_tokenizer(style: Style) -> Tokenizer:
    """One token per word, case-insensitive; a question mark is a word."""
    words = (*SPECIAL, *vocabulary(style))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[?.,!]"), "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def processor(recipe: Recipe) -> Any:
    """The `LlavaProcessor` that is saved with the model."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(recipe.style),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    side = recipe.style.image_size
    image_processor = CLIPImageProcessor(
        do_resize=True,
        size={"height": side, "width": side},
        do_center_crop=False,
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=recipe.vision.patch_size,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build(recipe: Recipe, seed: int) -> Any:
    """A new `LlavaForConditionalGeneration`."""
    vision, language = recipe.vision, recipe.language
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads,
            image_size=recipe.style.image_size,
            patch_size=vision.patch_size,
            hidden_act="gelu",
        ),
        text_config=LlamaConfig(
            vocab_size=len(SPECIAL) + len(vocabulary(recipe.style)),
            hidden_size=language.hidden_size,
            intermediate_size=language.intermediate_size,
            num_hidden_layers=language.layers,
            num_attention_heads=language.heads,
            num_key_value_heads=language.heads,
            max_position_embeddings=recipe.patches + 320,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            tie_word_embeddings=False,
        ),
        image_token_index=IMAGE,
        image_seq_length=recipe.patches,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    _initialize(model, language.layers)
    model.generation_config.pad_token_id = PAD
    model.generation_config.bos_token_id = BOS
    model.generation_config.eos_token_id = EOS
    model.generation_config.do_sample = False
    return model


def _initialize(model: Any, layers: int) -> None:
    """Initializes for unit-variance activations, which small widths need to learn fast."""
    trained = nn.ModuleDict(
        {
            "projector": model.model.multi_modal_projector,
            "language_model": model.model.language_model,
            "head": model.lm_head,
        }
    )
    for name, module in trained.named_modules():
        if isinstance(module, nn.Linear):
            writes_residual = name.endswith(("o_proj", "down_proj"))
            gain = (2 * layers) ** -0.5 if writes_residual else 1.0
            nn.init.normal_(module.weight, 0, gain * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.model.language_model.get_input_embeddings().weight, 0, 0.5)
