"""Files of embeddings in every format that is read, and outputs of every format, read back."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import torch

FORMATS = ("npy", "npz", "parquet", "safetensors", "jsonl", "pt")
"""Endings of all outputs."""


def ids_of(n):
    return [f"item é {i}" for i in range(n)]


def table(rows, *, fixed=False, ids=None):
    """Ids, a column of lists, and one that nobody asked for."""
    ids = ids_of(len(rows)) if ids is None else ids
    kind = pa.list_(pa.float32(), rows.shape[1]) if fixed else pa.list_(pa.float32())
    return pa.table({"item_id": ids, "vector": pa.array(list(rows), kind), "title": ids})


def as_stream(content):
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, content.schema) as writer:
        writer.write_table(content, max_chunksize=10)
    return sink.getvalue()


def read_stream(data):
    """Ids, rows (None where null), and the schema."""
    with pa.ipc.open_stream(data) as reader:
        found = reader.read_all()
    return found["id"].to_pylist(), found.column(1).to_pylist(), found.schema


def write_folder(folder, rows):
    (folder / "many/deeper").mkdir(parents=True)
    whole, cut = table(rows), len(rows) // 2
    pq.write_table(whole.slice(0, cut), folder / "many/a.parquet", row_group_size=7)
    pq.write_table(whole.slice(cut), folder / "many/deeper/b.parquet", row_group_size=9)
    for hidden in ("many/_temporary/0", "many/.ipynb_checkpoints"):
        (folder / hidden).mkdir(parents=True)
        pq.write_table(whole.slice(0, 1), folder / hidden / "half.parquet")


def write_npz(folder, rows):
    np.savez_compressed(folder / "ids.npz", x=rows, id=np.array(ids_of(len(rows))))


def write_parquet(folder, rows, *, fixed):
    name = "fixed.parquet" if fixed else "list.parquet"
    pq.write_table(table(rows, fixed=fixed), folder / name, row_group_size=13)


INPUTS = {
    "in.npy": lambda folder, rows: np.save(folder / "in.npy", rows),
    "in.npz": lambda folder, rows: np.savez(folder / "in.npz", x=rows, y=np.arange(len(rows))),
    "ids.npz": write_npz,
    "in.safetensors": lambda folder, rows: safetensors.numpy.save_file(
        {"x": rows, "y": np.arange(3)}, folder / "in.safetensors"
    ),
    "in.pt": lambda folder, rows: torch.save({"x": torch.tensor(rows)}, folder / "in.pt"),
    "list.parquet": lambda folder, rows: write_parquet(folder, rows, fixed=False),
    "fixed.parquet": lambda folder, rows: write_parquet(folder, rows, fixed=True),
    "many": write_folder,
    "many/**/[a-b].parquet": write_folder,
}
"""What writes a file of each name."""

NAMED = {"ids.npz", "list.parquet", "fixed.parquet", "many", "many/**/[a-b].parquet"}
"""Inputs that have ids."""


def read_output(path, column):
    """Ids (None if the format has none) and rows of an output."""
    path = Path(path)
    if path.suffix == ".npy":
        return None, np.load(path)
    if path.suffix == ".npz":
        with np.load(path) as found:
            return found["id"].tolist(), found[column]
    if path.suffix == ".safetensors":
        return None, safetensors.numpy.load_file(path)[column]
    if path.suffix == ".parquet":
        found = pq.read_table(path)
        return found["id"].to_pylist(), np.array(found[column].to_pylist())
    if path.suffix == ".jsonl":
        items = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return [item["id"] for item in items], np.array([item[column] for item in items])
    tensor = torch.load(path, weights_only=True).numpy()
    return None, tensor.T if column == "codes" else tensor
