"""A program run by moe_lm.cli: its status, its one line for what cannot work, and its end when it is interrupted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_lm import cli
from moe_lm.cli import run_main


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nsteps = 77\n", "utf-8")
    return path


SCRIPT = """
from moe_lm.cli import parse_run_config, run_main

def main(argv):
    config, args = parse_run_config(argv, "Print steps.")
    print(config.train.steps)

if __name__ == "__main__":
    run_main(main)
"""


@pytest.mark.parametrize(
    ("argv", "status", "out", "err"),
    [
        (["run.toml"], 0, "77\n", ""),
        (["run.toml", "--train.step", "5"], 2, "",
         "--train.step is not a known setting; did you mean --train.steps?\n"),
        (["run.toml", "--train.steps", "many"], 2, "", "--train.steps = 'many' must be a whole number.\n"),
        ([], 2, "", "no config file configs/nano.toml.\n"),
        (["ru\nn.toml"], 2, "", "no config file ru n.toml; did you mean run.toml?\n"),
        (["break.toml"], 2, "", "a b is not a known setting.\n"),
        (["bad.toml"], 2, "", "bad.toml is not valid TOML: Invalid value (at line 1, column 9).\n"),
    ],
)  # fmt: skip
def test_a_program(config_file, argv, status, out, err):
    folder = config_file.parent
    (folder / "main.py").write_text(SCRIPT, "utf-8")
    (folder / "break.toml").write_text(r'"a\nb" = 1', "utf-8")
    (folder / "bad.toml").write_text("steps = many", "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    command = [sys.executable, "main.py", *argv]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


def test_run_main_returns_the_status(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "3"])
    for result in (None, 0, 5):
        with pytest.raises(SystemExit) as stop:
            run_main(lambda argv, result=result: result if argv == ["3"] else 99)
        assert stop.value.code == result


def test_an_interrupted_program_says_so_without_a_traceback(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    assert (stop.value.code, capsys.readouterr().err) == (130, "interrupted\n")


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_who_leaves_early_gets_no_traceback(lines, tmp_path):
    body = f"    time.sleep(0.5)\n    print('x\\n' * {lines})\n"
    program = f"import time\nfrom moe_lm.cli import run_main\ndef main(argv):\n{body}\nrun_main(main)\n"
    (tmp_path / "main.py").write_text(program, "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    process = subprocess.Popen(
        [sys.executable, "main.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == (b"", 141)
    process.stderr.close()


def test_run_main_lets_bugs_through():
    def main(argv):
        raise ValueError("a bug, not a setting")

    with pytest.raises(ValueError, match="a bug"):
        run_main(main)
