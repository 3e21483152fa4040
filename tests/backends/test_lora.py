"""Roles as adapters of one network, on a tiny random SD3 transformer."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dmdr.backends.lora import LoRARoles, joined, parted
from dmdr.errors import ConfigError, TrainingError
from dmdr.protocols import Role
from dmdr_sd3 import LORA_TARGETS

ROLES: tuple[Role, ...] = ("student", "fake_score", "reference")
RANK: dict[Role, int] = {"student": 4, "fake_score": 2, "reference": 4}
ALPHA: dict[Role, float] = {"student": 8, "fake_score": 2.5, "reference": 8}
CASES: list[tuple[Role, float]] = [("student", 1.0), ("student", 0.5), ("fake_score", 1.0), ("fake_score", 0.5)]
FULL: list[tuple[Role, ...]] = [(), ("student",), ("fake_score",), ("student", "fake_score")]


def network(layers: int = 2) -> SD3Transformer2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SD3Transformer2DModel(
            sample_size=4,
            patch_size=1,
            in_channels=4,
            num_layers=layers,
            num_attention_heads=2,
            attention_head_dim=16,
            joint_attention_dim=8,
            caption_projection_dim=32,
            pooled_projection_dim=8,
            out_channels=4,
            pos_embed_max_size=4,
        )


def frozen() -> SD3Transformer2DModel:
    """Torch multiplies in another order where a weight may take gradients; the last bit then differs."""
    return network().requires_grad_(False).eval()


def make(net: nn.Module | None = None, **kwargs: Any) -> LoRARoles:
    settings: dict[str, Any] = {"roles": ROLES, "rank": RANK, "alpha": ALPHA, "target_modules": LORA_TARGETS}
    return LoRARoles(net or network(), **{**settings, **kwargs})


def trained(checkpointing: bool = False, **kwargs: Any) -> LoRARoles:
    """Roles whose adapters all differ from zero and from each other."""
    roles = make(**kwargs)
    for number, role in enumerate(roles.roles):
        generator = torch.Generator().manual_seed(number)
        for parameter in roles.parameters(role).values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    if checkpointing:
        for net in roles.networks:
            net.enable_gradient_checkpointing(roles.checkpoint_function())  # type: ignore[operator]
    return roles


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(9)
    return {
        "hidden_states": torch.randn(2, 4, 4, 4, generator=generator),
        "timestep": torch.tensor([300.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 3, 8, generator=generator),
        "pooled_projections": torch.randn(2, 8, generator=generator),
        "return_dict": False,
    }


def run(roles: LoRARoles, role: Role | None, share: float = 1.0) -> Tensor:
    return roles(role, share=share, **inputs())[0]


def gradients(roles: LoRARoles, role: Role) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in roles.parameters(role).items()}
    # Nobody reads the text stream of the last block: its queries have no gradient to take.
    return {name: grad for name, grad in found.items() if "blocks.1.attn.add_q_proj" not in name}  # type: ignore[misc]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, name
        assert (found[name] - value).norm() <= tolerance * value.norm(), name


# --- Roles ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_without_its_adapter_every_role_is_the_bare_network() -> None:
    expected = frozen()(**inputs())[0]
    roles = trained()
    assert torch.equal(run(roles, None), expected)
    for role in ROLES:
        assert torch.equal(run(roles, role, share=0.0), expected)
        assert not torch.allclose(run(roles, role), expected, atol=1e-3)
    assert torch.equal(run(roles, None), expected)


@torch.no_grad()
def test_every_role_starts_as_the_bare_network() -> None:
    expected = frozen()(**inputs())[0]
    roles = make()
    assert all(torch.equal(run(roles, role), expected) for role in ROLES)


@torch.no_grad()
@pytest.mark.parametrize(("role", "share"), [*CASES, ("reference", 1.0), ("fake_score", 2.0)])
def test_share_scales_alpha_over_rank_times_the_adapter(role: Role, share: float) -> None:
    roles, merged = trained(), network().eval()
    parameters = roles.parameters(role)
    for name in {name.rpartition(".lora_")[0] for name in parameters}:
        a, b = (parameters[f"{name}.lora_{part}.weight"] for part in "AB")
        merged.get_submodule(name).weight += share * ALPHA[role] / RANK[role] * b @ a
    torch.testing.assert_close(run(roles, role, share), merged(**inputs())[0], rtol=0, atol=2e-5)


@torch.no_grad()
def test_a_share_does_not_outlive_its_call() -> None:
    roles = trained()
    expected = {role: run(roles, role) for role in ROLES}
    for role in ROLES:
        run(roles, role, share=0.5)
    assert all(torch.equal(run(roles, role), expected[role]) for role in ROLES)


@torch.no_grad()
def test_a_call_that_fails_leaves_the_network_as_it_was() -> None:
    roles = trained()
    expected = run(roles, None), run(roles, "student")
    with pytest.raises(TypeError):
        roles("student", share=0.5, nonsense=1)
    assert torch.equal(run(roles, None), expected[0])
    assert torch.equal(run(roles, "student"), expected[1])


def test_parameters_are_named_by_module_and_trained_in_float32() -> None:
    roles = make(network().to(torch.bfloat16), roles=("student", "fake_score"))
    names = list(roles.parameters("student"))
    assert names == list(roles.parameters("fake_score"))
    assert names[:2] == [f"transformer_blocks.0.attn.to_q.lora_{part}.weight" for part in "AB"]
    assert len(names) == 2 * (8 + 7)  # the last block has no text output
    for role in ("student", "fake_score"):
        for name, parameter in roles.parameters(role).items():
            assert parameter.dtype == torch.float32
            assert RANK[role] == parameter.shape[1 if "lora_B" in name else 0]
    assert roles.parameters("reference") == {}
    assert {p.dtype for name, p in roles.network.named_parameters() if "lora" not in name} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        given = {k: v.bfloat16() if k.endswith("states") else v for k, v in inputs().items()}
        roles("student", **given)[0].float().sum().backward()
    assert all(grad.dtype == torch.float32 for grad in gradients(roles, "student").values())


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("role", "share"), CASES)
def test_gradients_reach_the_role_that_ran_and_no_other(role: Role, share: float, checkpointing: bool) -> None:
    roles = trained(checkpointing)
    run(roles, role, share).square().sum().backward()
    own = {id(p) for p in roles.parameters(role).values()}
    assert all(grad.norm() > 0 for grad in gradients(roles, role).values())
    assert all(p.grad is None for p in roles.network.parameters() if id(p) not in own)


@pytest.mark.parametrize(("role", "share"), CASES)
@pytest.mark.parametrize("between", [None, "student", "fake_score", "reference"])
def test_checkpointing_changes_no_gradient_whoever_ran_in_between(
    role: Role, share: float, between: Role | None
) -> None:
    plain, checkpointed = trained(), trained(checkpointing=True)
    run(plain, role, share).square().sum().backward()
    loss = run(checkpointed, role, share).square().sum()
    with torch.no_grad():
        run(checkpointed, between, 0.25)
    run(checkpointed, between, 0.25)  # with a graph of its own
    loss.backward()
    assert_same(gradients(checkpointed, role), gradients(plain, role))
    assert torch.equal(run(checkpointed, None), run(plain, None))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_forwards_before_two_backwards(checkpointing: bool) -> None:
    apart, together = trained(), trained(checkpointing)
    run(apart, "student").square().sum().backward()
    run(apart, "fake_score", 0.5).square().sum().backward()
    losses = run(together, "student").square().sum(), run(together, "fake_score", 0.5).square().sum()
    for loss in losses:
        loss.backward()
    for role in ("student", "fake_score"):
        assert_same(gradients(together, role), gradients(apart, role))


def test_the_stock_checkpoint_function_would_recompute_another_role() -> None:
    roles = trained()
    roles.network.enable_gradient_checkpointing()  # type: ignore[operator]
    loss = run(roles, "student").square().sum()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


@pytest.mark.parametrize("full", FULL)
def test_no_switch_changes_what_is_trained(full: tuple[Role, ...]) -> None:
    roles = trained(checkpointing=True, full=full)

    def trains() -> list[dict[str, bool]]:
        return [{name: p.requires_grad for name, p in net.named_parameters()} for net in roles.networks]

    before = trains()
    for role, share in [*CASES, (None, 1.0), ("reference", 1.0)]:
        output = run(roles, role, 1.0 if role in full else share)
        assert trains() == before
        if output.requires_grad:
            output.sum().backward()
            assert trains() == before
    roles.snapshot()
    assert trains() == before
    assert all(p.requires_grad for role in ("student", "fake_score") for p in roles.parameters(role).values())
    assert not any(p.requires_grad for p in roles.parameters("reference").values())
    assert not any(p.requires_grad for name, p in roles.network.named_parameters() if "lora" not in name)


@pytest.mark.parametrize("roles", [("student",), ("student", "fake_score"), ROLES])
def test_the_network_is_frozen_and_drops_nothing_out(roles: tuple[Role, ...]) -> None:
    for full in FULL:
        made = make(network().train(), full=full, roles=roles)
        assert not any(p.requires_grad for name, p in made.network.named_parameters() if "lora" not in name)
        dropouts = [m for net in made.networks for m in net.modules() if isinstance(m, nn.Dropout)]
        assert dropouts and not any(dropout.training for dropout in dropouts)


def test_training_a_role_leaves_the_others_bit_by_bit() -> None:
    roles = trained()
    with torch.no_grad():
        before = {role: run(roles, role) for role in (None, *ROLES)}
    optimizer = torch.optim.AdamW(roles.parameters("student").values(), lr=0.01)
    for _ in range(3):
        run(roles, "student").square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for role in (None, "fake_score", "reference"):
            assert torch.equal(run(roles, role), before[role])
        assert not torch.allclose(run(roles, "student"), before["student"], atol=1e-2)


# --- Memory and random numbers ----------------------------------------------------------------------------------------


def size(nets: list[nn.Module]) -> int:
    """Bytes of parameters and buffers, each storage counted once."""
    tensors = [t for net in nets for t in (*net.parameters(), *net.buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def test_three_roles_share_one_network() -> None:
    bare = size([network()])
    roles = make()
    adapters = sum(p.numel() * 4 for role in ROLES for p in roles.parameters(role).values())
    assert 0 < adapters < bare
    assert len(roles.networks) == 1
    assert bare + adapters <= size(roles.networks) <= 1.15 * (bare + adapters)


@pytest.mark.parametrize("full", FULL)
def test_a_full_role_costs_one_copy(full: tuple[Role, ...]) -> None:
    bare = size([network()])
    roles = make(full=full, roles=("student", "fake_score"))
    adapters = sum(
        p.numel() * 4 for role in {"student", "fake_score"} - {*full} for p in roles.parameters(role).values()
    )
    whole = (1 + len(full)) * bare + adapters
    assert whole <= size(roles.networks) <= (1.05 if full else 1.15) * whole


def test_creating_roles_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    net = network()
    made = [make(deepcopy(net), seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    first, again, other = (flat(roles) for roles in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def flat(roles: LoRARoles, role: Role = "student") -> Tensor:
    return torch.cat([p.detach().flatten() for p in roles.parameters(role).values()])


# --- Full copies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("role", "full"), [(role, full) for full in FULL for role in full])
def test_a_full_role_is_a_copy_of_its_own(role: Role, full: tuple[Role, ...]) -> None:
    """Training it changes nothing else by a bit."""
    roles = make(full=full)
    assert list(roles.parameters(role)) == [name for name, _ in network().named_parameters()]
    assert all(
        ("lora" in name) == (other not in full)
        for other in ("student", "fake_score")
        for name in roles.parameters(other)
    )
    with torch.no_grad():
        teacher = run(roles, None)
        torch.testing.assert_close(run(roles, role), teacher, rtol=0, atol=1e-6)
        before = {other: run(roles, other) for other in (None, *ROLES)}
    weights = {name: tensor.clone() for name, tensor in roles.network.state_dict().items()}
    loss = run(roles, role).square().sum()
    loss.backward()
    assert all(p.grad is None for net in roles.networks if net is not roles.copies[role] for p in net.parameters())
    with torch.no_grad():
        for parameter in roles.parameters(role).values():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
        for other, answer in before.items():
            found = run(roles, other)
            assert not torch.allclose(found, answer, atol=1e-3) if other == role else torch.equal(found, answer)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in roles.network.state_dict().items())


@pytest.mark.parametrize(("role", "full"), [(role, full) for full in FULL for role in full])
def test_checkpointing_changes_no_gradient_of_a_full_role(role: Role, full: tuple[Role, ...]) -> None:
    plain, checkpointed = (trained(value, full=full) for value in (False, True))
    for roles in (plain, checkpointed):
        loss = run(roles, role).square().sum()
        run(roles, "fake_score" if role == "student" else "student")
        loss.backward()
    for name, parameter in plain.parameters(role).items():
        other = checkpointed.parameters(role)[name]
        assert (parameter.grad is None) == (other.grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-5, atol=1e-6)


def test_a_full_role_has_no_shares() -> None:
    """Which DynaDG would mix into the teacher: published of an adapter alone."""
    with pytest.raises(TrainingError, match="the fake_score is a full network, and no adapter that could be scaled by"):
        run(make(full=("fake_score",)), "fake_score", 0.5)


@pytest.mark.parametrize("full", FULL)
def test_snapshot_makes_the_reference_the_student(full: tuple[Role, ...]) -> None:
    roles = trained(full=full)
    with torch.no_grad():
        assert not torch.allclose(run(roles, "reference"), run(roles, "student"), atol=1e-2)
        roles.snapshot()
        reference = run(roles, "reference")
        assert torch.equal(flat(roles, "reference"), flat(roles, "student"))
        torch.testing.assert_close(reference, run(roles, "student"), rtol=0, atol=2e-6)
        for parameter in roles.parameters("student").values():
            parameter += 0.1
        assert torch.equal(run(roles, "reference"), reference)


@pytest.mark.parametrize("role", ["student", "fake_score"])
def test_answers_with_and_without_a_graph_are_the_same(role: Role) -> None:
    """The rollout's answer stands in for that of the student's pass with gradients."""
    roles = trained()
    with torch.no_grad():
        expected = run(roles, role)
    assert torch.equal(run(roles, role), expected)


# --- Files ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_folded_acts_in_full_at_strength_one_and_comes_back() -> None:
    roles, merged = trained(), network().eval()
    folded = roles.folded("fake_score")
    for name in {name.rpartition(".lora_")[0] for name in folded}:
        merged.get_submodule(name).weight += folded[f"{name}.lora_B.weight"] @ folded[f"{name}.lora_A.weight"]
    torch.testing.assert_close(run(roles, "fake_score"), merged(**inputs())[0], rtol=0, atol=2e-5)
    other = make(seed=5)
    other.unfold("fake_score", folded, "file")
    torch.testing.assert_close(flat(other, "fake_score"), flat(roles, "fake_score"), rtol=1e-6, atol=0)
    assert all(not tensor.requires_grad and tensor.is_contiguous() for tensor in folded.values())
    folded["transformer_blocks.0.attn.to_q.lora_A.weight"].zero_()
    assert roles.parameters("fake_score")["transformer_blocks.0.attn.to_q.lora_A.weight"].any()


def refused(roles: LoRARoles, tensors: dict[str, Tensor]) -> str:
    before = flat(roles)
    with pytest.raises(ConfigError) as error:
        roles.unfold("student", tensors, "the file")
    assert torch.equal(flat(roles), before)
    assert str(error.value).startswith("the file")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_file_with_other_names_is_refused() -> None:
    roles = make()
    folded = roles.folded("student")
    lost = "transformer_blocks.1.attn.to_k.lora_A.weight"
    message = refused(roles, {name: tensor for name, tensor in folded.items() if name != lost})
    assert "missing" in message
    assert lost in message
    message = refused(roles, {**folded, "text_encoder.q.lora_A.weight": torch.zeros(1)})
    assert "unexpected" in message
    assert "text_encoder.q.lora_A.weight" in message


def test_file_of_another_rank_is_refused() -> None:
    other = make(rank={**RANK, "student": 3})
    message = refused(make(), other.folded("student"))
    assert "to_q.lora_A.weight" in message or "add_q_proj.lora_A.weight" in message
    assert "(3, 32)" in message
    assert "(4, 32)" in message


def test_unknown_target_modules_are_refused() -> None:
    with pytest.raises(ConfigError, match="--lora_target_modules nothing like_this: ") as error:
        make(target_modules=["nothing", "like_this"])
    assert "\n" not in str(error.value)


def test_targets_may_be_chosen() -> None:
    roles = make(target_modules=["to_q"], roles=("student",))
    names = [f"transformer_blocks.{block}.attn.to_q.lora_{part}.weight" for block in (0, 1) for part in "AB"]
    assert list(roles.parameters("student")) == names


def test_two_adapters_in_one_come_apart_again() -> None:
    """The first is what is not the second, whatever rank is expected of it; without the second there is no first."""

    def adapter(rank: int, *modules: str) -> dict[str, Tensor]:
        shapes = {"A": (rank, 3), "B": (5, rank)}
        return {f"{m}.lora_{part}.weight": torch.randn(shape) for m in modules for part, shape in shapes.items()}

    first, second = adapter(4, "a", "b"), adapter(3, "b", "c")
    both = joined(first, second)
    for m, deltas in {"a": [first], "b": [first, second], "c": [second]}.items():
        expected = sum(d[f"{m}.lora_B.weight"] @ d[f"{m}.lora_A.weight"] for d in deltas)
        torch.testing.assert_close(both[f"{m}.lora_B.weight"] @ both[f"{m}.lora_A.weight"], expected)
    found = parted(both, second, first, "file")
    assert found.keys() == first.keys() and all(torch.equal(found[name], tensor) for name, tensor in first.items())
    for other in (adapter(3, "b", "c"), adapter(3, "b"), adapter(7, "b", "c")):
        with pytest.raises(ConfigError, match="file was not trained with the --teacher_lora of this run: give the one"):
            parted(both, other, first, "file")


def test_a_share_that_anneals_makes_no_new_graph() -> None:
    """Traced as for a GPU, which the backend "eager" is not; beyond 64 graphs a run would go on uncompiled."""
    network, ours = nn.Sequential(nn.Linear(8, 8)), {"rank": {"fake_score": 2}, "alpha": {"fake_score": 4.0}}
    roles = LoRARoles(network, roles=("fake_score",), target_modules=["0"], **ours)
    torch._dynamo.reset()
    counters.clear()
    network.compile(backend="aot_eager")
    graphs = []
    for share in (0.25, 0.24, 0.23, 0.22, 0.21):
        with torch.no_grad():
            roles("fake_score", torch.ones(2, 8), share=share)
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[4] == graphs[2] > 0
