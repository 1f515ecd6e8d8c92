"""The quantiser: residual quantisation and its parts in plain torch. The definition of a code."""

from semid_server.model.build import build_model
from semid_server.model.clustering import MiniBatchKMeansInitializer
from semid_server.model.decoding import Calibration, DecodeMode
from semid_server.model.distances import SquaredEuclideanDistance
from semid_server.model.initializers import KMeansPlusPlusInitInitializer
from semid_server.model.layers import MiniBatchKMeans, VectorQuantization
from semid_server.model.losses import BetaQuantizationLoss, WeightedSquaredError
from semid_server.model.networks import MLP, L2Normalize
from semid_server.model.residual_quantization import Quantized, ResidualQuantization
from semid_server.model.spec import NORM_EPS, Activation, ModelKind, ModelSpec

__all__ = [
    "MLP",
    "NORM_EPS",
    "Activation",
    "BetaQuantizationLoss",
    "Calibration",
    "DecodeMode",
    "KMeansPlusPlusInitInitializer",
    "L2Normalize",
    "MiniBatchKMeans",
    "MiniBatchKMeansInitializer",
    "ModelKind",
    "ModelSpec",
    "Quantized",
    "ResidualQuantization",
    "SquaredEuclideanDistance",
    "VectorQuantization",
    "WeightedSquaredError",
    "build_model",
]
