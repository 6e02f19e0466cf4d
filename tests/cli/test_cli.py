"""The command line: every command helps, shows an example and speaks JSON; a wrong request is told what is wrong."""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from typer.main import get_command

from mixforge.cli import main, output, searching
from mixforge.db.store import Store
from mixforge.db.tables import SCHEMA
from mixforge.evaluator.environment import environment
from mixforge.evaluator.evaluation import Outcome
from mixforge.orchestrator.campaign import Campaign
from mixforge.orchestrator.ledger import Ledger
from mixforge.orchestrator.progress import Ending, Left, Progress

EXAMPLES = Path(__file__).parents[2] / "examples"
COMMANDS = sorted(get_command(main.app).commands)  # type: ignore[attr-defined]
TINY = (EXAMPLES / "tiny.toml").read_text()
ENDED = Progress(
    campaign="tiny",
    phase="ended",
    baselines_done=1,
    baselines=1,
    trials_done=6,
    trials=6,
    outcomes={},
    reused=0,
    waiting=0,
    running=(),
    rejected={},
    best=(),
    front=0,
    volumes=None,
    elapsed_s=1.0,
    spent_s=1.0,
    left=None,
    idle_share=0.0,
)


class Told:
    """What a command printed and how it ended."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def tell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Runs `mixforge` with the given words, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Told:
        monkeypatch.setattr(sys, "argv", ["mixforge", *words])
        status = 0
        try:
            main.run()
        except SystemExit as end:
            status = int(end.code or 0)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        return Told(status, printed.out, printed.err)

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_helps_with_an_example_and_speaks_json(command: str, tell) -> None:
    told = tell(command, "--help")
    assert told.status == 0
    assert f"Example: mixforge {command}" in told.out
    assert "--json" in told.out


def test_help_and_the_database_load_no_torch() -> None:
    code = (
        "import sys, mixforge, mixforge.cli.main, mixforge.db.results, mixforge.db.store\n"
        "sys.argv = ['mixforge', '--help']\n"
        "try: mixforge.cli.main.run()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'ray', 'optuna', 'plotly'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_what_needs_no_search(tell) -> None:
    drawn = json.loads(tell("draw", str(EXAMPLES / "laptop.toml"), "-n", "3", "--json").out)
    assert len(drawn["architectures"]) == 3
    assert drawn == json.loads(tell("draw", str(EXAMPLES / "laptop.toml"), "-n", "3", "--json").out)
    shown = json.loads(tell("show", "griffin", "--json").out)
    assert shown["cost"]["params"] > sum(layer["params"] for layer in shown["layers"])
    assert {"attn", "linear"} <= set(json.loads(tell("mixers", "--json").out)["mixers"])
    assert all(check["ok"] for check in json.loads(tell("doctor", "--json").out))


def test_published_spaces_are_listed_drawn_and_linted(tell) -> None:
    listed = json.loads(tell("spaces", "--json").out)
    assert {"composer", "star", "einspace"} <= listed.keys()
    assert listed["composer"]["sentences"] == str(2**6 + 2**16)
    assert "2510.00379" in tell("spaces", "composer").out
    drawn = json.loads(tell("draw", "einspace", "-n", "2", "--json").out)
    assert len(drawn["architectures"]) == 2
    found = json.loads(tell("lint", "composer", "--draws", "30", "--json").out)
    assert {each["rule"] for each in found} >= {"size", "rate"}


def test_refused_draws_can_be_repaired(tell, tmp_path: Path) -> None:
    tight = tmp_path / "tight.toml"
    tight.write_text('[space]\nstart = "lm(any(2, 8) ** any(attn, swiglu), width=any(16, 64))"\n'
                     '[space.limits]\nparams = "<= 2e4"\n')  # fmt: skip
    told = json.loads(tell("draw", str(tight), "-n", "6", "--repair", "--json").out)
    assert told["repaired"] > 0
    assert all(each["params"] <= 2e4 for each in told["architectures"])
    assert "of the 6 shown repaired, by " in tell("draw", str(tight), "-n", "6", "--repair").err
    linted = tell("lint", str(tight), "--repairs", "3", "--draws", "40").out
    assert "3 of 3 refused sentences could be repaired" in linted


def test_an_architecture_is_linted_before_the_device(tell) -> None:
    told = tell("lint", "lm(attn(heads=5) + mlp, width=64)", "--json")
    assert told.status == 1
    assert [each["severity"] for each in json.loads(told.out)].count("error") == 1
    assert tell("lint", "griffin").status == 0
    assert "gradient" in tell("lint", "lm(conv + mlp, width=16)", "--flow").out
    limited = tell("lint", "griffin", "--space", str(EXAMPLES / "laptop.toml"), "--json")
    assert any(each["rule"] == "limits" for each in json.loads(limited.out))


def test_children_and_neighbours_say_what_changed(tell) -> None:
    words = ("mutate", "composer", "--of", "lm(3 * (attn(heads=4, kv=mqa) + swiglu(expand=4)), width=128)")
    told = json.loads(tell(*words, "-n", "4", "--seed", "1", "--json").out)
    assert len(told["children"]) == 4
    assert all(child["changes"] and child["distance"] >= 1 for child in told["children"])
    assert told == json.loads(tell(*words, "-n", "4", "--seed", "1", "--json").out)
    around = json.loads(tell(*words, "--neighbours", "-n", "100", "--json").out)
    # Six layers of two primitives, and the other depth.
    assert len(around["children"]) == 7
    assert [child["distance"] for child in around["children"][1:]] == 6 * [1]
    assert "became" in tell(*words, "--operator", "gene").out


def test_two_architectures_are_told_apart(tell) -> None:
    assert json.loads(tell("diff", "griffin", "griffin", "--json").out) == {"changes": [], "distance": None}
    assert "became" in tell("diff", "griffin", "hybrid_3to1").out
    first, second = (
        "lm(6 * attn(heads=4, kv=mqa), width=128)",
        "lm(5 * attn(heads=4, kv=mqa) + swiglu(expand=4), width=128)",
    )
    told = json.loads(tell("diff", first, second, "--space", "composer", "--json").out)
    assert told["distance"] == len(told["changes"]) == 1


def test_a_winner_is_scaled(tell) -> None:
    told = json.loads(tell("scale", "lm(2 * attn + 4 * mlp, width=64)", "--stack", "32/6", "--json").out)
    assert told["after"]["depth"] == 33
    wide = json.loads(tell("scale", "griffin", "--stretch", "2", "--params", "5e6", "--json").out)
    assert 4e6 < wide["after"]["params"] <= 5e6


def test_kernels_are_tuned_on_a_gpu_only(tell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    told = tell("doctor", "--tune")
    assert told.status == 2
    assert "there is no GPU to tune kernels for" in told.err
    assert not told.out


def test_what_triton_has_no_kernel_for_is_a_wrong_request(tell) -> None:
    pytest.importorskip("triton")
    told = tell(
        "profile", "lm(linear(rule=dplr, heads=1, key_dim=300) + mlp, width=64)", "--backend", "triton"
    )
    assert told.status == 2
    assert "at most 256 key channels with rule=dplr, and this mixer has 300" in told.err


def test_a_space_that_is_not_utf8_is_named(tell, tmp_path) -> None:
    (tmp_path / "space.toml").write_bytes(b'start = "\xff"')
    told = tell("lint", "space.toml")
    assert told.status == 2
    assert told.err == "mixforge: error: space.toml: is not UTF-8 text (byte 9)\n"


@pytest.mark.parametrize(
    ("words", "most"),
    [(("profile", "gdn", "--threads"), 1024), (("search", "tiny.toml", "--workers"), 65536)],
)
def test_more_threads_or_workers_than_there_can_be_are_refused(tell, tmp_path, words, most) -> None:
    (tmp_path / "tiny.toml").touch()
    told = tell(*words, "99999999")
    assert told.status == 2
    assert f"99999999 is not in the range 1<=x<={most}" in told.err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_a_folder_that_cannot_be_made_is_named_with_its_option(tell, tmp_path) -> None:
    (tmp_path / "file").touch()
    told = tell("search", str(EXAMPLES / "tiny.toml"), "--db", "file/runs.db")
    assert told.status == 2
    assert told.err == (
        "mixforge: error: the folder file cannot be made (File exists); give --db a path that can be written\n"
    )


def test_a_profile_asks_for_its_database_before_it_measures(tell, tmp_path, monkeypatch) -> None:
    def measure(*args, **options):
        raise AssertionError("measured")

    monkeypatch.setattr("mixforge.evaluator.profiling.profile", measure)
    told = tell("profile", "gdn", "--keep", "--db", str(tmp_path))
    assert told.status == 2
    assert "is a folder, not a database file" in told.err


def test_triton_without_a_gpu_is_refused_and_leaves_nothing(tell, tmp_path) -> None:
    told = tell("profile", "gdn", "--backend", "triton")
    assert told.status == 2
    assert "backend='triton' runs on a GPU, and the device is 'cpu'" in told.err
    campaign = tmp_path / "triton.toml"
    campaign.write_text(TINY.replace("[evaluation]", '[evaluation]\nbackend = "triton"'))
    told = tell("search", str(campaign), "--db", str(tmp_path / "new.db"))
    assert (told.status, (tmp_path / "new.db").exists()) == (2, False)
    assert "backend='triton' runs on a GPU" in told.err


def test_a_profile_is_measured_and_can_be_kept(tell) -> None:
    words = ("lm(conv + mlp, width=16)", "--context", "16", "--json")
    measured = json.loads(tell("profile", *words, "--keep", "--db", "kept.db").out)
    assert set(measured["phases"]) == {"prefill", "decode", "train"}
    assert all(phase["median_ms"] > 0 for phase in measured["phases"].values())
    stored = json.loads(tell("show", measured["digest"], "--json", "--db", "kept.db").out)
    assert len(stored["profiles"]) == 1


def campaign(tmp_path: Path, old: str, new: str) -> str:
    """The tiny campaign with one thing changed."""
    assert old in TINY
    changed = tmp_path / "changed.toml"
    changed.write_text(TINY.replace(old, new))
    return str(changed)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed = 0", "sede = 0", "seed"),
        ("swiglu)", "swigul)", "swiglu"),
        ("window=any", "widow=any", "window"),
        ("(mixer +", "(mixr +", "mixer"),
        ('"decode_ms"]', '"decoding_ms"]', "decode_ms"),
        (
            "any(attn(window=any(none, 32)), gdn, linear(decay=any(none, scalar)), rglru, conv)",
            "mixer + gdn",
            "mixer",
        ),
        ("width=any(32, 48))", "width=any(32, 48)", "^"),
        ('sampler = "random"', 'sampler = "tbe"', "tpe"),
        ("trials  = 6", "trials  = 0", "trials"),
        ("steps = 20", "steps = -1", "steps"),
        ("length = 64", 'length = 64\npath = "nowhere"', "nowhere"),
        ("[search]", '[space.limits]\nparams = "<= 10"\n[search]', "params"),
        ("lm(attn + swiglu, width=32)", "lm(attn(heads=5) + swiglu, width=32)", "heads 5"),
    ],
)
def test_a_wrong_campaign_is_refused(old: str, new: str, said: str, tell, tmp_path: Path) -> None:
    told = tell("search", campaign(tmp_path, old, new), "--db", "none.db")
    assert told.status == 2, told.err
    assert said in told.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("search", "nowhere.toml"), "nowhere.toml"),
        (("front",), "mixforge search"),
        (("status", "--db", "no.db"), "no.db"),
        (("query", "--db", "notes.txt"), "notes.txt"),
        (("show", "lm(attn(heads=5), width=64)"), "heads 5"),
        (("show", "lm(gnd, width=64)"), "gdn"),
        (("show", "griffon"), "griffin"),
        (("show", "gdn", "--context", "0"), "--context"),
        (("search",), "mixforge search FILE"),
        (("front", "--db", "mysql://x/y"), "mysql"),
        (("profile", "transformer", "--batch", "0"), "batch 0"),
        (("profile", "transformer", "--device", "tpu"), "tpu"),
        (("draw", "notes.txt"), "notes.txt"),
        (("mixers", "atn"), "attn"),
        (("export", "abcdef", "out"), "runs/mixforge.db"),
        (("frnt",), "frnt"),
        (("draw", "x.toml", "-n", "many"), "--number"),
        (("draw", "composr"), "composer"),
        (("spaces", "composr"), "composer"),
        (("lint", "nowhere.toml"), "nowhere.toml"),
        (("lint", "griffon"), "griffin"),
        (("lint", "composer", "--flow"), "--flow"),
        (("mutate", "composer", "--of", "griffin"), "not a sentence of composer"),
        (("mutate", "composer", "--neighbours", "--operator", "gene"), "--operator gene"),
        (("mutate", "composer", "--operator", "grow"), "--operator"),
        (("diff", "griffin", "griffon"), "griffin"),
        (("diff", "griffin", "gdn", "--space", "composer"), "not a sentence of composer"),
        (("scale", "griffin"), "--stack"),
        (("scale", "griffin", "--stack", "two"), "'two' is not a number"),
        (("scale", "griffin", "--stack", "2", "--stretch", "2"), "give one of them"),
        (("scale", "griffin", "--params", "10"), "budget"),
    ],
)
def test_a_wrong_request_is_refused(words: tuple[str, ...], said: str, tell, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("these are notes, not a database and not TOML")
    told = tell(*words)
    assert told.status == 2, told.err
    assert said in told.err


@pytest.mark.parametrize("words", [("mixers",), ("presets", "--json"), ("spaces", "composer"), ("--help",)])
def test_a_reader_that_leaves_is_no_error(words: tuple[str, ...]) -> None:
    """`mixforge presets | head -1`, with a reader that is gone before anything is written."""
    code = "import sys; from mixforge.cli.main import run; sys.argv[0] = 'mixforge'; sys.stdin.read(); run()"
    command = [sys.executable, "-c", code, *words]
    ran = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert ran.stdin is not None
    assert ran.stdout is not None
    assert ran.stderr is not None
    ran.stdout.close()
    ran.stdin.close()
    said = ran.stderr.read()
    ran.stderr.close()
    assert (ran.wait(), said) == (0, b"")


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (1.0, 0.21, "1.00 ±0.21"),
        (0.48, None, "0.480"),
        (2.314, None, "2.31"),
        (99.97, None, "100"),
        (1234.5, None, "1234"),
    ],
)
def test_a_latency_has_three_digits(value: float, spread: float | None, text: str) -> None:
    assert output.figure_text("decode_ms", value, spread) == text


@pytest.mark.parametrize("width", [80, 160])
def test_a_table_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for architectures beside the figures they stand below."""
    out = Console(width=width, file=StringIO(), force_terminal=True, color_system=None)
    monkeypatch.setattr(output, "console", lambda: out)
    made = output.table("digest", "bits_per_byte ↓ >", "decode_ms ↓ >", "params ↓ >", "from", "architecture")
    text = "lm(3 * (mamba2 + swiglu) + attn(heads=4, kv=gqa(2), window=64) + swiglu, width=192)"
    made.add_row("c5b59428813b", "2.200", "5.1 ±0.15", "500k", "hybrid_3to1 (baseline)", text)
    output.show_table(made)
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= width
    assert len(lines) <= 11
    assert sum("digest" in line for line in lines) == (2 if width == 80 else 1)
    assert sum("2.200" in line and "500k" in line for line in lines) == 1


