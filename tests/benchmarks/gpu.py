"""Step time, samples/s, MFU and peak memory of SD3.5-Medium's training on one GPU, with random weights.

    python tests/benchmarks/gpu.py [--cases t2i_512 edit_512 ...] [--steps 10] [--pretrained FOLDER] [--output TABLE.md]

The stage modules and the Trainer run as they are; only the checkpoint folder's content is made here, on the GPU, and
nothing is downloaded. Without a GPU the pocket model (--pretrained) is measured instead, and the table says so: it then
tells that the script works, and nothing about a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch._dynamo
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    T5Config,
    T5EncoderModel,
)

from callbacks import EMA
from callbacks.throughput import peak_memory_bytes
from data_pipeline.batches import ImageBatch
from lightning_modules import kontext, pocket, pocket_vlm, reinforce
from lightning_modules.connector import Connector, ConnectorModule
from lightning_modules.kontext import KontextModule
from lightning_modules.networks import Conditioner, KontextTransformer
from lightning_modules.networks.adapters import Lora
from lightning_modules.networks.compute import Compute
from lightning_modules.networks.flops import passes_flops
from lightning_modules.networks.published import QWEN25_VL_7B, SD35_MEDIUM
from lightning_modules.networks.tokenizers import CHAT_TOKENS, chat_tokenizer, clip_tokenizer, phrase_tokenizer
from lightning_modules.networks.vlm import Vlm
from lightning_modules.pipelines import KontextPipeline, MetaqueryPipeline
from lightning_modules.reinforce import ReinforceModule
from lightning_modules.rewards.protocol import Request
from lightning_modules.rewards.weighted import Weighted
from lightning_modules.rollouts.algorithms import DiffusionNFT
from lightning_modules.rollouts.settings import Regularisation, Sampling

GPU = torch.cuda.is_available()
PEAK = 790e12  # dense bf16 FLOP/s that matrix products reach on an H200
WARM_UP = 3  # steps that are not measured: compilation, and memory that is asked for once
BARS = {"t2i_512": 48.0, "edit_512": 24.0}  # samples/s on an H200, cached, compiled
GROUP = 12


@dataclass(frozen=True)
class Case:
    """A kind of batch: pixels of a side, samples, references of each, and whether it is reinforcement, or Metaquery's
    stage 1: queries and connector alone, before a frozen transformer and Qwen2.5-VL-7B."""

    size: int
    count: int
    references: int = 0
    reinforced: bool = False
    connector: bool = False


CASES = {
    "t2i_512": Case(512, 16),
    "edit_512": Case(512, 8, 1),
    "t2i_1024": Case(1024, 4),
    "edit_1024": Case(1024, 2, 1),
    "rl_t2i_512": Case(512, 1, reinforced=True),
    "rl_edit_512": Case(512, 1, 1, reinforced=True),
    "connector_t2i_512": Case(512, 16, connector=True),
    "connector_edit_512": Case(512, 8, 1, connector=True),
}


class Noise:
    """A reward that every group learns something from."""

    def score(self, pictures: Tensor, requests: Sequence[Request]) -> list[float | None]:
        return pictures.float().flatten(1).mean(dim=1).add(torch.randn(len(pictures), device=pictures.device)).tolist()


class Batches(IterableDataset[ImageBatch]):
    """Random samples; `cached` ones are moments, whose prompts and pictures to read were seen before."""

    def __init__(self, case: Case, cached: bool, factor: int, channels: int) -> None:
        self.case, self.cached, self.factor, self.channels = case, cached, factor, channels

    def __iter__(self) -> Iterator[ImageBatch]:
        step = 0
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> ImageBatch:
        """The batch of a step."""
        case, count = self.case, self.case.count
        side = case.size // self.factor if self.cached else case.size
        shape = (2 * self.channels, side, side) if self.cached else (3, side, side)
        references = torch.rand(count, case.references, *shape) if case.references else None
        return ImageBatch(
            tasks=["edit" if case.references else "text_to_image"] * count,
            keys=[f"{step}-{i}" for i in range(count)],
            sample_ids=torch.arange(count) + step * count,
            epochs=torch.zeros(count, dtype=torch.int64),
            prompts=[f"picture {i if self.cached else step * count + i}" for i in range(count)],
            target=torch.rand(count, *shape),
            references=references,
            encoded=self.cached,
            pictures=self.seen(step) if case.connector and case.references and self.cached else None,
        )

    def seen(self, step: int) -> Tensor:
        """Pixels of the references, the same in each step."""
        shape = self.case.count, self.case.references, 3, self.case.size, self.case.size
        return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@dataclass(eq=False)
class Clock(Callback):
    """Seconds of each step after the first ones, and the time of it that sampling takes."""

    steps: int
    seconds: list[float] = field(default_factory=list)
    sampling: list[float] = field(default_factory=list)
    _start: float = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == WARM_UP and GPU:
            torch.cuda.reset_peak_memory_stats()
        self._start = now()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(now() - self._start)


def now() -> float:
    """The time when all that was asked for is done."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def random_pipeline(text_dtype: torch.dtype | None = None) -> KontextPipeline:
    """SD3.5-Medium with all its encoders, of random weights, on the GPU."""
    with torch.device("cuda"):
        transformer = KontextTransformer(**SD35_MEDIUM)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, sample_size=1024,
            scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False,
        ).eval()  # fmt: skip
        torch.set_default_dtype(text_dtype or torch.float32)
        clips = [
            CLIPTextModelWithProjection(
                CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                               num_attention_heads=width // 64, projection_dim=width)
            ).eval()
            for width, layers in ((768, 12), (1280, 32))
        ]  # fmt: skip
        t5 = T5EncoderModel(
            T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu")
        ).eval()
        torch.set_default_dtype(torch.float32)
    texts = pocket.corpus(pocket.Recipe(), 20)
    clip, long = clip_tokenizer(texts, 700, 77), phrase_tokenizer(texts, 700, 300, 256)
    return KontextPipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, clips[0], clip, clips[1], clip, t5, long
    )


