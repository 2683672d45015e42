"""The page about a store, in a real browser; and what it is drawn from, held against what the tensors say."""

from __future__ import annotations

import contextlib
import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from conftest import Filled, ModelMaker
from matplotlib.image import imread

from hydrafs.anatomy import KINDS, place_of
from hydrafs.cache import ChunkCache
from hydrafs.changes import MAX_ROWS, Cell, Share, parts_of, sample, shares_of
from hydrafs.cli import main
from hydrafs.cli.common import human
from hydrafs.composition import operand_weights, span_costs
from hydrafs.dehydrate import Options, dehydrate
from hydrafs.diff import DiffFile, DiffWriter
from hydrafs.errors import AlreadyThere
from hydrafs.family import Member, condensed, family_of, in_order
from hydrafs.formulas import ADD, SUBTRACT, Formula, Step, cast, divide, get, lerp, scale
from hydrafs.manifest import PREDICTION_SAME, PREDICTION_TENSOR
from hydrafs.opening import Opener
from hydrafs.pictures import LEVELS, level_of, shortened
from hydrafs.report import report
from hydrafs.store import Store

Capture = pytest.CaptureFixture[str]
STRANGE = "a <b>&\"$x$ 'é\u4e2d [1].safetensors"


# Where tensors are

LDM = "model.diffusion_model."
CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "conditioner.embedders.1.model.transformer."


@pytest.mark.parametrize(
    ("name", "part", "block", "kind"),
    [
        (f"{LDM}input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight", "UNet", "in 4", "self-attention"),
        (f"{LDM}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight", "UNet", "in 4", "cross-attention"),
        (f"{LDM}input_blocks.4.1.transformer_blocks.0.norm1.weight", "UNet", "in 4", "norm"),
        (f"{LDM}input_blocks.4.0.in_layers.2.weight", "UNet", "in 4", "convolution"),
        (f"{LDM}input_blocks.4.0.emb_layers.1.weight", "UNet", "in 4", "time"),
        (f"{LDM}middle_block.1.proj_in.weight", "UNet", "middle", "projection"),
        (f"{LDM}output_blocks.11.1.transformer_blocks.0.ff.net.2.weight", "UNet", "out 11", "feed-forward"),
        (f"{LDM}time_embed.0.weight", "UNet", "start", "time"),
        (f"{LDM}out.2.weight", "UNet", "end", "other"),
        ("model_ema.diffusion_modelinput_blocks00weight", "EMA", "all", "other"),
        ("first_stage_model.decoder.up.3.block.0.conv1.weight", "VAE", "up 3", "convolution"),
        ("first_stage_model.encoder.down.1.block.0.norm1.weight", "VAE", "down 1", "norm"),
        ("first_stage_model.decoder.mid.attn_1.q.weight", "VAE", "mid", "attention"),
        (f"{CLIP}encoder.layers.11.mlp.fc1.weight", "text encoder", "layer 11", "feed-forward"),
        (f"{CLIP}encoder.layers.0.self_attn.q_proj.weight", "text encoder", "layer 0", "attention"),
        (f"{CLIP}embeddings.token_embedding.weight", "text encoder", "start", "embedding"),
        (f"{OPEN_CLIP}resblocks.31.attn.in_proj_weight", "text encoder 2", "layer 31", "attention"),
        ("double_blocks.18.img_attn.qkv.weight", "transformer", "double 18", "attention"),
        ("single_blocks.37.linear1.weight", "model", "single 37", "other"),
        ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight", "UNet", "down 1", "self-attention"),
        ("mid_block.resnets.0.conv1.weight", "model", "mid", "convolution"),
        ("model.layers.79.self_attn.o_proj.weight", "model", "layer 79", "attention"),
        ("model.layers.3.mlp.gate_proj.weight", "model", "layer 3", "feed-forward"),
        ("encoder.layer.5.output.dense.weight", "model", "layer 5", "feed-forward"),
        ("encoder.layer.5.attention.output.dense.weight", "model", "layer 5", "attention"),
        ("transformer.h.2.ln_1.weight", "model", "layer 2", "norm"),
        ("lm_head.weight", "model", "end", "other"),
        ("", "model", "rest", "other"),
        ("\udce9.\n", "model", "rest", "other"),
    ],
)  # fmt: skip
def test_where_a_tensor_is(name: str, part: str, block: str, kind: str) -> None:
    place = place_of(name)
    assert (place.part, place.block, place.kind) == (part, block, kind)
    assert place.kind in KINDS


