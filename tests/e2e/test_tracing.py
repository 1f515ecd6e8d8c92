"""`semid serve --tracing` exports to a collector, here a small one of the test's own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc

from semid_client import Client


class Collector(otlp_grpc.TraceServiceServicer):
    """Keeps what is exported to it."""

    def __init__(self) -> None:
        self.received = []
        self.endpoint = ""

    def Export(self, request, context):  # noqa: N802 - the name in the contract
        self.received += request.resource_spans
        return otlp.ExportTraceServiceResponse()

    def spans(self):
        return [
            span
            for of_resource in self.received
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]


@pytest.fixture
def collector():
    collector = Collector()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        otlp_grpc.add_TraceServiceServicer_to_server(collector, server)
        collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        yield collector
        server.stop(None).wait()


def values(attributes):
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in attributes}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_spans_of_a_call_are_exported_before_the_server_ends(
    serve, reference_dir, digits, collector, processes
):
    server = serve(
        reference_dir / "digits_rkmeans/model.ckpt",
        *("--tracing", "--processes", processes),
        env={"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "60000"},
    )
    with Client(server.target) as client:
        client.encode(digits[:7])
    assert server.stop() == 0
    names = {values(part.resource.attributes)["service.name"] for part in collector.received}
    assert names == {"semid"}
    (call,) = (span for span in collector.spans() if span.name.endswith("/Encode"))
    (batch,) = (span for span in collector.spans() if span.name == "semid batch encode")
    assert [link.span_id for link in batch.links] == [call.span_id]
    assert values(call.attributes)["semid.rows"] == 7
