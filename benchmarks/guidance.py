"""What guidance by networks achieves, and what it costs in quality: DSG beside DPS, FreeDoM, TFG and DiffRGD.

    python quickstart.py bench guidance [--quick] [--json FILE] [--tasks text face] [--methods DSG] [--strengths .1 .2]

Each sample has a target of its own: the caption, the class map, the style or the face of a test portrait, so that what
is drawn spreads like the portraits do, and the Fréchet distance to them means quality. The prompt is empty, and all
cells share their seeds. Losses are those of the nodes, at the nodes' own defaults. `success` is

    text          the share of the caption's attributes that the judge finds
    segmentation  mean intersection over union with the map
    style         the distance of Gram matrices in the judge's features: lower is better
    face          the share that the judge takes for the target's person, at a false acceptance rate of 1 %

with a 95 % interval of the bootstrap. `score` is one figure a sample, higher for better: the success, less the distance
for style, and for a face the cosine of the identities that the threshold cuts. The row of strength 0 is unguided;
`strength` is guidance_rate of DSG Guidance, auto_strength of the same (DSG auto), step_size of DPS Guidance, rho of TFG
Guidance with its preset FreeDoM, rho and mu of the same with its own (TFG), and step_size of DiffRGD Guidance. All take
as many model calls (`nfe`), of which a step of DiffRGD takes four. Guidance decodes in bfloat16, which takes half of
the time; the pictures that are judged are decoded in float32. `frechet` is larger for few samples: compare with as many
real portraits (`originals`).
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "benchmarks")]
from bootstrap import import_host, import_pack  # noqa: E402

import_host(cpu=False, pytorch_attention=True)
import_pack()

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from judged import DESCENTS, fast_vae, originals, originals_row, real_features, steps_of  # noqa: E402
from processes import processes  # noqa: E402
from result import Result, interval, save  # noqa: E402
from sphereguide import host  # noqa: E402
from sphereguide.demo import judge as judging  # noqa: E402
from sphereguide.demo import portraits, toy_portraits  # noqa: E402
from sphereguide.losses.base import Loss, Step  # noqa: E402
from sphereguide.nodes.clip import CLIPTextLoss, LoadOpenCLIP  # noqa: E402
from sphereguide.nodes.face import FaceIDLoss, LoadFaceEncoder  # noqa: E402
from sphereguide.nodes.guidance import DPSGuidance, DSGGuidance  # noqa: E402
from sphereguide.nodes.segmentation import LoadSegmentationModel, SegmentationLoss  # noqa: E402
from sphereguide.nodes.style import StyleGramLoss  # noqa: E402
from sphereguide.nodes.successors import DiffRGDGuidance, TFGGuidance  # noqa: E402
from torch import Tensor  # noqa: E402

TOY = "toy_portraits/"
CHUNK = 16  # samples of a batch
UNSEEN = range(1_001_000, 1_001_300)  # people of whom the judge's threshold is taken
FACE_BOX = dict(zip(("box_left", "box_top", "box_right", "box_bottom"), portraits.FACE_BOX, strict=True))
MENTIONED = ("hair_color", "glasses", "background", "clothes")


class PerSample(Loss):
    """A loss of its own for each sample."""

    def __init__(self, losses: list[Loss]) -> None:
        super().__init__()
        self.losses = torch.nn.ModuleList(losses)
        self.patchers = losses[0].patchers

    def forward(self, images: Tensor, step: Step | None = None) -> Tensor:
        return torch.cat([loss(images[i : i + 1], step) for i, loss in enumerate(self.losses)])


def defaults(node: type, **given: Any) -> dict[str, Any]:
    """The widgets of a node, as the page has them when it is dropped there, with those that are `given`."""
    values = {}
    for name, (kind, *options) in node.INPUT_TYPES()["required"].items():
        if isinstance(kind, list):
            values[name] = kind[0]
        elif options and "default" in options[0]:
            values[name] = options[0]["default"]
    return values | given


def image(seed: int) -> Tensor:
    """A portrait as an IMAGE, [1, 128, 128, 3]."""
    return torch.from_numpy(portraits.render(seed))[None].float() / 255


class Tasks:
    """The losses of the targets `seeds`, by task, and their scores. Networks are loaded once, when they are needed."""

    def __init__(self, judge: judging.Judge) -> None:
        self.judge = judge

    @functools.cached_property
    def clip(self) -> Any:
        with torch.inference_mode():
            return LoadOpenCLIP().load(TOY, "fp32")[0]

    @functools.cached_property
    def segmenter(self) -> Any:
        with torch.inference_mode():
            return LoadSegmentationModel().load(TOY)[0]

    @functools.cached_property
    def face_encoder(self) -> Any:
        with torch.inference_mode():
            return LoadFaceEncoder().load(TOY, "output")[0]

    @functools.cached_property
    def verification(self) -> dict[str, float]:
        """The judge's own, of people that nothing has seen: its threshold is what a sample has to pass."""
        people = [portraits.sample(who * 10 + view, identity=who) for who in UNSEEN for view in (0, 1)]
        seen = self.judge.of(originals(people)).identity
        return judging.verification(seen, torch.arange(len(UNSEEN)).repeat_interleave(2))

    @staticmethod
    def caption(seed: int) -> str:
        p = portraits.sample(seed)
        glasses = "without glasses" if p.glasses == "none" else f"wearing {p.glasses} glasses"
        return f"a person with {p.hair_color} hair, {glasses}, {p.clothes} clothes, {p.background} background"

    def text(self, seeds: list[int]) -> Loss:
        widgets = defaults(CLIPTextLoss, open_clip_model=self.clip)
        return PerSample([CLIPTextLoss().make(**widgets | {"text": self.caption(seed)})[0] for seed in seeds])

    def segmentation(self, seeds: list[int]) -> Loss:
        colors = torch.tensor(portraits.CLASS_COLORS)
        maps = torch.stack([colors[torch.from_numpy(portraits.segment(seed)).long()] for seed in seeds]).float() / 255
        widgets = defaults(SegmentationLoss, segmentation_model=self.segmenter)
        return SegmentationLoss().make(**widgets, color_map=maps)[0]

    def style(self, seeds: list[int]) -> Loss:
        widgets = defaults(StyleGramLoss, open_clip_model=self.clip)
        return PerSample([StyleGramLoss().make(**widgets | {"style": image(seed)})[0] for seed in seeds])

    def face(self, seeds: list[int]) -> Loss:
        given = {"face_encoder": self.face_encoder, "references": "one per sample", "crop": "fixed box", **FACE_BOX}
        widgets = defaults(FaceIDLoss) | given
        return FaceIDLoss().make(**widgets, image=torch.cat([image(seed) for seed in seeds]))[0]

    def score(self, task: str, verdict: judging.Verdict, seeds: list[int]) -> np.ndarray:
        """`[N]`, higher for better."""
        if task == "text":
            truth = np.array([list(portraits.labels(portraits.sample(seed)).values()) for seed in seeds])
            columns = [list(portraits.ATTRIBUTES).index(name) for name in MENTIONED]
            return (verdict.labels == truth)[:, columns].mean(1)
        if task == "segmentation":
            pairs = zip(verdict.class_map, (portraits.segment(seed) for seed in seeds), strict=True)
            return np.array([judging.mean_iou(classes, truth)["mean"] for classes, truth in pairs])
        wanted = self.judge.of(originals(seeds))
        if task == "style":
            return -judging.gram_distance(verdict, wanted).numpy()
        return torch.nn.functional.cosine_similarity(verdict.identity, wanted.identity).numpy()

    def success(self, task: str, score: np.ndarray) -> np.ndarray:
        """`[N]`, of what `score` gave."""
        if task == "face":
            return (score > self.verification["threshold"]).astype(float)
        return -score if task == "style" else score


