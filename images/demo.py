"""What `python -m images.train --demo` learns from: digits drawn in matplotlib's fonts, so nothing is downloaded.

Each picture is a digit turned, sheared and moved, dark on light in random colours. The model is validated on fonts that
it was not trained on, so it has to learn the shape of a digit.
"""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from console import drawing
from storage.files import whole
from storage.tokens import cache_folder

SETTINGS = {"size": 32, "num_epochs": 8, "learning_rate": 3e-3}
FONTS = {
    "train": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
              "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol",
              "STIXGeneralItalic", "STIXGeneralBolIta"),
    "val": ("cmr10", "cmb10", "cmss10", "cmtt10")}
EACH = {"train": 300, "val": 60}        # pictures of a digit
SIZE = 32                               # pixels a side; drawn four times as large


def draw(digit, font, rng):
    """A digit in the font of this name, as an Image of SIZE · SIZE pixels."""
    path, large = Path(drawing.load().get_data_path(), "fonts/ttf", f"{font}.ttf"), 4 * SIZE
    font = ImageFont.truetype(path, rng.integers(80, 120))
    mask = Image.new("L", (large, large))
    ImageDraw.Draw(mask).text((large / 2, large / 2), digit, 255, font, anchor="mm")
    angle, shear, centre = rng.uniform(-0.3, 0.3), rng.uniform(-0.2, 0.2), np.full(2, large / 2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) @ [[1, shear], [0, 1]]
    shift = centre - turn @ (centre + rng.uniform(-16, 16, 2))      # pixel p comes from turn @ p + shift
    mask = mask.transform(mask.size, Image.Transform.AFFINE, (*turn[0], shift[0], *turn[1], shift[1]),
                          Image.Resampling.BILINEAR).resize((SIZE, SIZE), Image.Resampling.BOX)
    ink, paper, share = rng.uniform(0, 110, 3), rng.uniform(145, 255, 3), np.asarray(mask)[..., None] / 255
    pixels = share * ink + (1 - share) * paper + rng.normal(0, 8, (SIZE, SIZE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def folders():
    """The paths of the training and the validation folder, made in the cache folder unless they are there."""
    root = cache_folder() / "digits"
    if not root.exists():
        rng = np.random.default_rng(0)
        root.parent.mkdir(parents=True, exist_ok=True)
        with whole(root) as draft:
            for part, names in FONTS.items():
                for digit in "0123456789":
                    folder = draft / part / digit
                    folder.mkdir(parents=True)
                    for i in range(EACH[part]):
                        draw(digit, names[i % len(names)], rng).save(folder / f"{i}.png")
    return str(root / "train"), str(root / "val")
