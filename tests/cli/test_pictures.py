"""Drawings show the retained tokens."""

from __future__ import annotations

import pytest
from PIL import Image

from vispruner.cli.pictures import DIVERSE, IMPORTANT, draw_retained, draw_scores, montage

GRID = (6, 8)
CELL = 16


def _center(picture: Image.Image, token: int) -> tuple[int, ...]:
    row, column = divmod(token, GRID[1])
    return picture.getpixel((column * CELL + CELL // 2, row * CELL + CELL // 2))  # type: ignore[return-value]


def _corner(picture: Image.Image, token: int) -> tuple[int, ...]:
    row, column = divmod(token, GRID[1])
    return picture.getpixel((column * CELL, row * CELL))  # type: ignore[return-value]


def test_retained_patches_show_the_image_and_dropped_ones_do_not(photo: Image.Image) -> None:
    important, diverse = [0, 9, 47], [5, 40]
    picture = draw_retained(photo, GRID, important, diverse, cell=CELL)
    assert picture.size == (GRID[1] * CELL, GRID[0] * CELL)
    plain = photo.resize(picture.size, Image.Resampling.LANCZOS)
    for token in range(GRID[0] * GRID[1]):
        if token in important or token in diverse:
            assert _center(picture, token) == _center(plain, token)
            color = IMPORTANT if token in important else DIVERSE
            assert _corner(picture, token) == color
        else:
            assert len(set(_center(picture, token))) <= 3
            assert max(_center(picture, token)) < 120  # dimmed
            assert _center(picture, token) != _center(plain, token)


def test_other_tokens_give_another_drawing(photo: Image.Image) -> None:
    one = draw_retained(photo, GRID, [1], [2])
    assert one.tobytes() == draw_retained(photo, GRID, [1], [2]).tobytes()
    assert one.tobytes() != draw_retained(photo, GRID, [2], [1]).tobytes()
    assert one.tobytes() != draw_retained(photo, GRID, [1], [3]).tobytes()


@pytest.mark.parametrize("index", [-1, 48])
def test_index_outside_the_grid(photo: Image.Image, index: int) -> None:
    with pytest.raises(ValueError, match=f"diverse holds {index}"):
        draw_retained(photo, GRID, [], [index])


def test_heat_map_goes_from_dark_to_light(photo: Image.Image) -> None:
    gray = Image.new("RGB", photo.size, (128, 128, 128))
    scores = [float(token) for token in range(48)]
    picture = draw_scores(gray, GRID, scores, cell=CELL)
    lightness = [sum(_center(picture, token)) for token in range(48)]
    assert lightness == sorted(lightness)
    assert lightness[0] < lightness[-1]
    scores[47] = float("nan")  # ranks last
    assert sum(_center(draw_scores(gray, GRID, scores, cell=CELL), 47)) == lightness[0]


def test_number_of_scores(photo: Image.Image) -> None:
    with pytest.raises(ValueError, match="47 values for a 6 x 8 grid"):
        draw_scores(photo, GRID, [0.0] * 47)


def test_montage(photo: Image.Image) -> None:
    panels = [[photo, photo], [photo, photo]]
    sheet = montage(panels, ["left", "right"], [(IMPORTANT, "important"), (None, "a note")], gap=10)
    assert sheet.width == 3 * 10 + 2 * photo.width
    assert sheet.height > 2 * (photo.height + 10)
    with pytest.raises(ValueError, match="2 headings"):
        montage([[photo]], ["left", "right"])
