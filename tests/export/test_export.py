"""Exports of the whole catalogue and all presets run by themselves; a folder is there whole or not at all."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mixforge.evaluator.evaluation import Environment, Evaluation, Outcome, Profile, Timing, Workload
from mixforge.export import export as exporting
from mixforge.export.card import Card
from mixforge.export.export import ExportError, export, verify, write_files
from mixforge.export.source import ALLOWED
from mixforge.search_space.architecture import Architecture
from mixforge.search_space.genes import Form
from mixforge.search_space.mixers import CATALOGUE
from mixforge.search_space.notation import parse
from mixforge.search_space.presets import PRESETS, preset

LOADING = "model.load_state_dict(safetensors.torch.load(stored))"
SMALL = "lm(2 * (gdn + swiglu) + attn(window=16) + mlp, width=32)"


def _catalogue() -> Iterator[str]:
    """Each mixer and each of its short names in a model; then what stands around mixers."""
    for name, mixer in CATALOGUE.items():
        for word in (name, *mixer.aliases):
            stack = f"{word} + swiglu" if mixer.kind == "token" else f"attn + {word}"
            yield f"lm({stack}, width=64)"
    yield "lm(2 @ (conv + swiglu) + 3 @ attn + mlp, width=32, place=sandwich)"
    yield "lm(beside(attn, gdn, fuse=gate) + (2*attn(heads=3) | 1*attn(heads=3)), width=48, norm=layer)"
    yield "lm(attn(kv=own) + swiglu + attn(kv=shared) + swiglu, width=64, place=post, embed=untied)"
    yield "lm(attn(kv=ssm_chunk(4), sparse=boundaries(4, 6)) + attn(kv=vq(5), pos=none) + mlp, width=64)"
    yield "lm(attn(sparse=lte(6, 3), sink=tokens(1)) + attn(forget=mask) + mlp, width=64)"
    yield "lm(attn + swiglu, width=128, weights=sigma, shortcut=attention, scale=mup, softcap=30)"
    yield "lm(rglru + moe(bias=all) + attn + moe(weights=shared, bias=all), width=64, weights=sigma)"
    yield "lm(reuse(attn + mlp, times=3, halt=act, signal=step) + swiglu, width=16, place=gated)"
    yield "lm(segment(attn + gdn + mlp, length=32, memory=2) + swiglu, width=16)"
    yield "lm(2 * (residual(residual(attn + mlp) + gdn) + residual(swiglu, place=inside)), width=16)"
    yield "lm(mamba2 + residual(residual(attn(reads=embeddings) + geglu) + mamba2), width=16)"
    yield "lm(segment(2 * (attn + mlp), length=32, memory=2, carry=associative(4)), width=16, place=deep)"
    yield "lm(attn(mask=prefix(20), pos=relative(4)) + attn(mask=prefix(30)) + based(init=prefix(9)) + mlp, width=64)"
    yield "lm(attn + mlp, width=16, norm=prepbn(2), place=sandwich)"


@contextmanager
def _file_limit(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: what a full disk looks like to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def _moved(architecture: Architecture, seed: int = 0) -> torch.nn.Module:
    """A model whose weights are not what `build` draws, so that no weight can be left out unseen."""
    model = architecture.build(seed=seed).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.03 * torch.randn(weight.shape, generator=random))
    if isinstance(architecture.norm, Form):
        # Half way from one norm to the other.
        model.train()(torch.arange(20)[None])
    # What is measured at the end of training follows the weights.
    return model.train().eval()


def _exported() -> list[Architecture]:
    """The catalogue, and the presets whose stacks are more than layers in turn."""
    stacks = [name for name, each in PRESETS.items() if each.family in ("hybrid", "topology")]
    return [*map(parse, _catalogue()), *(preset(name, "tiny") for name in stacks)]


# Each part is one process that imports torch.
PARTS = 6


@pytest.mark.parametrize("part", range(PARTS))
def test_catalogue_and_presets_run_alone_and_agree(tmp_path: Path, part: int) -> None:
    architectures = _exported()[part::PARTS]
    pairs = []
    for number, architecture in enumerate(architectures):
        folder = tmp_path / str(number)
        folder.mkdir()
        model = _moved(architecture)
        write_files(architecture, model, folder)
        pairs.append((model, folder))
    for architecture, differences in zip(architectures, verify(pairs, length=35), strict=True):
        assert differences["searched"] == 0, architecture
        assert differences["future"] < 1e-5, architecture
    for _, folder in pairs:
        source = (folder / "model.py").read_text()
        assert "mixforge" not in source
        assert "Part(" not in source
        assert set(re.findall(r"^(?:from|import) (\w+)", source, re.M)) <= ALLOWED


def test_an_export_has_no_code_of_mixers_that_it_does_not_use(tmp_path: Path) -> None:
    architecture = parse("lm(retnet + swiglu, width=64)")
    write_files(architecture, architecture.build(), tmp_path)
    source = (tmp_path / "model.py").read_text()
    for absent in (
        "class Attention",
        "gated_scan",
        "delta_scalar",
        "DeltaChunks",
        "FeedForward",
        "_reference",
    ):
        assert absent not in source, absent


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    architecture = parse(SMALL)
    weights = place / "weights.safetensors"
    safetensors.torch.save_file(_moved(architecture).state_dict(), weights)
    folder = place / "deep" / "out"
    written = export(architecture, weights, folder, _card(architecture))
    assert written.folder == folder
    assert set(written.files) == {"model.py", "config.json", "model.safetensors", "CARD.md"}
    assert os.listdir(folder.parent) == ["out"]
    return folder


def _card(architecture: Architecture) -> Card:
    place = Environment(
        device="Test CPU",
        device_kind="cpu",
        device_count=2,
        driver=None,
        clock_mhz=None,
        threads=1,
        python="3.11",
        torch="2.13",
        triton=None,
        mixforge="0.1.0",
        commit="abc123+dirty",
        host="h",
        system="Linux",
    )
    cost = architecture.cost(512)
    evaluation = Evaluation(
        outcome=Outcome.ok,
        context=512,
        params=cost.params,
        flops=cost.flops,
        state_bytes=cost.state_bytes,
        decode_bytes=cost.decode_bytes,
        bits_per_byte=2.3456,
        bits_per_byte_test=2.4,
        train_tokens=409600,
        train_s=12.3,
        backend="torch",
        seed=7,
        environment=place,
    )
    timing = Timing(phase="decode", raw_ms=(0.5, 0.4, 0.6, 0.5))
    profile = Profile(
        outcome=Outcome.ok,
        workload=Workload(),
        timings=(timing,),
        peak_bytes=1234567,
        backend="torch",
        environment=place,
    )
    return Card(
        campaign="laptop",
        trial=12,
        budget="b" * 64,
        training="[tasks.text]\nlength = 256",
        evaluation=evaluation,
        profiles=(profile,),
    )


def test_the_card_says_what_where_and_how(exported: Path) -> None:
    card = (exported / "CARD.md").read_text()
    architecture = parse(SMALL)
    for said in (
        str(architecture), architecture.digest, "laptop, trial 12", "2.3456", "bit/byte", "selection split", "0.500",
        "0.050", "1,234,567 bytes", "Test CPU (2 cores, 1 thread)", "abc123+dirty", "409,600 tokens", "seed 7",
        "    length = 256", f"{architecture.cost(512).params:,}",
    ):  # fmt: skip
        assert said in card, said


def test_weights_and_their_sha256_are_stored(exported: Path) -> None:
    config = json.loads((exported / "config.json").read_text())
    stored = (exported / "model.safetensors").read_bytes()
    assert hashlib.sha256(stored).hexdigest() == config["weights_sha256"]
    assert config["digest"] == parse(SMALL).digest
    expected = _moved(parse(SMALL)).state_dict()
    found = safetensors.torch.load(stored)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_everybody_may_read_what_the_umask_lets_them(exported: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    for file in exported.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask
    assert exported.stat().st_mode & 0o777 == 0o777 & ~mask


def test_the_command_line_runs_anywhere(exported: Path) -> None:
    command = [sys.executable, "-I", "-B", str(exported / "model.py"), "--prompt", "déf ", "--tokens", "9"]
    ran = subprocess.run(command, capture_output=True, cwd="/", check=True)
    assert ran.stdout.startswith("déf ".encode())
    assert len(ran.stdout) == len("déf ".encode()) + 9 + 1


@pytest.fixture
def main(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]
) -> Callable[..., bytes]:
    """The exported file's command line, in this process: what it writes."""
    spec = importlib.util.spec_from_file_location("exported", exported / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "exported", module)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec.loader.exec_module(module)

    def run(*arguments: str) -> bytes:
        monkeypatch.setattr(sys, "argv", ["model.py", *arguments])
        module.main()
        return capsysbinary.readouterr().out

    return run


