"""The root of the ``semid`` command, which finds all others by their entry points."""

from __future__ import annotations

import ast
import importlib.util
from importlib.metadata import entry_points, version
from typing import TYPE_CHECKING, Any

import click

from semid_client._errors import SemidClientError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "semid.commands"

WITHOUT_SERVER = frozenset({"health"})
"""Commands of the server's part that need no more than those of the client."""


class Root(click.Group):
    """A group whose commands are imported only when they are called.

    An entry point of the group ``semid.commands`` is a command. What ``--help`` says of it is the
    first line of its module's docstring, after "`semid NAME`: "; that line is read, not imported,
    so that help needs neither time nor torch.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 -- click's signature
        """Names of all commands, of every installed part."""
        return sorted(entry_points(group=ENTRY_POINTS).names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 -- click's signature
        """Import the command."""
        for entry in entry_points(group=ENTRY_POINTS, name=cmd_name):
            try:
                command: click.Command = entry.load()
            except ModuleNotFoundError as error:
                raise _needs(entry, error) from error
            return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 -- click's signature
        """List all commands with what they do."""
        with formatter.section("Commands"):
            found = sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name)
            formatter.write_dl([(entry.name, _summary(entry)) for entry in found])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what semid raises on purpose becomes one sentence."""
        try:
            return super().invoke(ctx)
        except SemidClientError as error:
            raise click.ClickException(str(error)) from error
        except ModuleNotFoundError as error:
            for entry in entry_points(group=ENTRY_POINTS, name=ctx.invoked_subcommand or ""):
                raise _needs(entry, error) from error
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)


def _summary(entry: EntryPoint) -> str:
    """First line of the docstring of a command's module, without running the module."""
    spec = importlib.util.find_spec(entry.module)
    if spec is None or spec.origin is None:
        return "(not installed)"
    with open(spec.origin, "rb") as file:  # noqa: PTH123 -- bytes, which ast decodes as Python does
        docstring = ast.get_docstring(ast.parse(file.read())) or ""
    first, _, _ = docstring.partition("\n")
    _, _, summary = first.rpartition("`: ")
    return summary[:1].upper() + summary[1:]


def _needs(entry: EntryPoint, error: ModuleNotFoundError) -> click.ClickException:
    """Say which extra brings a module that a command lacks."""
    of_client = entry.module.startswith("semid_client.") or entry.name in WITHOUT_SERVER
    extra = "cli" if of_client else "server"
    return click.ClickException(
        f"semid {entry.name} needs {error.name}, which is not installed: "
        f"pip install 'semid[{extra}]'"
    )


@click.command(cls=Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("semid"), prog_name="semid", message="%(prog)s %(version)s")
def root() -> None:
    """Semantic IDs as a service: embeddings to codes and back.

    Every flag can also be set in the environment; `semid COMMAND --help` names the variables.
    """
