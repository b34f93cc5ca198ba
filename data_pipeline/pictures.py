"""What every reader of pictures does alike."""

from __future__ import annotations

from PIL import Image


def on_white(picture: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB, what is transparent in it over white."""
    if picture.mode.startswith("I"):  # 16-bit grey, of which Pillow's own conversion keeps the darkest 256 levels
        picture = picture.convert("I").point(lambda level: level * (1 / 256))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture.load()
    return picture if picture.mode == "RGB" else picture.convert("RGB")
