"""The network that chooses for AMED's students, and its file."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .students import MOST_PARALLEL, ORDERS, PARALLEL, Choice, classical

__all__ = [
    "BOTTLENECK",
    "AMEDPredictor",
    "AMEDSettings",
    "PredictorNetwork",
    "PredictorTable",
    "fingerprint",
    "load",
    "read",
    "save",
    "write",
]

BOTTLENECK = 8
"""Height and width of the bottleneck that a predictor reads."""
FORMAT = "SphereGuide AMED predictor"
MOST_POINTS = 1001
"""Time points of a predictor: Train AMED Predictor makes 21 at most, a script may make more."""
TRAINING = "training."
"""What the names of the tensors of a training begin with."""
DELETE = "Delete the file to train anew, or give another name."


class PredictorNetwork(nn.Module):
    """r, scale_dir and scale_time of an interval (arXiv 2312.00094, section 3.4): 8 971 parameters.

    The channel mean of the U-Net's bottleneck at t passes 64 → 128 → 4, t and t_next an embedding of 8 and a layer that
    they share; each of the three is read off the 20 values by a layer of its own.

        r = sigmoid(·),    scale = 2s·sigmoid(·) + 1 − s    in 1 ± s; s is `scale_dir` or `scale_time`
    """

    WIDTH = 8

    def __init__(self, scale_dir: float, scale_time: float) -> None:
        super().__init__()
        self.scale_dir, self.scale_time = scale_dir, scale_time
        self.bottleneck = nn.Sequential(nn.Linear(BOTTLENECK**2, 128), nn.SiLU(), nn.Linear(128, 4))
        self.time = nn.Linear(self.WIDTH, self.WIDTH)
        self.heads = nn.ModuleDict({name: nn.Linear(4 + 2 * self.WIDTH, 1) for name in ("r", "dir", "time")})

    def forward(self, features: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For features `[B, 64]` and times `[B]`: three of `[B]`. Half of a batch in any order gives the same."""
        times = F.silu(self.time(self._embedding(torch.stack([t, t_next], 1)))).flatten(1)
        seen = torch.cat([self.bottleneck(features), times], 1)
        r, direction, time = torch.cat([head(seen) for head in self.heads.values()], 1).sigmoid().unbind(1)
        return r, *(2 * s * v + 1 - s for s, v in ((self.scale_dir, direction), (self.scale_time, time)))

    def _embedding(self, t: Tensor) -> Tensor:
        """sin and cos of t·ω, `[…, 8]` for t `[…]`, with frequencies from 1 to 1e-4."""
        phases = t[..., None] * torch.logspace(0, -4, self.WIDTH // 2, device=t.device, dtype=t.dtype)
        return torch.cat([phases.sin(), phases.cos()], -1)


class PredictorTable(nn.Module):
    """K of each number, and their weights, for each interval (arXiv 2507.14797): 4·K numbers, the same for all samples.

        r_k = sigmoid(·),    scale_k = 2s·sigmoid(·) + 1 − s,    λ = softmax(·)

    It begins as the classical solver, so that a training comes out no further off than that; the authors begin with
    random numbers.
    """

    GAIN = 10.0
    """On the numbers: a step of Adam has its learning rate as length, and 0.02, that of a network, is 0.2 here."""

    def __init__(self, sigmas: tuple[float, ...], parallel: int, scale_dir: float, scale_time: float) -> None:
        super().__init__()
        self.sigmas, self.scale_dir, self.scale_time = sigmas, scale_dir, scale_time
        numbers = torch.zeros(4, len(sigmas) - 1, parallel)
        numbers[0] = classical(numbers[0], parallel).r.logit() / self.GAIN
        self.table = nn.Parameter(numbers)

    def forward(self, features: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For times `[B]`: four of `[B, K]`, those of the interval that begins nearest to t."""
        row = (t[:, None].log() - t.new_tensor(self.sigmas[:-1]).log()).abs().argmin(1)
        r, direction, time, weight = self.GAIN * self.table[:, row]
        scales = ((self.scale_dir, direction), (self.scale_time, time))
        return r.sigmoid(), *(2 * s * v.sigmoid() + 1 - s for s, v in scales), weight.softmax(1)


@dataclass(frozen=True)
class AMEDSettings:
    """What a predictor was trained for, and how: all that sampling needs.

    student      one of `students.STUDENTS`
    schedule, rho, sigmas   the time points, falling; the last is above 0. `steps` + 1 of them
    afs          the first direction is x/√(1 + t²), without a model call
    max_order    of the student's solver
    scale_dir, scale_time   by how much the scales may be off 1
    teacher, teacher_points   its solver, and the points that it has between two of the student's
    cfg          of the training
    model_hash   `fingerprint` of the model; empty for unknown
    parallel     directions in an interval, 1 to 4, of the students that have several; 0 of the others
    midpoints    the mean t_mid of each interval, along trajectories that training did not see
    error, student_error   mean RMSE of a sample to the teacher's there, and that of the student alone
    trajectories, seconds   how many it was trained on, and how long
    """

    student: str
    schedule: str
    rho: float
    sigmas: tuple[float, ...]
    afs: bool = False
    max_order: int = 1
    scale_dir: float = 0.01
    scale_time: float = 0.0
    teacher: str = "heun"
    teacher_points: int = 1
    cfg: float = 1.0
    model_hash: str = ""
    parallel: int = 0
    midpoints: tuple[float, ...] = field(default=(), compare=False)
    error: float = field(default=math.nan, compare=False)
    student_error: float = field(default=math.nan, compare=False)
    trajectories: int = field(default=0, compare=False)
    seconds: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        if len(self.sigmas) > MOST_POINTS:
            raise ValueError(
                f"there are {len(self.sigmas)} sigmas, and a solver of few steps has {MOST_POINTS} at most"
            )
        if self.student not in ORDERS:
            raise ValueError(f"there is no student '{self.student}'; there are {', '.join(ORDERS)}")
        if not 1 <= self.max_order <= ORDERS[self.student]:
            raise ValueError(f"the order of {self.student} is 1 to {ORDERS[self.student]}, and not {self.max_order}")
        least, most = (1, MOST_PARALLEL) if self.student in PARALLEL else (0, 0)
        if not least <= self.parallel <= most:
            raise ValueError(f"parallel is {self.parallel}, and for {self.student} must be from {least} to {most}")
        falling = all(b < a for a, b in itertools.pairwise(self.sigmas))
        if len(self.sigmas) < 2 or not falling or self.sigmas[-1] <= 0 or not math.isfinite(self.sigmas[0]):
            raise ValueError(f"the sigmas {self.sigmas} do not fall to a last one above 0")
        if not (0 <= self.scale_dir < 1 and 0 <= self.scale_time < 1):
            raise ValueError(f"scales may be off 1 by 0 to 1, and not by {self.scale_dir} and {self.scale_time}")
        if len(self.midpoints) not in (0, self.steps):
            raise ValueError(f"there are {len(self.midpoints)} midpoints for {self.steps} intervals")

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def ratio(self) -> float:
        """Its error over that of the student alone."""
        return self.error / self.student_error if self.student_error > 0 else math.inf

    @property
    def nfe(self) -> int:
        """Model calls; CFG doubles each. Parallel ones count as what they cost."""
        return self.calls * self.steps - self.afs

    @property
    def calls(self) -> int:
        """Model calls in an interval."""
        return 1 + (self.parallel or 1)


@dataclass(frozen=True, eq=False)
class AMEDPredictor:
    """The content of an AMED_PREDICTOR socket: a network or table, on the CPU and frozen, and what it is for."""

    network: PredictorNetwork | PredictorTable
    settings: AMEDSettings

    @classmethod
    def untrained(cls, settings: AMEDSettings, seed: int = 0) -> AMEDPredictor:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch's own function reaches the GPUs' too
            scales = (settings.scale_dir, settings.scale_time)
            network: PredictorNetwork | PredictorTable = (
                PredictorTable(settings.sigmas, settings.parallel, *scales)
                if settings.parallel
                else PredictorNetwork(*scales)
            )
            return cls(network.requires_grad_(False), settings)

    def __call__(self, features: Tensor, t: Tensor, t_next: Tensor) -> Choice:
        """The choice for features `[B, 64]` and times `[B]`, on the device of the times."""
        device = next(self.network.parameters()).device
        chosen = self.network(features.to(device), t.to(device), t_next.to(device))
        return Choice(*(value.to(t.device) for value in chosen))

    def about(self) -> str:
        """One line for a person."""
        s = self.settings
        error = f", error {s.error:.3g} ({s.ratio:.0%} of {s.student}'s own)" if math.isfinite(s.ratio) else ""
        directions = f" of {s.parallel}" if s.parallel else ""
        return f"{s.student}{directions}, {s.nfe} model calls, cfg {s.cfg:g}, {s.trajectories} trajectories{error}"


def save(predictor: AMEDPredictor, path: Path) -> None:
    """As safetensors, the settings in its header."""
    write(predictor, path, {}, {})


def write(predictor: AMEDPredictor, path: Path, training: dict[str, Tensor], header: dict[str, Any]) -> None:
    """The same, with what a training goes on from. In one move: a reader never sees half of a file."""
    weights = {name: value.detach().cpu().contiguous() for name, value in predictor.network.state_dict().items()}
    state = {TRAINING + name: value.cpu().contiguous() for name, value in training.items()}
    metadata = {"format": FORMAT, "settings": json.dumps(asdict(predictor.settings)), "training": json.dumps(header)}
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({**weights, **state}, part, metadata)
        part.replace(path)
    except (SafetensorError, OSError) as error:
        raise OSError(
            f"The predictor can't be written to {path}. Is there room, and may ComfyUI write there? Otherwise take "
            f"another name. ({error})"
        ) from error


def load(path: Path, title: str = "Load AMED Predictor") -> AMEDPredictor:
    """The predictor in a file of `save`, or the best so far of a training.

    Raises ValueError, for the node of that title, for a file that is damaged or something else.
    """
    weights, metadata = _open(path, title, training=False)
    try:
        predictor = AMEDPredictor.untrained(settings_of(json.loads(metadata["settings"])))
        with torch.inference_mode(False):
            predictor.network.load_state_dict(weights)
        finite = all(value.isfinite().all() for value in predictor.network.state_dict().values())
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{title}: {path} does not fit this version of SphereGuide. Update it, or train anew. "
            f"({' '.join(str(error).split())})"
        ) from error
    if not finite:
        raise ValueError(f"{title}: {path} holds numbers that are not finite. Train it anew, at a lower learning rate.")
    return predictor


def read(path: Path, title: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write` was given for a training. Raises ValueError, for the node of that title, for what was not."""
    state, metadata = _open(path, title, training=True)
    try:
        header = json.loads(metadata.get("training", "{}"))
        if not isinstance(header, dict):
            raise ValueError(f"it holds a {type(header).__name__} and no state")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{title}: the training in {path} can't be gone on with. {DELETE} ({error})") from error
    return state, header


def _open(path: Path, title: str, training: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The predictor's tensors, or those of its training; and the header. Of another file no tensor is read."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            names = [name for name in file.keys() if name.startswith(TRAINING) == training]  # noqa: SIM118
            ours = metadata.get("format") == FORMAT
            tensors = {name.removeprefix(TRAINING): file.get_tensor(name) for name in names} if ours else {}
    except Exception as error:  # what a reader says of bytes that it was not made for can be of any type
        raise ValueError(
            f"{title}: {path} can't be read, it may be damaged or cut short. Get it again, or delete it and train "
            f"anew. ({error})"
        ) from error
    if not ours:
        raise ValueError(
            f"{title}: {path} is no predictor of Train AMED Predictor. Choose another; the authors' own are not read."
        )
    return tensors, metadata


def settings_of(values: dict[str, Any]) -> AMEDSettings:
    """From JSON. Raises TypeError or ValueError for what is missing, of another type, or not known."""
    kinds = {entry.name: entry.type for entry in fields(AMEDSettings)}
    if unknown := values.keys() - kinds.keys():
        raise ValueError(f"it has settings that are not known here: {', '.join(sorted(unknown))}")
    read = {"str": str, "float": float, "int": int, "bool": bool, "tuple[float, ...]": lambda v: tuple(map(float, v))}
    settings = AMEDSettings(**{name: read[str(kinds[name])](value) for name, value in values.items()})
    between = zip(settings.sigmas, settings.midpoints, settings.sigmas[1:], strict=False)
    if not all(0.999 * after <= middle <= 1.001 * sigma for sigma, middle, after in between):
        raise ValueError(f"the midpoints {settings.midpoints} do not lie between the sigmas {settings.sigmas}")
    if not math.isfinite(settings.cfg):
        raise ValueError(f"the cfg is {settings.cfg}")
    return settings


def fingerprint(patcher: Any) -> str:
    """A hash of a MODEL: names, shapes and some values of its weights, and what patches them.

    Another precision is another model; a LoRA counts by what it patches, how strongly, and some of its values.
    """
    network = patcher.model.diffusion_model
    if network not in _hashed:  # it takes as long as some model calls; ComfyUI changes weights by patches alone
        _hashed[network] = _hash_of_weights(network, patcher.backup)
    sha = _hashed[network].copy()
    for name, patches in sorted(patcher.patches.items(), key=lambda item: str(item[0])):
        sha.update(f"{name} {[patch[0] for patch in patches]}".encode())
        for patch in patches:
            for value in tree_leaves(getattr(patch[1], "weights", patch[1])):  # of an adapter, on newer hosts
                if isinstance(value, Tensor):
                    sha.update(_some_of(value))
    return sha.hexdigest()[:16]


_hashed: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


def _hash_of_weights(network: nn.Module, backup: dict[str, Any]) -> Any:
    """Of those before patches: `backup` has them where patches are in."""
    sha = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        unpatched = backup.get(f"diffusion_model.{name}", weight)
        weight = getattr(unpatched, "weight", unpatched)
        sha.update(f"{name} {tuple(weight.shape)}".encode())
        if type(weight) in (Tensor, nn.Parameter) and weight.device.type != "meta" and weight.numel():
            sha.update(_some_of(weight))
    return sha


def _some_of(weight: Tensor) -> bytes:
    some = weight.detach().reshape(-1)[:: max(1, weight.numel() // 16)]
    return some.float().cpu().numpy().tobytes()
