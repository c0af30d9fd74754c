"""Figures and the page: made from real small runs, safe against any caption, complete without a network."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dcbench import protocol as protocols
from dcbench.catalogue import ModelCard, Published, cards
from dcbench.cli import app
from dcbench.errors import UserError
from dcbench.files import write_json, write_text
from dcbench.metrics.distances import score_frechet_infinity
from dcbench.record import Case, Cost, Plan, Record, Score, read_plan, read_record, write_manifest
from dcbench.reports import Choices, write_report
from dcbench.reports.figures import Curve, cost_plot, curves, frame_grid
from dcbench.reports.page import spread
from dcbench.video import probe, write_lossless

NASTY = "<script>alert(1)</script> \"'&{{ 7*7 }} $x^{2 ünï 漢字"


def clip(seed: int, frames: int = 16, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (1, 3, 4, 4), dtype=torch.uint8, generator=generator).float()
    whole = torch.nn.functional.interpolate(small, (size, size), mode="nearest").to(torch.uint8)
    return torch.cat([whole.roll(i, 3) for i in range(frames)])


def make_run(path: Path, title: str, prompt: str = "a prompt", clips: int = 3, selection_seed: int = 0) -> Path:
    """A finished run whose dataset is gone."""
    items = [
        Case(id=f"v{n:02d}", video=f"v{n:02d}.mp4", frames=list(range(16)), fps=8, frame_stride=3,
                     prompt=prompt, caption_index=0, seed=n)
        for n in range(clips)
    ]  # fmt: skip
    write_manifest(path / "manifest.jsonl", items)
    protocol = {
        "name": "smoke", "version": 1, "title": "t", "summary": "s", "split": "all", "num_clips": 3,
        "num_frames": 16, "frame_stride": 3, "height": 32, "width": 32, "selection_seed": selection_seed,
    }  # fmt: skip
    fingerprint = protocols.fingerprint(protocols.Protocol(**protocol), "folder", items)
    plan = Plan(
        dcbench="0", model={"name": "m", "title": title, "summary": "s"}, seed=1, limit=None, fingerprint=fingerprint,
        dataset={"name": "folder", "title": "My <videos>", "summary": "s", "entry_point": "a:b"},
        protocol=protocol, excluded=[], versions={},
    )  # fmt: skip
    fvd = Score(value=float(len(title)), n_reference=3, n_generated=3, higher_is_better=False, fingerprint=fingerprint)
    write_json(path / "plan.json", plan.model_dump(mode="json"))
    write_json(
        path / "record.json",
        Record(plan=plan, scores={"fvd": fvd}, n_planned=3, n_scored=3, clips_sha256="").model_dump(mode="json"),
    )
    write_json(path / "cost.json", Cost(seconds_per_clip=0.5 * len(title)).model_dump(mode="json"))
    write_text(path / "per_clip.jsonl", '{"id": "v00", "motion": {"value": 1.5, "per_frame": [1, 2]}}\n')
    for n, item in enumerate(items):
        write_lossless(path / "clips" / f"{item.id}.mkv", clip(n), item.fps)
    return path


class Page(HTMLParser):
    """Tags, the files that they name, and the text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.files: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.files += [value for name, value in attrs if name in ("src", "href") and value and value[0] != "#"]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("runs")
    runs = [make_run(base / "a", "Model A", NASTY), make_run(base / "b", f"Model B {NASTY}", NASTY)]
    (runs[1] / "clips" / "v01.mkv").unlink()
    (runs[1] / "clips" / "v02.mkv").write_bytes(b"damaged")
    to = base / "report"
    text = write_report(runs, to)
    assert "Model A" in text and "3 [" in text
    return to


def test_everything_that_the_page_names_is_beside_it(report):
    page = Page((report / "index.html").read_text(encoding="utf-8"))
    assert len(page.files) > 8
    for file in page.files:
        assert not re.match(r"[a-z]+:|//|/", file), f"{file} is not in the folder"
        assert (report / file).is_file(), file
    assert {path.name for path in report.iterdir()} >= {
        "table.md",
        "table.tex",
        "table.csv",
        "index.html",
        "cost-1.png",
    }
    script = (report / "report.js").read_text() + (report / "report.css").read_text()
    assert "http" not in script and "import" not in script