def test_the_same_seed_gives_the_same_text(main: Callable[..., bytes]) -> None:
    first, again, other = (main("--tokens", "9", "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other
    greedy = [main("--tokens", "9", "--temperature", "0", "--seed", seed) for seed in ("1", "2")]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("bad", [["--prompt", ""], ["--tokens", "0"], ["--temperature", "-1"]])
def test_the_command_line_refuses_what_it_cannot_do(
    main: Callable[..., bytes], bad: list[str], capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(*bad)
    assert ended.value.code == 2
    assert b"tokens >= 1 and temperature >= 0" in capsysbinary.readouterr().err


def test_damaged_weights_are_not_loaded(main: Callable[..., bytes], exported: Path, tmp_path: Path) -> None:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        sys.modules["exported"].load(tmp_path)


def test_an_existing_folder_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"out exists; give a folder"):
        export(parse(SMALL), None, tmp_path / "out", Card())
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_a_dangling_link_is_an_existing_folder(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="exists"):
        export(parse(SMALL), None, tmp_path / "out", Card())


def test_a_model_that_does_not_read_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab must be 256, not 128"):
        export(parse("lm(attn, width=32, vocab=128)"), None, tmp_path / "out", Card())


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "No such file"),
        (b"nothing of the kind", "cannot be read"),
        ("other", "belong to another architecture"),
    ],
)
def test_wrong_weights_are_refused(tmp_path: Path, content: bytes | str | None, complaint: str) -> None:
    weights = tmp_path / "weights.safetensors"
    if content == "other":
        safetensors.torch.save_file(parse("lm(attn, width=16)").build().state_dict(), weights)
    elif isinstance(content, bytes):
        weights.write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        export(parse(SMALL), weights, tmp_path / "out", Card())
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    with _file_limit(100_000), pytest.raises(ExportError, match=r"cannot write .* bytes to"):
        export(parse(SMALL), None, tmp_path / "out", Card())
    assert os.listdir(tmp_path) == []


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot write beside"):
        export(parse(SMALL), None, tmp_path / "file" / "out", Card())


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ((LOADING, "safetensors.torch.load(stored)"), "logits differ: searched"),
        (("import json\n", "import json\nimport mixforge\n"), "does not run by itself"),
        (("state.position.add_(1)", "state.position"), "logits differ: step"),
    ],
)
def test_a_model_that_is_not_the_searched_one_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: tuple[str, str], complaint: str
) -> None:
    honest = exporting.write_model_file

    def write_model_file(*arguments: object, **named: object) -> str:
        source = honest(*arguments, **named)  # type: ignore[arg-type]
        assert wrong[0] in source
        return source.replace(*wrong)

    monkeypatch.setattr(exporting, "write_model_file", write_model_file)
    with pytest.raises(ExportError, match=complaint):
        export(parse(SMALL), None, tmp_path / "out", Card())
    assert os.listdir(tmp_path) == []
