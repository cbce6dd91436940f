"""A ComfyUI server with this pack in it, for the demo, the tests and `quickstart.py serve`.

The server is the real one: the checkout that `COMFYUI_PATH` names, or else the PyPI package `comfyui`. It lives in a
scratch base directory, where `custom_nodes` holds a link to the pack: nothing is written into anybody's own ComfyUI.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import websocket

__all__ = ["ComfyServer", "ExecutionError", "Interrupted", "PromptRejected", "Run", "ServerError"]

PACK = Path(__file__).resolve().parent.parent
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no business on this machine's ports


class ServerError(RuntimeError):
    """The server did not start, or died. The message ends with the tail of its log."""


class PromptRejected(RuntimeError):
    """The server refused a prompt before running it. `report` is its answer, with the errors of each node."""

    def __init__(self, report: dict) -> None:
        self.report = report
        reasons = [
            f"{node['class_type']} (node {node_id}): {error['message']} {error['details']}".strip()
            for node_id, node in dict(report["node_errors"]).items()  # an empty list where no node is to blame
            for error in node["errors"]
        ]
        super().__init__("; ".join(reasons) or report["error"]["message"])


class ExecutionError(RuntimeError):
    """A node raised. `exception_type` and `exception_message` are as the server reported them."""

    def __init__(self, message: dict) -> None:
        self.node_id = message["node_id"]
        self.node_type = message["node_type"]
        self.exception_type = message["exception_type"]
        self.exception_message = message["exception_message"].strip()
        self.traceback = "".join(message.get("traceback", []))
        super().__init__(
            f"{self.node_type} (node {self.node_id}) raised {self.exception_type}: {self.exception_message}"
        )


class Interrupted(RuntimeError):
    """The prompt was cancelled."""


@dataclass
class Run:
    """What one prompt did: its outputs, and what the page would have shown meanwhile."""

    prompt_id: str
    seconds: float = 0.0
    outputs: dict[str, dict] = field(default_factory=dict)
    cached: set[str] = field(default_factory=set)
    progress: list[tuple[str | None, int, int]] = field(default_factory=list)  # (node, value, max), one an event
    previews: list[bytes] = field(default_factory=list)  # encoded images
    guided: list[dict] = field(default_factory=list)  # what guidance told of its steps


class ComfyServer:
    """A server process; also a context manager.

    base: scratch directory, made if absent. pack_name: the folder that the pack seems to lie in. device: "cpu", or
    "auto" to leave the choice to ComfyUI. pack: where the pack is. What the server prints goes to `log_path`.
    """

    def __init__(
        self,
        base: Path,
        *,
        pack_name: str = "sphereguide",
        port: int | None = None,
        device: str = "cpu",
        pack: Path = PACK,
    ) -> None:
        self.base = Path(base).resolve()
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.client_id = uuid.uuid4().hex
        self.log_path = self.base / "comfyui.log"
        self.input = self.base / "input"
        self.output = self.base / "output"
        for folder in ("custom_nodes", "input", "models", "output", "temp", "user"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        link_pack(self.base / "custom_nodes" / pack_name, pack)
        self.command = [*host_command(self.base), "--port", str(self.port)]
        if device == "cpu":
            self.command.append("--cpu")

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    # The process

    def start(self, timeout: float = 300.0) -> ComfyServer:
        """Start the process and wait until it answers. Raises ServerError."""
        with open(self.log_path, "w") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.base,
                env={**os.environ, **self.environment()},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self.wait_until_up(timeout)
        except BaseException:  # Ctrl-C too: nobody else will stop it
            self.stop()
            raise
        return self

    def wait_until_up(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if (code := self.process.poll()) is not None:
                raise ServerError(f"ComfyUI stopped at its start, with exit code {code}.{self.log_tail()}")
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer on port {self.port} within {timeout:.0f} seconds.{self.log_tail()}")

    def environment(self) -> dict[str, str]:
        # The packaged host lists Hugging Face's cache for some nodes, and logs a traceback for each if there is none.
        cache = self.base / "huggingface"
        cache.mkdir(exist_ok=True)
        return {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "HF_HUB_CACHE": str(cache)}

    def stop(self) -> None:
        if self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def log_tail(self, lines: int = 30) -> str:
        tail = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        return "\n".join(["\nThe end of its log:", *tail])

    # HTTP

    def get(self, path: str, **query: str) -> bytes:
        with OPENER.open(f"{self.url}{path}?{urllib.parse.urlencode(query)}", timeout=60) as answer:
            return answer.read()

    def get_json(self, path: str, **query: str) -> dict:
        return json.loads(self.get(path, **query))

    def post(self, path: str, body: dict) -> bytes:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with OPENER.open(request, timeout=60) as answer:
            return answer.read()

    def interrupt(self) -> None:
        """What the Cancel button does."""
        self.post("/interrupt", {})

    def queue(self, prompt: dict) -> str:
        """Queue a prompt in API format and return its id. Raises PromptRejected if any part of it is wrong."""
        try:
            answer = json.loads(self.post("/prompt", {"prompt": prompt, "client_id": self.client_id}))
        except urllib.error.HTTPError as error:
            raise PromptRejected(json.loads(error.read())) from None
        if answer["node_errors"]:  # The server would run the other outputs.
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            raise PromptRejected(answer)
        return answer["prompt_id"]

    def images(self, run: Run, node_id: str) -> list[bytes]:
        """The image files that an output node of this run made."""
        return [
            self.get("/view", filename=image["filename"], subfolder=image["subfolder"], type=image["type"])
            for image in run.outputs[node_id]["images"]
        ]

    # The websocket

    def listen(self, client_id: str = "", timeout: float = 5) -> websocket.WebSocket:
        """The events for a client, by default for this object's prompts. Raises ServerError."""
        import websocket  # The one thing here beyond the standard library

        url = f"ws://127.0.0.1:{self.port}/ws?clientId={client_id or self.client_id}"
        try:
            # Over a connection of our own: by itself it would ask a proxy of the environment for this machine.
            own = socket.create_connection(("127.0.0.1", self.port), timeout)
            return websocket.create_connection(url, timeout, socket=own)
        except (OSError, websocket.WebSocketException) as error:
            raise ServerError(f"ComfyUI does not answer: {error}.{self.log_tail()}") from None

    def run(
        self,
        prompt: dict,
        *,
        on_progress: Callable[[Run], object] = lambda run: None,
        timeout: float = 600.0,
    ) -> Run:
        """Queue a prompt and follow it to its end, as the page does.

        on_progress is called after each progress event. Raises PromptRejected, ExecutionError, Interrupted, ServerError
        (which covers the timeout in seconds).
        """
        import websocket

        started = time.perf_counter()
        deadline = time.monotonic() + timeout
        failure: Exception | None = None
        channel = self.listen()
        try:
            run = Run(self.queue(prompt))
            while True:
                try:
                    message = channel.recv()
                except websocket.WebSocketTimeoutException:
                    if time.monotonic() > deadline:
                        self.interrupt()
                        raise ServerError(
                            f"The prompt took more than {timeout:.0f} seconds.{self.log_tail()}"
                        ) from None
                    continue
                except (OSError, websocket.WebSocketException) as error:
                    raise ServerError(f"ComfyUI closed the connection: {error}.{self.log_tail()}") from None
                if isinstance(message, bytes):
                    if int.from_bytes(message[:4], "big") == 1:  # PREVIEW_IMAGE: event, image type, file
                        run.previews.append(message[8:])
                    continue
                event = json.loads(message)
                kind, data = event["type"], event["data"]
                if kind == "progress":
                    run.progress.append((data.get("node"), data["value"], data["max"]))
                    on_progress(run)
                elif data.get("prompt_id") != run.prompt_id:
                    continue
                elif kind == "sphereguide.trace":
                    run.guided.append(data)
                elif kind == "execution_cached":
                    run.cached.update(data["nodes"])
                elif kind == "execution_error":
                    failure = ExecutionError(data)
                elif kind == "execution_interrupted":
                    failure = Interrupted(f"Interrupted in {data['node_type']} (node {data['node_id']}).")
                elif kind == "executing" and data["node"] is None:
                    break
        finally:
            channel.close()
        run.seconds = time.perf_counter() - started
        if failure:
            raise failure
        run.outputs = self.get_json(f"/history/{run.prompt_id}")[run.prompt_id]["outputs"]
        return run