def test_captions_and_names_cannot_become_code(report):
    source = (report / "index.html").read_text(encoding="utf-8")
    page = Page(source)
    assert page.tags.count("script") == 1 and "report.js" in page.files
    assert "<script>alert" not in source and "{{ 7*7 }}" in page.text and not re.search(r"\b49\b", page.text)
    assert NASTY in page.text


def test_the_page_shows_each_clip_and_says_what_is_missing(report):
    page = Page((report / "index.html").read_text(encoding="utf-8"))
    assert page.tags.count("video") == 4  # 3 of A, 1 of B; the dataset is gone, so there is no reference
    assert "no clip was made" in page.text and "Invalid data" in page.text
    assert "My <videos> is not here" in page.text
    assert "motion 1.5000" in page.text
    info = probe(report / "media" / "0-000-0.mp4")
    assert (info.num_frames, info.height, info.width) == (16, 32, 32) and info.fps == pytest.approx(8)


def test_writing_the_report_again_changes_nothing(report):
    runs = [report.parent / "a", report.parent / "b"]
    before = {path.relative_to(report): path.read_bytes() for path in report.rglob("*") if path.is_file()}
    write_report(runs, report)
    assert {path.relative_to(report): path.read_bytes() for path in report.rglob("*") if path.is_file()} == before


def test_runs_of_other_fingerprints_stand_in_their_own_section(tmp_path):
    runs = [make_run(tmp_path / "a", "A", clips=1), make_run(tmp_path / "b", "B", clips=1, selection_seed=1)]
    prints = [read_plan(run).fingerprint for run in runs]
    write_report(runs, tmp_path / "report")
    source = (tmp_path / "report" / "index.html").read_text()
    assert source.count("<h2>") == 2 and all(one in source for one in prints)
    assert not list((tmp_path / "report").glob("cost*.png"))  # two fingerprints: nothing to compare


def test_spread_covers_the_manifest():
    items = list(range(100))
    assert spread(items, 4) == [0, 25, 50, 75]  # type: ignore[arg-type, comparison-overlap]
    assert spread(items[:3], 12) == [0, 1, 2]  # type: ignore[arg-type, comparison-overlap]


