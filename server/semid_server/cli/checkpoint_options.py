"""Options with which a command lets its user say what a checkpoint does not."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import click

from semid_server.checkpoint import Overrides
from semid_server.model import Activation, ModelKind

if TYPE_CHECKING:
    from collections.abc import Callable


def override_options(command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of `Overrides`, handed to the function as ``overrides``.

    Parameters
    ----------
    command : str
        Name of the command, for the environment variables ``SEMID_<COMMAND>_...``.
    """

    def variable(name: str) -> dict[str, Any]:
        return {
            "envvar": f"SEMID_{command.upper()}_{name}",
            "show_envvar": True,
            "default": None,
        }

    options = [
        click.option(
            "--name",
            **variable("NAME"),
            help="Name by which clients ask for the model. Default: the one that a folder records, "
            "a torch file's own; for import, OUTPUT's.",
        ),
        click.option(
            "--kind",
            type=click.Choice([kind.value for kind in ModelKind]),
            **variable("KIND"),
            help="How the model was trained, where the file does not tell; its codes stay the "
            "same. Default: seen from the tensors and the optimizer.",
        ),
        click.option(
            "--normalize-residuals/--no-normalize-residuals",
            **variable("NORMALIZE_RESIDUALS"),
            help="Whether residuals are brought to length 1 before every layer. Changes codes: "
            "set it as the model was trained, when the file does not record it. Default: what the "
            "file records; for a bare state dict yes, but for an RQ-VAE.",
        ),
        click.option(
            "--normalize-input/--no-normalize-input",
            **variable("NORMALIZE_INPUT"),
            help="Whether rows are brought to length 1 after the batch norm, before the encoder. "
            "Changes codes; torch files never record it. Default: yes for an RQ-VAE, else no.",
        ),
        click.option(
            "--activation",
            type=click.Choice([activation.value for activation in Activation]),
            **variable("ACTIVATION"),
            help="Activation of the encoder and the decoder. Changes codes; torch files never "
            "record it. Default: relu.",
        ),
        click.option(
            "--batch-norm-eps",
            type=click.FloatRange(min=0, min_open=True),
            **variable("BATCH_NORM_EPS"),
            help="Added to the running variance of the batch norm. Changes codes; torch files "
            "never record it. Default: 1e-5.",
        ),
    ]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def with_overrides(
            *,
            name: str | None,
            kind: str | None,
            normalize_residuals: bool | None,
            normalize_input: bool | None,
            activation: str | None,
            batch_norm_eps: float | None,
            **others: Any,
        ) -> None:
            overrides = Overrides(
                name=name,
                kind=None if kind is None else ModelKind(kind),
                normalize_residuals=normalize_residuals,
                normalize_input=normalize_input,
                activation=None if activation is None else Activation(activation),
                batch_norm_eps=batch_norm_eps,
            )
            function(overrides=overrides, **others)

        for option in reversed(options):
            with_overrides = option(with_overrides)
        return with_overrides

    return decorate