def random_vlm() -> Vlm:
    """Qwen2.5-VL-7B of random weights, on the GPU, with a tokenizer of captions of scenes."""
    tokenizer = chat_tokenizer(pocket.corpus(pocket.Recipe(), 200), 700, 4096)
    names = ("vision_start", "vision_end", "image", "video")
    ids = {f"{n}_token_id": tokenizer.convert_tokens_to_ids(t) for n, t in zip(names, CHAT_TOKENS[3:], strict=True)}
    sizes = {name: QWEN25_VL_7B[name] for name in ("text_config", "vision_config", "tie_word_embeddings")}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**sizes, **ids)).requires_grad_(False).eval()
    torch.set_default_dtype(torch.float32)
    images, videos = Qwen2VLImageProcessor(), Qwen2VLVideoProcessor()
    return Vlm(model, Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=pocket_vlm.TEMPLATE))


def random_metaquery(module: ConnectorModule) -> MetaqueryPipeline:
    """The released sizes, of random weights, on the GPU."""
    pipeline, sizes = random_pipeline(torch.bfloat16), module.connector
    encoder = {"hidden_size": sizes.width, "intermediate_size": sizes.inner}
    encoder |= {"num_hidden_layers": sizes.layers, "num_attention_heads": sizes.heads}
    with torch.device("cuda"):
        conditioner = Conditioner(encoder, sizes.num_queries)
    return MetaqueryPipeline(pipeline.transformer, pipeline.scheduler, pipeline.vae, conditioner, random_vlm())


def connector_of(compiled: bool, compute: Compute) -> ConnectorModule:
    """Stage 1; a pocket language model is left as it was drawn, which takes as long as one that was taught."""
    if GPU:
        return ConnectorModule("weights/random", "weights/random", compile=compiled, compute=compute)
    folder = pocket_vlm.vlm_folder("pocket", Path(tempfile.mkdtemp()), pocket_vlm.VlmRecipe(steps=0, questions=500))
    sizes = Connector(num_queries=16, width=128, inner=256, layers=2, heads=4)
    return ConnectorModule("pocket", str(folder), connector=sizes, compile=compiled)


def module_of(case: Case, compiled: bool, pretrained: str) -> Any:
    """The stage module, as the full-size configs have it; without a GPU that of a folder."""
    compute = Compute("bfloat16", "bfloat16") if GPU else Compute()
    if case.connector:
        return connector_of(compiled, compute)
    if not case.reinforced:
        return KontextModule(pretrained, compute=compute, compile=compiled)
    return ReinforceModule(
        pretrained,
        {"noise": Weighted(Noise())},
        DiffusionNFT(points_per_picture=3),
        sampling=Sampling(group_size=GROUP, groups=1, micro_groups=1, num_inference_steps=10, guidance_scale=1.0),
        regularisation=Regularisation(old_rate=0.5),
        lora=Lora(),
        compile=compiled,
        frozen="bfloat16" if GPU else "float32",
    )


