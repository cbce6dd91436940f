"""Trains the networks that the losses look through, and the judge, on portraits alone. From the root:

    python -m demo.train_encoders clip   --work DIR      # open_clip: two towers, open_clip's own tokenizer
    python -m demo.train_encoders seg    --work DIR      # SegFormer (transformers)
    python -m demo.train_encoders face   --work DIR      # timm network, trained to tell identities apart
    python -m demo.train_encoders robust_clip --work DIR # the two above, trained on against the worst pixels nearby
    python -m demo.train_encoders robust_face --work DIR
    python -m demo.train_encoders judge  --work DIR      # what the results are measured with, demo/judge.py
    python -m demo.train_encoders export --work DIR      # demo/weights: folders that the loader nodes load, the judge
    python -m demo.train_encoders card   --work DIR      # the figures of MODEL_CARD.md, on portraits never seen

Runs resume like those of `demo.train`. The networks see softened portraits (blur and noise of random strength), since
they will judge estimates in the middle of sampling.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import multiprocessing
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from . import judge, portraits
from .evaluate import mentioned, soften
from .judge import to_tensor
from .train import fit, parse

SIZE = 16384
"""Portraits of TRAIN_SEEDS that the open_clip model and the SegFormer learn from."""
TEST = 512
UNSEEN = 1_000_000
"""The first identity that the verification test draws, far from those of the training."""
FACE_SIZE = 96

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 64, "layers": 4, "head_width": 32, "mlp_ratio": 4.0},
        "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 40, "heads": 2, "layers": 3},
    },
    "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "squash"},
}
SEGFORMER = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 32, 48, 64],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 64,
    "drop_path_rate": 0.0,
    "classifier_dropout_prob": 0.0,
}
FACE_MODEL = "test_efficientnet"


def portraits_of(seeds: range, work: Path) -> dict[str, np.ndarray]:
    return portraits.dataset(seeds, work / "data")


def normalised(x: Tensor) -> Tensor:
    return (x - MEAN[0]) / STD[0]


def shrunk(x: Tensor, size: int) -> Tensor:
    return F.interpolate(x, size=(size, size), mode="bicubic", antialias=True)


def cutout(x: Tensor, rng: torch.Generator, smallest: float = 0.7) -> Tensor:
    """One square of a random size and place, the same for the whole batch."""
    side = int(x.shape[-1] * (smallest + (1 - smallest) * float(torch.rand((), generator=rng))))
    top, left = (int(torch.randint(0, x.shape[-1] - side + 1, (), generator=rng)) for _ in range(2))
    return x[..., top : top + side, left : left + side]


def worst(x: Tensor, radius: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Images [B, 3, H, W] in 0..1 moved uphill of `loss` by at most `radius` [B, 1, 1, 1] in L2: two projected steps.

    What a network learns from these has gradients that change what people see (Santurkar et al., arXiv 1906.09453);
    without, guidance finds pixels that please the network alone.
    """
    moved = x
    for _ in range(2):
        moved = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(moved), moved)
        away = moved.detach() - x + radius * gradient / _norm(gradient)
        moved = (x + away * (radius / _norm(away)).clamp(max=1)).clamp(0, 1)
    return moved.detach()


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(-1, 1, 1, 1)


def draws(step_generator: torch.Generator, count: int, batch: int) -> np.ndarray:
    return np.sort(torch.randint(count, (batch,), generator=step_generator).numpy())


# ------------------------------------------------------------------------------------------------------- open_clip


def described(text: str, portrait: portraits.Portrait, labels: np.ndarray) -> np.ndarray:
    """Which of the portraits with `labels` [N, attributes] the caption `text` of `portrait` is true of, [N] of bool."""
    truth = portraits.labels(portrait)
    fits = np.ones(len(labels), bool)
    for column, name in enumerate(portraits.ATTRIBUTES):
        if name not in mentioned(text, portrait):
            continue
        if name == "glasses" and truth[name] and f"{portrait.glasses} glasses" not in text:
            fits &= labels[:, column] > 0
        else:
            fits &= labels[:, column] == truth[name]
    return fits


