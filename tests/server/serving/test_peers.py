"""Who calls, and what each may have in work."""

from __future__ import annotations

import asyncio
import socket

import grpc
import grpc.aio
import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from semid_server.errors import OverloadedError
from semid_server.serving.peers import PeerBytes, caller_of, cut_off


class Context:
    def __init__(self, peer="ipv4:10.0.0.7:5000", names=(), authorization=None, before=()):
        self._peer, self._names, self._authorization = peer, names, authorization
        self._before = before

    def peer(self):
        return self._peer

    def auth_context(self):
        return {"x509_common_name": list(self._names)} if self._names else {}

    def invocation_metadata(self):
        sent = (("user-agent", "x"), *(("authorization", text) for text in self._before))
        return (
            sent if self._authorization is None else (*sent, ("authorization", self._authorization))
        )


def name(context, *, certificates=False, tokens=False):
    return caller_of(context, certificates=certificates, tokens=tokens)


def test_a_caller_is_its_address_without_the_port():
    assert name(Context()) == name(Context("ipv4:10.0.0.7:6000")) == "ipv4:10.0.0.7"
    assert name(Context("ipv6:%5B::1%5D:50000")) == "ipv6:%5B::1%5D"


def test_a_caller_is_its_token_where_tokens_are_checked_and_the_token_is_not_shown():
    one, two = Context(authorization="Bearer one"), Context(authorization="Bearer two")
    assert name(one) == name(two)
    assert name(one, tokens=True) != name(two, tokens=True)
    assert "one" not in name(one, tokens=True)


def test_nobody_is_several_callers_by_one_token():
    one = Context(authorization="Bearer one")
    spelled = Context(authorization="bEARER one")
    hidden = Context(before=["Bearer two", "x"], authorization="Bearer one")  # the last is checked
    assert name(one, tokens=True) == name(spelled, tokens=True) == name(hidden, tokens=True)


def test_a_caller_is_the_name_in_its_certificate_where_those_are_verified():
    context = Context(names=[b"recommender"], authorization="Bearer one")
    assert name(context, certificates=True, tokens=True) == "certificate [[b'recommender'], []]"
    assert name(context) == "ipv4:10.0.0.7"


async def test_certificates_of_one_common_name_are_told_apart_by_their_other_names():
    authority = trustme.CA()
    server_certificate = authority.issue_cert("localhost")
    callers = []

    async def note(_request, context):
        callers.append(name(context, certificates=True))
        return b""

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(note)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", {"m": handler}),))
    roots = authority.cert_pem.bytes()
    chain = b"".join(pem.bytes() for pem in server_certificate.cert_chain_pems)
    credentials = grpc.ssl_server_credentials(
        [(server_certificate.private_key_pem.bytes(), chain)], roots, require_client_auth=True
    )
    port = server.add_secure_port("localhost:0", credentials)
    await server.start()
    for other in ("a.example", "b.example", "a.example"):
        own = authority.issue_cert(other, common_name="recommender")
        credentials = grpc.ssl_channel_credentials(
            roots, own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes()
        )
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials, options) as channel:
            await channel.unary_unary("/s/m")(b"")
    await server.stop(None)
    first, second, again = callers
    assert first == again != second
    assert first == "certificate [[b'recommender'], [b'a.example']]"


def test_a_caller_may_have_so_many_bytes_in_work_and_others_as_many():
    peers = PeerBytes(100)
    peers.take("a", 60)
    with pytest.raises(
        OverloadedError, match=r"60 bytes of this caller .* 41 more .* limit of 100"
    ):
        peers.take("a", 41)
    peers.take("b", 100)
    peers.take("a", 40)
    peers.give_back("a", 60)
    peers.take("a", 60)
    assert (peers.of("a"), peers.of("b")) == (100, 100)


def test_a_single_request_may_be_larger():
    peers = PeerBytes(100)
    peers.take("a", 1000)
    peers.give_back("a", 1000)
    assert peers.of("a") == 0


async def test_streams_wait_for_room_in_the_order_in_which_they_came():
    peers = PeerBytes(100)
    peers.take("a", 100)
    order = []

    async def take(nbytes):
        await peers.take_when_room("a", nbytes)
        order.append(nbytes)

    tasks = [asyncio.create_task(take(nbytes)) for nbytes in (90, 10, 20)]
    await asyncio.sleep(0)
    assert order == []
    peers.give_back("a", 100)
    await asyncio.gather(*tasks[:2])
    assert order == [90, 10]
    peers.give_back("a", 90)
    await tasks[2]