def test_blocks_stand_in_the_order_of_the_data() -> None:
    names = ["time_embed.0", "input_blocks.2.0", "input_blocks.10.0", "middle_block.0", "output_blocks.1.0", "out.0"]
    places = [place_of(f"model.diffusion_model.{n}.weight") for n in names]
    assert sorted(places, key=lambda p: p.order) == places


# How much of what


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ((get(0),), (1, 0, 0)),
        ((get(0), scale(0.7), get(1), scale(0.3), ADD), (0.7, 0.3, 0)),
        ((get(0), get(1), get(2), SUBTRACT, scale(0.5), ADD, cast("F16")), (1, 0.5, -0.5)),
        ((get(0), get(1), lerp(0.25)), (0.75, 0.25, 0)),
        ((get(0), get(1), scale(0.75), SUBTRACT, divide(0.25)), (4, -3, 0)),
    ],
)
def test_the_weights_of_a_formula(steps: tuple[Step, ...], expected: tuple[float, ...]) -> None:
    assert operand_weights(Formula("x", steps), 3) == pytest.approx(expected)


def test_factors_of_a_product_have_no_weights() -> None:
    formula = Formula("lora", (get(0), Step("product", index=1, rank=4, columns=4), ADD))
    assert operand_weights(formula, 3) == [1, 0, 0]


def test_the_costs_are_those_of_the_diff(filled: Filled) -> None:
    filled.dehydrate()
    with DiffFile(filled.diff) as diff:
        found = span_costs(diff)
        assert sum(cost.stored for cost in found) == pytest.approx(sum(diff.chunk_nbytes))
        (part,) = parts_of(diff)
        numbers = [s for s in diff.manifest.spans if diff.manifest.sections[s.section].dtype]
        assert part.total().nbytes == sum(s.nbytes for s in numbers)
        (frozen,) = [c for s, c in zip(diff.manifest.spans, found, strict=True) if s.name == "frozen.weight"]
        assert (frozen.stored, frozen.untouched) == (0.0, 512 * 96 * 2)


def test_what_is_the_parents_own_costs_nothing_in_a_shared_chunk(models: ModelMaker, store: Path) -> None:
    """One chunk of three tensors, of which one differs: it bears all that is stored."""
    base = {name: models.base()["up.weight"][:8].clone() for name in ("a", "b", "c")}
    base["c"] = base["c"] * 1.5
    models.save(store / "base.safetensors", base)
    generator = torch.Generator().manual_seed(3)
    base["b"] = base["b"] + torch.randn(base["b"].shape, generator=generator).to(base["b"].dtype) * 0.01
    path = models.save(store / "tuned.safetensors", base)
    with contextlib.closing(Store(store, create=True)) as opened:
        outcome = dehydrate(opened, path, Options(bases=(store / "base.safetensors",), jobs=1))
    assert outcome.diff
    with DiffFile(outcome.diff) as diff:
        costs = {s.name: c for s, c in zip(diff.manifest.spans, span_costs(diff), strict=True)}
        stored = sum(diff.chunk_nbytes)
        literal = sum(c.stored for s, c in zip(diff.manifest.spans, span_costs(diff), strict=True) if not s.name)
    assert costs["a"].stored == costs["c"].stored == 0
    assert costs["a"].untouched == 8 * 96 * base["a"].element_size()
    assert costs["b"].stored > 0
    assert costs["b"].stored == pytest.approx(stored - literal)


