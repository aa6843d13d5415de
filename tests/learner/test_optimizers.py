"""Who owns which parameter, and the learning rate of each step."""

import pytest
import torch

from rllib_arpo.errors import ConfigError
from rllib_arpo.learner.optimizers import build_optimizers, learning_rate_factor
from tests.models import tiny_model


def build(optimizer: str, **model):
    settings = {"lr": 0.1, "muon_lr": 0.2, "weight_decay": 0.3}
    model = tiny_model(**model)
    built = build_optimizers(
        model, optimizer=optimizer, adam_betas=(0.9, 0.95), **settings
    )
    names = {id(p): name for name, p in model.named_parameters()}
    return built, {b.name: {names[id(p)] for p in b.parameters} for b in built}


def test_muon_takes_the_matrices_inside_the_layers() -> None:
    built, owners = build("muon", tied=False, num_layers=1)
    assert {name.rsplit(".", 2)[1] for name in owners["muon"]} == {
        *["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    }
    assert all(name.endswith("weight") for name in owners["muon"])
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= owners["adamw"]
    assert [b.peak_lr for b in built] == [0.1, 0.2]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_has_one_owner(optimizer: str) -> None:
    built, _ = build(optimizer)
    owned = [id(p) for b in built for p in b.parameters]
    assert len(owned) == len(set(owned)) == len(list(tiny_model().parameters()))


def test_norms_and_biases_do_not_decay() -> None:
    built, _ = build("adamw")
    for group in built[0].optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.ndim >= 2 else 0.0)


def test_one_muon_step_moves_a_matrix_as_far_as_adamw_would() -> None:
    # The orthogonalised step has singular values near 1, so the root mean square of a
    # square n x n step is near 1/sqrt(n); times 0.2 sqrt(n) that is near 0.2 (lr 1).
    torch.manual_seed(0)
    model = tiny_model()
    (muon,) = (
        b
        for b in build_optimizers(
            model,
            optimizer="muon",
            lr=1.0,
            muon_lr=1.0,
            weight_decay=0.0,
            adam_betas=(0.9, 0.95),
        )
        if b.name == "muon"
    )
    matrix = model.model.layers[0].self_attn.q_proj.weight
    before = matrix.detach().clone()
    matrix.grad = torch.randn_like(matrix)
    muon.optimizer.step()
    rms = (matrix.detach() - before).square().mean().sqrt().item()
    assert rms == pytest.approx(0.2, rel=0.25)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        # two warm-up steps, then p = 0, 1/4, 2/4, 3/4, 1, 1
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        # (1 + cos πp) / 2: cos of 0, 45, 90, 135, 180 degrees
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447, 0, 0]),
    ],
)
def test_learning_rate_warms_up_and_decays(schedule: str, factors: list) -> None:
    got = [
        learning_rate_factor(step, schedule=schedule, warmup_steps=2, total_steps=6)
        for step in range(8)
    ]
    assert got == pytest.approx(factors, abs=1e-6)


def test_a_decay_needs_its_length() -> None:
    with pytest.raises(ConfigError, match="lr_total_steps"):
        learning_rate_factor(0, schedule="cosine", warmup_steps=0, total_steps=None)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="'sgd': expected 'adamw' or 'muon'"):
        build("sgd")
    with pytest.raises(ConfigError, match="'step'"):
        learning_rate_factor(0, schedule="step", warmup_steps=0, total_steps=None)