def build_clip() -> nn.Module:
    import open_clip

    return open_clip.CLIP(**CLIP_CONFIG["model_cfg"], output_dict=False)


def tokenise(texts: list[str]) -> Tensor:
    import open_clip

    return open_clip.SimpleTokenizer(context_length=CLIP_CONFIG["model_cfg"]["text_cfg"]["context_length"])(texts)


@torch.no_grad()
def zero_shot(clip: nn.Module, images: Tensor, labels: np.ndarray) -> dict[str, float]:
    """The share of image embeddings [N, D] nearest to the short text of their own attribute, by attribute."""
    texts = {
        "hair_color": "a person with {} hair",
        "glasses": "a person with {} glasses",
        "clothes": "{} clothes",
        "background": "{} background",
    }
    found = {}
    for name, text in texts.items():
        words = [text.format(value).replace("with none", "without") for value in portraits.ATTRIBUTES[name]]
        nearest = (images @ clip.encode_text(tokenise(words), normalize=True).T).argmax(1).numpy()
        found[name] = float((nearest == labels[:, list(portraits.ATTRIBUTES).index(name)]).mean())
    return found


def other_captions(
    portrait: portraits.Portrait, words: np.random.Generator, count: int
) -> tuple[list[str], np.ndarray]:
    """A caption of the portrait, and `count` more in the same words but for one attribute; which of those are wrong."""
    state, text = words.bit_generator.state, portraits.caption(portrait, words)
    after, texts, wrong = words.bit_generator.state, [text], []
    said = sorted(mentioned(text, portrait))
    for _ in range(count):
        words.bit_generator.state = after
        name = said[int(words.integers(len(said)))] if said else "background"
        value = portraits.ATTRIBUTES[name][int(words.integers(len(portraits.ATTRIBUTES[name])))]
        after, words.bit_generator.state = words.bit_generator.state, state
        texts.append(portraits.caption(dataclasses.replace(portrait, **{name: value}), words))
        wrong.append(texts[-1] != text and value != getattr(portrait, name) and name in said)
    words.bit_generator.state = after
    return texts, np.array(wrong)


