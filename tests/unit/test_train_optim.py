"""Muon's direction, what it may take, and its agreement over ways to cut matrices."""

import pytest
import torch
from torch import Tensor, nn

import train.optim as optim
from attnzoo.models import DecoderConfig, DecoderLM
from train.config import OptimConfig
from train.optim import MatrixAdamW, MatrixSlot, ShardLayout, build_optimizer, orthogonalize, param_groups, set_rate


def model(attention: str = "rcmha", tie: bool = True) -> DecoderLM:
    torch.manual_seed(0)
    config = {"vocab_size": 31, "model_dim": 12, "num_layers": 2, "attention": {"kind": attention, "num_heads": 2}}
    return DecoderLM(DecoderConfig.from_dict({**config, "tie_embeddings": tie}))


@pytest.mark.parametrize("shape", [(16, 16), (7, 23), (23, 7)])
def test_orthogonalize_moves_singular_values_to_one_and_keeps_vectors(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.2, 1.0, min(shape))
    moved = orthogonalize(u @ torch.diag(values) @ vt, 5)
    diagonal = u.T @ moved @ vt.T
    assert torch.linalg.svdvals(moved).min() > 0.6
    assert torch.linalg.svdvals(moved).max() < 1.3
    torch.testing.assert_close(diagonal, torch.diag(diagonal.diagonal()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("attention", ["mha", "rmha", "mdha", "rcmha", "linear"])
@pytest.mark.parametrize("tie", [True, False])
def test_muon_takes_linear_maps_of_blocks_only(attention: str, tie: bool) -> None:
    lm = model(attention, tie)
    names = {id(p): n for n, p in lm.named_parameters()}
    groups = {g["name"]: {names[id(p)] for p in g["params"]} for g in param_groups(lm, OptimConfig(name="muon"))}
    linear = {f"{n}.weight" for n, m in lm.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")}
    assert groups["matrices"] == linear
    assert ("head" in groups) == (not tie)
    assert set().union(*groups.values()) == set(names.values())
    assert sum(map(len, groups.values())) == len(names)
    for group in param_groups(lm, OptimConfig(name="muon")):
        assert group["orthogonal"] == (group["name"] == "matrices")
        assert (group["weight_decay"] == 0) == (group["name"] == "rest")


@pytest.mark.parametrize("frozen", ["", "blocks.", "head.", "embedding.", "norm.", "blocks.0", "head.|norm."])
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tie", [True, False])
def test_frozen_parameters_are_in_no_group(frozen: str, name: str, tie: bool) -> None:
    lm = model("rcmha", tie)
    for key, parameter in lm.named_parameters():
        parameter.requires_grad_(not (frozen and key.startswith(tuple(frozen.split("|")))))
    groups = param_groups(lm, OptimConfig(name=name))
    assert all(group["params"] for group in groups)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(p) for p in lm.parameters() if p.requires_grad)


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        param_groups(model().requires_grad_(False), OptimConfig())


def test_convolution_kernels_and_tables_are_in_the_rest() -> None:
    lm = model("rcmha")
    rest = {id(p) for g in param_groups(lm, OptimConfig(name="muon")) if g["name"] == "rest" for p in g["params"]}
    special = [n for n, p in lm.named_parameters() if "conv" in n or "table" in n or "position" in n]
    assert special
    assert {id(lm.get_parameter(name)) for name in special} <= rest


def test_adamw_groups_equal_torch() -> None:
    lm, reference = model(), model()
    mine = build_optimizer(lm, OptimConfig(name="adamw", weight_decay=0.0))
    theirs = torch.optim.AdamW(reference.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    tokens = torch.arange(24).view(2, 12)
    for step in range(3):
        set_rate(mine, (step + 1) / 3)
        theirs.param_groups[0]["lr"] = 3e-3 * (step + 1) / 3
        for module, optimizer in ((lm, mine), (reference, theirs)):
            optimizer.zero_grad()
            module.loss(tokens, tokens).backward()
            optimizer.step()
    for left, right in zip(lm.parameters(), reference.parameters(), strict=True):
        assert torch.equal(left, right)


def test_muon_by_hand() -> None:
    weight = nn.Parameter(torch.ones(6, 3))
    group = {"params": [weight], "orthogonal": True, "momentum": 0.9, "newton_schulz_steps": 5, "weight_decay": 0.1}
    optimizer = MatrixAdamW([group], lr=0.5)
    weight.grad = gradient = torch.linspace(-1, 1, 18).view(6, 3) ** 3
    optimizer.step()
    nesterov = 0.1 * gradient + 0.9 * 0.1 * gradient
    expected = torch.ones(6, 3) * (1 - 0.05) - 0.5 * 2**0.5 * orthogonalize(nesterov, 5)
    torch.testing.assert_close(weight.data, expected)


def pieces_of(matrices: list[Tensor], world: int, cut_each: bool) -> tuple[list[Tensor], list[MatrixSlot]]:
    """Flat pieces as ZeRO 3 (each matrix cut) or ZeRO 1 and 2 (end to end, then cut) hands them out."""
    slots, offset = [], 0
    flat = [m.reshape(-1) for m in matrices]
    if not cut_each:
        for matrix in matrices:
            slots.append(MatrixSlot((matrix.shape[0], matrix.shape[1]), offset, matrix.numel()))
            offset += matrix.numel()
        joined = torch.cat([*flat, torch.zeros(-offset % world)])
        return list(joined.chunk(world)), slots
    cut = []
    for matrix, row in zip(matrices, flat, strict=True):
        padded = torch.cat([row, torch.zeros(-row.numel() % world)]).view(world, -1)
        slots.append(MatrixSlot((matrix.shape[0], matrix.shape[1]), offset, padded.shape[1]))
        offset += padded.shape[1]
        cut.append(padded)
    return list(torch.cat(cut, dim=1)), slots


@pytest.mark.parametrize("cut_each", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_cut_matrices_move_as_whole_ones(monkeypatch: pytest.MonkeyPatch, cut_each: bool, world: int) -> None:
    torch.manual_seed(2)
    matrices = [torch.randn(5, 7), torch.randn(3, 3), torch.randn(11, 2)]
    pieces, slots = pieces_of(matrices, world, cut_each)
    expected, _ = pieces_of([optim.direction(m, 5) for m in matrices], world, cut_each)
    monkeypatch.setattr(optim, "gather", lambda piece, group, world: torch.stack(pieces))
    for rank in range(world):
        layout = ShardLayout(tuple(slots), pieces[0].numel(), rank, world, None, cut_each)
        assert torch.equal(optim._sharded_direction(pieces[rank], layout, 5), expected[rank])
