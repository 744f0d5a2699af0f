"""From what training left behind to a model that loads, in every way people load it."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from conftest import FORMATS, float64_mean, save_checkpoint
from safetensors.torch import load_file
from torch import nn

from ckptavg import (
    BnPass,
    IncompatibleCheckpointsError,
    Recipe,
    average_checkpoints,
    inspect_checkpoint,
    open_checkpoint,
    plan_average,
)


def convolutional_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 4),
    )  # fmt: skip


def trained(seed: int) -> nn.Sequential:
    """Return a network whose parameters and buffers all differ by seed."""
    torch.manual_seed(seed)
    model = convolutional_network()
    model.train()
    for _ in range(seed + 1):
        model(torch.randn(8, 3, 5, 5))
    return model


def test_average_loads_strictly_and_equals_the_reference(tmp_path: Path, device: str) -> None:
    models = [trained(seed) for seed in range(4)]
    paths = [
        save_checkpoint(tmp_path / f"epoch-{epoch}", model.state_dict(), layout)
        for epoch, (model, layout) in enumerate(zip(models, itertools.cycle(FORMATS), strict=False))
    ]
    average_checkpoints(paths, tmp_path / "swa", device=device)
    loaded = load_file(tmp_path / "swa" / "model.safetensors")
    model = convolutional_network()
    model.load_state_dict(loaded, strict=True)
    for name, value in loaded.items():
        values = [one.state_dict()[name] for one in models]
        if value.is_floating_point():
            assert torch.equal(value, float64_mean(values).float()), name
        else:
            assert torch.equal(value, values[-1]), name


def test_wrapped_and_compiled_models_load_under_their_own_names(tmp_path: Path) -> None:
    """What DistributedDataParallel(torch.compile(model)) saves has both prefixes."""
    state = trained(0).state_dict()
    for epoch in range(2):
        wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
        torch.save({"model": wrapped}, tmp_path / f"epoch-{epoch}.pt")
    result = average_checkpoints([f"{tmp_path}/epoch-*.pt"], tmp_path / "swa")
    convolutional_network().load_state_dict(load_file(tmp_path / "swa" / "model.safetensors"))
    assert list(result.notes)[:2] == [
        "stripped the prefix 'module.', which all tensor names had",
        "stripped the prefix '_orig_mod.', which all tensor names had",
    ]


def test_a_prefix_that_only_some_have_is_stripped_when_asked(tmp_path: Path) -> None:
    state = trained(0).state_dict()
    torch.save(state, tmp_path / "epoch-0.pt")
    torch.save({f"model.{name}": value for name, value in state.items()}, tmp_path / "epoch-1.pt")
    with pytest.raises(IncompatibleCheckpointsError, match=r"\(pass --strip-prefix model\.\)$"):
        average_checkpoints([f"{tmp_path}/epoch-*.pt"], tmp_path / "swa")
    average_checkpoints([f"{tmp_path}/epoch-*.pt"], tmp_path / "swa", strip_prefixes=["model."])
    convolutional_network().load_state_dict(load_file(tmp_path / "swa" / "model.safetensors"))


def test_prefixes_are_kept_when_asked(tmp_path: Path) -> None:
    """Names are compared without them, and written as the last checkpoint has them."""
    state = trained(0).state_dict()
    torch.save(state, tmp_path / "epoch-0.pt")
    torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / "epoch-1.pt")
    options = {"strip_prefixes": ["module."], "keep_prefix": True}
    result = average_checkpoints([f"{tmp_path}/*.pt"], tmp_path / "swa", **options)  # type: ignore[arg-type]  # options
    found = load_file(tmp_path / "swa" / "model.safetensors")
    nn.DataParallel(convolutional_network()).load_state_dict(found)
    assert list(result.notes)[1:2] == [
        f"the output keeps the prefixes that tensor names have in {tmp_path}/epoch-1.pt"
    ]


def test_state_key_chooses_the_weights_kept_as_ema(tmp_path: Path) -> None:
    for epoch in range(2):
        checkpoint = {"model": {"w": torch.zeros(3)}, "ema": {"w": torch.full((3,), float(epoch))}}
        torch.save(checkpoint, tmp_path / f"epoch-{epoch}.pt")
    result = average_checkpoints([f"{tmp_path}/*.pt"], tmp_path / "raw")
    assert load_file(tmp_path / "raw" / "model.safetensors")["w"].tolist() == [0.0] * 3
    assert any("also holds 'ema'; --state-key selects it" in note for note in result.notes)
    average_checkpoints([f"{tmp_path}/*.pt"], tmp_path / "ema", state_key="ema")
    assert load_file(tmp_path / "ema" / "model.safetensors")["w"].tolist() == [0.5] * 3


def test_output_of_one_run_is_input_of_the_next(tmp_path: Path) -> None:
    values = [torch.full((3,), float(n)) for n in range(4)]
    paths = [
        save_checkpoint(tmp_path / f"c{n}", {"w": value}, "torch") for n, value in enumerate(values)
    ]
    average_checkpoints(paths[:2], tmp_path / "first")
    average_checkpoints(paths[2:], tmp_path / "second")
    average_checkpoints([tmp_path / "first", tmp_path / "second"], tmp_path / "both")
    assert load_file(tmp_path / "both" / "model.safetensors")["w"].tolist() == [1.5] * 3
    info = inspect_checkpoint(tmp_path / "both")
    assert (info.layout, info.n_parameters) == ("safetensors directory", 3)


def test_same_checkpoint_twice_is_pointed_out(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "c", {"w": torch.ones(1)}, "torch")
    result = average_checkpoints([path, path], tmp_path / "out")
    assert result.notes == (f"{path} is the same checkpoint as {path}: it counts twice",)


def test_library_functions_compose(tmp_path: Path) -> None:
    paths = [save_checkpoint(tmp_path / f"c{n}", {"w": torch.ones(3)}, "torch") for n in range(2)]
    checkpoints = [open_checkpoint(path) for path in paths]
    plan = plan_average(checkpoints, Recipe(dtype="bfloat16"))
    assert (plan.read_nbytes, plan.total_nbytes) == (24, 6)
    for checkpoint in checkpoints:
        checkpoint.close()


def test_batchnorm_pass_makes_a_model_whose_statistics_fit_its_data(
    tmp_path: Path, device: str
) -> None:
    paths = [
        save_checkpoint(tmp_path / f"epoch-{seed}", trained(seed).state_dict(), "torch")
        for seed in range(3)
    ]
    inputs = torch.randn(50, 3, 5, 5, generator=torch.Generator().manual_seed(7)) * 3 + 1
    result = average_checkpoints(
        paths, tmp_path / "swa", device=device,
        batchnorm=BnPass(model=convolutional_network, batches=[(inputs[:31], 0), (inputs[31:], 1)]),
    )  # fmt: skip
    model = convolutional_network()
    model.load_state_dict(load_file(tmp_path / "swa" / "model.safetensors"))
    with torch.no_grad():
        features = model[0].double()(inputs.double())
    mean, variance = features.mean((0, 2, 3)), features.var((0, 2, 3))
    deviation = variance.sqrt()
    precision = 1e-6 if device == "cpu" else 1e-3  # CUDA convolutions may use TF32
    assert ((model[1].running_mean - mean).abs() / deviation).max() < precision
    assert ((model[1].running_var - variance).abs() / variance).max() < 2 * precision
    assert result.outputs[0].batchnorm is not None
    assert (result.outputs[0].batchnorm.n_batches, result.outputs[0].batchnorm.n_samples) == (2, 50)
    told = json.loads((tmp_path / "swa" / "ckptavg.json").read_text())
    assert told["batchnorm"]["layers"][0]["name"] == "1"
    assert told["batchnorm"]["layers"][0]["n_elements"] == 50 * 9


def test_transformers_loads_an_averaged_llama_with_its_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    words = {f"w{n}": n for n in range(10)} | {"[UNK]": 10}
    model_of_words = tokenizers.models.WordLevel(words, unk_token="[UNK]")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model_of_words), unk_token="[UNK]"
    )
    models = []
    for step in (100, 200, 300):
        torch.manual_seed(step)
        models.append(transformers.LlamaForCausalLM(config).bfloat16())
        folder = tmp_path / f"checkpoint-{step}"
        models[-1].save_pretrained(folder, max_shard_size="1KB" if step == 200 else "5GB")
        tokenizer.save_pretrained(folder)
        torch.save({}, folder / "optimizer.pt")
    average_checkpoints([f"{tmp_path}/checkpoint-*"], tmp_path / "avg", accumulate="float64")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "avg")
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    for name, value in loaded.state_dict().items():
        expected = float64_mean([model.state_dict()[name] for model in models])
        assert (value.double() - expected).abs().max() <= expected.abs().max() * 2**-8, name
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "avg")
    assert again("w3")["input_ids"] == [3]
    assert not (tmp_path / "avg" / "optimizer.pt").exists()
