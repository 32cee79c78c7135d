"""`kdlib.dataset.fused`: the bits of the plain path, in its own rows and nowhere else."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from kdlib.dataset.fused import _block, _compiled, available, deliver
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.views import apply, draw
from kdlib.study.training import Augment, Blur, ColourJitter, ResizedCrop

compiled = pytest.mark.skipif(not available(), reason="numba is not installed")
FORMATS = (torch.contiguous_format, torch.channels_last)
EVERYTHING = Augment(
    flip=True,
    resized_crop=ResizedCrop(),
    colour_jitter=ColourJitter(
        brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, probability=0.8
    ),
    grayscale=0.3,
    blur=Blur(probability=0.6, sigma=(0.1, 1.5)),
)
WITHOUT_NUMBA = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "numba":
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocker())
from kdlib.dataset import fused
print(fused.available())
"""


def source_of(n: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), np.uint8)


def pixels_of(n_channels: int) -> Pixels:
    return Pixels([0.49, 0.0, 0.45][:n_channels], [0.25, 0.24, 0.26][:n_channels])


def assert_same_bits(ours: torch.Tensor, expected: torch.Tensor) -> None:
    assert ours.shape == expected.shape
    assert torch.equal(ours.contiguous().view(torch.int32), expected.contiguous().view(torch.int32))


def deliver_and_compare(source, rows, settings, memory_format, n_threads) -> None:
    """Delivers into the middle of a marked buffer; compares, and looks at the marks beside it."""
    n, shape = len(rows), source.shape[1:]
    ids = torch.arange(n) * 13
    views = None if settings is None else draw(settings, 5, ids % 3, ids, shape)
    out = torch.full((n + 2, *shape), -77.0).to(memory_format=memory_format)
    deliver(source, rows, views, pixels_of(shape[0]), out[1:-1], n_threads)
    images = torch.from_numpy(np.array(source))[rows]
    expected = pixels_of(shape[0]).prepare(images if views is None else apply(images, views))
    assert_same_bits(out[1:-1], expected)
    assert torch.all(out[[0, -1]] == -77.0)


def strengths(n_channels: int) -> st.SearchStrategy[ColourJitter | None]:
    some = st.sampled_from([0.0, 0.3, 1.0, 8.0])
    none = st.just(0.0)
    hue = st.sampled_from([0.0, 0.1, 0.5]) if n_channels == 3 else none
    return st.none() | st.builds(
        ColourJitter,
        brightness=some,
        contrast=some,
        saturation=some if n_channels == 3 else none,
        hue=hue,
        probability=st.sampled_from([None, 0.5]),
    )


@st.composite
def views_of(draw_one, n_channels: int, side: int) -> Augment | None:
    kind = draw_one(st.sampled_from(["none", "padded", "resized"]))
    if kind == "none":
        return None
    crop = ResizedCrop(scale=(0.05, 1.0), ratio=(0.3, 3.0)) if kind == "resized" else None
    kernels = st.integers(1, side - 1).map(lambda radius: 2 * radius + 1)
    return Augment(
        crop_padding=draw_one(st.integers(0, 12)) if kind == "padded" else 0,
        flip=draw_one(st.booleans()),
        resized_crop=crop,
        colour_jitter=draw_one(strengths(n_channels)),
        grayscale=draw_one(st.sampled_from([None, 0.5])) if n_channels == 3 else None,
        blur=draw_one(st.none() | st.builds(Blur, kernel_size=kernels)) if side > 1 else None,
    )


@compiled
@examples(max_examples=300, deadline=None)
@given(data=st.data())
def test_the_bits_are_those_of_the_plain_path(data):
    n_channels = data.draw(st.sampled_from([1, 3, 3]))
    shape = (n_channels, data.draw(st.integers(1, 19)), data.draw(st.integers(1, 19)))
    settings = data.draw(views_of(n_channels, min(shape[1:])))
    source = source_of(9, shape, data.draw(st.integers(0, 5)))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, 8), max_size=12)), dtype=torch.int64)
    n_threads = data.draw(st.integers(1, 3))
    deliver_and_compare(source, rows, settings, data.draw(st.sampled_from(FORMATS)), n_threads)