#: Each method's node, what its strength sets, and what else is set.
METHODS: dict[str, tuple[type, tuple[str, ...], dict[str, Any]]] = {
    "DSG": (DSGGuidance, ("guidance_rate",), {}),
    "DSG auto": (DSGGuidance, ("auto_strength",), {}),
    "DPS": (DPSGuidance, ("step_size",), {}),
    "FreeDoM": (TFGGuidance, ("rho",), {"preset": "FreeDoM"}),
    "TFG": (TFGGuidance, ("rho", "mu"), {}),
    "DiffRGD": (DiffRGDGuidance, ("step_size",), {"iterations": DESCENTS}),
}
OFTEN = {
    "DSG": (0.1, 0.2, 0.3, 0.4),
    "DSG auto": (1.0,),
    "DPS": (4.0, 16.0, 64.0),
    "FreeDoM": (16.0, 64.0, 256.0),
    "TFG": (16.0,),
    "DiffRGD": (5.0, 25.0, 125.0),
}
#: About the best, of 1, 4, 16 and 64 with eight samples (DiffRGD: of 1, 5, 25 and 125); TFG takes longest, and has one.
STRENGTHS: dict[str, dict[str, tuple[float, ...]]] = {
    "text": OFTEN,
    "segmentation": OFTEN,
    "style": {**OFTEN, "TFG": (64.0,)},
    "face": {**OFTEN, "DPS": (1.0, 4.0, 16.0), "FreeDoM": (4.0, 16.0, 64.0), "TFG": (4.0,)},
}


