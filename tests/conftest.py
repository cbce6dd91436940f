"""Makes the pack and its host importable, and starts the ComfyUI server that the end-to-end tests drive.

Tests in this process run on the CPU; the modules of `demo/` are importable by their bare names, as they are for
`demo/run.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "demo"))
from bootstrap import ROOT, import_host, import_pack


class RootIsThePack:
    """The root's `__init__.py` belongs to the pack: pytest must not import it as a package of tests."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "write what test_samplers.py sees of this host into FILE, beside what other hosts have left there"
    parser.addoption("--samplers-table", type=Path, metavar="FILE", help=help)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RootIsThePack())
    import_host(cpu=True)
    import_pack()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the end of the server's log with each failure of a test that used it."""
    report = yield
    if report.failed and (server := getattr(item, "funcargs", {}).get("comfy_server")):
        report.sections.append(("ComfyUI", server.log_tail()))
    return report


@pytest.fixture(scope="session")
def comfy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A running ComfyUI with the pack, in a folder with a hyphen in its name, as a browser's ZIP download has."""
    from comfy_server import ComfyServer

    with ComfyServer(tmp_path_factory.mktemp("comfyui"), pack_name="sphere-guide-main") as server:
        yield server


@pytest.fixture(scope="session")
def faulty_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A running ComfyUI with the pack, and with nodes that break things: a `faulty.Faulty`."""
    from faulty import running

    with running(tmp_path_factory.mktemp("faulty")) as faulty:
        yield faulty
