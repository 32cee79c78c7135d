"""`kdlib.cache.encoded`: nothing about an image is changed without being counted or refused."""

import os
import pickle

import numpy as np
import pytest
from cache.odd_images import encoded, late_exif, pixels, png16, turned
from PIL import Image

from kdlib.cache import encoded as encoded_module
from kdlib.cache.encoded import NOTES, ImageError, Look, Rules, look


def decode(image: bytes, name: str, rules: Rules) -> np.ndarray:
    """The pixels alone."""
    return encoded_module.decode(image, name, rules)[0]


# What shows an image of each orientation upright, worked out on its rows and columns
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_orientation_is_applied_or_ignored_as_the_rules_say(kind, orientation):
    image = turned(orientation, kind)
    upright = UPRIGHT[orientation](pixels())
    np.testing.assert_array_equal(decode(image, "a", Rules(exif="apply")), upright)
    np.testing.assert_array_equal(decode(image, "a", Rules(exif="ignore")), pixels())
    assert look(image, "a", Rules(exif="apply")).size == upright.shape[:2]
    assert look(image, "a", Rules(exif="ignore")).size == (4, 6)
    notes = {exif: look(image, "a", Rules(exif=exif)).notes(Rules(exif=exif))
             for exif in ("apply", "ignore")}  # fmt: skip
    turns = orientation > 1
    assert notes == {"apply": ["turned"] * turns, "ignore": ["not_turned"] * turns}


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_an_orientation_without_a_decision_is_refused_and_none_is_not(kind):
    with pytest.raises(ImageError, match=r"^a carries EXIF orientation 6: .*on its side.*data\.e"):
        decode(turned(6, kind), "a", Rules())
    assert decode(turned(1, kind), "a", Rules()).shape == (4, 6, 3)


def test_an_orientation_behind_the_pixels_is_seen():
    assert look(late_exif(3), "a", Rules()).orientation == 3
    image = decode(late_exif(3), "a", Rules(exif="apply"))
    np.testing.assert_array_equal(image, pixels()[::-1, ::-1])


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_is_none(orientation):
    assert look(turned(orientation), "a", Rules()).orientation == 1


