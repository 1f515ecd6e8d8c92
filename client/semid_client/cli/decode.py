"""`semid decode`: a file of semantic IDs to a file of reconstructions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click
import numpy as np

from semid_client._errors import FingerprintMismatchError, InvalidInputError
from semid_client._tensor import check_code_type
from semid_client.cli._convert import FileFlags, Plan, convert, file_options
from semid_client.cli._options import F, option
from semid_client.files import FileError, check_output

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from semid_client.files import Engine, Source

ENV = "SEMID_DECODE"


def extra_digit_option(env: str) -> Callable[[F], F]:
    """Add the flag that tells the last code of a row from an extra digit to a command."""
    return option(
        "--extra-digit/--no-extra-digit",
        env=env,
        default=None,
        help="Whether the last code of each row is the extra digit of --unique, not a code. "
        "Default: as .parquet, .safetensors and streams record, yes for .pt, else no.",
    )


@click.command(short_help="Semantic IDs to reconstructed embeddings.")
@file_options(ENV, "IN", ".npy, .npz, .parquet, .safetensors, .jsonl or .pt")
@extra_digit_option(ENV)
@option(
    "--mode",
    env=ENV,
    type=click.Choice(["sum", "calibrated"]),
    default="sum",
    show_default=True,
    help="sum: the sum of the chosen centroids, through the model's decoder if it has one. "
    "calibrated: on the scale of the embeddings, for models that were calibrated.",
)
def decode(mode: Literal["sum", "calibrated"], *, extra_digit: bool | None, **flags: Any) -> None:
    """Write the reconstruction behind each semantic ID of IN to OUT.

    IN is a .npy, .npz, .parquet, .safetensors, .jsonl or GRID .pt file of codes (n, l) of any
    integer type, the first l of the model's L, or -, an Arrow stream on standard input; OUT will
    hold float32 (n, D). Files may be larger than memory, and URLs.
    """
    files = {name: flags.pop(name) for name in FileFlags.__dataclass_fields__}
    given = FileFlags(**files)
    check_output(given.output, what="rows", unique=None, on_bad_row=given.on_bad_row)

    def plan(engine: Engine, source: Source) -> Plan:
        info = engine.info
        n_codes = codes_of(source, engine, extra_digit=extra_digit)

        def compute(codes: NDArray[Any]) -> NDArray[Any]:
            return engine.decode(codes[:, :n_codes], mode)

        return Plan(
            width=info.input_dim,
            dtype=np.dtype(np.float32),
            compute=compute,
            options={
                "mode": mode,
                "extra_digit": extra_digit,
                "calibration": engine.info.calibration if mode == "calibrated" else "",
            },
            column="embedding",
        )

    convert(given, "codes", plan, flags)


def codes_of(source: Source, engine: Engine, *, extra_digit: bool | None) -> int:
    """Codes in each row of a file of semantic IDs, without the extra digit.

    Raises
    ------
    FileError
        If those are not codes of the engine's model.
    FingerprintMismatchError
        If the file records that they are of another one.
    """
    info = engine.info
    try:
        check_code_type(source.dtype)
    except InvalidInputError as error:
        raise FileError(source.path, error.problem) from error
    recorded = source.metadata.get("semid.fingerprint", info.fingerprint)
    if recorded != info.fingerprint:
        raise FingerprintMismatchError(
            f"{source.path}: holds codes of fingerprint {recorded}, but model {info.name!r} "
            f"{engine.where} has {info.fingerprint}: its codes belong to another codebook"
        )
    if source.any_width:
        return info.n_layers
    if extra_digit is None:
        extra_digit = bool(source.extra_digit)
    n_codes = source.width - extra_digit
    if not 1 <= n_codes <= info.n_layers:
        raise FileError(
            source.path,
            f"has rows of {n_codes} codes, but model {info.name!r} {engine.where} has "
            f"{info.n_layers} layers"
            + ("" if extra_digit else "; if the last is the extra digit, say --extra-digit"),
        )
    return n_codes