def test_a_refused_search_leaves_nothing(tell, tmp_path: Path) -> None:
    assert tell("search", str(EXAMPLES / "tiny.toml"), "--device", "nope", "--db", "new/none.db").status == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["text", "copy"])
def test_a_search_ends_with_what_failed_and_with_what_can_be_done_next(
    task: str, tell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Weights are kept of text alone, so elsewhere no export is named."""

    def ended(campaign: Campaign, store: Store, **rest: object) -> Ending:
        Ledger(campaign, store, environment("cpu"))
        outcomes = {Outcome.ok: 4, Outcome.crashed: 3}
        return Ending(why="trials", signal=None, progress=replace(ENDED, outcomes=outcomes))

    monkeypatch.setattr("mixforge.orchestrator.run.run", ended)
    file = tmp_path / "tiny.toml"
    figures = {"text": "bits_per_byte", "copy": "copying"}
    text = (
        TINY.replace("tasks.text", f"tasks.{task}")
        .replace("length = 64", "")
        .replace(figures["text"], figures[task])
    )
    file.write_text(text)
    told = tell("search", str(file))
    assert told.status == 0, told.err
    assert "Not ok: crashed 3." in told.out
    assert ("mixforge export best winner" in told.out) == (task == "text")
    query = shlex.split(told.out.partition("The reasons: mixforge ")[2].partition("Next:")[0])
    assert tell(*query).status == 0


@pytest.mark.parametrize(
    ("done", "trials", "line", "sentence"),
    [
        (1, 1, "1 of 1 baseline, 1 of 1 trial,", "1 trial and 1 baseline are finished"),
        (1, 2, "1 of 1 baseline, 1 of 2 trials,", "1 trial and 1 baseline are finished"),
        (1, None, "1 of 1 baseline, 1 trial,", "1 trial and 1 baseline are finished"),
        (2, None, "1 of 1 baseline, 2 trials,", "2 trials and 1 baseline are finished"),
    ],
)
def test_a_search_counts_one_of_a_thing_as_one(
    done: int, trials: int | None, line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = replace(ENDED, trials_done=done, trials=trials)
    searching._lines()(progress)
    assert line in capsys.readouterr().err
    assert Ending(why="trials", signal=None, progress=progress).sentence.startswith(sentence)


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (None, "; 1s\n"),
        (Left(seconds=36.0), "; 1s, about 36s left\n"),
        (Left(seconds=64.0, at_most=True), "; 1s, at most 1m04s left\n"),
    ],
)
def test_a_search_says_how_long_it_goes_on(
    left: Left | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    searching._lines()(replace(ENDED, left=left))
    assert capsys.readouterr().err.endswith(said)


def test_what_is_one_is_said_as_one(tell, tmp_path: Path) -> None:
    one = tmp_path / "one.toml"
    one.write_text('[space]\nstart = "lm(attn + any(mlp, swiglu), width=16)"\n')
    told = tell("draw", str(one), "-n", "1").err
    assert "has 2 sentences; 0 of 1 draw refused" in told
    one.write_text('[space]\nstart = "lm(attn + mlp, width=16)"\n')
    assert "has 1 sentence;" in tell("draw", str(one), "-n", "1").err
    linted = tell("lint", str(one), "--draws", "1").out
    assert "the space has 1 sentence " in linted
    assert "1 of 1 draw gave candidates" in linted
    assert "tokens are mixed by 1 of 1 mixer " in tell("lint", "lm(attn, width=16)").out
    assert "1 change\n" in tell("diff", "lm(attn + mlp, width=16)", "lm(attn + swiglu, width=16)").err
    assert "before: 1 layer, width 16" in tell("scale", "lm(attn, width=16)", "--stack", "2").err


def test_the_front_of_a_campaign_by_its_name(tell, tmp_path: Path) -> None:
    dump = Path(__file__).parents[1] / "db" / "schemas" / "0001.sql"
    with closing(sqlite3.connect(tmp_path / "old.db")) as old:
        old.executescript(dump.read_text())
    newest = json.loads(tell("front", "--figures", "params", "--json", "--db", "old.db").out)
    named = tell("front", newest["campaign"], "--figures", "params", "--json", "--db", "old.db")
    assert json.loads(named.out) == newest
    told = tell("front", "nowhere", "--db", "old.db")
    assert told.status == 2
    assert "'nowhere'" in told.err
    assert newest["campaign"] in told.err


@pytest.mark.parametrize(
    "words",
    [
        ("status", "--json"),
        ("query", "--json"),
        ("front", "--figures", "params", "--json"),
        ("diff", "2ece", "a11c", "--json"),
        ("profile", "lm(conv, width=16)", "--context", "8", "--keep", "--json"),
    ],
)
def test_an_older_database_is_told_to_be_brought_to_the_newest_schema(
    words: tuple[str, ...], tell, tmp_path: Path
) -> None:
    dump = Path(__file__).parents[1] / "db" / "schemas" / "0001.sql"
    with closing(sqlite3.connect(tmp_path / "old.db")) as old:
        old.executescript(dump.read_text())
    told = tell(*words, "--db", "old.db")
    assert told.status == 0, told.err
    assert told.err.splitlines() == [
        f"mixforge: old.db was brought from schema 0001 to {SCHEMA}; as it was it is kept in old.db.schema-0001"
    ]
    assert json.loads(told.out)
    assert (tmp_path / "old.db.schema-0001").exists()
    assert tell("status", "--db", "old.db").err == ""


def test_an_export_folder_that_exists_is_left_alone(tell, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    told = tell("export", "best", "out")
    assert told.status == 2
    assert "out exists" in told.err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failure_is_one_where_nobody_reads_as_well() -> None:
    code = """
from mixforge.cli import main

def app():
    raise main.RunFailed("the disk is full")

main.app = app
main.run()
"""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "mixforge: failed: the disk is full\n")