def host_command(base: Path) -> list[str]:
    """The command line that starts the host in a base directory of its own, without port and device."""
    preview = ["--preview-method", "latent2rgb"]
    if not (checkout := os.environ.get("COMFYUI_PATH")):
        return [sys.executable, "-m", "comfy.cmd.main", "--cwd", str(base), *preview]
    command = [sys.executable, str(Path(checkout).resolve() / "main.py"), "--disable-auto-launch", *preview]
    known = (Path(checkout) / "comfy" / "cli_args.py").read_text(encoding="utf-8")
    if "--database-url" in known:
        command += ["--database-url", "sqlite:///:memory:"]
    if "--base-directory" in known:
        return [*command, "--base-directory", str(base)]
    # Before January 2025: the checkout's own custom nodes are loaded too, and our base is one more place to look in.
    paths = base / "extra_model_paths.yaml"
    paths.write_text(json.dumps({"sphereguide": {"custom_nodes": str(base / "custom_nodes")}}))  # JSON is YAML
    for folder in ("input", "output", "temp", "user"):
        if f"--{folder}-directory" in known:
            command += [f"--{folder}-directory", str(base / folder)]
    return [*command, "--extra-model-paths-config", str(paths)]


def link_pack(target: Path, pack: Path = PACK) -> None:
    """Make the pack appear at `target`: a link, or a copy where the file system has no links."""
    if target.exists() and target.samefile(pack):
        return
    try:
        target.unlink()  # a link or junction, wherever it leads
    except FileNotFoundError:
        pass
    except OSError:
        shutil.rmtree(target)  # an earlier copy, which may be old
    try:
        target.symlink_to(pack, target_is_directory=True)
    except OSError:  # Windows, without developer mode
        if sys.platform == "win32":
            import _winapi

            try:
                _winapi.CreateJunction(str(pack), str(target))
                return
            except OSError:
                pass
        shutil.copytree(pack, target, ignore=shutil.ignore_patterns(".*", "output", "__pycache__"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
