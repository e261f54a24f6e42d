"""Decoding, the resize rule and patches, against golden values and images made for the purpose."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_cases import Golden, encode_image, golden_folder
from data_pipelines.config import ImageTransform
from data_pipelines.images import (
    FORMATS,
    decode_image,
    grid_position,
    image_size,
    patchify,
    resize,
    target_size,
    unpatchify,
)

# An IPTC file of 16 x 16 pixels that holds a PNG of more; Pillow would decode that, or run a program for EPS.
NESTED = encode_image(np.zeros((128, 128), np.uint8), "PNG")
IPTC = (b"\x1c\x03\x3c\0\2\1\0" b"\x1c\x03\x14\0\2\0\x10" b"\x1c\x03\x1e\0\2\0\x10" b"\x1c\x03\x78\0\1\5"
        b"\x1c\x08\x0a" + len(NESTED).to_bytes(2, "big") + NESTED + b"\x1c\x09\0\0\0")
LIMIT = dict(where="file.parquet row 3", max_pixels=10_000)


@pytest.fixture(scope="module")
def golden(request):
    return Golden(golden_folder(request))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    chunk = lambda name, data: (struct.pack(">I", len(data)) + name + data
                                + struct.pack(">I", zlib.crc32(name + data)))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_golden_resize_rule(golden):
    assert golden.values["resize"]
    for width, height, _, stride, longest, shortest, *expected in golden.values["resize"]:
        transform = ImageTransform(stride, longest, shortest)
        assert target_size(width, height, transform) == tuple(expected), (width, height, transform)


def test_golden_resize_pixels(golden):
    transform = ImageTransform(*golden.values["edit"]["vae_transform"])
    resized = resize(golden.arrays["edit.image_uint8"], transform)
    np.testing.assert_array_equal(resized, golden.arrays["edit.resized_uint8"])


def test_golden_patches(golden):
    patch = golden.vit["patch_size"]
    images = [golden.uint8(f"vit.image{i}") for i in range(2)]
    patches = np.concatenate([patchify(image, patch) for image in images])
    np.testing.assert_allclose((patches / 255 - 0.5) / 0.5, golden.arrays["vit.patches"], atol=1e-6)
    positions = [grid_position(image.shape[0] // patch, image.shape[1] // patch,
                               golden.config["vit_max_num_patch_per_side"]) for image in images]
    np.testing.assert_array_equal(np.concatenate(positions), golden.arrays["vit.position_ids"])


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from((14, 16)), st.integers(1, 4))
def test_target_size_keeps_its_bounds(width, height, stride, num_images):
    transform = ImageTransform(stride, 40 * stride, 10 * stride, max_pixels=900 * stride**2)
    out = target_size(width, height, transform, num_images=num_images)
    assert all(side % stride == 0 and stride <= side <= transform.max_size for side in out)
    assert target_size(height, width, transform, num_images=num_images) == out[::-1]


def test_too_many_pixels_shrink_by_the_ratio_of_areas():
    """By hand: 900 -> 896; 896 * 196,000 / 896^2 = 219 -> 224. A square root would give 448."""
    transform = ImageTransform(14, 980, 224, max_pixels=196_000)
    assert target_size(900, 900, transform) == (224, 224)


def test_images_share_the_pixels():
    transform = ImageTransform(14, 980, 224, max_pixels=14 * 14 * 1000)
    one, four = (np.prod(target_size(900, 900, transform, num_images=n)) for n in (1, 4))
    assert one <= 14 * 14 * 1000 and four <= 14 * 14 * 250


@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from((2, 14)))
def test_patches_go_row_by_row_and_back(height, width, patch):
    image = np.random.default_rng(0).integers(0, 256, (height * patch, width * patch, 3), np.uint8)
    patches = patchify(image, patch)
    row, column = height - 1, width // 2
    block = image[row * patch:(row + 1) * patch, column * patch:(column + 1) * patch]
    np.testing.assert_array_equal(patches[row * width + column], block.ravel())
    np.testing.assert_array_equal(unpatchify(patches, height, width, patch), image)


def test_grid_position_refuses_what_the_table_lacks():
    assert grid_position(2, 3, 8).tolist() == [0, 1, 2, 8, 9, 10]
    with pytest.raises(ValueError, match="2 x 9 tokens does not fit the 8 x 8"):
        grid_position(2, 9, 8)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_decode_gives_rgb(format):
    grey = np.full((20, 30), 77, np.uint8)
    decoded = decode_image(encode_image(grey, format), **LIMIT)
    assert decoded.shape == (20, 30, 3) and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - 77).max() <= 2
    assert image_size(encode_image(grey, format), **LIMIT) == (30, 20)


def test_transparency_lies_over_white():
    image = np.zeros((2, 2, 4), np.uint8)
    image[0, :, 3] = (255, 51)  # opaque black, and black at one fifth
    expected = [[0, 204], [255, 255]]
    np.testing.assert_array_equal(decode_image(encode_image(image), **LIMIT)[..., 1], expected)
    palette = Image.fromarray(image).convert("P")
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=palette.getpixel((0, 0)))
    assert (decode_image(buffer.getvalue(), **LIMIT)[0, 0] == 255).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_keep_their_shades(format):
    shades = np.array([[0, 256, 257, 32768, 65535]], np.uint16)
    decoded = decode_image(encode_image(shades, format), **LIMIT)
    assert decoded.tolist() == [[[shade] * 3 for shade in (0, 1, 1, 128, 255)]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
@pytest.mark.parametrize("format", ["TIFF", "GIF", "BMP", "JPEG", "PNG", "TGA"])
def test_every_mode_and_format_gives_the_same_picture(mode, format):
    half = np.full((16, 24, 3), 255, np.uint8)
    half[:, :12] = 0
    buffer = io.BytesIO()
    try:
        Image.fromarray(half).convert(mode).save(buffer, format, quality=95)
    except (OSError, ValueError) as error:
        assert "mode" in str(error)   # there are no such files
        return
    decoded = decode_image(buffer.getvalue(), **LIMIT)
    assert decoded.shape == half.shape and np.abs(decoded.astype(int) - half).max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_stand_upright_and_have_the_size_that_was_announced(format, orientation):
    """Against Pillow's own `exif_transpose`."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :16], pixels[8:, :16] = (255, 0, 0), (0, 255, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(buffer.getvalue()))).convert("RGB")
    decoded = decode_image(buffer.getvalue(), **LIMIT)
    np.testing.assert_array_equal(decoded, np.asarray(expected))
    assert image_size(buffer.getvalue(), **LIMIT) == expected.size == decoded.shape[1::-1]


