"""The benchmark of input: the same images everywhere, counts that are right, goals with numbers."""

import dataclasses
import io
import json
import os
import pathlib
import sys
import zipfile
from typing import Any

import numpy as np
import processes
import pytest
from PIL import Image

from base.errors import UserError
from benchmarks import input, input_formats, input_photos, input_report, input_worker
from benchmarks.input_case import (
    DECODE,
    FAST,
    FORMATS,
    GROUPS,
    OURS,
    PIL,
    SOURCES,
    InputJob,
    systems,
)
from benchmarks.input_worker import Bare, CountingPreprocess, CpuClock, Loader, open_source
from benchmarks.loss_worker import Worker
from input_pipeline.transforms.preprocess import Preprocess

COUNT = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("input") / "data"
    input_formats.prepare(folder, COUNT)
    return folder


def test_images_have_imagenets_size_and_are_the_same_each_time():
    picture = input_photos.Textures()
    image = input_photos.jpeg(picture(3), 9.0, 3)
    assert image == input_photos.jpeg(picture(3), 9.0, 3) != input_photos.jpeg(picture(3), 9.0, 4)
    with Image.open(io.BytesIO(image)) as opened:
        assert opened.size == (500, 375)


def test_grain_is_tuned_to_the_mean_size(data):
    made = json.loads((data / "made.json").read_text())
    files = [path.stat().st_size for path in (data / "files").glob("*.jpg")]
    assert made["mean_bytes"] == np.mean(files) == pytest.approx(110_000, rel=0.03)


def test_every_format_has_the_same_images_and_captions(data):
    wanted = {example_of(open_source(data, ""), i) for i in range(COUNT)}
    assert len(wanted) == COUNT
    for name in SOURCES:
        source = open_source(data, name)
        assert {example_of(source, i) for i in range(len(source))} == wanted, name


def example_of(source, i: int) -> tuple[bytes, str]:
    example = source[i]
    (text,) = example["texts"]
    return bytes(example["image"]), text


def test_data_are_made_once_and_no_others_are_taken(data, tmp_path):
    before = (data / "recipe.json").stat().st_mtime_ns
    assert input_formats.prepare(data, COUNT)["count"] == COUNT
    assert (data / "recipe.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="new folder"):
        input_formats.prepare(data, COUNT + 1)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="not of this benchmark"):
        input_formats.prepare(tmp_path, COUNT)


@pytest.mark.parametrize("zipped", [True, False])
def test_photographs_are_cut_to_4_by_3_and_return_mirrored(tmp_path, zipped):
    file = io.BytesIO()
    ramp = np.tile(np.arange(200, dtype=np.uint8)[:, None], (100, 1, 1)).repeat(3, 2)
    Image.fromarray(ramp).save(file, "PNG")
    place = tmp_path
    (tmp_path / "a.png").write_bytes(file.getvalue())
    if zipped:
        place = tmp_path / "photos.zip"
        with zipfile.ZipFile(place, "w") as archive:
            archive.writestr("a.png", file.getvalue())
    photos = input_photos.Photos(str(place), 10)
    assert photos(0).shape == (375, 500, 3)
    assert 30 <= photos(0)[0, 0, 0] <= 36  # the middle 133 of 200 columns
    np.testing.assert_array_equal(photos(1), photos(0)[:, ::-1])


class Counted(CpuClock):
    """A clock that shows how many images its time is divided by."""

    def per(self, images):
        assert all(seconds > 0 for seconds in super().per(images))
        return [images]


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(input_worker, "CpuClock", Counted)


@pytest.mark.parametrize("name", ["", "parquet"])
def test_as_many_images_count_as_are_made(data, name, counted, monkeypatch):
    made, example = [], Preprocess.example
    monkeypatch.setattr(Preprocess, "example", lambda *a: (made.append(1), example(*a))[1])
    loader = Loader(InputJob({"source": name, "image": FAST}, str(data), 8, 2))
    (count,) = loader.measure(1)
    assert 8 <= count <= len(made)


