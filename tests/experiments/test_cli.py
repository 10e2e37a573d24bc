"""The command line: bad input in one line with status 2 and nothing overwritten, and all commands after one another."""

import csv
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from foveate.data import Scenes, orl_clutter, orl_scenes
from foveate.experiments import attending
from foveate.experiments.cli import COMMANDS, main
from foveate.inference.checkpoint import load
from foveate.inference.posterior import Posterior

THREADS = ["--threads", "1"]
SMALL = ((96, 120), (120, 96))


def _write_pictures(scenes: Scenes, folder: Path, labels: bool = True) -> Path:
    folder.mkdir(parents=True)
    rows = ["file,a,b,tx,ty,person"]
    for scene in scenes:
        name = f"{scene.name}.png"
        Image.fromarray((scene.picture.numpy() * 255).round().astype(np.uint8)).save(folder / name)
        if scene.gaze is not None:
            rows.append(",".join([name, *map(str, scene.gaze.tolist()), str(scene.person)]))
    if labels:
        (folder / "gazes.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def _contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must refuse its input; returns what it says."""
    assert main([*arguments, *THREADS]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    lines = told.err.strip().splitlines()
    assert len(lines) == 1, told.err
    assert lines[0].startswith(f"foveate {arguments[0]}: ")
    return lines[0]


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_takes_seed_device_and_threads_and_explains_itself(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for option in ("--seed", "--device {auto,cpu,cuda}", "--threads", "--out"):
        assert option in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "faces:DIR"], "unknown SPEC 'faces:DIR'; write orl"),
        (["train", "--data", "orl@validation"], "unknown split 'validation'"),
        (["train", "--data", "folder:nowhere"], "nowhere: no such folder"),
        (["train"], "no SPEC was given"),
        (["train", "--data", "orl", "--clutter", "caltech:DIR"], "show faces"),
        (["train", "--data", "orl", "--glance-steps", "0"], "--glance-steps 0: at least 1 is needed"),
        (["train", "--data", "orl", "--seed", "-1"], "--seed -1: at least 0 is needed"),
        (["train", "--data", "orl", "--seed", "2147483648"], "at most 2147483647 is possible"),
        (["train", "--data", "orl", "--threads", "0"], "--threads 0: at least 1 is needed"),
        (["demo", "--unseen", "0"], "--unseen 0: at least 1 is needed"),
        (["demo", "--draws", "0"], "--draws 0: at least 1 is needed"),
        (["attend", "nowhere", "x.png"], "nowhere: there is no such run"),
        (["evaluate", "nowhere", "--data", "orl@test"], "nowhere: there is no such run"),
        (["sample", "nowhere"], "nowhere: there is no such run"),
    ],
    ids=lambda v: v if isinstance(v, str) else None,
)
def test_unusable_options_and_missing_runs_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    name = {"evaluate": "scores.json", "sample": "p.png"}.get(arguments[0], "out")
    told = arguments if "--threads" in arguments else [*arguments, *THREADS]
    assert main([*told, "--out", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_cuda_is_refused_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = _refused(["train", "--data", "orl", "--device", "cuda", "--out", str(tmp_path / "run")], capsys)
    assert "sees no CUDA device" in told


def _no_labels(folder: Path) -> str:
    (folder / "gazes.csv").unlink()
    return "neither landmarks.csv nor gazes.csv"


def _missing_row(folder: Path) -> str:
    lines = (folder / "gazes.csv").read_text().splitlines()
    (folder / "gazes.csv").write_text("\n".join(lines[:-1]))
    return "has no row for picture"


def _extra_row(folder: Path) -> str:
    with (folder / "gazes.csv").open("a") as table:
        table.write("ghost.png,1,0,50,50,me\n")
    return "'ghost.png' is not in"


def _gaze_outside(folder: Path) -> str:
    lines = (folder / "gazes.csv").read_text().splitlines()
    lines[1] = ",".join([lines[1].split(",")[0], "2", "0", "900", "50", "me"])
    (folder / "gazes.csv").write_text("\n".join(lines))
    return "gazes.csv"


def _truncated(folder: Path) -> str:
    picture = sorted(folder.glob("*.png"))[1]
    picture.write_bytes(picture.read_bytes()[:2000])
    return picture.name


def _damaged_within(folder: Path) -> str:
    """A picture that ends as it should and cannot be decoded: found only by reading it, before any long work."""
    picture = sorted(folder.glob("*.png"))[1]
    data = bytearray(picture.read_bytes())
    data[1500:1600] = bytes(100)
    picture.write_bytes(bytes(data))
    return picture.name


def _one_pixel(folder: Path) -> str:
    picture = sorted(folder.glob("*.png"))[1]
    Image.new("L", (1, 1)).save(picture)
    return "1×1 pixels, too small"


@pytest.mark.parametrize(
    "spoil",
    [_no_labels, _missing_row, _extra_row, _gaze_outside, _truncated, _damaged_within, _one_pixel],
    ids=lambda f: f.__name__.strip("_"),
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_folder_that_cannot_be_used_is_refused_before_any_work(
    tmp_path: Path, blank_run: Path, capsys: pytest.CaptureFixture[str], command: str, spoil
) -> None:
    folder = _write_pictures(orl_scenes("train", 3, sizes=SMALL), tmp_path / "pictures")
    message = spoil(folder)
    before = _contents(tmp_path)
    out = {"train": tmp_path / "new", "evaluate": tmp_path / "scores.json"}[command]
    run = [str(blank_run)] if command == "evaluate" else []
    assert main([command, *run, "--data", f"folder:{folder}", "--out", str(out), *THREADS]) == 2
    # What a command is about to do may be told before pixels are read; the error is the last line.
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert _contents(tmp_path) == before


def test_a_picture_that_cannot_be_attended_to_is_refused_and_the_earlier_output_stays(
    tmp_path: Path, blank_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "posterior.nc").write_text("an earlier one")
    (tmp_path / "x.png").write_text("no picture")
    before = _contents(tmp_path)
    for given, message in (("x.png", "cannot be read as a picture"), ("absent.png", "no such picture")):
        told = _refused(["attend", str(blank_run), str(tmp_path / given), "--out", str(out)], capsys)
        assert message in told
        assert given in told
    assert "no picture was given" in _refused(["attend", str(blank_run), "--out", str(out)], capsys)
    assert _contents(tmp_path) == before


def test_a_run_of_another_version_is_refused(
    tmp_path: Path, blank_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((blank_run / "config.json").read_text())
    (blank_run / "config.json").write_text(json.dumps({**config, "format": 99}))
    assert "format 99" in _refused(["sample", str(blank_run), "--out", str(tmp_path / "p.png")], capsys)


@pytest.mark.parametrize("command", ["demo", "train", "attend", "evaluate", "sample"])
def test_an_output_that_would_replace_something_else_is_refused_up_front(
    tmp_path: Path, blank_run: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.json").write_text("mine")
    Image.new("L", (30, 30)).save(thesis / "photograph.png")
    out = {"evaluate": thesis / "thesis.json", "sample": thesis / "photograph.png"}.get(command, thesis)
    given = {"demo": [], "train": ["--data", "orl"], "attend": [str(blank_run), str(thesis)]}.get(
        command, [str(blank_run)]
    )
    before = _contents(tmp_path)
    told = _refused([command, *given, "--out", str(out)], capsys)
    assert str(out) in told
    assert _contents(tmp_path) == before


def test_a_folder_of_somebodys_labels_is_no_earlier_output_of_attending(
    tmp_path: Path, blank_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _write_pictures(orl_scenes("train", 2, sizes=SMALL), tmp_path / "pictures")
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "thesis.txt").write_text("mine")
    before = _contents(tmp_path)
    told = _refused(["attend", str(blank_run), str(folder), "--out", str(folder)], capsys)
    assert "holds other things than an earlier output" in told
    assert _contents(tmp_path) == before


def test_overlays_of_an_earlier_output_are_not_attended_to(
    tmp_path: Path, blank_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A $ would begin a formula in a title, and a name may be as long as names of files are.
    long = "a" * 250
    for name in ("1$_{2$", long):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60), dtype=np.uint8)).save(
            tmp_path / f"{name}.png"
        )
    monkeypatch.chdir(tmp_path)
    words = ["attend", str(blank_run), ".", "--out", "found", "--chains", "1", "--draws", "4", "--warmup", "2"]
    for _ in range(2):
        assert main([*words, *THREADS]) == 0
        with Path("found/gazes.csv").open(encoding="utf-8") as table:
            assert [row["file"] for row in csv.DictReader(table)] == ["1$_{2$.png", f"{long}.png"]
    assert {p.name for p in Path("found/overlays").iterdir()} == {"00000_1$_{2$.png", f"00001_{'a' * 60}.png"}
    capsys.readouterr()
    overlays = str(Path("found/overlays"))
    assert "overlay of an earlier output" in _refused(["attend", str(blank_run), overlays, "--out", "found"], capsys)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names of files are bytes on Linux alone")
def test_a_file_name_of_another_encoding_is_refused_before_any_work(
    tmp_path: Path, blank_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode("Käthe.png".encode("latin-1"))
    Image.new("L", (40, 40)).save(tmp_path / name)
    told = _refused(["attend", str(blank_run), str(tmp_path), "--out", str(tmp_path / "out")], capsys)
    assert "not UTF-8; rename the file" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device", "p.png"), "[Errno 28] No space left on device: 'p.png'"),
        (SafetensorError("I/O error: No space left on device"), "I/O error: No space left on device"),
        (
            OSError("Can't write data (time = Tue Nov 24\n, errno = 28)"),
            "Can't write data (time = Tue Nov 24 , errno = 28)",
        ),
    ],
)
def test_a_machine_that_gives_up_is_told_in_one_line(
    tmp_path: Path,
    blank_run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    said: str,
) -> None:
    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("foveate.experiments.training.save_figure", full)
    assert main(["sample", str(blank_run), "--out", str(tmp_path / "p.png"), "--count", "1", *THREADS]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"foveate sample: {said}"


@pytest.mark.parametrize("command", ["train", "learn"])
def test_a_run_is_not_put_into_the_folder_one_stands_in_among_other_things(
    tmp_path: Path, blank_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    run = [str(blank_run)] if command == "learn" else []
    assert "holds files but no run" in _refused([command, *run, "--data", "orl", "--out", "."], capsys)


def test_attending_that_fails_half_way_leaves_the_earlier_output_whole(
    tmp_path: Path, blank_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    (out / "overlays").mkdir(parents=True)
    for name in ("gazes.csv", "posterior.nc", "report.html", "overlays/00000_a.png"):
        (out / name).write_text("an earlier one")
    before = _contents(out)
    Image.new("L", (40, 40)).save(tmp_path / "a.png")

    def broken(*arguments: object, **options: object) -> Iterator[Posterior]:
        raise RuntimeError("the machine fell over")
        yield

    monkeypatch.setattr(attending, "attend_batches", broken)
    with pytest.raises(RuntimeError, match="fell over"):
        main(["attend", str(blank_run), str(tmp_path / "a.png"), "--out", str(out), *THREADS])
    assert {p: data for p, data in _contents(out).items() if attending.UNFINISHED not in p.parts} == before


@pytest.mark.parametrize("stage", ["gazes.csv", "report.html", "posterior.nc", "overlays", "."])
def test_interrupted_while_its_outputs_are_put_in_place_attending_only_puts_them_in_place(
    tmp_path: Path, blank_run: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    folder = _write_pictures(orl_scenes("train", 3, sizes=SMALL), tmp_path / "pictures")
    words = ["attend", str(blank_run), str(folder), "--chains", "1", "--draws", "4", "--warmup", "2", *THREADS]
    monkeypatch.setattr(attending, "BATCH", 2)
    out = tmp_path / "out"
    assert main([*words, "--out", str(tmp_path / "whole"), "--seed", "1"]) == 0
    # Beside an earlier output.
    (out / "overlays").mkdir(parents=True)
    for name in ("gazes.csv", "posterior.nc", "report.html", "overlays/00000_a.png"):
        (out / name).write_text("an earlier one")

    def interrupted(whole: Any) -> Any:
        def at(path: Path, *rest: Any, **named: Any) -> Any:
            if path == out / attending.UNFINISHED / stage:
                raise KeyboardInterrupt
            return whole(path, *rest, **named)

        return at

    with monkeypatch.context() as patch:
        for name in ("replace", "rename"):
            patch.setattr(Path, name, interrupted(getattr(Path, name)))
        assert main([*words, "--out", str(out), "--seed", "1"]) == 130
    monkeypatch.setattr(attending, "attend_batches", lambda *a, **o: pytest.fail("attended again"))
    assert main([*words, "--out", str(out), "--seed", "1"]) == 0
    wanted, found = (
        {p.relative_to(place): data for p, data in _contents(place).items() if p.suffix != ".nc"}
        for place in (tmp_path / "whole", out)
    )
    assert found == wanted and len(wanted) == 5
    assert torch.equal(*(Posterior.load(place / "posterior.nc").gaze for place in (tmp_path / "whole", out)))


def test_attending_that_was_interrupted_goes_on_to_the_same_output(
    tmp_path: Path, blank_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _write_pictures(orl_scenes("train", 3, sizes=SMALL), tmp_path / "pictures")
    words = ["attend", str(blank_run), str(folder), "--chains", "1", "--draws", "4", "--warmup", "2", *THREADS]
    monkeypatch.setattr(attending, "BATCH", 2)
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    whole = attending.attend_batches
    given: list[int] = []

    def broken(model: Any, guide: Any, scenes: Any, **options: Any) -> Iterator[Posterior]:
        given.append(len(scenes))
        yield next(whole(model, guide, scenes, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(attending, "attend_batches", broken)
    again = [*words, "--out", str(tmp_path / "again")]
    assert main(again) == 130
    # Other work begins anew, and so does the same work after a picture has changed.
    assert main([*again, "--seed", "1"]) == 130
    assert main(again) == 130
    first = min(folder.glob("*.png"))
    os.utime(first, ns=(0, 0))
    assert main(again) == 130
    assert given == [3, 3, 3, 3]
    capsys.readouterr()
    assert main(again) == 130
    assert "going on after the 2 that" in capsys.readouterr().err
    # All are attended to by now: what was left was one batch, and the interruption came after it.
    monkeypatch.setattr(attending, "attend_batches", lambda *a, **o: pytest.fail("attended again"))
    assert main(again) == 0
    assert given == [3, 3, 3, 3, 1]
    wanted, found = (
        {p.relative_to(tmp_path / name): data for p, data in _contents(tmp_path / name).items()}
        for name in ("whole", "again")
    )
    assert found.keys() == wanted.keys()
    same = {p for p in wanted if p.suffix in (".csv", ".png", ".html")}
    assert len(same) == 5
    assert all(found[p] == wanted[p] for p in same)
    posteriors = [Posterior.load(tmp_path / name / "posterior.nc") for name in ("whole", "again")]
    assert torch.equal(posteriors[0].gaze, posteriors[1].gaze)
    assert posteriors[0].names == posteriors[1].names


class _Images(HTMLParser):
    """Counts pictures, and insists that each is inside the page."""

    count = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            assert (dict(attrs)["src"] or "").startswith("data:image/png;base64,")
            self.count += 1


def test_train_attend_evaluate_and_sample_after_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scenes = _write_pictures(orl_scenes("train", 14, sizes=SMALL), tmp_path / "scenes")
    clutter = _write_pictures(orl_clutter("train", 3, sizes=SMALL), tmp_path / "clutter", labels=False)
    unseen = _write_pictures(orl_scenes("test", 3, sizes=SMALL), tmp_path / "unseen")
    run, out, scores, drawn = (tmp_path / name for name in ("run", "out", "scores.json", "p.png"))

    steps = ["--glance-steps", "3", "--look-steps", "3", "--dbn-steps", "4"]
    data = ["--data", f"folder:{scenes}", "--clutter", f"folder:{clutter}"]
    assert main(["train", *data, "--out", str(run), *steps, *THREADS]) == 0
    assert {p.name for p in run.iterdir()} == {
        "config.json", "model.safetensors", "guide.safetensors", "log.jsonl"
    }  # fmt: skip
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in log} >= {"glance", "look", "prior"}
    checks = [entry for entry in log if entry["stage"] == "prior"]
    assert {entry["part"] for entry in checks} == {"layer", "top"}
    for entry in checks:
        assert entry["figure"] == entry["bound"] and entry["effective_filters"] > 0
        assert {"free_energy_gap", "activation", "train_bound", "log_z_error", "step"} <= set(entry)

    sampling = ["--chains", "2", "--draws", "6", "--warmup", "4"]
    pictures = [str(unseen / f"orl_test_0000{i}.png") for i in (0, 1)]
    # One picture is given twice, by itself and by its folder.
    assert main(["attend", str(run), pictures[1], str(unseen), "--out", str(out), *sampling, *THREADS]) == 0
    assert {p.name for p in out.iterdir()} == {"gazes.csv", "posterior.nc", "report.html", "overlays"}
    with (out / "gazes.csv").open(encoding="utf-8") as table:
        rows = list(csv.DictReader(table))
    assert [Path(row["file"]).name for row in rows] == [f"orl_test_0000{i}.png" for i in (1, 0, 2)]
    posterior = Posterior.load(out / "posterior.nc")
    factor = load(run).config["coverage_factor"]
    sds = factor * posterior.sd[:, :3]
    for row, gaze, sd in zip(rows, posterior.mean_gaze.tolist(), sds.tolist(), strict=True):
        assert [float(row[k]) for k in ("sd_x", "sd_y", "sd_size")] == pytest.approx(sd, abs=1e-6)
        # Six decimals are written.
        assert [float(row[k]) for k in ("a", "b", "tx", "ty")] == pytest.approx(gaze, abs=1e-6)
        assert float(row["width"]) == pytest.approx(24 * math.hypot(gaze[0], gaze[1]), abs=1e-6)
        assert math.radians(float(row["rotation_degrees"])) == pytest.approx(math.atan2(gaze[1], gaze[0]), abs=1e-6)
        assert 0 <= float(row["presence"]) <= 1
    assert len(list((out / "overlays").glob("*.png"))) == 3
    images = _Images()
    images.feed((out / "report.html").read_text(encoding="utf-8"))
    assert images.count == 2 + 3

    given = ["evaluate", str(run), "--data", f"folder:{unseen}", "--out", str(scores)]
    assert main([*given, *sampling, *THREADS]) == 0
    results = json.loads(scores.read_text())
    assert results.keys() >= {
        "scenes", "accuracy", "mean_iou", "median_iou", "iou_by_step", "seconds_per_scene", "bound_nats",
        "bound_nats_se", "bound_gaussian", "bound_student_t", "log_z", "log_z_se", "acceptance_rate", "divergences",
        "rhat_max", "rhat_undefined", "ess_min", "seed", "versions",
    }  # fmt: skip
    assert results["scenes"] == 3
    assert "accuracy (IoU > 0.5)" in capsys.readouterr().out
    # Once more with the paper's protocol: earlier scores are replaced.
    assert main([*given, "--start", "jitter", *sampling, *THREADS]) == 0
    assert json.loads(scores.read_text())["start"] == "jitter"

    assert main(["sample", str(run), "--out", str(drawn), "--count", "20", *THREADS]) == 0
    first = drawn.read_bytes()
    assert main(["sample", str(run), "--out", str(drawn), "--count", "20", *THREADS]) == 0
    assert drawn.read_bytes() == first  # the same seed draws the same picture


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PyTorch's wheels have GNU's OpenMP on Linux alone")
@pytest.mark.parametrize(
    ("asked", "told"), [({}, "30000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_threads_sleep_early_unless_the_user_says_otherwise(asked: dict[str, str], told: str) -> None:
    """OpenMP itself says what it has read when PyTorch loads it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", "import foveate.experiments, torch"],
        env={**kept, "OMP_DISPLAY_ENV": "VERBOSE", **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{told}'" in done.stderr


def test_what_a_terminal_has_no_letter_for_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["sample", "no_such_run", "--out", "drawn.png"]) == 2
    print("1 \u2212 2")
    terminal.flush()
    assert terminal.buffer.getvalue() == b"1 ? 2" + os.linesep.encode()  # pyright: ignore[reportAttributeAccessIssue]
