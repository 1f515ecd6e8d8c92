"""How `semid serve` takes its settings, and what it says of wrong ones."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from semid_server.cli import serve as module
from semid_server.cli.serve import serve
from semid_server.errors import ConfigurationError
from semid_server.serving.config import ModelSource


@pytest.fixture(autouse=True)
def _logging_put_back():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def served(monkeypatch):
    """Record the configuration that the command builds, and serve nothing."""
    configs = []

    class Server:
        unfinished = False

        def __init__(self, config, *, announce):
            configs.append(config)
            self._announce = announce

        async def run(self):
            await asyncio.sleep(0)
            self._announce("serving toy on 127.0.0.1:1")

    monkeypatch.setattr(module, "Server", Server)
    return configs


def run(*arguments, **environment):
    return CliRunner().invoke(serve, arguments, env=environment)


def test_flags_win_over_the_environment_and_both_over_the_file(served, tmp_path):
    file = tmp_path / "semid.toml"
    file.write_text('checkpoint = "from-file"\nport = 1\nmetrics-port = 2\nmax_batch_rows = 3\n')
    result = run(
        "--config",
        str(file),
        "--port",
        "11",
        SEMID_SERVE_PORT="12",
        SEMID_SERVE_METRICS_PORT="13",
    )
    assert result.exit_code == 0, result.output
    (config,) = served
    assert config.models == (ModelSource(Path("from-file")),)
    assert (config.port, config.metrics_port, config.max_batch_rows) == (11, 13, 3)


@pytest.mark.parametrize(
    ("arguments", "environment", "file"),
    [
        (["--checkpoint", "a=x/y", "--checkpoint", "z"], {}, ""),
        ([], {"SEMID_SERVE_CHECKPOINT": "a=x/y,z"}, ""),
        ([], {}, 'checkpoint = ["a=x/y", "z"]'),
    ],
)
def test_several_checkpoints_can_be_given_each_with_a_name(
    served, tmp_path, arguments, environment, file
):
    config = tmp_path / "semid.toml"
    config.write_text(file)
    result = run("--config", str(config), *arguments, **environment)
    assert result.exit_code == 0, result.output
    assert served[0].models == (ModelSource(Path("x/y"), "a"), ModelSource(Path("z")))


@pytest.mark.parametrize("value", ["=x", "name="])
def test_a_name_without_a_path_is_a_usage_error(value):
    result = run("--checkpoint", value)
    assert result.exit_code == 2
    assert "expected NAME=PATH" in result.output


def test_a_path_may_hold_an_equals_sign(served, tmp_path):
    folder = tmp_path / "a=b"
    folder.mkdir()
    run("--checkpoint", str(folder))
    assert served[0].models == (ModelSource(folder),)


def test_every_flag_has_an_environment_twin_and_help():
    for option in serve.params:
        assert option.envvar == f"SEMID_SERVE_{option.name.upper()}"
        assert option.show_envvar
        assert len(option.help) > 30


def test_booleans_and_files_of_settings_can_come_from_the_environment(served, tmp_path):
    file = tmp_path / "semid.toml"
    file.write_text("normalize-residuals = false\nreference = true\n")
    result = run(SEMID_SERVE_CONFIG=str(file), SEMID_SERVE_CHECKPOINT="x")
    assert result.exit_code == 0, result.output
    assert served[0].overrides.normalize_residuals is False
    assert served[0].reference is True


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("port = [1, 2]", "gives 'port' more than one value"),
        ("prot = 1", "sets 'prot', which no flag has as its name; known: activation"),
        ("port = ", "is not valid TOML"),
        ("port = 'many'", "sets 'port' to 'many'; expected an integer"),
        ("max_queue_requests = true", "sets 'max_queue_requests' to true; expected an integer"),
        ("grace = 'soon'", "sets 'grace' to 'soon'; expected a number"),
        ("tls-cert = true", "sets 'tls-cert' to true; expected a string"),
        ("device = 0", "sets 'device' to 0; expected a string"),
        ("tracing = 1", "sets 'tracing' to 1; expected true or false"),
        ('checkpoint = ["x", 2]', "sets 'checkpoint' to 2; expected a string"),
        (
            "max-queue-requests = 5\nmax_queue_requests = 6",
            "sets 'max-queue-requests' to 5 and 'max_queue_requests' to 6, which are the same flag",
        ),
    ],
)
def test_a_bad_configuration_file_is_told_the_place(served, tmp_path, content, text):
    file = tmp_path / "semid.toml"
    file.write_text(content)
    result = run("--config", str(file), "--checkpoint", "x")
    assert result.exit_code == 2
    assert text in " ".join(result.output.split())
    assert not served


@pytest.mark.parametrize("flag", ["max-stall", "max-batch-seconds", "grace", "watch"])
@pytest.mark.parametrize("value", ["inf", "nan", "1e300"])
def test_seconds_that_no_timer_takes_are_refused(served, flag, value):
    result = run("--checkpoint", "x", f"--{flag}", value)
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {flag.replace('-', '_')} is {float(value)}; expected")
    assert result.output.count("\n") == 1
    assert not served


@pytest.fixture
def bound(monkeypatch):
    """Record which configurations come as far as to have their addresses bound."""
    configs = []

    class Serving:
        unfinished = False

        def __init__(self, config, **_):
            configs.append(config)

        async def run(self): ...

    monkeypatch.setattr(module, "Server", Serving)
    monkeypatch.setattr(module, "Processes", Serving)
    return configs


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    ("addresses", "first", "second"),
    [
        ("--admin-port=7000", "0.0.0.0:7000", "--admin-port"),
        ("--admin-port=7000 --admin-host=127.0.0.1", "0.0.0.0:7000", "--admin-port"),
        ("--admin-port=7000 --host=::1 --admin-host=::", "[::1]:7000", "--admin-port"),
        ("--admin-port=7000 --host=127.1 --admin-host=127.0.0.1", "127.1:7000", "--admin-port"),
        ("--metrics-port=7000", "0.0.0.0:7000", "--metrics-port"),
        ("--admin-port=8000 --metrics-port=8000", "0.0.0.0:8000", "--metrics-port"),
    ],
)
def test_two_addresses_that_meet_are_refused_before_either_is_bound(
    bound, processes, addresses, first, second
):
    result = run("--checkpoint=x", f"--processes={processes}", "--port=7000", *addresses.split(" "))
    assert result.exit_code == 1
    assert f"{first}, of " in result.output
    assert f"choose another with {second}" in result.output
    assert result.output.count("\n") == 1
    assert not bound


@pytest.mark.parametrize(
    "addresses",
    [
        "--port=0 --admin-port=0 --metrics-port=0",
        "--port=7000 --metrics-port=7000 --no-metrics",
        "--port=7000 --host=127.0.0.1 --admin-port=7000 --admin-host=127.0.0.2",
    ],
)
def test_addresses_that_do_not_meet_are_taken(bound, addresses):
    result = run("--checkpoint=x", *addresses.split(" "))
    assert result.exit_code == 0, result.output
    assert len(bound) == 1


def test_what_the_server_refuses_is_one_sentence_and_status_one(monkeypatch):
    class Server:
        unfinished = False

        def __init__(self, config, *, announce): ...

        async def run(self):
            raise ConfigurationError("cannot listen on 0.0.0.0:1")

    monkeypatch.setattr(module, "Server", Server)
    result = run("--checkpoint", "x")
    assert result.exit_code == 1
    assert result.output == "Error: cannot listen on 0.0.0.0:1\n"


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("unfinished", [False, True])
def test_with_json_logs_what_the_server_refuses_is_a_line_of_json(
    monkeypatch, capfd, processes, unfinished
):
    class Refusing:
        def __init__(self, config, **_others):
            self.unfinished = unfinished

        async def run(self):
            raise ConfigurationError("cannot listen on 0.0.0.0:1")

    monkeypatch.setattr(module, "Server", Refusing)
    monkeypatch.setattr(module, "Processes", Refusing)
    monkeypatch.setattr(module, "leave_at_once", sys.exit)
    result = run(
        *("--checkpoint=x", f"--processes={processes}"),
        *("--log-format=json", "--log-level=error"),
    )
    for handler in logging.getLogger().handlers:
        handler.flush()
    assert result.exit_code == 1
    assert result.output == ""
    line = json.loads(capfd.readouterr().err)
    assert line["time"]
    assert (line["level"], line["message"]) == ("ERROR", "cannot listen on 0.0.0.0:1")


def test_a_standard_output_that_nobody_reads_is_no_reason_to_end(served, monkeypatch, caplog):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        serve.main(["--checkpoint", "x"], standalone_mode=False)
    assert "semid: serving toy on 127.0.0.1:1" in caplog.text
    assert "standard output" in caplog.text


def test_where_it_listens_is_printed_on_standard_output(served):
    result = run("--checkpoint", "x")
    assert result.stdout == "semid: serving toy on 127.0.0.1:1\n"


@pytest.mark.parametrize(("given", "found"), [(None, "NONE"), ("INFO", "INFO")])
def test_grpc_writes_no_lines_of_its_own_unless_the_operator_wants_them(given, found):
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    ran = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import os; import semid_server.cli.quiet_grpc; print(os.environ['GRPC_VERBOSITY'])",
        ],
        env=environment | ({} if given is None else {"GRPC_VERBOSITY": given}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == found
