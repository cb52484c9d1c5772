"""Text that is burnt into a film is suspected and shown; a plain film and a side marker are not."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from invcoss_site.burnt_in import suspected_text


def film(height=512, width=400):
    """A made-up chest film in [0, 1]: bright middle, two dark lungs, soft ribs, a little noise."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    lungs = sum(np.exp(-(((x - side) / 0.13) ** 2) - ((y - 0.45) / 0.25) ** 2) for side in (0.3, 0.7))
    grey = 0.75 - 0.55 * lungs + 0.06 * np.sin(60 * y) * lungs - 0.3 * (abs(x - 0.5) > 0.42)
    return (grey + np.random.default_rng(0).normal(0, 0.01, grey.shape)).clip(0, 1).astype(np.float32)


def written(pixels, text, size, at=(20, 30)):
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).text(at, text, fill=1.0, font=ImageFont.load_default(size))
    return np.asarray(image)


@pytest.mark.parametrize("size", [12, 20, 28])
def test_a_name_and_a_date_are_suspected_and_found_where_they_are(size):
    rows, columns = suspected_text(written(film(), "MEIER ANNA 12.03.1961", size))
    assert rows.start <= 30 + size // 2 <= rows.stop
    assert columns.start <= 60 <= columns.stop


def test_where_it_is_is_told_in_pixels_of_the_film_as_it_was():
    large = written(film(2400, 2000), "PORTABLE MEIER ANNA", 60, (1200, 2000))
    rows, columns = suspected_text(large)
    assert rows.start <= 2040 <= rows.stop and rows.stop - rows.start < 300
    assert columns.start <= 1300 and columns.stop >= 1400


@pytest.mark.parametrize("of", ["plain", "marker", "constant", "small", "narrow"])
def test_what_has_no_line_of_text_is_not_suspected(of):
    films = {
        "plain": film(),
        "marker": written(film(), "L", 28),
        "constant": np.zeros((200, 200), np.float32),
        "small": film(4, 300),
        "narrow": film(300, 40),
    }
    assert suspected_text(films[of]) is None
