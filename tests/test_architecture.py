"""The house rules that no reader has to check: who imports whom, how long a file gets. Reads sources, imports none."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

COMMANDS = {"bench", "generate", "routes", "export", "train.py", "serve.py"}
"""Programs: they import any room, and no room imports them."""

ROOMS = {
    "kernels": set(),
    "config": set(),
    "toml": {"config"},
    "cli": {"config", "toml"},
    "scaling": {"config", "toml"},
    "model": {"config", "kernels"},
    "data": {"config"},
    "checkpoint": {"config", "toml", "model"},
    "parallel": {"config", "model"},
    "engine": {"config", "model", "kernels", "checkpoint", "parallel"},
    "train": {"config", "toml", "model", "data", "checkpoint", "parallel", "scaling"},
    "server": {"config", "engine"},
}
"""The rooms that each room may import, beside itself."""

GRANTED = {
    ("moe_lm", "moe_lm.checkpoint"): "the package's face: moe_lm.load and moe_lm.load_tokenizer, on demand",
    ("checkpoint", "moe_lm.data.tokenizer"): "a checkpoint holds its tokenizer, as a Hugging Face directory does",
    ("server", "moe_lm.data.tokenizer"): "requests arrive as text",
    ("train", "moe_lm.bench.machine"): "MFU is a share of what this machine was measured to do",
    ("scaling", "moe_lm.cli"): "the room has a command of its own, python -m moe_lm.scaling",
    ("data", "moe_lm.cli"): "the room has a command of its own, python -m moe_lm.data",
    ("data", "moe_lm.toml"): "that command reads the config whose data it reports on",
    ("data", "moe_lm.scaling.html"): "its page looks like the others",
    ("data", "moe_lm.scaling.text"): "its tables and sizes look like the others",
    ("scaling", "moe_lm.model"): "the meta-device check cuts the real model's weights",
    ("scaling", "moe_lm.bench.machine"): "plans for this machine start from its measured rates",
    ("scaling", "kernels"): "and from what the operations reach on it",
    ("scaling", "kernels.cpu.decoder"): "and the decoder",
    ("train.py", "moe_lm.bench.talk"): "the program ends its run by letting the model talk and be timed",
}
"""Arrows from a room to a module that the table above does not allow, with the reason."""

PACKAGES = {
    "kernels": {"torch", "einops"},
    "config": set(),
    "toml": set(),
    "cli": set(),
    "scaling": {"torch"},
}
"""Third-party packages of the rooms that are held to a list; none for the two that answer before torch is loaded."""

OPTIONAL = {"triton", "matplotlib", "llguidance", "transformers", "datasketch", "sklearn"}
"""What is imported where it is used, and comes with an extra."""

LIBRARY = ("kernels", "model", "engine", "data", "checkpoint")
"""Rooms that return what they have to say, or raise it."""


def sources() -> list[Path]:
    """The Python files of the product."""
    programs = [ROOT / name for name in ("train.py", "serve.py") if (ROOT / name).exists()]
    return programs + sorted([*(ROOT / "kernels").rglob("*.py"), *(ROOT / "moe_lm").rglob("*.py")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in sources()}


def room_of(module: str) -> str:
    """`kernels`, `train.py`, `moe_lm` for the package's face, else the name below moe_lm."""
    top, _, rest = module.partition(".")
    if top != "moe_lm":
        return top if top == "kernels" else f"{top}.py"
    return rest.partition(".")[0] or "moe_lm"


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), path.name)


