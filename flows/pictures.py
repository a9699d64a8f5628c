"""Pictures that travel inside their artifacts."""

import io

PICTURE_BYTES = 150_000
"""The UI prints a picture's address below it, so that it must not be long."""


def picture(png: bytes) -> str:
    """A data: URI of a picture, made smaller until it can travel inside an artifact."""
    from PIL import Image

    from fm_core.report.image_grids import data_uri

    if len(png) <= PICTURE_BYTES:
        return data_uri(png)
    image = Image.open(io.BytesIO(png)).convert("RGB")
    while True:
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=85)
        if encoded.tell() <= PICTURE_BYTES:
            return data_uri(encoded.getvalue(), "image/jpeg")
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))