def test_many_blocks_share_rows() -> None:
    from hydrafs.changes import _part

    places = {place_of(f"layers.{n}.mlp.weight"): Cell(10, 1.0) for n in range(300)}
    part = _part("model", places)
    assert len(part.rows) <= MAX_ROWS
    assert part.rows[0] == "layer 0 ... layer 4"
    assert part.total().nbytes == 3000


def test_samples_say_what_the_tensors_say(models: ModelMaker, store: Path) -> None:
    base, tuned = models.base(), models.tuned()
    models.save(store / "base.safetensors", base)
    path = models.save(store / "tuned.safetensors", tuned)
    with contextlib.closing(Store(store, create=True)) as opened:
        outcome = dehydrate(opened, path, Options(jobs=2, chunk_nbytes=32 << 10))
        assert outcome.diff
        opener = Opener(opened, ChunkCache(16 << 20))
        with contextlib.closing(opener), contextlib.closing(opener.open_diff(outcome.diff)) as model:
            predicted = {s.name for s in model.manifest.spans if s.prediction in (PREDICTION_SAME, PREDICTION_TENSOR)}
            found = sample(model, 10_000)["model"]
            few = sample(model, 8)["model"]
    names = [n for n, t in tuned.items() if t.is_floating_point() and n in predicted]
    assert "embedding.weight" in names
    a = np.concatenate([tuned[n].double().numpy().ravel() for n in names])
    b = np.concatenate([base[n].double().numpy().ravel() for n in names])
    assert found.relative_norm == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=0.02)
    assert found.changed == pytest.approx((a != b).mean(), abs=0.02)
    assert few.relative_norm == pytest.approx(found.relative_norm, rel=3)


# The family


@pytest.fixture
def relatives(filled: Filled, models: ModelMaker, capsys: Capture) -> Filled:
    """Two fine-tunes, one of a strange name, a merge, a merge of it, a damaged diff, and one whose parent is gone."""
    filled.dehydrate()
    other = models.save(filled.root / "sub" / "other.safetensors", models.tuned("fp16"))
    data = bytearray(other.read_bytes())
    data[-2:] = b"\x12\x34"
    other.write_bytes(data)
    other.rename(filled.root / STRANGE)
    with contextlib.closing(Store(filled.root)) as store:
        dehydrate(store, filled.root / STRANGE, Options(bases=(filled.base,), jobs=2, chunk_nbytes=32 << 10))
    root = filled.root
    for a, b, alpha, name in (
        ("tuned.safetensors", "base.safetensors", "0.3", "mix.safetensors"),
        ("mix.safetensors", STRANGE, "0.75", "again.safetensors"),
    ):
        assert main(["merge", str(root / a), str(root / b), "--alpha", alpha, "--virtual", str(root / name)]) == 0
    (root / "broken.ckpt.hydra").write_bytes(b"no diff")
    with DiffFile(filled.diff) as diff:
        lost = msgspec.structs.replace(diff.manifest.parents[0], sha256=b"9" * 32, name="lost.ckpt", size=7 << 20)
        copied(diff, root / "orphan.safetensors.hydra", sha256=b"8" * 32, parents=(lost,))
    capsys.readouterr()
    return filled


def copied(diff: DiffFile, path: Path, **changes: Any) -> None:
    """A copy of a diff that claims other things."""
    with path.open("wb") as file:
        writer = DiffWriter(file, diff.table.chunk_count)
        for i in range(diff.table.chunk_count):
            writer.append(i, diff.payload(i), diff.chunk_codec[i], diff.chunk_flags[i], diff.chunk_checksum[i])
        writer.finish(msgspec.structs.replace(diff.manifest, **changes))


