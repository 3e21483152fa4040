"""DiNa-LRM on a small checkpoint of the published layout, against its formulas, which are written out here by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import dmdr
import sd3
from dmdr.backends.toy import Redness, ToyBackend
from dmdr.errors import ConfigError
from dmdr.protocols import LatentReward, with_options
from dmdr.rewards import Rewards
from dmdr.run.observer import OfImages
from dmdr.testing import check_reward
from dmdr.types import Condition
from dmdr_dina import DiNa
from dmdr_dina.head import Head
from dmdr_sd3 import SD3Backend

CPU, EXAMPLES = torch.device("cpu"), Path(__file__).parents[2] / "examples"
PROMPTS = ["a seven", "a photo of two cats on a mat", ""]
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
MODEL: dict[str, Any] = {
    "num_transformer_layers": 1,
    "visual_head_idx": [0, 1],
    "text_head_idx": [1],
    "freeze_backbone": False,
    "use_lora": True,
    "lora_config": {"r": 4, "lora_alpha": 8},
    "reward_head": {"width": 16, "num_queries": 3, "num_attn_heads": 2},
}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dina") / "backbone"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sd3.build(folder)
    return folder


def write(folder: Path, backbone: Path, **model: Any) -> Path:
    """A checkpoint as the authors save it: a LoRA by PEFT, and the head's state by torch."""
    settings = MODEL | {"backbone_model_id": str(backbone)} | model
    place = folder / "checkpoint"
    place.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": settings, "training": {"add_noise": True}}))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = SD3Transformer2DModel.from_pretrained(backbone / "transformer")
        network.transformer_blocks = network.transformer_blocks[:1]
        adapted = get_peft_model(network, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
        head = Head(32, 16, 2, 1, 3, 2, project=False)
        for parameter in (*adapted.parameters(), *head.parameters()):
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(place / "backbone_lora")
    torch.save(head.state_dict(), place / "rm_head.pt")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    return write(tmp_path_factory.mktemp("dina") / "checkpoint", backbone)


def prepared(folder: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> DiNa:
    reward = DiNa(str(folder), **settings)
    reward.prepare(CPU, dtype)
    return reward


@pytest.fixture(scope="module")
def family(backbone: Path) -> SD3Backend:
    backend = SD3Backend(str(backbone), with_options(SD3Backend.Options, max_sequence_length=128))
    backend.prepare(Accelerator(cpu=True), roles=("student",))
    return backend


def latents_of(family: SD3Backend, count: int = 3) -> Tensor:
    return torch.randn(count, *family.latent_shape, generator=torch.Generator().manual_seed(3))


def by_hand(folder: Path, backbone: Path, noisy: Tensor, cond: Condition, time: float) -> Tensor:
    """Raw scores, step by step, from the files."""
    network = SD3Transformer2DModel.from_pretrained(backbone / "transformer").requires_grad_(False)
    lora = load_file(folder / "checkpoint/backbone_lora/adapter_model.safetensors")
    for name, b in lora.items():
        if ".lora_B." in name:
            module = network.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_B.weight"))
            module.weight += 8 / 4 * b @ lora[name.replace("lora_B", "lora_A")]
    w = torch.load(folder / "checkpoint/rm_head.pt")
    times = torch.full((len(noisy),), time)
    image, text = network.pos_embed(noisy), network.context_embedder(cond.tensors["sequence"])
    temb = network.time_text_embed(times, cond.tensors["pooled"])
    layers = [image]
    text, image = network.transformer_blocks[0](image, text, temb)
    layers.append(image)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps) * w[f"{name}.weight"]

    def adapter(name: str, tokens: Tensor) -> Tensor:
        gamma, beta = linear(f"{name}.cond_mlp.2", F.silu(linear(f"{name}.cond_mlp.0", temb))).chunk(2, -1)
        x = linear(f"{name}.proj_in", tokens) * (1 + gamma[:, None]) + beta[:, None] + w[f"{name}.layer_embed"]
        return linear(f"{name}.proj", x)

    def attend(block: str, q: Tensor, tokens: Tensor, kind: str, gate: bool) -> Tensor:
        k, v = linear(f"{block}.to_k_{kind}", tokens), linear(f"{block}.to_v_{kind}", tokens)
        if gate:
            hidden = F.silu(linear(f"{block}.gate_{kind}.0", tokens))
            v = v * torch.sigmoid(linear(f"{block}.gate_{kind}.2", hidden))
        out = []
        for qh, kh, vh in zip(q.chunk(2, -1), k.chunk(2, -1), v.chunk(2, -1), strict=True):  # two heads
            out.append((qh @ kh.transpose(1, 2) / qh.shape[-1] ** 0.5).softmax(-1) @ vh)
        return torch.cat(out, -1)

    parts = [adapter(f"layer_adapters_visual.{i}", tokens) for i, tokens in enumerate(layers)]
    seen = linear("agg_visual", torch.cat(parts, -1))
    read = linear("agg_text", adapter("layer_adapters_text.0", text))
    x = w["query_tokens"].expand(len(noisy), -1, -1)
    q = linear("attn1.to_q", norm("attn1.norm_q", x))
    both = attend("attn1", q, norm("attn1.norm_v", seen), "vis", True)
    both = both + attend("attn1", q, norm("attn1.norm_t", read), "text", True)
    x = x + linear("attn1.to_out.0", both)
    q = linear("attn2.to_q", norm("attn2.norm_q", x))
    x = x + linear("attn2.to_out.0", attend("attn2", q, norm("attn2.norm_v", seen), "vis", False))
    x = x + linear("ff.2", F.gelu(linear("ff.0", norm("norm_ff", x))))
    return linear("head", x).mean(1)[:, 0]


def test_its_scores_are_those_of_its_formulas(folder: Path, backbone: Path, family: SD3Backend) -> None:
    reward, latents, cond = prepared(folder), latents_of(family), family.encode(PROMPTS)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(backbone, subfolder="scheduler")
    nearest = (scheduler.sigmas - 0.4).abs().argmin()
    sigma = scheduler.sigmas[nearest]
    assert abs(sigma - 0.4) < 1e-3
    noise = torch.randn(1, *family.latent_shape, generator=torch.Generator().manual_seed(0))
    raw = by_hand(folder, backbone, (1 - sigma) * latents + sigma * noise, cond, float(scheduler.timesteps[nearest]))
    scores = reward.score_latents(latents, cond)
    assert torch.allclose(scores, (raw + 10) / 10, rtol=0, atol=1e-6)
    assert (scores[:, None] - scores).abs().max() > 1e-3  # they differ


def test_its_gradient_is_that_of_finite_differences(folder: Path, family: SD3Backend) -> None:
    cond, latents = family.encode(PROMPTS), latents_of(family)
    along = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
    grads = []
    for recompute in (False, True):
        leaf = latents.clone().requires_grad_()
        prepared(folder, gradient_checkpointing=recompute).score_latents(leaf, cond).sum().backward()
        assert leaf.grad is not None
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    reward, step = prepared(folder), 0.02
    ahead, behind = (reward.score_latents(latents + s * along, cond).double().sum() for s in (step, -step))
    slope = (ahead - behind) / (2 * step)
    assert (grads[0] * along).sum().item() == pytest.approx(slope.item(), rel=0.02)


def test_images_are_encoded_by_its_own_model(folder: Path, family: SD3Backend) -> None:
    """Their sides are cropped to multiples of 16, in the middle."""
    reward = prepared(folder)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    own = reward.score_latents(family.encode_images(images), family.encode(PROMPTS))
    assert torch.allclose(reward(images, PROMPTS), own, rtol=0, atol=1e-6)
    larger = F.pad(images, (3, 4, 0, 2), value=0.5)
    assert torch.allclose(reward(larger, PROMPTS), reward(larger[:, :, 1:17, 3:19], PROMPTS), atol=1e-6)


def test_it_keeps_the_promises_of_a_reward(folder: Path) -> None:
    check_reward(DiNa(str(folder)))


def test_latents_are_not_decoded_for_it(folder: Path, family: SD3Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor images, of which the others of a sum are given what is known of them."""
    reward, latents, cond = prepared(folder), latents_of(family), family.encode(PROMPTS)
    images = family.decode(latents)

    def refuse(*given: Any, **options: Any) -> None:
        raise AssertionError("latents were decoded")

    monkeypatch.setattr(family, "decode", refuse)
    alone = Rewards({"dina": (1.0, reward)})
    assert torch.equal(alone.each_of(latents, cond, family)["dina"], reward.score_latents(latents, cond))
    red = Redness()
    both = Rewards({"red": (1.0, red), "dina": (0.5, reward)}).each_of(latents, cond, family, images)
    assert list(both) == ["red", "dina"]
    assert torch.equal(both["red"], red(images, PROMPTS))


def test_evaluations_encode_their_images_for_it(folder: Path, family: SD3Backend) -> None:
    reward = prepared(folder)
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    asked = OfImages(Rewards({"red": (1.0, Redness()), "dina": (1.0, reward)}), family, size=2)
    scores = asked.each(images, PROMPTS)
    assert torch.allclose(scores["dina"], reward(images, PROMPTS), rtol=0, atol=1e-6)
    assert torch.equal(scores["red"], Redness()(images, PROMPTS))
    assert reward._pipeline is not None
    other = prepared(folder)
    OfImages(Rewards({"dina": (1.0, other)}), family, size=2).each(images, PROMPTS)
    assert other._pipeline is None  # no text encoder of its own was loaded


def test_it_reads_families_of_its_latents_and_embeddings(folder: Path, family: SD3Backend, backbone: Path) -> None:
    reward = prepared(folder)
    assert isinstance(reward, LatentReward)
    assert reward.reads(family)
    assert not reward.reads(ToyBackend("", ToyBackend.Options()))
    other = SD3Backend(str(backbone), SD3Backend.Options())
    other.network_config["pooled_projection_dim"] = 128
    assert not reward.reads(other)


@pytest.mark.parametrize("rl", ["refl", "draft"])
def test_a_run_climbs_it(
    folder: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rl: str
) -> None:
    """It is never given images, in no evaluation either."""

    def refuse(*given: Any, **columns: Any) -> None:
        raise AssertionError("it was given images")

    monkeypatch.setattr(DiNa, "__call__", refuse)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a seven\na cat\n")
    run = dmdr.train(
        model=str(backbone),
        prompts=str(prompts),
        output_dir=str(tmp_path / "run"),
        reward="dina",
        rl=rl,
        dina_checkpoint=str(folder),
        stage1_steps=0,
        stage2_steps=4,
        dmd_weight=0,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        num_inference_steps=2,
        num_eval_samples=4,
        logging_steps=1,
        seed=0,
    )
    first, *_, last = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    assert last["reward/dina"] > first["reward/dina"]
    found = json.loads((Path(run) / "evaluation.json").read_text())["columns"]
    assert all("reward/dina" in column for column in found.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_logistic": True}, "use_logistic"),
        ({"use_lora": False}, "full_model.pt"),
        ({"reward_head": {"width": 16, "mixture": 2}}, "mixture"),
        ({"reward_head": {"width": 16, "num_queries": 5, "num_attn_heads": 2}}, "query_tokens"),
    ],
)
def test_what_it_does_not_know_is_refused(tmp_path: Path, backbone: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        prepared(write(tmp_path / "other", backbone, **change))


def test_a_missing_file_is_named(tmp_path: Path, backbone: Path) -> None:
    folder = write(tmp_path / "torn", backbone)
    (folder / "checkpoint" / "rm_head.pt").unlink()
    with pytest.raises(ConfigError, match=r"has no checkpoint/rm_head\.pt"):
        prepared(folder)


def test_the_published_one_is_counted_without_its_files() -> None:
    """Its backbone is the first half of Stable Diffusion 3.5 Medium."""
    reward = DiNa()
    reward.prepare(torch.device("meta"), torch.bfloat16)
    written = json.loads((EXAMPLES / "sd35m/architecture/transformer/config.json").read_text())
    ours = dict(reward._model.config)
    assert {name: json.loads(json.dumps(ours[name])) for name in written if name[0] != "_"} == {
        name: value for name, value in written.items() if name[0] != "_"
    }
    assert len(reward._model.transformer_blocks) == 12
    assert reward._sigma == pytest.approx(0.4, abs=1e-3)
    sequence, pooled = torch.empty(2, 205, 4096, device="meta"), torch.empty(2, 2048, device="meta")
    latents = torch.empty(2, 16, 64, 64, device="meta", requires_grad=True)
    cond = Condition(PROMPTS[:2], {"sequence": sequence, "pooled": pooled})
    reward.score_latents(latents, cond).sum().backward()
    assert latents.grad is not None
    with pytest.raises(ConfigError, match="dry run"):
        reward(torch.empty(1, 3, 64, 64, device="meta"), ["a"])
