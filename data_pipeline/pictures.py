"""What every reader of pictures does alike."""

from __future__ import annotations

from PIL import ExifTags, Image

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what makes a picture of an EXIF orientation upright
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height


def orientation(picture: Image.Image, header: bool = False) -> int:
    """The EXIF orientation of a picture just opened, 1 to 8; 1 where it has none or one that cannot be read.

    `header` looks only at what lies before the pixels; else Pillow decodes the whole of a PNG.
    """
    try:
        exif = Image.Image.getexif(picture) if header else picture.getexif()
        found = exif.get(ExifTags.Base.Orientation)
        return int(found) if found in TURNS else 1
    except Exception:  # EXIF is written by anyone, and Pillow's parser raises anything
        return 1


def upright(picture: Image.Image, turned: int) -> Image.Image:
    """A picture of an orientation as it is to be looked at. Its EXIF is left alone: it may not be fit to be written."""
    return picture.transpose(TURNS[turned]) if turned in TURNS else picture


def on_white(picture: Image.Image) -> Image.Image:
    """The picture as 8-bit RGB, what is transparent in it over white."""
    if picture.mode.startswith("I"):  # 16-bit grey, of which Pillow's own conversion keeps the darkest 256 levels
        picture = picture.convert("I").point(lambda level: level * (1 / 256))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture.load()
    return picture if picture.mode == "RGB" else picture.convert("RGB")
