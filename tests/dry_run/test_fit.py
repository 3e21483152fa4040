"""`--gpu_memory`: what makes a run fit."""

import pytest
import torch

import sd3
from dmdr.dry_run.estimate import NETWORK, Estimate, estimate
from dmdr.dry_run.fit import SPARE, fitted, switches
from dmdr.errors import ConfigError
from dmdr.run.pace import GIB
from dmdr.settings.parse import Settings, parse


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng():
        sd3.build(folder / "sd3")
    (folder / "prompts.txt").write_text("a handwritten seven\n")
    made = ["--model", str(folder / "sd3"), "--prompts", str(folder / "prompts.txt"), "--dry_run", "--reward", "toy"]
    small = "--rl refl --per_device_train_batch_size 4 --max_sequence_length 5 --mixed_precision bf16 --stage1_steps 0"
    return [*made, *small.split()]


def simulated(flags: list[str]) -> tuple[Settings, Estimate]:
    settings = parse(flags)
    return settings, estimate(settings)


def test_what_fits_is_said_and_nothing_is_tried(given: list[str]) -> None:
    settings, found = simulated([*given, "--gpu_memory", "24"])
    assert str(fitted(found, settings, lambda flags: pytest.fail("tried"))).startswith("fits in 24 GiB, of which 10%")


def test_switches_are_added_until_the_run_fits_and_those_that_do_not_help_are_left_out(given: list[str]) -> None:
    """As estimates say of the command line with them: followed here with networks of known size."""
    settings, found = simulated([*given, "--gpu_memory", "1"])
    assert [switch[0] for switch in switches(settings)] == [
        "--gradient_checkpointing", "--decode_chunk_size", "--optim", "--per_device_train_batch_size", "--vae_tiling",
        "--quantize", "--quantize",
    ]  # fmt: skip
    needs = {"--gradient_checkpointing": 2.0, "--optim": 0.5, "--quantize": 0.9}
    tried: list[list[str]] = []

    def again(flags: list[str]) -> Estimate:
        tried.append(list(flags))
        size = 4.0 - sum(saved for flag, saved in needs.items() if flag in flags)
        return sized(found, size)

    said = str(fitted(sized(found, 4.0), settings, again))
    assert said.endswith(
        "with these it takes 0.6 GiB:\n  --gradient_checkpointing true --optim adamw_bnb_8bit --quantize int8"
    )
    assert all("--decode_chunk_size" not in flags for flags in tried[2:])
    assert "--quantize int8 --quantize nf4" not in str(fitted(sized(found, 5.0), settings, again))
    needs.clear()
    said = str(fitted(sized(found, 4.0), settings, again))
    assert said.startswith("does not fit in 1 GiB") and said.endswith("several GPUs can share the network: --shard all")


def sized(like: Estimate, gib: float) -> Estimate:
    return Estimate(like.overview, like.what, {}, {"stage 2": {NETWORK: round(gib * GIB)}}, 1, 0)


@pytest.mark.parametrize("flags", [["--gradient_checkpointing", "true"], ["--quantize", "int8"]])
def test_a_switch_saves_what_the_estimate_says(given: list[str], flags: list[str]) -> None:
    plain, other = (simulated([*given, "--per_device_train_batch_size", "64", *more])[1] for more in ([], flags))
    assert sum(other.phases["stage 2"].values()) < sum(plain.phases["stage 2"].values())
    assert other.parameters[NETWORK] == plain.parameters[NETWORK]
    if "--quantize" in flags:  # one byte a number in the blocks, and their scales
        assert other.backbone < 0.75 * plain.backbone


def test_spare_memory_counts(given: list[str]) -> None:
    settings, found = simulated([*given, "--gpu_memory", "1"])
    assert str(fitted(sized(found, 0.99 - SPARE), settings, lambda flags: sized(found, 1))).startswith("fits")
    assert str(fitted(sized(found, 1.01 - SPARE), settings, lambda flags: sized(found, 1))).startswith("does not fit")


@pytest.mark.parametrize(("value", "said"), [("0", "--gpu_memory must be above 0, not 0.0"), ("many", "--gpu_memory")])
def test_a_bad_size_is_refused(given: list[str], value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse([*given, "--gpu_memory", value])


def test_only_a_dry_run_reads_it() -> None:
    with pytest.raises(ConfigError, match="--gpu_memory is not read without --dry_run"):
        parse(["--model", "toy", "--gpu_memory", "24"])
