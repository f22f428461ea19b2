"""Drawings of the retained tokens over the image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

Color = tuple[int, int, int]

# Okabe and Ito's palette: distinguishable with any kind of colour vision.
IMPORTANT: Color = (230, 159, 0)
DIVERSE: Color = (86, 180, 233)

_INK: Color = (40, 40, 40)
_PAPER: Color = (255, 255, 255)
_DIMMED: Color = (24, 24, 28)
_DIMMING = 0.65  # share of _DIMMED in a dropped patch
# Anchors of the heat map, low to high: dark violet to yellow, with increasing lightness.
_HEAT: tuple[Color, ...] = (
    (68, 1, 84),
    (59, 82, 139),
    (33, 145, 140),
    (94, 201, 98),
    (253, 231, 37),
)


def _cells(grid: tuple[int, int], indices: Iterable[int], name: str) -> list[tuple[int, int]]:
    """(row, column) of token indices in row-major order."""
    rows, columns = grid
    cells = []
    for index in indices:
        if not 0 <= index < rows * columns:
            raise ValueError(f"{name} holds {index}, which is outside the {rows} x {columns} grid")
        cells.append(divmod(int(index), columns))
    return cells


def fit(image: Image.Image, grid: tuple[int, int], cell: int) -> Image.Image:
    """The image with `cell` pixels per patch."""
    rows, columns = grid
    return image.convert("RGB").resize((columns * cell, rows * cell), Image.Resampling.LANCZOS)


def draw_retained(
    image: Image.Image,
    grid: tuple[int, int],
    important: Iterable[int],
    diverse: Iterable[int],
    *,
    cell: int = 20,
) -> Image.Image:
    """The image with dropped patches dimmed and retained patches framed.

    Args:
        image: the encoder's input; the patch grid covers all of it.
        grid: rows and columns of patches.
        important: indices of tokens retained for their score, framed in `IMPORTANT`.
        diverse: indices of tokens retained for their diversity, framed in `DIVERSE`.
        cell: side of a patch in the result, in pixels.

    Returns:
        An RGB image of (columns * cell) x (rows * cell) pixels.

    Raises:
        ValueError: an index is outside the grid.
    """
    photo = fit(image, grid, cell)
    gray = ImageOps.grayscale(photo).convert("RGB")
    picture = Image.blend(gray, Image.new("RGB", photo.size, _DIMMED), _DIMMING)
    pen = ImageDraw.Draw(picture)
    width = max(1, cell // 8)
    for name, indices, color in (
        ("important", important, IMPORTANT),
        ("diverse", diverse, DIVERSE),
    ):
        for row, column in _cells(grid, indices, name):
            box = (column * cell, row * cell, (column + 1) * cell, (row + 1) * cell)
            picture.paste(photo.crop(box), box)
            pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=color, width=width)
    return picture


def _heat(share: float) -> Color:
    """Colour of a value in [0, 1]."""
    at = min(max(share, 0.0), 1.0) * (len(_HEAT) - 1)
    low = min(int(at), len(_HEAT) - 2)
    mix = at - low
    r, g, b = (round(x + (y - x) * mix) for x, y in zip(_HEAT[low], _HEAT[low + 1], strict=True))
    return r, g, b


def draw_scores(
    image: Image.Image,
    grid: tuple[int, int],
    scores: Sequence[float],
    *,
    cell: int = 20,
) -> Image.Image:
    """Heat map of the scores over the image, one cell per patch.

    Colours show ranks, not values: [CLS] attention has a few peaks, next to which all other patches
    would have the same colour. NaN ranks last, as in pruning.

    Args:
        image, grid, cell: as in :func:`draw_retained`.
        scores: one per patch.

    Raises:
        ValueError: the numbers of scores and patches differ.
    """
    rows, columns = grid
    if len(scores) != rows * columns:
        raise ValueError(f"scores has {len(scores)} values for a {rows} x {columns} grid")
    keys = [-float("inf") if score != score else float(score) for score in scores]
    order = sorted(range(len(keys)), key=lambda token: keys[token])
    heat = Image.new("RGB", (columns, rows))
    for rank, token in enumerate(order):
        row, column = divmod(token, columns)
        heat.putpixel((column, row), _heat(rank / max(1, len(order) - 1)))
    photo = fit(image, grid, cell)
    gray = ImageOps.grayscale(photo).convert("RGB")
    return Image.blend(gray, heat.resize(photo.size, Image.Resampling.NEAREST), 0.6)


def _swatch(color: Color, side: int) -> Image.Image:
    """A framed patch, as in `draw_retained`."""
    swatch = Image.new("RGB", (side, side), _PAPER)
    ImageDraw.Draw(swatch).rectangle((0, 0, side - 1, side - 1), outline=color, width=side // 4)
    return swatch


def montage(
    rows: Sequence[Sequence[Image.Image]],
    headings: Sequence[str],
    legend: Sequence[tuple[Color | None, str]] = (),
    *,
    gap: int = 12,
) -> Image.Image:
    """Rows of panels of equal size, with a heading over each column and a legend below.

    Args:
        rows: the panels; every row as long as `headings`.
        headings: one per column.
        legend: (colour, text) entries; an entry without a colour is a separate line of text.
        gap: space around panels, in pixels.
    """
    if any(len(row) != len(headings) for row in rows):
        raise ValueError(f"every row of a montage with {len(headings)} headings must be as long")
    font = ImageFont.load_default(size=18)
    small = ImageFont.load_default(size=15)
    width, height = rows[0][0].size
    head = 34
    marks = [(color, text) for color, text in legend if color is not None]
    notes = [text for color, text in legend if color is None]
    foot = 28 * (bool(marks) + len(notes))
    size = (
        gap + len(headings) * (width + gap),
        head + len(rows) * (height + gap) + foot,
    )
    sheet = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        x = gap + column * (width + gap)
        pen.text((x, head // 2), heading, fill=_INK, font=font, anchor="lm")
        for row, panels in enumerate(rows):
            sheet.paste(panels[column], (x, head + row * (height + gap)))
    x, y = gap, size[1] - foot + 8
    for color, text in marks:
        sheet.paste(_swatch(color, 16), (x, y - 2))
        pen.text((x + 22, y + 6), text, fill=_INK, font=small, anchor="lm")
        x += 22 + int(pen.textlength(text, font=small)) + 28
    y += 28 if marks else 0
    for text in notes:
        pen.text((gap, y + 6), text, fill=_INK, font=small, anchor="lm")
        y += 28
    return sheet
