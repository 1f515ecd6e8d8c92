from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]
    DATA_TYPE_FLOAT64: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]
    DATA_TYPE_UINT16: _ClassVar[DataType]
    DATA_TYPE_UINT32: _ClassVar[DataType]

class DecodeMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DECODE_MODE_UNSPECIFIED: _ClassVar[DecodeMode]
    DECODE_MODE_SUM: _ClassVar[DecodeMode]
    DECODE_MODE_CALIBRATED: _ClassVar[DecodeMode]

class ModelKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODEL_KIND_UNSPECIFIED: _ClassVar[ModelKind]
    MODEL_KIND_RQ_KMEANS: _ClassVar[ModelKind]
    MODEL_KIND_R_VQ: _ClassVar[ModelKind]
    MODEL_KIND_RQ_VAE: _ClassVar[ModelKind]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_BFLOAT16: DataType
DATA_TYPE_FLOAT64: DataType
DATA_TYPE_UINT8: DataType
DATA_TYPE_UINT16: DataType
DATA_TYPE_UINT32: DataType
DECODE_MODE_UNSPECIFIED: DecodeMode
DECODE_MODE_SUM: DecodeMode
DECODE_MODE_CALIBRATED: DecodeMode
MODEL_KIND_UNSPECIFIED: ModelKind
MODEL_KIND_RQ_KMEANS: ModelKind
MODEL_KIND_R_VQ: ModelKind
MODEL_KIND_RQ_VAE: ModelKind

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class SharedTensor(_message.Message):
    __slots__ = ("dtype", "shape", "segment", "offset")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    segment: str
    offset: int
    def __init__(self, dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., segment: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class FloatRows(_message.Message):
    __slots__ = ("rows",)
    class Row(_message.Message):
        __slots__ = ("values",)
        VALUES_FIELD_NUMBER: _ClassVar[int]
        values: _containers.RepeatedScalarFieldContainer[float]
        def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[FloatRows.Row]
    def __init__(self, rows: _Optional[_Iterable[_Union[FloatRows.Row, _Mapping]]] = ...) -> None: ...

class CodeRows(_message.Message):
    __slots__ = ("rows",)
    class Row(_message.Message):
        __slots__ = ("codes",)
        CODES_FIELD_NUMBER: _ClassVar[int]
        codes: _containers.RepeatedScalarFieldContainer[int]
        def __init__(self, codes: _Optional[_Iterable[int]] = ...) -> None: ...
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[CodeRows.Row]
    def __init__(self, rows: _Optional[_Iterable[_Union[CodeRows.Row, _Mapping]]] = ...) -> None: ...

class EncodeRequest(_message.Message):
    __slots__ = ("model", "expected_fingerprint", "tensor", "rows", "shared")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    SHARED_FIELD_NUMBER: _ClassVar[int]
    model: str
    expected_fingerprint: str
    tensor: Tensor
    rows: FloatRows
    shared: SharedTensor
    def __init__(self, model: _Optional[str] = ..., expected_fingerprint: _Optional[str] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., rows: _Optional[_Union[FloatRows, _Mapping]] = ..., shared: _Optional[_Union[SharedTensor, _Mapping]] = ...) -> None: ...

class EncodeResponse(_message.Message):
    __slots__ = ("fingerprint", "tensor", "rows")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    tensor: Tensor
    rows: CodeRows
    def __init__(self, fingerprint: _Optional[str] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., rows: _Optional[_Union[CodeRows, _Mapping]] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("model", "expected_fingerprint", "mode", "tensor", "rows")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    model: str
    expected_fingerprint: str
    mode: DecodeMode
    tensor: Tensor
    rows: CodeRows
    def __init__(self, model: _Optional[str] = ..., expected_fingerprint: _Optional[str] = ..., mode: _Optional[_Union[DecodeMode, str]] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., rows: _Optional[_Union[CodeRows, _Mapping]] = ...) -> None: ...

class DecodeResponse(_message.Message):
    __slots__ = ("fingerprint", "tensor", "rows", "calibration")
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    fingerprint: str
    tensor: Tensor
    rows: FloatRows
    calibration: str
    def __init__(self, fingerprint: _Optional[str] = ..., tensor: _Optional[_Union[Tensor, _Mapping]] = ..., rows: _Optional[_Union[FloatRows, _Mapping]] = ..., calibration: _Optional[str] = ...) -> None: ...

class EncodeStreamRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: EncodeRequest
    def __init__(self, request: _Optional[_Union[EncodeRequest, _Mapping]] = ...) -> None: ...

class EncodeStreamResponse(_message.Message):
    __slots__ = ("response",)
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    response: EncodeResponse
    def __init__(self, response: _Optional[_Union[EncodeResponse, _Mapping]] = ...) -> None: ...

class DecodeStreamRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: DecodeRequest
    def __init__(self, request: _Optional[_Union[DecodeRequest, _Mapping]] = ...) -> None: ...

class DecodeStreamResponse(_message.Message):
    __slots__ = ("response",)
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    response: DecodeResponse
    def __init__(self, response: _Optional[_Union[DecodeResponse, _Mapping]] = ...) -> None: ...

class ShareMemoryRequest(_message.Message):
    __slots__ = ("name", "size_bytes", "proof")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    proof: bytes
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., proof: _Optional[bytes] = ...) -> None: ...

class ShareMemoryResponse(_message.Message):
    __slots__ = ("segment",)
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    segment: str
    def __init__(self, segment: _Optional[str] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: Model
    def __init__(self, model: _Optional[_Union[Model, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models", "default_model")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_MODEL_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[Model]
    default_model: str
    def __init__(self, models: _Optional[_Iterable[_Union[Model, _Mapping]]] = ..., default_model: _Optional[str] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "fingerprint", "kind", "input_dim", "layers", "normalize_residuals", "code_dtype", "decode_modes", "limits", "calibration")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    INPUT_DIM_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_RESIDUALS_FIELD_NUMBER: _ClassVar[int]
    CODE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    DECODE_MODES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    CALIBRATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    fingerprint: str
    kind: ModelKind
    input_dim: int
    layers: _containers.RepeatedCompositeFieldContainer[Layer]
    normalize_residuals: bool
    code_dtype: DataType
    decode_modes: _containers.RepeatedScalarFieldContainer[DecodeMode]
    limits: Limits
    calibration: str
    def __init__(self, name: _Optional[str] = ..., fingerprint: _Optional[str] = ..., kind: _Optional[_Union[ModelKind, str]] = ..., input_dim: _Optional[int] = ..., layers: _Optional[_Iterable[_Union[Layer, _Mapping]]] = ..., normalize_residuals: _Optional[bool] = ..., code_dtype: _Optional[_Union[DataType, str]] = ..., decode_modes: _Optional[_Iterable[_Union[DecodeMode, str]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., calibration: _Optional[str] = ...) -> None: ...

class Layer(_message.Message):
    __slots__ = ("codebook_width", "embedding_dim")
    CODEBOOK_WIDTH_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_DIM_FIELD_NUMBER: _ClassVar[int]
    codebook_width: int
    embedding_dim: int
    def __init__(self, codebook_width: _Optional[int] = ..., embedding_dim: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "max_rows", "shared_memory")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    SHARED_MEMORY_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_rows: int
    shared_memory: SharedMemoryLimits
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_rows: _Optional[int] = ..., shared_memory: _Optional[_Union[SharedMemoryLimits, _Mapping]] = ...) -> None: ...

class SharedMemoryLimits(_message.Message):
    __slots__ = ("max_bytes", "max_segments", "max_rows", "max_request_bytes")
    MAX_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    max_bytes: int
    max_segments: int
    max_rows: int
    max_request_bytes: int
    def __init__(self, max_bytes: _Optional[int] = ..., max_segments: _Optional[int] = ..., max_rows: _Optional[int] = ..., max_request_bytes: _Optional[int] = ...) -> None: ...
