"""docs/troubleshooting.md lists what the pack says when something is wrong, and the server gives it back as it is."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from bootstrap import ROOT
from broken_files import write_broken_files, write_pictures, write_resnet
from comfy_server import ComfyServer, ExecutionError, PromptRejected
from prompts import custom, face, guided, node
from provocations import ELSEWHERE, WARNED, WRONG
from safetensors.torch import load_file
from torch import Tensor

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
ROOMS = ("host.py", "quickstart.py", "nodes/", "samplers/", "losses/", "models/", "demo/toy_portraits.py")


# -- the page and the source -------------------------------------------------------------------------------------------


def sources() -> list[Path]:
    return sorted(
        file
        for file in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]
        if file.relative_to(ROOT).as_posix().startswith(ROOMS)
    )


def rendered(node: ast.expr, known: dict[str, str]) -> str:
    """What an expression says, with … for what is only known when it runs. `known`: the constants of its module."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(rendered(part, known) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return known.get(ast.unparse(node.value), "…")
    if isinstance(node, ast.BinOp):
        return rendered(node.left, known) + rendered(node.right, known)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "strip":
        return rendered(node.func.value, known)
    return "…"


def said(file: Path) -> Iterator[str]:
    """The messages of the exceptions that a file raises, of its warnings, and of its functions that make messages."""
    module = ast.parse(file.read_text(encoding="utf-8"))
    constants = (node for node in module.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))
    known = {ast.unparse(node.targets[0]): str(node.value.value) for node in constants}
    for part in ast.walk(module):
        if isinstance(part, ast.Raise) and isinstance(part.exc, ast.Call) and part.exc.args:
            yield rendered(part.exc.args[0], known)
        elif isinstance(part, ast.Call) and ast.unparse(part.func) == "log.warning":
            yield re.sub(r"%\S*?[sdfg]", "…", rendered(part.args[0], known))
        elif isinstance(part, ast.FunctionDef) and part.name.endswith("_message"):
            yield from (rendered(line.value, known) for line in ast.walk(part) if isinstance(line, ast.Return))


def for_users(message: str) -> bool:
    """A sentence begins with a capital letter, or with the title of its node.

    What begins otherwise is a part of such a sentence, or is for those who call the pack from Python.
    """
    return bool(re.match(r"[A-Z]|…:? [A-Za-z]|…: ['…]", message))


def fits(quote: str, message: str, anything: str = "[^.]*?") -> bool:
    """Whether the message begins as the quote says, in which … is anything within a sentence."""
    return bool(re.match(anything.join(map(re.escape, quote.split("…"))), message))