@compiled
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("settings", [None, Augment(crop_padding=4, flip=True), EVERYTHING])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 96, 64)])
def test_the_bits_are_those_of_the_plain_path_in_images_of_usual_size(
    shape, settings, memory_format
):
    if shape[0] == 1 and settings is EVERYTHING:
        settings = Augment(
            resized_crop=ResizedCrop(), colour_jitter=ColourJitter(contrast=0.4), blur=Blur()
        )
    rows = torch.arange(40) * 7 % 30
    deliver_and_compare(source_of(30, shape), rows, settings, memory_format, 2)


@compiled
def test_every_pixel_value_has_the_bits_of_the_plain_path():
    source = np.arange(768, dtype=np.uint8).reshape(1, 3, 16, 16)
    for memory_format in FORMATS:
        deliver_and_compare(source, torch.zeros(1).long(), None, memory_format, 1)


@compiled
def test_a_read_only_memory_map_is_read(tmp_path):
    source = source_of(6, (3, 5, 4))
    np.save(tmp_path / "shard.npy", source)
    mapped = np.load(tmp_path / "shard.npy", mmap_mode="r", allow_pickle=False)
    assert not mapped.flags.writeable
    rows = torch.tensor([5, 0, 3])
    deliver_and_compare(mapped, rows, EVERYTHING, torch.channels_last, 1)
    np.testing.assert_array_equal(mapped, source)


@compiled
def test_images_may_lie_apart_and_a_batch_may_be_empty():
    rows, shape = torch.tensor([3, 0, 2, 3]), (3, 5, 4)
    table = source_of(4, (71,))  # 60 bytes of each row are the image
    apart = np.lib.stride_tricks.as_strided(table[:, 7:], (4, *shape), (71, 20, 4, 1))
    np.testing.assert_array_equal(apart[1].ravel(), table[1, 7:67])
    everywhere = np.broadcast_to(source_of(1, shape), (4, *shape))
    for source in (apart, source_of(8, shape)[::2], everywhere):
        for settings in (None, Augment(crop_padding=2, flip=True), EVERYTHING):
            deliver_and_compare(source, rows, settings, torch.channels_last, 2)
    nothing = torch.zeros(0, dtype=torch.int64)
    for n in (0, 2):
        deliver_and_compare(source_of(n, shape), nothing, EVERYTHING, FORMATS[0], 2)


@compiled
def test_the_source_may_be_a_tensor_and_stays_as_it_is():
    source = torch.from_numpy(source_of(6, (3, 5, 4)))
    before, out, ids = source.clone(), torch.empty(6, 3, 5, 4), torch.arange(6)
    views = draw(EVERYTHING, 0, ids, ids, (3, 5, 4))
    deliver(source, ids, views, pixels_of(3), out)
    assert torch.equal(source, before)
    assert_same_bits(out, pixels_of(3).prepare(apply(source, views)))


@compiled
@pytest.mark.parametrize(("n", "rows"), [(4, [0, 4]), (4, [-1, 0]), (0, [0, 0])])
def test_rows_outside_the_source_are_refused(n, rows):
    with pytest.raises(ValueError, match=rf"rows span .* integers in \[0, {n}\)"):
        deliver(
            source_of(n, (3, 5, 4)), torch.tensor(rows), None, pixels_of(3), torch.zeros(2, 3, 5, 4)
        )


@compiled
@pytest.mark.parametrize(("n", "shape"), [(3, (3, 5, 4)), (2, (3, 4, 5)), (2, (1, 5, 4))])
def test_views_of_other_images_are_refused(n, shape):
    ids = torch.arange(n)
    views = draw(Augment(flip=True), 0, ids, ids, shape)
    with pytest.raises(ValueError, match="views"):
        deliver(
            np.zeros((4, 3, 5, 4), np.uint8), torch.tensor([0, 3]), views,
            pixels_of(3), torch.zeros(2, 3, 5, 4),
        )  # fmt: skip


def test_without_numba_the_module_imports_and_says_so():
    done = subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@compiled
def test_importing_does_not_import_numba():
    code = "import sys; from kdlib.dataset import fused; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


@compiled
def test_without_a_folder_for_machine_code_it_is_kept_in_memory(monkeypatch):
    """In place of a compilation: numba, as it refuses, and as it then accepts."""
    import numba

    asked = []

    def njit(*args, cache=False, **options):
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function '_block': no locator available")
        return lambda function: function

    monkeypatch.setattr(numba, "njit", njit)
    assert _compiled.__wrapped__() is _block
    assert asked == [True, False]
