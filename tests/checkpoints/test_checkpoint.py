"""Checkpoints that cannot be said are refused with what is wrong; those that can become a text and its weights.

That the logits are the class's own is shown in `tests/oracle_transformers`, where the class is at hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixforge.checkpoints.checkpoint import read
from mixforge.cli import main
from mixforge.evaluator.weights import load_weights

CONFIG: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"model.embed_tokens.weight": (31, 16), "model.norm.weight": (16,)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{name}_layernorm.weight": (16,) for name in ("input", "post_attention")}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (16, 16) for name in "qo"}
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (8, 16) for name in "kv"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (24, 16) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (16, 24)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def write(folder: Path, config: dict[str, object] | None = None, **changed: torch.Tensor | None) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    found = {**tensors(), **changed}
    save_file(
        {name: value for name, value in found.items() if value is not None}, folder / "model.safetensors"
    )
    return folder


def test_a_checkpoint_becomes_a_text_and_the_state_of_its_model(tmp_path: Path) -> None:
    found = read(write(tmp_path))
    assert (
        str(found.architecture)
        == "lm(2 * (attn(heads=4, kv=gqa(2)) + swiglu(expand=1.5)), width=16, vocab=31)"
    )
    model = found.build()
    assert torch.equal(model.embedding.weight, tensors()["model.embed_tokens.weight"])
    assert model(torch.arange(5)[None]).shape == (1, 5, 31)


def test_settings_keep_their_last_digit(tmp_path: Path) -> None:
    config: dict[str, object] = {
        "rope_theta": 8388608.0,
        "rms_norm_eps": 1.2345678e-05,
        "partial_rotary_factor": 0.5,
    }
    text = str(read(write(tmp_path, config)).architecture)
    assert "theta=8388608" in text
    assert "eps=1.2345678e-05" in text
    assert "rotary=0.5" in text
    far = read(write(tmp_path, {"rope_theta": 12345678901})).architecture
    assert "theta=1.2345678901e10" in str(far)


def test_windows_begin_where_the_configuration_says(tmp_path: Path) -> None:
    config: dict[str, object] = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
    stack = read(write(tmp_path, config)).architecture.layers
    assert [layer.genes for layer in stack[::2]] == ["heads=4, kv=gqa(2)", "heads=4, kv=gqa(2), window=8"]


def test_shards_are_read_and_names_in_the_index_do_not_lead_out(tmp_path: Path) -> None:
    expected = read(write(tmp_path)).weights
    (tmp_path / "model.safetensors").unlink()
    found = tensors()
    names = sorted(found)
    for part, chosen in (("a", names[::2]), ("b", names[1::2])):
        save_file({name: found[name] for name in chosen}, tmp_path / f"{part}.safetensors")
    where = {name: f"{'ab'[number % 2]}.safetensors" for number, name in enumerate(names)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    again = read(tmp_path).weights
    assert all(torch.equal(again[name], weight) for name, weight in expected.items())
    index.write_text(json.dumps({"weight_map": {"x": "../elsewhere/a.safetensors"}}))
    with pytest.raises(ValueError, match="has no tensor"):
        read(tmp_path)
    for wrong in ("{}", "[1]", "{"):
        index.write_text(wrong)
        with pytest.raises(ValueError, match="is no index of shards"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("config", "changed", "message"),
    [
        ({"model_type": "lama"}, {}, "model_type 'lama' cannot be said; known: .*did you mean 'llama'"),
        ({"hidden_size": "wide"}, {}, "hidden_size is 'wide'; expected a whole number"),
        ({"num_attention_heads": None}, {}, "config.json has no num_attention_heads"),
        ({"hidden_act": "gelu"}, {}, "hidden_act is 'gelu', and only 'silu' can be said"),
        ({"rope_scaling": {"rope_type": "yarn"}}, {}, "rope_type is 'yarn', and only 'default' can be said"),
        ({}, {"model.norm.weight": None}, "has no tensor model.norm.weight"),
        (
            {},
            {"model.layers.0.self_attn.q_scale": torch.ones(16)},
            "has no place for 1 tensor, such as .*q_scale",
        ),
        ({"num_attention_heads": 3}, {}, "cannot be built: .*2 key/value heads do not divide 3"),
    ],
)
def test_what_cannot_be_said_is_named(
    tmp_path: Path, config: dict[str, object], changed: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path, config, **changed))


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json cannot be read: .*give the folder"):
        read(tmp_path)
    write(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="weights must be safetensors files"):
        read(tmp_path)


def told(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit status of `mixforge import hf` with these words."""
    monkeypatch.setattr(sys, "argv", ["mixforge", "import", "hf", *words])
    try:
        main.run()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_writes_a_whole_folder_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "theirs", tmp_path / "ours"
    source.mkdir()
    write(source)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mixforge.evaluator.weights.save_weights", full)
        assert told(patch, str(source), str(target)) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["theirs"]
    assert told(monkeypatch, str(source), str(target)) == 0
    assert sorted(each.name for each in target.iterdir()) == ["architecture.txt", "weights.safetensors"]
    found = read(source)
    assert (target / "architecture.txt").read_text() == f"{found.architecture}\n"
    model = found.architecture.build(seed=5)
    load_weights(model, target / "weights.safetensors")
    tokens = torch.arange(7)[None]
    assert torch.equal(model(tokens), found.build()(tokens))
    assert told(monkeypatch, str(source), str(target)) == 2
    assert told(monkeypatch, str(tmp_path / "nothing")) == 2
