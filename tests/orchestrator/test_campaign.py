"""A campaign's file: what it says, what is refused, and what makes two of them the same campaign."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixforge.orchestrator.campaign import Campaign
from mixforge.orchestrator.samplers import SAMPLERS


def test_the_example_reads():
    campaign = Campaign.read(Path(__file__).parents[2] / "examples" / "laptop.toml")
    assert [objective.name for objective in campaign.objectives] == ["bits_per_byte", "recall", "decode_ms"]
    assert [baseline.name for baseline in campaign.baselines][:2] == ["transformer", "gdn"]
    assert (campaign.sampler, campaign.trials, campaign.hours) == ("tpe", 60, 0.18)
    assert campaign.text.startswith("# A search that fits a laptop")


def test_every_sampler_says_what_it_is():
    assert list(SAMPLERS) == ["nsga2", "random", "tpe"]
    assert all(sampler.ABOUT for sampler in SAMPLERS.values())


def test_the_default_sampler_follows_the_budget(stub):
    auto = stub.CAMPAIGN.replace('sampler = "nsga2"', "")
    assert Campaign.parse(auto).sampler == "tpe"
    assert Campaign.parse(auto.replace("trials = 20", "trials = 2000")).sampler == "nsga2"
    assert Campaign.parse(auto.replace("trials = 20", "hours = 1")).sampler == "nsga2"


def test_comments_and_budget_leave_the_digest_alone(stub):
    campaign = Campaign.parse(stub.CAMPAIGN)
    more = Campaign.parse("# more\n" + stub.CAMPAIGN.replace("trials = 20", "trials = 40\nhours = 2.0"))
    other = Campaign.parse(stub.CAMPAIGN.replace("seed = 3", "seed = 4"))
    assert more.digest == campaign.digest
    assert other.digest != campaign.digest


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed = 3", "sede = 3", "'sede'; did you mean 'seed'?"),
        ("trials = 20", "trails = 20", "'trails'; did you mean 'trials'?"),
        ("trials = 20", "", "neither trials nor hours"),
        ("trials = 20", "trials = 0", "search.trials 0 is not a whole number from 1"),
        ("trials = 20", "trials = true", "search.trials True"),
        ("trials = 20", "hours = nan", "search.hours nan is not a number"),
        ("trials = 20", "trials = 20\nrandom_share = 1.5", "random_share 1.5 is not a number from 0 to 1"),
        ('"nsga2"', '"nsga"', "'nsga' is no sampler; did you mean 'nsga2'?"),
        ('"recall", "decode_ms"', '"recal"', "'recal' is no figure; did you mean 'recall'?"),
        ('"recall", "decode_ms"', '"bits_per_byte"', "the score of a task that the campaign does not have"),
        ('"recall", "decode_ms"', '"recall", "recall"', "name a figure twice"),
        ('"recall", "decode_ms"', "", "objectives has 0 figures; give 1 to 4"),
        ('["recall", "decode_ms"]', '"recall"', "is not a list of names"),
        ('"lm(gdn + swiglu, width=32)"', '"transfomer"', "did you mean 'transformer'?"),
        ('"lm(gdn + swiglu, width=32)"', '"lm(swiglu, width=32)"', "cannot be built: "),
        ('"lm(gdn + swiglu, width=32)"', '"lm(1 * (attn + swiglu), width=32)"', "are the same architecture"),
        ('name = "tiny"', 'name = "../tiny"', "is not a campaign's name"),
        ('name = "tiny"', "", "name None is not a campaign's name"),
        ("any(swiglu, mlp)", "any(swigl, mlp)", "swigl"),
        ('"<= 40e3"', '"<= 12"', "none of 5000 sentences drawn from the space is legal"),
        ("pairs = 2", "pears = 2", "'pears'; did you mean 'pairs'?"),
        ("[tasks.mqar]", "[tasks.mqra]", "mqra"),
        ("deadline_s = 5", "dedline_s = 5", "did you mean 'deadline_s'?"),
        ("seed = 3", "seed = 3\nseed = 4", "Cannot overwrite a value"),
        ("[search]", "[search", "Expected"),
    ],
)
def test_what_is_refused(stub, old, new, said):
    assert old in stub.CAMPAIGN
    with pytest.raises(ValueError, match=r"^somewhere\.toml: ") as refusal:
        Campaign.parse(stub.CAMPAIGN.replace(old, new, 1), source="somewhere.toml")
    assert said in str(refusal.value)


@pytest.mark.parametrize("mixer", ["attn(mask=prefix({}))", "linear(init=prefix({}))"])
def test_a_baseline_with_a_prefix_leaves_each_task_a_question(stub, mixer):
    def text(prefix: int) -> str:
        baseline = f"lm({mixer.format(prefix)} + swiglu, width=32)"
        return stub.CAMPAIGN.replace("lm(gdn + swiglu, width=32)", baseline)

    # Two pairs are read before the first question.
    assert Campaign.parse(text(4)).baselines[1].architecture.prefix == 4
    with pytest.raises(ValueError, match="a prefix of 16 tokens leaves nothing to predict"):
        Campaign.parse(text(16))
    with pytest.raises(ValueError, match=r"^somewhere\.toml: baseline 'lm\(") as refusal:
        Campaign.parse(text(600), source="somewhere.toml")
    said = str(refusal.value)
    assert "a prefix of 600 tokens leaves nothing to predict in training sequences of mqar" in said
    assert (
        "which have 16 tokens; say a shorter prefix, or longer sequences in [tasks.mqar], or leave it out"
        in said
    )


def test_a_baseline_that_the_backend_has_no_kernel_for_is_refused(stub):
    pytest.importorskip("triton")
    baseline = "lm(linear(rule=dplr, heads=1, key_dim=300) + swiglu, width=32)"
    text = stub.CAMPAIGN.replace("lm(gdn + swiglu, width=32)", baseline)
    assert Campaign.parse(text).baselines[1].name == baseline
    with pytest.raises(
        ValueError, match=r"^campaign: baseline 'lm\(.*cannot be run: .*at most 256 .*or leave it out"
    ):
        Campaign.parse(text.replace("deadline_s = 5", 'deadline_s = 5\nbackend = "triton"'))


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"absent.toml: cannot be read \(No such file"):
        Campaign.read(tmp_path / "absent.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        Campaign.read(tmp_path / "bytes.toml")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 50_000)
    with pytest.raises(ValueError, match=r"deep.toml: "):
        Campaign.read(tmp_path / "deep.toml")
    (tmp_path / "large.toml").write_text("#" * 1_000_001)
    with pytest.raises(ValueError, match="not a campaign file"):
        Campaign.read(tmp_path / "large.toml")