def test_the_family(relatives: Filled) -> None:
    with contextlib.closing(Store(relatives.root)) as store:
        family = {m.name: m for m in family_of(store)}
        rows = in_order(list(family.values()))
    assert {name: m.state for name, m in family.items()} == {
        "base.safetensors": "base",
        "tuned.safetensors": "fine-tune",
        STRANGE: "fine-tune",
        "mix.safetensors": "merge",
        "again.safetensors": "merge",
        "broken.ckpt": "damaged",
        "orphan.safetensors": "fine-tune",
        "lost.ckpt": "missing",
    }
    assert family["mix.safetensors"].mixture == "0.30 × tuned.safetensors + 0.70 × base.safetensors"
    assert family["again.safetensors"].mixture == f"0.75 × mix.safetensors + 0.25 × {STRANGE}"
    assert len(rows) == len(family)
    depth = {member.name: depth for depth, member in rows}
    assert depth["base.safetensors"] == 0
    assert depth["tuned.safetensors"] == depth["mix.safetensors"] - 1 == 1
    assert depth["again.safetensors"] == 3
    assert family["tuned.safetensors"].saved == len(relatives.data) - relatives.diff.stat().st_size
    assert family["broken.ckpt"].saved == 0


def test_signs_and_weights_of_a_mixture() -> None:
    def mixture(*weights: float) -> str:
        parents = [
            (Member(name, f"{name}.ckpt", "base", 9, 9), Share(0, 1, weight, weight, weight))
            for name, weight in zip("abc", weights, strict=False)
        ]
        return Member("m", "m", "merge", 9, 1, parents=parents).mixture_of(lambda name: name[0])

    assert mixture(0.6, -0.6, 1.0) == "0.60 × a + c − 0.60 × b"
    assert mixture(-1.0, 1.5) == "1.50 × b − a"
    assert mixture(-0.5) == "−0.50 × a"
    assert mixture(1.0, math.nan) == "a + b"


def test_shares_of_a_fine_tune(relatives: Filled) -> None:
    with DiffFile(relatives.diff) as diff:
        (share,) = shares_of(diff)
    assert (share.parent, share.weight) == (0, 1.0)


def test_a_large_family_is_condensed() -> None:
    base = Member("b", "base", "base", 9, 9)
    share = Share(0, 1, 1.0, 1.0, 1.0)
    children = [Member(str(n), f"child {n:02}", "fine-tune", 9, 1, parents=[(base, share)]) for n in range(40)]
    base.children = children
    few = in_order([base, *children[:12]])
    base.children = children[:12]
    assert condensed(in_order([base, *children[:12]])) == few[:13]
    base.children = children
    children[39].children = [Member("x", "grandchild", "merge", 9, 1, parents=[(children[39], share)])]
    rows = [m.name for _, m in condensed(in_order([base, *children, *children[39].children]))]
    assert rows == ["base", *(f"child {n:02}" for n in range(10)), "and 29 more", "child 39", "grandchild"]


def test_levels() -> None:
    assert level_of(0.0) == 0
    assert level_of(1e-9) == 1
    assert [level_of(bound) for bound in LEVELS] == list(range(len(LEVELS)))
    assert level_of(2.0) == len(LEVELS)
    assert shortened("abcdefghij", 5) == "ab…ij"
    assert shortened("abc", 3) == "abc"


# The page


def page_of(root: Path, **options: Any) -> str:
    with contextlib.closing(Store(root)) as store:
        return report(store, human, **options)


