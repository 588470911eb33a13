"""Read the tensors and node wiring of an ONNX file without the `onnx` package.

An ONNX file is a protocol-buffer message; of its schema (onnx.proto3) only five messages
and eleven fields are needed to recover weights, so this reader walks the wire format itself.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

# onnx.proto3: TensorProto.DataType
_DTYPES = {
    1: np.float32,
    2: np.uint8,
    3: np.int8,
    6: np.int32,
    7: np.int64,
    9: np.bool_,
    10: np.float16,
    11: np.float64,
}


@dataclass(frozen=True)
class Node:
    """One operator of the graph."""

    name: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_onnx(path: str | Path) -> tuple[dict[str, np.ndarray], list[Node]]:
    """Initializers by name and the nodes in file order.

    Raises ValueError when the file is not an ONNX model with its weights inside.
    """
    data = memoryview(Path(path).read_bytes())
    graphs = [value for field, value in _fields(data) if field == 7 and isinstance(value, memoryview)]
    if len(graphs) != 1:
        raise ValueError(f"{path} is not an ONNX model: it holds {len(graphs)} graphs instead of 1")
    nodes, tensors = [], {}
    for field, value in _fields(graphs[0]):
        if field == 1:
            nodes.append(_node(value))
        elif field == 5:
            name, array = _tensor(value)
            tensors[name] = array
    return tensors, nodes


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data):
            raise ValueError("the ONNX file ends in the middle of a number: it is truncated")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("not an ONNX file: a number of more than 64 bits")


def _fields(data: memoryview):
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        else:
            if kind == 1:
                size = 8
            elif kind == 2:
                size, at = _varint(data, at)
            elif kind == 5:
                size = 4
            else:
                raise ValueError(f"not an ONNX file: unknown wire type {kind}")
            if at + size > len(data):
                raise ValueError("the ONNX file ends in the middle of a message: it is truncated")
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _node(data: memoryview) -> Node:
    inputs, outputs, name, op_type = [], [], "", ""
    for field, value in _fields(data):
        if field == 1:
            inputs.append(bytes(value).decode())
        elif field == 2:
            outputs.append(bytes(value).decode())
        elif field == 3:
            name = bytes(value).decode()
        elif field == 4:
            op_type = bytes(value).decode()
    return Node(name, op_type, tuple(inputs), tuple(outputs))


def _tensor(data: memoryview) -> tuple[str, np.ndarray]:
    dims, dtype, name, raw = [], 0, "", None
    for field, value in _fields(data):
        if field == 1:
            if isinstance(value, int):
                dims.append(value)
            else:  # packed repeated int64
                at = 0
                while at < len(value):
                    size, at = _varint(value, at)
                    dims.append(size)
        elif field == 2:
            dtype = value
        elif field == 8:
            name = bytes(value).decode()
        elif field == 9:
            raw = value
    if dtype not in _DTYPES:
        raise ValueError(f"ONNX tensor {name!r} has the unsupported data type {dtype}")
    if raw is None:
        raise ValueError(f"ONNX tensor {name!r} holds no raw data (external data files are not supported)")
    array = np.frombuffer(raw, dtype=np.dtype(_DTYPES[dtype]).newbyteorder("<"))
    if array.size != int(np.prod(dims, dtype=np.int64)):
        raise ValueError(f"ONNX tensor {name!r} has {array.size} values for the shape {tuple(dims)}")
    return name, array.reshape(dims)
