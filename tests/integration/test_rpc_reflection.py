"""Health and reflection, as every stock tool asks for them."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.support.server import ServerProcess, check_health


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("reflection") / "paycore.db") as process:
        yield process


@pytest.fixture(scope="module")
def channel(server: ServerProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as open_channel:
        yield open_channel


def ask(
    channel: grpc.Channel, request: reflection_pb2.ServerReflectionRequest
) -> reflection_pb2.ServerReflectionResponse:
    call = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    return next(iter(call(iter([request]), timeout=20)))


@pytest.mark.parametrize("service", ["", "paycore.v1.PaymentService"])
def test_health_of_a_started_server_is_serving(server: ServerProcess, service: str) -> None:
    assert check_health(server.address, service) == "SERVING"


def test_health_of_a_stranger_is_not_found(server: ServerProcess) -> None:
    assert check_health(server.address, "stranger") == "NOT_FOUND"


def test_reflection_lists_the_services(channel: grpc.Channel) -> None:
    answer = ask(channel, reflection_pb2.ServerReflectionRequest(list_services=""))
    assert {one.name for one in answer.list_services_response.service} == {
        "paycore.v1.PaymentService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_reflection_describes_every_method(channel: grpc.Channel) -> None:
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="paycore.v1.PaymentService")
    files = ask(channel, request).file_descriptor_response.file_descriptor_proto
    services = [one for data in files for one in descriptor_pb2.FileDescriptorProto.FromString(data).service]
    names = [method.name for one in services for method in one.method]
    assert names == ["Pay", "Notify", "NotifyBatch", "Query", "Close"]
