"""Opens ComfyUI with the pack, its workflows and their picture; started by `quickstart.py serve`.

What is made there stays, in `output/comfyui` of this repository.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import socket
import sys

from comfy_server import PACK, ComfyServer, ServerError
from run import device


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8188)
    port = parser.parse_args().port
    if not 0 < port < 2**16:
        parser.error(f"--port is {port}, and must be from 1 to 65535.")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            print(f"Port {port} is taken. Choose another: quickstart.py serve --port {port + 1}", file=sys.stderr)
            return 1
    server = ComfyServer(PACK / "output" / "comfyui", port=port, device=device())
    saved = server.base / "user" / "default" / "workflows"  # what newer pages list as the user's workflows
    saved.mkdir(parents=True, exist_ok=True)
    for folder, kind in ((saved, "*.json"), (server.input, "*.png")):
        for file in (PACK / "workflows").glob(kind):
            if not (folder / file.name).exists():  # as it was saved here; the page's templates have ours
                shutil.copy(file, folder)
    try:
        print("Starting ComfyUI", flush=True)
        with server:
            print(
                f"SphereGuide is at {server.url}\n"
                f"Drag a workflow onto the page: {PACK / 'workflows'}\n"
                f"Models of yours go into: {server.base / 'models'}\n"
                f"Pictures land in: {server.output}\n"
                f"What ComfyUI says: {server.log_path}\n"
                "Ctrl-C stops it.",
                flush=True,
            )
            if stopped := server.process.wait():
                print(f"\nComfyUI stopped with exit code {stopped}.{server.log_tail()}", file=sys.stderr)
            return stopped
    except ServerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(main())
