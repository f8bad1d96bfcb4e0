"""README.md does what it says: its commands run on a run of seconds, its snippets execute, its links lead somewhere.

A command of a kind that is not known here fails, so that nothing stands in the README that nothing tries.
"""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from pathlib import Path

import pytest
from tiny_run import tiny_config, write_corpus

from moe_lm.bench import machine
from moe_lm.checkpoint import resolve_model_dir
from moe_lm.config import SourceConfig
from moe_lm.routes import texts
from moe_lm.scaling import laws
from moe_lm.toml import load_config, to_toml
from moe_lm.train.metrics import read_metrics
from serve import make_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PLANNER = (ROOT / "docs" / "scaling.md").read_text("utf-8")
ROUTING = (ROOT / "docs" / "routing.md").read_text("utf-8")
FENCES = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
SNIPPETS = [text for language, text in FENCES if language == "python"]
COMMANDS = [
    line.partition("  #")[0].strip()
    for language, text in FENCES
    if language == "bash"
    for line in text.splitlines()
    if line.strip()
]
RUN = [command for command in COMMANDS if command.startswith("python ")]

SET_UP = "python3 -m venv .venv && .venv/bin/pip install -e "
INSTALLS = {"train": f"{SET_UP}. && .venv/bin/python train.py", "test": f"{SET_UP}'.[test]' && .venv/bin/pytest"}

FASTER = {
    "kernels.bench": ["--quick", "--tokens", "32", "--hidden", "64", "--intermediate", "32"],
    "kernels.bench --predict": [],
    "kernels.check": ["--only", "rms norm"],
    "moe_lm.bench": ["--quick", "--turns", "1"],
    "moe_lm.bench forecast": ["--turns", "1"],
    "moe_lm.bench moe-vs-dense": ["--minutes", "0.002", "--seeds", "1", "--steps", "2", "--rates", "1"],
    "moe_lm.bench train": ["--turns", "1", "--steps", "1", "--rows", "1", "--length", "32"],
    "moe_lm.bench.speculation": ["--max-tokens", "8", "--repeats", "1"],
    "moe_lm.generate": ["--max-tokens", "16"],
}
"""What is added to a command so that the test takes seconds; its last value of an option counts."""