# --- which clips, and in what order -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of seven clips: motion 0, 1, .. 6 as a mean of both; PIC, higher is better, the other way round."""
    base = tmp_path_factory.mktemp("scored")
    runs = [make_run(base / name, name, clips=7) for name in "AB"]
    for n, path in enumerate(runs):
        rows = [
            {"id": f"v{k:02d}", "motion": {"value": k + 2 * n - 1}, "pic": {"value": 1 - k / 10}, "other": {"x": 1}}
            for k in range(7)
        ]
        write_text(path / "per_clip.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        record = read_record(path)
        pic = Score(value=0.5, n_reference=7, n_generated=7, higher_is_better=True, fingerprint="f00d")
        changed = record.model_copy(update={"scores": {**record.scores, "pic": pic}})
        write_json(path / "record.json", changed.model_dump(mode="json"))
    return runs


def clips_of(folder: Path) -> list[str]:
    return re.findall(r"<p><code>(v\d+)</code>", (folder / "index.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("choices", "clips", "said"),
    [
        (Choices(clips=3), ["v00", "v02", "v04"], "evenly over the manifest"),
        (Choices(clips=3, clips_by="pic"), ["v06", "v05", "v00"], "the worst and the best by pic"),
        (Choices(clips=2, clips_by="motion"), ["v00", "v06"], "the lowest and the highest by motion"),
        (Choices(clips=9, clips_by="motion"), [f"v{k:02d}" for k in range(7)], "the lowest and the highest"),
    ],
)
def test_the_clips_of_the_page_are_chosen(tmp_path, scored, choices, clips, said):
    write_report(scored, tmp_path, choices)
    assert clips_of(tmp_path) == clips
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert f"{len(clips)} of 7 clips, {said}" in text
    means = [json.loads(row) for row in re.findall("data-means='(.*?)'", text)]
    assert [found["motion"] for found in means] == [float(clip[1:]) for clip in clips]
    assert 'value="-pic"' in text and "other" not in text  # the page sorts by metrics with one value for a clip


def test_the_command_shows_what_was_chosen(tmp_path, scored, monkeypatch):
    """--metrics, --published, --notes and --clips, for every file but table.csv, which has all numbers."""
    theirs = Published(dataset="My <videos>", metric="fvd", value=1.5, protocol="smoke", source="s")
    elsewhere = Published(dataset="My <videos>", metric="fvd", value=2.5, protocol="other", source="s")
    card = ModelCard(name="c", title="Theirs", summary="s", published=(theirs, elsewhere))
    monkeypatch.setattr("dcbench.reports.tables.cards", lambda kind: {"c": card} if kind == "models" else cards(kind))

    def report(*options: str) -> tuple[str, str, str]:
        command = ["report", *map(str, scored), "--out", str(tmp_path), "--clips", "1", *options]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return tuple((tmp_path / f"table.{kind}").read_text(encoding="utf-8") for kind in ("md", "tex", "csv"))

    markdown, tex, sheet = report()
    assert "1.5000" in markdown and "2.5000" in markdown and "PIC" in markdown and "| PIC" in markdown
    assert "1.5000" in tex and "2.5000" not in tex and "PIC" in tex  # of the same protocol only
    markdown, tex, again = report("--metrics", "fv*", "--published", "none", "--notes", "short")
    assert again == sheet and "2.5" in sheet and len(clips_of(tmp_path)) == 1
    for text in (markdown, tex, (tmp_path / "index.html").read_text(encoding="utf-8").partition("<figure>")[0]):
        assert "PIC" not in text and "1.5000" not in text and "FVD" in text


def test_options_that_would_change_nothing_are_refused(tmp_path, scored):
    (tmp_path / "suite.json").write_text("{}")
    for runs, options, said in (
        ([tmp_path], ["--clips", "3", "--metrics", "fvd"], "--clips, --metrics cannot be used with folders of suites"),
        (scored, ["--compare", "--notes", "short"], "--notes cannot be used with --compare"),
    ):
        done = CliRunner().invoke(app, ["report", *map(str, runs), *options])
        assert isinstance(done.exception, UserError) and said in str(done.exception)


def test_a_metric_that_no_clip_has_is_told(tmp_path, scored):
    with pytest.raises(UserError, match=r'no clip of these runs has a value of "motoin"\. Did you mean "motion"'):
        write_report(scored, tmp_path, Choices(clips_by="motoin"))
    with pytest.raises(UserError, match="expected short or full"):
        Choices(notes="long")


def test_clips_are_loaded_when_they_come_into_view(report):
    text = (report / "index.html").read_text(encoding="utf-8")
    videos = re.findall("<video[^>]*>", text)
    assert videos and all('preload="none"' in video and 'width="32" height="32"' in video for video in videos)
    assert all('loading="lazy"' in image for image in re.findall('<img class="input"[^>]*>', text))
    assert "prefers-color-scheme: dark" in (report / "report.css").read_text()


CHROME = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
ACTIONS = """
const said = [];
const key = (name, on = document.body) =>
  on.dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
const shown = () => rows.filter((e) => !e.row.hidden).map((e) => e.row.querySelector("code").textContent).length;
key(" "); said.push(byId("play").textContent);
key(" ", byId("find")); said.push(byId("play").textContent);
key("ArrowRight"); said.push(byId("play").textContent, byId("time").value);
key("ArrowLeft"); said.push(byId("time").value);
byId("sort").value = "-motion"; byId("sort").onchange({ target: byId("sort") });
said.push([...document.querySelectorAll(".row code")].map((c) => c.textContent).join());
byId("find").value = "V05 prompt"; byId("find").oninput({ target: byId("find") });
said.push(byId("count").textContent);
document.title = JSON.stringify(said);
"""


@pytest.mark.skipif(CHROME is None, reason="no browser here: neither chromium nor google-chrome")
def test_keys_sort_and_find_in_a_browser(tmp_path, scored):
    assert CHROME
    write_report(scored, tmp_path, Choices(clips=7))
    script = (tmp_path / "report.js").read_text(encoding="utf-8")
    (tmp_path / "report.js").write_text(f"{script}\n{{{ACTIONS}}}\n", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    page = subprocess.run([CHROME, *options, (tmp_path / "index.html").as_uri()], capture_output=True, timeout=60)
    title = re.search("<title>(.*?)</title>", page.stdout.decode())
    assert title, page.stderr.decode()
    play, typed, paused, on, back, order, count = json.loads(title[1].replace("&quot;", '"'))
    assert (play, typed, paused) == ("Pause all", "Pause all", "Play all")  # a space in the search is a letter
    assert int(on) > int(back) == 0
    assert order == "v06,v05,v04,v03,v02,v01,v00" and count == "1 of 7 clips"


# --- figures ----------------------------------------------------------------------------------------------------------


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_frame_grid_shows_the_frames_in_order(tmp_path):
    frames = torch.zeros(16, 3, 20, 30, dtype=torch.uint8)
    frames[:, 0] = (torch.arange(16) * 10 + 50)[:, None, None].to(torch.uint8)
    image = torch.full((3, 20, 30), 0, dtype=torch.uint8)
    image[2] = 255
    frame_grid(tmp_path / "grid.png", [(NASTY, frames), ("B", frames)], image, NASTY, frames=4)
    pixels = picture(tmp_path / "grid.png")
    pure = pixels[(pixels[..., 1] == 0) & (pixels[..., 2] == 0) & (pixels[..., 0] > 0)]
    seen = {value for value in np.unique(pure[:, 0]) if (pure[:, 0] == value).sum() > 500}
    assert seen == {50, 100, 150, 200}  # frames 0, 5, 10, 15
    columns = [np.nonzero((pixels == [value, 0, 0]).all(-1).any(0))[0].min() for value in sorted(seen)]
    blue = np.nonzero((pixels == [0, 0, 255]).all(-1).any(0))[0].min()
    assert [blue, *columns] == sorted([blue, *columns])
    first = (tmp_path / "grid.png").read_bytes()
    frame_grid(tmp_path / "grid.png", [(NASTY, frames), ("B", frames)], image, NASTY, frames=4)
    assert (tmp_path / "grid.png").read_bytes() == first


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_curves_and_cost_plot_are_written(tmp_path, suffix):
    lines = {NASTY: Curve([1, 2, 4], [3, 2, 1], [2, 1, 0], [4, 3, 2]), "B": Curve(range(100), range(100))}
    curves(tmp_path / f"curves{suffix}", lines, "N", "FVD $", log_x=False, title=NASTY)
    cost_plot(tmp_path / f"cost{suffix}", [("A", 0.1, 300, (250, 350)), (NASTY, 12, 200, None)], "FVD")
    for name in ("curves", "cost"):
        assert (tmp_path / f"{name}{suffix}").stat().st_size > 3000
    if suffix == ".png":
        assert len(np.unique(picture(tmp_path / "curves.png").reshape(-1, 3), axis=0)) > 20


def test_the_fitted_curve_of_fvd_infinity_is_drawn(tmp_path):
    """The score that the metric itself gives: its curve meets the axis 1 / N = 0 at the printed value."""
    generator = torch.Generator().manual_seed(0)
    real, made = torch.randn(64, 8, generator=generator), torch.randn(64, 8, generator=generator) + 0.5
    found = score_frechet_infinity(real, made)
    path = make_run(tmp_path / "a", "Model A")
    record = read_record(path)
    score = Score(
        value=found.value, ci95=found.ci95, n_reference=64, n_generated=64, higher_is_better=False, fingerprint="f00d",
        details=found.details,
    )  # fmt: skip
    write_json(
        path / "record.json",
        record.model_copy(update={"scores": {**record.scores, "fvd_infinity": score}}).model_dump(mode="json"),
    )
    write_report([path], tmp_path / "report")
    page = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8"))
    assert "fvd-infinity-1.png" in page.files and f"extrapolated to {found.value:.1f} [" in page.text
    picture = np.asarray(Image.open(tmp_path / "report" / "fvd-infinity-1.png").convert("RGB"))
    assert (picture == (213, 94, 0)).all(2).sum() > 300  # the fit's colour
