"""Look at pruning in a browser: a picture, the tokens it keeps, and both answers.

Serves a page for this machine. Drop a picture, move the slider, and ask: the pruned and the
unpruned model answer side by side. Needs the extra `web` (gradio).
"""

from __future__ import annotations

import argparse
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    CommandError,
    add_device,
    add_model,
    apply_budget,
    device_of,
    load_model,
    model_inputs,
    one_line,
    phases_of,
    positive,
    read_image,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..selection import Budget
    from .show import Picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    add("--port", type=positive, default=7860)
    add("--max-upload", type=positive, default=20, metavar="MB", help="largest picture file")
    add("--max-new-tokens", type=positive, default=64, help="longest answer, in tokens")
    add_model(parser)
    add_device(parser)


class Viewer:
    """A model behind one lock: what the page shows of it."""

    def __init__(
        self, model: Any, processor: Any, device: torch.device, max_new_tokens: int
    ) -> None:
        self.model, self.processor, self.device = model, processor, device
        self.max_new_tokens = max_new_tokens
        self._lock = threading.Lock()
        self._warm = False

    def tokens(self, image: Image.Image) -> int:
        """Visual tokens of the picture, or of its largest tile: the highest k that drops any."""
        found = self._kept(image, self._budget(1, 0.5, 8))
        return max(picture.grid[0] * picture.grid[1] for picture in found)

    def draw(
        self, image: Image.Image, k: int, important_ratio: float, step: int
    ) -> tuple[Image.Image, str]:
        """The picture with its kept tokens, and how many there are."""
        from . import pictures
        from .show import PANEL

        found = self._kept(image, self._budget(k, important_ratio, step))
        panels = [
            pictures.draw_kept(
                one.seen, one.grid, one.important, one.diverse, cell=max(4, PANEL // max(one.grid))
            )
            for one in found
        ]
        before = sum(one.grid[0] * one.grid[1] for one in found)
        important = sum(len(one.important) for one in found)
        diverse = sum(len(one.diverse) for one in found)
        text = (
            f"{important + diverse} of {before} visual tokens are kept: {important} for their "
            f"attention (orange), {diverse} for their diversity (blue)"
        )
        return _beside(panels), text

    def ask(
        self, image: Image.Image, question: str, k: int, important_ratio: float, step: int
    ) -> list[list[str]]:
        """A row per way: name, answer, visual tokens, milliseconds of prefill and in all."""
        import torch

        from ..phases import unpruned

        if not question.strip():
            raise CommandError("type a question")
        budget = self._budget(k, important_ratio, step)
        inputs = model_inputs(self.processor, image, question, self.device)

        def answer() -> str:
            sequences = self.model.generate(
                **inputs, max_new_tokens=self.max_new_tokens, do_sample=False
            )
            new = sequences[:, inputs["input_ids"].shape[1] :]
            return str(self.processor.batch_decode(new, skip_special_tokens=True)[0]).strip()

        def row(name: str, text: str, tokens: int, times: dict[str, float]) -> list[str]:
            return [name, text, str(tokens), f"{times['prefill']:.1f}", f"{times['total']:.1f}"]

        with self._lock, torch.no_grad():
            try:
                if not self._warm:  # the first run pays for what later ones find ready
                    answer()
                    self._warm = True
                with unpruned(self.model) as clock:
                    whole = answer()
                    spent = phases_of(clock.milliseconds())
                with apply_budget(self.model, budget) as pruner:
                    text = answer()
                    last = pruner.last
                    assert last is not None
                    less = phases_of(last.milliseconds)
            except (ValueError, TypeError, RuntimeError) as error:
                raise CommandError(one_line(error)) from error
        return [
            row("unpruned", whole, last.tokens_before, spent),
            row("pruned", text, last.tokens_after, less),
        ]

    def _kept(self, image: Image.Image, budget: Budget) -> list[Picture]:
        from .show import kept_by

        with self._lock:
            return kept_by(self.model, self.processor, budget, self.device, [image])

    @staticmethod
    def _budget(k: int, important_ratio: float, step: int) -> Budget:
        from ..selection import Budget

        try:
            return Budget(int(k), None, important_ratio, int(step))
        except ValueError as error:
            raise CommandError(one_line(error)) from error


def _beside(panels: list[Image.Image]) -> Image.Image:
    from PIL import Image

    width = sum(panel.width for panel in panels)
    whole = Image.new("RGB", (width, max(panel.height for panel in panels)), "white")
    left = 0
    for panel in panels:
        whole.paste(panel, (left, 0))
        left += panel.width
    return whole


def page(viewer: Viewer) -> Any:
    """The page, a `gradio.Blocks`; it calls nothing but the viewer."""
    import gradio as gr

    from .. import embedded

    example = embedded.example()

    def refuse(error: CommandError) -> Any:
        return gr.Error(one_line(error), duration=None)

    def shown(path: str | None) -> Image.Image:
        if not path:
            raise CommandError("choose a picture first")
        return read_image(Path(path))

    def load(path: str | None, k: int, ratio: float, step: int) -> tuple[Any, Any, str]:
        if not path:
            return gr.update(), None, ""
        try:
            image = shown(path)
            most = viewer.tokens(image)
            k = min(int(k), most)
            drawn, text = viewer.draw(image, k, ratio, step)
        except CommandError as error:
            raise refuse(error) from error
        return gr.update(maximum=most, value=k), drawn, text

    def draw(path: str | None, k: int, ratio: float, step: int) -> tuple[Any, str]:
        if not path:
            return None, ""
        try:
            return viewer.draw(shown(path), k, ratio, step)
        except CommandError as error:
            raise refuse(error) from error

    def ask(path: str | None, question: str, k: int, ratio: float, step: int) -> list[list[str]]:
        try:
            return viewer.ask(shown(path), question, k, ratio, step)
        except CommandError as error:
            raise refuse(error) from error

    with gr.Blocks(title="vispruner", analytics_enabled=False) as blocks:
        gr.Markdown("## Visual token pruning\nDrop a picture, choose how many tokens to keep, ask.")
        with gr.Row():
            picture = gr.Image(
                example.image,
                type="filepath",
                sources=["upload", "clipboard"],
                label="Picture",
                elem_id="picture",
            )
            kept = gr.Image(
                label="Kept tokens",
                elem_id="kept",
                interactive=False,
                buttons=["download", "fullscreen"],
            )
        text = gr.Markdown(elem_id="counts")
        with gr.Row():
            k = gr.Slider(1, 196, value=22, step=1, label="k: tokens to keep", elem_id="k")
            ratio = gr.Slider(0, 1, value=0.5, step=0.05, label="share chosen by attention")
            step = gr.Slider(1, 64, value=8, step=1, label="tokens dropped per round")
        with gr.Row():
            question = gr.Textbox(example.questions[0][0], label="Question", scale=4)
            button = gr.Button("Ask", variant="primary", elem_id="ask")
        answers = gr.Dataframe(
            headers=["model", "answer", "visual tokens", "prefill ms", "total ms"],
            interactive=False,
            elem_id="answers",
        )
        settings = [k, ratio, step]
        # One call at a time: the model is one.
        once = {"concurrency_limit": 1, "concurrency_id": "model"}
        gr.on(
            [blocks.load, picture.change],
            load,
            [picture, *settings],
            [k, kept, text],
            **once,
        )
        for slider in settings:
            slider.release(draw, [picture, *settings], [kept, text], **once)
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

    # The page reports nothing to anybody, and works without a network.
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