def imports(path: Path, ours: set[str]) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, at any depth, with the line; `from a import b` is a.b where that is a module.

    Names given to importlib.import_module count where they are spelt out, and by their beginning in an f-string.
    """
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if below in ours else node.module, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            name = node.args[0]
            name = name.values[0] if isinstance(name, ast.JoinedStr) else name
            assert isinstance(name, ast.Constant), f"{path}:{node.lineno} imports a name that this test cannot read"
            yield name.value.rstrip("."), node.lineno


def is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("kernels", "moe_lm", "train", "serve")


def refusal(importer: str, imported: str) -> str | None:
    """Why the module `importer` may not import the module `imported` of ours; None if it may."""
    here, there = room_of(importer), room_of(imported)
    if here == there or (here, imported) in GRANTED:
        return None
    if there in COMMANDS:
        return f"{there} is a program, which nothing imports"
    if there == "cli":
        return None if here in COMMANDS else "the command line is for programs"
    if here in COMMANDS:
        return None
    if here == "moe_lm" or here not in ROOMS:
        return f"{here} is no room of the table"
    return None if there in ROOMS[here] else f"{here} may import {', '.join(sorted(ROOMS[here])) or 'none of ours'}"


def test_no_arrow_but_the_allowed_ones():
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {imported}: {reason}"
        for importer, path in modules().items()
        for imported, line in imports(path, set(modules()))
        if is_ours(imported) and (reason := refusal(importer, imported))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("kernels.cpu.rope", "moe_lm.config"),
        ("moe_lm.config", "moe_lm.model"),
        ("moe_lm.model.moe", "moe_lm.train.loop"),
        ("moe_lm.engine.runner", "moe_lm.train"),
        ("moe_lm.train.loop", "moe_lm.engine"),
        ("moe_lm.train.loop", "moe_lm.bench.speculation"),
        ("moe_lm.train.loop", "moe_lm.cli"),
        ("moe_lm.checkpoint.hf", "moe_lm.data.loader"),
        ("moe_lm.data.loader", "moe_lm"),
        ("moe_lm.novelty", "moe_lm.config"),
        ("moe_lm.bench.talk", "train"),
    ],
)
def test_other_arrows_are_refused(importer, imported):
    assert refusal(importer, imported)


def test_imports_are_found_at_any_depth(tmp_path):
    file = tmp_path / "m.py"
    file.write_text(
        "import a.b, c\nfrom d import e\n\ndef f():\n    import g\n    if f:\n        from h import i\n"
        "    importlib.import_module(f'j.{f}')\n"
    )
    assert [name for name, _ in imports(file, {"h.i"})] == ["a.b", "c", "d", "g", "h.i", "j"]


def third_party(path: Path) -> set[str]:
    found = {name.partition(".")[0] for name, _ in imports(path, set(modules())) if not is_ours(name)}
    return found - sys.stdlib_module_names


def test_packages_of_rooms():
    for module, path in modules().items():
        room = room_of(module)
        allowed = set(PACKAGES.get(room, ()))
        if module.startswith(("kernels.gpu", "kernels.check")):
            allowed |= {"triton"}
        elif module in ("kernels.bench.roofline", "moe_lm.scaling.plots"):
            allowed |= {"matplotlib"}
        elif room not in PACKAGES:
            allowed |= third_party(path) - {"triton", "transformers"}
        if module in ("moe_lm.bench.peers", "moe_lm.bench.train_peer"):
            allowed |= {"transformers"}
        assert third_party(path) <= allowed, f"{path.relative_to(ROOT)} imports {third_party(path) - allowed}"


def test_every_dependency_is_declared_and_imported():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    declared = {re.match(r"[\w-]+", line)[0] for line in tomllib.loads(text)["project"]["dependencies"]}
    used = set().union(*(third_party(path) for path in modules().values())) - OPTIONAL
    assert used == {name.replace("-", "_") for name in declared}


def test_files_stay_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in sources()
        if (lines := len(path.read_text("utf-8").splitlines())) >= (80 if path.parent == ROOT else 450)
    }
    assert not long


def test_nothing_pickles():
    pickling = {"torch.load", "torch.save"}
    for module, path in modules().items():
        named = {name for name, _ in imports(path, pickling)}
        assert not named & {"pickle", "cloudpickle", "dill", "shelve", "marshal", *pickling}, module
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in pickling, f"{module}:{node.lineno}"
            elif isinstance(node, ast.keyword):
                assert node.arg != "allow_pickle", f"{module}:{node.value.lineno}"


def test_libraries_print_nothing():
    for module, path in modules().items():
        program = module.endswith(".__main__") or module.startswith("kernels.bench")
        for node in ast.walk(tree_of(path)):
            if room_of(module) in LIBRARY and not program and isinstance(node, ast.Call):
                assert ast.unparse(node.func) != "print", f"{module}:{node.lineno}"
