"""What code does behind its caller's back: the files it opens, the programs it starts, the addresses it asks for.

Python tells its audit hooks (PEP 578). They can't be taken away again, so that there is one, and it is mostly deaf.
What native code opens by itself (safetensors) it does not see.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Watched", "watched"]

STARTED = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "subprocess.Popen",
    "pty.spawn",
)
ASKED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")


@dataclass
class Watched:
    opened: list[Path] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def below(self, folder: Path) -> list[Path]:
        """What was opened there, links followed."""
        folder = folder.resolve()
        return [path for path in self.opened if folder in (path, *path.parents)]


_listening: list[Watched] = []


def _hear(event: str, arguments: tuple) -> None:
    if not _listening:
        return
    if event == "open" and isinstance(arguments[0], str | bytes):
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            _listening[-1].opened.append(Path(os.fsdecode(arguments[0])).resolve())
    elif event in STARTED:
        _listening[-1].started.append(f"{event} {arguments}")
    elif event in ASKED:
        _listening[-1].asked.append(f"{event} {arguments}")


sys.addaudithook(_hear)


@contextlib.contextmanager
def watched() -> Iterator[Watched]:
    _listening.append(Watched())
    try:
        yield _listening[-1]
    finally:
        _listening.pop()
