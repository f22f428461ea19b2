"""Fine-tune a model on pruned prompts; the labels of dropped tokens are removed with them.

python examples/training.py
"""

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vispruner
from vispruner import embedded
from vispruner.embedded import scenes

model = LlavaForConditionalGeneration.from_pretrained(embedded.path(), dtype=torch.float32)
processor = AutoProcessor.from_pretrained(embedded.path())
optimizer = torch.optim.AdamW(model.model.multi_modal_projector.parameters(), lr=1e-4)


def batch(seed: int) -> dict[str, torch.Tensor]:
    """Four questions about a drawn scene; only the answers have labels."""
    scene = scenes.draw(seed)
    pairs = scene.questions[:4]
    texts = []
    for question, answer in pairs:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        texts.append((prompt, f"{prompt} {answer}"))
    inputs = processor(
        images=[scene.image] * len(texts),
        text=[whole for _, whole in texts],
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for row, (prompt, _) in enumerate(texts):
        length = processor(images=scene.image, text=prompt, return_tensors="pt")["input_ids"].shape[
            1
        ]
        labels[row, :length] = -100
    return {**inputs, "labels": labels}


vispruner.apply(model, k=32)
model.train()
for step in range(4):
    loss = model(**batch(seed=1000 + step)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