def test_the_page_holds_all_and_asks_for_nothing(relatives: Filled) -> None:
    page = page_of(relatives.root)
    for name in ("tuned.safetensors", "mix.safetensors", "again.safetensors", "broken.ckpt", "lost.ckpt"):
        assert name in page
    assert html.escape(STRANGE) in page
    assert "<b>" not in page
    assert "0.30 × tuned.safetensors + 0.70 × base.safetensors" in page
    assert "weighted sum, exact for all " in page
    assert "= 0.30 × tuned + 0.70 × base<" in page, "in the tree, without endings"
    assert re.search(r"<td class=name>tuned\.safetensors<td class='n h[1-9]'>\d+\.\d %", page), "at a glance"
    assert "orphan.safetensors" in page
    assert "No samples: a parent of" in page
    for request in ("<script", '<link rel="style', "@import", "url(http", "src=", 'href="http', "<img", "<iframe"):
        assert request not in page, request
    assert page.count("<svg") == page.count('role="img" aria-label="') >= 5
    assert not re.search(r"#0[ab]0[ab][0-9a-f]{2}", page), "a colour that is no variable of the page"
    assert set(re.findall(r"var\(--([a-z0-9-]+)\)", page)) <= set(re.findall(r"--([a-z0-9-]+):", page))


def test_the_page_is_the_same_each_time(relatives: Filled) -> None:
    assert page_of(relatives.root) == page_of(relatives.root)


def test_an_empty_store_has_a_page(store: Path) -> None:
    assert "No model of this store is dehydrated yet" in page_of(store)


def test_a_large_store_has_a_page_of_bounded_size(relatives: Filled) -> None:
    with DiffFile(relatives.diff) as diff:
        for number in range(300):
            path = relatives.root / f"fine-tune number {number}.safetensors.hydra"
            copied(diff, path, sha256=number.to_bytes(32, "big"))
            os.utime(path, ns=(0, 1_700_000_000_000_000_000 + number * 10**14))
    before = time.monotonic()
    page = page_of(relatives.root)
    assert time.monotonic() - before < 60, "a bound against what grows with the square of the store"
    assert len(page) < 2_000_000
    assert "Drawn are the 24 that were stored last" in page
    assert "fine-tune number 299.safetensors" in page
    assert "and 291 more" in page