MESSAGES = {message: file.relative_to(ROOT).as_posix() for file in sources() for message in said(file)}
ROWS = [
    [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.splitlines()
    if line.startswith("| ") and not line.startswith("| what it says")
]
QUOTES = [quote for row in ROWS for quote in re.findall(r"`([^`]+)`", row[0])]


def source_of(said: str) -> str | None:
    """The message of the source that these words are: where several fit, the one that leaves the least open."""
    fitting = [message for message in MESSAGES if re.fullmatch(pattern(message), said, re.DOTALL)]
    return max(fitting, key=lambda message: len(message.replace("…", "")), default=None)


def pattern(message: str) -> str:
    return ".*?".join(map(re.escape, message.split("…")))


def test_every_message_for_users_is_in_the_page():
    missing = [f"{file}: {message}" for message, file in MESSAGES.items() if for_users(message)]
    missing = [entry for entry in missing if not any(fits(quote, entry.partition(": ")[2]) for quote in QUOTES)]
    assert not missing, "\n".join(missing)


def test_every_message_in_the_page_is_in_the_source():
    gone = [quote for quote in QUOTES if not any(fits(quote, message) for message in MESSAGES)]
    assert QUOTES and not gone, "\n".join(gone)


def test_every_row_says_what_why_and_what_to_do():
    assert all(len(row) == 3 and all(row) for row in ROWS), [row for row in ROWS if len(row) != 3]


# -- what the server gives back ----------------------------------------------------------------------------------------

CASES = WRONG | WARNED


def test_every_message_for_users_has_a_case_or_a_test_elsewhere() -> None:
    quotes = [*(case.quote for case in CASES.values()), *ELSEWHERE]
    missing = [message for message in MESSAGES if for_users(message) and not any(fits(q, message) for q in quotes)]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("quote", ELSEWHERE)
def test_the_test_elsewhere_has_words_of_the_message(quote: str) -> None:
    messages = [message for message in MESSAGES if fits(quote, message)]
    assert messages, "no such message"
    file, name = ELSEWHERE[quote]
    code = (ROOT / "tests" / file).read_text(encoding="utf-8")
    (test,) = (part for part in ast.parse(code).body if isinstance(part, ast.FunctionDef) and part.name == name)
    first = min(part.lineno for part in (test, *test.decorator_list))
    words = re.sub(r"\W+", " ", " ".join(code.splitlines()[first : test.end_lineno]))
    for message in messages:
        literal = [re.findall(r"\w+", part) for part in message.split("…")]
        threes = [" ".join(part[i : i + 3]) for part in literal for i in range(len(part) - 2)]
        assert any(three in words for three in threes), message


@pytest.fixture(scope="module")
def server(comfy_server: ComfyServer) -> Iterator[ComfyServer]:
    before = files(comfy_server)
    write_pictures(comfy_server.input)
    write_broken_files(comfy_server.base)
    if importlib.util.find_spec("open_clip"):
        write_resnet(comfy_server.base / "models" / "open_clip" / "resnet")
    yield comfy_server
    for file in files(comfy_server) - before:  # other modules' tests share the server
        file.unlink()


def files(server: ComfyServer) -> set[Path]:
    folders = server.base / "models", server.input
    return {path for folder in folders for path in folder.rglob("*") if path.is_file()}


@dataclass
class Provoked:
    """What the cases so far came to.

    before    the picture before the first
    messages  of the source, that the server gave
    cases     those that ran or can't run here
    """

    before: Tensor
    messages: set[str] = field(default_factory=set)
    cases: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def provoked(server: ComfyServer) -> Provoked:
    return Provoked(picture(server, "before"))


def picture(server: ComfyServer, run: str) -> Tensor:
    """The latent of two guided steps, made anew: the negative prompt differs, and cfg 1 leaves it out."""
    prompt = guided(unused=node("CLIPTextEncode", text=run, clip=["toy", 1]), sample=custom(negative=["unused", 0]))
    result = server.run(prompt)
    assert "sample" not in result.cached
    (saved,) = result.outputs["save"]["latents"]
    return load_file(server.output / saved["subfolder"] / saved["filename"])["latent_tensor"]


@pytest.mark.server
@pytest.mark.parametrize("name", WRONG)
def test_the_server_says_what_the_page_says(server: ComfyServer, provoked: Provoked, name: str) -> None:
    case = WRONG[name]
    provoked.cases.add(name)
    if case.missing:
        pytest.skip(case.missing)
    with pytest.raises(ExecutionError) as error:
        server.run(case.prompt, timeout=60)
    message = error.value.exception_message
    assert error.value.node_type == case.stops
    assert case.quote in QUOTES and fits(case.quote, message, ".*?")
    assert case.remedy in message and "\n" not in message
    source = source_of(message)
    assert source and for_users(source)
    provoked.messages.add(source)


@pytest.mark.server
@pytest.mark.parametrize("name", WARNED)
def test_the_log_says_what_the_page_says(server: ComfyServer, provoked: Provoked, name: str) -> None:
    case = WARNED[name]
    provoked.cases.add(name)
    if case.missing:
        pytest.skip(case.missing)
    before = server.log_path.stat().st_size
    try:
        server.run(case.prompt, timeout=60)
    except ExecutionError as error:
        assert error.node_type == case.stops
    with open(server.log_path, "rb") as log:
        log.seek(before)
        lines = log.read().decode(errors="replace").splitlines()
    (line,) = (line for line in lines if case.remedy in line)
    assert case.quote in QUOTES
    (source,) = (message for message in MESSAGES if fits(case.quote, message) and re.search(pattern(message), line))
    provoked.messages.add(source)


@pytest.mark.server
def test_what_another_computer_lacks_is_refused_by_name(server: ComfyServer) -> None:
    with pytest.raises(PromptRejected, match=r"Value not in list.*'gone/'"):
        server.run(face("gone/"))
    with pytest.raises(PromptRejected, match="SphereGuideOfTomorrow"):
        server.run(guided(loss=node("SphereGuideOfTomorrow")))


@pytest.mark.server
def test_after_all_that_the_server_gives_the_same_picture(server: ComfyServer, provoked: Provoked) -> None:
    assert torch.equal(picture(server, "after"), provoked.before)


@pytest.mark.server
def test_every_message_for_users_was_given_or_is_tested_elsewhere(provoked: Provoked) -> None:
    if provoked.cases != CASES.keys():
        pytest.skip("this takes all cases")
    absent = [case.quote for case in CASES.values() if case.missing]
    missing = [
        message
        for message in MESSAGES
        if for_users(message)
        and message not in provoked.messages
        and not any(fits(quote, message) for quote in [*ELSEWHERE, *absent])
    ]
    assert not missing, "\n".join(missing)
