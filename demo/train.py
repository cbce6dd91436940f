"""Trains the demo models. Every file of `demo/weights` comes from these commands, run from the repository's root:

    python -m demo.train vae      --work DIR     # autoencoder, TAESD layout
    python -m demo.train latents  --work DIR     # encodes the training portraits, once
    python -m demo.train unet     --work DIR     # text encoder and U-Net, jointly
    python -m demo.train export   --work DIR     # fp16 safetensors
    python -m demo.evaluate       --work DIR     # the table of MODEL_CARD.md

Training resumes from the last checkpoint in DIR. Random numbers are a function of (seed, step, worker), so that a
resumed run equals an uninterrupted one. `--workers 2` runs two single-threaded processes that average their gradients:
on a busy CPU that is steadier than two threads of one process.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from . import portraits

CACHE = Path(__file__).parent / "cache"
TRAIN_SIZE = 16384
VALIDATION_SIZE = 256


def generator(seed: int, step: int, rank: int = 0) -> torch.Generator:
    """The random numbers of one step of one worker."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to a fiftieth of the peak; by step, not by time."""
    if step < warmup:
        return peak * (step + 1) / warmup
    t = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, t))))


def fit(
    args: argparse.Namespace,
    name: str,
    modules: nn.Module,
    loss: Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]],
    validate: Callable[[nn.Module], dict[str, float]],
    weight_decay: float,
) -> None:
    """Adam on `loss(step, generator)` with an exponential moving average; validates and checkpoints as it goes.

    The checkpoint `name.pt` holds weights, average, optimizer state and step.
    """
    folder, rank = args.work, args.rank
    path = folder / f"{name}.pt"
    optimizer = torch.optim.AdamW(
        [p for p in modules.parameters() if p.requires_grad], lr=args.lr, betas=(0.9, 0.99), weight_decay=weight_decay
    )
    average = copy.deepcopy(modules).requires_grad_(False)
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    began, seen = time.time(), {}
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        value, terms = loss(step, generator(args.seed, step, rank))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if args.workers > 1:
            flat = torch.cat([p.grad.reshape(-1) for p in parameters])
            dist.all_reduce(flat)
            flat /= args.workers
            for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad.copy_(g.view_as(p))
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(modules.parameters()), 1 - decay)
        if rank:
            continue
        for key, term in (terms | {"loss": float(value.detach()), "grad_norm": float(norm)}).items():
            seen.setdefault(key, []).append(term)
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            row = {"step": done, "seconds": round(time.time() - began, 1)}
            row |= {key: float(np.mean(terms)) for key, terms in seen.items()}
            seen.clear()
            if done % args.validate_every == 0 or done == args.steps:
                row |= validate(average)
            if done % args.save_every == 0 or done == args.steps:
                state = {"model": modules.state_dict(), "average": average.state_dict(), "step": done}
                torch.save(state | {"optimizer": optimizer.state_dict()}, path.with_suffix(".tmp"))
                os.replace(path.with_suffix(".tmp"), path)
            with open(folder / f"{name}.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            left = (time.time() - began) / (done - start) * (args.steps - done)
            numbers = " ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("step", "seconds"))
            print(f"{name} {done}/{args.steps}  {numbers}  {left / 60:.0f} min left", flush=True)


def images(seeds: range, work: Path) -> np.ndarray:
    """Portraits of `seeds`, uint8 [N, 128, 128, 3], drawn once."""
    return portraits.dataset(seeds, work / "data")["images"]


def compiled(args: argparse.Namespace, module: nn.Module) -> Callable:
    return torch.compile(module) if args.compile else module


# ------------------------------------------------------------------------------------------------------------ VAE


def initialise_vae(vae: nn.Module) -> None:
    """He initialisation; the last convolution of every residual block starts at a tenth of it."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in vae.modules():
        if hasattr(module, "fuse"):
            module.conv[-1].weight.data *= 0.1
    vae.taesd_encoder[-1].weight.data *= 2.0  # latents start near unit variance
    vae.taesd_decoder[-1].weight.data *= 0.3
    vae.taesd_decoder[-1].bias.data.fill_(0.5)


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of horizontal and vertical neighbours."""
    return x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]


