"""Adapters: what they may be, where they go, and what is trained, sent and exported."""

import asyncio

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rllib_arpo.engines.torch_engine import TorchEngine
from rllib_arpo.engines.weights import WEIGHT_PROBE, check_probe
from rllib_arpo.errors import ConfigError, WeightSyncError
from rllib_arpo.lora import AdapterMerger, lora_settings
from rllib_arpo.rl_module import CausalLMRLModule
from tests.learner.helpers import build_learner, module_spec, random_tree, weights
from tests.learner.pairs import train
from tests.models import save_tiny_model, tiny_model

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
TREES = [random_tree(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def build(model: str, **config) -> CausalLMRLModule:
    return module_spec(model, **config).build()


def batch() -> dict:
    return {
        "token_ids": torch.tensor([[1, 2, 3, 4, 5, 6]]),
        "position_ids": torch.arange(6)[None],
        "loss_mask": torch.tensor([[0, 1, 1, 1, 1, 1]]).bool(),
    }


def logprobs(module: CausalLMRLModule) -> torch.Tensor:
    return module.forward_train(batch())["logprobs"].detach()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 4}, r"`lora` holds `rank`, expected keys of PEFT's LoraConfig"),
        ({"use_dora": True}, "`use_dora`"),
        ({"lora_dropout": 0.05}, r"lora_dropout to 0.05, expected 0: .* ratio"),
        ({"bias": "all"}, "bias to 'all', expected 'none'"),
        ({"r": 0}, "`r` 0: expected 1 or more"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights to 'pissa'"),
        ({"target_modules": ["q_projj"]}, "does not fit the model: .*q_projj"),
        ({"target_modules": ["lm_head"]}, "below the head only"),
        ({"target_modules": ["embed_tokens"]}, "below the head only"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, given, message) -> None:
    source = save_tiny_model(tmp_path, tied=False)
    with pytest.raises(ConfigError, match=message):
        build(source, lora=given)


def test_a_model_with_new_adapters_is_the_model(model) -> None:
    assert torch.equal(logprobs(build(model, lora=LORA)), logprobs(build(model)))


def test_adapters_start_alike_in_every_process(model) -> None:
    torch.manual_seed(1)
    one = build(model, lora=LORA).get_state()
    torch.manual_seed(2)
    two = build(model, lora=LORA).get_state()
    assert any(array.any() for array in one.values())
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name])


def test_only_adapters_are_trained_and_saved(model) -> None:
    learner = build_learner(model, model_config={"lora": LORA})
    network = learner.language_model.model
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    train(learner, TREES)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            assert not torch.equal(parameter, before[name]), name
        else:
            assert torch.equal(parameter, before[name]) and parameter.grad is None
    owned = sum(p.numel() for named in learner.named_optimizers for p in named[2])
    # 2 layers, each q and v: A [4, 16] and B [16, 4]
    assert owned == 2 * 2 * (4 * 16 + 16 * 4)
    state = learner.get_state()
    saved = state["rl_module"]["default_policy"]
    assert sum(array.size for array in saved.values()) == owned
    moments = state["optimizer"]["default_policy_adamw"]["state"]["state"]
    assert sum(values["exp_avg"].size for values in moments.values()) == owned
    # PEFT's names, as vLLM reads them.
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in saved


def test_adapters_are_restored_and_train_on_alike(model, tmp_path) -> None:
    learner = build_learner(model, model_config={"lora": LORA})
    train(learner, TREES)
    learner.save_to_path(str(tmp_path))
    restored = build_learner(model, model_config={"lora": LORA})
    restored.restore_from_path(str(tmp_path))
    train(learner, TREES), train(restored, TREES)
    for name, array in weights(learner).items():
        assert array.tobytes() == weights(restored)[name].tobytes()


def test_the_reference_is_the_model_without_adapters(model) -> None:
    module = build(model, lora=LORA, reference=True)
    assert module.reference is None and len(module.scorers) == 1
    first = module.forward_train(batch())["ref_logprobs"]
    module.set_state({name: a + 0.3 for name, a in module.get_state().items()})
    out = module.forward_train(batch())
    assert torch.equal(out["ref_logprobs"], first)
    assert not torch.allclose(out["logprobs"], first)
    assert out["logprobs"].requires_grad
    out["logprobs"].sum().backward()
    trained = [p for p in module.model.parameters() if p.requires_grad]
    assert len(trained) == 8 and all(p.grad is not None for p in trained)


