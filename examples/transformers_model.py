"""Answer a question with and without pruning.

The default is the bundled model, so this runs offline on a CPU:

    python examples/transformers_model.py
    python examples/transformers_model.py llava-hf/llava-1.5-7b-hf photo.jpg "What is this?" 64
"""

import sys

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vispruner
from vispruner import embedded

if len(sys.argv) > 1:
    name, path, question, k = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
else:
    example = embedded.example()
    name, path, question, k = embedded.path(), example.image, example.questions[0][0], 32

device = "cuda" if torch.cuda.is_available() else "cpu"
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto").to(device).eval()
processor = AutoProcessor.from_pretrained(name)
content = [{"type": "image"}, {"type": "text", "text": question}]
prompt = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
)
image = Image.open(path).convert("RGB")
inputs = processor(images=image, text=prompt, return_tensors="pt").to(device, model.dtype)


def answer() -> str:
    tokens = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


print("unpruned:", answer())
with vispruner.apply(model, k=k) as pruner:
    print("pruned:  ", answer())
    print(f"{pruner.last.tokens_before} -> {pruner.last.tokens_after} visual tokens")
    print({phase: round(ms, 2) for phase, ms in pruner.last.milliseconds.items()})
