"""The options that families on diffusers pipelines share."""

from dataclasses import dataclass

from dmdr.backends.quantized import Format
from dmdr.errors import ConfigError
from dmdr.protocols import RoleOptions, require
from dmdr.sizes import Size, parse_sizes


@dataclass(frozen=True, kw_only=True)
class PipelineOptions(RoleOptions):
    """Options of a diffusers pipeline.

    Attributes:
        resolution: Image size in pixels, such as 1024 or 1152x896 (width x height); with several, such as
            1024,1152x896, each update draws one, and the first is that of grids and evaluation. The model's own by
            default.
        max_sequence_length: Tokens of the longest text encoder; the model's own by default.
        negative_prompt: Guidance leads away from this text; the empty prompt by default.
        zero_empty_prompt: Guidance leads away from zeros (true) or the empty prompt (false); as the model says by
            default.
        prompt_cache: Folder of prompt embeddings; 'off' keeps the text encoders in memory; ~/.cache/dmdr/prompts by
            default.
        teacher: Pipeline, a folder or hub id, whose network is teacher and fake score; the student starts from the
            network of --model, as a full copy or as the LoRA that is nearest to it. --model's own by default.
        teacher_lora: LoRA that is merged into the teacher's network: a file, folder or hub id.
        student_weights: Weights file that a full student (--full_finetune) starts from.
        reward_vae: Small decoder for the rewards (AutoencoderTiny), a folder or hub id; 'none' for the model's own.
        vae_tiling: Decode by tiles.
        decode_chunk_size: Images that are decoded at a time for the rewards; all by default.
        quantize: Keep the frozen network's blocks in 4 or 8 bits a number.
        torch_compile: Compile the network's blocks: minutes at the start, faster steps.
        attention_backend: Attention kernel by diffusers' name, e.g. flash, of families that choose one.
        cpu_offload: Keep text encoders and VAE on the CPU while they are idle; after a reward's gradient the VAE goes
            back with its next use without one.
        revision: Branch, tag or commit of the model on the hub.
        variant: Weights files of the model that are meant, such as fp16.

    Raises:
        ConfigError: For an invalid value.
    """

    resolution: str | None = None
    max_sequence_length: int | None = None
    negative_prompt: str | None = None
    zero_empty_prompt: bool | None = None
    prompt_cache: str | None = None
    teacher: str | None = None
    teacher_lora: str | None = None
    student_weights: str | None = None
    reward_vae: str | None = None
    vae_tiling: bool = False
    decode_chunk_size: int | None = None
    quantize: Format | None = None
    torch_compile: bool = False
    attention_backend: str | None = None
    cpu_offload: bool = False
    revision: str | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_sequence_length", "decode_chunk_size"):
            value = getattr(self, name)
            require(self, name, value is None or value > 0, "above 0")
        try:
            self.sizes()
        except ValueError as error:
            require(self, "resolution", False, str(error))
        if self.teacher:
            for name, why in (("teacher_lora", "merge it into that model"), ("student_weights", "--model has them")):
                if getattr(self, name):
                    raise ConfigError(f"--teacher and --{name}: {why}, or leave one of them out")
        if self.student_weights and not self.full_finetune:
            raise ConfigError("--student_weights needs --full_finetune, because it holds a full network")
        if self.zero_empty_prompt and self.negative_prompt is not None:
            raise ConfigError("--zero_empty_prompt and --negative_prompt: guidance leads away from one of them")
        if self.quantize and self.full_roles:
            what, flag = ("student", "full_finetune") if self.full_finetune else ("fake score", "fake_score full")
            raise ConfigError(f"--quantize needs a LoRA {what}: leave out --{flag}, which trains every weight")

    def sizes(self) -> tuple[Size, ...]:
        """Those of `resolution`; none where the model's own is meant."""
        return () if self.resolution is None else parse_sizes(str(self.resolution))
