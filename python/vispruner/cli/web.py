"""Show pruning in a browser: an image, its retained tokens, and both answers.

Serves a page on this machine. Upload an image, move the slider, and ask a question: the pruned and
the unpruned model answer side by side. Needs the extra `web` (gradio).
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    METHODS,
    PARAMETERS,
    CommandError,
    add_device,
    add_model,
    answer,
    apply_budget,
    device_of,
    load_model,
    model_inputs,
    one_line,
    read_image,
)
from .numeric import positive, whole

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..selection import Budget

#: Of the slider of each parameter: minimum, maximum and step.
SLIDERS = {
    "important_ratio": (0, 1, 0.05),
    "step": (1, 64, 1),
    "seed": (0, 99, 1),
    "scope_alpha": (0, 4, 0.25),
    "mmr_lambda": (0, 4, 0.05),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 accepts other machines")
    add("--port", type=whole(1, 65535), default=7860)
    add("--max-upload", type=positive, default=20, metavar="MB", help="largest image file")
    add("--max-new-tokens", type=positive, default=64, help="longest answer, in tokens")
    add_model(parser)
    add_device(parser)


class Viewer:
    """Computes the content of the page, with one model behind one lock."""

    def __init__(
        self, model: Any, processor: Any, device: torch.device, max_new_tokens: int
    ) -> None:
        self.model, self.processor, self.device = model, processor, device
        self.max_new_tokens = max_new_tokens
        self._lock = threading.Lock()
        self._warm = False

    def draw(
        self, image: Image.Image, k: int, method: str, parameters: Mapping[str, float]
    ) -> tuple[Image.Image, str, int]:
        """The drawing of `vispruner show`, the token counts as text, and the largest useful k."""
        from .show import montage, retained_by

        budget = self._budget(k, method, parameters)
        with self._lock:
            found = retained_by(self.model, self.processor, budget, self.device, [image])
        cells = [one.grid[0] * one.grid[1] for one in found]
        kept = sum(len(one.important) + len(one.diverse) for one in found)
        return (
            montage(found, method),
            f"{kept} of {sum(cells)} visual tokens are retained",
            max(cells),
        )

    def ask(
        self,
        image: Image.Image,
        question: str,
        k: int,
        method: str,
        parameters: Mapping[str, float],
    ) -> list[list[str]]:
        """Rows of both models: name, answer, visual tokens, prefill and total milliseconds."""
        import torch

        from ..phases import phases_of, unpruned

        if not question.strip():
            raise CommandError("type a question")
        budget = self._budget(k, method, parameters)

        def row(name: str, text: str, tokens: int, times: dict[str, float]) -> list[str]:
            return [name, text, str(tokens), f"{times['prefill']:.1f}", f"{times['total']:.1f}"]

        with self._lock, torch.no_grad():
            try:
                inputs = model_inputs(self.processor, image, question, self.device)
                call = (self.model, self.processor, inputs, self.max_new_tokens)
                if not self._warm:  # the first run is slower than later ones
                    answer(*call)
                    self._warm = True
                with unpruned(self.model) as clock:
                    whole = answer(*call)
                    spent = phases_of(clock.milliseconds())
                with apply_budget(self.model, budget) as pruner:
                    text = answer(*call)
                    last = pruner.last
                    assert last is not None
                    less = phases_of(last.milliseconds)
            except (ValueError, TypeError, RuntimeError) as error:
                raise CommandError(one_line(error)) from error
        return [
            row("unpruned", whole, last.tokens_before, spent),
            row("pruned", text, last.tokens_after, less),
        ]

    @staticmethod
    def _budget(k: int, method: str, parameters: Mapping[str, float]) -> Budget:
        """Of the parameters of all methods, those of this one."""
        from ..selection import Budget

        own = {
            name: PARAMETERS[name][0](value)
            for name, value in parameters.items()
            if PARAMETERS[name][1] == method
        }
        try:
            return Budget(int(k), method=method, **own)
        except (ValueError, TypeError) as error:
            raise CommandError(one_line(error)) from error


def page(viewer: Viewer) -> Any:
    """The page, a `gradio.Blocks`; it calls only the viewer."""
    import gradio as gr

    from .. import embedded

    example = embedded.example()

    def refuse(error: CommandError) -> Any:
        return gr.Error(one_line(error), duration=None)

    def shown(path: str | None) -> Image.Image:
        if not path:
            raise CommandError("upload an image first")
        return read_image(Path(path))

    def draw(path: str | None, k: int, method: str, *values: float) -> tuple[Any, Any, str]:
        """The slider with the image's largest k, the drawing and the token counts."""
        if not path:
            return gr.update(), None, ""
        try:
            drawn, text, most = viewer.draw(shown(path), k, method, named(values))
        except CommandError as error:
            raise refuse(error) from error
        return gr.update(maximum=most, value=min(int(k), most)), drawn, text

    def ask(
        path: str | None, question: str, k: int, method: str, *values: float
    ) -> list[list[str]]:
        try:
            return viewer.ask(shown(path), question, k, method, named(values))
        except CommandError as error:
            raise refuse(error) from error

    def named(values: Sequence[float]) -> dict[str, float]:
        return dict(zip(PARAMETERS, values, strict=True))

    def parameters_of(method: str) -> list[Any]:
        """Shows the parameters of this method alone."""
        return [gr.update(visible=owner == method) for _, owner, *_ in PARAMETERS.values()]

    with gr.Blocks(title="vispruner", analytics_enabled=False) as blocks:
        gr.Markdown(
            "## Visual token pruning\n"
            "Upload an image, set the number of retained tokens, and ask a question."
        )
        with gr.Row():
            picture = gr.Image(
                example.image,
                type="filepath",
                sources=["upload", "clipboard"],
                label="Image",
                elem_id="picture",
                scale=1,
            )
            kept = gr.Image(
                label="Retained tokens",
                show_label=False,
                elem_id="kept",
                scale=3,
                interactive=False,
                buttons=["download", "fullscreen"],
            )
        text = gr.Markdown(elem_id="counts")
        with gr.Row():
            k = gr.Slider(1, 196, value=22, step=1, label="k: retained tokens", elem_id="k")
            method = gr.Dropdown(METHODS, value=METHODS[0], label="method", elem_id="method")
            parameters = [
                gr.Slider(
                    *SLIDERS[name][:2],
                    value=default,
                    step=SLIDERS[name][2],
                    label=text,
                    visible=owner == METHODS[0],
                )
                for name, (_, owner, default, text) in PARAMETERS.items()
            ]
        with gr.Row():
            question = gr.Textbox(example.questions[0][0], label="Question", scale=4)
            button = gr.Button("Ask", variant="primary", elem_id="ask")
        answers = gr.Dataframe(
            headers=["model", "answer", "visual tokens", "prefill ms", "total ms"],
            interactive=False,
            elem_id="answers",
        )
        settings = [k, method, *parameters]
        # One call at a time: there is only one model.
        once = {"concurrency_limit": 1, "concurrency_id": "model"}
        sliders = [slider.release for slider in (k, *parameters)]
        method.change(parameters_of, method, parameters)
        gr.on(
            [blocks.load, picture.change, method.change, *sliders],
            draw,
            [picture, *settings],
            [k, kept, text],
            **once,
        )
        gr.on(
            [button.click, question.submit],
            ask,
            [picture, question, *settings],
            answers,
            **once,
        )
    return blocks


def run(options: argparse.Namespace) -> int:
    import os

    # No telemetry; the page works without a network.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio as gr

    device = device_of(options)
    model, processor = load_model(options, device)
    viewer = Viewer(model, processor, device, options.max_new_tokens)
    viewer_page = page(viewer)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        viewer_page.launch(
            server_name=options.host,
            server_port=options.port,
            max_file_size=options.max_upload * 2**20,
            footer_links=[],
            theme=theme,
            show_error=True,
        )
    except OSError as error:
        raise CommandError(
            f"argument --port: cannot listen on {options.host}:{options.port}: {one_line(error)}"
        ) from error
    return 0
