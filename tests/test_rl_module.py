"""The language model as an RLModule: scores, state, folders."""

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from rllib_arpo.arrays import to_numpy, to_tensor
from rllib_arpo.errors import ConfigError
from rllib_arpo.learner.scoring import score_targets
from rllib_arpo.rl_module import CausalLMRLModule
from tests.learner.helpers import module_spec
from tests.models import save_tiny_model, tiny_model

FAMILIES = ["qwen2", "qwen3", "llama"]


def build(model: str, *, inference_only: bool = False, **config) -> CausalLMRLModule:
    spec = module_spec(model, **config)
    spec.inference_only = inference_only
    return spec.build()


def ragged_batch(**extra) -> dict:
    """Two rows of 6 and 4 tokens; loss on columns 2, 3, 5 and 2, 3."""
    return {
        "token_ids": torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0]]),
        "position_ids": torch.arange(6).expand(2, 6),
        "loss_mask": torch.tensor([[0, 0, 1, 1, 0, 1], [0, 0, 1, 1, 0, 0]]).bool(),
        **extra,
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_sampling_distribution(tmp_path, family) -> None:
    source = save_tiny_model(tmp_path, family, tied=family != "llama")
    batch = ragged_batch(temperature=0.7)
    out = build(source).forward_train(batch)
    model = AutoModelForCausalLM.from_pretrained(source)
    for row, length in ((0, 6), (1, 4)):
        ids = batch["token_ids"][row : row + 1, :length]
        table = (model(ids).logits[0] / 0.7).log_softmax(-1)
        for column in range(1, length):
            if batch["loss_mask"][row, column]:
                before = table[column - 1]
                torch.testing.assert_close(
                    out["logprobs"][row, column], before[ids[0, column]]
                )
                torch.testing.assert_close(
                    out["entropies"][row, column], -(before.exp() * before).sum()
                )
    assert (out["logprobs"][~batch["loss_mask"]] == 0).all()


def test_models_that_cap_their_logits_are_scored_with_the_cap(tmp_path) -> None:
    from transformers import Gemma2Config

    config = Gemma2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.5,
        initializer_range=1.0,
        pad_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    module = build(str(tmp_path))
    assert not module.scorer.head_is_plain
    batch = ragged_batch()
    table = module.model(batch["token_ids"]).logits.log_softmax(-1)
    logprobs = module.forward_train(batch)["logprobs"]
    torch.testing.assert_close(logprobs[0, 2], table[0, 1, 3])


def test_only_the_context_of_loss_tokens_gets_a_gradient(tmp_path) -> None:
    module = build(save_tiny_model(tmp_path, tied=False))
    module.forward_train(ragged_batch())["logprobs"].sum().backward()
    gradient = module.model.get_input_embeddings().weight.grad
    # Row 0 reads tokens 1..5 before its last target, row 1 reads 7..9. Token 6 is only
    # a target, 10 too; 0 is padding.
    assert gradient.abs().sum(-1).nonzero().flatten().tolist() == [
        1,
        2,
        3,
        4,
        5,
        7,
        8,
        9,
    ]


def test_scores_in_pieces_equal_scores_at_once(monkeypatch) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 4, requires_grad=True)
    head = torch.nn.Linear(4, 11)
    targets = torch.arange(7)
    settings = {"vocab_size": 11, "temperature": 1.3, "entropy": "gradient"}
    gradients = []
    for limit in (2**27, 22):
        monkeypatch.setattr("rllib_arpo.learner.scoring.MAX_LOGITS", limit)
        logprobs, entropies = score_targets(hidden, targets, head, **settings)
        gradients.append(torch.autograd.grad((logprobs * entropies).sum(), hidden)[0])
    torch.testing.assert_close(*gradients)


def test_entropy_carries_a_gradient_only_when_asked(tmp_path) -> None:
    module = build(save_tiny_model(tmp_path))
    assert "entropies" not in module.forward_train(ragged_batch(entropy="none"))
    for mode, wanted in (("value", False), ("gradient", True)):
        out = module.forward_train(ragged_batch(entropy=mode))
        assert out["entropies"].requires_grad == wanted


def tree_batch(**extra) -> dict:
    """One row: two tokens, then two branches of two; all but the first have loss."""
    return {
        "token_ids": torch.tensor([[1, 2, 3, 4, 5, 6]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 2, 3]]),
        "predictors": torch.tensor([[-1, 0, 1, 2, 1, 4]]),
        "subtree_ends": torch.tensor([[6, 6, 4, 4, 6, 6]]),
        "loss_mask": torch.tensor([[0, 1, 1, 1, 1, 1]]).bool(),
        **extra,
    }