@functools.cache
def loaded() -> tuple[Any, Any, Any, Any]:
    """MODEL, the empty prompt, a VAE in float32, and one in bfloat16. As nodes would do it: in inference mode."""
    with torch.inference_mode():
        model, clip, exact = toy_portraits.load()
        return model, host.encoded(clip, ""), exact, fast_vae()


@functools.cache
def tasks() -> Tasks:
    return Tasks(judging.load(toy_portraits.WEIGHTS))


def chunk(task: str | None, method: str, strength: float, steps: int, seeds: list[int], start: int) -> Tensor:
    """Pictures `[CHUNK, 3, 128, 128]` by euler_ancestral, steered to the targets `seeds`, as the nodes would do it."""
    model, empty, exact, fast = loaded()
    with torch.inference_mode():
        sampler = comfy.samplers.ksampler("euler_ancestral")
        if task is not None:
            node, names, given = METHODS[method]
            settings = defaults(node, **given | dict.fromkeys(names, strength))
            sampler, _ = node().guide(sampler=sampler, loss=getattr(tasks(), task)(seeds), vae=fast, **settings)
        latent = torch.zeros(len(seeds), 4, 16, 16)
        noise = comfy.sample.prepare_noise(latent, start)
        sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "normal", steps)
        out = comfy.sample.sample_custom(
            model, noise, 1.0, sampler, sigmas, empty, empty, latent, disable_pbar=True, seed=start
        )
        return exact.decode(out).movedim(-1, 1).clone()