@given(st.binary(max_size=60))
def test_broken_exif_is_no_fault(exif):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 2)).save(buffer, "PNG", exif=b"Exif\0\0" + exif)
    width, height = image_size(buffer.getvalue(), **LIMIT)
    assert decode_image(buffer.getvalue(), **LIMIT).shape == (height, width, 3)


@pytest.mark.parametrize("data, message", [
    (b"", "not a readable image"),
    (b"hello, I am no image", "not a readable image"),
    (IPTC, "not a readable image"),
    (encode_image(np.zeros((16, 16, 3), np.uint8), "ICO"), "not a readable image"),   # decoded as it is opened
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a readable image"),   # a program
    (png_header(200, 200), "200 x 200 is over the limit of 10000 pixels"),
    (png_header(60_000, 60_000), "over the limit"),
    (png_header(11_000, 11_000), "over the limit"),  # where Pillow itself would only warn
    (encode_image(np.ones((16, 16), np.float32), "TIFF"), "mode 'F'"),   # of no known range
])
def test_hostile_images_are_named(data, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for function in (image_size, decode_image):
            with pytest.raises(ValueError, match=f"file.parquet row 3: .*{message}"):
                function(data, **LIMIT)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncated_images_are_named(format):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encode_image(noise, format)
    with pytest.raises(ValueError, match="file.parquet row 3: "):
        decode_image(data[:len(data) // 2], **LIMIT)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format", FORMATS)
def test_a_flipped_byte_of_any_format_is_decoded_or_named(format):
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    image.save(buffer, format)
    data = buffer.getvalue()
    for number in range(300):
        broken = bytearray(data)
        broken[rng.integers(min(len(data), 128) if number % 2 else len(data))] = rng.integers(256)
        for function in (image_size, decode_image):
            try:
                function(bytes(broken), **LIMIT)
            except ValueError as error:
                assert str(error).startswith("file.parquet row 3: ")