def train_clip(args: argparse.Namespace, robust: float = 0.0) -> None:
    """Contrastive, with as many right answers as there are: a short caption is true of several portraits of a batch.

    With `robust`, the radius of `worst` at most, it goes on from `clip.pt`, and each portrait also has to tell its
    caption from others that are wrong in one attribute (Yuksekgonul et al., arXiv 2210.01936): without those it learns
    which words occur and not what they are said of, and guidance paints everything in the colour of the hair.
    """
    torch.manual_seed(args.seed)
    model = averaged(args, "clip", build_clip()) if robust else build_clip()
    size = CLIP_CONFIG["model_cfg"]["vision_cfg"]["image_size"]
    seeds = portraits.TRAIN_SEEDS[:SIZE]
    data, held_out = portraits_of(seeds, args.work), portraits_of(portraits.VALIDATION_SEEDS[:256], args.work)
    people = [portraits.sample(seed) for seed in portraits.VALIDATION_SEEDS[:256]]
    full = tokenise([portraits.caption(person) for person in people])
    batch = args.batch // args.workers
    wrong_captions = 6 if robust else 0

    def agreement(x: Tensor, text: Tensor, wanted: Tensor, wrong: Tensor) -> Tensor:
        images, scale = model.encode_image(normalised(x), normalize=True), model.logit_scale.exp()
        text = text.unflatten(0, (len(x), -1))
        logits = scale * images @ text[:, 0].T
        rows = -(wanted / wanted.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
        columns = -(wanted / wanted.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
        own = scale * (images[:, None] * text).sum(-1)  # the right caption, and those wrong in one attribute
        own = torch.cat([own[:, :1], own[:, 1:].masked_fill(~wrong, -torch.inf)], 1)
        return (rows + columns) / 2 - own.log_softmax(1)[:, 0].mean()

    def loss(step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = draws(rng, len(seeds), batch)
        words = np.random.default_rng([args.seed, step, args.rank])
        people = [portraits.sample(seeds[i]) for i in index]
        texts, wrong = zip(*(other_captions(person, words, wrong_captions) for person in people), strict=True)
        labels = data["labels"][index]
        fits = [described(text[0], person, labels) for text, person in zip(texts, people, strict=True)]
        wanted, wrong = torch.from_numpy(np.stack(fits, 1)).float(), torch.from_numpy(np.stack(wrong)).bool()
        x = soften(to_tensor(data["images"][index]), rng)
        x = shrunk(cutout(x, rng), size)
        text = model.encode_text(tokenise([text for group in texts for text in group]), normalize=True)
        if robust:
            radius = robust * torch.rand(len(x), 1, 1, 1, generator=rng)
            x = worst(x, radius, lambda moved: agreement(moved, text.detach(), wanted, wrong))
        return agreement(x, text, wanted, wrong), {"scale": float(model.logit_scale.detach().exp())}

    def validate(average: nn.Module) -> dict[str, float]:
        average.eval()
        with torch.no_grad():
            images = average.encode_image(normalised(shrunk(to_tensor(held_out["images"]), size)), normalize=True)
            text = average.encode_text(full, normalize=True)
            right = zero_shot(average, images, held_out["labels"])
        return {"top1_of_256": float(((images @ text.T).argmax(1) == torch.arange(256)).float().mean())} | right

    def is_hidden(name: str, p: nn.Parameter) -> bool:
        return p.ndim == 2 and "embedding" not in name and "proj" not in name.split(".")[-1]

    fit(args, "robust_clip" if robust else "clip", model, loss, validate, is_hidden, weight_decay=0.02)


# --------------------------------------------------------------------------------------------------- segmentation


def build_segformer() -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    names = dict(enumerate(portraits.CLASSES))
    return SegformerForSemanticSegmentation(
        SegformerConfig(**SEGFORMER, id2label=names, label2id={name: i for i, name in names.items()})
    )


def class_logits(model: nn.Module, x: Tensor) -> Tensor:
    """[B, classes, 128, 128] of images [B, 3, 128, 128] in 0..1."""
    return F.interpolate(model(normalised(x)).logits, size=x.shape[-2:], mode="bilinear")


def train_segmenter(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = build_segformer()
    seeds = portraits.TRAIN_SEEDS[:SIZE]
    data, held_out = portraits_of(seeds, args.work), portraits_of(portraits.VALIDATION_SEEDS[:256], args.work)
    batch = args.batch // args.workers

    def loss(step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = draws(rng, len(seeds), batch)
        logits = class_logits(model, soften(to_tensor(data["images"][index]), rng))
        return F.cross_entropy(logits, torch.from_numpy(data["classes"][index].astype(np.int64))), {}

    def validate(average: nn.Module) -> dict[str, float]:
        average.eval()
        with torch.no_grad():
            parts = to_tensor(held_out["images"][:64]).split(16)
            predicted = torch.cat([class_logits(average, part).argmax(1) for part in parts])
        return {"miou": judge.mean_iou(predicted.numpy(), held_out["classes"][:64])["mean"]}

    fit(args, "seg", model, loss, validate, lambda name, p: p.ndim == 2, weight_decay=0.01)


# ------------------------------------------------------------------------------------------------------------ face


def traits(seeds: Iterable[int]) -> Tensor:
    """What makes these people, [N, 17]: the geometry of the face, and the colours of skin and eyes, standardised.

    A network that tells these is one that tells people apart, after far fewer pictures than one that learns it from
    names.
    """
    mean, std = _moments()
    return torch.from_numpy((_raw_traits(seeds) - mean) / std).float()


def _raw_traits(seeds: Iterable[int]) -> np.ndarray:
    rows = []
    for seed in seeds:
        who = dataclasses.asdict(portraits.sample_identity(seed))
        skin, eyes = np.mean(portraits.SKINS[who.pop("skin")]), portraits.EYES[who.pop("eyes")]
        rows.append([*who.values(), skin, *eyes])
    return np.array(rows)


@functools.cache
def _moments() -> tuple[np.ndarray, np.ndarray]:
    raw = _raw_traits(range(10_000_000, 10_004_096))
    return raw.mean(0), raw.std(0)


def build_face() -> nn.Module:
    import timm

    return timm.create_model(FACE_MODEL, num_classes=judge.TRAITS)


def face_crop(x: Tensor, rng: torch.Generator | None = None) -> Tensor:
    """The face [B, 3, 96, 96] of portraits [B, 3, 128, 128]; with `rng` the box moves a little."""
    left, top, right, bottom = (share * portraits.SIZE for share in portraits.FACE_BOX)
    shift = (torch.rand(4, generator=rng) * 8 - 4).tolist() if rng is not None else [0.0] * 4
    rows = slice(round(top + shift[0]), round(bottom + shift[1]))
    columns = slice(round(left + shift[2]), round(right + shift[3]))
    return shrunk(x[..., rows, columns], FACE_SIZE)


def view(identity: int, number: int) -> np.ndarray:
    """Picture `number` of a person: everything but the identity differs."""
    return portraits.render(portraits.sample(identity * 1000 + number, identity=identity))


def views(first: int, identities: int, count: int, work: Path) -> np.ndarray:
    """uint8 [identities, count, 128, 128, 3], drawn once."""
    path = work / "data" / f"faces-{first}-{identities}x{count}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with multiprocessing.get_context("spawn").Pool() as pool:
            people = ((first + i, number) for i in range(identities) for number in range(count))
            pictures = pool.starmap(view, people, chunksize=64)
        np.save(path, np.stack(pictures).reshape(identities, count, portraits.SIZE, portraits.SIZE, 3))
    return np.load(path, mmap_mode="r")


def train_face(args: argparse.Namespace, robust: float = 0.0) -> None:
    """With `robust`, the radius of `worst` at most, it goes on from `face.pt`."""
    torch.manual_seed(args.seed)
    model = averaged(args, "face", build_face()).train() if robust else build_face()
    seeds = portraits.TRAIN_SEEDS[:SIZE]
    data, unseen = portraits_of(seeds, args.work), views(UNSEEN, 64, 4, args.work)
    truth = traits(seeds)

    def loss(step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = draws(rng, len(seeds), args.batch)
        x = face_crop(soften(to_tensor(data["images"][index]), rng), rng)
        if robust:
            radius = robust * torch.rand(len(x), 1, 1, 1, generator=rng)
            x = worst(x, radius, lambda moved: F.mse_loss(model(normalised(moved)), truth[index]))
        return F.mse_loss(model(normalised(x)), truth[index]), {}

    def validate(average: nn.Module) -> dict[str, float]:
        average.eval()
        return {"auc": verification(face_embedding(average), unseen)["auc"]}

    fit(
        args,
        "robust_face" if robust else "face",
        model,
        loss,
        validate,
        lambda name, p: p.ndim == 4 and p.shape[1] > 3,
        weight_decay=0.01,
    )


@torch.no_grad()
def verification(embed: Callable[[Tensor], Tensor], pictures: np.ndarray) -> dict[str, float]:
    """How well embeddings of portraits [B, 3, 128, 128] tell people apart: `pictures` [identities, views, …]."""
    people, count = pictures.shape[:2]
    x = to_tensor(np.asarray(pictures).reshape(-1, *pictures.shape[2:]))
    embeddings = torch.cat([embed(part) for part in x.split(64)])
    return judge.verification(embeddings, torch.arange(people).repeat_interleave(count))


def face_embedding(encoder: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: encoder(normalised(face_crop(x)))


# ----------------------------------------------------------------------------------------------------------- judge


def train_judge(args: argparse.Namespace) -> None:
    """Attributes, classes and identities at once."""
    torch.manual_seed(args.seed + 1)
    model = judge.Judge()
    seeds = portraits.EVALUATOR_SEEDS[:8192]
    data, held_out = portraits_of(seeds, args.work), portraits_of(portraits.VALIDATION_SEEDS[:256], args.work)
    unseen, people = views(UNSEEN, 64, 4, args.work), traits(seeds)

    def loss(step: int, rng: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        index = draws(rng, len(seeds), args.batch)
        verdict = model(soften(to_tensor(data["images"][index]), rng))
        truth = torch.from_numpy(data["labels"][index].astype(np.int64))
        attributes = sum(F.cross_entropy(logits, truth[:, i]) for i, logits in enumerate(verdict.attributes))
        classes = torch.from_numpy(data["classes"][index, 1::2, 1::2].astype(np.int64))
        identity = F.mse_loss(verdict.identity, people[index])
        return attributes + 4 * F.cross_entropy(verdict.classes, classes) + 4 * identity, {
            "traits": float(identity.detach())
        }

    def validate(average: nn.Module) -> dict[str, float]:
        average.eval()
        verdict = average.of(to_tensor(held_out["images"]))
        right = verdict.labels == held_out["labels"]
        return {
            "attributes": float(right.mean()),
            "worst": float(right.mean(0).min()),
            "miou": judge.mean_iou(verdict.class_map, held_out["classes"])["mean"],
            "auc": verification(lambda x: average(x).identity, unseen)["auc"],
        }

    fit(args, "judge", model, loss, validate, lambda name, p: p.ndim == 4 and p.shape[1] > 3, weight_decay=0.02)


# ---------------------------------------------------------------------------------------------------- export, card


def averaged(args: argparse.Namespace, name: str, model: nn.Module) -> nn.Module:
    model.load_state_dict(torch.load(args.work / f"{name}.pt", weights_only=True)["average"])
    return model.eval()


def half(model: nn.Module) -> dict[str, Tensor]:
    """fp16, but for integers."""
    return {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }


def export_clip(args: argparse.Namespace, folder: Path) -> None:
    clip = averaged(args, "robust_clip", build_clip())
    used = tokenise([portraits.caption(portraits.sample(s), np.random.default_rng(s)) for s in range(20_000)]).unique()
    table = clip.token_embedding.weight
    with torch.no_grad():
        table[[i for i in range(len(table)) if i not in set(used.tolist())]] = 0  # words that it never saw say nothing
    # Nearly all of the file is the table of words, most of them unused: 8 bits are enough for the others.
    words = {"token_embedding.weight": table.detach().to(torch.float8_e4m3fn)}
    save_file(half(clip) | words, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(CLIP_CONFIG, indent=1) + "\n")


def export_segmenter(args: argparse.Namespace, folder: Path) -> None:
    segformer = averaged(args, "seg", build_segformer()).half()
    segformer.config.palette = [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in portraits.CLASS_COLORS]
    segformer.save_pretrained(folder)
    size = {"height": portraits.SIZE, "width": portraits.SIZE}
    preprocessor = {
        "image_processor_type": "SegformerImageProcessor",
        "size": size,
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=1) + "\n")


def export_face(args: argparse.Namespace, folder: Path) -> None:
    face = averaged(args, "robust_face", build_face())
    save_file(half(face), folder / "model.safetensors")
    config = {
        "architecture": FACE_MODEL,
        "num_classes": judge.TRAITS,
        "num_features": face.num_features,
        "pretrained_cfg": {
            "input_size": [3, FACE_SIZE, FACE_SIZE],
            "mean": MEAN,
            "std": STD,
            "interpolation": "bicubic",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def export_judge(args: argparse.Namespace, folder: Path) -> None:
    save_file(half(averaged(args, "judge", judge.Judge())), folder / judge.FILE)


def export(args: argparse.Namespace) -> None:
    """What is trained, as the folders that the loader nodes read (models/open_clip and its like), and the judge."""
    for name, write, place in (
        ("robust_clip", export_clip, "open_clip/toy_portraits"),
        ("seg", export_segmenter, "segmentation/toy_portraits"),
        ("robust_face", export_face, "face_encoders/toy_portraits"),
        ("judge", export_judge, "."),
    ):
        if (args.work / f"{name}.pt").exists():
            folder = args.out / place
            folder.mkdir(parents=True, exist_ok=True)
            write(args, folder)
    for path in sorted(args.out.glob("**/*.safetensors")):
        print(f"{path}  {path.stat().st_size / 1e6:.2f} MB")


@torch.no_grad()
def card(args: argparse.Namespace) -> None:
    """Retrieval, mIoU and verification on portraits and identities that nothing was trained on."""
    seeds = portraits.TEST_SEEDS[:TEST]
    data = portraits_of(seeds, args.work)
    clip = averaged(args, "robust_clip", build_clip())
    x = to_tensor(data["images"])
    size = CLIP_CONFIG["model_cfg"]["vision_cfg"]["image_size"]
    images = torch.cat([clip.encode_image(normalised(shrunk(part, size)), normalize=True) for part in x.split(64)])
    text = clip.encode_text(tokenise([portraits.caption(portraits.sample(seed)) for seed in seeds]), normalize=True)
    order = (images @ text.T).argsort(1, descending=True)
    rank = (order == torch.arange(len(order))[:, None]).float().argmax(1)
    segformer = averaged(args, "seg", build_segformer())
    predicted = torch.cat([class_logits(segformer, part).argmax(1) for part in x.split(16)])
    people = views(UNSEEN + 64, 200, 5, args.work)
    report = {
        "n": TEST,
        "retrieval": {f"top{k}": float((rank < k).float().mean()) for k in (1, 5)} | {"chance": 1 / TEST},
        "iou": judge.mean_iou(predicted.numpy(), data["classes"]),
        "verification": verification(face_embedding(averaged(args, "robust_face", build_face())), people),
    }
    verdict = (judging := averaged(args, "judge", judge.Judge())).of(x)
    right = (verdict.labels == data["labels"]).mean(0)
    report["judge"] = {
        "attributes": dict(zip(portraits.ATTRIBUTES, map(float, right), strict=True)),
        "iou": judge.mean_iou(verdict.class_map, data["classes"]),
        "verification": verification(lambda x: judging(x).identity, people),
    }
    (args.work / "encoders.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


COMMANDS = {
    "clip": train_clip,
    "seg": train_segmenter,
    "face": train_face,
    "robust_clip": functools.partial(train_clip, robust=1.0),
    "robust_face": functools.partial(train_face, robust=1.5),
    "judge": train_judge,
    "export": export,
    "card": card,
}
DEFAULTS = {
    "clip": {"steps": 2000, "batch": 64, "lr": 1e-3, "muon": 1.0, "ema": 0.998},
    "seg": {"steps": 1500, "batch": 16, "lr": 2e-3, "muon": 0.0, "ema": 0.995},
    "face": {"steps": 2000, "batch": 64, "lr": 2e-3, "muon": 0.0, "ema": 0.995},
    "robust_clip": {"steps": 2400, "batch": 64, "lr": 1e-3, "muon": 1.0, "ema": 0.995},
    "robust_face": {"steps": 2200, "batch": 64, "lr": 1e-3, "muon": 0.0, "ema": 0.995},
    "judge": {"steps": 1500, "batch": 32, "lr": 2e-3, "muon": 0.5, "ema": 0.995},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    args = parse(parser, DEFAULTS)
    args.rank, args.workers = 0, 1
    if args.threads:
        torch.set_num_threads(args.threads)
    COMMANDS[args.command](args)


if __name__ == "__main__":
    main()
