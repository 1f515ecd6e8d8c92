"""What a server is trusted with stays out of its logs, however much it is told to say."""

from __future__ import annotations

import hashlib
import json

import grpc
import trustme
from waiting import wait_until

from semid.v1 import semid_pb2 as pb
from semid.v1.semid_pb2_grpc import SemanticIdServiceStub

GOOD, WRONG = "a-token-that-is-good", "a-token-that-is-guessed"


def test_no_log_line_holds_a_token_or_a_key(serve, reference_dir, tmp_path):
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    certificate, key, tokens = (tmp_path / name for name in ("cert.pem", "key.pem", "tokens"))
    issued.cert_chain_pems[0].write_to_path(certificate)
    issued.private_key_pem.write_to_path(key)
    hashed = hashlib.sha256(GOOD.encode()).hexdigest()
    tokens.write_text(f"{hashed}\n")
    server = serve(
        reference_dir / "digits_rkmeans/model.ckpt",
        *("--log-level=debug", "--log-format=json"),
        *(f"--tls-cert={certificate}", f"--tls-key={key}", f"--token-file={tokens}"),
    )
    target = f"localhost:{server.target.rpartition(':')[2]}"

    def code_with(token):
        credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        options = [("grpc.use_local_subchannel_pool", 1)]
        with grpc.secure_channel(target, credentials, options) as channel:
            call = SemanticIdServiceStub(channel).GetModel.future(
                pb.GetModelRequest(), timeout=60, metadata=[("authorization", f"Bearer {token}")]
            )
            return call.code()

    assert code_with(GOOD) is grpc.StatusCode.OK
    assert code_with(WRONG) is grpc.StatusCode.UNAUTHENTICATED
    # A key that does not fit: the log says so a moment later, and not what is in it.
    other = trustme.CA().issue_cert("localhost").private_key_pem
    other.write_to_path(key)
    wait_until(lambda: "stay in use" in server.stderr())
    assert code_with(GOOD) is grpc.StatusCode.OK
    assert server.stop() == 0
    said = server.stderr() + "\n".join(server.said)
    assert all(json.loads(line) for line in server.stderr().splitlines())
    for pem in (issued.private_key_pem, other):
        for line in pem.bytes().decode().splitlines():
            assert line not in said
    for secret in (GOOD, WRONG, hashed, "PRIVATE KEY"):
        assert secret not in said