CONTEXT = 128


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the commands need around them: train.py, every config made tiny, a text, a model, and a finished runs/nano.

    The run is that of the README's first command, in a process of its own.
    """
    root = tmp_path_factory.mktemp("repository")
    data = write_corpus(root / "corpus")
    shutil.copy(ROOT / "train.py", root)
    (root / "configs").mkdir()
    for path in (ROOT / "configs").glob("*.toml"):
        real = load_config(path)
        tiny = tiny_config(
            data,
            draft=real.draft,
            steps=6,
            max_position_embeddings=CONTEXT,
            num_local_experts=4 if real.model.is_moe else 0,
        )
        (root / "configs" / path.name).write_text(to_toml(tiny), "utf-8")
    texts = [path.read_text("utf-8") for path in sorted((root / "corpus").rglob("*.txt"))]
    (root / "my.txt").write_text("\n\n".join(f"{i} {text}" for i, text in enumerate(texts * 3)), "utf-8")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program = [sys.executable, *INSTALLS["train"].rpartition("/python ")[2].split()]
    done = subprocess.run(program, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (root / "messages.txt").write_text(done.stderr, "utf-8")
    shutil.copytree(resolve_model_dir(root / "runs" / "nano"), root / "Mixtral-8x7B-v0.1")
    return root


@pytest.fixture
def here(place, monkeypatch):
    """The place as working directory, and nothing done to the process of the tests."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("kernels.cpu.process.tune_process", lambda: None)
    monkeypatch.setenv("GOMP_SPINCOUNT", os.environ.get("GOMP_SPINCOUNT", "20000"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return place


def call(monkeypatch, words: list[str]) -> None:
    """What `python WORDS` does, in this process: importing torch again for every command would take minutes."""
    module = words[1] if words[0] == "-m" else None
    arguments = words[2:] if module else words[1:]
    faster = FASTER.get(" ".join(words[1:3]), FASTER.get(module, []))
    monkeypatch.setattr(sys, "argv", [words[0], *arguments, *faster])
    status = None
    try:
        if module:
            package = ROOT.joinpath(*module.split(".")).is_dir()
            program = f"{module}.__main__" if package else module
            monkeypatch.delitem(sys.modules, program, raising=False)  # else runpy warns that it is there already
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code
    assert not status


def value_of(words: list[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def test_the_two_commands_are_those_of_the_project():
    assert set(INSTALLS.values()) <= set(COMMANDS)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    for command in COMMANDS:
        for extra in re.findall(r"pip install -e '\.\[(\w+)\]'", command):
            assert extra in extras, command
    for program in ("pytest", "ruff"):
        assert any(re.match(rf"{program}\b", requirement) for requirement in extras["test"])
    checks = (ROOT / ".ci" / "run").read_text("utf-8")
    for step in (
        "python3 -m venv",
        "install --quiet -e '.[test]'",
        '/ruff" check .',
        '/ruff" format --check .',
        '/pytest"',
        "-m kernels.check --self-test",
    ):
        assert step in checks, step
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_every_block_and_command_is_of_a_known_kind():
    assert {language for language, _ in FENCES} == {"bash", "python"}
    known = {*INSTALLS.values(), *RUN, "source .venv/bin/activate", "pip install -e '.[tensorboard]'",
             "tensorboard --logdir runs", "pytest -m slow"}  # fmt: skip
    assert not set(COMMANDS) - known
    assert {shlex.split(command)[1] for command in RUN} == {"train.py", "serve.py", "-m"}


@pytest.mark.parametrize("command", [command for command in RUN if command.startswith("python train.py")])
def test_training_command(command, here, monkeypatch, capfd):
    monkeypatch.setattr(machine, "gemm_rate", lambda device, dtype: 1e9)
    words = shlex.split(command)[1:]
    if words == ["train.py"]:  # which made the place
        messages = (here / "messages.txt").read_text("utf-8")
    else:
        call(monkeypatch, words)
        shown, messages = capfd.readouterr()
    if "--help" in words:
        assert "--train.learning_rate" in shown
        return
    config = words[1] if len(words) > 1 and words[1].endswith(".toml") else "configs/nano.toml"
    assert (ROOT / config).is_file()
    name = value_of(words, "--run-dir") or value_of(words, "--resume") or f"runs/{Path(config).stem}"
    run, settings = here / name, load_config(here / name / "config.toml")
    assert f"report: {Path(name, 'report.md')} and {Path(name, 'report.html')}" in messages
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, settings.train.steps + 1))
    assert settings.train.steps == int(value_of(words, "--train.steps") or 6)
    assert settings.model.num_local_experts == int(
        value_of(words, "--model.num_local_experts") or 4 * load_config(ROOT / config).model.is_moe
    )
    if "--data.sources" in words:
        assert settings.data.sources == (SourceConfig("my.txt"),)
    if settings.train.tensorboard:
        assert list((run / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("command", [command for command in RUN if command.startswith("python -m moe_lm.generate")])
def test_generating_command(command, here, monkeypatch, capfd):
    words = shlex.split(command)[1:]
    call(monkeypatch, words)
    shown, messages = capfd.readouterr()
    assert shown.startswith(value_of(words, "--prompt"))
    assert "tokens/s" in messages
    assert ("guesse" in messages) == ("--draft" in words)


class Serving:
    """A process that serves on a port that is free."""

    def __init__(self, words: list[str], here: Path):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        program = [sys.executable, str(ROOT / "serve.py"), *words, "--port", "0"]
        self.process = subprocess.Popen(program, cwd=here, env=environment, stderr=subprocess.PIPE, text=True)
        self.messages: list[str] = []

    def __enter__(self) -> "Serving":
        for line in self.process.stderr:
            self.messages.append(line)
            if line.startswith("listening on "):
                self.url = line.removeprefix("listening on ").strip()
                return self
        raise AssertionError("".join(self.messages))

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.communicate(timeout=60)
        assert self.process.returncode == 0


@pytest.mark.parametrize("command", [command for command in RUN if command.startswith("python serve.py")])
def test_serving_command(command, here):
    words = shlex.split(command)[2:]
    with Serving(words, here) as serving:
        (told,) = [line for line in serving.messages if "draft" in line]
        # The newest run of the place may be that of another test.
        assert told.startswith(f"{words[0]}, no draft." if words else "runs/")
        with urllib.request.urlopen(f"{serving.url}/v1/models") as answer:
            assert json.load(answer)["data"][0]["max_model_len"] == CONTEXT
        with urllib.request.urlopen(serving.url) as answer:
            assert b"<title>" in answer.read()


def test_server_document(here, capfd):
    text = (ROOT / "docs" / "server.md").read_text("utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    with Serving(["runs/nano"], here) as serving:
        exec(compile(snippet.replace("http://127.0.0.1:8000", serving.url), "docs/server.md", "exec"), {})
    assert capfd.readouterr().out.strip()
    for option in re.findall(r"`(--[\w-]+)`", text):
        assert option.lstrip("-").replace("-", "_") in vars(make_parser().parse_args([])), option


@pytest.mark.parametrize("command", [command for command in RUN if command.startswith("python -m moe_lm.bench")])
def test_measuring_command(command, here, monkeypatch, capfd):
    words = shlex.split(command)[1:]
    monkeypatch.setattr(machine, "best_seconds", lambda run, device: machine.median_seconds(run, device, 0.001))
    call(monkeypatch, words)
    shown = capfd.readouterr().out
    expected = {
        "moe_lm.bench.machine": "float32 GEMM", "moe_lm.bench.speculation": "greedy",
        "moe_lm.bench generate": '{"cases": [', "moe_lm.bench serve": '"failures": []',
        "moe_lm.bench forecast": "training           predicted", "moe_lm.bench train": "ratio of medians",
        "moe_lm.bench moe-vs-dense": "equal wall-clock",
    }  # fmt: skip
    named = words[1] if words[1] in expected else " ".join(words[1:3])
    assert expected[named] in shown


SCALING = re.findall(r"^python -m moe_lm\.scaling .*?(?=\s+#|$)", README + PLANNER, re.MULTILINE)


@pytest.mark.parametrize("command", dict.fromkeys(SCALING))
def test_planning_command(command, tmp_path, monkeypatch, capfd):
    """Those of docs/scaling.md, too, on the real configs: nothing is built."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        laws, "read_runs", lambda names: [laws.Point(f"run {i}", 1e15 * 4**i, 1 + 2.0**-i) for i in range(5)]
    )
    monkeypatch.setattr(machine, "best_seconds", lambda run, device: machine.median_seconds(run, device, 0.001))
    call(monkeypatch, shlex.split(command)[1:])
    words, shown = shlex.split(command), capfd.readouterr().out
    if "--json" in words:
        json.loads(shown)
    expected = {"--facts": "reported, unconfirmed", "--validate": "bar 25%: pass", "fit": "FLOP"}
    assert expected.get(words[3], "the fastest" if "--search" in words else words[3]) in shown
    for option in ("--plot", "--html"):
        if option in words:
            assert Path(value_of(words, option)).exists()


ROUTES = re.findall(r"^python -m moe_lm\.routes .*?(?=\s+#|$)", README + ROUTING, re.MULTILINE)


@pytest.mark.parametrize("command", dict.fromkeys(ROUTES))
def test_routes_command(command, here, monkeypatch, capfd):
    """Those of docs/routing.md, too."""
    monkeypatch.setattr(texts, "held_out", lambda source: [(here / "train.py").read_text("utf-8")])
    words = shlex.split(command)[1:]
    call(monkeypatch, words)
    shown = capfd.readouterr().out
    if "--json" in words:
        assert json.loads(shown)["model"] == words[2]
    else:
        assert f"{words[2]}: 2 layers of 4 experts" in shown
    if page := value_of(words, "--html"):
        assert "</html>" in (here / page).read_text("utf-8")


@pytest.mark.parametrize("command", [command for command in RUN if command.startswith("python -m kernels.")])
def test_kernel_command(command, here):
    words = shlex.split(command)[1:]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    program = [sys.executable, *words, *FASTER[" ".join(words[1:3]) if "--predict" in words else words[1]]]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    expected = {"kernels.check": "\n0 of ", "kernels.bench": "expert_mlp"}
    assert expected[words[1]] in done.stdout


def test_every_command_that_runs_is_run_above():
    kinds = (
        "python train.py",
        "python serve.py",
        "python -m moe_lm.generate ",
        "python -m moe_lm.bench",
        "python -m moe_lm.scaling",
        "python -m moe_lm.routes",
        "python -m kernels.",
    )
    assert all(command.startswith(kinds) for command in RUN)


def test_commands_that_are_not_run_have_what_they_need():
    configured = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]["ini_options"]
    assert any(marker.startswith("slow:") for marker in configured["markers"])
    assert "not slow" in configured["addopts"]
    assert shutil.which("tensorboard", path=str(Path(sys.executable).parent))


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.split()[1].strip(","))
def test_snippet(snippet, here, capfd):
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})
    shown = capfd.readouterr().out
    for said in re.findall(r"print\(.*\)  # (.*)$", snippet, re.MULTILINE):
        assert said in shown
    assert shown.strip() or "print" not in snippet


@pytest.mark.parametrize("document", ["engine", "kernels", "scaling", "routing"])
def test_snippets_of_a_document(document, here, capfd):
    """One after the other, as they are read."""
    names = {"__name__": document}
    text = (ROOT / "docs" / f"{document}.md").read_text("utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for snippet in snippets:
        exec(compile(snippet, f"docs/{document}.md", "exec"), names)
    shown = capfd.readouterr().out
    assert shown.strip() or "print" not in "".join(snippets)
    for said in re.findall(r"print\(.*\)  # (.*)$", text, re.MULTILINE):
        assert said in shown
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / "docs" / link).exists(), link


def test_files_that_it_names_are_there(here):
    for file in set(re.findall(r"`(runs/nano/[\w./-]+)`", README)):
        assert (here / file).exists(), file
    for file in set(re.findall(r"`((?:configs|tests|moe_lm|kernels|\.ci)/[\w./-]+)`", README)):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_link(link):
    assert "://" not in link, "no link leaves the repository"
    assert (ROOT / link).exists()


def test_it_is_short_and_has_every_figure():
    assert len(README.splitlines()) < 200
    assert "TBD" not in README, "figures that nobody has measured yet"
