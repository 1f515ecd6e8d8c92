"""The `semid` command: help, versions, and every failure as one sentence."""

from importlib.metadata import EntryPoint, entry_points, version

import click
import pytest
from click.testing import CliRunner

from semid_client import SemidClientError
from semid_client.cli.root import ENTRY_POINTS, Root, root

SEMID = "import semid_client.cli; semid_client.cli.main()"


def test_help_lists_every_command_with_a_sentence_and_imports_neither_torch_nor_the_server(
    run_python,
):
    done = run_python(
        "import sys, atexit, semid_client.cli\n"
        "heavy = {'torch', 'numba', 'semid_server.serving', 'semid_server.checkpoint'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules)), file=sys.stderr))\n"
        "semid_client.cli.main()",
        "--help",
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    lines = done.stdout.partition("Commands:\n")[2].splitlines()
    listed = {line.split()[0]: line.split()[1:] for line in lines if line[2] != " "}
    assert set(listed) == {entry.name for entry in entry_points(group=ENTRY_POINTS)}
    assert all(listed.values())


def test_the_version_is_the_distributions(run_python):
    done = run_python(SEMID, "--version")
    assert (done.returncode, done.stdout) == (0, f"semid {version('semid')}\n")


@pytest.mark.parametrize("missing", ["click", "tqdm"])
def test_a_base_install_says_what_the_command_needs(missing, run_python):
    done = run_python(
        "import importlib.util, sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {missing!r}: raise ModuleNotFoundError(name=name)\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name: None if name == {missing!r} else find(name)\n"
        "sys.meta_path.insert(0, Without())\n" + SEMID
    )
    assert done.returncode == 1
    assert done.stderr == f"the semid command needs {missing}: pip install 'semid[cli]'\n"
    assert not done.stdout


def test_a_command_that_does_not_exist_is_a_usage_error(run_python):
    done = run_python(SEMID, "encod")
    assert done.returncode == 2
    assert "No such command 'encod'" in done.stderr


def test_a_connection_that_fails_is_told_in_one_sentence(make_server, run_python):
    port = make_server().port
    done = run_python(SEMID, "info", "--target", f"127.0.0.1:{port}", "--tls")
    assert done.returncode == 1
    *_, sentence = done.stderr.splitlines()  # after what gRPC's core logs itself
    assert sentence.startswith(f"Error: GetModel at 127.0.0.1:{port} failed with UNAVAILABLE")
    assert sentence.endswith("whoever listens there speaks no TLS, while this client does")


def test_a_flag_that_would_do_nothing_is_refused(run_python):
    for flags, says in [
        (("--target", "localhost:1", "--device", "cpu"), "--device is of use with --checkpoint"),
        (
            ("--target", "localhost:1", "--allow-degenerate"),
            "--allow-degenerate is of use with --checkpoint",
        ),
        (("--checkpoint", "x", "--token", "x"), "--token is of use with --target"),
        (("--checkpoint", "x", "--in-flight", "2"), "--in-flight is of use with --target"),
    ]:
        done = run_python(SEMID, "encode", "in.npy", "-o", "out.npy", *flags)
        assert done.returncode == 2
        assert done.stderr.endswith(f"Error: {says} alone.\n")


class Commands(Root):
    """A root whose commands are those given."""

    def __init__(self, **commands):
        super().__init__("semid")
        for name, callback in commands.items():
            self.add_command(click.Command(name, callback=callback))

    def get_command(self, ctx, cmd_name):
        return click.Group.get_command(self, ctx, cmd_name)


def raising(error):
    def callback():
        raise error

    return callback


def test_an_error_of_semids_is_one_sentence_and_status_1():
    result = CliRunner().invoke(
        Commands(work=raising(SemidClientError("the server is away"))), ["work"]
    )
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "Error: the server is away\n"


def test_an_interrupt_is_one_sentence_and_status_130():
    result = CliRunner().invoke(Commands(work=raising(KeyboardInterrupt())), ["work"])
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Interrupted.\n")


def test_a_bug_keeps_its_traceback():
    result = CliRunner().invoke(Commands(work=raising(ZeroDivisionError())), ["work"])
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("command", "extra"),
    [("encode", "cli"), ("health", "cli"), ("serve", "server"), ("inspect", "server")],
)
def test_a_command_whose_extra_is_not_installed_names_it(command, extra):
    error = ModuleNotFoundError("No module named 'torch'", name="torch")
    result = CliRunner().invoke(Commands(**{command: raising(error)}), [command])
    assert result.exit_code == 1
    assert result.stderr == (
        f"Error: semid {command} needs torch, which is not installed: "
        f"pip install 'semid[{extra}]'\n"
    )


def test_a_command_that_cannot_be_imported_names_its_extra(run_python):
    done = run_python(
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Without())\n" + SEMID,
        "inspect",
        "nothing",
    )
    assert done.returncode == 1
    assert done.stderr.endswith(
        "Error: semid inspect needs torch, which is not installed: pip install 'semid[server]'\n"
    )


@pytest.mark.parametrize("name", ["encode", "decode", "verify", "info"])
def test_every_flag_has_an_environment_twin_and_help(name):
    (entry,) = entry_points(group=ENTRY_POINTS, name=name)
    flags = [flag for flag in entry.load().params if isinstance(flag, click.Option)]
    assert flags
    for flag in flags:
        assert flag.envvar.startswith("SEMID_")
        assert flag.show_envvar
        assert flag.help.endswith(".")


def test_an_entry_point_to_nothing_is_listed_as_such():
    from semid_client.cli.root import _summary  # noqa: PLC0415

    assert _summary(EntryPoint("x", "semid_client.nothing:x", ENTRY_POINTS)) == "(not installed)"
    assert root.name == "root"
