"""Models and rows that the tests, the sweep and the benchmark of encoding share."""

from __future__ import annotations

import torch
from torch import Tensor

from semid_server.encoding import ReferenceEncoder
from semid_server.model import Activation, ModelKind, ModelSpec, ResidualQuantization, build_model

CPU = torch.device("cpu")


def model_of(
    centroids: list[Tensor], *, normalize: bool = True
) -> tuple[ResidualQuantization, ModelSpec]:
    """A model without networks, of centroids float32 ``(K_l, D)``, one tensor a layer."""
    dim = centroids[0].shape[1]
    spec = ModelSpec(
        kind=ModelKind.RQ_KMEANS,
        input_dim=dim,
        codebook_widths=tuple(len(layer) for layer in centroids),
        embedding_dim=dim,
        normalize_residuals=normalize,
    )
    model = build_model(spec)
    model.load_state_dict(
        {f"quantization_layer_list.{i}.centroids": layer for i, layer in enumerate(centroids)}
    )
    return model, spec


def random_model(
    dim: int, widths: list[int], *, normalize: bool = True, length: float = 1.0, seed: int = 0
) -> tuple[ResidualQuantization, ModelSpec]:
    """A model of centroids in random directions, about ``length`` long."""
    generator = torch.Generator().manual_seed(seed)
    centroids = []
    for width in widths:
        layer = torch.randn(width, dim, generator=generator)
        scale = 0.5 + torch.rand(width, 1, generator=generator)
        centroids.append(length * scale * layer / layer.norm(dim=1, keepdim=True))
    return model_of(centroids, normalize=normalize)


def random_network_model(
    dim: int,
    hidden: tuple[int, ...],
    embedding_dim: int,
    widths: list[int],
    *,
    activation: Activation = Activation.RELU,
    normalize_input: bool = True,
    seed: int = 0,
) -> tuple[ResidualQuantization, ModelSpec]:
    """A model with batch norm and an MLP, all of them random."""
    spec = ModelSpec(
        kind=ModelKind.RQ_VAE,
        input_dim=dim,
        codebook_widths=tuple(widths),
        embedding_dim=embedding_dim,
        normalize_residuals=False,
        encoder_hidden_dims=hidden,
        decoder_hidden_dims=hidden[::-1],
        activation=activation,
        batch_norm=True,
        normalize_input=normalize_input,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(spec)
        state = model.state_dict()
        state["normalization_layer.0.running_mean"].normal_()
        state["normalization_layer.0.running_var"].uniform_(0.5, 2)
        state["normalization_layer.0.weight"].uniform_(0.5, 2)
        state["normalization_layer.0.bias"].normal_()
        with torch.no_grad():
            features = model.features(torch.randn(4 * max(widths), dim))
        for layer, width in enumerate(widths):
            chosen = features[torch.randperm(len(features))[:width]]
            state[f"quantization_layer_list.{layer}.centroids"].copy_(chosen / (layer + 1))
            features = features * 0.5
    return model, spec


def near_ties(
    model: ResidualQuantization, spec: ModelSpec, n: int, *, dtype: torch.dtype, seed: int = 0
) -> Tensor:
    """About ``3 n`` rows on borders between codes, and one unit in the last place to each side.

    Two random rows of different codes are brought together by bisection, whose midpoints are
    rounded to ``dtype``, until they are neighbours there: some code changes between them.
    """
    generator = torch.Generator().manual_seed(seed)
    reference = ReferenceEncoder(model, spec, device=CPU)
    low = torch.randn(n, spec.input_dim, generator=generator, dtype=torch.float64).to(dtype)
    high = torch.randn(n, spec.input_dim, generator=generator, dtype=torch.float64).to(dtype)
    of_low = reference.codes(low)
    for _ in range(70 if dtype == torch.float64 else 40):
        middle = ((low.double() + high.double()) / 2).to(dtype)
        same = (reference.codes(middle) == of_low).all(dim=1)[:, None]
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    moved = low.clone()
    place = torch.randint(spec.input_dim, (n, 1), generator=generator)
    picked = moved.gather(1, place)
    upwards = torch.rand(n, 1, generator=generator) < 0.5
    towards = torch.where(upwards, torch.inf, -torch.inf).to(dtype)
    moved.scatter_(1, place, torch.nextafter(picked, towards))
    return torch.cat([low, high, moved])


def hard_rows(model: ResidualQuantization, spec: ModelSpec, *, seed: int = 0) -> Tensor:
    """Rows float32 that are hard for arithmetic: zeros, extremes, rows that lie on centroids."""
    generator = torch.Generator().manual_seed(seed)
    dim = spec.input_dim
    normal = torch.randn(40, dim, generator=generator)
    scales = 2.0 ** torch.arange(-140, 121, 6.5)
    wild = torch.randn(len(scales), dim, generator=generator) * scales[:, None]
    uneven = torch.randn(40, dim, generator=generator) * (
        10.0 ** torch.randint(-20, 12, (40, dim), generator=generator)
    )
    subnormal = torch.randn(10, dim, generator=generator) * 1e-41
    spike = torch.zeros(dim, dim)[: min(dim, 20)]
    spike[torch.arange(len(spike)), torch.randperm(dim, generator=generator)[: len(spike)]] = 3.0
    rows = [
        normal,
        wild,
        uneven,
        subnormal,
        spike,
        -spike,
        torch.zeros(3, dim),
        -torch.zeros(1, dim),
    ]
    if spec.encoder_hidden_dims is None:
        first = model.layers[0].centroids.detach()
        chosen = first[torch.randint(len(first), (40,), generator=generator)]
        last = model.layers[-1].centroids.detach()
        added = last[torch.randint(len(last), (40,), generator=generator)]
        noise = torch.randn(40, dim, generator=generator)
        rows += [
            chosen,
            chosen * 3.7,
            chosen * (1 + 1e-7 * noise),
            chosen + 1e-5 * noise,
            chosen + added,
            chosen + 1e-9 * added,
        ]
    return torch.cat(rows)