def test_rows_are_counted_when_they_are_made(data):
    loader = Loader(InputJob({"source": "", "image": FAST}, str(data), 8, 2))
    counted = CountingPreprocess(loader._preprocess)
    with loader.stream(counted) as stream:
        batch = next(stream)
    assert batch["image"].shape == (8, 224, 224, 3) and batch["image"].dtype == np.uint8
    assert counted.rows >= 8


@pytest.mark.parametrize("resize", [True, False])
def test_the_bare_decoder_is_measured(data, resize, counted):
    assert Bare(InputJob({"resize": resize}, str(data), 8, 1)).measure(2) == [16]


def test_the_pil_path_needs_no_peer_and_a_missing_peer_is_named(data):
    for options, words in (({"peer": "pil"}, ""), ({"peer": "tf_data"}, "not installed in")):
        job = InputJob(options, str(data), 8, 2)
        code = "import sys; sys.modules['tensorflow'] = None\n"
        code += "from benchmarks.input_peers import InputJob, make\n"
        code += f"try: print(make(InputJob(**{dataclasses.asdict(job)!r})).measure(2))\n"
        code += "except Exception as error: print(error)"
        done = processes.run([sys.executable, "-c", code])
        if words:
            assert words in done.stdout
        else:
            assert all(seconds > 0 for seconds in json.loads(done.stdout))


def test_a_worker_that_fails_is_left_out_and_says_why(data):
    bench = input.InputBench(data, 8, 2)
    system = next(s for s in systems(True) if s.name == PIL)
    bench.prepare(system, ["/no/such/python", sys.executable], "")
    bench.prepare(dataclasses.replace(system, name="x"), ["/no/such/python"], "")
    try:
        bench.measure(2, 1)
    finally:
        bench.close()
    pil, missing = bench.records
    assert len(pil["cpu_s"]) == len(pil["wall_s"]) == 2 and "PIL" in pil["versions"]
    assert "no such interpreter" in missing["left_out"] and "cpu_s" not in missing


def test_every_system_is_in_a_table():
    names = [system.name for system in systems(True)]
    assert len(set(names)) == len(names) and {OURS, DECODE, PIL} <= set(names)
    assert {system.group for system in systems(True)} == set(GROUPS)
    assert {s.name for s in systems(True)} - {s.name for s in systems(False)} == {
        s.name for s in systems(True) if s.foreign
    }
    assert [s.name for s in systems(False) if s.group == FORMATS] == list(SOURCES)


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--rounds", "0"], "at least 1"),
        (["--count", "3"], "at least 16"),
        (["--model", "B/15"], "invalid choice"),
        (["--photos", "/no/such/photos"], "neither a folder nor a zip"),
        (["--wat"], "unrecognized"),
    ],
)
def test_mistakes_are_one_line(argv, said, capsys, tmp_path):
    try:
        code = input.main([*argv, "--out", str(tmp_path / "x.json")])
    except SystemExit as end:
        code = end.code
    err = capsys.readouterr().err
    assert code == 2 and said in err and len(err.splitlines()) == 1


def test_commands_are_quoted_without_paths_of_this_machine():
    argv = ["--photos", "/x", "--data=/y", "--peer_python", "/p", "--count", "64"]
    assert input.shown(argv) == "python -m benchmarks.input --photos FOLDER_OR_ZIP --count 64"


MACHINE = {
    "platform": "cpu", "cores": 2, "cpu": "c", "memory_gib": 1, "accelerator": None,
    "python": "3", "versions": {}, "date": "2026-01-01T00:00",
}  # fmt: skip


def record(ours: float = 1 / 500, **more):
    def system(name, group, cpu):
        return {"name": name, "group": group, "cpu_s": [cpu] * 3, "wall_s": [cpu / 2] * 3}

    return {
        "title": "case",
        "command": "python -m benchmarks.input",
        "machine": MACHINE,
        "count": 16,
        "mean_bytes": 110_000.0,
        "how": "textures",
        "rounds": 3,
        "repeat": 2,
        "unit": "batches",
        "others_share_of_cpu": 0.0,
        "systems": [
            system("webdataset", GROUPS[0], ours),
            system(OURS, GROUPS[1], ours),
            system(DECODE, GROUPS[2], 1 / 560),
            system(PIL, GROUPS[3], 1 / 190),
            {"name": "tf.data", "group": GROUPS[3], "left_out": "no TensorFlow"},
        ],
        **more,
    }


