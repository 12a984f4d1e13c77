"""ONNX Runtime: inference, by a model of one BatchNormalization and what is fused with it."""

from __future__ import annotations

import importlib

import numpy as np

from .cases import NormCase
from .peers import BETA, EPS, GAMMA, Call, Peer, arrays

OPSET = 15


class OnnxRuntime(Peer):
    """ONNX Runtime's CPU provider, with its default optimizations."""

    name, module, install = "onnxruntime", "onnxruntime", "pip install onnxruntime onnx"

    def __init__(self, threads: int) -> None:
        self.ort = importlib.import_module("onnxruntime")
        self.onnx = importlib.import_module("onnx")  # builds the model
        self.threads = threads

    def norm(self, case: NormCase) -> Call | None:
        if case.operation != "infer" or case.layout != "nchw" or case.dtype not in ("float32", "float64"):
            return None
        x, _, residual, out = arrays(case, 4)
        session = self.session(case)
        inputs = {"x": x} | ({"residual": residual} if case.fused == "add+relu" else {})
        if not case.preallocated:
            return lambda: session.run(None, inputs)[0]
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("y", "cpu", 0, out.dtype.type, out.shape, out.ctypes.data)

        def run() -> np.ndarray:
            session.run_with_iobinding(binding)
            return out

        return run

    def session(self, case: NormCase):
        helper, kind = self.onnx.helper, self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(case.dtype))
        c = case.shape[1]
        parameters = [
            helper.make_tensor(name, kind, [c], np.full(c, value))
            for name, value in (("gamma", GAMMA), ("beta", BETA), ("mean", 0.0), ("var", 1.0))
        ]
        steps = [("BatchNormalization", ["x", "gamma", "beta", "mean", "var"], {"epsilon": EPS})]
        steps += [("Add", ["BatchNormalization", "residual"], {})] if case.fused == "add+relu" else []
        steps += [("Relu", [steps[-1][0]], {})] if case.fused else []
        nodes = [
            helper.make_node(op, inputs, ["y" if op == steps[-1][0] else op], **attributes)
            for op, inputs, attributes in steps
        ]
        x, residual, y = (helper.make_tensor_value_info(name, kind, case.shape) for name in ("x", "residual", "y"))
        inputs = [x, residual] if case.fused == "add+relu" else [x]
        graph = helper.make_graph(nodes, "norm", inputs, [y], parameters)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        return self.ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