def transparent(kind: str = "PNG") -> bytes:
    """White where it is transparent, in its first row."""
    image = np.dstack([pixels(), np.full((4, 6), 255, np.uint8)])
    image[0] = (255, 255, 255, 0)
    return encoded(image, kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(("alpha", "value"), [("white", 255), ("black", 0), ("drop", 255)])
def test_transparent_pixels_lie_on_what_the_rules_say(kind, alpha, value):
    rules = Rules(alpha=alpha)
    image = decode(transparent(kind), "a", rules)
    assert (image[0] == value).all()
    np.testing.assert_array_equal(image[1:], pixels()[1:])
    assert look(transparent(kind), "a", rules).notes(rules) == [
        {"white": "on_white", "black": "on_black", "drop": "alpha_dropped"}[alpha]
    ]


def test_transparent_pixels_without_a_decision_are_refused_and_opaque_ones_are_not():
    with pytest.raises(ImageError, match=r"^a has transparent pixels; `alpha: white` .*data\.alp"):
        decode(transparent(), "a", Rules())
    opaque = encoded(np.dstack([pixels(), np.full((4, 6), 255, np.uint8)]))
    np.testing.assert_array_equal(decode(opaque, "a", Rules()), pixels())
    assert look(opaque, "a", Rules()).notes(Rules()) == ["opaque_alpha"]


def test_a_transparent_colour_counts_where_a_pixel_has_it():
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert look(encoded(palette, transparency=1), "a", Rules()).alpha == "transparent"
    assert look(encoded(palette, transparency=7), "a", Rules()).alpha == "opaque"
    assert look(encoded(palette), "a", Rules()).alpha is None


def test_sixteen_bits_in_rgb_are_counted_and_in_grey_or_float_refused():
    assert look(png16(), "a", Rules()).notes(Rules()) == ["cut_to_8_bits"]
    assert (decode(png16(0x12FF), "a", Rules()) == 0x12).all()
    for image, mode in (
        (encoded(np.full((4, 6), 40000, np.uint16)), "I;16"),
        (encoded(np.full((4, 6), 0.5, np.float32), "TIFF"), "F"),
    ):
        with pytest.raises(ImageError, match=rf"more than 8 bits per channel \(mode {mode}\)"):
            decode(image, "a", Rules())
    five_six_five = b"BM" + encoded(pixels(), "BMP")[2:]
    assert look(five_six_five, "a", Rules()).bits == 8


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP", "MPO"])
def test_the_first_of_several_frames_is_read_and_counted(kind):
    first, other = (Image.fromarray(pixels(seed)) for seed in (0, 1))
    options = {"lossless": True} if kind == "WEBP" else {}
    several = encoded(first, kind, save_all=True, append_images=[other], **options)
    assert look(several, "a", Rules()).frames
    alone = encoded(first, "JPEG" if kind == "MPO" else kind, **options)
    assert not look(alone, "a", Rules()).frames
    np.testing.assert_array_equal(decode(several, "a", Rules()), decode(alone, "a", Rules()))


@pytest.mark.parametrize(
    ("mode", "kind", "note"),
    [
        ("L", "PNG", ["greyscale"]),
        ("1", "PNG", ["greyscale"]),
        ("P", "PNG", ["palette"]),
        ("CMYK", "JPEG", ["cmyk"]),
        ("YCbCr", "TIFF", ["other_mode"]),
        ("RGB", "PNG", []),
    ],
)
def test_other_colours_are_made_rgb_and_counted(mode, kind, note):
    image = encoded(Image.fromarray(pixels()).convert(mode), kind)
    assert look(image, "a", Rules()).notes(Rules()) == note
    assert decode(image, "a", Rules()).shape == (4, 6, 3)


def test_colours_without_a_way_to_rgb_are_refused():
    image = encoded(Image.fromarray(pixels()).convert("LAB"), "TIFF")
    with pytest.raises(ImageError, match="a has colours in mode LAB; save it as RGB"):
        decode(image, "a", Rules())


def test_a_colour_profile_other_than_srgb_is_counted():
    assert look(encoded(pixels(), icc_profile=b"Adobe RGB"), "a", Rules()).profile
    assert not look(encoded(pixels(), icc_profile=b"sRGB IEC61966"), "a", Rules()).profile


def test_resizing_enlarging_and_cutting_are_counted():
    notes = {size: Look((4, 6), "RGB").notes(Rules(size)) for size in (2, 5)}
    assert notes[2] == ["resized", "cut_to_square"]
    assert notes[5] == ["resized", "enlarged", "cut_to_square"]
    assert Look((4, 4), "RGB").notes(Rules(4)) == []


def test_every_note_has_its_words():
    rules = [Rules(2, e, a) for e in ("apply", "ignore") for a in ("white", "black", "drop")]
    modes = ("L", "P", "CMYK", "HSV")
    looks = [
        Look((1, 6), m, 16, 6, a, True, True) for m in modes for a in ("opaque", "transparent")
    ]
    assert {note for seen in looks for rule in rules for note in seen.notes(rule)} == set(NOTES)


WHOLE = {
    k: encoded(pixels(size=(40, 60)), k) for k in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP")
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_cut_image_is_found_by_a_look_and_a_whole_one_passes(kind):
    for n_bytes in (10, len(WHOLE[kind]) // 2, len(WHOLE[kind]) - 30):
        with pytest.raises(ImageError, match=r"^a cannot be read as an image \(.*\); repair or re"):
            look(WHOLE[kind][:n_bytes], "a", Rules())
    assert look(WHOLE[kind], "a", Rules()).size == (40, 60)


def test_damage_inside_is_found_by_decoding():
    image = bytearray(WHOLE["PNG"])
    image[2000] ^= 1
    assert look(bytes(image), "a", Rules()).size == (40, 60)
    with pytest.raises(ImageError, match="a cannot be read as an image"):
        decode(bytes(image), "a", Rules())


@pytest.mark.parametrize("kind", WHOLE)
def test_any_damage_ends_in_pixels_or_in_one_sentence(kind):
    rng = np.random.default_rng(0)
    for _ in range(60):
        image = bytearray(WHOLE[kind])
        for at in rng.integers(0, len(image), 3):
            image[at] ^= 1 << rng.integers(0, 8)
        for read in (look, decode):
            try:
                read(bytes(image), "a", Rules(exif="apply", alpha="drop"))
            except ImageError as error:
                assert str(error).startswith("a ")  # noqa: PT017
                assert "\n" not in str(error)  # noqa: PT017


def test_what_is_no_image_file_says_what_it_is(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("text")
    for name, says in {
        "pipe": "is a folder, a pipe or a device; expected an image file",
        ".": "is a folder, a pipe or a device",
        "loop": "a link that leads to itself",
        "lost": "the file is gone, or a link to nothing",
        "empty": "it is empty",
        "text": "its format is unknown",
    }.items():
        with pytest.raises(ImageError, match=f"^a .*{says}"):
            look(str(tmp_path / name), "a", Rules())


@pytest.mark.filterwarnings("error")
def test_a_long_image_is_read_and_one_of_too_many_pixels_is_refused_in_words_of_ours(monkeypatch):
    assert look(encoded(Image.new("1", (65000, 1))), "a", Rules()).size == (1, 65000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert decode(encoded(pixels()), "a", Rules()).shape == (4, 6, 3)  # Pillow only warns
    with pytest.raises(ImageError, match="claims more than 40 pixels, and none so large"):
        decode(encoded(pixels(size=(7, 7))), "a", Rules())


def test_an_error_survives_the_way_from_another_process():
    assert str(pickle.loads(pickle.dumps(ImageError("a is odd")))) == "a is odd"
