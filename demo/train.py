"""Trains the demo models. Every file of `demo/weights` comes from these commands, run from the repository's root:

    python -m demo.train vae      --work DIR     # autoencoder, TAESD layout
    python -m demo.train latents  --work DIR     # encodes the training portraits, once
    python -m demo.train decoder  --work DIR     # the decoder once more, the encoder and so the latents fixed
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
from safetensors.torch import load_file
from torch import Tensor, nn

from . import portraits
from .bootstrap import import_host

CACHE = Path(__file__).parent / "cache"
TRAIN_SIZE = 16384
"""Portraits that the autoencoder sees."""
LATENT_SIZE = 8192
"""The first of them, which the U-Net sees."""
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


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised (K. Jordan et al., 2024), for the matrices inside a network.

    Convolutions are matrices [out, in * k * k]. Five Newton-Schulz iterations bring the singular values of an update
    near 1; it is then scaled to an RMS of 0.2 (arXiv 2502.16982), so that `lr` means what it means to Adam.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for shape in {p.shape for p in group["params"]}:
                kernels = [p for p in group["params"] if p.shape == shape]
                for p in kernels:
                    self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                nesterov = [p.grad.lerp(self.state[p]["momentum"], group["momentum"]).flatten(1) for p in kernels]
                x = torch.stack(nesterov)
                tall = x.shape[1] > x.shape[2]
                x = x.mT if tall else x
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                # x <- (a + b x xᵀ + c (x xᵀ)²) x, with the small matrices alone: all of them are polynomials of x xᵀ
                gram, eye = x @ x.mT, torch.eye(x.shape[1])
                total = None
                for i in range(5):
                    factor = 3.4445 * eye - 4.7750 * gram + 2.0315 * gram @ gram
                    total = factor if i == 0 else factor @ total
                    gram = gram if i == 4 else factor @ gram @ factor
                x = total @ x
                scale = 0.2 * max(x.shape[1:]) ** 0.5
                for p, update in zip(kernels, x, strict=True):
                    p.sub_((update.mT if tall else update).reshape(shape), alpha=group["lr"] * scale)


def fit(
    args: argparse.Namespace,
    name: str,
    modules: nn.Module,
    loss: Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]],
    validate: Callable[[nn.Module], dict[str, float]],
    is_hidden: Callable[[str, nn.Parameter], bool],
    weight_decay: float,
) -> None:
    """Minimises `loss(step, generator)` with an exponential moving average; validates and checkpoints as it goes.

    Muon takes the parameters that `is_hidden(name, parameter)`, Adam the others.

    The checkpoint `name.pt` holds weights, average, optimizer state and step.
    """
    folder, rank = args.work, args.rank
    path = folder / f"{name}.pt"
    trained = [p for p in modules.parameters() if p.requires_grad]
    muon = [p for key, p in modules.named_parameters() if p.requires_grad and args.muon and is_hidden(key, p)]
    adam = [p for p in trained if all(p is not q for q in muon)]
    optimizers = {"adam": torch.optim.AdamW(adam, lr=args.lr, betas=(0.9, 0.99), weight_decay=weight_decay)}
    if muon:
        optimizers["muon"] = Muon(muon, lr=args.lr * args.muon)
    average = copy.deepcopy(modules).requires_grad_(False)
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        modules.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for key, optimizer in optimizers.items():
            optimizer.load_state_dict(state[key])
        start = state["step"]
    began, seen = time.time(), {}
    for step in range(start, args.steps):
        rate = learning_rate(step, args.steps, args.lr)
        for key, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * (args.muon if key == "muon" else 1)
        value, terms = loss(step, generator(args.seed, step, rank))
        modules.zero_grad(set_to_none=True)
        value.backward()
        if args.workers > 1:
            flat = torch.cat([p.grad.reshape(-1) for p in trained])
            dist.all_reduce(flat)
            flat /= args.workers
            for p, g in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
                p.grad.copy_(g.view_as(p))
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(modules.parameters()), 1 - decay)
            for kept, current in zip(average.buffers(), modules.buffers(), strict=True):
                kept.copy_(current)
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
                torch.save(state | {k: v.state_dict() for k, v in optimizers.items()}, path.with_suffix(".tmp"))
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


MOUTH_WEIGHT = 2.0
"""A mouth is a hundredth of a portrait, and what the decoder gives up first."""


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


def reconstruction_error(output: Tensor, target: Tensor, weight: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """L1 + 5 MSE, each pixel counted `weight` times, + 0.5 L1 of edges; and the plain MSE, for the log."""
    difference = output - target
    mse, l1 = (weight * difference**2).mean(), (weight * difference.abs()).mean()
    edge = sum(F.l1_loss(a, b) for a, b in zip(edges(output), edges(target), strict=True))
    return l1 + 5 * mse + 0.5 * edge, difference.detach().square().mean()


def is_square_convolution(name: str, p: nn.Parameter) -> bool:
    return p.ndim == 4 and p.shape[0] == p.shape[1]


def train_vae(args: argparse.Namespace) -> None:
    """Reconstruction of 64x64 crops: L1 + 5 MSE + L1 of edges, plus a penalty that keeps latents near unit variance."""
    import comfy.taesd.taesd

    from . import toy_portraits

    torch.manual_seed(args.seed)
    vae = comfy.taesd.taesd.TAESD()
    initialise_vae(vae)
    if args.init:
        weights = load_file(args.init / toy_portraits.VAE_FILE)
        vae.load_state_dict({name: weights[name].float() for name in vae.state_dict()})
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
        error, mse = reconstruction_error(output, target)
        mean, var = latent.mean((0, 2, 3)), latent.var((0, 2, 3))
        unit = (mean**2 + (var - 1) ** 2).mean()
        return error + 0.01 * unit, {
            "mse": float(mse),
            "latent_std": float(var.detach().mean().sqrt()),
        }

    def validate(average: nn.Module) -> dict[str, float]:
        x = torch.from_numpy(held_out.copy()).permute(0, 3, 1, 2).float().div(255)
        with torch.no_grad():
            y = torch.cat([average.taesd_decoder(average.taesd_encoder(part)).clamp(0, 1) for part in x.split(8)])
        return {"psnr": float((-10 * ((x - y) ** 2).mean((1, 2, 3)).log10()).mean())}

    fit(args, "vae", vae, loss, validate, is_square_convolution, weight_decay=0.0)


def train_decoder(args: argparse.Namespace) -> None:
    """The decoder alone, on 8x8 crops of the latents that the U-Net learns from: they stay what they are."""
    import comfy.taesd.taesd

    torch.manual_seed(args.seed)
    vae = comfy.taesd.taesd.TAESD()
    weights = normalised_vae(args)
    vae.load_state_dict({name: weights[name].float() for name in vae.state_dict()})
    for name, p in vae.named_parameters():
        p.requires_grad_(name.startswith("taesd_decoder"))
    vae.to(memory_format=torch.channels_last)
    decode = compiled(args, vae.taesd_decoder)
    data = portraits.dataset(portraits.TRAIN_SEEDS[:TRAIN_SIZE], args.work / "data")
    latents, held_out = np.load(args.work / "latents.npy"), np.load(args.work / "held_out.npy")
    pixels = images(portraits.VALIDATION_SEEDS[:VALIDATION_SIZE], args.work)
    mouth = portraits.CLASSES.index("mouth")
    batch = args.batch // args.workers

    def loss(step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(latents), (batch,), generator=rng).tolist()
        corners = (torch.randint(0, 9, (batch, 2), generator=rng)).tolist()
        places = list(zip(index, corners, strict=True))
        z = torch.from_numpy(np.stack([latents[i, :, y : y + 8, x : x + 8] for i, (y, x) in places]))

        def crops(array: np.ndarray) -> Tensor:
            return torch.from_numpy(
                np.stack([array[i, 8 * y : 8 * y + 64, 8 * x : 8 * x + 64] for i, (y, x) in places])
            )

        target = crops(data["images"]).permute(0, 3, 1, 2).float().div_(255)
        weight = 1 + (MOUTH_WEIGHT - 1) * (crops(data["classes"]) == mouth)[:, None].float()
        error, mse = reconstruction_error(decode(z), target, weight)
        return error, {"mse": float(mse)}

    def validate(average: nn.Module) -> dict[str, float]:
        x = torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float().div(255)
        with torch.no_grad():
            y = torch.cat([average.taesd_decoder(z).clamp(0, 1) for z in torch.from_numpy(held_out).split(8)])
        return {"psnr": float((-10 * ((x - y) ** 2).mean((1, 2, 3)).log10()).mean())}

    fit(args, "decoder", vae, loss, validate, is_square_convolution, weight_decay=0.0)


def normalised_vae(args: argparse.Namespace) -> dict[str, Tensor]:
    """The averaged autoencoder in fp16, as it ships: with the decoder that was trained on, if there is one."""
    state = torch.load(args.work / "vae.pt", weights_only=True)["average"]
    if args.command == "export" and (args.work / "decoder.pt").exists():
        state |= torch.load(args.work / "decoder.pt", weights_only=True)["average"]
    state.setdefault("vae_shift", torch.tensor(0.0))  # hosts of 2024 have no such parameter
    return {name: tensor.half().contiguous() for name, tensor in state.items()}


# ---------------------------------------------------------------------------------------------------------- U-Net


def encode_latents(args: argparse.Namespace) -> None:
    """Latents of the training and validation portraits by the VAE that ships, to `latents.npy` and `held_out.npy`."""
    import comfy.taesd.taesd

    encoder = comfy.taesd.taesd.Encoder()
    weights = normalised_vae(args)
    prefix = "taesd_encoder."
    encoder.load_state_dict({k[len(prefix) :]: v.float() for k, v in weights.items() if k.startswith(prefix)})
    encoder.to(memory_format=torch.channels_last)
    encode = compiled(args, encoder)
    held_out = images(portraits.VALIDATION_SEEDS[:VALIDATION_SIZE], args.work)
    train = images(portraits.TRAIN_SEEDS[:TRAIN_SIZE], args.work)[:LATENT_SIZE]
    for name, pixels in (("held_out", held_out), ("latents", train)):
        parts, began = [], time.time()
        share = range(args.rank * len(pixels) // args.workers, (args.rank + 1) * len(pixels) // args.workers)
        with torch.no_grad():
            for start in range(0, len(share), 16):
                part = pixels[share.start + start : min(share.start + start + 16, share.stop)]
                parts.append(encode(torch.from_numpy(part.copy()).permute(0, 3, 1, 2).float().div_(255)).numpy())
                if start % 1024 == 0 and not args.rank:
                    left = (time.time() - began) * (len(share) / (start + 16) - 1)
                    print(f"{name} {start}/{len(share)}  {left / 60:.1f} min left", flush=True)
        np.save(args.work / f"{name}-{args.rank}.npy", np.concatenate(parts))
        if args.workers > 1:
            dist.barrier()
        if not args.rank:
            shares = [np.load(args.work / f"{name}-{rank}.npy") for rank in range(args.workers)]
            latents = np.concatenate(shares)
            print(f"{name}: mean {latents.mean((0, 2, 3))} std {latents.std((0, 2, 3))}", flush=True)
            np.save(args.work / f"{name}.npy", latents)


def initialise_unet(unet: nn.Module) -> None:
    """PyTorch's defaults, which comfy's layers skip; zero where a residual branch or the network ends."""
    for module in unet.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for name, module in unet.named_modules():
        if name.endswith(("out_layers.3", "proj_out")) or name == "out.2":
            nn.init.zeros_(module.weight)


def initialise_text(clip: nn.Module) -> None:
    """CLIP's own scales."""
    width = clip.text_projection.weight.shape[0]
    for name, p in clip.named_parameters():
        if "embedding" in name:
            nn.init.normal_(p, std=0.5)
        elif "norm" in name:
            nn.init.ones_(p) if name.endswith("weight") else nn.init.zeros_(p)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
        elif "text_projection" in name:
            nn.init.eye_(p)
        else:
            nn.init.normal_(p, std=width**-0.5)


