"""A model as an ONNX file, in float32 or in int8, and a session that runs it.

Any runtime and any language can load such a file; batch and length are free, inputs are named as
the tokenizer names them, and outputs as `transformers` does. A causal or an encoder-decoder model
gives the logits of whole sequences: keys and values are not kept between calls.

int8 is ONNX Runtime's dynamic quantisation: int8 weights with a scale for each output channel,
activations quantised as they come, so that no calibration data is needed. It was chosen by
measuring, one core, 64 tokens, 4 blocks of 256 channels (milliseconds; size of the file):

                                        BERT, 9 tags     Llama, 8,000 classes
    torch, float32                      17.1             31.9
    ONNX Runtime, float32               9.9   21.9 MB    17.4   33.8 MB
    **ONNX Runtime, int8**              7.0    5.9 MB     7.9    8.9 MB
    torch.ao quantize_dynamic           9.8              15.3
    torchao, int8 weights and inputs    26.5             37.4
    torchao, int8 weights               17.1             31.5

`torch.ao.quantization` is deprecated and saves by pickling; torchao wants itself and the model's
code to load what it saved. With random weights the largest differences of logits were alike.
"""

import inspect
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.errors import ConfigError, Refused

Arrays = dict[str, np.ndarray]
Runner = Callable[[Mapping[str, Tensor]], Arrays]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state")  # what models may give
_ONE_FILE_BYTES = 1_800_000_000  # protobuf ends at 2 GiB; larger weights go into a file beside it


def require_onnx() -> None:
    """Refuses before any work where a package is not installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--format onnx and int8 need {', '.join(missing)}: pip install 'teacher-cache[onnx]'"
        )


class _Positional(nn.Module):
    """The model as a function of tensors to tensors, which is what can be traced."""

    def __init__(self, model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self.options = {"use_cache": False} if takes_cache else {}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.inputs, tensors, strict=True))
        output = self.model(**named, **self.options)
        return tuple(output[name] for name in self.outputs)


def torch_runner(model: Any, outputs: Sequence[str]) -> Runner:
    """Runs a model of torch; its outputs as float32 arrays."""

    @torch.inference_mode()
    def run(inputs: Mapping[str, Tensor]) -> Arrays:
        names = list(inputs)
        tensors = _Positional(model, names, outputs)(*inputs.values())
        return {n: t.float().numpy() for n, t in zip(outputs, tensors, strict=True)}

    return run


def session_runner(path: Path) -> Runner:
    """Runs an ONNX file on as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin between calls would slow down what is timed beside them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> Arrays:
        arrays = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()})
        return dict(zip(names, arrays, strict=True))

    return run


def write_onnx(
    model: Any, example: Mapping[str, Tensor], outputs: Sequence[str], path: Path
) -> None:
    """Traces a float32 model on a batch of several rows of several tokens, and saves it."""
    axes = {name: {0: "batch", 1: _length_of(name)} for name in example}
    noisy = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in noisy]
    for logger in noisy:
        logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Positional(model, list(example), outputs).eval(),
                tuple(example.values()),
                dynamo=True,
                dynamic_shapes=(tuple(axes.values()),),
                input_names=list(example),
                output_names=list(outputs),
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise Refused(
            f"{type(model).__name__}: torch.onnx cannot trace this architecture, so there is no "
            f"onnx and no int8 of it. Export --format safetensors. ({_first_line(error)})"
        ) from error
    finally:
        for logger, level in zip(noisy, levels, strict=True):
            logger.setLevel(level)
    assert program is not None  # None only without dynamo
    found = [each.name for each in program.model.graph.inputs]
    assert found == list(example), f"inputs {found}, expected {list(example)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=_is_large(model))


def write_int8(model: Any, source: Path, path: Path) -> None:
    """Quantises the float32 file of a model."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()  # told of every tensor, and advised to pre-process: same bytes here
    root.addFilter(_is_error)
    try:
        quantize_dynamic(
            source,
            path,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=_is_large(model),
        )
    finally:
        root.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _is_large(model: Any) -> bool:
    return sum(p.numel() * p.element_size() for p in model.parameters()) > _ONE_FILE_BYTES


def _length_of(name: str) -> str:
    return "decoder_length" if name.startswith("decoder_") else "length"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
