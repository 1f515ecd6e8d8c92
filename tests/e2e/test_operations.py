"""What an operator's tools see: health, reflection, metrics."""

from __future__ import annotations

import shutil
import signal
import subprocess

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from waiting import wait_until

from semid.v1 import semid_pb2 as pb

SERVICE = "semid.v1.SemanticIdService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
STOP_SECONDS = 60.0


@pytest.mark.parametrize("service", ["", SERVICE])
def test_health_is_serving_by_both_names(digits_channel, service):
    stub = health_pb2_grpc.HealthStub(digits_channel)
    assert stub.Check(health_pb2.HealthCheckRequest(service=service)).status == SERVING


def test_health_of_an_unknown_service_is_not_found(digits_channel):
    with pytest.raises(grpc.RpcError) as caught:
        health_pb2_grpc.HealthStub(digits_channel).Check(
            health_pb2.HealthCheckRequest(service="semid.v2.Nothing")
        )
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_watcher_of_health_sees_the_drain_and_does_not_hold_it_up(serve, reference_dir):
    server = serve(reference_dir / "digits_rkmeans/model.ckpt", "--grace", 10 * STOP_SECONDS)
    with server.channel() as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE)
        )
        assert next(watch).status == SERVING
        server.signal(signal.SIGTERM)
        assert next(watch).status == NOT_SERVING
        assert server.wait(STOP_SECONDS) == 0, "a drain of nothing lasts for no grace period"


def test_reflection_lists_the_services(digits_channel):
    services = set(ProtoReflectionDescriptorDatabase(digits_channel).get_services())
    assert services == {
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_reflection_gives_the_contract_that_is_committed(digits_channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(digits_channel)
    (answer,) = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)])
    )
    (serialized,) = answer.file_descriptor_response.file_descriptor_proto
    told = descriptor_pb2.FileDescriptorProto.FromString(serialized)
    committed = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(committed)
    assert told == committed


def test_promtool_finds_nothing_wrong_with_the_metrics(digits_server, client, digits):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    client.decode(client.encode(digits[:100]))
    checked = subprocess.run(
        [promtool, "check", "metrics"],
        input=digits_server.scrape(),
        check=False,
        capture_output=True,
        text=True,
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_what_was_done_is_counted(digits_server, client, digits):
    def rows() -> float:
        return digits_server.metric("semid_rows_total", operation="encode")

    def calls(code: str) -> float:
        return digits_server.metric(
            "grpc_server_handled_total", grpc_method="Encode", grpc_code=code
        )

    before = rows(), calls("OK"), calls("INVALID_ARGUMENT")
    client.encode(digits[:123])
    with digits_server.stub() as stub, pytest.raises(grpc.RpcError):
        stub.Encode(pb.EncodeRequest())
    assert (rows(), calls("OK"), calls("INVALID_ARGUMENT")) == (
        before[0] + 123,
        before[1] + 1,
        before[2] + 1,
    )


def test_the_model_is_named_with_its_fingerprint(digits_server, client):
    model = client.model()
    assert digits_server.metric("semid_model_info", fingerprint=model.fingerprint) == 1.0
    assert digits_server.metric("semid_serving") == 1.0


def test_the_queue_is_empty_when_nobody_calls(digits_server):
    for name in ("semid_queue_requests", "semid_queue_rows", "semid_queue_bytes"):
        # What callers of tests before this one withdrew may take a moment to go.
        wait_until(lambda name=name: digits_server.metric(name) == 0.0)