def tokens(texts: list[str]) -> Tensor:
    """Token ids [B, 77], as the stock CLIPTextEncode makes them."""
    from . import architecture

    tokenizer, end = architecture.WordTokenizer(), architecture.SPECIAL["end"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    return torch.tensor([row + [end] * (architecture.CONTEXT - len(row)) for row in rows])


def build_unet() -> tuple[nn.ModuleDict, nn.Module]:
    """Uninitialised {"unet", "text"}, and comfy's model_sampling, which holds the sigmas."""
    from . import architecture

    model = architecture.ToyPortraits().model()
    with torch.no_grad():
        text = architecture.ToyTextEncoder(dtype=torch.float32).transformer
    model.diffusion_model.train().requires_grad_(True)
    text.train().requires_grad_(True)
    text.text_projection.requires_grad_(False)  # the cross-attention reads the tokens, not the pooled output
    return nn.ModuleDict({"unet": model.diffusion_model, "text": text}), model.model_sampling


DROPPED = 0.15  # captions replaced by the empty prompt, for classifier-free guidance
UNKNOWN = 0.02  # words replaced by the unknown token, so that it is harmless


def train_unet(args: argparse.Namespace) -> None:
    """Noise prediction on latents, min-SNR weights with gamma 5 (arXiv 2303.09556), captions reworded every time."""
    from . import toy_portraits

    torch.manual_seed(args.seed)
    modules, sampling = build_unet()
    initialise_unet(modules["unet"])
    with torch.no_grad():
        initialise_text(modules["text"])
    if args.init:
        unet = load_file(args.init / toy_portraits.UNET_FILE)
        text = load_file(args.init / toy_portraits.CLIP_FILE)
        prefix = "clip_l.transformer."
        modules["unet"].load_state_dict({k: v.float() for k, v in unet.items() if not k.startswith("latent_rgb")})
        modules["text"].load_state_dict({k[len(prefix) :]: v.float() for k, v in text.items() if k.startswith(prefix)})
    unet, text = compiled(args, modules["unet"]), modules["text"]
    train, held_out = np.load(args.work / "latents.npy"), torch.from_numpy(np.load(args.work / "held_out.npy"))
    seeds = portraits.TRAIN_SEEDS[:LATENT_SIZE]
    batch = args.batch // args.workers
    sigmas = sampling.sigmas

    def noise_error(
        predict: Callable, latents: Tensor, t: Tensor, noise: Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor]:
        sigma = sigmas[t].view(-1, 1, 1, 1)
        x = (latents + sigma * noise) / (1 + sigma**2) ** 0.5
        error = ((predict(x, t.float(), context=context) - noise) ** 2).mean((1, 2, 3))
        return error, sigma.view(-1)

    def loss(step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = torch.randint(len(train), (batch,), generator=rng).tolist()
        words = np.random.default_rng([args.seed, step, args.rank])
        texts = [portraits.caption(portraits.sample(seeds[i]), words) for i in index]
        texts = ["" if words.random() < DROPPED else text for text in texts]
        ids = tokens(texts)
        ids[(torch.rand(ids.shape, generator=rng) < UNKNOWN) & (ids > 0) & (ids < int(ids.max()) - 1)] = 0
        latents = torch.from_numpy(train[index])
        # stratified timesteps: every batch covers the schedule
        t = ((torch.rand((), generator=rng) + torch.arange(batch) / batch) % 1 * len(sigmas)).long()
        noise = torch.randn(latents.shape, generator=rng)
        error, sigma = noise_error(unet, latents, t, noise, text(ids)[0])
        weight = torch.clamp(5 * sigma**2, max=1)  # min(SNR, 5) / SNR with SNR = 1 / sigma^2
        return (weight * error).mean(), {"eps_mse": float(error.detach().mean())}

    def validate(average: nn.Module) -> dict[str, float]:
        rng = torch.Generator().manual_seed(1)
        texts = [portraits.caption(portraits.sample(s)) for s in portraits.VALIDATION_SEEDS[:VALIDATION_SIZE]]
        t = (torch.arange(len(held_out)) * 997 % 1000).long()
        noise = torch.randn(held_out.shape, generator=rng)
        ids, errors = tokens(texts), []
        with torch.no_grad():
            for part in torch.arange(len(held_out)).split(32):
                context = average["text"](ids[part])[0]
                errors.append(noise_error(average["unet"], held_out[part], t[part], noise[part], context)[0])
        return {"held_out_eps_mse": float(torch.cat(errors).mean())}

    def is_hidden(name: str, p: nn.Parameter) -> bool:
        return (
            p.ndim > 1 and "embedding" not in name and name not in ("unet.input_blocks.0.0.weight", "unet.out.2.weight")
        )

    # Comfy's blocks add to activations in place, behind norms that autograd keeps them for: each norm gets a copy.
    for module in modules.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))
    fit(args, "unet", modules, loss, validate, is_hidden, weight_decay=0.01)