def drawn(pool: Any, task: str | None, method: str, strength: float, steps: int, seeds: list[int]) -> Tensor:
    """Pictures `[N, 3, 128, 128]`."""
    starts = range(0, len(seeds), CHUNK)
    jobs = [pool.submit(chunk, task, method, strength, steps, seeds[at : at + CHUNK], at) for at in starts]
    return torch.cat([job.result() for job in jobs])


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """What is achieved over what it costs, a line a method, along its strengths."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if "task" in row]
    names = list(dict.fromkeys(row["task"] for row in rows))
    figure = Figure(figsize=(4 * len(names), 3.6), dpi=80, layout="constrained")
    for column, task in enumerate(names):
        axes = figure.add_subplot(1, len(names), 1 + column)
        of_task = sorted((row for row in rows if row["task"] == task), key=lambda row: row["strength"])
        for color, method in enumerate(METHODS):
            line = [row for row in of_task if row["method"] in ("unguided", method)]
            x, y = zip(*((row["frechet"], row["success"]) for row in line), strict=True)
            low, high = np.abs(np.transpose([row["interval"] for row in line]) - np.array(y))
            axes.errorbar(x, y, (low, high), marker="o", markersize=3, color=f"C{color}", label=method, elinewidth=0.5)
            for row in line[1:]:
                axes.annotate(f"{row['strength']:g}", (row["frechet"], row["success"]), fontsize=6, color=f"C{color}")
        axes.set(title=f"{task}: {SUCCESS[task]}", xlabel="Fréchet distance")
        axes.grid(alpha=0.3)
        if task == names[0]:
            axes.legend(fontsize=7, loc="lower right")
    save(figure, path)


SUCCESS = {"text": "attributes found", "segmentation": "mIoU", "style": "Gram distance", "face": "verified, FAR 1 %"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8 samples at 10 steps, one task: shows that it runs")
    parser.add_argument("--json", type=Path, help="where to write the rows; a plot goes beside it")
    parser.add_argument("--tasks", nargs="+", choices=SUCCESS, default=list(SUCCESS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--strengths", nargs="+", type=float, help="default: some for each task and method")
    parser.add_argument("--nfe", type=int, help="model calls")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--save", type=Path, help="a folder for the pictures of each cell")
    options = parser.parse_args()
    if options.quick:
        options.tasks, options.methods = options.tasks[:1], ["DSG", "DPS"]
    nfe, count = options.nfe or (10 if options.quick else 50), options.samples or (8 if options.quick else 64)
    seeds = list(portraits.TEST_SEEDS[:count])
    settings = {"sampler": "euler_ancestral", "scheduler": "normal", "cfg": 1.0, "nfe": nfe, "n": count}
    result = Result("guidance", settings, options.json, options.quick)
    real = real_features(1000, options.quick)
    originals_row(result, seeds, real)
    print(f"{'task':14}{'method':10}{'strength':>9}{'success':>9}{'interval':>18}{'frechet':>9}")
    with processes(options.quick) as pool:
        unguided = functools.cache(lambda: drawn(pool, None, "", 0.0, nfe, seeds))
        for task in options.tasks:
            cells = [("unguided", 0.0)]
            for method in options.methods:
                strengths = options.strengths or STRENGTHS[task][method][: 1 if options.quick else None]
                cells += [(method, strength) for strength in strengths]
            for method, strength in cells:
                steps = steps_of(method, nfe)
                cell = {"task": task, "method": method, "steps": steps, "strength": strength}
                row = result.find(cell)
                if row is None:
                    guided = method in METHODS
                    made = drawn(pool, task, method, strength, steps, seeds) if guided else unguided()
                    row = measured(cell, made, seeds, real)
                    result.add(row)
                    if options.save:
                        options.save.mkdir(parents=True, exist_ok=True)
                        grid = (made[:64].movedim(1, -1).clamp(0, 1) * 255).round().byte().numpy()
                        portraits.contact_sheet(grid).save(options.save / f"{task}_{method}_{strength:g}.png")
                low, high = row["interval"]
                found = f"{row['success']:9.3f}{low:9.3f} {high:8.3f}{row['frechet']:9.3f}"
                print(f"{task:14}{method:10}{strength:9g}{found}", flush=True)
    chosen = (options.tasks, options.methods, options.strengths)
    result.finish(draw, chosen == (list(SUCCESS), list(METHODS), None))


def measured(cell: dict[str, Any], made: Tensor, seeds: list[int], real: Tensor) -> dict[str, Any]:
    """The row of pictures that were made for the targets `seeds`."""
    verdict = tasks().judge.of(made)
    score = tasks().score(cell["task"], verdict, seeds)
    success = tasks().success(cell["task"], score)
    return {
        **cell,
        "nfe": 1 + (DESCENTS + 1) * (cell["steps"] - 1) if cell["method"] == "DiffRGD" else cell["steps"],
        "psnr": None,
        "ssim": None,
        "frechet": round(judging.frechet(verdict.features, real), 4),
        "success": round(float(success.mean()), 4),
        "interval": interval(success),
        "score": np.round(score, 4).tolist(),
        "n": len(seeds),
    }


if __name__ == "__main__":
    main()
