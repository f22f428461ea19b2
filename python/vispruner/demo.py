"""`python -m vispruner.demo`: prune photographs and draw which visual tokens stay."""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

import vispruner_cuda

if TYPE_CHECKING:
    from PIL import Image

    from .clip import ClipTower

PROGRAM = "python -m vispruner.demo"
PHOTOS = ("astronaut", "chelsea", "coffee")  # scikit-image ships them
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CELL = 20  # pixels of a patch in the picture


class DemoError(Exception):
    """Input that the demo cannot use; the message is the one line that the user sees."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage."""
        self.exit(2, f"{self.prog}: {message}\n")


def _tokens(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _ratio(text: str) -> float:
    value = float(text)
    if math.isnan(value) or not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1], got {text}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Run a CLIP vision tower on photographs, keep k of its visual tokens with "
        "vispruner_cuda.prune, compare with the PyTorch reference and draw what was kept.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--image", nargs="+", type=Path, metavar="PATH", default=argparse.SUPPRESS,
        help=f"photographs (default: {', '.join(PHOTOS)} of scikit-image)")  # fmt: skip
    add("--tower", metavar="NAME_OR_PATH", default=argparse.SUPPRESS,
        help="CLIP checkpoint with safetensors: a directory or a name on the Hugging Face hub, "
        "such as openai/clip-vit-large-patch14-336 (default: random weights at the shape of "
        "LLaVA-1.5's tower: what they attend to means nothing)")  # fmt: skip
    add("--k", type=_tokens, default=64, help="visual tokens to keep of an image")
    add("--important-ratio", type=_ratio, default=0.5, metavar="RATIO",
        help="share of k kept by [CLS] attention; the rest is kept by diversity")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of the random weights")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of the tower")
    add(
        "--runs",
        type=_tokens,
        default=3,
        help="timed runs of the tower (pruning: ten times as many); the table shows medians",
    )
    add("-o", "--output", type=Path, metavar="OUT", default=Path("vispruner-demo.png"),
        help="the picture; its suffix gives the format")  # fmt: skip
    return parser


# ------------------------------------------------------------------------------------- input
def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise DemoError(f"argument --device: cannot use {name!r}: {reason}") from error
    if device.type not in ("cpu", "cuda"):
        raise DemoError(f"argument --device: must be a cpu or cuda device, got {name!r}")
    return device


def _check_output(path: Path) -> None:
    """Before the work, not after it."""
    from PIL import Image

    if path.is_dir() or not path.parent.is_dir():
        raise DemoError(f"argument -o: cannot write {path}: no such directory, or it is one")
    Image.init()
    format_ = Image.registered_extensions().get(path.suffix.lower())
    if format_ not in Image.SAVE:
        raise DemoError(f"argument -o: cannot write {path}: unknown image format {path.suffix!r}")


def _read(path: Path) -> Image.Image:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        reason = "no such file"
    except Exception as error:  # Pillow raises many kinds for broken files
        reason = " ".join(str(error).split()) or type(error).__name__
    raise DemoError(f"argument --image: cannot read {path}: {reason}")


def _photos(paths: Sequence[Path] | None) -> list[Image.Image]:
    from PIL import Image

    if paths is not None:
        return [_read(path) for path in paths]
    try:
        from skimage import data
    except ImportError as error:
        raise DemoError(
            f"the default photographs need scikit-image ({error}): give --image PATH or "
            "pip install 'vispruner-cuda[demo]'"
        ) from error
    return [Image.fromarray(getattr(data, name)()) for name in PHOTOS]


def _center_square(image: Image.Image) -> Image.Image:
    """What CLIP's preprocessing leaves of an image, at full resolution."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


# -------------------------------------------------------------------------------------- work
def split_kept(
    indices: Tensor, cls_attn: Tensor, k: int, important_ratio: float
) -> tuple[list[int], list[int]]:
    """Kept tokens of one image as (important, diverse).

    Args:
        indices: (min(k, N),) of `prune`; cls_attn: (N,); k, important_ratio: as given to it.
    """
    count = int(k * important_ratio)
    if count == 0:
        return [], indices.tolist()
    ranked = vispruner_cuda.topk(cls_attn.unsqueeze(0), count).indices[0].tolist()
    important = set(ranked)
    kept: list[int] = indices.tolist()
    return [t for t in kept if t in important], [t for t in kept if t not in important]


def _now(device: torch.device) -> float:
    """Seconds, after the device has caught up."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _tower(options: argparse.Namespace, device: torch.device) -> ClipTower:
    from transformers.utils import logging as transformers_logging

    from .clip import ClipTower, TowerError

    # What goes wrong is said in one line, below.
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)
    dtype = DTYPES[options.dtype]
    try:
        if "tower" in options:
            return ClipTower.load(options.tower, device=device, dtype=dtype)
        return ClipTower.random(seed=options.seed, device=device, dtype=dtype)
    except TowerError as error:
        raise DemoError(f"argument --tower: {error}") from error


