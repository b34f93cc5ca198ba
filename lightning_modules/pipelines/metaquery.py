"""One model that understands, generates and edits: a vision-language model, queries, and a Kontext transformer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from data_pipeline.transforms import to_tensor
from lightning_modules.networks import Conditioner, KontextTransformer
from lightning_modules.networks.adapters import has_adapters
from lightning_modules.networks.loading import CheckpointError, check_weights, read_json
from lightning_modules.networks.vlm import Features, Pictures, Reading, Vlm
from lightning_modules.pipelines.kontext import (
    STOCK_PIPELINE,
    STOCK_TRANSFORMER,
    Generators,
    KontextPipeline,
    check_scheduler,
)

SETTINGS = "metaquery.json"  # beside model_index.json; a release has none
ROWS = 8  # conversations that the language model reads at a time
Reference = Literal["both", "vlm", "transformer"]
Answers = Image.Image | Sequence[Image.Image | None] | None


@dataclass(frozen=True)
class Querying:
    """How a model was trained to be asked.

    Attributes:
        reference: who sees the pictures to edit: the vision-language model, the transformer, or both.
        reading: how the vision-language model is queried.
    """

    reference: Reference = "both"
    reading: Reading = field(default_factory=Reading)


class MetaqueryPipeline(KontextPipeline):
    """A Kontext pipeline whose conditions are queries to a vision-language model, which can also be asked.

    Args:
        transformer: KontextTransformer.
        scheduler: FlowMatchEulerDiscreteScheduler.
        vae: AutoencoderKL.
        conditioner: queries and connector.
        vlm: Qwen2.5-VL.
        reference: as in Querying.
    """

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any,
        conditioner: Conditioner,
        vlm: Vlm,
        reference: Reference = "both",
    ) -> None:
        nothing = dict.fromkeys(
            (f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")),
        )
        super().__init__(transformer=transformer, scheduler=scheduler, vae=vae, **nothing)
        check_parts(transformer, conditioner, vlm)
        self.register_modules(conditioner=conditioner, vlm=vlm)
        self.reference: Reference = reference

    @property
    def components(self) -> dict[str, Any]:
        """The parts that there are."""
        return {name: getattr(self, name) for name in ("transformer", "scheduler", "vae", "conditioner", "vlm")}

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: Any,
        vlm: str | Path | None = None,
        torch_dtype: torch.dtype | None = None,
        vlm_dtype: torch.dtype | None = None,
    ) -> MetaqueryPipeline:
        """Loads a folder with `conditioner/`, such as Skywork's release or an export.

        Args:
            pretrained_model_name_or_path: the folder.
            vlm: folder of a Qwen2.5-VL; by default `vlm/` of the folder, which a release does not have.
            torch_dtype: of all weights.
            vlm_dtype: of the VLM's, where they differ.
        """
        folder = Path(pretrained_model_name_or_path)
        require_conditioner(folder)
        conditioner = Conditioner.from_pretrained(folder, subfolder="conditioner", torch_dtype=torch_dtype)
        settings = querying_of(folder)
        return cls.assembled(folder, conditioner.eval(), vlm_of(folder, vlm), settings, torch_dtype, vlm_dtype)

    @classmethod
    def assembled(
        cls,
        folder: Path,
        conditioner: Conditioner,
        vlm: Path,
        querying: Querying,
        torch_dtype: torch.dtype | None = None,
        vlm_dtype: torch.dtype | None = None,
    ) -> MetaqueryPipeline:
        """Transformer, autoencoder and scheduler of any checkpoint folder with this conditioner and that VLM, whose
        weights may be of a precision of their own."""
        for part in ("transformer", "vae", "scheduler"):
            if not (folder / part).is_dir():
                raise CheckpointError(f"{folder} lacks {part}; expected a checkpoint folder in the diffusers layout")
        check_scheduler(folder / "scheduler")
        check_weights(AutoencoderKL, folder / "vae", {"AutoencoderKL"})
        return cls(
            KontextTransformer.from_pretrained(folder, subfolder="transformer", torch_dtype=torch_dtype),
            FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler"),
            AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch_dtype).eval(),
            conditioner,
            Vlm.from_pretrained(vlm, querying.reading, vlm_dtype or torch_dtype),
            querying.reference,
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Writes a checkpoint folder that `from_pretrained` reads, and stock diffusers too: with None passed for each
        text encoder and tokenizer, it takes embeddings.

        The files of a frozen vision-language model are linked where the file system can, else copied.
        """
        folder = Path(save_directory)
        for part in ("transformer", "scheduler", "vae", "conditioner"):
            getattr(self, part).save_pretrained(str(folder / part))
        self.save_adapters(folder)
        if self.vlm.folder is None or has_adapters(self.vlm.model):
            self.vlm.save_pretrained(folder / "vlm")
        else:
            shutil.copytree(self.vlm.folder, folder / "vlm", copy_function=link)
        names = ("text_encoder", "tokenizer", "image_encoder", "feature_extractor")
        index: dict[str, Any] = {"_class_name": STOCK_PIPELINE, "transformer": STOCK_TRANSFORMER}
        index |= {f"{n}{i}": [None, None] for n in names for i in (("", "_2", "_3") if n in names[:2] else ("",))}
        index |= {"vae": ["diffusers", "AutoencoderKL"], "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        settings = asdict(Querying(self.reference, self.vlm.reading))
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")

    @property
    def text_tokens(self) -> int:
        """Length of the sequence that the transformer is conditioned on."""
        return len(self.conditioner.meta_queries)

    def limit_t5(self, tokens: int) -> None:
        """A model without T5 has nothing to limit."""
        raise CheckpointError(f"max_sequence_length is {tokens}, and a Metaquery model has no T5; leave it out (null)")

    def read(self, prompts: Sequence[str], pictures: Pictures | None, rows: int = ROWS) -> list[Features]:
        """What the language model keeps of each prompt and its pictures; see Vlm.prefix."""
        every = [[]] * len(prompts) if pictures is None else pictures
        shown = [list(own) if self.reference != "transformer" else [] for own in every]
        conversations = [
            self.vlm.conversation(prompt if own else f"Generate an image: {prompt}", len(seen))
            for prompt, own, seen in zip(prompts, every, shown, strict=True)
        ]
        return self.vlm.prefix(conversations, shown, self.text_tokens, rows)

    def condition(self, prefixes: Sequence[Features]) -> tuple[Float[Tensor, "b n e"], Float[Tensor, "b p"]]:
        """Sequence and pooled embeddings behind what was read; gradients reach queries and connector."""
        hidden = self.vlm.query(self.conditioner.meta_queries, prefixes)
        return self.conditioner(hidden.to(self.conditioner.meta_queries.dtype))

    def _encode_prompts(
        self, prompts: list[str], pictures: list[list[Tensor]] | None, length: int | None
    ) -> tuple[Tensor, Tensor]:
        return self.condition(self.read(prompts, pictures))

    def encode_unique(
        self, prompts: Sequence[str], max_sequence_length: int | None = None
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b p"]]:
        """Embeddings of prompts without pictures."""
        return self.condition(self.read(prompts, None))

    def _encode_references(self, pictures: list[list[Tensor]], generator: Generators) -> Any:
        return None if self.reference == "vlm" else super()._encode_references(pictures, generator)

    def ask(
        self,
        question: str | Sequence[str],
        image: Answers = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[str]:
        """Answers in the vision-language model's own words.

        Args:
            question: one, or several.
            image: none, one for all questions, or one (or None) for each.
            max_new_tokens: of an answer, at most.
            temperature: of sampling; 0 takes the likeliest token each time.
            seed: of the draws, which then leave the global random state as it was; None draws from that state.
        """
        questions = [question] if isinstance(question, str) else list(question)
        images = [image] * len(questions) if image is None or isinstance(image, Image.Image) else list(image)
        if len(images) != len(questions) or max_new_tokens < 1 or temperature < 0:
            raise CheckpointError(
                f"ask got {len(questions)} questions, {len(images)} images, max_new_tokens {max_new_tokens} and "
                f"temperature {temperature:g}; expected an image (or None) for each, at least 1 token and 0 or more"
            )
        pictures = [[] if one is None else [to_tensor(one.convert("RGB"), (one.height, one.width))] for one in images]
        if seed is None:
            return self.vlm.answer(questions, pictures, max_new_tokens, temperature)
        with torch.random.fork_rng(devices=[self.vlm.device] if self.vlm.device.type == "cuda" else []):
            torch.manual_seed(seed)  # transformers draws from the global state alone
            return self.vlm.answer(questions, pictures, max_new_tokens, temperature)


def require_conditioner(folder: Path) -> None:
    """Refuses what is no Metaquery model."""
    if not (folder / "conditioner").is_dir():
        what = "has no conditioner/, so it is no Metaquery model" if folder.is_dir() else "is no folder"
        raise CheckpointError(
            f"{folder} {what}; give Skywork's UniPic2-Metaquery, or an export of configs/connector.yaml"
        )


def vlm_of(folder: Path, vlm: str | Path | None) -> Path:
    """The folder of a model's VLM: `vlm`, else its own."""
    found = Path(vlm) if vlm is not None else folder / "vlm"
    if not found.is_dir():
        raise CheckpointError(
            f"there is no vision-language model at {found}; give the folder of its Qwen2.5-VL, as model.init_args.vlm "
            "of a run or vlm= of from_pretrained (Skywork's release comes without)"
        )
    return found


def querying_of(folder: Path) -> Querying:
    """The settings that an export has; a release's are the defaults."""
    path = folder / SETTINGS
    if not path.is_file():
        return Querying()
    found = read_json(path)
    try:
        return Querying(found["reference"], Reading(**found["reading"]))
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); export the run again") from error


def check_parts(transformer: Any, conditioner: Conditioner, vlm: Vlm) -> None:
    """Names every size in which the conditioner differs from what stands before and behind it."""
    own = conditioner.config
    pairs = {
        "llm_hidden_size": (own.llm_hidden_size, vlm.width, "the VLM's hidden_size"),
        "fused_layers": (own.fused_layers, len(vlm.reading.layers), "the number of reading.layers"),
        "joint_attention_dim": (own.joint_attention_dim, transformer.config.joint_attention_dim, "the transformer's"),
        "pooled_projection_dim": (
            own.pooled_projection_dim,
            transformer.config.pooled_projection_dim,
            "the transformer's",
        ),
    }
    wrong = [f"{name} {mine} where {whose} is {other}" for name, (mine, other, whose) in pairs.items() if mine != other]
    if wrong:
        raise CheckpointError(
            f"the conditioner does not fit: {'; '.join(wrong)}. Give the VLM and the transformer that it was trained "
            "with, or train a new one (connector.yaml)"
        )


def link(source: str, target: str) -> None:
    """Links a file, or copies it where that cannot be."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
