"""What a request may say, however it is said: images of every mode, sizes, scales, nulls, and values of any length."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.utils.loading_utils import load_image as diffusers_load_image
from hypothesis import given
from hypothesis import strategies as st
from oracle import Checkpoint
from PIL import Image

from cineline import CinelineError, InvalidRequest, VideoRequest
from cineline.cli.batch import Outputs, tasks_of_file
from cineline.cli.generate import _describe
from cineline.core.image import load_image
from cineline.core.output import check_folder, check_output, check_rate, whole_file
from cineline.errors import VALUE_LIMIT, reason, shown
from cineline.families.configs import read_json
from cineline.families.registry import open_checkpoint
from cineline.families.wan.known import KNOWN
from cineline.families.wan.random_checkpoint import RandomConfig
from cineline.families.wan.spec import WanSpec
from cineline.media.compare import compare_files
from cineline.weights.layout import files_of, shards_of

I2V, T2V, TI2V = (KNOWN[f"Wan-AI/Wan2.2-{name}-Diffusers"] for name in ("I2V-A14B", "T2V-A14B", "TI2V-5B"))
ORDINARY = ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"]
DEEP = {"I;16": "<u2", "I;16L": "<u2", "I;16B": ">u2", "I;16N": "=u2"}
sides = st.integers(1, 6)


@st.composite
def pictures(draw: st.DrawFn, mode: str) -> Image.Image:
    """Of random bytes; a palette has random colours and maybe a transparent one."""
    width, height = draw(sides), draw(sides)
    size = len(Image.new(mode, (width, height)).tobytes())
    picture = Image.frombytes(mode, (width, height), draw(st.binary(min_size=size, max_size=size)))
    if mode in ("P", "PA"):
        picture.putpalette(draw(st.binary(min_size=768, max_size=768)))
    if mode == "P" and draw(st.booleans()):
        picture.info["transparency"] = draw(st.one_of(st.integers(0, 255), st.binary(min_size=256, max_size=256)))
    exif = Image.Exif()
    exif[0x0112] = draw(st.integers(1, 8))
    picture.info["exif"] = exif.tobytes()
    return picture


@pytest.mark.parametrize("mode", ORDINARY)
@given(data=st.data())
def test_an_ordinary_image_is_what_diffusers_makes_of_it(mode: str, data: st.DataObject) -> None:
    picture = data.draw(pictures(mode))
    ours = load_image(picture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a palette's transparency, which diffusers warns of and drops
        theirs = diffusers_load_image(picture)
    assert (ours.mode, ours.size, ours.tobytes()) == ("RGB", theirs.size, theirs.tobytes())
    again = load_image(ours)  # the engine may be given what the command line has loaded
    assert (again.size, again.tobytes()) == (ours.size, ours.tobytes())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_and_a_pil_image_of_it_are_turned_upright(orientation: int, tmp_path: Path) -> None:
    file = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.arange(36, dtype=np.uint8).reshape(3, 4, 3)).save(file, exif=exif)
    theirs = diffusers_load_image(str(file))
    assert theirs.size == ((4, 3) if orientation < 5 else (3, 4))
    for ours in (load_image(file), load_image(Image.open(file))):
        assert (ours.size, ours.tobytes()) == (theirs.size, theirs.tobytes())


@pytest.mark.parametrize("mode", DEEP)
@given(values=st.lists(st.integers(0, 65535), min_size=1, max_size=40))
def test_deep_grey_keeps_its_upper_bits(mode: str, values: list[int]) -> None:
    picture = Image.frombytes(mode, (len(values), 1), np.array(values, DEEP[mode]).tobytes())
    made = np.asarray(load_image(picture))
    assert made.shape == (1, len(values), 3)
    assert np.array_equal(made[0], np.repeat(np.array(values)[:, None] // 256, 3, axis=1))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_deep_grey_of_a_file_looks_as_in_8_bits(suffix: str, tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey * 257).save(tmp_path / f"deep.{suffix}")
    assert np.array_equal(np.asarray(load_image(tmp_path / f"deep.{suffix}"))[..., 0], grey)


@given(data=st.data(), most=st.integers(256, 65535) | st.just(65535), plain=st.booleans(), opened=st.booleans())
def test_deep_grey_of_a_pgm_is_scaled_by_its_own_white(
    data: st.DataObject, most: int, plain: bool, opened: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = np.array([0, most, *data.draw(st.lists(st.integers(0, most), max_size=40))])
    words = " ".join(map(str, values)).encode() if plain else values.astype(">u2").tobytes()
    file = tmp_path_factory.getbasetemp() / "deep.pgm"
    file.write_bytes(b"P%d\n%d 1\n%d\n" % (2 if plain else 5, len(values), most) + words)
    made = np.asarray(load_image(Image.open(file) if opened else file))
    assert np.array_equal(made[0], np.repeat(np.rint(values / most * 65535).astype(int)[:, None] // 256, 3, axis=1))
    assert made[0, :2].tolist() == [[0] * 3, [255] * 3]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
@pytest.mark.parametrize("most", [1, 255, 65535])
def test_values_without_a_white_are_refused(dtype: type, most: int, tmp_path: Path) -> None:
    picture = Image.fromarray(np.linspace(0, most, 16).reshape(4, 4).astype(dtype))
    picture.save(tmp_path / "values.tiff")
    for image, name in ((picture, "The image"), (tmp_path / "values.tiff", f"image='{tmp_path}/values.tiff'")):
        words = "has 32-bit values .* which of them is white is not known: give one of 8"
        with pytest.raises(InvalidRequest, match=f"^{name} {words}"):
            load_image(image)


@given(rubbish=st.binary(max_size=60), start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0", b"BM"]))
def test_a_broken_file_is_refused_in_one_sentence(
    rubbish: bytes, start: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "broken"
    file.write_bytes(start + rubbish)
    try:
        load_image(file)
    except InvalidRequest as error:
        assert str(error).startswith(f"image='{file}'") and "\n" not in str(error)


@pytest.mark.parametrize("address", ["https://host/cat.png", "http://host/cat.png?a=b", "file:///cat.png", "s3://a/b"])
def test_an_address_is_no_file(address: str) -> None:
    with pytest.raises(InvalidRequest, match="is an address, and nothing is downloaded: give a file"):
        load_image(Path(address))


extents = st.integers(1, 3000)


@given(width=extents, height=extents, tokens=st.integers(1, 60), which=st.sampled_from(["height", "width"]))
def test_the_side_left_out_follows_from_the_images_shape(width: int, height: int, tokens: int, which: str) -> None:
    given_side = tokens * 16
    request = VideoRequest(prompt="x", image=Image.new("RGB", (width, height)), **{which: given_side})
    exact = given_side * (width / height if which == "height" else height / width)
    other = "width" if which == "height" else "height"
    try:
        job = I2V.resolve(request, 0)
    except InvalidRequest as error:
        assert exact > 1024 * 16
        assert f"The image has {width}x{height} pixels" in str(error)
        assert "crop the image, or give both height and width" in str(error)
        return
    assert getattr(job, which) == given_side
    made = getattr(job, other)
    assert made % 16 == 0
    assert made == 16 or abs(made - exact) <= 8


@given(width=st.integers(1, 60_000), height=st.integers(1, 3))
def test_an_image_of_extreme_shape_is_blamed_itself(width: int, height: int) -> None:
    for size in ((width, height), (height, width)):
        try:
            job = I2V.resolve(VideoRequest(prompt="x", image=Image.new("1", size)), 0)
        except InvalidRequest as error:
            assert str(error).startswith(f"The image has {size[0]}x{size[1]} pixels")
        else:
            assert max(job.height, job.width) <= 1024 * 16
        both = VideoRequest(prompt="x", image=Image.new("1", size), height=32, width=64)
        assert (I2V.resolve(both, 0).height, I2V.resolve(both, 0).width) == (32, 64)


def test_an_image_file_is_blamed_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "long.png"
    Image.new("1", (60_000, 1)).save(file)
    with pytest.raises(InvalidRequest, match=f"^image='{file}' has 60000x1 pixels, and a video of that shape"):
        I2V.resolve(VideoRequest(prompt="x", image=file), 0)


def test_without_an_image_a_side_left_out_is_the_default() -> None:
    job = TI2V.resolve(VideoRequest(prompt="x", height=352), 0)
    assert (job.height, job.width) == (352, 1280)


scales = st.none() | st.floats(-5, 20)


@given(first=scales, second=scales, boundary=st.none() | st.sampled_from([0.0, 0.5, 1.0]))
def test_scales_mean_what_they_mean_in_diffusers(
    first: float | None, second: float | None, boundary: float | None
) -> None:
    """`WanPipeline.__call__`: a second scale left out is the first, and the first alone turns guidance on."""
    fields = {"guidance_scale": first, "guidance_scale_2": second, "boundary_ratio": boundary}
    job = T2V.resolve(VideoRequest(prompt="x", **fields), 0)
    kind = (4.0, 3.0)
    expected = (first, first if second is None else second) if first is not None else (kind[0], second)
    if first is None and second is None:
        expected = kind
    assert (job.guidance_scale, job.guidance_scale_2) == expected
    assert job.branches == job.texts == (2 if job.guidance_scale > 1 else 1)
    words = _describe(job)
    if job.branches == 1:
        assert "no guidance" in words
        assert "guidance scale 2" not in words
    else:
        second_text = job.own_settings["guidance_scale_2"]
        assert float(second_text) == expected[1]
        assert f"guidance {expected[0]:g}, guidance scale 2 {second_text}," in words


def test_a_checkpoints_own_first_scale_alone_is_both_experts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "t2v"
    folder.symlink_to(checkpoint(RandomConfig("t2v", seed=3)))
    copied = tmp_path / "copied"
    copied.mkdir()
    for part in folder.resolve().iterdir():
        (copied / part.name).symlink_to(part)
    (copied / "cineline.json").write_text('{"guidance_scale": 2.0}')
    assert WanSpec.open(copied).resolve(VideoRequest(prompt="x"), 0).guidance_scale_2 == 2.0


FIELDS: dict[str, Any] = {
    "prompt": "a cat",
    "negative_prompt": "a dog",
    "image": "cat.png",
    "height": 32,
    "width": 64,
    "num_frames": 5,
    "num_inference_steps": 2,
    "guidance_scale": 2.0,
    "guidance_scale_2": 3.0,
    "flow_shift": 3.0,
    "boundary_ratio": 0.5,
    "switch_step": 1,
    "solver": "euler",
    "sigmas": (1.0, 0.5),
    "preset": "lightning",
    "skip_guidance_at_one": True,
    "seed": 7,
    "fps": 8,
    "decode": False,
    "loras": ("style",),
    "timeout_s": 60.0,
    "num_videos": 2,
    "fit": "crop",
    "last_image": "dog.png",
    "preview": 2,
    "cache": "mag:0.1",
}


def test_every_field_is_drawn() -> None:
    assert FIELDS.keys() == VideoRequest.model_fields.keys()


@given(nulls=st.sets(st.sampled_from([name for name in FIELDS if name != "prompt"])))
def test_a_null_is_a_field_left_out(nulls: set[str]) -> None:
    left_out = {name: value for name, value in FIELDS.items() if name not in nulls}
    request = VideoRequest(**left_out, **dict.fromkeys(nulls))
    assert request == VideoRequest(**left_out)
    assert request.model_fields_set == left_out.keys()
    assert VideoRequest.model_validate(FIELDS | dict.fromkeys(nulls)) == request


@given(nulls=st.sets(st.sampled_from([name for name in FIELDS if name not in ("prompt", "decode")])))
def test_a_null_of_a_line_takes_the_option(nulls: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    file = folder / "nulls.jsonl"
    file.write_text(json.dumps({"prompt": "a cat", "decode": None} | dict.fromkeys(nulls)))
    options = {name: value for name, value in FIELDS.items() if name not in ("prompt", "decode")}
    (task,) = tasks_of_file(file, options, Outputs(None, folder, None))
    assert task.request == VideoRequest(**FIELDS | {"decode": True})


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": None}, "no 'prompt'"),
        ({"prompt": "x", "colour": None}, "Unknown request field 'colour'"),
        ({"prompt": "x", "self": 1}, "Unknown request field 'self'"),
    ],
)
def test_what_is_no_field_or_must_be_there_is_refused_as_null_too(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        VideoRequest(**fields)


def test_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    line = json.dumps({"prompt": "ein Kätzchen"}, ensure_ascii=False) + "\r\n"
    file.write_bytes(f"\ufeff{line}\ufeff{line}".encode())  # two files joined
    tasks = tasks_of_file(file, {}, Outputs(None, tmp_path, None))
    assert [task.request.prompt for task in tasks] == ["ein Kätzchen"] * 2
    file.write_bytes(line.encode("utf-16"))
    with pytest.raises(InvalidRequest, match="give a text file in UTF-8"):
        tasks_of_file(file, {}, Outputs(None, tmp_path, None))
    (tmp_path / "config.json").write_bytes("\ufeff{}".encode())
    assert read_json(tmp_path / "config.json", "") == {}


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(value=anything, times=st.integers(1, 200))
def test_a_shown_value_is_one_short_line_that_names_its_type_where_it_is_cut(value: object, times: int) -> None:
    for shape in (value, [value] * times, str(value) * times):
        text = shown(shape)
        assert len(text.splitlines()) == 1
        assert len(text) <= VALUE_LIMIT + 20
        whole = repr(shape)
        assert text == whole if len(whole) <= VALUE_LIMIT else text.endswith(f"... ({type(shape).__name__})")


def test_values_that_have_no_repr_are_shown_by_their_type() -> None:
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert shown(nested) == "(list)"
    assert shown(10**5000) == "(int)"
    assert shown(np.zeros((100, 100))).endswith("... (ndarray)")
    assert reason(ValueError("x" * 1000 + "\nand more")) == "x" * 200
    assert reason(ValueError()) == "ValueError"
    while nested:  # from the outside in: to free it at once would recurse
        nested = nested[0]


HUGE = "x" * 500_000
HUGE_VALUES: list[Any] = [HUGE, [HUGE], {HUGE: HUGE}, [0] * 100_000, 10**4000, -(10**4000), "\0", "  " * 300_000]


@pytest.mark.parametrize("name", [*FIELDS, "a field of no request", HUGE], ids=lambda name: name[:20])
@pytest.mark.parametrize("value", HUGE_VALUES, ids=lambda value: type(value).__name__)
def test_a_request_with_a_huge_value_is_refused_in_a_short_sentence(name: str, value: object, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps({"prompt": "x", name: value}))
    try:
        (task,) = tasks_of_file(file, {}, Outputs(None, tmp_path, tmp_path))
        spec = TI2V if name == "image" else T2V
        if task.request.image is not None:
            load_image(task.request.image)
        spec.resolve(task.request, 0)
    except CinelineError as error:
        assert len(str(error)) < 600 + len(str(tmp_path))
        assert "\n" not in str(error)
    else:
        assert name in ("prompt", "negative_prompt")


def test_a_line_that_is_no_object_is_shown_in_short(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps([HUGE]))
    with pytest.raises(InvalidRequest, match=r"line 1: \['xxx.*\.\.\. \(list\) is no JSON object") as refused:
        tasks_of_file(file, {}, Outputs(None, tmp_path, None))
    assert len(str(refused.value)) < 300 + len(str(tmp_path))


def test_a_folder_whose_name_is_too_long_is_refused() -> None:
    with pytest.raises(CinelineError, match="cannot be a folder"):
        check_folder(Path("x" * 5000))


def fill(path: Path) -> None:
    with whole_file(path / "a"):
        raise OSError(28, "No space left on device")


REFUSALS: dict[str, Callable[[Path], object]] = {
    "no folder": lambda path: check_folder(path / "a"),
    "a file for a folder": lambda path: check_folder(path / "file"),
    "a folder for a file": lambda path: check_output(path / "folder.mp4", (".mp4",)),
    "a suffix": lambda path: check_output(path / "a.avi", (".mp4",)),
    "a rate": lambda path: check_rate(path / "a.gif", 100),
    "a full disk": fill,
    "no config": lambda path: read_json(path / "a", "it should"),
    "a broken config": lambda path: read_json(path / "file", "it should"),
    "no model": open_checkpoint,
    "no weights": files_of,
    "no index": lambda path: shards_of(path / "file"),
    "no requests": lambda path: tasks_of_file(path / "empty", {}, Outputs(None, path, None)),
    "a wrong line": lambda path: tasks_of_file(path / "file", {}, Outputs(None, path, None)),
    "nothing to compare": lambda path: compare_files(path / "a.mp4", path / "b.mp4"),
    "two kinds": lambda path: compare_files(path / "a.mp4", path / "a.safetensors"),
}


@pytest.mark.parametrize("refused", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("deep", [1, 10])
def test_a_path_is_repeated_on_one_line_and_not_without_end(
    refused: Callable[[Path], object], deep: int, tmp_path: Path
) -> None:
    path = tmp_path.joinpath(*["a\nb" + "c" * 80] * deep)
    (path / "folder.mp4").mkdir(parents=True)
    (path / "file").write_text("no JSON")
    (path / "empty").write_text("")
    with pytest.raises(CinelineError) as error:
        refused(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    assert r"a\nb" in str(error.value) or deep > 1
