"""A batch's files: their names, none twice, and what becomes of those that are there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cineline import InvalidRequest, OutputError, VideoRequest
from cineline.cli.batch import Outputs, Task, tasks_of_file
from cineline.cli.files import check_name, fields_of, name_of, settle_files
from cineline.cli.resume import BATCH, RESTARTS, files_begun, store, tells_metadata
from cineline.engine.folder import SnapshotFolder
from cineline.families.wan.known import KNOWN

TI2V = KNOWN["Wan-AI/Wan2.2-TI2V-5B-Diffusers"]
Batch = Callable[..., tuple[list[Task], list[Path]]]


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    """The tasks of lines, those of two unless told otherwise, and the files that are kept."""

    def settle(*lines: dict[str, Any], latents: bool = False, begun: bool = False, **options: Any) -> Any:
        file = tmp_path / "lines.jsonl"
        given_lines = lines or ({"seed": 5, "num_videos": 2}, {"seed": 9})
        file.write_text("\n".join(json.dumps({"prompt": "a cat"} | line) for line in given_lines))
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        outputs = Outputs(None, out, out if latents else None, **options)
        check_name(outputs, True)
        return settle_files(TI2V, tasks_of_file(file, {}, outputs), file, outputs, begun)

    return settle


def names(tasks: list[Task]) -> list[list[str]]:
    return [[path.name for path in task.outputs.values()] for task in tasks]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (None, ["0001-1.mp4", "0001-2.mp4", "0002.mp4"]),
        ("{line:04}-{seed}", ["0001-5.mp4", "0001-6.mp4", "0002-9.mp4"]),
        ("cat-{seed}-{video:02}.webp", ["cat-5-01.webp", "cat-6-02.webp", "cat-9-01.webp"]),
        ("{{{line}}}.v1", ["{1}.v1-1.mp4", "{1}.v1-2.mp4", "{2}.v1.mp4"]),
    ],
)
def test_files_are_named_by_the_template(template: str | None, wanted: list[str], batch: Batch) -> None:
    tasks, kept = batch(name=template)
    assert [name for (name,) in names(tasks)] == wanted
    assert kept == []


def test_latents_have_the_videos_names_and_frames_a_folder(batch: Batch) -> None:
    made = names(batch(name="{seed}/", latents=True)[0])
    assert made == [["5", "5.safetensors"], ["6", "6.safetensors"], ["9", "9.safetensors"]]
    assert all(task.frames is not None and task.video is None for task in batch(name="{seed}/")[0])
    assert names(batch(name="{seed}.webp", latents=True)[0])[0] == ["5.webp", "5.safetensors"]


@pytest.mark.parametrize(
    "template", ["{prompt}", "{line.__class__}", "{line!r}", "{line:9999}", "{", "{}", "{0}", "{line:{seed}}"]
)
def test_a_template_of_anything_else_is_refused(template: str, batch: Batch) -> None:
    with pytest.raises(OutputError, match=r"is no template: use \{line\}, \{seed\}, \{video\}"):
        batch(name=template)


@pytest.mark.parametrize("template", ["", "/", "a/{line}", "../{line}", ".", "..", "a\0", "a\nb", "\x1b[2J"])
def test_a_template_that_names_no_file_is_refused(template: str, batch: Batch) -> None:
    with pytest.raises(OutputError, match="which is no file's name: leave folders out"):
        batch(name=template)


@given(st.text(max_size=20))
def test_whatever_the_template_it_names_a_file_in_the_folder_or_is_refused(template: str) -> None:
    try:
        assert fields_of(template) <= {"line", "seed", "video"}
        name = name_of(template, 1, 2, 3)
    except OutputError as error:
        assert "\n" not in str(error)
    else:
        assert (Path("out") / name).parent == Path("out")


def test_two_requests_with_one_file_are_refused(batch: Batch) -> None:
    with pytest.raises(OutputError, match=r"Both line 1 and line 2 would write '.*/out/7.mp4': put"):
        batch({"seed": 7}, {"seed": 7}, name="{seed}")
    assert len(batch({"seed": 7}, {"seed": 8}, name="{seed}")[0]) == 2


def test_a_name_without_a_folder_is_refused() -> None:
    with pytest.raises(OutputError, match=r"--name 'a' is for files in a folder: give --output-dir"):
        check_name(Outputs("b.mp4", None, None, name="a"), False)
    with pytest.raises(OutputError, match="is for files in a folder"):
        check_name(Outputs("b.mp4", None, Path("b.safetensors"), name="a"), False)


def test_what_is_there_is_refused_replaced_or_kept(batch: Batch, tmp_path: Path) -> None:
    batch()
    (tmp_path / "out" / "0001-2.mp4").write_text("mine")
    with pytest.raises(OutputError, match=r"0001-2.mp4' is there already: use --skip-existing to keep it"):
        batch()
    assert len(batch(overwrite=True)[0]) == len(batch(begun=True)[0]) == 3
    tasks, kept = batch(skip_existing=True)
    assert [name for (name,) in names(tasks)] == ["0001-1.mp4", "0002.mp4"]
    assert [path.name for path in kept] == ["0001-2.mp4"]


def test_of_a_request_with_one_of_its_files_the_other_is_made(batch: Batch, tmp_path: Path) -> None:
    batch()
    (tmp_path / "out" / "0001.mp4").write_text("mine")
    (tmp_path / "out" / "0002.safetensors").write_text("mine")
    (first, second), kept = batch({"seed": 1}, {"seed": 2}, latents=True, skip_existing=True)
    assert names([first, second]) == [["0001.safetensors"], ["0002.mp4"]]
    assert (first.request.decode, second.request.decode) == (False, True)
    assert len(kept) == 2


def test_a_batch_that_is_all_there_has_nothing_to_do(batch: Batch, tmp_path: Path) -> None:
    for (name,) in names(batch()[0]):
        (tmp_path / "out" / name).write_text("mine")
    tasks, kept = batch(skip_existing=True)
    assert (tasks, len(kept)) == ([], 3)
    with pytest.raises(OutputError, match="is there already, as are 2 more"):
        batch()


def test_a_file_that_output_names_alone_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("old")
    task, outputs = Task(VideoRequest(prompt="x"), path, None), Outputs(str(path), None, None)
    assert settle_files(TI2V, [task], None, outputs, False) == ([task], [])
    assert settle_files(TI2V, [task], None, Outputs(str(path), None, None, skip_existing=True), False) == ([], [path])
    (tmp_path / "a-1.mp4").write_text("old")
    several = Task(VideoRequest(prompt="x", num_videos=2), path, None)
    with pytest.raises(OutputError, match=r"a-1.mp4' is there already"):
        settle_files(TI2V, [several], None, outputs, False)


def test_what_torchrun_starts_anew_has_the_seeds_and_files_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, outputs = tmp_path / "snapshots", Outputs(None, tmp_path, None, name="{seed}")
    asked = [Task(VideoRequest(prompt="x", seed="random", num_videos=2), tmp_path / "0001.mp4", None)]
    tasks, _ = settle_files(TI2V, asked, Path("lines.jsonl"), outputs, False)
    store(folder, TI2V, asked, tasks, metadata=False)
    kept = SnapshotFolder(folder)
    assert [one.request for one in kept.unfinished()] == [task.request for task in tasks]
    kept.close(10)
    assert not tells_metadata(folder) and tells_metadata(tmp_path)
    assert files_begun(folder, asked, "torchrun") is None
    monkeypatch.setenv(RESTARTS, "1")
    assert files_begun(folder, asked, "torchrun") == [task.video for task in tasks]
    assert files_begun(folder, asked, "local") is None
    assert files_begun(folder, asked * 2, "torchrun") is None
    (folder / BATCH).write_text("[]")
    assert files_begun(folder, asked, "torchrun") is None and tells_metadata(folder)


def test_a_line_that_breaks_a_rule_is_named_before_files_are_looked_at(batch: Batch) -> None:
    with pytest.raises(InvalidRequest, match=r"line 2: num_frames=6"):
        batch({}, {"num_frames": 6}, name="{seed}")


def test_skip_and_overwrite_contradict_each_other(batch: Batch) -> None:
    with pytest.raises(OutputError, match="Both --skip-existing and --overwrite"):
        batch(skip_existing=True, overwrite=True)


def test_a_drawn_seed_is_not_given_to_half_a_request(batch: Batch, tmp_path: Path) -> None:
    line = {"seed": "random"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0001.mp4").touch()
    with pytest.raises(OutputError, match=r"0001\.safetensors' is missing beside what is there, whose seed was drawn"):
        batch(line, latents=True, skip_existing=True)
    (tmp_path / "out" / "0001.safetensors").touch()
    assert batch(line, latents=True, skip_existing=True)[0] == []


def test_only_folders_with_frames_are_kept(batch: Batch, tmp_path: Path) -> None:
    for name in ("5", "6"):
        (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / "6" / "0001.png").touch()
    (tmp_path / "out" / "6" / ".DS_Store").touch()
    tasks, kept = batch(name="{seed}/", skip_existing=True)
    assert ([path.name for path in kept], [name for (name,) in names(tasks)]) == (["6"], ["5", "9"])


def test_a_preview_takes_no_files_place(batch: Batch, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "0001.preview.webp").write_text("mine")
    with pytest.raises(OutputError, match=r"0001\.preview\.webp' is there already, and the preview"):
        batch({"preview": 1})
    assert len(batch({"preview": 1}, overwrite=True)[0]) == 1
    assert len(batch({})[0]) == 1