@pytest.mark.parametrize("batch", [ragged_batch(), tree_batch()])
def test_checkpointing_keeps_less_and_computes_layers_twice(tmp_path, batch) -> None:
    source = save_tiny_model(tmp_path, num_layers=6)
    gradients, kept, passes = [], [], []
    for checkpointing in (False, True):
        module = build(source, gradient_checkpointing=checkpointing)
        calls: list[int] = []
        layers = module.model.model.layers
        layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes=sizes) -> torch.Tensor:
            sizes.append(0 if tensor.is_leaf else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = module.forward_train(batch)["logprobs"].sum()
        kept.append(sum(sizes))
        loss.backward()
        passes.append(len(calls))
        gradients.append(layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*gradients)
    assert passes == [1, 2]
    assert kept[1] < kept[0] / 5


def test_the_reference_stays_at_the_first_weights(tmp_path) -> None:
    source = save_tiny_model(tmp_path)
    module = build(source, reference=True)
    first = module.forward_train(ragged_batch())
    torch.testing.assert_close(first["ref_logprobs"], first["logprobs"].detach())
    moved = {name: array * 1.5 for name, array in module.get_state().items()}
    module.set_state(moved)
    second = module.forward_train(ragged_batch())
    assert torch.equal(second["ref_logprobs"], first["ref_logprobs"])
    assert not torch.equal(second["logprobs"], first["logprobs"])
    assert build(source, reference=True, inference_only=True).reference is None


@pytest.mark.parametrize("family", FAMILIES)
def test_state_has_hugging_face_names_and_tied_weights_once(tmp_path, family) -> None:
    module = build(save_tiny_model(tmp_path, family))
    state = module.get_state()
    assert "model.embed_tokens.weight" in state and "lm_head.weight" not in state
    assert sum(array.size for array in state.values()) == sum(
        p.numel() for p in module.model.parameters()
    )


def test_state_does_not_change_with_later_training(tmp_path) -> None:
    module = build(save_tiny_model(tmp_path))
    state = module.get_state()
    before = state["model.norm.weight"].copy()
    with torch.no_grad():
        module.model.model.norm.weight.add_(1)
    np.testing.assert_array_equal(state["model.norm.weight"], before)


def test_bfloat16_keeps_float32_weights_and_ships_bfloat16(tmp_path) -> None:
    source = save_tiny_model(tmp_path)
    module = build(source, dtype="bfloat16")
    assert {array.dtype for array in module.get_state().values()} == {
        np.dtype(np.float32)
    }
    shipped = module.get_state(inference_only=True)
    assert {array.dtype for array in shipped.values()} == {np.dtype(ml_dtypes.bfloat16)}
    runner = build(source, dtype="bfloat16", inference_only=True)
    for array in shipped.values():
        array.flags.writeable = False  # as from Ray's object store
    runner.set_state(shipped)
    for name, array in runner.get_state().items():
        assert array.tobytes() == shipped[name].tobytes()


def test_bfloat16_scores_are_near_those_of_float32(tmp_path) -> None:
    source = save_tiny_model(tmp_path)
    exact = build(source).forward_train(ragged_batch())["logprobs"]
    rounded = build(source, dtype="bfloat16").forward_train(ragged_batch())["logprobs"]
    torch.testing.assert_close(exact, rounded, atol=0.1, rtol=0.05)
    assert not torch.equal(exact, rounded)


def test_arrays_of_every_dtype_come_back_as_they_were() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
        tensor = torch.tensor([[1, -2, 3]]).to(dtype)
        back = to_tensor(to_numpy(tensor))
        assert back.dtype == dtype and torch.equal(back, tensor)


def test_a_state_that_does_not_fit_changes_nothing(tmp_path) -> None:
    module = build(save_tiny_model(tmp_path))
    before = module.get_state()
    state = {name: array + 1 for name, array in before.items()}
    lacking = {k: v for k, v in state.items() if k != "model.norm.weight"}
    with pytest.raises(ConfigError, match=r"missing \['model.norm.weight'\]"):
        module.set_state(lacking)
    with pytest.raises(ConfigError, match=r"unexpected \['extra'\]"):
        module.set_state({**state, "extra": np.zeros(1)})
    with pytest.raises(ConfigError, match=r"model.norm.weight has shape \(3,\)"):
        module.set_state({**state, "model.norm.weight": np.zeros(3)})
    for name, array in module.get_state().items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_folder_loads_as_any_hugging_face_model(tmp_path, dtype) -> None:
    source = tmp_path / "source"
    save_tiny_model(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    module = build(str(source), dtype=dtype)
    module.set_state({k: v * 2 for k, v in module.get_state().items()})
    folder = tmp_path / "saved"
    module.save_pretrained(folder)
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert (folder / "chat_template.jinja").read_text() == "{{ messages }}"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    expected = module.model.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name].to(tensor.dtype))


def test_training_has_no_dropout(tmp_path) -> None:
    model = tiny_model("llama")
    model.config.attention_dropout = 0.5
    model.save_pretrained(tmp_path)
    module = build(str(tmp_path))
    one, two = (module.forward_train(ragged_batch())["logprobs"] for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("break_folder", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot load model"),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "x"}'),
            "cannot load model",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot load model"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b"junk"),
            "cannot load model",
        ),
        (
            lambda folder: (
                tiny_model(num_layers=1).save_pretrained(folder)
                or (folder / "config.json").write_text(
                    (folder / "config.json")
                    .read_text()
                    .replace('"num_hidden_layers": 1', '"num_hidden_layers": 2')
                )
            ),
            "cannot load model",
        ),
    ],
)
def test_a_wrong_folder_gets_one_clear_line(tmp_path, break_folder, message) -> None:
    source = save_tiny_model(tmp_path)
    break_folder(tmp_path)
    with pytest.raises(ConfigError, match=message) as caught:
        build(source)
    assert source in str(caught.value) and "\n" not in str(caught.value)


def test_wrong_settings_get_one_clear_line(tmp_path) -> None:
    with pytest.raises(ConfigError, match="is missing"):
        build("")
    with pytest.raises(ConfigError, match="'float8'"):
        build(save_tiny_model(tmp_path), dtype="float8")