def train_vae(args: argparse.Namespace) -> None:
    """Reconstruction of 64x64 crops: L1 + 5 MSE + L1 of edges, plus a penalty that keeps latents near unit variance."""
    import comfy.taesd.taesd

    torch.manual_seed(args.seed)
    vae = comfy.taesd.taesd.TAESD()
    initialise_vae(vae)
    for name, p in vae.named_parameters():
        p.requires_grad_(name not in ("vae_scale", "vae_shift"))
    vae.to(memory_format=torch.channels_last)
    encode, decode = compiled(args, vae.taesd_encoder), compiled(args, vae.taesd_decoder)
    train = images(portraits.TRAIN_SEEDS[:TRAIN_SIZE], args.work)
    held_out = images(portraits.VALIDATION_SEEDS[:VALIDATION_SIZE], args.work)[:64]
    batch = args.batch // args.workers

    def loss(step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(train), (batch,), generator=rng).tolist()
        corners = torch.randint(0, portraits.SIZE - 63, (batch, 2), generator=rng).tolist()
        crops = np.stack([train[i, y : y + 64, x : x + 64] for i, (y, x) in zip(index, corners, strict=True)])
        target = torch.from_numpy(crops).permute(0, 3, 1, 2).float().div_(255)  # channels_last in memory
        latent = encode(target)
        output = decode(latent)
        mse, l1 = F.mse_loss(output, target), F.l1_loss(output, target)
        edge = sum(F.l1_loss(a, b) for a, b in zip(edges(output), edges(target), strict=True))
        mean, var = latent.mean((0, 2, 3)), latent.var((0, 2, 3))
        unit = (mean**2 + (var - 1) ** 2).mean()
        return l1 + 5 * mse + 0.5 * edge + 0.01 * unit, {"mse": float(mse.detach()), "latent_std": float(var.detach().mean().sqrt())}

    def validate(average: nn.Module) -> dict[str, float]:
        x = torch.from_numpy(held_out.copy()).permute(0, 3, 1, 2).float().div(255)
        with torch.no_grad():
            y = torch.cat([average.taesd_decoder(average.taesd_encoder(part)).clamp(0, 1) for part in x.split(8)])
        return {"psnr": float((-10 * ((x - y) ** 2).mean((1, 2, 3)).log10()).mean())}

    fit(args, "vae", vae, loss, validate, weight_decay=0.0)


# ----------------------------------------------------------------------------------------------------- command line


def work(rank: int, args: argparse.Namespace) -> None:
    """One worker of a training run."""
    args.rank = rank
    if args.workers > 1:
        torch.set_num_threads(1)
        store = dist.FileStore(str(args.work / f".{args.command}-{args.session}"), args.workers)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=args.workers)
    elif args.threads:
        torch.set_num_threads(args.threads)
    COMMANDS[args.command](args)


def host_on_cpu() -> None:
    """Keep ComfyUI from reading this program's command line, and on the CPU."""
    import comfy.options

    comfy.options.args_parsing = False
    from comfy.cli_args import args

    args.cpu = True


COMMANDS = {"vae": train_vae}
DEFAULTS = {"vae": {"steps": 3400, "batch": 12, "lr": 1.2e-3, "ema": 0.995}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--work", type=Path, default=CACHE, help="data, checkpoints and logs (default: demo/cache)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, help="samples a step, over all workers")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--ema", type=float, help="decay of the moving average")
    parser.add_argument("--workers", type=int, default=1, help="data-parallel processes of one thread each")
    parser.add_argument("--threads", type=int, default=0, help="threads of a single worker (default: torch's choice)")
    parser.add_argument("--compile", action="store_true", help="torch.compile (needs a C++ compiler; about 15 %% faster)")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--validate-every", type=int, default=250)
    parser.add_argument("--save-every", type=int, default=250)
    args = parser.parse_args()
    for name, value in DEFAULTS.get(args.command, {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.work.mkdir(parents=True, exist_ok=True)
    args.session = f"{os.getpid()}"
    if args.workers > 1:
        torch.multiprocessing.spawn(work_on_cpu, (args,), nprocs=args.workers)
    else:
        work_on_cpu(0, args)


def work_on_cpu(rank: int, args: argparse.Namespace) -> None:
    host_on_cpu()
    work(rank, args)


if __name__ == "__main__":
    main()
