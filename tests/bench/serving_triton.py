"""A peer: the same model behind Triton and its Python package, nvidia-pytriton.

Run by the interpreter of an environment that holds nvidia-pytriton and tritonclient, whose numpy
and protobuf clash with semid's own; torch and semid are taken from the environment of the tests.

    serving_triton.py SITE_PACKAGES CHECKPOINT REQUESTS PORT predict_step|encoder|nothing ROWS...

writes the body of a ModelInfer request for each number of ROWS into the folder REQUESTS, prints
``ready HOST:PORT``, and ends when its stdin does.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    site_packages, checkpoint, requests = sys.argv[1:4]
    port, arithmetic = int(sys.argv[4]), sys.argv[5]
    # Last, so that this environment's own packages win.
    sys.path += [site_packages, str(Path(__file__).parents[2] / "server")]

    import numpy as np  # noqa: PLC0415 - must come from this environment
    import torch  # noqa: PLC0415 - found by the path set above
    from pytriton.decorators import batch  # noqa: PLC0415 - only in this environment
    from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor  # noqa: PLC0415
    from pytriton.triton import Triton, TritonConfig  # noqa: PLC0415
    from tritonclient.grpc import service_pb2 as messages  # noqa: PLC0415

    from semid_server.checkpoint import load_checkpoint  # noqa: PLC0415
    from semid_server.encoding import make_encoder  # noqa: PLC0415

    loaded = load_checkpoint(checkpoint)
    encoder = make_encoder(loaded.model, loaded.spec, device=torch.device("cpu"))
    encoder.warm_up()
    dim, layers = loaded.spec.input_dim, loaded.spec.n_layers

    for rows in map(int, sys.argv[6:]):
        values = np.random.default_rng(0).standard_normal((rows, dim), dtype=np.float32)
        message = messages.ModelInferRequest(
            model_name="encode", raw_input_contents=[values.tobytes()]
        )
        message.inputs.add(name="embeddings", datatype="FP32", shape=values.shape)
        (Path(requests) / f"triton-{rows}").write_bytes(message.SerializeToString())

    def predict_step(embeddings):
        rows = torch.from_numpy(np.array(embeddings))
        return loaded.model.predict_step(rows).codes.numpy().astype(np.uint8)

    def encode(embeddings):
        return encoder.encode(torch.from_numpy(np.array(embeddings))).numpy()

    def nothing(embeddings):
        return np.zeros((len(embeddings), layers), np.uint8)

    compute = {"predict_step": predict_step, "encoder": encode, "nothing": nothing}[arithmetic]

    @batch
    def infer(embeddings):
        return {"codes": compute(embeddings)}

    ports = dict(zip(("grpc", "http", "metrics"), range(port, port + 3), strict=True))
    settings = {f"{name}_port": port for name, port in ports.items()}
    settings |= {f"{name}_address": "127.0.0.1" for name in ("grpc", "http", "metrics")}
    with Triton(config=TritonConfig(**settings)) as triton:
        triton.bind(
            "encode",
            infer,
            [Tensor(name="embeddings", dtype=np.float32, shape=(dim,))],
            [Tensor(name="codes", dtype=np.uint8, shape=(layers,))],
            config=ModelConfig(max_batch_size=16384, batcher=DynamicBatcher()),
        )
        triton.run()
        print(f"ready 127.0.0.1:{ports['grpc']}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