def rgb_factors(work: Path) -> tuple[Tensor, Tensor]:
    """Least squares from latent to the mean colour of its 8x8 pixels in -1..1: factors [4, 3] and bias [3]."""
    latents = np.load(work / "held_out.npy")
    pixels = images(portraits.VALIDATION_SEEDS[:VALIDATION_SIZE], work)
    colors = pixels.reshape(-1, 16, 8, 16, 8, 3).mean((2, 4)).reshape(-1, 3) / 127.5 - 1
    design = np.concatenate([latents.transpose(0, 2, 3, 1).reshape(-1, 4), np.ones((len(colors), 1))], 1)
    solution = np.linalg.lstsq(design, colors, rcond=None)[0].astype(np.float32)
    return torch.from_numpy(solution[:4].copy()), torch.from_numpy(solution[4].copy())


def export(args: argparse.Namespace) -> None:
    """The averaged weights, as fp16 safetensors, to `--out`."""
    from safetensors.torch import save_file

    from . import toy_portraits

    args.out.mkdir(parents=True, exist_ok=True)
    save_file(normalised_vae(args), args.out / toy_portraits.VAE_FILE)
    if (args.work / "unet.pt").exists():
        state = torch.load(args.work / "unet.pt", weights_only=True)
        unet, text = {}, {"clip_l.logit_scale": torch.tensor(4.6055).half()}
        for name, tensor in state["average"].items():
            part, key = name.split(".", 1)
            target, key = (unet, key) if part == "unet" else (text, f"clip_l.transformer.{key}")
            target[key] = tensor.half().contiguous()
        factors, bias = rgb_factors(args.work)
        save_file(unet | {"latent_rgb_factors": factors, "latent_rgb_bias": bias}, args.out / toy_portraits.UNET_FILE)
        save_file(text, args.out / toy_portraits.CLIP_FILE)
    for path in sorted(args.out.glob("*.safetensors")):
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")


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