def test_checkpointing_gives_the_first_layers_adapters_their_gradient(model) -> None:
    """Nothing below them is trained, which reentrant checkpointing takes for all."""
    gradients = []
    for checkpointing in (False, True):
        module = build(model, lora=LORA, gradient_checkpointing=checkpointing)
        module.forward_train(batch())["logprobs"].sum().backward()
        layer = module.model.model.layers[0].self_attn.q_proj
        gradients.append(layer.lora_B["default"].weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


def test_bfloat16_keeps_the_model_in_it_and_adapters_in_float32(model) -> None:
    learner = build_learner(model, model_config={"lora": LORA, "dtype": "bfloat16"})
    exact = build_learner(model, model_config={"lora": LORA})
    (rounded,), (expected,) = train(learner, TREES), train(exact, TREES)
    assert rounded["total_loss"] == pytest.approx(expected["total_loss"], abs=0.02)
    for name, parameter in learner.language_model.model.named_parameters():
        dtype = torch.float32 if ".lora_" in name else torch.bfloat16
        assert parameter.dtype == dtype, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_exported_folder_is_an_ordinary_model(tmp_path, dtype, rslora) -> None:
    source = save_tiny_model(tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    lora = {**LORA, "target_modules": "all-linear", "use_rslora": rslora}
    module = build(source, lora=lora, dtype=dtype)
    first = logprobs(module)
    module.set_state({name: a + 0.05 for name, a in module.get_state().items()})
    module.save_pretrained(tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    assert not (tmp_path / "exported" / "adapter_config.json").exists()
    ids = batch()["token_ids"]
    table = model(ids).logits[0, :-1].float().log_softmax(-1)
    got = table.gather(-1, ids[0, 1:, None])[:, 0]
    tolerance = 1e-5 if dtype == "float32" else 0.1
    torch.testing.assert_close(
        logprobs(module)[0, 1:], got, atol=tolerance, rtol=tolerance
    )
    assert (first[0, 1:] - got).abs().max() > 0.2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_torch_engine_takes_adapters_and_they_do_not_add_up(
    almanac_model, dtype
) -> None:
    config = {"lora": LORA, "dtype": dtype}
    learner = build_learner(almanac_model, lr=0.1, model_config=config)
    engine = TorchEngine.from_pretrained(
        almanac_model, dtype=getattr(torch, dtype), lora=lora_settings(LORA)
    )
    first = asyncio.run(engine.score(learner.engine_state()[WEIGHT_PROBE].token_ids))
    for version in (1, 2):
        train(learner, TREES)
        state = learner.engine_state()
        sent = state["rl_module"]["default_policy"]
        assert all(".lora_" in name for name in sent)
        asyncio.run(engine.update_weights(version, sent))
        scored = asyncio.run(engine.score(state[WEIGHT_PROBE].token_ids))
        check_probe(state[WEIGHT_PROBE], scored, dtype=dtype)
        assert np.abs(scored - first).mean() > 0.1
    assert engine.policy_version == 2


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
FITS = {A: np.ones((4, 16), np.float32), B: np.ones((16, 4), np.float32)}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({A: FITS[A]}, "lora_A.weight without its other half"),
        ({**FITS, B: np.ones((16, 3), np.float32)}, r"shapes \(4, 16\) and \(16, 3\)"),
        ({A.replace("q_proj", "x"): FITS[A]}, "unknown .*x.lora_A.weight"),
        ({"model.norm.weight": np.ones(16, np.float32)}, "unknown model.norm.weight"),
        ({}, "missing model.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_adapters_that_do_not_fit_change_nothing(arrays, message) -> None:
    model = tiny_model()
    merger = AdapterMerger(model, lora_settings({"r": 4, "lora_alpha": 8}))
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    merger.load(FITS)
    # s·B·A = 8/4 · (sum over 4 of 1·1) = 8 everywhere
    torch.testing.assert_close(weight.detach(), before + 8)
    with pytest.raises(WeightSyncError, match=message):
        merger.load(arrays)
    torch.testing.assert_close(weight.detach(), before + 8)
