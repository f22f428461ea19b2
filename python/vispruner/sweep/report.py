"""The results as files: plots, results.json, and a page that needs no network."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .data import Item
from .measuring import Measurement
from .summary import Summary, name_of


@dataclass(frozen=True)
class Changed:
    """A question whose answer changed under the smallest settings.

    Attributes:
        drawing: the retained tokens (vispruner show), or the picture.
        setting: under which the answer is the pruned one.
    """

    item: Item
    setting: str
    before: Measurement
    after: Measurement
    drawing: Image.Image


SURE = 0.9  # below this probability, more pictures are advised

HEADINGS = (
    "setting",
    "tokens",
    "equal",
    "right",
    "loss",
    "log p",
    "top-1",
    "KV MiB",
    "prefill",
    "TTFT",
)


def legend(summaries: Sequence[Summary]) -> str:
    """The description of the columns."""
    whole = summaries[0]
    text = (
        "tokens: visual tokens, median. equal: answers equal to the unpruned model's, right: "
        f"correct answers, in %. loss: points, of {whole.lost}, paired with the unpruned model, ± "
        "standard error clustered by picture. log p and top-1: log-probability of the unpruned "
        "model's answer, and share of its tokens (%) that stay the first choice, teacher-forced. "
        "prefill and TTFT (time to first token): medians in ms."
    )
    if whole.cache_bytes is None:
        text += " A server tells neither the bytes of its cache nor the time of the prefill"
        text += (
            "."
            if whole.log_probability is not None
            else ("; this one gave no log-probabilities of a prompt either (prompt_logprobs).")
        )
    return text


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def row(summary: Summary) -> list[str]:
    """The cells of a setting, under HEADINGS."""
    loss = ""
    if summary.budget is not None:
        loss = f"{summary.loss.mean:+.1f} ± {summary.loss.error:.1f}"
    mebibytes = None if summary.cache_bytes is None else summary.cache_bytes / 2**20
    return [
        name_of(summary.budget),
        f"{summary.visual_tokens:g}",
        _share(summary.equal),
        _share(summary.right),
        loss,
        _number(summary.log_probability, 3),
        _share(summary.first_choices),
        _number(mebibytes, 2),
        _number(summary.prefill, 1),
        _number(summary.first_token, 1),
    ]


def advice(best: Summary | None, summaries: Sequence[Summary], tolerance: float) -> str:
    """The recommendation in one sentence."""
    if best is None:
        return f"No setting loses less than {tolerance:g} points: try a larger k."
    sure = best.probability_below(tolerance)
    text = (
        f"{name_of(best.budget)} is the smallest setting that loses less than {tolerance:g} points "
        f"({best.loss.mean:+.1f} ± {best.loss.error:.1f}); with {best.loss.pictures} pictures and "
        f"{best.loss.questions} questions the probability of that is {100 * sure:.0f} %."
    )
    return text if sure >= SURE else f"{text} Use more pictures to be more certain."


def _plot(summaries: Sequence[Summary], tolerance: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss, time = figure.subplots(1, 2)
    methods: dict[str, list[Summary]] = {}
    for summary in summaries[1:]:
        assert summary.budget is not None
        methods.setdefault(summary.budget.method, []).append(summary)
    for method, of in methods.items():
        of = sorted(of, key=lambda s: s.visual_tokens)
        tokens = [s.visual_tokens for s in of]
        loss.errorbar(
            tokens, [s.loss.mean for s in of], [s.loss.error for s in of], marker="o", label=method
        )
        time.plot(tokens, [s.first_token for s in of], marker="o", label=method)
    loss.axhline(tolerance, color="gray", linestyle=":", label="tolerance")
    loss.set(xlabel="visual tokens", ylabel="loss, points", xscale="log")
    time.axhline(summaries[0].first_token, color="gray", linestyle="--", label="unpruned")
    time.set(xlabel="visual tokens", ylabel="first token, ms", xscale="log", ylim=(0, None))
    for axes in (loss, time):
        axes.legend()
        axes.grid(alpha=0.3)
    return figure


def _image(picture: Image.Image, most: int = 900) -> str:
    """An <img> with its content."""
    shown = picture.convert("RGB")
    shown.thumbnail((most, most))
    content = io.BytesIO()
    shown.save(content, "WEBP", quality=80)
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img src="data:image/webp;base64,{data}" alt="">'


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
tr.best { background: #e6f4ea; }
img, svg { max-width: 100%; height: auto; }
.advice { font-size: 1.15rem; font-weight: 600; }
article { border-top: 1px solid #ddd; padding: 1rem 0; }
"""


def _page(
    summaries: Sequence[Summary], best: Summary | None, tolerance: float, about: dict[str, Any],
    changed: Sequence[Changed], skipped: Sequence[str], plot: str,
) -> str:  # fmt: skip
    text = html.escape
    head = "".join(f"<th>{text(name)}</th>" for name in HEADINGS)
    body = "".join(
        f'<tr class="{"best" if summary is best else ""}">'
        + "".join(f"<td>{text(cell)}</td>" for cell in row(summary))
        + "</tr>"
        for summary in summaries
    )
    facts = ", ".join(f"{text(name)}: {text(str(value))}" for name, value in about.items())
    articles = "".join(
        f"<article><h3>{text(one.item.name)}: {text(one.item.question)}</h3>"
        f"<p>unpruned: <b>{text(one.before.answer)}</b><br>"
        f"{text(one.setting)}: <b>{text(one.after.answer)}</b>"
        + (f"<br>right: <b>{text(one.item.answer)}</b>" if one.item.answer else "")
        + f"</p>{_image(one.drawing)}</article>"
        for one in changed
    )
    left_out = "".join(f"<li>{text(line)}</li>" for line in skipped)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>vispruner sweep</title>'
        f"<style>{_STYLE}</style></head><body><h1>How many visual tokens to retain</h1>"
        f'<p class="advice">{text(advice(best, summaries, tolerance))}</p><p>{facts}</p>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{plot}"
        f"<p>{text(legend(summaries))}</p>"
        + (f"<h2>Pictures that were skipped</h2><ul>{left_out}</ul>" if skipped else "")
        + (f"<h2>Answers that changed most</h2>{articles}" if changed else "")
        + "</body></html>"
    )


def write(
    directory: Path,
    summaries: Sequence[Summary],
    best: Summary | None,
    tolerance: float,
    about: dict[str, Any],
    changed: Sequence[Changed],
    skipped: Sequence[str],
) -> None:
    """Writes results.json, sweep.svg, sweep.png and report.html.

    Raises:
        OSError: a file cannot be written.
    """
    data = {
        "about": about,
        "tolerance": tolerance,
        "settings": [summary.data() for summary in summaries],
        "recommended": None if best is None else best.data()["budget"],
        "skipped": list(skipped),
    }
    (directory / "results.json").write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")
    figure = _plot(summaries, tolerance)
    figure.savefig(directory / "sweep.png", dpi=150)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    (directory / "sweep.svg").write_text(svg.getvalue())
    inline = svg.getvalue()[svg.getvalue().index("<svg") :]
    page = _page(summaries, best, tolerance, about, changed, skipped, inline)
    (directory / "report.html").write_text(page, encoding="utf-8")
