"""Metrics do not grow with what callers send."""

from __future__ import annotations

import re

import grpc
import live
import numpy as np
import pytest

from semid.v1 import semid_pb2 as pb
from semid.v1.semid_pb2_grpc import SemanticIdServiceStub

SERIES = re.compile(r"^((?:semid|grpc)_\w+(?:\{.*\})?) \S+$", re.MULTILINE)


def _series(replica) -> set[str]:
    return set(SERIES.findall(replica.scrape()))


def test_no_series_is_made_by_names_that_callers_choose(replicas):
    replica = replicas[1]
    tensor = pb.Tensor(
        dtype=pb.DATA_TYPE_FLOAT32, shape=[1, 384], data=np.ones(384, "<f4").tobytes()
    )
    with grpc.insecure_channel(replica.target) as channel:
        stub = SemanticIdServiceStub(channel)
        stub.Encode(pb.EncodeRequest(tensor=tensor), timeout=60)
        before = _series(replica)
        for number in range(50):
            metadata = (("x-request-id", f"id-{number}"), ("user-agent", f"agent-{number}"))
            for request in (
                pb.EncodeRequest(tensor=tensor, model=f"model-{number}"),
                pb.EncodeRequest(tensor=tensor, expected_fingerprint=f"{number:064x}"),
                pb.EncodeRequest(tensor=pb.Tensor(dtype=number)),
            ):
                with pytest.raises(grpc.RpcError):
                    stub.Encode(request, timeout=60, metadata=metadata)
            for method in (f"/semid.v1.SemanticIdService/M{number}", f"/other.S{number}/Encode"):
                with pytest.raises(grpc.RpcError, match="UNIMPLEMENTED"):
                    channel.unary_unary(method)(b"", timeout=60)
    assert _series(replica) == before


def test_the_series_of_a_server_with_one_model_are_few(replicas):
    """Methods, codes, operations, levels, layers and buckets: all of them fixed by the contract,
    the configuration or the model."""
    assert len(_series(replicas[0])) < 1000


def test_the_labels_are_those_that_the_readme_names(replicas):
    page = "".join(replica.scrape() for replica in replicas)
    used = {
        label for series in SERIES.findall(page) for label in re.findall(r'[{,](\w+)="', series)
    }
    section = (live.ROOT / "README.md").read_text().split("\n## Metrics\n")[1].split("\n## ")[0]
    told = {
        label
        for line in section.splitlines()
        if line.startswith("- ")
        for clause in line[2:].split("; ")
        for label in re.findall(r"`(\w+)`", clause.partition(":")[0])
    }
    assert told == used - {"le"}
