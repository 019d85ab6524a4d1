"""A folder ready to serve: merged weights, ONNX, int8, model card, each checked."""