def test_the_command(relatives: Filled, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "report.html"
    assert main(["report", str(relatives.root), "-o", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")
    assert main(["report", str(relatives.root), "-o", str(out)]) == 0, "it replaces the page of before"
    assert main(["report", str(relatives.root), "-o", str(tmp_path / "none" / "x.html")]) == 2
    assert main(["report", str(relatives.root), "-o", str(tmp_path)]) == 2


@pytest.mark.parametrize("name", ["base.safetensors", "tuned.safetensors", "tuned.safetensors.hydra", "notes.txt"])
def test_a_page_takes_no_other_files_name(relatives: Filled, name: str) -> None:
    place = relatives.root / name
    (relatives.root / "notes.txt").write_text("mine")
    before = place.read_bytes() if place.exists() else None
    assert main(["report", str(relatives.root), "--output", str(place)]) == AlreadyThere.exit_code
    assert (place.read_bytes() if place.exists() else None) == before


def test_without_matplotlib_it_says_what_to_install(
    relatives: Filled, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "matplotlib" or name in ("hydrafs.report", "hydrafs.pictures"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("hydrafs.report", raising=False)
    monkeypatch.delattr("hydrafs.pictures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(relatives.root), "-o", str(tmp_path / "x.html")]) == 2
    error = capsys.readouterr().err
    assert "pip install 'hydrafs[report]'" in error
    assert error.count("\n") == 1


def test_the_plot_in_a_pipe(relatives: Filled, capsys: Capture) -> None:
    assert main(["info", str(relatives.tuned), "--plot"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert re.search(r"^model +.*stored$", out, re.MULTILINE)
    assert re.search(r"[▁▂▃▄▅▆▇█]{2} +\d+%", out)
    assert main(["info", str(relatives.base), "--plot"]) == 2
    assert "name a dehydrated model" in capsys.readouterr().err


# In a browser


@pytest.fixture(scope="module")
def chromium() -> str:
    ubuntu = "ID=ubuntu\n" in Path("/etc/os-release").read_text()
    found = shutil.which("google-chrome") or (None if ubuntu else shutil.which("chromium"))
    if found:
        return found
    if ubuntu:
        pytest.skip("Ubuntu's Chromium is a snap, which sees no temporary files, and there is no google-chrome")
    if os.environ.get("HYDRAFS_TESTS_WITHOUT_BROWSER") == "1":
        pytest.skip("no chromium, and HYDRAFS_TESTS_WITHOUT_BROWSER=1")
    pytest.fail("no chromium; HYDRAFS_TESTS_WITHOUT_BROWSER=1 runs the tests without it", pytrace=False)


def browse(chromium: str, page: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as profile:
        return subprocess.run(
            [
                chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                "--disable-background-networking", "--disable-component-update", "--disable-sync",
                "--enable-logging=stderr", f"--user-data-dir={profile}", *arguments, page.as_uri(),
            ],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip


def test_the_page_renders_and_makes_no_request(relatives: Filled, tmp_path: Path, chromium: str) -> None:
    page = tmp_path / "report.html"
    page.write_text(page_of(relatives.root))
    log = tmp_path / "net.json"
    done = browse(chromium, page, "--dump-dom", f"--log-net-log={log}")
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "mix.safetensors" in done.stdout
    text = log.read_text()
    text = text if text.rstrip().endswith("}") else text.rstrip().rstrip(",") + "]}"
    urls = {e.get("params", {}).get("url", "") for e in json.loads(text)["events"]}
    assert not [url for url in urls if url.startswith(("http", "ws")) and "google" not in url], urls
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</main>", "<script>console.error('seen')</script></main>"))
    assert "CONSOLE" in browse(chromium, broken, "--dump-dom").stderr, "an error would be seen"


@pytest.mark.parametrize(("scheme", "paper"), [("light", (0xFB, 0xFA, 0xF7)), ("dark", (0x14, 0x17, 0x1B))])
def test_light_and_dark(
    relatives: Filled, tmp_path: Path, chromium: str, scheme: str, paper: tuple[int, int, int]
) -> None:
    page, shot = tmp_path / "report.html", tmp_path / "shot.png"
    page.write_text(page_of(relatives.root))
    wanted = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(chromium, page, f"--screenshot={shot}", "--window-size=1200,2400", "--hide-scrollbars", *wanted)
    image = (imread(shot)[..., :3] * 255).round().astype(int)
    assert tuple(image[3, 3]) == paper
    colours = {tuple(c) for c in image.reshape(-1, 3)[::7]}
    heat = re.findall(r"--heat-([1-9]):#([0-9a-f]{6})", page.read_text())
    drawn = heat[len(heat) // 2 :] if scheme == "dark" else heat[: len(heat) // 2]
    present = [level for level, colour in drawn if tuple(int(colour[i : i + 2], 16) for i in (0, 2, 4)) in colours]
    assert len(present) >= 3, "levels of the heat map are in the picture"


@pytest.mark.parametrize("width", [320, 360, 800])
def test_it_fits_a_telephone(relatives: Filled, tmp_path: Path, chromium: str, width: int) -> None:
    """Laid out in a frame of that width, nothing sticks out, and the text of the pictures can be read."""
    page = html.escape(page_of(relatives.root), quote=True)
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<!doctype html><meta charset="utf-8"><iframe id="f" style="width:{width}px;height:3000px;border:0" '
        f'srcdoc="{page}"></iframe><script>addEventListener("load", () => {{'
        "const d = document.getElementById('f').contentDocument;"
        "const sizes = [...d.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height);"
        "document.title = JSON.stringify([d.documentElement.scrollWidth, sizes.length, Math.min(...sizes)]);"
        "document.body.dataset.done = document.title})</script>"
    )
    done = browse(chromium, frame, "--dump-dom")
    found = re.search(r'data-done="\[([\d.]+),([\d.]+),([\d.]+)\]"', done.stdout)
    assert found, done.stdout[-500:]
    assert float(found[1]) <= width
    assert float(found[2]) > 30
    assert float(found[3]) >= (7 if width < 340 else 8)
    assert math.isfinite(float(found[3]))
