"""What a guided step costs: time and peak memory over an unguided step of the same model.

    python quickstart.py bench cost [--quick] [--json FILE]

Each cell runs a guided and an unguided sampler in turn, on the same noise, several times; `step_ratio` is the median
of the paired ratios. The loss is on latents and costs nothing, so the ratio is that of the model alone; rows of the
kind "loss" give what the demo's loss adds, its decode through the VAE and its backward pass included. Rows of the kind
"bare" are a forward and backward pass written by hand, on weights that were made ready in the same way: what `full`
takes beyond them is the wrapper's own share of a step. Making the weights ready and putting them back happens once a
run: `setup_ms`.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "tests")]
from bootstrap import import_host, import_pack  # noqa: E402

import_host(cpu=False)
import_pack()

import comfy.model_management  # noqa: E402
import comfy.samplers  # noqa: E402
import tiny_models  # noqa: E402
import torch  # noqa: E402
from result import Result, save  # noqa: E402
from sphereguide import host  # noqa: E402
from sphereguide.losses.base import Loss  # noqa: E402
from sphereguide.losses.measurement import SuperResolution  # noqa: E402
from sphereguide.models.decoder import Decoder  # noqa: E402
from sphereguide.samplers.autograd import differentiable, normal  # noqa: E402
from sphereguide.samplers.dsg import Guidance, guided  # noqa: E402
from sphereguide.samplers.trace import GuidanceTrace  # noqa: E402

SD15_LAYOUT = {
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": 768,
    "num_heads": 8,
}


class LatentLoss(Loss):
    """Costs nothing: what remains is the model."""

    space = "latent"

    def forward(self, latents: torch.Tensor, step: Any = None) -> torch.Tensor:
        return latents.flatten(1).square().sum(1)


class Bench:
    """One model: its conditionings, its noise, and runs of a sampler on it."""

    def __init__(self, name: str, patcher: Any, context: tuple[int, int], size: int, steps: int) -> None:
        self.name, self.patcher, self.steps = name, patcher, steps
        self.conds = [tiny_models.conditioning(*context, seed=seed) for seed in (1, 2)]
        self.noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(0))

    def run(self, sampler: comfy.samplers.KSAMPLER, cfg: float) -> list[float]:
        """Seconds of each step but the last, which guides nothing, and the first, which pays for preparation."""
        stamps: list[float] = []

        def callback(*_: Any) -> None:
            synchronize()
            stamps.append(time.perf_counter())

        with torch.inference_mode():
            guider = comfy.samplers.CFGGuider(self.patcher)
            guider.set_conds(*self.conds)
            guider.set_cfg(cfg)
            sigmas = comfy.samplers.calculate_sigmas(self.patcher.model.model_sampling, "karras", self.steps + 1)
            guider.sample(
                self.noise, torch.zeros_like(self.noise), sampler, sigmas, callback=callback, disable_pbar=True, seed=0
            )
        return [after - before for before, after in pairwise(stamps[:-1])]


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def plain() -> comfy.samplers.KSAMPLER:
    return comfy.samplers.ksampler("euler_ancestral")


def bare() -> comfy.samplers.KSAMPLER:
    """euler_ancestral whose model calls are a forward and a backward pass, with nothing around them."""
    base = plain()

    def sample(model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], **kwargs: Any) -> Any:
        guider = host.guider(model)
        guider.conds = normal(guider.conds)

        def call(x: torch.Tensor, sigma: torch.Tensor, **extra_args: Any) -> torch.Tensor:
            with torch.inference_mode(False), torch.enable_grad():
                x = x.detach().clone().requires_grad_()
                denoised = model(x, sigma.clone(), **extra_args)
                torch.autograd.grad(denoised.square().sum(), x)
            return denoised.detach()

        call.inner_model = model.inner_model  # type: ignore[attr-defined]  # where newer samplers look for the model
        with differentiable(host.base_model(model)):
            return base.sampler_function(call, x, sigmas, extra_args=extra_args, **kwargs)

    return comfy.samplers.KSAMPLER(sample)


def dsg(**settings: Any) -> comfy.samplers.KSAMPLER:
    return guided(plain(), Guidance(**{"loss": LatentLoss(), "guidance_rate": 0.1, **settings}), GuidanceTrace())


def measure(bench: Bench, sampler: comfy.samplers.KSAMPLER, cfg: float, pairs: int) -> dict[str, float]:
    """Medians of the paired ratio and of both times, in ms, and the peaks of memory beyond what the model takes."""
    ratios, guided_ms, plain_ms = [], [], []
    bench.run(sampler, cfg)
    memory, unguided_memory = (peak_memory(functools.partial(bench.run, one, cfg)) for one in (sampler, plain()))
    for _ in range(pairs):
        before, after = bench.run(plain(), cfg), bench.run(sampler, cfg)
        ratios.append(statistics.mean(after) / statistics.mean(before))
        guided_ms.append(1000 * statistics.mean(after))
        plain_ms.append(1000 * statistics.mean(before))
    return {
        "step_ratio": round(statistics.median(ratios), 3),
        "step_ms": round(statistics.median(guided_ms), 2),
        "unguided_step_ms": round(statistics.median(plain_ms), 2),
        "peak_memory_mb": memory,
        "unguided_memory_mb": unguided_memory,
    }


def peak_memory(run: Callable[[], Any]) -> float | None:
    """MB at the peak of `run` above what was in use before it: of the GPU, or resident (Linux); None elsewhere."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return None

    def kilobytes(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # or the run would be served from what earlier ones left
        libc.malloc_trim(0)
    clear.write_text("5")  # the peak begins anew
    before = kilobytes("VmRSS")
    run()
    return round((kilobytes("VmHWM") - before) / 1024, 1)


def wrapper_share(bench: Bench, pairs: int) -> float:
    """What part of a `full` step is neither forward nor backward pass: `bare` and `full` in turn, without CFG.

    A few hundredths, which one slow step of a run would hide: hence medians of steps.
    """
    ratios = []
    for _ in range(pairs):
        hand, full = bench.run(bare(), 1.0), bench.run(dsg(), 1.0)
        ratios.append(statistics.median(hand) / statistics.median(full))
    return round(1 - statistics.median(ratios), 4)


def setup_ms(patcher: Any) -> float:
    """Once a run: normal tensors over the weights, and back."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        with differentiable(patcher.model):
            pass
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times), 2)


CELLS: list[dict[str, Any]] = [
    {"kind": "bare", "cfg": 1.0},
    {"kind": "model", "gradient": "full", "cfg": 1.0},
    {"kind": "model", "gradient": "fast", "cfg": 1.0},
    {"kind": "model", "gradient": "full", "cfg": 1.0, "interval": 2},
    {"kind": "model", "gradient": "full", "cfg": 1.0, "checkpointing": True},
    {"kind": "model", "gradient": "full", "cfg": 3.0},
    {"kind": "model", "gradient": "cond only", "cfg": 3.0},
    {"kind": "model", "gradient": "fast", "cfg": 3.0},
    {"kind": "model", "gradient": "cond only", "cfg": 3.0, "checkpointing": True},
    {"kind": "loss", "gradient": "full", "cfg": 1.0},
    {"kind": "loss", "gradient": "fast", "cfg": 1.0},
    {"kind": "loss", "gradient": "full", "cfg": 1.0, "decode_scale": 0.5},
    {"kind": "loss", "gradient": "full", "cfg": 1.0, "checkpointing": True},
]
QUICK = [0, 1, 2, 4, 5, 6]


def sampler_of(cell: dict[str, Any], decode: Decoder, size: int) -> comfy.samplers.KSAMPLER:
    settings = {key: cell[key] for key in ("gradient", "interval", "checkpointing") if key in cell}
    if cell["kind"] == "bare":
        return bare()
    if cell["kind"] == "loss":
        decode = Decoder(decode.vae, cell.get("decode_scale", 1.0))
        settings |= {"loss": SuperResolution(torch.rand(1, 3, size * 2, size * 2), 4), "decode": decode}
    return dsg(**settings)


def models(quick: bool) -> Iterator[tuple[Bench, Decoder, int, int]]:
    """Each model with its VAE, its size in latent pixels and how many pairs to run."""
    from sphereguide.demo import toy_portraits

    with torch.inference_mode():
        toy, _, vae = toy_portraits.load()
    context = toy.model.model_config.unet_config["context_dim"]
    # An odd number of steps, so that of those timed (all but the first and the last) every second one is guided.
    yield Bench("toy portraits", toy, (77, context), 16, 7 if quick else 11), Decoder(vae), 16, 3 if quick else 15
    if quick:
        return
    taesd = Decoder(tiny_models.TinyVAE())
    sd15 = tiny_models.sd15(**SD15_LAYOUT)
    yield Bench("SD1.5 layout", sd15, (77, 768), 32, 3), taesd, 32, 3


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(13, 5), dpi=110, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        of_model = [row for row in rows if row["model"] == name][::-1]
        labels = [
            " ".join(
                part
                for part in (
                    row["gradient"] or "bare",
                    f"cfg {row['cfg']:g}",
                    f"interval {row['interval']}" if row["interval"] > 1 else "",
                    "checkpointing" if row["checkpointing"] else "",
                    f"decode at {row['decode_scale']:g}" if row["decode_scale"] < 1 else "",
                    "+ decode and loss" if row["kind"] == "loss" else "",
                )
                if part
            )
            for row in of_model
        ]
        bars = axes.barh(labels, [row["step_ratio"] for row in of_model], color="#5b7fb5")
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(title=name, xlabel="time of a guided / an unguided step")
        axes.margins(x=0.15)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Toy Portraits only, and few cells")
    parser.add_argument("--json", type=Path, help="where to write the rows; a plot goes beside it")
    options = parser.parse_args()

    settings = {"sampler": "euler_ancestral", "batch": 1, "dtype": "float32"}
    result = Result("cost", settings, options.json, options.quick)
    print(
        f"{'model':14} {'kind':6} {'gradient':10} {'cfg':>3} {'every':>5} {'ckpt':>5} {'ratio':>7} {'ms':>9} {'MB':>8} "
        f"{'unguided':>9}"
    )
    for bench, decode, size, pairs in models(options.quick):
        for index, cell in enumerate(CELLS):
            if options.quick and index not in QUICK:
                continue
            about = {"model": bench.name, "gradient": None, "interval": 1, "checkpointing": False, "decode_scale": 1.0}
            about |= cell
            row = result.find(about)
            if row is None:
                row = about | measure(bench, sampler_of(cell, decode, size), cell["cfg"], pairs)
                if cell["kind"] == "bare":
                    row |= {"wrapper_share": wrapper_share(bench, pairs), "setup_ms": setup_ms(bench.patcher)}
                result.add(row)
            memory = (
                ""
                if row["peak_memory_mb"] is None
                else f"{row['peak_memory_mb']:8.1f} {row['unguided_memory_mb']:9.1f}"
            )
            print(
                f"{row['model']:14} {row['kind']:6} {row['gradient'] or '':10} {row['cfg']:3g} {row['interval']:5} "
                f"{row['checkpointing']!s:>5} {row['step_ratio']:7.2f} {row['step_ms']:9.1f} {memory}",
                flush=True,
            )
            if cell["kind"] == "bare":
                print(
                    f"{bench.name}: the wrapper's own share of a full step {row['wrapper_share']:.1%}; once a run "
                    f"{row['setup_ms']} ms"
                )
    result.finish(draw)


if __name__ == "__main__":
    main()