def measured(case: Case, cached: bool, compiled: bool, steps: int, pretrained: str) -> dict[str, float]:
    """Figures of one case."""
    torch.manual_seed(0)
    module, clock = module_of(case, compiled, pretrained), Clock(steps)
    if case.reinforced:
        collect = module.collect

        def timed(batch: ImageBatch) -> Any:
            start = now()
            found = collect(batch)
            clock.sampling.append(now() - start)
            return found

        module.collect = timed
    factor, channels = (8, 16) if GPU else (4, 2)
    trainer = L.Trainer(
        accelerator="auto", devices=1, max_steps=steps + WARM_UP, max_epochs=-1, logger=False,
        precision="bf16-mixed" if GPU and case.reinforced else "32-true",
        gradient_clip_val=None if case.reinforced else 1.0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[EMA(), clock],
    )  # fmt: skip
    batches = Batches(case, cached, factor, channels)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    seconds = sorted(clock.seconds[WARM_UP:])[steps // 2]  # the median
    pictures = GROUP if case.reinforced else case.count
    flops = module.training_flops(batches.batch(0)) if case.connector else flops_of(case, module, factor, pictures)
    found = {"batch": pictures, "seconds": seconds, "rate": pictures / seconds, "mfu": flops / seconds / PEAK}
    found["peak"] = peak_memory_bytes(trainer.strategy.root_device) / 2**30
    if clock.sampling:
        found["sampling"] = sorted(clock.sampling[WARM_UP:])[steps // 2]
    return found


def flops_of(case: Case, module: Any, factor: int, pictures: int) -> float:
    """Model FLOPs of a step of a transformer alone."""
    config, work = module.transformer.config, module.workload()
    tokens = float((1 + case.references) * (case.size // factor // config.patch_size) ** 2)
    frozen = 0.0 if module.lora is None else work.backward
    return pictures * passes_flops(config, tokens, module.pipeline().text_tokens, work.evaluations, frozen)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the cases and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--eager", action="store_true", help="leave the compiled runs out")
    parser.add_argument("--pretrained", default="pocket", help="what is measured without a GPU")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    pretrained = "weights/random" if GPU else arguments.pretrained
    if GPU:
        for file in (kontext, reinforce):  # no folder: its content is made on the GPU
            file.KontextPipeline.from_pretrained = lambda *_, text_dtype=None, **__: random_pipeline(text_dtype)
        ConnectorModule.assembled = random_metaquery  # type: ignore[method-assign]
    card = torch.cuda.get_device_name() if GPU else "no GPU: the pocket model on the CPU, which says nothing of a GPU"
    rows = [f"{datetime.date.today()}, {card}, torch {torch.__version__}; MFU of {PEAK / 1e12:.0f} TFLOP/s", ""]
    rows += [
        "| case | encoders | blocks | pictures | s a step | pictures/s | MFU | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(rows), flush=True)
    for name in arguments.cases:
        case = CASES[name] if GPU else replace(CASES[name], size=CASES[name].size // 8)
        for cached in (True, False):
            for compiled in (False,) if arguments.eager else (False, True):
                found = measured(case, cached, compiled, arguments.steps, pretrained)
                note = f" (sampling {found['sampling']:.3f})" if "sampling" in found else ""
                share = f"{found['mfu']:.1%}" if GPU else "-"
                rows.append(
                    f"| {name} | {'cached' if cached else 'online'} | {'compiled' if compiled else 'eager'} | "
                    f"{found['batch']} | {found['seconds']:.3f}{note} | {found['rate']:.1f} | {share} | "
                    f"{found['peak']:.1f} |"
                )
                print(rows[-1], flush=True)
                torch._dynamo.reset()  # the graphs of one case are no use to the next
                gc.collect()  # a Trainer and its module hold one another
                if GPU:
                    torch.cuda.empty_cache()
                if GPU and cached and compiled and name in BARS and found["rate"] < BARS[name]:
                    print(f"below the bar of {BARS[name]:g} samples/s on an H200", flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
