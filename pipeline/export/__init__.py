"""Models as programs that run without this project: torch.export, ONNX, and plain files with a card."""