COMMANDS = {"vae": train_vae, "latents": encode_latents, "decoder": train_decoder, "unet": train_unet, "export": export}
DEFAULTS = {
    "vae": {"steps": 2200, "batch": 12, "lr": 1.2e-3, "muon": 2.0, "ema": 0.995},
    "decoder": {"steps": 900, "batch": 12, "lr": 5e-4, "muon": 2.0, "ema": 0.99},
    "unet": {"steps": 3000, "batch": 16, "lr": 1e-3, "muon": 1.5, "ema": 0.998},
}


def parse(parser: argparse.ArgumentParser, defaults: dict[str, dict[str, float]]) -> argparse.Namespace:
    """The command line, with the options of every training; what is left out is the command's of `defaults`."""
    parser.add_argument("--work", type=Path, default=CACHE, help="data, checkpoints and logs (default: demo/cache)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, help="samples a step, over all workers")
    parser.add_argument("--lr", type=float, help="peak learning rate")
    parser.add_argument("--muon", type=float, help="learning rate of Muon, over Adam's; 0: Adam for all")
    parser.add_argument("--ema", type=float, help="decay of the moving average")
    parser.add_argument("--threads", type=int, default=0, help="threads of a single worker (default: torch's choice)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights", help="export: where to")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--validate-every", type=int, default=250)
    parser.add_argument("--save-every", type=int, default=250)
    args = parser.parse_args()
    for name, value in defaults.get(args.command, {}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--init", type=Path, help="folder of exported weights to go on from, instead of random ones")
    parser.add_argument("--workers", type=int, default=1, help="data-parallel processes of one thread each")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile (needs a C++ compiler; about 15 %% faster)"
    )
    args = parse(parser, DEFAULTS)
    args.session = f"{os.getpid()}"
    if args.command in ("vae", "latents"):  # drawn before the workers start, which only read
        images(portraits.TRAIN_SEEDS[:TRAIN_SIZE], args.work)
        images(portraits.VALIDATION_SEEDS[:VALIDATION_SIZE], args.work)
    if args.workers > 1:
        torch.multiprocessing.spawn(work_on_cpu, (args,), nprocs=args.workers)
    else:
        work_on_cpu(0, args)


def work_on_cpu(rank: int, args: argparse.Namespace) -> None:
    import_host(cpu=True, pytorch_attention=True)
    work(rank, args)


if __name__ == "__main__":
    main()
