"""Ask a vLLM server that prunes, with an optional k per request.

Start the server first, here with the bundled model (docs/serving.md):

    python -m vllm.entrypoints.openai.api_server --served-model-name scenes \
        --model "$(python -c 'import vispruner.embedded as e; print(e.path())')" \
        --max-model-len 512 --enforce-eager --hf-overrides '{"vispruner": {"k": 64}}'
    python examples/vllm_client.py http://localhost:8000/v1 scenes
"""

import base64
import sys
from pathlib import Path

from openai import OpenAI

from vispruner import embedded

url, model = sys.argv[1:3] if len(sys.argv) > 2 else ("http://localhost:8000/v1", "scenes")
example = embedded.example()
data = base64.b64encode(Path(example.image).read_bytes()).decode()
image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
client = OpenAI(base_url=url, api_key="none")
for k in (None, 32, 8):
    for question, expected in example.questions[:3]:
        said = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": [image, {"type": "text", "text": question}]}],
            max_completion_tokens=16,
            # at most the server's k, which is the default
            extra_body={} if k is None else {"vllm_xargs": {"vispruner_k": k}},
        )
        text = said.choices[0].message.content
        prompt = said.usage.prompt_tokens
        print(f"k={k or 'of the server'}: {question} {text} (expected {expected}; {prompt} tokens)")