def test_goals_are_judged_with_numbers():
    done = input_report.with_statistics(record())
    assert [line.partition(":")[0] for line in done["goals"]] == ["met", "met"]
    assert "= 476" in done["goals"][0] and "2.63 x" in done["goals"][1]
    ours = next(s for s in done["systems"] if s["name"] == OURS)
    assert ours["per_core"] == pytest.approx(500)
    assert ours["images_per_s"] == pytest.approx(1000)
    assert ours["of_bare"] == pytest.approx(500 / 560)
    slow = input_report.with_statistics(record(1 / 470))
    assert [line.partition(":")[0] for line in slow["goals"]] == ["not met", "not met"]


def test_tables_have_every_group_and_what_is_left_out():
    screen = input_report.on_screen(input_report.with_statistics(record()))
    assert all(group in screen for group in GROUPS) and "goal met" in screen
    assert "left out, tf.data: no TensorFlow" in screen


def test_the_goal_of_a_step_is_for_models_slower_than_the_loader():
    seconds = [[1.0, 1.02, 0.01], [1.0, 1.01, 0.01], [1.0, 1.05, 0.01]]
    step = {"seconds": seconds, "loader_s": 0.5, "systems": []}
    done = input_report.with_step_statistics(step)
    assert done["goals"][0].startswith("met: 1.020 x")
    done = input_report.with_step_statistics({**step, "loader_s": 2.0})
    assert done["goals"][0].startswith("does not apply")


def test_results_of_other_cases_stay_in_the_file(tmp_path):
    file = tmp_path / "input_cpu.json"
    input_report.write(input_report.with_statistics(record()), file)
    seconds = {"seconds": [[1.0, 1.0, 0.1]], "loader_s": 0.5, "systems": [], "title": "a step"}
    input_report.write(input_report.with_step_statistics(record(**seconds)), file)
    assert [case["title"] for case in json.loads(file.read_text())["cases"]] == ["case", "a step"]
    page = file.with_suffix(".md").read_text()
    assert f"| {OURS.replace('|', chr(92) + '|')} | 500 |" in page
    assert "## a step" in page and "wait share" in page and "Left out: tf.data" in page


@pytest.mark.slow
def test_a_step_is_fed_from_memory_and_from_files(data):
    from benchmarks.input_step import StepJob
    from benchmarks.train import make_case

    model = {"img": {"variant": "mu/16"}, "txt": {"variant": "mu", "vocab_size": 300}}
    case = make_case("mu/16", model, 8, 32, 8, "float32")
    env = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    job: Any = StepJob(dataclasses.asdict(case), str(data), 2)
    worker = Worker(sys.executable, "benchmarks.input_step", job, env)
    try:
        assert worker.prepare()["loader_s"] > 0
        memory, files, wait = worker.measure(2)
    finally:
        worker.close()
    assert memory > 0 and 0 < wait <= files


@pytest.mark.slow
@pytest.mark.parametrize("name", [s.name for s in systems(True) if s.foreign])
def test_peers_make_the_same_number_of_pixels(data, name):
    pythons = os.environ.get("SIGLIP_PEER_PYTHON", "")
    if not pythons:
        pytest.skip("SIGLIP_PEER_PYTHON names no interpreter that has peers")
    bench = input.InputBench(data, 8, 2)
    system = next(s for s in systems(True) if s.name == name)
    first = os.environ.get("SIGLIP_PEER_IMPORT", "")
    bench.prepare(system, pythons.split(os.pathsep), first)
    bench.close()
    if reason := bench.records[0].get("left_out"):
        pytest.skip(reason)