async def test_small_requests_that_keep_coming_do_not_keep_a_large_one_waiting():
    peers = PeerBytes(100)
    for _ in range(10):
        peers.take("a", 10)
    large = asyncio.create_task(peers.take_when_room("a", 50))
    await asyncio.sleep(0)
    small = []
    for _ in range(5):  # each as soon as there is room for it, before the large one can look
        peers.give_back("a", 10)
        small.append(asyncio.create_task(peers.take_when_room("a", 10)))
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert large.done()
    assert not any(task.done() for task in small)
    peers.give_back("a", 50)
    await asyncio.gather(*small)
    assert peers.of("a") == 100


async def test_those_behind_one_who_leaves_take_the_room_that_there_is():
    peers = PeerBytes(100)
    peers.take("a", 60)
    large, small = (asyncio.create_task(peers.take_when_room("a", size)) for size in (50, 40))
    await asyncio.sleep(0)
    assert peers.of("a") == 60
    large.cancel()
    await small
    assert peers.of("a") == 100


async def test_of_those_who_leave_nothing_stays_behind_one_who_waits():
    peers = PeerBytes(100)
    peers.take("a", 60)
    waiting = [asyncio.create_task(peers.take_when_room("a", 50)) for _ in range(100)]
    await asyncio.sleep(0)
    for task in waiting[1:]:
        task.cancel()
    await asyncio.wait(waiting[1:])
    assert len(peers._waiting["a"]) == 1
    peers.give_back("a", 60)
    await waiting[0]
    assert peers.of("a") == 50
    assert not peers._waiting


async def test_one_who_gives_up_waiting_does_not_block_the_next():
    peers = PeerBytes(100)
    peers.take("a", 100)
    first, second = (asyncio.create_task(peers.take_when_room("a", 100)) for _ in range(2))
    await asyncio.sleep(0)
    peers.give_back("a", 100)
    first.cancel()  # woken already
    await second
    assert peers.of("a") == 100
    assert first.cancelled()


@settings(deadline=None)
@given(requests=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 150)), max_size=30))
def test_what_is_in_work_never_exceeds_the_limit_but_by_a_single_request(requests):
    async def scenario():
        peers = PeerBytes(100)
        active = {"a": [], "b": []}

        async def work(caller, nbytes):
            await peers.take_when_room(caller, nbytes)
            active[caller].append(nbytes)
            used = [size for size in active[caller] if size]
            assert sum(used) <= 100 or len(used) == 1
            await asyncio.sleep(0)
            active[caller].remove(nbytes)
            peers.give_back(caller, nbytes)

        await asyncio.gather(*(work(*request) for request in requests))
        assert peers.of("a") == peers.of("b") == 0

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("family", "bind", "connect", "peer"),
    [
        (socket.AF_INET, "127.0.0.1", "127.0.0.1", "ipv4:127.0.0.1:{}"),
        # As gRPC listens, and as it tells of who calls by IPv4 nevertheless.
        (socket.AF_INET6, "::", "127.0.0.1", "ipv4:127.0.0.1:{}"),
        (socket.AF_INET6, "::1", "::1", "ipv6:%5B::1%5D:{}"),
    ],
)
def test_a_peer_that_is_cut_off_loses_its_connection_and_nobody_else_does(
    family, bind, connect, peer
):
    with socket.create_server((bind, 0), family=family, dualstack_ipv6=bind == "::") as listening:
        port = listening.getsockname()[1]
        with (
            socket.create_connection((connect, port)) as one,
            socket.create_connection((connect, port)) as other,
        ):
            (accepted_one, _), (accepted_other, _) = listening.accept(), listening.accept()
            with accepted_one, accepted_other:
                assert cut_off(peer.format(one.getsockname()[1]))
                assert one.recv(1) == b""
                accepted_other.sendall(b"x")
                assert other.recv(1) == b"x"


@pytest.mark.parametrize("peer", ["ipv4:192.0.2.1:1", "unix:/run/semid.sock", "unix:"])
def test_of_a_peer_that_is_not_there_nothing_is_cut_off(peer):
    assert not cut_off(peer)
