"""What people and scripts see: --config, --json, --verbose, completion, colours, widths."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
import sys

import pytest

from cobla_onnx.cli import terminal
from tests.cli.test_command import COMMAND, run, run_here


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "cobla.toml"

    def write(text: str):
        path.write_text(text)
        return path

    return write


def test_options_come_from_a_file_and_the_command_line_wins(demo_model, tmp_path, config):
    path = config(
        'mem = 0.4\nsolver = "milp"\nexclude = ["stem/*", "classes"]\nmin_size = 300\n'
        "dry-run = true\n[compress]\nscheme = 'channel'\n[sweep]\nmem = '0.3:0.5:2'\n"
    )
    done = run(demo_model, tmp_path / "o.onnx", "--config", path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    content = json.loads(done.stdout)
    assert content["budget"]["mem"]["limit"] == 0.4
    assert content["solver"]["name"] == "milp"
    layers = {layer["name"]: layer for layer in content["layers"]}
    assert layers["stem/conv"]["reason"] == layers["classes"]["reason"] == "excluded by option"
    assert {layer["scheme"] for layer in content["layers"]} <= {"channel", "matrix", None}
    assert not (tmp_path / "o.onnx").exists()
    done = run_here(
        demo_model, tmp_path / "o.onnx", "--config", path, "--json", "--mem", 0.6,
        "--exclude", "hidden",
    )  # fmt: skip
    content = json.loads(done.stdout)
    assert content["budget"]["mem"]["limit"] == 0.6
    excluded = [x["name"] for x in content["layers"] if x["reason"] == "excluded by option"]
    assert excluded == ["hidden"]
    done = run_here("sweep", demo_model, "--config", path, "--json")
    assert [p["budget"]["mem"] for p in json.loads(done.stdout)["points"]] == [0.3, 0.5]
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert run_here("inspect", demo_model, "--config", path, "-q").returncode == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mme = 0.5", "'mme' is not an option; did you mean 'mem'?"),
        ("[compress]\nmme = 0.5", "'[compress] mme' is not an option; did you mean 'mem'?"),
        ("[comprss]\nmem = 0.5", "did you mean 'compress'?"),
        ("quiet = 1", "quiet is on or off; write true or false"),
        ("mem = true", "mem takes a text or a number"),
        ("exclude = [true]", "exclude takes texts or numbers, one or a list"),
        ("mem = [0.5]", "mem takes a text or a number"),
        ("mem = ", "is not TOML"),
        (f"mem = 1{'0' * 5000}", "no option takes so much"),
        (f"mem = {'[' * 5000}", "no option takes so much"),
        (f"seed = 0x{'f' * 5000}", "seed has too many digits"),
        ("config = 'a.toml'", "'config' is not an option"),
        (None, "cannot be read"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(demo_model, tmp_path, config, text, message):
    path = tmp_path / "none.toml" if text is None else config(text)
    done = run_here(demo_model, tmp_path / "o.onnx", "--config", path)
    assert done.returncode == 2
    assert message in done.stderr
    assert str(path) in done.stderr
    assert done.stdout == ""


def test_a_bad_value_in_a_file_is_a_usage_error(demo_model, tmp_path, config):
    done = run_here(demo_model, tmp_path / "o.onnx", "--config", config("mem = 'much'"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def complete(line: str) -> list[str]:
    words = line.split(" ")
    environment = {
        **os.environ,
        "_COBLA_ONNX_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run([COMMAND], env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout.split()


def test_completion_knows_commands_options_and_choices():
    assert {"compress", "advise", "inspect", "sweep", "compare"} <= set(complete("cobla-onnx "))
    assert "--mem" in complete("cobla-onnx model.onnx out.onnx --m")
    assert "--mem" in complete("cobla-onnx compress --m")
    assert complete("cobla-onnx model.onnx --solver s") == ["slsqp"]
    # The shell is the program that started the command; it comes back to end itself.
    asked = [shutil.which("bash"), "-c", f'"{COMMAND}" --show-completion; exit $?']
    if asked[0] is not None:
        script = subprocess.run(asked, capture_output=True, text=True, timeout=60)
        assert script.returncode == 0
        assert "complete_bash" in script.stdout


def test_json_is_all_there_is_on_stdout_and_verbose_on_stderr(demo_model, tmp_path):
    done = run(demo_model, tmp_path / "o.onnx", "--mem", 0.5, "--json", "--verbose")
    assert done.returncode == 0
    assert json.loads(done.stdout)["output"] == str(tmp_path / "o.onnx")
    assert "singular values: 9 of 9, " in done.stderr
    done = run_here(demo_model, tmp_path / "o.onnx", "--mem", 0.5)
    assert done.stderr == ""
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 80


def in_a_terminal(*arguments: object, **environment: str) -> str:
    """Run the command with a pseudo-terminal for stdout and stderr."""
    master, slave = pty.openpty()
    child = subprocess.Popen(
        [COMMAND, *map(str, arguments)],
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environment},
    )
    os.close(slave)
    parts = []
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:
            break
        if not part:
            break
        parts.append(part)
    os.close(master)
    assert child.wait(timeout=60) == 0
    return b"".join(parts).decode()


@pytest.mark.slow
def test_colours_in_a_terminal_unless_no_color(demo_model, tmp_path):
    arguments = (demo_model, tmp_path / "o.onnx", "--mem", 0.5)
    shown = in_a_terminal(*arguments)
    assert "left" in shown
    assert "\x1b[1m" in shown
    coloured = [f"\x1b[3{digit}m" for digit in range(1, 8)] + ["\x1b[38;"]
    plain = in_a_terminal(*arguments, NO_COLOR="1")
    assert not any(code in plain for code in coloured)
    assert "\x1b" not in in_a_terminal(*arguments, TERM="dumb")


def test_verbose_lines_tell_stages_once(capsys):
    with terminal.progress(quiet=False, verbose=True) as advance:
        for done in range(4):
            advance("work", done, 3)
        advance("search: memory 0.5", 0, 9)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("work: 3 of 3, ")
    assert lines[1:] == ["search: memory 0.5, 1 of 9"]
    with terminal.progress(quiet=True, verbose=True) as advance:
        assert advance is None


def test_native_libraries_do_not_write_into_stdout(demo_model, tmp_path):
    """HiGHS writes to file descriptor 1 now and then: here a solver does so each time."""
    script = (
        "import os, scipy.optimize, sys\n"
        "solve = scipy.optimize.milp\n"
        "def loud(*a, **k):\n"
        "    os.write(1, b'noise')\n"
        "    return solve(*a, **k)\n"
        "scipy.optimize.milp = loud\n"
        "from cobla_onnx.cli import main\n"
        "main()\n"
    )
    arguments = [demo_model, tmp_path / "o.onnx", "--mem", "0.5", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["budget"]["mem"]["reached"] <= 0.5