def _run(options: argparse.Namespace) -> int:
    try:
        from rich import progress
        from rich.console import Console
        from rich.table import Table

        from . import clip, pictures
    except ImportError as error:
        raise DemoError(f"{error}: pip install 'vispruner-cuda[demo]'") from error

    _check_output(options.output)
    device = _device(options.device)
    photos = [_center_square(photo) for photo in _photos(getattr(options, "image", None))]
    console = Console()
    random_weights = "tower" not in options
    with console.status("random weights" if random_weights else f"loading {options.tower}"):
        tower = _tower(options, device)
    pixels = tower.preprocess(photos)

    times: dict[str, list[float]] = {"tower": [], "[CLS] attention": [], "prune": []}
    with progress.Progress(console=console, transient=True) as bar:
        for _ in bar.track(range(options.runs), description="tower"):
            start = _now(device)
            cues = tower.encode(pixels)
            times["tower"].append(_now(device) - start)
        for run in bar.track(range(10 * options.runs + 1), description="pruning"):
            stamps = [_now(device)]
            attention = clip.cls_attention(cues)
            stamps.append(_now(device))
            kept = vispruner_cuda.prune(
                cues.feats, attention, options.k, important_ratio=options.important_ratio
            )
            stamps.append(_now(device))
            if run > 0:  # the first one warms up
                times["[CLS] attention"].append(stamps[1] - stamps[0])
                times["prune"].append(stamps[2] - stamps[1])

    want = vispruner_cuda.reference.prune(
        cues.feats, attention, options.k, important_ratio=options.important_ratio
    )
    same = all(torch.equal(a, b) for a, b in zip(kept, want, strict=True))

    rows = []
    split: tuple[list[int], list[int]] = ([], [])
    for image, photo in enumerate(photos):
        split = split_kept(
            kept.indices[image], attention[image], options.k, options.important_ratio
        )
        scores = attention[image].tolist()
        rows.append(
            [
                _panel(photo, tower.grid),
                pictures.draw_scores(photo, tower.grid, scores, cell=CELL),
                pictures.draw_kept(photo, tower.grid, *split, cell=CELL),
            ]
        )
    before, after = cues.feats.shape[1], kept.indices.shape[1]
    legend: list[tuple[pictures.Color | None, str]] = [
        (pictures.IMPORTANT, f"{len(split[0])} important: highest [CLS] attention"),
        (pictures.DIVERSE, f"{len(split[1])} diverse: what deduplication leaves"),
    ]
    if random_weights:
        legend.append((None, "Random weights: the attention carries no meaning."))
    headings = (
        "What the tower sees",
        "[CLS] attention, by rank",
        f"{after} of {before} tokens kept",
    )
    pictures.montage(rows, headings, legend).save(options.output)

    table = Table(show_header=False, title=f"vispruner_cuda {vispruner_cuda.__version__}")
    weights = "random weights" if random_weights else options.tower
    table.add_row("tower", f"{weights}, {tower.config.image_size} px, {options.dtype}, {device}")
    table.add_row("images", str(len(photos)))
    table.add_row(
        "tokens an image",
        f"{before} -> {after} ({len(split[0])} important, {len(split[1])} diverse)",
    )
    for name, values in times.items():
        median = f"{1e3 * statistics.median(values):.2f} ms"
        what = f"all {len(photos)} images" if len(photos) > 1 else "the image"
        table.add_row(
            name.replace("[", r"\["), f"{median} for {what} (median of {len(values)} runs)"
        )
    table.add_row("same as the reference", "yes, torch.equal" if same else "NO")
    table.add_row("picture", str(options.output))
    console.print(table)
    if random_weights:
        console.print(
            "The weights are random: which patches [CLS] attends to means nothing here, and the "
            "features only reflect colours, edges and positions through random projections. "
            "With a network, --tower openai/clip-vit-large-patch14-336 shows the real thing."
        )
    if not same:
        print(f"{PROGRAM}: the operator and the reference differ", file=sys.stderr)
    return 0 if same else 1


def _panel(photo: Image.Image, grid: tuple[int, int]) -> Image.Image:
    from PIL import Image

    return photo.resize((grid[1] * CELL, grid[0] * CELL), Image.Resampling.LANCZOS)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except DemoError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
